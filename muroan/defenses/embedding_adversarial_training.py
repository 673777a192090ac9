"""Adversarial training in the space of the features of all modalities, without touching the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from muroan.attacks.base import ThreatModel
from muroan.attacks.feature_pgd import norms
from muroan.data.samples import Batch
from muroan.defenses.base import Defense
from muroan.errors import MuroanError, check_names, check_number, check_whole
from muroan.models.base import Features, MultimodalModel, map_features, shifted, without_mask


class EmbeddingAdversarialTraining(Defense):
    """Perturbs what the encoders give to the fusion, in all modalities jointly, and trains on all steps of the ascent.

    The ascent and the use of every step's gradient are FreeLB's (Zhu et al. 2020, arXiv 1909.11764), the loss, clean
    plus adversarial plus agreement of the two, is VILLA's (Gan et al. 2020, arXiv 2006.06195). Both perturb the first
    embeddings, whose norm is known; the features of any encoder have none, so that radius and step are given in shares
    of each sample's own. VILLA perturbs one modality at a time; here all move together, as what is attacked is fused.
    Features of padding, of which an encoder need not say where they are, count in that norm and have a part of the
    random start, but no gradient; FreeLB leaves them out, so that the ball is somewhat larger here for short texts.
    `attack=feature_pgd` attacks in the same ball.

    Args:
        epsilon: radius of the ball, a modality, as a share of the Euclidean norm of the sample's features.
        step: length of a step in the same unit.
        steps: of the ascent; FreeLB takes 2 to 5, VILLA 3.
        agreement: weight of the symmetric Kullback-Leibler divergence between clean and adversarial answers.
        modalities: which to perturb; null for all.
        threat_model, seed, training: see `Defense`.

    Raises:
        MuroanError: a number out of range; modalities that the model does not have; features of integers, which cannot
            be moved.
    """

    def __init__(
        self,
        model: MultimodalModel,
        epsilon: float = 0.3,
        step: float = 0.1,
        steps: int = 3,
        agreement: float = 1.0,
        modalities: Sequence[str] | None = None,
        threat_model: ThreatModel | None = None,
        seed: int = 0,
        **training: Any,
    ):
        super().__init__(model, 1.0, threat_model, seed, **training)
        check_number("defense", 0, above=True, epsilon=epsilon, step=step)
        check_number("defense", 0, agreement=agreement)
        check_whole("defense", steps=steps)
        check_names("defense", modalities=modalities)
        self.names = list(model.modalities) if modalities is None else list(modalities)
        wrong = [name for name in self.names if name not in model.modalities]
        if wrong or not self.names:
            raise MuroanError(f"defense.modalities must name some of {list(model.modalities)}, got {self.names}")
        self.epsilon, self.step, self.steps, self.agreement = epsilon, step, steps, agreement

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        if len(batch) == 0:
            return self.no_loss()
        model, labels, inputs = self.model, batch.labels, self.inputs(batch)
        features = {
            name: map_features(lambda t, r=batch.rows[name]: t[r], model.encode(name, inputs[name]))
            for name in model.modalities
        }
        clean = model.head(model.fuse(features))
        loss = F.cross_entropy(clean, labels)
        deltas = self.start(features, batch_idx)
        for _ in range(self.steps):
            moved = {**features, **{name: shifted(features[name], delta) for name, delta in deltas.items()}}
            logits = model.head(model.fuse(moved))
            harm = F.cross_entropy(logits, labels)
            loss = loss + (harm + self.agreement * divergence(logits, clean)) / self.steps
            # Of the sum: a sample's share in a mean over the batch may be too small for half precision.
            found = torch.autograd.grad(harm * len(batch), list(deltas.values()), retain_graph=True)
            for (name, delta), gradient in zip(list(deltas.items()), (g.float() for g in found), strict=True):
                radius = self.epsilon * norms(without_mask(features[name]).detach())
                ahead = delta.detach() + self.step * radius / self.epsilon * gradient / norms(gradient).clamp(min=1e-12)
                deltas[name] = (ahead * (radius / norms(ahead).clamp(min=1e-12)).clamp(max=1)).requires_grad_()
        self.cost.attack_forwards += self.steps * len(batch)
        self.cost.attack_backwards += self.steps * len(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def start(self, features: dict[str, Features], batch_idx: int) -> dict[str, Tensor]:
        """Random points (B, ...) in the balls, a modality.

        Raises:
            MuroanError: a modality's features are integers.
        """
        rng, deltas = self.rng(batch_idx), {}
        for name in self.names:
            x = without_mask(features[name]).detach()
            if not x.is_floating_point():
                raise MuroanError(
                    f"embedding_adversarial_training does not fit this model: its features of {name!r} are "
                    f"{x.dtype} numbers, which cannot be moved; choose defense=adversarial_training, or name other "
                    f"modalities in defense.modalities"
                )
            radius = self.epsilon * norms(x)
            noise = torch.as_tensor(rng.uniform(-1, 1, x.shape)).to(radius)
            # As FreeLB: uniform, scaled by the root of the dimension, so that it lies well within the ball.
            deltas[name] = (noise * radius / x[0].numel() ** 0.5).requires_grad_()
        return deltas


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """Symmetric Kullback-Leibler divergence between the answers of two batches of logits (B, C), a mean over rows."""
    a, b = a.log_softmax(1), b.log_softmax(1)
    ahead = F.kl_div(a, b, reduction="batchmean", log_target=True)
    return ahead + F.kl_div(b, a, reduction="batchmean", log_target=True)
