"""Heads: the fusion embedding (B, D) to logits (B, C)."""

from __future__ import annotations

from torch import Tensor, nn

from muroan.errors import MuroanError


class LinearHead(nn.Linear):
    """One linear layer, (B, D) to (B, C)."""

    def __init__(self, width: int, num_classes: int):
        super().__init__(width, num_classes)


class MLPHead(nn.Sequential):
    """One hidden layer, (B, D) to (B, C)."""

    def __init__(self, width: int, num_classes: int, hidden: int = 256, dropout: float = 0.0):
        super().__init__(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, num_classes))


class SumHead(nn.Module):
    """The sum of stacked unimodal logits, (B, M*C) to (B, C); it has nothing to learn.

    Raises:
        MuroanError: the embedding cannot be M rows of C logits.
    """

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        if width % num_classes:
            raise MuroanError(
                f"the sum head adds up logits of {num_classes} classes, but the fusion embedding is {width} wide: "
                "choose model/head=linear or mlp, or model/fusion=late_fusion"
            )
        self.num_classes = num_classes

    def forward(self, embedding: Tensor) -> Tensor:
        """
        Args:
            embedding: (B, M*C).
        """
        return embedding.unflatten(1, (-1, self.num_classes)).sum(1)
