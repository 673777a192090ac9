"""Removal by attribution: what explanations of the model hold for important goes first."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from muroan.attacks.base import Ask, Attack, AttackedSample, BudgetExhausted, Search, Target, Together
from muroan.attacks.greedy import Smallest, prune, ranked
from muroan.attacks.values import check_choice
from muroan.errors import MuroanError, check_whole
from muroan.modalities import Region, Removal, Text

METHODS = ("gradient", "integrated_gradients", "occlusion")


class SaliencyRemoval(Attack):
    """Remove the k most salient of the finest regions and words, k = 1, 2, 3, 4, 6, 8, 12, …, until the label flips.

    Then parts of that removal are put back one by one, as far as the budget goes. Attributions explain the margin of
    the label over the best other one:

    - `gradient`: |gradient times input|, summed over a region's values (Shrikumar et al. 2016, arXiv 1605.01713; for
      words, over the entries of their embeddings). 2 queries.
    - `integrated_gradients`: (Sundararajan et al. 2017, arXiv 1703.01365) the mean gradient on the straight line from
      an input of zeros, times input, summed with its sign; words move by their embeddings. The line is looked at in
      the middles of `steps` equal parts, 2 queries each; a budget too small for that takes fewer, so that half of
      it is left for removals.
    - `occlusion`: how far the margin falls with a region set to 0 (a word to the mask token, or to padding where there
      is none), by Captum's `FeatureAblation`, of which its `Occlusion` is the case of regular windows. A query for the
      whole input and one for each region.

    Args:
        method: one of these.
        steps: of `integrated_gradients`; 20, the least that its authors recommend (20 to 300).

    Raises:
        MuroanError: an unknown method, `steps` below 1; a budget below what attributions need; a gradient by words
            where the model has no one table of word embeddings; `occlusion` without Captum.
    """

    def __init__(self, method: Literal["gradient", "integrated_gradients", "occlusion"] = "gradient", steps: int = 20):
        check_choice(self.name, "method", method, METHODS)
        check_whole("attack", steps=steps)
        self.method, self.steps = method, steps

    def search(self, sample: AttackedSample) -> Search:
        regions = sample.atoms()
        if self.method == "occlusion":
            sample.demand(self.name, len(regions) + 2, f"the whole input, {len(regions)} regions and a removal")
        else:
            sample.demand(self.name, 3, "a gradient and a removal")
        scores = yield Together(self.attribute, phase="attribute")
        if scores is None:
            raise BudgetExhausted
        # Relative to the largest, so that what counts for a tie does not depend on the model's scale.
        largest = max(map(abs, scores)) or 1.0
        order = [regions[i] for i in ranked([-score / largest for score in scores])]
        removals = [Removal.of(*order[:k]) for k in growing(len(order))]
        smallest = Smallest(sample)
        responses = yield Ask(removals, phase="remove", until=sample.flipped)
        try:
            if smallest.see(removals, responses):
                yield from prune(sample, smallest)
        except BudgetExhausted:
            pass  # the smallest flip so far stands
        return smallest.removal

    # -- attribution, on a batch ----------------------------------------------------------------------------

    def attribute(self, target: Target) -> list[list[float] | None]:
        """(B) for each of a sample's atoms how much it speaks for the label; None where the budget has no room."""
        if self.method == "occlusion":
            return [self._occlude(target, row) for row in range(len(target))]
        most = self.steps if self.method == "integrated_gradients" else 1
        left = np.minimum(target.left(), 4 * most)
        return self._gradients(target, np.where(left < 3, 0, (left // 4).clip(1, most)).astype(int))

    def _gradients(self, target: Target, taken: np.ndarray) -> list[list[float] | None]:
        """Attributions by gradient times input.

        Args:
            taken: (B,) gradients to take for each sample.
        """
        steps = torch.as_tensor(taken, device=target.device)
        rows = steps.nonzero()[:, 0]
        names = list(target.model.modalities)
        inputs = {name: target.embedded(name) if name in target.texts else target.inputs[name] for name in names}
        sums = {name: torch.zeros_like(x) for name, x in inputs.items()}
        for at in range(int(steps.max())):
            rows = rows[steps[rows] > at]
            given: dict[str, Tensor] = {}
            scale: dict[str, Tensor] = {}
            if self.method == "integrated_gradients":
                share = (at + 0.5) / steps[rows].double()
                given = {name: target.inputs[name][rows] * _column(share, inputs[name]) for name in target.continuous}
                scale = dict.fromkeys(target.texts, share)
            _, found = target.gradient(target.margin, given, rows, names, scale)
            for name, gradient in found.items():
                sums[name][rows] += gradient / _column(steps[rows], gradient)
        products = {name: (sums[name] * x).double().cpu().numpy() for name, x in inputs.items()}
        if self.method == "gradient":
            products = {name: np.abs(x) for name, x in products.items()}

        def score(row: int, sample: AttackedSample, region: Region) -> float:
            box = _box(sample, region)
            where: Any = (row, *box) if region.modality in target.texts else (row, ..., *box)
            return float(products[region.modality][where].sum())

        return [
            [score(row, sample, region) for region in sample.atoms()] if taken[row] else None
            for row, sample in enumerate(target.samples)
        ]

    def _occlude(self, target: Target, row: int) -> list[float] | None:
        try:
            from captum.attr import FeatureAblation
        except ImportError:
            raise MuroanError(
                "attack.method=occlusion of saliency_removal is computed by Captum, which is not installed: "
                "pip install -e '.[captum]', or choose attack.method=gradient"
            ) from None
        sample, regions = target.samples[row], target.samples[row].atoms()
        if target.left()[row] < len(regions) + 2:  # with the clean input, and one removal at least
            return None
        names = list(target.model.modalities)
        inputs = {name: target.inputs[name][row : row + 1] for name in names}
        # What belongs to no region, such as padding, goes to some region, and is replaced by itself.
        masks = {name: torch.zeros_like(x, dtype=torch.long) for name, x in inputs.items()}
        baselines = {name: x.clone() for name, x in inputs.items()}
        for name in names:
            masks[name].fill_(next(i for i, region in enumerate(regions) if region.modality == name))
        for i, region in enumerate(regions):
            modality = target.model.modalities[region.modality]
            where: Any = (..., *_box(sample, region))
            hidden = 0
            if isinstance(modality, Text):
                tokenizer = modality.tokenizer
                hidden = tokenizer.pad_id if tokenizer.mask_id is None else tokenizer.mask_id
            masks[region.modality][where], baselines[region.modality][where] = i, hidden

        def margins(*changed: Tensor) -> Tensor:
            rows = torch.full((len(changed[0]),), row, device=target.device)
            asked = dict(zip(names, changed, strict=True))
            return target.margin(target.predict(asked, rows, admissible=False), target.labels[rows])

        found = FeatureAblation(margins).attribute(
            tuple(inputs.values()),
            baselines=tuple(baselines.values()),
            feature_mask=tuple(masks.values()),
            perturbations_per_eval=len(target),
        )
        fallen: dict[int, float] = {}
        for mask, drop in zip(masks.values(), found, strict=True):
            fallen.update(zip(mask.flatten().tolist(), drop.flatten().tolist(), strict=True))
        return [fallen[i] for i in range(len(regions))]


def growing(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, … and `most`.

    >>> growing(20)
    [1, 2, 3, 4, 6, 8, 12, 16, 20]
    """
    sizes = [1, 2, 3]
    while sizes[-1] < most:
        sizes.append(sizes[-2] * 2)
    return [size for size in sizes if size < most] + [most]


def _box(sample: AttackedSample, region: Region) -> tuple[slice, ...]:
    """Where a region lies in the last axes of its input (the tokens of a word)."""
    box = sample.modalities[region.modality].box(region, sample.layouts[region.modality])
    return tuple(slice(a, b) for a, b in zip(box[: len(box) // 2], box[len(box) // 2 :], strict=True))


def _column(numbers: Tensor, like: Tensor) -> Tensor:
    """(n,) numbers shaped to multiply (n, ...)."""
    return numbers.to(like).reshape(-1, *(1 for _ in like.shape[1:]))
