"""A control: training on inputs from which random parts were removed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from muroan.attacks.base import ThreatModel, descend
from muroan.data.samples import Batch, Sample
from muroan.defenses.base import Defense, without
from muroan.errors import check_whole
from muroan.modalities import Removal
from muroan.models.base import MultimodalModel

TRIES = 8  # draws of a removal that leaves the label right, before the sample stays as it is


class RandomRemovalAugmentation(Defense):
    """Removes random parts of some samples: as cutout (DeVries and Taylor 2017, arXiv 1708.04552) and random erasing
    (Zhong et al. 2017, arXiv 1708.04896) do of images, here of any modality and from the regions that attacks remove.

    Args:
        max_parts: each sample loses 1 to `max_parts` regions; the modality, the depth in its tree and the place of
            each are drawn uniformly.
        valid_only: draw anew, a few times, what leaves the label wrong, where the dataset can tell; else leave the
            sample as it is. That is what adversarial training does by default: a control that trains on wrong labels
            is a weak one.
        ratio, threat_model, seed, training: see `Defense`.
    """

    control = True

    def __init__(
        self,
        model: MultimodalModel,
        ratio: float = 0.5,
        max_parts: int = 3,
        valid_only: bool = False,
        threat_model: ThreatModel | None = None,
        seed: int = 0,
        **training: Any,
    ):
        super().__init__(model, ratio, threat_model, seed, **training)
        check_whole("defense", max_parts=max_parts)
        self.max_parts, self.valid_only = max_parts, valid_only
        self._judge_removal: Callable[[Sample, Removal], bool | None] | None = None

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.valid_only and self.data is not None:
            self._judge_removal = self.data.judge("train")

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor | None:
        rng = self.rng(batch_idx)
        rows = self.draw_rows(batch, rng)
        samples = [batch.samples[row] for row in rows]
        removals = [self.draw(sample, rng) for sample in samples]
        changes = without(self.model.modalities, samples, removals, self.threat_model, self.seed)
        return super().training_step(self.changed(batch, dict(zip(rows, changes, strict=True))), batch_idx)

    def draw(self, sample: Sample, rng: Any) -> Removal:
        for _ in range(TRIES):
            removal = self._any(sample, rng)
            if self._judge_removal is None or self._judge_removal(sample, removal) is not False:
                return removal
        return Removal()

    def _any(self, sample: Sample, rng: Any) -> Removal:
        modalities, names = self.model.modalities, list(self.model.modalities)
        picks = (names[rng.integers(len(names))] for _ in range(rng.integers(1, self.max_parts + 1)))
        roots = [modalities[name].root(name, sample.layouts[name]) for name in picks]
        return Removal.of(*(descend(root, modalities, self.threat_model, rng) for root in roots))
