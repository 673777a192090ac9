"""Single-stream fusion: one transformer over the tokens of all modalities."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from muroan.models.encoders import TokenFeatures
from muroan.models.fusion.base import Fusion
from muroan.models.transformer import Block


class MMBTFusion(Fusion):
    """The multimodal bitransformer in small (Kiela et al. 2019, arXiv 1909.02950).

    A transformer over [CLS, tokens of the first modality, tokens of the second, …], each projected to a common width
    and marked with its modality's segment embedding. The fusion embedding is the output at CLS, (B, width).
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        num_classes: int,
        width: int = 128,
        layers: int = 3,
        heads: int = 4,
        dropout: float = 0.0,
    ):
        super().__init__(widths)
        self.width = width
        self.project = nn.ModuleDict({name: nn.Linear(d, width) for name, d in widths.items()})
        # A segment embedding added to a modality's tokens is the bias of its projection; CLS is a segment alone.
        self.cls = nn.Parameter(0.02 * torch.randn(width))
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Mapping[str, TokenFeatures]) -> Tensor:
        tokens = [self.project[name](features[name][0]) for name in self.widths]
        x = torch.cat([self.cls.expand(len(tokens[0]), 1, -1), *tokens], 1)  # (B, 1 + sum of N, D)
        masks = [features[name][1] for name in self.widths]
        mask = torch.cat([masks[0].new_ones(len(x), 1), *masks], 1)
        for i, block in enumerate(self.blocks):
            x = block(x, mask, first=1 if i == len(self.blocks) - 1 else None)
        return self.norm(x[:, 0])
