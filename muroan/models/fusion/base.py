"""What a fusion is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from muroan.models.encoders import TokenFeatures


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """The mean of the real tokens, zeros where there are none.

    Args:
        tokens: (B, N, D); mask: (B, N) bool.

    Returns:
        (B, D).
    """
    weights = mask.to(tokens.dtype)[..., None]
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)


class Fusion(nn.Module, ABC):
    """Fuses any number of modalities; a subclass defines `forward` and sets `width`, D of the fusion embedding.

    A subclass is built from `widths`, the D of each modality's tokens by name, and `num_classes`, then its numbers.
    """

    width: int

    def __init__(self, widths: Mapping[str, int]):
        super().__init__()
        self.widths = dict(widths)

    @abstractmethod
    def forward(self, features: Mapping[str, TokenFeatures]) -> Tensor:
        """The fusion embedding (B, D).

        Args:
            features: tokens (B, N, D) and their mask (B, N) by modality, D and N each modality's own.
        """

    def pooled(self, features: Mapping[str, TokenFeatures]) -> list[Tensor]:
        """Each modality's tokens averaged, (B, D) a modality, always in the order of `widths`."""
        return [masked_mean(*features[name]) for name in self.widths]
