"""A word and the image, one after the other, against the fused embedding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from muroan.attacks.base import BatchAttack, Perturbation, Target
from muroan.attacks.greedy import lowest
from muroan.attacks.target import embedding_table
from muroan.attacks.values import Values
from muroan.errors import MuroanError, check_number, check_whole
from muroan.modalities import Text, Tokenizer
from muroan.models.base import Prediction


class CoAttack(BatchAttack):
    """Co-Attack (Zhang et al., "Towards Adversarial Attack on Vision-Language Pre-training Models", 2022,
    arXiv 2206.09391), on the fused embedding z. With KL(p, q) between the softmaxes of two embeddings:

    1. Text: the word whose masking moves z furthest, by KL(z, z'), is replaced by the candidate that moves it furthest;
       t becomes t'.
    2. Image: PGD in linf from a random start, climbing KL(z(x, t), z(x', t')) + alpha KL(z(x, t'), z(x', t')).

    What differs from the paper: candidates are the words of the tokenizer's vocabulary that are nearest by cosine in
    the model's embedding table, not a masked language model's guesses, so that only the target model is needed; no list
    of stop words is left alone; a word is masked by the mask token (left out where there is none), not by [UNK]; a
    sample is done at its first flip, of which one by the word alone leaves the image clean; several continuous
    modalities move jointly. The released code has alpha on the first term.

    Queries: a forward a word, a forward a candidate, 2 a step of the image and 1 for a look at the last. A budget too
    small for all words looks at the first ones; one too small for the look leaves the last step to the engine.

    Args:
        epsilon: radius of the image's ball, where 1 is the whole range of a value; 2/255, the paper's.
        steps, step: of the image; 10, the paper's, each of 1.25 epsilon / steps, as released, where `step` is null.
        alpha: 3, the paper's.
        candidates: words to try; 10, as released.
        modalities: continuous ones to change; null for all.

    Raises:
        MuroanError: a number that is not above 0; a model without a text or without the modalities named, or without
            one table of word embeddings; a vocabulary that cannot be read.
    """

    def __init__(
        self,
        epsilon: float = 2 / 255,
        steps: int = 10,
        step: float | None = None,
        alpha: float = 3.0,
        candidates: int = 10,
        modalities: Sequence[str] | None = None,
    ):
        check_whole("attack", steps=steps, candidates=candidates)
        check_number("attack", 0, above=True, epsilon=epsilon, alpha=alpha, **({} if step is None else {"step": step}))
        self.epsilon, self.steps, self.alpha, self.candidates = float(epsilon), steps, alpha, candidates
        self.step = 1.25 * self.epsilon / self.steps if step is None else float(step)
        self.modalities = modalities
        self._words: tuple[Any, list[str], list[int]] | None = None

    def perturb(self, target: Target) -> Sequence[Perturbation | None]:
        values = Values(target, self.modalities)
        name = target.select(None, target.texts, "a word of a text")[0]
        words, ids, said, flipped = self.replace_words(target, name)
        rows = (~flipped).nonzero()[:, 0]
        before = target.clean.embedding
        delta = values.zeros()
        start = values.draw(rows, lambda rng, size: rng.uniform(-self.epsilon, self.epsilon, size))
        delta[rows] = values.clip(start, rows)

        for _ in range(self.steps):
            rows = target.able(rows, 2)
            if not len(rows):
                break

            def loss(prediction: Prediction, labels: Tensor, rows: Tensor = rows) -> Tensor:
                z = prediction.embedding
                return divergence(before[rows], z) + self.alpha * divergence(said[rows], z)

            inputs = {name: ids[rows], **values.inputs(delta[rows], rows)}
            prediction, found = target.gradient(loss, inputs, rows, values.names)
            now = target.flipped(prediction, rows)
            flipped[rows[now]] = True
            gradient, rows = values.gradient(found, rows)[~now], rows[~now]
            moved = (delta[rows] + self.step * gradient.sign()).clamp(-self.epsilon, self.epsilon)
            delta[rows] = values.clip(moved, rows)

        unseen = ~flipped & delta.ne(0).any(1)
        rows = target.able(unseen.nonzero()[:, 0], 1)
        if len(rows):
            prediction = target.predict({name: ids[rows], **values.inputs(delta[rows], rows)}, rows)
            unseen[rows[~target.flipped(prediction, rows)]] = False
        results: list[Perturbation | None] = []
        for row, hit in enumerate((flipped | unseen).tolist()):
            moved_inputs = values.perturbation(delta[row], row).inputs if delta[row].any() else {}
            changed = {name: words[row]} if words[row] != target.samples[row].layouts[name].words else {}
            results.append(Perturbation(moved_inputs, changed) if hit else None)
        return results

    def replace_words(self, target: Target, name: str) -> tuple[list[tuple[str, ...]], Tensor, Tensor, Tensor]:
        """The text step.

        Returns:
            The words of each sample, their ids (B, T), the embedding of the clean image with them (B, D), and whether
            they flip (B,).
        """
        text = target.model.modalities[name]
        assert isinstance(text, Text)
        words = [sample.layouts[name].words for sample in target.samples]
        ids, said = target.inputs[name].clone(), target.clean.embedding.clone()
        flipped = torch.zeros(len(target), dtype=torch.bool, device=target.device)

        # Which word matters.
        how = "delete" if text.tokenizer.mask_id is None else "mask"
        places = [(row, i) for row, own in enumerate(words) for i in range(target.granted(row, len(own)))]
        gapped = [
            text.occlude(
                ids[row : row + 1], torch.tensor([[target.samples[row].layouts[name].spans[i]]]).to(ids), how, None
            )[0]
            for row, i in places
        ]
        moved = self._moved(target, name, [row for row, _ in places], gapped, admissible=False)
        # Shifts that are equal up to rounding go by position: equal words of a text tie.
        shifts = np.array([shift for shift, _, _ in moved])
        chosen = {row: places[own[lowest(-shifts[own])]][1] for row, own in _by_row([row for row, _ in places])}

        # What takes its place.
        offers: list[tuple[int, tuple[str, ...]]] = []
        for row, i in chosen.items():
            near = self.nearest(target, name, row, i)
            near = near[: target.granted(row, len(near))]
            offers += [(row, (*words[row][:i], word, *words[row][i + 1 :])) for word in near]
        tried = [text.prepare(" ".join(offer))[0].to(ids) for _, offer in offers]
        answers = self._moved(target, name, [row for row, _ in offers], tried, admissible=True)
        for row, own in _by_row([row for row, _ in offers]):
            among = [place for place in own if answers[place][1]] or own  # flips, where there are any
            best = among[lowest(-np.array([answers[place][0] for place in among]))]
            words[row], ids[row] = offers[best][1], tried[best]
            _, flipped[row], said[row] = answers[best]
        return words, ids, said, flipped

    def _moved(
        self, target: Target, name: str, rows: Sequence[int], texts: Sequence[Tensor], admissible: bool
    ) -> list[tuple[float, bool, Tensor]]:
        """What texts (n) of samples do: how far they move the embedding, whether they flip, and the embedding (D,)."""
        found: list[tuple[float, bool, Tensor]] = []
        for start in range(0, len(rows), len(target)):  # in passes of the batch's size
            of = torch.tensor(rows[start : start + len(target)], device=target.device)
            prediction = target.predict({name: torch.stack(list(texts[start : start + len(target)]))}, of, admissible)
            shift = divergence(target.clean.embedding[of], prediction.embedding).tolist()
            found += zip(shift, target.flipped(prediction, of).tolist(), prediction.embedding, strict=True)
        return found

    def nearest(self, target: Target, name: str, row: int, i: int) -> list[str]:
        """The words whose embeddings are nearest to that of a sample's word i (the mean over its tokens)."""
        words, known = self.vocabulary(target.model.modalities[name].tokenizer)  # type: ignore[attr-defined]
        table = embedding_table(target.model, name).weight.detach()
        first, stop = target.samples[row].layouts[name].spans[i]
        own = target.inputs[name][row, first:stop]
        # In double precision: a tie must not depend on the device.
        candidates = F.normalize(table[torch.tensor(known, dtype=torch.long, device=table.device)].double(), dim=1)
        likeness = candidates @ F.normalize(table[own].double().mean(0), dim=0)
        order = likeness.argsort(dim=0, descending=True, stable=True)[: self.candidates + 1].tolist()
        before = own.tolist()
        return [words[j] for j in order if before != [known[j]]][: self.candidates]

    def vocabulary(self, tokenizer: Tokenizer) -> tuple[list[str], list[int]]:
        """The words that are one token, and their ids.

        Raises:
            MuroanError: the tokenizer does not tell its vocabulary.
        """
        if self._words is None or self._words[0] is not tokenizer:
            tokens = getattr(tokenizer, "vocabulary", None)
            if tokens is None and hasattr(getattr(tokenizer, "tokenizer", None), "get_vocab"):
                vocabulary: Mapping[str, int] = tokenizer.tokenizer.get_vocab()  # type: ignore[attr-defined]
                # Byte-pair vocabularies mark the beginning or the end of a word.
                tokens = sorted({t.removeprefix("Ġ").removeprefix("▁").removesuffix("</w>") for t in vocabulary})
            if tokens is None:
                raise MuroanError(
                    f"co_attack replaces words by others of the vocabulary, which {type(tokenizer).__name__} does not "
                    "tell: give it a list `vocabulary`, or choose another attack"
                )
            words = [token for token in tokens if token.isalnum()]
            single = [(w, ids[0]) for w, ids in zip(words, tokenizer.words_to_ids(words), strict=True) if len(ids) == 1]
            self._words = tokenizer, [w for w, _ in single], [i for _, i in single]
        return self._words[1], self._words[2]


def _by_row(rows: Sequence[int]) -> Iterable[tuple[int, list[int]]]:
    """For each row the places that it stands at."""
    found: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        found.setdefault(row, []).append(place)
    return found.items()


def divergence(z: Tensor, other: Tensor) -> Tensor:
    """(n,) Kullback-Leibler divergence of the softmax of embeddings `other` (n, D) from that of z (n, D).

    >>> z = torch.tensor([[0.0, 0.0]])
    >>> divergence(z, z), divergence(z, torch.tensor([[0.0, 20.0]])).round()
    (tensor([0.]), tensor([9.]))
    """
    own = z.to(other).log_softmax(1)
    return (own.exp() * (own - other.log_softmax(1))).sum(1)
