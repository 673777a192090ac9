"""Late fusion: every modality votes alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from muroan.models.encoders import TokenFeatures
from muroan.models.fusion.base import Fusion
from muroan.models.heads import MLPHead


class LateFusion(Fusion):
    """A classifier a modality, on its pooled features; the fusion embedding is their stacked logits, (B, M*C).

    With the `SumHead` no modality can change what another one adds, so a question whose answer needs both at
    once is out of its reach; a linear head weighs the votes.
    """

    def __init__(self, widths: Mapping[str, int], num_classes: int, hidden: int = 256, dropout: float = 0.0):
        super().__init__(widths)
        self.width = len(widths) * num_classes
        self.classifiers = nn.ModuleDict(
            {name: MLPHead(width, num_classes, hidden, dropout) for name, width in widths.items()}
        )

    def forward(self, features: Mapping[str, TokenFeatures]) -> Tensor:
        pooled = zip(self.widths, self.pooled(features), strict=True)
        return torch.cat([self.classifiers[name](x) for name, x in pooled], 1)
