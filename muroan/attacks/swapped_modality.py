"""What if a modality is another sample's? The form of a missing modality that stays in the data's distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from muroan.attacks.base import BatchAttack, Perturbation, Target
from muroan.attacks.missing_modality import proper_subsets
from muroan.errors import MuroanError


class SwappedModality(BatchAttack):
    """Put another sample's modality in place of the sample's own (as in the permutation of a modality by Gat, Schwartz
    and Schwing 2021, "Perceptual Score", arXiv 2110.14375).

    The donor is drawn by the sample's own generator, one a sample. All sets of modalities are tried, fewer first, but
    not all of them together, until the label flips. There is nothing to set.
    """

    needs_donors = True
    guided = False

    def perturb(self, target: Target) -> Sequence[Perturbation | None]:
        """
        Raises:
            MuroanError: there are no donors, or the model takes one modality alone.
        """
        if not target.donors:
            raise MuroanError(
                "swapped_modality takes modalities of other samples, and there are none: pass donors to "
                "muroan.evaluate or QueryEngine, such as some validation samples"
            )
        subsets = proper_subsets(self.name, tuple(target.model.modalities))
        count = len(next(iter(target.donors.values())))
        picks = torch.tensor([int(s.rng.integers(count)) for s in target.samples], device=target.device)
        found: list[Perturbation | None] = [None] * len(target)
        for chosen in subsets:
            held = [row for row, flip in enumerate(found) if flip is None]
            rows = target.able(torch.tensor(held, dtype=torch.long, device=target.device), 1)
            if not len(rows):
                break
            prediction = target.predict({name: target.donors[name][picks[rows]] for name in chosen}, rows)
            for row, flipped in zip(rows.tolist(), target.flipped(prediction, rows).tolist(), strict=True):
                if flipped:
                    found[row] = self._taken(target, chosen, int(picks[row]))
                    target.samples[row].info["swapped"] = list(chosen)
        return found

    @staticmethod
    def _taken(target: Target, chosen: Sequence[str], donor: int) -> Perturbation:
        inputs: dict[str, Any] = {n: target.donors[n][donor] for n in chosen if n not in target.texts}
        words = {n: target.donor_words[n][donor] for n in chosen if n in target.texts}
        return Perturbation(inputs, words)
