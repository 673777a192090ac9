"""The fewest changed elements by descent on a smooth stand-in for their number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from muroan.attacks.base import BatchAttack, Perturbation, Target
from muroan.attacks.values import Adam, Values, check_choice
from muroan.errors import check_number, check_whole
from muroan.models.base import Prediction


class SigmaZero(BatchAttack):
    """sigma-zero (Cinà et al., "sigma-zero: Gradient-based Optimization of l0-norm Adversarial Examples", 2024,
    arXiv 2402.01879).

    Descends, with Adam and a step length that anneals by a cosine to a tenth, on the label's margin (where it is above
    0) plus the mean of d²/(d² + sigma) over the changes d, a smooth stand-in for the share of them that is not 0. The
    gradient is made to length 1 in linf norm. After each step changes below a threshold go back to 0; the threshold
    rises while the sample is flipped and falls while it is not. The flip of fewest elements counts.

    A step costs 2 queries, forward and backward, the last one 1. A sample is done when one element flips it; where
    the budget allows fewer steps, the step length anneals over those.

    Args:
        steps, step, sigma, threshold, rate: 1000, 1, 0.001, 0.3 and 0.01, the paper's; `step` and `threshold` in units
            of a value's whole range, `rate` the threshold's change as a share of the step length.
        group: what is counted: an `element` (a pixel, all channels: d² is the sum over them, the threshold is for the
            largest), as records do; or every `component` of one alone, as the paper does.
        modalities: which to change; null for all continuous ones.

    Raises:
        MuroanError: a number that is not above 0, an unknown group; modalities that the model does not have.
    """

    def __init__(
        self,
        steps: int = 1000,
        step: float = 1.0,
        sigma: float = 1e-3,
        threshold: float = 0.3,
        rate: float = 0.01,
        group: Literal["element", "component"] = "element",
        modalities: Sequence[str] | None = None,
    ):
        check_whole("attack", steps=steps)
        check_number("attack", 0, above=True, step=step, sigma=sigma, threshold=threshold, rate=rate)
        check_choice(self.name, "group", group, ("element", "component"))
        self.steps, self.step, self.sigma, self.threshold, self.rate = steps, step, sigma, threshold, rate
        self.group, self.modalities = group, modalities

    def perturb(self, target: Target) -> Sequence[Perturbation | None]:
        values = Values(target, self.modalities)
        # Steps of each sample; the last is a look alone.
        passes = [target.granted(row, 2 * self.steps - 1) for row in range(len(target))]
        steps = torch.tensor([(granted + 1) // 2 for granted in passes], device=target.device)
        delta, best = values.zeros(), values.zeros()
        fewest = torch.full((len(target),), torch.iinfo(torch.long).max, device=target.device)
        threshold = torch.full((len(target), 1), self.threshold, device=target.device).to(delta)
        adam = Adam(delta)
        for at in range(int(steps.max())):
            last = ((steps == at + 1) & (fewest > 1)).nonzero()[:, 0]
            if len(last):
                self._note(
                    target, values, target.predict(values.inputs(delta[last], last), last), last, delta, best, fewest
                )
            rows = ((steps > at + 1) & (fewest > 1)).nonzero()[:, 0]
            if not len(rows):
                continue
            prediction, found = target.gradient(held_margin, values.inputs(delta[rows], rows), rows, values.names)
            flipped = self._note(target, values, prediction, rows, delta, best, fewest)
            gradient = values.gradient(found, rows) + self.density_gradient(values, delta[rows], rows)
            gradient = gradient / gradient.abs().amax(1, keepdim=True).clamp(min=1e-12)
            moved = delta[rows] - self._length(at, steps[rows]).to(delta) * adam(gradient, rows)
            change = self.rate * self._length(at + 1, steps[rows]).to(delta)
            threshold[rows] = (threshold[rows] + torch.where(flipped[:, None], change, -change)).clamp(0, 1)
            delta[rows] = self.drop_small(values, values.clip(moved, rows), threshold[rows])
        return [
            values.perturbation(best[i], i) if found else None for i, found in enumerate(best.ne(0).any(1).tolist())
        ]

    def density_gradient(self, values: Values, delta: Tensor, rows: Tensor) -> Tensor:
        """(n, N) the gradient of the mean of d²/(d² + sigma)."""
        square = delta.square()
        if self.group == "element":
            square = values.spread(values.by_element(square))
            count = values.real_elements[rows].sum(1, keepdim=True)
        else:
            count = values.real[rows].sum(1, keepdim=True)
        return 2 * delta * self.sigma / (square + self.sigma).square() / count

    def drop_small(self, values: Values, delta: Tensor, threshold: Tensor) -> Tensor:
        """(n, N) delta without the changes below the threshold (n, 1)."""
        size = delta.abs()
        if self.group == "element":
            size = values.spread(values.by_element(size, torch.amax))
        return torch.where(size < threshold, 0, delta)

    def _length(self, at: int, steps: Tensor) -> Tensor:
        """(n, 1) the length of a step."""
        return self.step * (0.1 + 0.45 * (1 + torch.cos(math.pi * at / steps.double())))[:, None]

    def _note(
        self,
        target: Target,
        values: Values,
        prediction: Prediction,
        rows: Tensor,
        delta: Tensor,
        best: Tensor,
        fewest: Tensor,
    ) -> Tensor:
        """Keep the flips of fewer elements than before; returns (n,) which rows are flipped."""
        flipped = target.flipped(prediction, rows)
        count = values.changed(delta[rows]) if self.group == "element" else delta[rows].ne(0).sum(1)
        better = rows[flipped & (count < fewest[rows])]
        best[better] = delta[better]
        target.note(better.tolist(), values.changed(delta[better]).tolist())
        fewest[rows] = torch.where(flipped, torch.minimum(count, fewest[rows]), fewest[rows])
        return flipped


def held_margin(prediction: Prediction, labels: Tensor) -> Tensor:
    """(n,) logit of the label minus the best other one, 0 where that is below."""
    return Target.margin(prediction, labels).clamp(min=0)
