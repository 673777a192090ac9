"""Cross attention: a stream a modality, each attending to the others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from muroan.models.encoders import TokenFeatures
from muroan.models.fusion.base import Fusion, masked_mean
from muroan.models.transformer import Attention, Block


class CrossAttentionLayer(nn.Module):
    """What one stream does in one layer: attend to the others, if there are any, then to itself, then feed forward."""

    def __init__(self, width: int, heads: int, dropout: float, alone: bool):
        super().__init__()
        if not alone:
            self.norm, self.context_norm = nn.LayerNorm(width), nn.LayerNorm(width)
            self.cross = Attention(width, heads, dropout)
            self.dropout = nn.Dropout(dropout)
        self.block = Block(width, heads, dropout)

    def forward(self, x: Tensor, mask: Tensor, others: list[Tensor], other_masks: list[Tensor]) -> Tensor:
        """
        Args:
            x: (B, N, D) and its mask (B, N); others: (B, M, D) a stream and their masks (B, M).
        """
        if others:
            context, real = self.context_norm(torch.cat(others, 1)), torch.cat(other_masks, 1)
            x = x + self.dropout(self.cross(self.norm(x), context, real))
        return self.block(x, mask)


class CrossAttentionFusion(Fusion):
    """Streams that attend to each other, as in LXMERT's cross-modality encoder (Tan and Bansal 2019, arXiv 1908.07490).

    In every layer each modality's tokens attend to those of all the others as they left the layer before, then to
    themselves. The fusion embedding is the streams' averages side by side, (B, M * width).
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        num_classes: int,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
    ):
        super().__init__(widths)
        self.width = len(widths) * width
        self.project = nn.ModuleDict({name: nn.Linear(d, width) for name, d in widths.items()})
        self.layers = nn.ModuleList(
            nn.ModuleDict({n: CrossAttentionLayer(width, heads, dropout, len(widths) == 1) for n in widths})
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Mapping[str, TokenFeatures]) -> Tensor:
        masks = {name: features[name][1] for name in self.widths}
        streams = {name: self.project[name](features[name][0]) for name in self.widths}  # (B, N, D) each
        others = {name: [other for other in self.widths if other != name] for name in self.widths}
        for layer in self.layers:
            streams = {
                name: layer[name](  # type: ignore[index]
                    x, masks[name], [streams[o] for o in others[name]], [masks[o] for o in others[name]]
                )
                for name, x in streams.items()
            }
        return torch.cat([masked_mean(self.norm(x), masks[name]) for name, x in streams.items()], 1)
