"""Projected gradient ascent on what the encoders give to the fusion, as `embedding_adversarial_training` trains on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from muroan.attacks.base import BatchAttack, Perturbation, Target
from muroan.attacks.pgd import LOSSES
from muroan.attacks.values import check_choice
from muroan.errors import MuroanError, check_number, check_whole
from muroan.models.base import Features, map_features, shifted, without_mask


class FeaturePgd(BatchAttack):
    """Moves the features of all modalities jointly, each within a ball around its clean ones.

    The ascent is FreeLB's (Zhu et al. 2020, arXiv 1909.11764): normalised steps from a random start, projected back to
    the ball, whose radius is a share of the norm of the sample's own features, a modality. No input is changed, and no
    input need have such features: it tells whether a training in the space of features holds there, and nothing about
    attackers, who can only change inputs. All of the input counts as changed; `info` has how far the features went. A
    step costs 2 queries, forward and backward, and the look at the last step 1 more.

    Args:
        epsilon: radius of the ball, a modality, as a share of the Euclidean norm of the sample's features.
        step: length of a step in the same unit.
        steps: most steps; training takes 3, as VILLA does (arXiv 2006.06195).
        loss: `cross_entropy`, or `margin`, best other logit minus the label's.
        modalities: whose features to move; null for all.

    Raises:
        MuroanError: a number that is not above 0, an unknown loss; modalities that the model does not have; features
            of integers, which cannot be moved.
    """

    def __init__(
        self,
        epsilon: float = 0.3,
        step: float = 0.1,
        steps: int = 20,
        loss: str = "cross_entropy",
        modalities: Sequence[str] | None = None,
    ):
        check_whole("attack", steps=steps)
        check_number("attack", 0, above=True, epsilon=epsilon, step=step)
        check_choice(self.name, "loss", loss, list(LOSSES))
        self.epsilon, self.step, self.steps, self.loss = epsilon, step, steps, LOSSES[loss]
        self.modalities = modalities

    def perturb(self, target: Target) -> Sequence[Perturbation | None]:
        names = target.samples[0].chosen(self.modalities)
        rows = torch.arange(len(target), device=target.device)
        clean = {name: target.features(name) for name in names}
        for name in names:
            if not (dtype := without_mask(clean[name]).dtype).is_floating_point:
                raise MuroanError(
                    f"{self.name} does not fit this model: its features of {name!r} are {dtype} numbers, which "
                    f"cannot be moved; name other modalities in attack.modalities"
                )
        radii = {name: self.epsilon * norms(without_mask(clean[name])) for name in names}
        deltas = {name: self.start(target, radii[name], without_mask(clean[name])) for name in names}
        flipped = torch.zeros_like(rows, dtype=torch.bool)

        def moved(rows: Tensor) -> dict[str, Features]:
            return {n: shifted(map_features(lambda t: t[rows], clean[n]), deltas[n][rows]) for n in names}

        for _ in range(self.steps):
            rows = target.able(rows, 2)
            if not len(rows):
                break
            prediction, gradients = target.feature_gradient(self.loss, moved(rows), rows)
            now = target.flipped(prediction, rows)
            flipped[rows[now]] = True
            rows = rows[~now]
            for name, gradient in gradients.items():
                gradient, radius = gradient[~now].to(deltas[name]), radii[name][rows]
                step = self.step / self.epsilon * radius * gradient / norms(gradient).clamp(min=1e-12)
                ahead = deltas[name][rows] + step
                deltas[name][rows] = ahead * (radius / norms(ahead).clamp(min=1e-12)).clamp(max=1)
        rows = target.able((~flipped).nonzero()[:, 0], 1)
        if len(rows):
            flipped[rows[target.flipped(target.predict_features(moved(rows), rows), rows)]] = True
        found = moved(torch.arange(len(target), device=target.device))
        share = {n: norms(deltas[n]) / norms(without_mask(clean[n])).clamp(min=1e-12) for n in names}
        results: list[Perturbation | None] = []
        for row, sample in enumerate(target.samples):
            if not flipped[row]:
                results.append(None)
                continue
            sample.info["feature_shift"] = {name: round(float(share[name][row]), 4) for name in names}
            results.append(Perturbation(features={name: without_mask(found[name])[row].detach() for name in names}))
        return results

    @staticmethod
    def start(target: Target, radius: Tensor, like: Tensor) -> Tensor:
        """(B, ...) random points well within the balls, as FreeLB: uniform, scaled by the root of the dimension."""
        draws = [sample.rng.uniform(-1, 1, like.shape[1:]) for sample in target.samples]
        return torch.as_tensor(np.stack(draws)).to(radius) * radius / like[0].numel() ** 0.5


def norms(x: Tensor) -> Tensor:
    """(B, 1, ...) Euclidean norms of the rows (B, ...), shaped to broadcast; at least in single precision."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.flatten(1).norm(dim=1).reshape(-1, *(1 for _ in x.shape[1:]))
