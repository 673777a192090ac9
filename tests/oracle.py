"""The decoupling attack as a plain loop, from its description alone: what the engine's answers are compared with.

One forward of the whole model for every question, a batch of one, no cache. Of muroan it uses nothing but the model,
the sample and the tokenizer: occlusion, regions, counting and order are written down again here, to be read, not run
fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import chain, combinations, islice, product
from typing import Any

import torch

from muroan.modalities import Text

# (modality, start, stop): a box of elements; a word is the box ((i,), (i + 1,)).
Part = tuple[str, tuple[int, ...], tuple[int, ...]]


@dataclass
class OracleResult:
    """
    Attributes:
        status: "skipped" (wrong before the attack), "flipped" or "held".
        parts: the winning combination, empty unless flipped.
        removed: the coordinates of all removed elements, a modality that has any.
        percent: removed elements over elements, each counted once.
        released_percent: the same of the last part of the combination alone, which is what the released code counts.
        combinations: how many were tried, the winning one included.
        salient: number of salient points a modality.
        adversarial_label: the model's answer to the winning combination; the clean one unless flipped.
        margins: gap between the two largest values of everything that an argmax was taken of.
    """

    status: str
    parts: tuple[Part, ...] = ()
    removed: dict[str, set[tuple[int, ...]]] = field(default_factory=dict)
    percent: float = 0.0
    released_percent: float = 0.0
    combinations: int = 0
    salient: dict[str, int] = field(default_factory=dict)
    adversarial_label: int = -1
    margins: list[float] = field(default_factory=list)


def children(start: tuple[int, ...], stop: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut every axis at its upper half: top-left, bottom-left, top-right, bottom-right for the axes (y, x)."""
    cuts = []
    for a, b in zip(start, stop, strict=True):
        middle = a + -(-(b - a) // 2)  # a + ceil(side / 2)
        cuts.append([(a, middle), (middle, b)] if middle < b else [(a, b)])
    boxes = [tuple(reversed(sides)) for sides in product(*reversed(cuts))]  # the first axis varies fastest
    return [(tuple(a for a, _ in sides), tuple(b for _, b in sides)) for sides in boxes]


def coordinates(part: Part) -> set[tuple[int, ...]]:
    _, start, stop = part
    return set(product(*(range(a, b) for a, b in zip(start, stop, strict=True))))


def occluded(model: Any, sample: Any, parts: tuple[Part, ...]) -> dict[str, torch.Tensor]:
    """The sample's inputs, a batch of one: zeros in place of pixels and sound, words left out."""
    inputs = {}
    for name, modality in model.modalities.items():
        mine = [part for part in parts if part[0] == name]
        if isinstance(modality, Text):
            gone = {i for _, (start,), (stop,) in mine for i in range(start, stop)}
            words = [word for i, word in enumerate(sample.layouts[name].words) if i not in gone]
            tokenizer = modality.tokenizer
            ids = list(tokenizer.prefix)
            for pieces in tokenizer.words_to_ids(words):
                ids.extend(pieces)
            ids.extend(tokenizer.suffix)
            ids.extend([tokenizer.pad_id] * (modality.max_length - len(ids)))
            inputs[name] = torch.tensor([ids])
        else:
            x = sample.inputs[name].clone()
            for _, start, stop in mine:
                x[(..., *(slice(a, b) for a, b in zip(start, stop, strict=True)))] = 0
            inputs[name] = x[None]
    return inputs


class Oracle:
    """One sample: the constructor finds its salient points, `decouple` couples them and looks for a flip."""

    def __init__(self, model: Any, sample: Any, min_side: dict[str, int]):
        """
        Args:
            min_side: by modality; a region whose longest side is no larger is not cut again. Texts need none.
        """
        self.model, self.sample, self.min_side = model, sample, min_side
        self.margins: list[float] = []
        self.clean_component, self.clean_label = self.ask()
        self.regions: list[Part] = []
        self.words: list[Part] = []
        if self.clean_label == sample.label:
            self.find_salient_points()

    @torch.no_grad()
    def ask(self, *parts: Part) -> tuple[int, int]:
        """The largest component of the fusion embedding, and the predicted class."""
        dtype = next(self.model.parameters()).dtype
        inputs = occluded(self.model, self.sample, parts)
        prediction = self.model({name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()})
        for values in (prediction.embedding[0], prediction.logits[0]):
            first, second = values.topk(2).values.tolist()
            self.margins.append(first - second)
        return int(prediction.embedding[0].argmax()), int(prediction.logits[0].argmax())

    def find_salient_points(self) -> None:
        for name, modality in self.model.modalities.items():
            grid = tuple(self.sample.layouts[name].grid)
            if isinstance(modality, Text):
                for i in range(grid[0]):
                    word = (name, (i,), (i + 1,))
                    if self.ask(word)[0] != self.clean_component:
                        self.words.append(word)
            else:
                self.search(name, (0,) * len(grid), grid)

    def search(self, name: str, start: tuple[int, ...], stop: tuple[int, ...]) -> None:
        if max(b - a for a, b in zip(start, stop, strict=True)) <= self.min_side[name]:
            return
        for child_start, child_stop in children(start, stop):
            region = (name, child_start, child_stop)
            if self.ask(region)[0] != self.clean_component:
                self.regions.append(region)
                self.search(name, child_start, child_stop)

    def decouple(self, max_combinations: int = 500, coupling: str = "combinations") -> OracleResult:
        """
        Args:
            coupling: "combinations" of all salient points, or "pairs" of two that lie in different modalities.
        """
        result = OracleResult("held", adversarial_label=self.clean_label, margins=self.margins)
        if self.clean_label != self.sample.label:
            result.status = "skipped"
            return result
        points = sorted(self.regions, key=lambda part: len(coordinates(part))) + self.words  # equal areas stay in order
        for name in self.model.modalities:
            result.salient[name] = sum(part[0] == name for part in points)

        if coupling == "combinations":
            coupled = chain.from_iterable(combinations(points, size) for size in range(1, len(points) + 1))
        else:
            coupled = ((a, b) for a, b in combinations(points, 2) if a[0] != b[0])
        for combination in islice(coupled, max_combinations):
            result.combinations += 1
            _, label = self.ask(*combination)
            if label != self.clean_label:
                for part in combination:
                    result.removed.setdefault(part[0], set()).update(coordinates(part))
                total = sum(math.prod(layout.grid) for layout in self.sample.layouts.values())
                result.status, result.parts, result.adversarial_label = "flipped", combination, label
                result.percent = 100 * sum(map(len, result.removed.values())) / total
                result.released_percent = 100 * len(coordinates(combination[-1])) / total
                break
        return result
