"""MUROAN, the MUltimodal RObustness ANalyzer: how few image regions, words or sounds flip a multimodal model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from muroan.attacks.base import Attack, ThreatModel
    from muroan.engine import QueryEngine, evaluate
    from muroan.errors import MuroanError
    from muroan.results import AttackResult

__version__ = "0.1.0"
__all__ = ["Attack", "AttackResult", "MuroanError", "QueryEngine", "ThreatModel", "evaluate"]

_HOMES = {"Attack": "attacks.base", "ThreatModel": "attacks.base", "AttackResult": "results", "MuroanError": "errors"}


def __getattr__(name: str) -> Any:
    # Imported at first use: torch takes seconds, and `muroan --help` should not.
    if name in __all__:
        return getattr(import_module(f"muroan.{_HOMES.get(name, 'engine')}"), name)
    raise AttributeError(f"module 'muroan' has no attribute {name!r}")
