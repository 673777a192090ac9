"""Gated fusion."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from muroan.models.encoders import TokenFeatures
from muroan.models.fusion.base import Fusion


class GatedFusion(Fusion):
    """The gated multimodal unit (Arevalo et al. 2017, arXiv 1702.01992, section 3.1 and figure 2).

    With x the pooled features: h_m = tanh(W_m x_m); two modalities share one gate g = sigmoid(W_g [x_1, x_2]) in
    g * h_1 + (1 - g) * h_2; with any other number each has its own gate, and the gated h_m are summed. The fusion
    embedding is that sum, (B, width).
    """

    def __init__(self, widths: Mapping[str, int], num_classes: int, width: int = 128):
        super().__init__(widths)
        self.width = width
        # The layers have no bias, as in the paper.
        self.hidden = nn.ModuleDict({name: nn.Linear(d, width, bias=False) for name, d in widths.items()})
        gates = 1 if len(widths) == 2 else len(widths)
        self.gate = nn.Linear(sum(widths.values()), gates * width, bias=False)

    def forward(self, features: Mapping[str, TokenFeatures]) -> Tensor:
        x = self.pooled(features)
        hidden = torch.stack([self.hidden[n](f).tanh() for n, f in zip(self.widths, x, strict=True)], 1)  # (B, M, D)
        gates = self.gate(torch.cat(x, 1)).sigmoid().unflatten(1, (-1, self.width))  # (B, 1 or M, D)
        if len(self.widths) == 2:
            gates = torch.cat([gates, 1 - gates], 1)
        return (gates * hidden).sum(1)
