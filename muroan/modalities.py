"""What an input is made of, and what removing a part of it means.

A modality knows its *elements* (pixels, words, audio samples), the *regions* that they form (a 2^n-tree:
halves of a sound, quadrants of an image; single words of a text) and how to *occlude* a whole batch of
region sets at once on the device.

Prepared inputs have a static shape per modality, so that a batch is one tensor; a `Layout` says where the
elements of one particular input lie in it (a text has its own number of words, a sound its own length).
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from torch import Tensor

from muroan.errors import MuroanError
from muroan.files import read_audio, read_image

# ---------------------------------------------------------------------------------------------------------
# Regions and removals: plain, hashable, free of tensors


class Region(NamedTuple):
    """A box of elements: `start` inclusive, `stop` exclusive, one number an axis of the element grid."""

    modality: str
    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def area(self) -> int:
        """Number of elements."""
        return math.prod(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def longest_side(self) -> int:
        return max(b - a for a, b in zip(self.start, self.stop, strict=True))

    def halves(self) -> list[Region]:
        """The 2^n children: every axis is cut at its upper half; an axis of length 1 is not cut.

        The first axis varies fastest, so that the quadrants of an image (axes y, x) come in the order
        top-left, bottom-left, top-right, bottom-right. The children tile the region.
        """
        children: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
        for a, b in zip(self.start, self.stop, strict=True):
            middle = a + (b - a + 1) // 2
            cuts = [(a, middle), (middle, b)] if middle < b else [(a, b)]
            # The new axis is the slower one: it goes into the outer loop.
            children = [((*start, lo), (*stop, hi)) for lo, hi in cuts for start, stop in children]
        return [Region(self.modality, start, stop) for start, stop in children]


@dataclass(frozen=True, slots=True)
class Removal:
    """A set of regions across modalities, taken away together. Its parts keep the order they were named in."""

    regions: tuple[Region, ...] = ()

    def __reduce__(self) -> tuple[type[Removal], tuple[tuple[Region, ...]]]:
        return Removal, (self.regions,)  # what a dataclass with slots does of itself takes several times as long

    @classmethod
    def of(cls, *regions: Region) -> Removal:
        return cls(tuple(dict.fromkeys(regions)))

    def __or__(self, other: Removal) -> Removal:
        return Removal.of(*self.regions, *other.regions)

    def without(self, region: Region) -> Removal:
        return Removal(tuple(r for r in self.regions if r != region))

    def only(self, *modalities: str) -> Removal:
        """The part of the removal that lies in the given modalities."""
        return Removal(tuple(r for r in self.regions if r.modality in modalities))

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(sorted({r.modality for r in self.regions}))


# A set of elements as the bits of one Python integer: a union is `|`, a count is `bit_count`, and two removals
# that take away the same elements are equal however their regions are spelled.
ElementSet = int


@lru_cache(maxsize=8192)  # an image of 384 x 384 pixels has 5,461 regions
def elements(region: Region, grid: tuple[int, ...]) -> ElementSet:
    """The elements of a region as a bit set over the row-major element grid.

    Raises:
        MuroanError: the region does not lie inside the grid.
    """
    sides = list(zip(region.start, region.stop, grid, strict=False))
    if len(region.start) != len(grid) or not all(0 <= a < b <= n for a, b, n in sides):
        raise MuroanError(
            f"a region of {region.modality!r} must lie inside its element grid {grid}, "
            f"got start {region.start}, stop {region.stop}"
        )
    (a, b, stride), *outer = reversed(sides)
    bits = ((1 << (b - a)) - 1) << a
    for a, b, n in outer:
        # Repeat the pattern of the inner axes b-a times, `stride` bits apart, twice as often at each step.
        repeated, times = bits, 1
        while times < b - a:
            more = min(times, b - a - times)
            repeated |= repeated << (more * stride)
            times += more
        bits = repeated << (a * stride)
        stride *= n
    return bits


def removed_elements(removal: Removal, layouts: Mapping[str, Layout]) -> dict[str, ElementSet]:
    """The removed elements of each modality that the removal touches. Overlaps count once."""
    removed: dict[str, ElementSet] = {}
    for region in removal.regions:
        if region.modality not in layouts:
            raise MuroanError(f"the removal names modality {region.modality!r}, but the sample has {sorted(layouts)}")
        bits = elements(region, layouts[region.modality].grid)
        removed[region.modality] = removed.get(region.modality, 0) | bits
    return removed


def element_mask(removed: ElementSet, grid: tuple[int, ...]) -> np.ndarray:
    """A bit set as a mask over its row-major element grid.

    Returns:
        (*grid) bool, True where the element is in the set.

    >>> element_mask(0b100011, (2, 3)).astype(int)
    array([[1, 1, 0],
           [0, 0, 1]])
    """
    count = math.prod(grid)
    packed = np.frombuffer(removed.to_bytes(-(-count // 8), "little"), np.uint8)
    return np.unpackbits(packed, count=count, bitorder="little").astype(bool).reshape(grid)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the elements of one input lie in its tensor.

    Attributes:
        grid: shape of the element grid, (H, W) for an image, (words,) for a text, (samples,) for a sound.
        spans: for a text, the token positions [start, stop) of every word.
        words: for a text, the words themselves.
    """

    grid: tuple[int, ...]
    spans: tuple[tuple[int, int], ...] = ()
    words: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.grid)


# ---------------------------------------------------------------------------------------------------------
# Occlusion primitives: pure functions on batches

WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # whole numbers of so many bytes
FEW_BOXES = 8  # a row, which it takes a CPU less time to write one by one than to look at every position


def box_mask(boxes: Tensor, shape: Sequence[int]) -> Tensor:
    """The union of each row's boxes as a mask.

    Args:
        boxes: (B, R, 2n) integers, n starts then n stops; an empty box (start >= stop) covers nothing.
        shape: the n sides of the grid.

    Returns:
        (B, *shape) bool, True where any box covers the position.
    """
    n = len(shape)
    if n == 1:  # where more boxes have begun than ended; a mask for each box of a long sound would not fit in memory
        start, stop = boxes.clamp(0, shape[0]).unbind(-1)
        real = (start < stop).int()
        steps = torch.zeros((len(boxes), shape[0] + 1), dtype=torch.int32, device=boxes.device)
        steps.scatter_add_(1, start, real).scatter_add_(1, stop, -real)
        return steps[:, :-1].cumsum(1, dtype=torch.int32) > 0
    inside = []
    for axis, size in enumerate(shape):
        position = torch.arange(size, device=boxes.device)
        start, stop = boxes[..., axis, None], boxes[..., n + axis, None]
        inside.append((position >= start) & (position < stop))  # (B, R, size)
    # A union over R of outer products is a matrix product over R, compared with zero.
    rest = inside[1]
    for side in inside[2:]:
        rest = (rest[..., :, None] & side[..., None, :]).flatten(2)
    covered = torch.bmm(inside[0].float().transpose(1, 2), rest.float()) > 0
    return covered.reshape(-1, *shape)


def blanked(x: Tensor, mask: Tensor) -> Tensor:
    """Zero where a mask is true, and every bit as it was elsewhere: `masked_fill`, on a CPU in less than half the time.

    Args:
        x: floating point; mask: bool, of a shape that broadcasts to that of x.
    """
    whole = WHOLE.get(x.element_size())
    if whole is None or x.device.type != "cpu" or x.requires_grad:
        return x.masked_fill(mask, 0)
    return (x.view(whole) & (mask.to(whole) - 1)).view(x.dtype)  # of a number, all bits are kept by -1, and none by 0


def replace_boxes(x: Tensor, boxes: Tensor, values: Tensor | int) -> Tensor:
    """Other values in the boxes of each row, and every bit as it was elsewhere.

    Args:
        x: (B, ..., *grid); boxes: (B, R, 2n), see `box_mask`; values: like x, or one number for all.
    """
    axes, whole = boxes.shape[-1] // 2, WHOLE.get(x.element_size())
    boxes = boxes.clamp(min=0)
    real = (boxes[..., :axes] < boxes[..., axes:]).all(-1) if x.device.type == "cpu" else None
    if real is None or whole is None or x.requires_grad or real.sum() > FEW_BOXES * len(x):
        mask = box_mask(boxes, x.shape[-axes:])
        mask = mask.reshape(len(x), *(1 for _ in x.shape[1:-axes]), *x.shape[-axes:])
        if isinstance(values, Tensor):
            return torch.where(mask, values.to(x.dtype), x)
        return x.masked_fill(mask, values) if values else blanked(x, mask)
    x = x.clone()
    into = x.view(whole).numpy()  # which knows the bits of every type of number
    source = torch.as_tensor(values, dtype=x.dtype).view(whole).expand_as(x).numpy()
    for row, box in zip(real.nonzero()[:, 0].tolist(), boxes[real].tolist(), strict=True):
        place = (row, ..., *map(slice, box[:axes], box[axes:]))
        into[place] = source[place]
    return x


def delete_positions(x: Tensor, mask: Tensor, fill: float | int) -> Tensor:
    """Cut masked positions out of sequences: the rest moves left, the end is filled.

    Args:
        x: (B, T); mask: (B, T) bool, True where a position goes.
    """
    order = torch.argsort(mask.to(torch.int8), dim=1, stable=True)
    kept = (~mask).sum(1, keepdim=True)
    position = torch.arange(x.shape[1], device=x.device)
    return torch.where(position < kept, x.gather(1, order), torch.full_like(x, fill))


def gaussian_blur(x: Tensor, sigma: float, axes: int) -> Tensor:
    """Separable Gaussian blur of the last `axes` axes of x (B, C, ...), kernel cut at 3 sigma, edges replicated."""
    radius = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    for axis in range(-axes, 0):
        moved = x.movedim(axis, -1)
        rows = F.pad(moved.reshape(-1, 1, moved.shape[-1]), (radius, radius), mode="replicate")
        x = F.conv1d(rows, kernel[None, None]).reshape(moved.shape).movedim(-1, axis)
    return x


def stable_seed(*parts: object) -> int:
    """A 63-bit seed that depends on the parts alone: the same in every process and run."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# ---------------------------------------------------------------------------------------------------------
# The modalities


class Modality(ABC):
    """How one kind of input is prepared, cut into regions and occluded.

    Attributes:
        shape: shape of one prepared input tensor.
        replacements: what can stand in for removed elements; the first is the default.
        min_side: regions whose longest side is no larger are not split further, unless a threat model says else.
    """

    replacements: ClassVar[tuple[str, ...]]
    shape: tuple[int, ...]
    min_side: int

    def read(self, path: Path) -> Any:
        """The raw input that a file holds.

        Raises:
            MuroanError: the file is missing or cannot be decoded, or no such input is read from files, as here in the
                base.
        """
        raise MuroanError(f"{type(self).__name__} takes its input itself, not the file {path} that it is in")

    @abstractmethod
    def prepare(self, raw: Any) -> tuple[Tensor, Layout]:
        """A raw input as the tensor that models take, and where its elements lie."""

    @abstractmethod
    def occlude(self, x: Tensor, boxes: Tensor, replacement: str, baseline: Tensor | None) -> Tensor:
        """Replace the boxes of each row.

        Args:
            x: (B, *shape) prepared inputs.
            boxes: (B, R, 2n) position boxes as `box` gives them, padded with zeros.
            replacement: one of `replacements`.
            baseline: (B, *shape), what `baseline` gave for each row, or None where it gave None.

        Returns:
            (B, *shape); positions outside the boxes keep their bits.
        """

    @abstractmethod
    def display(self, x: Tensor, layout: Layout) -> dict[str, Any]:
        """What a report needs to draw the input, as plain JSON."""

    def root(self, name: str, layout: Layout) -> Region:
        """The region of all elements; `name` is the modality's name in the model."""
        return Region(name, (0,) * len(layout.grid), layout.grid)

    def split(self, region: Region) -> list[Region]:
        """The children of a region, which tile it; empty when it is a single element."""
        return region.halves() if region.area > 1 else []

    def box(self, region: Region, layout: Layout) -> tuple[int, ...]:
        """The region in positions of the input tensor: starts, then stops."""
        return (*region.start, *region.stop)

    def boxes(self, regions: Sequence[Sequence[Region]], layouts: Sequence[Layout]) -> Tensor:
        """The regions (B lists) of inputs of these layouts, as `occlude` takes them: (B, R, 2n), R may be 0."""
        found = [[self.box(r, layout) for r in row] for row, layout in zip(regions, layouts, strict=True)]
        counts = np.array([len(row) for row in found])
        width = max((len(box) for row in found for box in row), default=0)
        boxes = np.zeros((len(found), counts.max(), width), np.int64)
        sides = np.fromiter(itertools.chain.from_iterable(itertools.chain.from_iterable(found)), np.int64)
        boxes[np.arange(counts.max()) < counts[:, None]] = sides.reshape(counts.sum(), width)
        return torch.from_numpy(boxes)

    def baseline(self, x: Tensor, layout: Layout, replacement: str, seed: int) -> Tensor | None:
        """The values that occlusion puts in place of removed ones, or None where it needs none.

        Args:
            x: (*shape), one input; seed: its own, so that noise is the same each time that the sample is asked.

        Returns:
            (*shape), the same for every removal.
        """
        return None

    def span(self) -> tuple[Tensor, Tensor]:
        """The lowest and highest value of a prepared input, one a channel (or one), for attacks that choose values.

        Raises:
            MuroanError: this kind of input has none, as in the base.
        """
        raise MuroanError(
            f"{type(self).__name__} has no range of values that an attack could choose from: choose a removal attack, "
            f"or give the class a method span() that returns the lowest and the highest"
        )

    def check_min_side(self, name: str, min_side: int) -> None:
        """Raises MuroanError where regions of that size could not be made of any input."""
        longest = max(self.shape[-2:])
        if min_side > longest:
            raise MuroanError(
                f"threat_model.min_side.{name}={min_side} is larger than the whole {name} ({longest}): "
                f"choose {longest} to leave it whole, less to split it"
            )

    def check_replacement(self, name: str, replacement: str) -> None:
        if replacement not in self.replacements:
            raise MuroanError(
                f"{name} ({type(self).__name__}) can be replaced by {', '.join(self.replacements)}, "
                f"got {replacement!r}: set threat_model.replacement.{name} to one of these"
            )


def _value_baseline(x: Tensor, replacement: str, seed: int, sigma: float) -> Tensor | None:
    """Baseline of a continuous input (C, ...); the statistics are its own, per channel."""
    dims = tuple(range(1, x.ndim))
    if replacement == "mean":
        return x.mean(dims, keepdim=True).expand_as(x)
    if replacement == "blur":
        return gaussian_blur(x[None], sigma, x.ndim - 1)[0]
    if replacement == "noise":
        # Drawn on the CPU, so that a GPU run removes the same values.
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
        return x.mean(dims, keepdim=True) + noise * x.std(dims, correction=0, keepdim=True)
    return None  # zero and delete need no values


class Image(Modality):
    """Pixels, (C, H, W), normalised by channel mean and standard deviation. An element is a pixel, all channels."""

    replacements = ("zero", "mean", "blur", "noise")

    def __init__(
        self,
        size: tuple[int, int],
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ):
        """
        Args:
            size: (height, width) that images are resized to.
            mean, std: one a channel, in units of the 0 to 1 range; one channel means greyscale.
        """
        height, width = size
        self.size = (int(height), int(width))
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise MuroanError(f"an image has 1 or 3 channels with a mean and a std each, got mean {mean}, std {std}")
        self.shape = (len(self.mean), *self.size)
        self.min_side = 10  # as in the released decoupling attack

    def read(self, path: Path) -> PILImage.Image:
        return read_image(path)

    def prepare(self, raw: Any) -> tuple[Tensor, Layout]:
        """
        Args:
            raw: a PIL image, or an array (H, W) or (H, W, C) of bytes.
        """
        if isinstance(raw, np.ndarray):
            pixels = raw[..., 0] if raw.ndim == 3 and raw.shape[2] == 1 else raw
            if raw.dtype != np.uint8 or raw.size == 0 or not (pixels.ndim == 2 or pixels.shape[2:] in ((3,), (4,))):
                raise MuroanError(
                    f"an image must be a PIL image or an array of bytes (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), "
                    f"got an array of {raw.dtype} of shape {raw.shape}"
                )
            raw = PILImage.fromarray(pixels)
        if not isinstance(raw, PILImage.Image):
            raise MuroanError(f"an image must be a PIL image or an array of bytes, got {type(raw).__name__}")
        picture = raw.convert("RGB" if len(self.mean) == 3 else "L")
        if picture.size != self.size[::-1]:
            picture = picture.resize(self.size[::-1], PILImage.Resampling.BICUBIC)
        values = np.asarray(picture, dtype=np.float32).reshape(*self.size, len(self.mean)) / 255
        values = (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return torch.from_numpy(values.transpose(2, 0, 1).copy()), Layout(self.size)

    def baseline(self, x: Tensor, layout: Layout, replacement: str, seed: int) -> Tensor | None:
        # Sigma is a sixteenth of the longer side: 14 pixels of 224, in the range that Fong and Vedaldi use.
        return _value_baseline(x, replacement, seed, sigma=max(self.size) / 16)

    def occlude(self, x: Tensor, boxes: Tensor, replacement: str, baseline: Tensor | None) -> Tensor:
        return replace_boxes(x, boxes, 0 if baseline is None else baseline)

    def span(self) -> tuple[Tensor, Tensor]:
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (0 - mean) / std, (1 - mean) / std

    def display(self, x: Tensor, layout: Layout) -> dict[str, Any]:
        scale = torch.tensor(self.std)[:, None, None], torch.tensor(self.mean)[:, None, None]
        pixels = (x.detach().float().cpu() * scale[0] + scale[1]).clamp(0, 1).mul(255).round().byte()
        array = pixels.permute(1, 2, 0).numpy()
        buffer = io.BytesIO()
        PILImage.fromarray(array if array.shape[2] == 3 else array[..., 0]).save(buffer, "PNG")
        return {"kind": "image", "grid": list(layout.grid), "png": base64.b64encode(buffer.getvalue()).decode()}


class Audio(Modality):
    """A mono waveform (L,), padded with silence or cut at the end. Elements are the samples it really has."""

    replacements = ("zero", "mean", "blur", "noise", "delete")

    def __init__(self, length: int, rate: int):
        """
        Args:
            length: samples that the model takes.
            rate: samples a second.
        """
        self.length, self.rate = int(length), int(rate)
        self.shape = (self.length,)
        self.min_side = max(1, self.rate // 100)  # 10 milliseconds

    def read(self, path: Path) -> np.ndarray:
        return read_audio(path, self.rate)

    def prepare(self, raw: Any) -> tuple[Tensor, Layout]:
        """
        Args:
            raw: (samples,) floats in -1 to 1, at `rate`.
        """
        try:
            wave = np.asarray(raw, dtype=np.float32)
        except (TypeError, ValueError):
            raise MuroanError(f"a sound must be a row of numbers, got {type(raw).__name__}") from None
        if wave.ndim != 1 or wave.size == 0 or not np.isfinite(wave).all():
            raise MuroanError(f"a sound must be a non-empty row of finite numbers, got shape {wave.shape}")
        wave = wave[: self.length]
        padded = np.zeros(self.length, np.float32)
        padded[: len(wave)] = wave
        return torch.from_numpy(padded), Layout((len(wave),))

    def baseline(self, x: Tensor, layout: Layout, replacement: str, seed: int) -> Tensor | None:
        # Sigma is a millisecond: a low-pass at some 160 Hz, which loses the speech. Padding has no say in the values.
        sound = x[None, : layout.count]
        values = _value_baseline(sound, replacement, seed, sigma=self.rate / 1000)
        return None if values is None else F.pad(values[0], (0, self.length - layout.count))

    def occlude(self, x: Tensor, boxes: Tensor, replacement: str, baseline: Tensor | None) -> Tensor:
        if replacement == "delete":
            return delete_positions(x, box_mask(boxes, self.shape), 0.0)
        return replace_boxes(x, boxes, 0 if baseline is None else baseline)

    def span(self) -> tuple[Tensor, Tensor]:
        return torch.tensor([-1.0]), torch.tensor([1.0])

    def display(self, x: Tensor, layout: Layout) -> dict[str, Any]:
        wave = x.detach().float().cpu().numpy()[: layout.grid[0]]
        edges = np.linspace(0, len(wave), min(300, len(wave)) + 1).astype(int)
        pairs = itertools.pairwise(edges)
        peaks = [[round(float(wave[a:b].min()), 3), round(float(wave[a:b].max()), 3)] for a, b in pairs]
        return {"kind": "audio", "grid": list(layout.grid), "rate": self.rate, "peaks": peaks}


class Tokenizer(Protocol):
    """What `Text` needs of a tokenizer: every whitespace word becomes tokens of its own.

    `prefix` and `suffix` are the special tokens around a text ([CLS], [SEP], …); they are no elements.
    """

    prefix: list[int]
    suffix: list[int]
    pad_id: int
    mask_id: int | None
    size: int

    def words_to_ids(self, words: Sequence[str]) -> list[list[int]]: ...


class Text(Modality):
    """Token ids (T,), padded. An element is a whitespace word, which may span several tokens."""

    replacements = ("delete", "mask")

    def __init__(self, tokenizer: Tokenizer, max_length: int, truncate: bool = False):
        """
        Args:
            max_length: tokens that the model takes, special ones included.
            truncate: leave out the last words of a longer text instead of refusing it.
        """
        self.tokenizer, self.max_length, self.truncate = tokenizer, int(max_length), truncate
        self.shape = (self.max_length,)
        self.min_side = 1

    def prepare(self, raw: Any) -> tuple[Tensor, Layout]:
        """
        Args:
            raw: a string.
        """
        if not isinstance(raw, str):
            raise MuroanError(f"a text must be a string, got {type(raw).__name__}")
        words = raw.split()
        if not words:
            raise MuroanError(f"a text needs at least one word, got {raw!r}")
        ids, spans = list(self.tokenizer.prefix), []
        room = self.max_length - len(self.tokenizer.suffix)
        pieces = self.tokenizer.words_to_ids(words)
        total = len(ids) + sum(map(len, pieces)) + len(self.tokenizer.suffix)
        if total > self.max_length and not self.truncate:
            raise MuroanError(
                f"a text of {len(words)} words is {total} tokens with the special ones, the model takes "
                f"{self.max_length}: set truncate=true to leave out its end, or raise max_length (of the dataset for "
                f"models from scratch, of the model where it has its own tokenizer); it begins {raw[:60]!r}"
            )
        for piece in pieces:
            if len(ids) + len(piece) > room:
                break
            spans.append((len(ids), len(ids) + len(piece)))
            ids += piece
        if not spans:
            raise MuroanError(f"not even the first word of {raw[:60]!r} fits into {self.max_length} tokens")
        ids += self.tokenizer.suffix
        ids += [self.tokenizer.pad_id] * (self.max_length - len(ids))
        return torch.tensor(ids), Layout((len(spans),), tuple(spans), tuple(words[: len(spans)]))

    def split(self, region: Region) -> list[Region]:
        """The single words: a text has no tree."""
        (start,), (stop,) = region.start, region.stop
        return [Region(region.modality, (i,), (i + 1,)) for i in range(start, stop)] if stop - start > 1 else []

    def box(self, region: Region, layout: Layout) -> tuple[int, ...]:
        return layout.spans[region.start[0]][0], layout.spans[region.stop[0] - 1][1]

    def occlude(self, x: Tensor, boxes: Tensor, replacement: str, baseline: Tensor | None) -> Tensor:
        if replacement == "delete":
            return delete_positions(x, box_mask(boxes, self.shape), self.tokenizer.pad_id)
        assert self.tokenizer.mask_id is not None
        return replace_boxes(x, boxes, self.tokenizer.mask_id)

    def check_replacement(self, name: str, replacement: str) -> None:
        super().check_replacement(name, replacement)
        if replacement == "mask" and self.tokenizer.mask_id is None:
            raise MuroanError(f"{name} cannot be replaced by 'mask': this tokenizer has no mask token; use 'delete'")

    def display(self, x: Tensor, layout: Layout) -> dict[str, Any]:
        return {"kind": "text", "grid": list(layout.grid), "words": list(layout.words)}


def word_edits(before: Sequence[str], after: Sequence[str]) -> list[tuple[str | None, str | None]]:
    """The fewest edits that make one text another, word by word (Levenshtein 1966; Wagner and Fischer 1974).

    Of several ways, one with kept words as late as they can be.

    Returns:
        (old, new) word, in order: the same word twice where it is kept, None for the old one where a word is inserted,
        and for the new one where it is deleted. Pairs that differ are the edits.

    >>> word_edits(["is", "it", "red"], ["is", "not", "it", "blue"])
    [('is', 'is'), (None, 'not'), ('it', 'it'), ('red', 'blue')]
    """
    n, m = len(before), len(after)
    cost = np.add.outer(np.arange(n + 1), np.arange(m + 1))  # of the first i words becoming the first j
    for i, j in itertools.product(range(1, n + 1), range(1, m + 1)):
        replaced = cost[i - 1, j - 1] + (before[i - 1] != after[j - 1])
        cost[i, j] = min(replaced, cost[i - 1, j] + 1, cost[i, j - 1] + 1)
    pairs: list[tuple[str | None, str | None]] = []
    i, j = n, m
    while i or j:
        if i and j and cost[i, j] == cost[i - 1, j - 1] + (before[i - 1] != after[j - 1]):
            i, j = i - 1, j - 1
            pairs.append((before[i], after[j]))
        elif i and cost[i, j] == cost[i - 1, j] + 1:
            i -= 1
            pairs.append((before[i], None))
        else:
            j -= 1
            pairs.append((None, after[j]))
    return pairs[::-1]


class WordTokenizer:
    """A vocabulary of lower-case words and punctuation marks, for models trained from scratch."""

    SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

    def __init__(self, vocabulary: Sequence[str]):
        """
        Args:
            vocabulary: the tokens, without the special ones.
        """
        self.vocabulary = list(vocabulary)
        self._ids = {token: i for i, token in enumerate((*self.SPECIAL, *self.vocabulary))}
        self.pad_id, self.unk_id = 0, 1
        self.mask_id: int | None = 4
        self.prefix, self.suffix = [2], [3]
        self.size = len(self._ids)

    @staticmethod
    def tokens(word: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", word.lower())

    @classmethod
    def from_texts(cls, texts: Iterable[str], most: int = 30000) -> WordTokenizer:
        """The vocabulary of a training set: its `most` frequent tokens, ties in alphabetical order."""
        counts: dict[str, int] = {}
        for text in texts:
            for token in cls.tokens(text):
                counts[token] = counts.get(token, 0) + 1
        return cls(sorted(sorted(counts), key=lambda token: -counts[token])[:most])

    def words_to_ids(self, words: Sequence[str]) -> list[list[int]]:
        return [[self._ids.get(t, self.unk_id) for t in self.tokens(w)] or [self.unk_id] for w in words]
