"""The control of all defences: the same further training, on clean samples alone."""

from __future__ import annotations

from typing import Any

from muroan.attacks.base import ThreatModel
from muroan.defenses.base import Defense
from muroan.models.base import MultimodalModel


class PlainTraining(Defense):
    """Goes on training as before. What a defence gains beyond this is the defence's, not the longer training's."""

    control = True

    def __init__(self, model: MultimodalModel, threat_model: ThreatModel | None = None, seed: int = 0, **training: Any):
        super().__init__(model, 0.0, threat_model, seed, **training)
