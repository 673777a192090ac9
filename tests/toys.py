"""A toy model of blocks, stretches and words, and the truth about it: every removal, by forward passes of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from muroan.attacks.base import ThreatModel
from muroan.data.samples import Sample
from muroan.modalities import Audio, Image, Layout, Region, Removal, Text, WordTokenizer
from muroan.models.base import MultimodalModel


class Present:
    """What a batch of inputs still has of everything: the presence (B, E) of all elements, as 0 and 1."""

    def __init__(self, model: Blocks, elements: Tensor):
        self.model, self.elements = model, elements

    def share(self, *regions: Region) -> Tensor:
        """(B, R) of each region, the share of its elements that is left."""
        return self.elements @ self.model.members(regions)

    def gone(self, *regions: Region) -> Tensor:
        """(B,) bool, whether nothing of these regions is left."""
        return (self.share(*regions) == 0).all(1)


class Blocks(MultimodalModel):
    """Logits that a rule makes of what is present.

    Args:
        rule: gives the logits (B, C) for a `Present`; with a fusion, for the embedding.
        image: its (height, width); audio: its length; words: how many; 0 or None leaves a modality out.
        fusion: gives the embedding (B, D) for a `Present`; without it, the embedding is the presence of all elements.
    """

    def __init__(
        self,
        rule: Callable[[Any], Tensor],
        image: tuple[int, int] | None = (32, 32),
        audio: int = 0,
        words: int = 6,
        classes: int = 2,
        fusion: Callable[[Present], Tensor] | None = None,
    ):
        modalities = {}
        if image:
            modalities["image"] = Image(image, mean=(0.5,), std=(0.5,))
        if audio:
            modalities["audio"] = Audio(audio, rate=100)
        if words:
            modalities["text"] = Text(WordTokenizer([f"w{i}" for i in range(words)]), words + 2)
        super().__init__(modalities, classes)
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))  # the engine computes in its type
        self.rule, self.fusion = rule, fusion
        self.grids = {"image": image, "audio": (audio,), "text": (words,)}
        self.grids = {name: self.grids[name] for name in modalities}
        self.eval()

    def sample(self, id: str = "s0", index: int = 0, label: int = 0) -> Sample:
        """Everything present: a white image, a loud sound, all words."""
        raw = {
            "image": lambda: np.full(self.grids["image"], 255, np.uint8),
            "audio": lambda: np.ones(self.grids["audio"], np.float32),
            "text": lambda: " ".join(f"w{i}" for i in range(*self.grids["text"])),
        }
        inputs: dict[str, Tensor] = {}
        layouts: dict[str, Layout] = {}
        for name, modality in self.modalities.items():
            inputs[name], layouts[name] = modality.prepare(raw[name]())
        return Sample(id, index, inputs, layouts, label)

    def encode(self, modality, x):
        if modality == "text":
            return torch.stack([(x == 5 + i).any(1) for i in range(*self.grids["text"])], 1).double()
        return (x.flatten(1) != 0).double()

    def fuse(self, features):
        present = torch.cat([features[name] for name in self.modalities], 1)
        return present if self.fusion is None else self.fusion(Present(self, present))

    def head(self, embedding):
        return self.rule(Present(self, embedding) if self.fusion is None else embedding)

    def members(self, regions: Sequence[Region]) -> Tensor:
        """(E, R), one column a region: 1 / its size at each of its elements."""
        columns = []
        for region in regions:
            whole = {name: np.zeros(grid) for name, grid in self.grids.items()}
            box = tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))
            whole[region.modality][box] = 1 / region.area
            columns.append(np.concatenate([part.ravel() for part in whole.values()]))
        return torch.from_numpy(np.stack(columns, 1))


def block(side: int, y: int, x: int) -> Region:
    """The square of that side in row y, column x of the image."""
    return Region("image", (side * y, side * x), (side * y + side, side * x + side))


def stretch(length: int, i: int) -> Region:
    return Region("audio", (length * i,), (length * i + length,))


def word(i: int) -> Region:
    return Region("text", (i,), (i + 1,))


def leaves(model: Blocks, min_side: dict[str, int]) -> list[Region]:
    """The finest regions, from the description: halved until the longest side is `min_side` or less."""

    def below(region: Region) -> list[Region]:
        if region.longest_side <= min_side.get(region.modality, 1):
            return [region]
        return [leaf for half in region.halves() for leaf in below(half)]

    return [leaf for name, grid in model.grids.items() for leaf in below(Region(name, (0,) * len(grid), grid))]


def logits(model: Blocks, removals: Sequence[Removal]) -> tuple[Tensor, Tensor]:
    """(B, D) embeddings and (B, C) logits after removals, from raw tensors that are changed here."""
    sample = model.sample()
    rows: dict[str, list[Tensor]] = {name: [] for name in model.modalities}
    for removal in removals:
        inputs = {name: x.clone() for name, x in sample.inputs.items()}
        words = set()
        for region in removal.regions:
            if region.modality == "text":
                words |= set(range(region.start[0], region.stop[0]))
            else:
                box = tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))
                inputs[region.modality][(..., *box)] = 0
        if "text" in inputs:  # one token a word, after [CLS]; what is left moves up
            kept = [t for i, t in enumerate(inputs["text"].tolist()) if i - 1 not in words]
            inputs["text"] = torch.tensor(kept + [0] * len(words))
        for name, x in inputs.items():
            rows[name].append(x)
    with torch.no_grad():
        embedding, out = model({name: torch.stack(xs) for name, xs in rows.items()})
    return embedding, out


def flips_when(condition: Callable[[Present], Tensor], **options: Any) -> Blocks:
    """A toy whose margin is flat: 0.5, and -0.5 where the condition (B,) holds."""

    def rule(present: Present) -> Tensor:
        flip = condition(present).double()
        return torch.stack([1 - flip, torch.full_like(flip, 0.5)], 1)

    return Blocks(rule, **options)


def margins(margin: Callable[[Present], Tensor], **options: Any) -> Blocks:
    """A toy of two classes from its margin (B,)."""

    def rule(present: Present) -> Tensor:
        m = margin(present)
        return torch.stack([m, torch.zeros_like(m)], 1)

    return Blocks(rule, **options)


def subsets(regions: Sequence[Region]) -> list[Removal]:
    """All sets of regions, the empty one first."""
    return [Removal(c) for n in range(len(regions) + 1) for c in itertools.combinations(regions, n)]


def threat(queries: int | None = 500, **min_side: int) -> ThreatModel:
    return ThreatModel(min_side=min_side, max_queries=queries)
