"""Projected gradient descent on the number of changed elements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from muroan.attacks.base import BatchAttack, Perturbation, Target
from muroan.attacks.pgd import LOSSES
from muroan.attacks.values import Values, check_choice
from muroan.errors import check_number, check_whole


class PgdL0(BatchAttack):
    """PGD_0 (Croce and Hein, "Sparse and Imperceivable Adversarial Attacks", 2019, arXiv 1909.05040).

    A step follows the gradient, made to length 1 in l1 norm; then the k elements (pixels, all channels together) that
    are worth most keep their change, within the range of values, and the rest goes back to clean. The paper fixes k;
    here the smallest one is searched for, for each sample: k = 1, 2, 4, 8, … up to `most`, each a try of `steps`
    steps, until one flips; then the gap between the largest k that failed and the fewest elements that flipped is
    bisected. A try that flips at a step ends there. A step costs 2 queries, forward and backward, and the look at a
    try's last step 1; where the budget ends the search, the smallest flip so far is returned.

    Args:
        most: largest k: a count, or below 1 a fraction of the sample's elements. 0.1 is ours.
        steps: of a try. 20 are ours: the released code takes 100 for one k.
        step: mean change of a value in a step, where 1 is its whole range. The released settings, 120000/255 over the
            3072 values of CIFAR-10 and 30000/255 over the 784 of MNIST, are both 0.15.
        loss: `cross_entropy`, the paper's, or `margin`.
        random_start: begin each try at random values of k elements, as the released code does, not at the clean input.
        modalities: which to change; null for all continuous ones.

    Raises:
        MuroanError: a number that is not above 0, an unknown loss; modalities that the model does not have.
    """

    def __init__(
        self,
        most: float = 0.1,
        steps: int = 20,
        step: float = 0.15,
        loss: str = "cross_entropy",
        random_start: bool = True,
        modalities: Sequence[str] | None = None,
    ):
        check_whole("attack", steps=steps)
        check_number("attack", 0, above=True, most=most, step=step)
        if most >= 1:
            check_whole("attack", most=most)
        check_choice(self.name, "loss", loss, list(LOSSES))
        self.most, self.steps, self.step = most, steps, float(step)
        self.loss, self.random_start, self.modalities = LOSSES[loss], random_start, modalities

    def perturb(self, target: Target) -> Sequence[Perturbation | None]:
        values = Values(target, self.modalities)
        rows = torch.arange(len(target), device=target.device)
        elements = values.real_elements.sum(1)
        most = (self.most * elements).long() if self.most < 1 else torch.full_like(elements, int(self.most))
        most = torch.minimum(most.clamp(min=1), elements)
        failed = torch.zeros_like(rows)  # largest k that did
        flipped = most + 1  # fewest elements that did; most + 1 while there are none
        k, taken = torch.ones_like(rows), torch.zeros_like(rows)
        delta, best = self._start(values, k, rows), values.zeros()
        length = self.step * values.real.sum(1, keepdim=True)

        while len(rows := target.able(rows, 1)):
            last = taken[rows] == self.steps
            # For some a look is all that is left.
            last[~last] = ~torch.isin(rows[~last], target.able(rows[~last], 2))
            ended = [rows[:0]]  # rows whose try is over
            if last.any():
                some = rows[last]
                prediction = target.predict(values.inputs(delta[some], some), some)
                now = target.flipped(prediction, some)
                failed[some[~now]] = k[some[~now]]
                self._keep(target, values, delta, some[now], flipped, best)
                ended.append(some)
            if not last.all():
                some = rows[~last]
                prediction, found = target.gradient(self.loss, values.inputs(delta[some], some), some, values.names)
                now = target.flipped(prediction, some)
                self._keep(target, values, delta, some[now], flipped, best)
                ended.append(some[now])
                gradient, some = values.gradient(found, some)[~now], some[~now]
                gradient = gradient / gradient.abs().sum(1, keepdim=True).clamp(min=1e-12)
                delta[some] = values.sparse(delta[some] + length[some] * gradient, k[some], some)
                taken[some] += 1

            over = torch.cat(ended)
            none = flipped > most
            stop = torch.zeros_like(none)
            stop[over] = torch.where(none, failed >= most, flipped - failed <= 1)[over]
            k[over] = torch.where(none, torch.minimum(2 * k, most), (failed + flipped) // 2)[over]
            over, rows = over[~stop[over]], rows[~stop[rows]]
            taken[over], delta[over] = 0, self._start(values, k[over], over)
        return [
            values.perturbation(best[i], i) if found else None for i, found in enumerate((flipped <= most).tolist())
        ]

    @staticmethod
    def _keep(target: Target, values: Values, delta: Tensor, rows: Tensor, flipped: Tensor, best: Tensor) -> None:
        """Take the flips of some rows for the best there are: each is of fewer elements than the one before."""
        flipped[rows], best[rows] = values.changed(delta[rows]), delta[rows]
        target.note(rows.tolist(), flipped[rows].tolist())

    def _start(self, values: Values, k: Tensor, rows: Tensor) -> Tensor:
        """(n, N) where a try begins."""
        if not self.random_start:
            return torch.zeros_like(values.low[rows])
        share = values.draw(rows, lambda rng, size: rng.uniform(size=size))
        return values.sparse(torch.lerp(values.low[rows], values.high[rows], share), k, rows)
