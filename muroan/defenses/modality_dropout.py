"""A control: training on inputs of which a whole modality is missing."""

from __future__ import annotations

import torch

from muroan.data.samples import Batch
from muroan.defenses.base import Defense, without
from muroan.modalities import Removal


class ModalityDropout(Defense):
    """Removes one whole modality, drawn uniformly, of some samples, so that the model cannot lean on one alone
    (Neverova et al. 2014, "ModDrop", arXiv 1501.00102).

    Args: see `Defense`.
    """

    control = True

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor | None:
        modalities = self.model.modalities
        rng = self.rng(batch_idx)
        rows = self.draw_rows(batch, rng)
        samples = [batch.samples[row] for row in rows]
        dropped = [list(modalities)[rng.integers(len(modalities))] for _ in rows]
        removals = [
            Removal.of(modalities[name].root(name, sample.layouts[name]))
            for name, sample in zip(dropped, samples, strict=True)
        ]
        changes = without(modalities, samples, removals, self.threat_model, self.seed)
        return super().training_step(self.changed(batch, dict(zip(rows, changes, strict=True))), batch_idx)
