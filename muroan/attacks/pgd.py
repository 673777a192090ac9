"""Projected gradient descent in a ball around the clean input, the standard white-box attack."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from muroan.attacks.base import BatchAttack, Perturbation, Target
from muroan.attacks.target import Loss
from muroan.attacks.values import Values, check_choice
from muroan.errors import check_number, check_whole
from muroan.models.base import Prediction


def cross_entropy(prediction: Prediction, labels: Tensor) -> Tensor:
    """(n,)"""
    return F.cross_entropy(prediction.logits, labels, reduction="none")


def lost_margin(prediction: Prediction, labels: Tensor) -> Tensor:
    """(n,) best other logit minus the label's: above 0 when flipped, and never flat where the softmax saturates."""
    return -Target.margin(prediction, labels)


# What an attack climbs.
LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "margin": lost_margin}


class Pgd(BatchAttack):
    """Base of PGD (Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018,
    arXiv 1706.06083).

    A step follows the gradient of the loss and is projected back to the ball of radius `epsilon` and to the range of
    values. All chosen modalities move jointly, in one ball. A step costs 2 queries, forward and backward; with
    `stop_early` the look at the last step 1 more. Where the budget has no room for that look, the last step is returned
    without it: the engine judges.

    Args:
        epsilon: radius of the ball, where 1 is the whole range of a value: 0 to 1 of a pixel before normalisation,
            -1 to 1 of a sound.
        step: length of a step in the same units; 2.5 epsilon / steps where it is null, the paper's for l2.
        steps: most steps.
        loss: `cross_entropy`, the paper's, or `margin`, best other logit minus the label's.
        random_start: begin at a random point of the ball, as the paper does, instead of the clean input.
        stop_early: a sample is done at its first flip; False takes all steps and returns the last point, a flip or
            not, as adversarial training wants it.
        modalities: which to change; null for all continuous ones.

    Raises:
        MuroanError: a number that is not above 0, an unknown loss; modalities that the model does not have.
    """

    def __init__(
        self,
        epsilon: float,
        step: float | None,
        steps: int,
        loss: str = "cross_entropy",
        random_start: bool = True,
        stop_early: bool = True,
        modalities: Sequence[str] | None = None,
    ):
        check_whole("attack", steps=steps)
        check_number("attack", 0, above=True, epsilon=epsilon, **({} if step is None else {"step": step}))
        check_choice(self.name, "loss", loss, list(LOSSES))
        self.epsilon, self.steps, self.loss = float(epsilon), steps, LOSSES[loss]
        self.step = 2.5 * self.epsilon / self.steps if step is None else float(step)
        self.random_start, self.stop_early, self.modalities = random_start, stop_early, modalities

    @abstractmethod
    def direction(self, gradient: Tensor) -> Tensor:
        """(n, N) the steepest step of length 1 along gradients (n, N)."""

    @abstractmethod
    def project(self, delta: Tensor) -> Tensor:
        """(n, N) the nearest point of the ball."""

    @abstractmethod
    def start(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """(size,) a random point of the ball."""

    def perturb(self, target: Target) -> Sequence[Perturbation | None]:
        values = Values(target, self.modalities)
        rows = torch.arange(len(target), device=target.device)
        delta = values.zeros()
        if self.random_start:
            delta = values.clip(values.draw(rows, self.start), rows)
        flipped = torch.zeros_like(rows, dtype=torch.bool)
        for _ in range(self.steps):
            rows = target.able(rows, 2)
            if not len(rows):
                break
            prediction, found = target.gradient(self.loss, values.inputs(delta[rows], rows), rows, values.names)
            gradient = values.gradient(found, rows)
            if self.stop_early:
                now = target.flipped(prediction, rows)
                flipped[rows[now]] = True
                rows, gradient = rows[~now], gradient[~now]
            delta[rows] = values.clip(self.project(delta[rows] + self.step * self.direction(gradient)), rows)

        # The clean input has been looked at already.
        found_rows = flipped | delta.ne(0).any(1)
        if self.stop_early:
            rows = target.able((found_rows & ~flipped).nonzero()[:, 0], 1)
            if len(rows):
                prediction = target.predict(values.inputs(delta[rows], rows), rows)
                found_rows[rows[~target.flipped(prediction, rows)]] = False
        return [values.perturbation(delta[i], i) if found else None for i, found in enumerate(found_rows.tolist())]


class PgdLinf(Pgd):
    """PGD with every value within `epsilon` of its clean one; see `Pgd`.

    Defaults: 8/255 in steps of 2/255, the paper's for CIFAR-10; 40 steps, the paper's for MNIST.
    """

    def __init__(
        self,
        epsilon: float = 8 / 255,
        step: float | None = 2 / 255,
        steps: int = 40,
        loss: str = "cross_entropy",
        random_start: bool = True,
        stop_early: bool = True,
        modalities: Sequence[str] | None = None,
    ):
        super().__init__(epsilon, step, steps, loss, random_start, stop_early, modalities)

    def direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    def project(self, delta: Tensor) -> Tensor:
        return delta.clamp(-self.epsilon, self.epsilon)

    def start(self, rng: np.random.Generator, size: int) -> np.ndarray:
        return rng.uniform(-self.epsilon, self.epsilon, size)


class PgdL2(Pgd):
    """PGD with the change as a whole within `epsilon` in Euclidean norm; see `Pgd`.

    The norm grows with the number of values, so that an epsilon says something for one input size alone. Defaults: 0.5,
    the usual one for the 3072 values of CIFAR-10 (RobustBench, arXiv 2010.09670, which takes 3 for ImageNet).
    """

    def __init__(
        self,
        epsilon: float = 0.5,
        step: float | None = None,
        steps: int = 40,
        loss: str = "cross_entropy",
        random_start: bool = True,
        stop_early: bool = True,
        modalities: Sequence[str] | None = None,
    ):
        super().__init__(epsilon, step, steps, loss, random_start, stop_early, modalities)

    def direction(self, gradient: Tensor) -> Tensor:
        return gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-12)

    def project(self, delta: Tensor) -> Tensor:
        return delta * (self.epsilon / delta.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)

    def start(self, rng: np.random.Generator, size: int) -> np.ndarray:
        # Uniform in the ball: a direction from a normal draw, the radius by the volume within it. The padding of a
        # short sound is drawn too, and cut off by the projection to the range.
        draw = rng.standard_normal(size)
        return draw / np.linalg.norm(draw) * self.epsilon * rng.uniform() ** (1 / size)
