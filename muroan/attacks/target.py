"""The model as an attack on a batch sees it: clean inputs, and forward and backward passes that are counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from muroan.errors import MuroanError, check_names
from muroan.modalities import Text
from muroan.models.base import Features, MultimodalModel, Prediction, map_features, without_mask

if TYPE_CHECKING:
    from muroan.attacks.base import AttackedSample


@dataclass(frozen=True, slots=True)
class Perturbation:
    """One sample's input with values of an attack's choosing. Modalities that are not named stay clean.

    Attributes:
        inputs: (*shape) a continuous modality, as the model takes it; for a text, token ids, where no words spell them.
        words: for a text, the words that it shall have; beside token ids, what a report shows. As changed count the
            words that are replaced, left out or put in, by the fewest edits, and at most as many as the text had.
        features: (...) of a modality whose input stays clean, what the fusion shall get instead of its own, without a
            mask; all elements of that modality count as changed.
    """

    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)
    features: Mapping[str, Tensor] = field(default_factory=dict)


class BudgetExhausted(Exception):
    """Raised inside a search at the question that `max_queries` no longer allows.

    A search may catch it and return the best removal that it knows; what it asks after that is refused again.

    Attributes:
        responses: answers to those questions of the refused `Ask` that were still within the budget.
    """

    def __init__(self, responses: Sequence[Any] = ()):
        super().__init__("max_queries reached")
        self.responses = list(responses)


Loss = Callable[[Prediction, Tensor], Tensor]


class Target:
    """A batch of B samples under attack and the model that they attack.

    A forward pass is a query a row, and so is a backward pass. Rows run out of their budgets one by one, and the others
    must be able to go on: an attack asks `able` or `granted` what a row may still do, and does no more. Whoever was
    refused something there, and was not flipped, is recorded as `budget_exhausted`. A pass that the budget of one of
    its rows does not allow is not made at all: it raises `BudgetExhausted`, which the engine turns into an error.

    Attributes:
        samples: (B) what is known of each; draw from `samples[i].rng`, so that results do not depend on the batch.
        inputs: (B, *shape) clean inputs, a modality.
        labels: (B,) the true classes, which the model predicts.
        clean: its prediction, (B, D) and (B, C).
        donors: (M, *shape) a modality, inputs of M samples that are not attacked, to take parts from.
        donor_words: (M) a text, the words of each.
        queries, forwards, backwards: (B,) passes so far.
        first_flip: (B,) queries at the first pass whose prediction was not the label; 0 where there was none. An attack
            sets it that asks what it would not return, or looks at several passes as one.
        in_hand: (B) of each the flips that `note` was told of, as pairs of queries and changed elements.
        refused: (B,) bool, rows that `able` or `granted` refused something.
    """

    def __init__(
        self,
        model: MultimodalModel,
        samples: Sequence[AttackedSample],
        inputs: Mapping[str, Tensor],
        labels: Tensor,
        budgets: Sequence[float],
        features: Mapping[str, Features],
        clean: Prediction,
        donors: Mapping[str, Tensor],
        donor_words: Mapping[str, Sequence[Sequence[str]]] | None = None,
    ):
        self.model, self.samples = model, list(samples)
        self.inputs, self.labels, self.clean, self.donors = dict(inputs), labels, clean, dict(donors)
        self.donor_words = dict(donor_words or {})
        self._budgets, self._features = np.array(budgets, dtype=float), dict(features)
        self.queries = np.zeros(len(samples), dtype=int)
        self.forwards, self.backwards, self.first_flip = (np.zeros_like(self.queries) for _ in range(3))
        self.in_hand: list[list[tuple[int, int]]] = [[] for _ in samples]
        self.refused = np.zeros(len(samples), dtype=bool)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def device(self) -> torch.device:
        return self.labels.device

    @property
    def continuous(self) -> list[str]:
        """The modalities that have values to change."""
        return [n for n, m in self.model.modalities.items() if not isinstance(m, Text)]

    @property
    def texts(self) -> list[str]:
        return [n for n, m in self.model.modalities.items() if isinstance(m, Text)]

    def select(self, modalities: Sequence[str] | None, among: Sequence[str], what: str) -> list[str]:
        """The chosen modalities, or all of `among`.

        Raises:
            MuroanError: one of the chosen is not among them, or there is none; `what` names the kind in the message.
        """
        check_names("attack", modalities=modalities)
        chosen = list(among if modalities is None else modalities)
        wrong = [name for name in chosen if name not in among]
        if wrong or not chosen:
            kinds = ", ".join(f"{n} ({type(m).__name__})" for n, m in self.model.modalities.items())
            named = f", and attack.modalities names {wrong or 'none'}" if modalities is not None else ""
            raise MuroanError(
                f"this attack changes {what}: of what the model takes, {kinds}, it can change "
                f"{', '.join(among) or 'none'}{named}; choose another attack or modality"
            )
        return chosen

    def left(self) -> np.ndarray:
        """(B,) queries that each row may still make; infinite without one. Knowing them is no refusal."""
        return self._budgets - self.queries

    def granted(self, row: int, queries: int) -> int:
        """How many of so many queries more a row may make, for an attack that then makes do with fewer."""
        self.refused[row] |= self.left()[row] < queries
        return int(min(self.left()[row], queries))

    def able(self, rows: Tensor, cost: int) -> Tensor:
        """Those of the rows (n,) that can afford so many queries more, each for itself."""
        enough = torch.as_tensor(self.left() >= cost, device=self.device)[rows]
        self.refused[rows[~enough].cpu().numpy()] = True
        return rows[enough]

    def note(self, rows: Sequence[int], elements: Sequence[int]) -> None:
        """Note flips that the attack would return if it ended now, for one that goes on to look for smaller ones.

        Args:
            rows: which sample each is of; elements: how many it changes, at most.
        """
        for row, count in zip(rows, elements, strict=True):
            self.in_hand[row].append((int(self.queries[row]), count))

    # -- passes ---------------------------------------------------------------------------------------------

    def predict(self, inputs: Mapping[str, Tensor], rows: Tensor | None = None, admissible: bool = True) -> Prediction:
        """One forward pass of some rows; what is not in `inputs` stays clean.

        Args:
            inputs: (n, *shape) a changed modality.
            rows: (n,) which sample each is of, a row may come several times; all samples in order without it.
            admissible: whether the attack could return these inputs; False for those that it only learns from (a
                donor's, a text with a gap), so that another answer to them is no flip. They are queries like others.

        Returns:
            (n, D) and (n, C), without gradients.
        """
        rows = self._rows(rows)
        self._spend(rows, forwards=1)
        with torch.no_grad():
            prediction = self._run(inputs, rows)
        if admissible:
            self._watch(prediction, rows, 1)
        return prediction

    def gradient(
        self,
        loss: Loss,
        inputs: Mapping[str, Tensor] | None = None,
        rows: Tensor | None = None,
        of: Sequence[str] = (),
        scale: Mapping[str, Tensor] | None = None,
    ) -> tuple[Prediction, dict[str, Tensor]]:
        """One forward and one backward pass.

        Args:
            loss: takes the prediction and the labels (n,), returns (n,) losses, each of its own row alone.
            inputs, rows: as in `predict`.
            of: modalities to differentiate by: (n, *shape) for a continuous one; for a text, its word embeddings.
            scale: (n,) a text in `of`: factors that its word embeddings are multiplied by.

        Returns:
            The prediction, detached, and the gradient of each row's loss by its input, a modality: (n, *shape), or
            (n, T, E) for a text.

        Raises:
            MuroanError: the model has no embedding table to differentiate by, or its answer does not depend on an
                input in a way that can be differentiated.
        """
        rows = self._rows(rows)
        self._spend(rows, forwards=1, backwards=1)
        given = dict(inputs or {})
        leaves: dict[str, Tensor] = {}
        with torch.enable_grad(), ExitStack() as hooks:
            for name in of:
                if name in self.texts:
                    by = None if scale is None else scale.get(name)
                    ids = given.setdefault(name, self.inputs[name][rows])
                    hooks.enter_context(_Embedded(self.model, name, ids, leaves, by))
                else:
                    leaves[name] = given.get(name, self.inputs[name][rows]).detach().clone().requires_grad_()
                    given[name] = leaves[name]
            prediction = self._run(given, rows)
        return self._followed(loss, prediction, {name: leaves[name] for name in of}, rows)

    def features(self, name: str) -> Features:
        """(B, ...) what the encoder makes of the clean input; costs nothing."""
        return map_features(lambda room: room.clone(), self._features[name])

    def predict_features(self, features: Mapping[str, Features], rows: Tensor) -> Prediction:
        """One forward pass of some rows with other features; those of modalities that are not named stay clean.

        Args:
            features: (n, ...) as `features` gives them; rows: (n,) which sample each is of.
        """
        self._spend(rows, forwards=1)
        with torch.no_grad():
            prediction = self._fused({**self._clean_features(rows), **features})
        self._watch(prediction, rows, 1)
        return prediction

    def feature_gradient(
        self, loss: Loss, features: Mapping[str, Features], rows: Tensor
    ) -> tuple[Prediction, dict[str, Tensor]]:
        """A forward and a backward pass: the gradients (n, ...) of a loss by given features, see `predict_features`.

        Raises:
            MuroanError: the model's answer has no gradient by one of them.
        """
        self._spend(rows, forwards=1, backwards=1)
        with torch.enable_grad():
            leaves = {name: without_mask(f).detach().clone().requires_grad_() for name, f in features.items()}
            given = {n: (leaves[n], *f[1:]) if isinstance(f, tuple) else leaves[n] for n, f in features.items()}
            prediction = self._fused({**self._clean_features(rows), **given})
        return self._followed(loss, prediction, leaves, rows)

    def embedded(self, name: str) -> Tensor:
        """(B, T, E) the clean word embeddings of a text; costs nothing, the table is the model's own."""
        table = embedding_table(self.model, name)
        with torch.no_grad():
            return table(self.inputs[name])

    @staticmethod
    def margin(prediction: Prediction, labels: Tensor) -> Tensor:
        """(n,) logit of the label minus the best other one: negative when flipped."""
        own = prediction.logits.gather(1, labels[:, None])
        other = prediction.logits.scatter(1, labels[:, None], float("-inf")).amax(1, keepdim=True)
        return (own - other)[:, 0]

    def flipped(self, prediction: Prediction, rows: Tensor | None = None) -> Tensor:
        """(n,) bool."""
        return prediction.logits.argmax(1) != self.labels[self._rows(rows)]

    def perturbations(self, inputs: Mapping[str, Tensor]) -> list[Perturbation]:
        """The rows of (B, *shape) changed inputs as perturbations."""
        return [Perturbation({name: x[i].detach() for name, x in inputs.items()}) for i in range(len(self))]

    def span(self, name: str) -> tuple[Tensor, Tensor]:
        """The range of values that a prepared input can have, low and high, shaped to broadcast over (B, *shape)."""
        low, high = self.model.modalities[name].span()
        shape = (1, -1, *(1 for _ in self.inputs[name].shape[2:])) if self.inputs[name].ndim > 2 else (1, 1)
        like = self.inputs[name]
        return low.to(like).reshape(shape), high.to(like).reshape(shape)

    # -- inside ---------------------------------------------------------------------------------------------

    def _rows(self, rows: Tensor | None) -> Tensor:
        return torch.arange(len(self), device=self.device) if rows is None else rows

    def _spend(self, rows: Tensor, forwards: int, backwards: int = 0) -> None:
        times = np.bincount(rows.cpu().numpy(), minlength=len(self))
        if (times * (forwards + backwards) > self.left()).any():
            raise BudgetExhausted
        self.queries += times * (forwards + backwards)
        self.forwards += times * forwards
        self.backwards += times * backwards

    def _run(self, inputs: Mapping[str, Tensor], rows: Tensor) -> Prediction:
        features: dict[str, Features] = {}
        for name in self.model.modalities:
            if name in inputs:
                expected = (len(rows), *self.model.modalities[name].shape)
                if tuple(inputs[name].shape) != expected:
                    raise MuroanError(f"{name} must have shape {expected}, got {tuple(inputs[name].shape)}")
                features[name] = self.model.encode(name, inputs[name])
            else:
                features[name] = map_features(lambda room: room[rows], self._features[name])
        return self._fused(features)

    def _clean_features(self, rows: Tensor) -> dict[str, Features]:
        return {n: map_features(lambda room: room[rows], self._features[n]) for n in self.model.modalities}

    def _fused(self, features: dict[str, Features]) -> Prediction:
        embedding = self.model.fuse(features)
        dtype = self.clean.logits.dtype  # losses are taken in the model's own precision, also under autocast
        return Prediction(embedding.to(dtype), self.model.head(embedding).to(dtype))

    def _followed(
        self, loss: Loss, prediction: Prediction, leaves: Mapping[str, Tensor], rows: Tensor
    ) -> tuple[Prediction, dict[str, Tensor]]:
        """A prediction, detached, and the gradients of its loss by some leaves, a modality."""
        with torch.enable_grad():
            total = loss(prediction, self.labels[rows]).sum()
        if not total.requires_grad:
            raise MuroanError(
                "the model's answer has no gradient by what it was given: choose an attack that only asks, such as "
                "decoupling or sparse_rs"
            )
        found = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()), allow_unused=True), strict=True))
        if missing := [name for name, gradient in found.items() if gradient is None]:
            raise MuroanError(
                f"the model's answer does not depend on {missing} in a way that can be differentiated: choose an "
                f"attack that only asks, such as decoupling or sparse_rs"
            )
        prediction = Prediction(prediction.embedding.detach(), prediction.logits.detach())
        self._watch(prediction, rows, 2)
        return prediction, {name: gradient.detach() for name, gradient in found.items()}

    def _watch(self, prediction: Prediction, rows: Tensor, cost: int) -> None:
        """Note first flips. The rows of a pass count as if asked one by one: how they are packed must not show."""
        flipped = self.flipped(prediction, rows).cpu().numpy()
        if not flipped.any():
            return
        asked = rows.cpu().numpy()
        at = self.queries - cost * np.bincount(asked, minlength=len(self))
        for row, flip in zip(asked, flipped, strict=True):
            at[row] += cost
            if flip and not self.first_flip[row]:
                self.first_flip[row] = at[row]


def embedding_table(model: nn.Module, name: str) -> nn.Embedding:
    """The table of word embeddings of a model's text: the one `nn.Embedding` that has a row a token.

    Raises:
        MuroanError: there is none, or more than one.
    """
    size = model.modalities[name].tokenizer.size  # type: ignore[union-attr, index, operator]
    tables = {id(m): m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == size}
    if len(tables) != 1:
        raise MuroanError(
            f"a gradient by the words of {name!r} needs the model's one nn.Embedding with a row for each of {size} "
            f"tokens, found {len(tables)}: choose an attack that needs no gradient of words"
        )
    return next(iter(tables.values()))


class _Embedded:
    """While it is open, the word embeddings of a text are a leaf that gradients reach.

    The leaf stands in for the one call of the table that looks up the very ids that the model is given; a model may
    look up others besides, such as special tokens that it puts in.

    Args:
        ids: (n, T); leaves: where the leaf (n, T, E) is put, under `name`; scale: (n,) what it is multiplied by.

    Raises:
        MuroanError: when it closes after a pass without an error, if no such call was made, or several.
    """

    def __init__(self, model: nn.Module, name: str, ids: Tensor, leaves: dict[str, Tensor], scale: Tensor | None):
        self.table, self.name, self.ids = embedding_table(model, name), name, ids
        self.leaves, self.scale = leaves, scale
        self.calls: list[tuple[int, ...]] = []  # shapes
        self.matches = 0

    def __enter__(self) -> None:
        leaf = self.table(self.ids).detach().clone()
        if self.scale is not None:
            leaf = leaf * self.scale[:, None, None].to(leaf)
        self.leaves[self.name] = leaf.requires_grad_()
        self.handle = self.table.register_forward_hook(self._replace)

    def _replace(self, module: nn.Module, arguments: Any, output: Tensor) -> Tensor | None:
        self.calls.append(tuple(arguments[0].shape))
        if not torch.equal(arguments[0], self.ids):
            return None
        self.matches += 1
        return self.leaves[self.name]

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.handle.remove()
        if error is None and self.matches != 1:
            raise MuroanError(
                f"a gradient by the words of {self.name!r} needs the model to look up the token ids that it is given, "
                f"{tuple(self.ids.shape)}, in one call of its nn.Embedding; of its calls, {self.calls}, "
                f"{self.matches or 'none'} did: choose an attack that needs no gradient of words"
            )
