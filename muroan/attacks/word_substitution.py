"""Word substitution: the words that count most are replaced by others that look harmless."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from muroan.attacks.base import BatchAttack, Perturbation, Target
from muroan.attacks.canvas import predict_in_passes
from muroan.attacks.greedy import ROUNDING, ranked
from muroan.attacks.target import embedding_table
from muroan.errors import MuroanError, check_whole
from muroan.modalities import Text, WordTokenizer
from muroan.models.base import MultimodalModel, Prediction

Place = tuple[str, int]  # a word: its text and its position there

TEXTS = 4096  # whose candidates by a masked language model are remembered


class WordSubstitution(BatchAttack):
    """Greedy word substitution (TextFooler, Jin et al. 2020, arXiv 1907.11932, without its checks of part of speech and
    of sentence similarity).

    1. Rank: each word is deleted alone; the lower the margin, the earlier it comes.
    2. Replace: in that order each word gets the candidate that lowers the margin most, if any does, until the label
       flips. A word is replaced by one word, and keeps the punctuation around it and its capital.

    Candidates come from one of three places: a table of synonyms; a masked language model that fills in the word (as in
    BAE, Garg and Ramakrishnan 2020, arXiv 2004.01970), which is the attacker's own and costs no queries; or, without
    either, the model's own embedding table, where the nearest words by cosine are taken.

    Args:
        candidates: tried for a word at most; 50 as in TextFooler.
        max_words: replaced at most; no limit without it.
        synonyms: path of a JSON file, an object of word to list of words.
        masked_lm: folder or hub name of a checkpoint of a masked language model with its tokenizer.
    """

    def __init__(
        self,
        candidates: int = 50,
        max_words: int | None = None,
        synonyms: str | None = None,
        masked_lm: str | None = None,
    ):
        check_whole("attack", candidates=candidates, **({} if max_words is None else {"max_words": max_words}))
        if synonyms is not None and masked_lm is not None:
            raise MuroanError("attack.synonyms and attack.masked_lm are both set: candidates come from one place")
        self.candidates, self.max_words = candidates, max_words
        self.synonyms, self.masked_lm = synonyms, masked_lm
        self._source: _Source | None = None

    def perturb(self, target: Target) -> Sequence[Perturbation | None]:
        """
        Raises:
            MuroanError: the model takes no text; the synonyms or the masked language model cannot be read; there is
                neither, and the model has no embedding table of words.
        """
        names = target.select(None, target.texts, "words")
        source = self.source(target)
        margins = Target.margin(target.clean, target.labels).tolist()
        texts = [
            _Row(row, {name: list(sample.layouts[name].words) for name in names}, margin)
            for row, (sample, margin) in enumerate(zip(target.samples, margins, strict=True))
        ]
        orders = self._rank(target, texts)
        target.first_flip[:] = 0  # a text with a word deleted is no result
        for step in range(max(map(len, orders))):
            asked: list[tuple[_Row, Place, list[_Try]]] = []
            for text, order in zip(texts, orders, strict=True):
                limit = len(order) if self.max_words is None else self.max_words
                if not text.flipped and step < len(order) and len(text.replaced) < limit:
                    place = order[step]
                    tries = self._tries(target, source, text, place)
                    tries = tries[: target.granted(text.row, len(tries))]
                    asked += [(text, place, tries)] if tries else []
            if not asked:
                continue
            flat = [(text.row, attempt) for text, _, tries in asked for attempt in tries]
            prediction, rows = _ask(target, flat)
            found = target.margin(prediction, target.labels[rows]).double().cpu().numpy()
            flips = target.flipped(prediction, rows).cpu().numpy()
            start = 0
            for text, place, tries in asked:
                part = slice(start, start + len(tries))
                start = part.stop
                text.take(place, tries, found[part], flips[part])
                if text.flipped:
                    target.first_flip[text.row] = target.queries[text.row]  # however the tries were cut into passes
        for text, sample in zip(texts, target.samples, strict=True):
            sample.info["replaced"] = text.replaced
        return [Perturbation(words=text.words) if text.flipped else None for text in texts]

    def source(self, target: Target) -> _Source:
        """Where candidates come from; loaded once, a model's own again whenever its embedding table has changed."""
        if self._source is None or (isinstance(self._source, _Neighbours) and not self._source.fits(target.model)):
            if self.synonyms is not None:
                self._source = _Synonyms(self.synonyms)
            elif self.masked_lm is not None:
                self._source = _MaskedLM(self.masked_lm)
            else:
                self._source = _Neighbours(target.model)
        return self._source

    def _rank(self, target: Target, texts: Sequence[_Row]) -> list[list[Place]]:
        """The words of each row, the one first whose deletion lowers the margin most; those not asked come last."""
        orders, flat, heard = [], [], []
        for text in texts:
            places = [(name, i) for name, words in text.words.items() for i in range(len(words))]
            tries = [(place, text.without(target, place)) for place in places]
            known = [(place, attempt) for place, attempt in tries if attempt is not None]
            known = known[: target.granted(text.row, len(known))]
            flat += [(text.row, attempt) for _, attempt in known]
            heard.append([place for place, _ in known])
            orders.append(places)
        if not flat:
            return orders
        prediction, rows = _ask(target, flat)
        margins = target.margin(prediction, target.labels[rows]).tolist()
        for at, (places, asked) in enumerate(zip(orders, heard, strict=True)):
            own, margins = margins[: len(asked)], margins[len(asked) :]
            first = [asked[i] for i in ranked(own)]
            orders[at] = first + [place for place in places if place not in first]
        return orders

    def _tries(self, target: Target, source: _Source, text: _Row, place: Place) -> list[_Try]:
        """The texts that a row may become by another word in one place."""
        name, i = place
        before, core, after = split_word(text.words[name][i])
        tries = []
        for word in source.candidates(target, name, text.original[name], i, self.candidates):
            fitting = word[:1].upper() + word[1:] if core[:1].isupper() else word
            attempt = text.with_word(target, place, before + fitting + after)
            if attempt is not None:
                tries.append(attempt)
        return tries


def split_word(word: str) -> tuple[str, str, str]:
    """What stands before a word, the word itself, and what stands after it.

    >>> split_word('"Red,')
    ('"', 'Red', ',')
    """
    match = re.fullmatch(r"(\W*)(.*?)(\W*)", word, re.DOTALL)
    assert match is not None
    return match[1], match[2], match[3]


@dataclass(frozen=True, slots=True)
class _Try:
    """A text that may be asked: which one, its words and its token ids (T,)."""

    name: str
    words: list[str]
    ids: Tensor


class _Row:
    """One sample's texts under way.

    Attributes:
        words: as they are now, a text; `original` as they were.
        replaced: text, position, word and new word of each replacement so far.
    """

    def __init__(self, row: int, words: dict[str, list[str]], margin: float):
        self.row, self.words, self.margin = row, words, margin
        self.original = {name: list(some) for name, some in words.items()}
        self.replaced: list[list[str | int]] = []
        self.flipped = False

    def without(self, target: Target, place: Place) -> _Try | None:
        name, i = place
        return self._prepared(target, name, self.words[name][:i] + self.words[name][i + 1 :])

    def with_word(self, target: Target, place: Place, word: str) -> _Try | None:
        name, i = place
        if word.casefold() == self.words[name][i].casefold():
            return None
        return self._prepared(target, name, [*self.words[name][:i], word, *self.words[name][i + 1 :]])

    def _prepared(self, target: Target, name: str, words: list[str]) -> _Try | None:
        """None where the model would not read these words: there are none, or too many tokens."""
        try:
            ids, layout = target.model.modalities[name].prepare(" ".join(words))
        except MuroanError:
            return None
        return _Try(name, words, ids) if list(layout.words) == words else None

    def take(self, place: Place, tries: Sequence[_Try], margins: np.ndarray, flips: np.ndarray) -> None:
        """Replace a word by the best try, the first of equals, if it flips or lowers the margin."""
        among = flips if flips.any() else np.ones(len(tries), dtype=bool)
        lowest = margins[among].min()
        best = next(i for i in range(len(tries)) if among[i] and margins[i] < lowest + ROUNDING)
        if flips.any() or margins[best] < self.margin - ROUNDING:
            name, i = place
            self.replaced.append([name, i, self.words[name][i], tries[best].words[i]])
            self.words[name], self.margin, self.flipped = tries[best].words, float(margins[best]), bool(flips.any())


def _ask(target: Target, flat: Sequence[tuple[int, _Try]]) -> tuple[Prediction, Tensor]:
    """What the model says to tries, (n, D) and (n, C), and the row (n,) that each is of."""
    rows = [row for row, _ in flat]
    names = dict.fromkeys(attempt.name for _, attempt in flat)

    def inputs(part: slice) -> dict[str, Tensor]:
        made = {}
        for name in names:
            clean = target.inputs[name][torch.tensor(rows[part], device=target.device)]
            for i, (_, attempt) in enumerate(flat[part]):
                if attempt.name == name:
                    clean[i] = attempt.ids.to(clean)
            made[name] = clean
        return made

    return predict_in_passes(target, rows, inputs), target.labels.new_tensor(rows)


# ---------------------------------------------------------------------------------------------------------
# Where candidates come from


class _Source(ABC):
    @abstractmethod
    def candidates(self, target: Target, name: str, words: Sequence[str], i: int, most: int) -> list[str]:
        """Words that may stand in for the i-th of the original words of a text, the best first."""


def usable(words: Sequence[str], core: str, most: int) -> list[str]:
    """The first of the candidates that are one word each and another than the core."""
    found = [word for word in words if len(word.split()) == 1 and word.casefold() != core.casefold()]
    return list(dict.fromkeys(found))[:most]


class _Synonyms(_Source):
    def __init__(self, path: str):
        try:
            table = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise MuroanError(f"attack.synonyms: {path} cannot be read as JSON ({error})") from None
        if not isinstance(table, Mapping) or not all(
            isinstance(words, list) and all(isinstance(word, str) for word in words) for words in table.values()
        ):
            raise MuroanError(f"attack.synonyms: {path} must hold an object of word to list of words")
        self.table = {word.casefold(): words for word, words in table.items()}

    def candidates(self, target: Target, name: str, words: Sequence[str], i: int, most: int) -> list[str]:
        core = split_word(words[i])[1]
        return usable(self.table.get(core.casefold(), []), core, most)


class _Neighbours(_Source):
    """Words of the model's own vocabulary by the cosine of their embeddings."""

    def __init__(self, model: MultimodalModel):
        self.model = model
        self.tables: dict[str, tuple[WordTokenizer, np.ndarray]] = {}
        self.known: dict[tuple[str, str], list[str]] = {}
        for name, modality in model.modalities.items():
            if isinstance(modality, Text):
                self.tables[name] = self._table(model, name, modality)
        self.read = {name: embedding_table(model, name).weight.detach().clone() for name in self.tables}

    def fits(self, model: MultimodalModel) -> bool:
        """Whether what was read is still what the model has: adversarial training moves it."""
        # The values themselves, as a fused optimizer does not count up a tensor's version.
        weights = {name: embedding_table(self.model, name).weight for name in self.tables}
        return model is self.model and all(torch.equal(w, self.read[name].to(w)) for name, w in weights.items())

    @staticmethod
    def _table(model: MultimodalModel, name: str, modality: Text) -> tuple[WordTokenizer, np.ndarray]:
        tokenizer = modality.tokenizer
        elsewhere = "set attack.synonyms to a JSON file, or attack.masked_lm to a checkpoint"
        if not isinstance(tokenizer, WordTokenizer):
            raise MuroanError(
                f"the tokens of {name!r} ({type(tokenizer).__name__}) are no whole words, so that its embedding table "
                f"has no neighbours to offer: {elsewhere}"
            )
        try:
            table = embedding_table(model, name).weight.detach().double().cpu().numpy()
        except MuroanError:
            raise MuroanError(f"the model has no one embedding table of the words of {name!r}: {elsewhere}") from None
        return tokenizer, table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)

    def candidates(self, target: Target, name: str, words: Sequence[str], i: int, most: int) -> list[str]:
        core = split_word(words[i])[1]
        if (name, core) not in self.known:
            tokenizer, table = self.tables[name]
            ids = tokenizer.words_to_ids([core])[0]
            found: list[str] = []
            if len(ids) == 1 and ids[0] != tokenizer.unk_id:
                special = len(tokenizer.SPECIAL)
                order = np.argsort(-(table[special:] @ table[ids[0]]), kind="stable")
                vocabulary = (tokenizer.vocabulary[j] for j in order)
                found = usable([word for word in vocabulary if word.isalnum()], core, most)
            self.known[name, core] = found
        return self.known[name, core]


class _MaskedLM(_Source):
    """Whole words that a masked language model would fill in."""

    def __init__(self, checkpoint: str):
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        from muroan.models.huggingface import load

        try:
            self.tokenizer = load(AutoTokenizer, checkpoint)
            self.model, info = load(AutoModelForMaskedLM, checkpoint, dtype=torch.float32, output_loading_info=True)
        except MuroanError as error:
            raise MuroanError(f"attack.masked_lm: {error}") from error
        if info["missing_keys"] or self.tokenizer.mask_token is None:
            lacks = f"weights, such as {sorted(info['missing_keys'])[0]}" if info["missing_keys"] else "a mask token"
            raise MuroanError(f"attack.masked_lm: {checkpoint!r} lacks {lacks}: choose a masked language model")
        self.model.eval()
        tokens = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        # How a vocabulary tells the beginning of a word from its middle: a mark before it, or ## before the middle.
        mark = next((m for m in "Ġ▁" if any(token.startswith(m) for token in tokens)), "")
        special = set(self.tokenizer.all_special_tokens)
        self.words = {
            i: token.removeprefix(mark)
            for i, token in enumerate(tokens)
            if token.startswith(mark) and token.removeprefix(mark).isalpha() and token not in special
        }
        self.ids = torch.tensor(list(self.words))
        self.known: dict[tuple[str, ...], list[list[str]]] = {}

    def candidates(self, target: Target, name: str, words: Sequence[str], i: int, most: int) -> list[str]:
        # All words of a text in one batch, which thus does not depend on what else is attacked.
        text = tuple(words)
        if text not in self.known:
            if len(self.known) >= TEXTS:
                self.known.clear()
            self.known[text] = self._filled(text, target.device, most)
        return self.known[text][i]

    @torch.no_grad()
    def _filled(self, words: Sequence[str], device: torch.device, most: int) -> list[list[str]]:
        """Candidates for each word of a text."""
        parts = [split_word(word) for word in words]
        sentences = []
        for i, (before, _, after) in enumerate(parts):
            sentences.append(" ".join([*words[:i], before + self.tokenizer.mask_token + after, *words[i + 1 :]]))
        batch: Any = self.tokenizer(sentences, padding=True, truncation=True, return_tensors="pt").to(device)
        logits = self.model.to(device)(**batch).logits
        masks = batch["input_ids"] == self.tokenizer.mask_token_id
        found: list[list[str]] = []
        for i, (_, core, _) in enumerate(parts):
            at = masks[i].nonzero()
            if not len(at):  # cut off with the end of a text too long for the language model
                found.append([])
                continue
            scores = logits[i, int(at[0])].cpu()[self.ids]
            order = torch.argsort(scores, descending=True, stable=True)[: most + 1]
            found.append(usable([self.words[int(self.ids[j])] for j in order], core, most))
        return found
