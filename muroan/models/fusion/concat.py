"""Concatenation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from muroan.models.encoders import TokenFeatures
from muroan.models.fusion.base import Fusion


class ConcatFusion(Fusion):
    """The pooled features of all modalities side by side, (B, sum of D); a head that is not linear lets them meet."""

    def __init__(self, widths: Mapping[str, int], num_classes: int):
        super().__init__(widths)
        self.width = sum(widths.values())

    def forward(self, features: Mapping[str, TokenFeatures]) -> Tensor:
        return torch.cat(self.pooled(features), 1)
