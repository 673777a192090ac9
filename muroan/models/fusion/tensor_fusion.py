"""Tensor fusion: every product of features across modalities."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from muroan.models.encoders import TokenFeatures
from muroan.models.fusion.base import Fusion


def outer_product(vectors: list[Tensor]) -> Tensor:
    """The outer product of vectors (B, D_m) that each start with a constant 1, flattened: (B, product of D_m + 1).

    >>> outer_product([torch.tensor([[2.0]]), torch.tensor([[3.0]])]).tolist()
    [[1.0, 3.0, 2.0, 6.0]]
    """
    product = vectors[0].new_ones(len(vectors[0]), 1)
    for vector in vectors:
        vector = torch.cat([torch.ones_like(vector[:, :1]), vector], 1)
        product = (product[:, :, None] * vector[:, None]).flatten(1)
    return product


class TensorFusion(Fusion):
    """The tensor fusion layer (Zadeh et al. 2017, arXiv 1707.07250, equation 2 and section 4.2).

    Each modality's pooled features go through a small layer, h_m of size `factor`; the fusion embedding is the outer
    product of all [1; h_m], (B, (factor + 1)^M): every modality alone, every pair, and so on.
    """

    def __init__(self, widths: Mapping[str, int], num_classes: int, factor: int = 24):
        super().__init__(widths)
        self.width = (factor + 1) ** len(widths)
        self.project = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(d, factor), nn.ReLU()) for name, d in widths.items()}
        )

    def forward(self, features: Mapping[str, TokenFeatures]) -> Tensor:
        pooled = zip(self.widths, self.pooled(features), strict=True)
        return outer_product([self.project[name](x) for name, x in pooled])
