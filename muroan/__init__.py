"""MUROAN, the MUltimodal RObustness ANalyzer: how few image regions, words or sounds flip a multimodal model."""

from muroan.attacks.base import Attack, ThreatModel
from muroan.engine import QueryEngine, evaluate
from muroan.errors import MuroanError
from muroan.results import AttackResult

__version__ = "0.1.0"
__all__ = ["Attack", "AttackResult", "MuroanError", "QueryEngine", "ThreatModel", "evaluate"]
