"""Low-rank tensor fusion: a linear layer on the outer product, without the outer product."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from muroan.models.encoders import TokenFeatures
from muroan.models.fusion.base import Fusion


class LowRankFusion(Fusion):
    """Low-rank multimodal fusion (Liu et al. 2018, arXiv 1806.00064, equations 4 to 6).

    With h_m as in `TensorFusion`, a linear layer on the outer product of all [1; h_m] whose weight has rank R is
    the sum over r of the product over m of w_m^r [1; h_m]. The fusion embedding is that layer's output, (B, width).

    Args:
        factor: size of h_m; width: D; rank: R.
    """

    def __init__(self, widths: Mapping[str, int], num_classes: int, factor: int = 64, width: int = 128, rank: int = 4):
        super().__init__(widths)
        self.width = width
        self.project = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(d, factor), nn.ReLU()) for name, d in widths.items()}
        )
        self.factors = nn.ParameterDict(
            {name: torch.randn(rank, factor + 1, width) / math.sqrt(factor + 1) for name in widths}
        )
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, features: Mapping[str, TokenFeatures]) -> Tensor:
        product: Tensor | float = 1.0
        for name, x in zip(self.widths, self.pooled(features), strict=True):
            h = self.project[name](x)
            h = torch.cat([torch.ones_like(h[:, :1]), h], 1)  # (B, factor + 1)
            product = product * torch.einsum("bi,rid->brd", h, self.factors[name])  # (B, R, D)
        assert isinstance(product, Tensor)
        return product.sum(1) + self.bias
