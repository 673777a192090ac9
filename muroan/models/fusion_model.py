"""Models trained from scratch: one encoder a modality, a fusion, a head, each a separate choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from muroan.errors import MuroanError
from muroan.modalities import Modality
from muroan.models.base import Features, MultimodalModel


class FusionModel(MultimodalModel):
    """Encoders, fusion and head, put together for the modalities of a dataset.

    Args:
        encoders: by modality name, what builds an encoder from the modality (see `encoders`); those that the
            dataset has no modality for are left out.
        fusion: builds a fusion from the encoders' widths by name and the number of classes (see `fusion`).
        head: builds a head from the width of the fusion embedding and the number of classes (see `heads`).

    Raises:
        MuroanError: a modality has no encoder, or the parts do not fit each other.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        num_classes: int,
        encoders: Mapping[str, Callable[[Modality], Any]],
        fusion: Callable[[dict[str, int], int], Any],
        head: Callable[[int, int], nn.Module],
    ):
        super().__init__(modalities, num_classes)
        for name in modalities:
            if name not in encoders:
                raise MuroanError(
                    f"a model that does not fit the dataset: it has encoders for {sorted(encoders)}, the dataset has "
                    f"{list(modalities)}: add model.encoders.{name}"
                )
        built = {name: encoders[name](modality) for name, modality in modalities.items()}
        self.encoders = nn.ModuleDict(built)
        self.channels_last = [name for name, encoder in built.items() if getattr(encoder, "channels_last", False)]
        self.fusion = fusion({name: encoder.width for name, encoder in built.items()}, num_classes)
        self.classifier = head(self.fusion.width, num_classes)

    def encode(self, modality: str, x: Tensor) -> Features:
        """Tokens (B, N, D) of the modality and their mask (B, N)."""
        return self.encoders[modality](x)

    def fuse(self, features: dict[str, Features]) -> Tensor:
        return self.fusion(features)

    def head(self, embedding: Tensor) -> Tensor:
        return self.classifier(embedding)
