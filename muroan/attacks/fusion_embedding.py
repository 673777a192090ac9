"""Gradient descent on the fusion embedding: away from its own, towards that of another class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from muroan.attacks.base import BatchAttack, Perturbation, Target
from muroan.attacks.values import Adam, Values
from muroan.errors import MuroanError, check_number, check_whole
from muroan.models.base import Prediction


class FusionEmbedding(BatchAttack):
    """The gradient attack of the authors of decoupling (Vishwamitra et al., arXiv 2112.12792), as their released code
    sets it.

    Adam descends on max(0, slack + pull * d(z', anchor) - push * d(z', z)), where z is the fusion embedding, z' the
    changed one and d one less the cosine similarity, plus the mean squared change of each modality. Only the continuous
    input moves, in units of the model's input. The anchor is the embedding of another sample that the model puts into
    another class: donors are drawn from the sample's own generator and asked, a query each, until there is one, whose
    place among the donors a record's info["anchor"] says; without one, None there, nothing is tried. A step costs 2
    queries, forward and backward; a sample is done at its first flip, or at a last look after the last step. Differs
    from the released code in that values stay in their range and that the anchor must be of another class.

    Args:
        steps, step: most steps, and Adam's; 500 and 0.001 as released.
        slack, pull, push: 0.5, 1.8 and 1.5 as released.
        donors: most donors to ask for an anchor; null for all that there are.
        modalities: which to change; null for all continuous ones.

    Raises:
        MuroanError: a number that is not above 0; modalities that the model does not have; no donors.
    """

    needs_donors = True

    def __init__(
        self,
        steps: int = 500,
        step: float = 1e-3,
        slack: float = 0.5,
        pull: float = 1.8,
        push: float = 1.5,
        donors: int | None = None,
        modalities: Sequence[str] | None = None,
    ):
        check_whole("attack", steps=steps, **({} if donors is None else {"donors": donors}))
        check_number("attack", 0, above=True, step=step, slack=slack, pull=pull, push=push)
        self.steps, self.step, self.donors, self.modalities = steps, step, donors, modalities
        self.slack, self.pull, self.push = slack, pull, push

    def perturb(self, target: Target) -> Sequence[Perturbation | None]:
        values = Values(target, self.modalities)
        rows, anchors = self.anchors(target)
        delta, adam = values.zeros(), Adam(values.zeros())
        flipped = torch.zeros(len(target), dtype=torch.bool, device=target.device)
        for _ in range(self.steps):
            rows = target.able(rows, 2)
            if not len(rows):
                break

            def loss(prediction: Prediction, labels: Tensor, rows: Tensor = rows) -> Tensor:
                z = prediction.embedding
                pull, push = _distance(z, anchors[rows]), _distance(z, target.clean.embedding[rows])
                return (self.slack + self.pull * pull - self.push * push).clamp(min=0)

            prediction, found = target.gradient(loss, values.inputs(delta[rows], rows), rows, values.names)
            now = target.flipped(prediction, rows)
            flipped[rows[now]] = True
            gradient = values.gradient(found, rows) / values.scale + values.mean_square_gradient(delta[rows])
            rows, gradient = rows[~now], gradient[~now]
            moved = delta[rows] - self.step * adam(gradient, rows) / values.scale
            delta[rows] = values.clip(moved, rows)

        unseen = delta.ne(0).any(1) & ~flipped
        rows = target.able(unseen.nonzero()[:, 0], 1)
        if len(rows):
            prediction = target.predict(values.inputs(delta[rows], rows), rows)
            unseen[rows[~target.flipped(prediction, rows)]] = False
        # Where the budget has no room for a look at the last step, the engine judges.
        found_rows = (flipped | unseen).tolist()
        return [values.perturbation(delta[i], i) if hit else None for i, hit in enumerate(found_rows)]

    def anchors(self, target: Target) -> tuple[Tensor, Tensor]:
        """The rows (n,) that have an anchor, and the anchors (B, D), zeros where there is none.

        Raises:
            MuroanError: the target has no donors.
        """
        if not target.donors:
            raise MuroanError(
                "fusion_embedding steers towards the embeddings of other samples and has none: call evaluate with "
                "donors=..., a list of samples that are not attacked (`muroan attack` takes validation samples)"
            )
        size = len(next(iter(target.donors.values())))
        most = size if self.donors is None else min(int(self.donors), size)
        order = torch.stack([torch.from_numpy(sample.rng.permutation(size)) for sample in target.samples])
        order = order.to(target.device)
        for sample in target.samples:
            sample.info["anchor"] = None
        anchors = torch.zeros_like(target.clean.embedding)
        having = torch.zeros(len(target), dtype=torch.bool, device=target.device)
        for at in range(most):
            rows = target.able((~having).nonzero()[:, 0], 1)
            if not len(rows):
                break
            donated = {name: x[order[rows, at]] for name, x in target.donors.items()}
            prediction = target.predict(donated, rows, admissible=False)
            other = target.flipped(prediction, rows)
            anchors[rows[other]] = prediction.embedding[other].to(anchors)
            having[rows[other]] = True
            for row in rows[other].tolist():
                target.samples[row].info["anchor"] = int(order[row, at])
        return having.nonzero()[:, 0], anchors


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """(n,) one less the cosine similarity of (n, D) and (n, D)."""
    return 1 - F.cosine_similarity(a, b.to(a))
