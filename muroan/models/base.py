"""The unified view of a multimodal model: encode each modality, fuse, classify.

The split is what makes the attacks general and fast: a query that changes only the text reuses the encoded image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from muroan.errors import MuroanError
from muroan.modalities import Modality

# What `encode` returns: a tensor with the batch first, or a tuple of such tensors (hidden states and their mask).
Features = Tensor | tuple[Tensor, ...]


def map_features(function: Callable[..., Tensor], *features: Features) -> Features:
    """Apply a function to the tensors of features of equal structure."""
    if isinstance(features[0], tuple):
        return tuple(function(*tensors) for tensors in zip(*features, strict=True))
    return function(*features)


def without_mask(features: Features) -> Tensor:
    """The features themselves, without their mask."""
    return features[0] if isinstance(features, tuple) else features


def shifted(features: Features, delta: Tensor) -> Features:
    """The features (B, ...) moved, in their own type."""
    delta = delta.to(without_mask(features))
    return (features[0] + delta, *features[1:]) if isinstance(features, tuple) else features + delta


class Prediction(NamedTuple):
    """
    Attributes:
        embedding: (B, D) the fusion embedding.
        logits: (B, C).
    """

    embedding: Tensor
    logits: Tensor


class MultimodalModel(nn.Module, ABC):
    """Base of every target model. A subclass defines `encode`, `fuse` and `head`.

    Attributes:
        modalities: what the model takes, by name, in a fixed order.
        num_classes: C.
        pretrained: True when the model can be attacked as it is loaded, without training here.
        channels_last: modalities (B, C, H, W) that `encode` would rather read stored pixel by pixel, as
            `torch.channels_last` is: the engine keeps them so, and nothing has to be turned around at every question.
    """

    pretrained = False
    channels_last: Collection[str] = ()

    def __init__(self, modalities: Mapping[str, Modality], num_classes: int):
        super().__init__()
        self.modalities, self.num_classes = dict(modalities), num_classes

    @abstractmethod
    def encode(self, modality: str, x: Tensor) -> Features:
        """Features of one modality.

        Args:
            x: (B, *shape) prepared inputs of that modality.
        """

    @abstractmethod
    def fuse(self, features: dict[str, Features]) -> Tensor:
        """The fusion embedding (B, D) of the features of all modalities."""

    @abstractmethod
    def head(self, embedding: Tensor) -> Tensor:
        """Logits (B, C) of the fusion embedding (B, D)."""

    def forward(self, inputs: Mapping[str, Tensor], rows: Mapping[str, Tensor] | None = None) -> Prediction:
        """
        Args:
            inputs: (U, *shape) a modality.
            rows: (B,) a modality: which of its U inputs each sample has; without it, U = B and each its own.

        Raises:
            MuroanError: a modality is missing, or an input has the wrong shape.
        """
        for name, modality in self.modalities.items():
            if name not in inputs:
                raise MuroanError(f"the model takes {list(self.modalities)}, the batch has {list(inputs)}")
            if tuple(inputs[name].shape[1:]) != modality.shape:
                raise MuroanError(
                    f"the model takes {name} of shape (B, {', '.join(map(str, modality.shape))}), "
                    f"got {tuple(inputs[name].shape)}"
                )
        features = {name: self.encode(name, inputs[name]) for name in self.modalities}
        if rows is not None:
            features = {name: map_features(lambda t, r=rows[name]: t[r], f) for name, f in features.items()}
        embedding = self.fuse(features)
        return Prediction(embedding, self.head(embedding))


def model_dtype(model: nn.Module) -> torch.dtype:
    """The floating type that the model computes in (float32 for a model without parameters)."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
