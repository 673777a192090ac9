"""A control: training on noisy inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from muroan.attacks.base import ThreatModel
from muroan.data.samples import Batch, Sample
from muroan.defenses.base import Defense
from muroan.errors import check_number
from muroan.modalities import Text
from muroan.models.base import MultimodalModel


class NoiseAugmentation(Defense):
    """Gaussian noise on the continuous inputs of some samples (as Gilmer et al. 2019, arXiv 1901.10513, to compare with
    adversarial training), and words put in the place of others, drawn from the tokens of the batch's own texts.

    Args:
        deviation: largest standard deviation, where 1 is the whole range of a value; drawn uniformly up to it.
        words: largest share of a text's tokens that are replaced; likewise.
        ratio, threat_model, seed, training: see `Defense`.
    """

    control = True

    def __init__(
        self,
        model: MultimodalModel,
        ratio: float = 0.5,
        deviation: float = 0.2,
        words: float = 0.2,
        threat_model: ThreatModel | None = None,
        seed: int = 0,
        **training: Any,
    ):
        super().__init__(model, ratio, threat_model, seed, **training)
        check_number("defense", 0, deviation=deviation)
        check_number("defense", 0, 1, words=words)
        self.deviation, self.words = deviation, words

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        rng = self.rng(batch_idx)
        rows = self.draw_rows(batch, rng)
        changes = {row: self.noisy(batch.samples[row], batch, rng) for row in rows}
        return super().training_step(self.changed(batch, changes), batch_idx)

    def noisy(self, sample: Sample, batch: Batch, rng: np.random.Generator) -> dict[str, Tensor]:
        changed = {}
        for name, modality in self.model.modalities.items():
            x, layout = sample.inputs[name], sample.layouts[name]
            if isinstance(modality, Text):
                hit = np.flatnonzero(rng.random(layout.count) < rng.uniform(0, self.words))
                changed[name] = x.clone()
                for place in (p for word in hit for p in range(*layout.spans[word])):
                    other = batch.samples[rng.integers(len(batch))]
                    start, stop = other.layouts[name].spans[rng.integers(other.layouts[name].count)]
                    if start < stop:  # a tokenizer may make nothing of a word
                        changed[name][place] = other.inputs[name][rng.integers(start, stop)]
            else:
                low, high = (end.reshape(-1, *(1 for _ in x.shape[1:])) for end in modality.span())
                noise = torch.as_tensor(rng.standard_normal(x.shape)).to(x)
                if x.ndim == 1:
                    noise[layout.count :] = 0  # a short sound's padding stays silent
                noise = noise * rng.uniform(0, self.deviation) * (high - low).to(x)
                changed[name] = torch.maximum(torch.minimum(x + noise, high.to(x)), low.to(x))
        return changed
