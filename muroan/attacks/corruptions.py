"""Corruptions: noise that nobody chose, one draw a sample. What attacks are compared with, not attacks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from muroan.attacks.base import AttackedSample, BatchAttack, Kind, Perturbation, Target
from muroan.errors import MuroanError
from muroan.modalities import Audio, Image, Modality, Text


class Corruption(BatchAttack):
    """Base of corruptions: every input of one kind is corrupted once, by the sample's own draw, and asked nothing.

    Attributes:
        levels: the strength of severities 1 to 5, in a unit of the corruption's own.
        of: the kind of modality, and `what` it is in words.
    """

    kind: Kind = "corruption"
    guided = False
    levels: ClassVar[tuple[float, ...]]
    of: ClassVar[type[Modality]]
    what: ClassVar[str]

    def __init__(self, severity: int = 3):
        """
        Args:
            severity: 1 to 5; the default is the middle one.
        """
        if isinstance(severity, bool) or not isinstance(severity, int) or not 1 <= severity <= 5:
            raise MuroanError(f"attack.severity must be a whole number from 1 to 5, got {severity!r}")
        self.severity, self.level = severity, self.levels[severity - 1]

    def perturb(self, target: Target) -> Sequence[Perturbation | None]:
        """
        Raises:
            MuroanError: the model takes nothing of this kind.
        """
        names = [name for name, modality in target.model.modalities.items() if isinstance(modality, self.of)]
        target.select(None, names, self.what)
        found = []
        for row, sample in enumerate(target.samples):
            parts = [self.corrupted(target, name, target.inputs[name][row], sample) for name in names]
            inputs = {name: part.inputs[name] for name, part in zip(names, parts, strict=True)}
            found.append(Perturbation(inputs, {name: words for part in parts for name, words in part.words.items()}))
        return found

    @abstractmethod
    def corrupted(self, target: Target, name: str, x: Tensor, sample: AttackedSample) -> Perturbation:
        """One input (*shape) of a sample, corrupted by a draw from its generator."""


class GaussianNoise(Corruption):
    """Gaussian noise on the pixels. The levels are the standard deviations of Hendrycks and Dietterich 2019
    (arXiv 1903.12261) for ImageNet, in the 0 to 1 range of an image; values are cut to that range, as theirs are."""

    levels = (0.08, 0.12, 0.18, 0.26, 0.38)
    of, what = Image, "images"

    def corrupted(self, target: Target, name: str, x: Tensor, sample: AttackedSample) -> Perturbation:
        low, high = (end[0] for end in target.span(name))
        noise = torch.as_tensor(sample.rng.standard_normal(x.shape)).to(x)
        return Perturbation({name: (x + self.level * (high - low) * noise).clamp(low, high)})


class SaltAndPepper(Corruption):
    """Salt and pepper noise on the pixels: each value of each channel becomes the lowest or the highest. The levels
    are the shares of values of Hendrycks and Dietterich 2019 (arXiv 1903.12261, "impulse noise") for ImageNet."""

    levels = (0.03, 0.06, 0.09, 0.17, 0.27)
    of, what = Image, "images"

    def corrupted(self, target: Target, name: str, x: Tensor, sample: AttackedSample) -> Perturbation:
        low, high = (end[0] for end in target.span(name))
        hit = torch.as_tensor(sample.rng.random(x.shape) < self.level, device=x.device)
        salt = torch.as_tensor(sample.rng.random(x.shape) < 0.5, device=x.device)
        return Perturbation({name: torch.where(hit, torch.where(salt, high, low), x)})


class AudioNoise(Corruption):
    """White noise on the sound. The levels are signal-to-noise ratios in dB, those of AURORA-2 (Hirsch and Pearce
    2000) but its last; the ratio is of the sample's own power, padding left out. A silent sound stays silent."""

    levels = (20, 15, 10, 5, 0)
    of, what = Audio, "sounds"

    def corrupted(self, target: Target, name: str, x: Tensor, sample: AttackedSample) -> Perturbation:
        count = sample.layouts[name].count
        low, high = (end[0] for end in target.span(name))
        noise = torch.as_tensor(sample.rng.standard_normal(count)).to(x)
        power = x[:count].square().mean().sqrt() * 10 ** (-self.level / 20)
        noisy = x.clone()
        noisy[:count] = (x[:count] + power * noise).clamp(low, high)
        return Perturbation({name: noisy})


class WordMasking(Corruption):
    """Words replaced by the tokenizer's mask token. The levels, shares of the words, are our own choice; at least one
    word is masked, and the number is rounded."""

    levels = (0.1, 0.2, 0.3, 0.4, 0.5)
    of, what = Text, "texts"

    def corrupted(self, target: Target, name: str, x: Tensor, sample: AttackedSample) -> Perturbation:
        """
        Raises:
            MuroanError: the model's tokenizer has no mask token.
        """
        target.model.modalities[name].check_replacement(name, "mask")
        layout, tokenizer = sample.layouts[name], target.model.modalities[name].tokenizer  # type: ignore[attr-defined]
        count = max(1, int(self.level * layout.count + 0.5))
        masked = set(sample.rng.choice(layout.count, count, replace=False).tolist())
        ids = x.clone()
        for i in masked:
            start, stop = layout.spans[i]
            ids[start:stop] = tokenizer.mask_id
        words = ["[MASK]" if i in masked else word for i, word in enumerate(layout.words)]
        return Perturbation({name: ids}, {name: words})
