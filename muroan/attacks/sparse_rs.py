"""Sparse-RS: random search for a few elements and their values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from muroan.attacks.base import BatchAttack, Perturbation, Target
from muroan.attacks.canvas import Canvas, Paint
from muroan.errors import MuroanError, check_number, check_whole

ROUNDING = 1e-6  # a margin must fall by more than what the arithmetic of another batch size may make of it


class SparseRS(BatchAttack):
    """Sparse-RS (Croce et al. 2022, arXiv 2006.12834), untargeted, on the margin.

    A candidate gives `k` elements the lowest or highest value in each channel; a changed candidate is kept if the
    margin is lower. `alpha`, the share that is changed at once, falls stepwise over the iterations, the released
    code's schedule rescaled to the queries at hand. Elements are pixels, or samples of a sound.

    Args:
        mode: `pixels`, single elements anywhere; `patch`, a square (a stretch of a sound) of at most `k` elements,
            which is moved and recoloured in turn, in one modality.
        k: elements that may change. The paper takes 150 pixels of 224x224, and 400 for a patch; 24 is our choice for
            smaller pictures.
        queries: asked at most about a sample, where `max_queries` does not allow fewer. The paper takes 10,000; 500 is
            our choice.
        alpha_init: 0.3 for pixels and 0.4 for a patch without it, as in the released code.
        shrink: after a success, half of it at random is the next start, until the queries are spent; the smallest
            success is returned. It is our addition, to compare sizes; the paper stops at the first.
        modalities: all that have values without it.
    """

    name = "sparse_rs"

    def __init__(
        self,
        mode: Literal["pixels", "patch"] = "pixels",
        k: int = 24,
        queries: int = 500,
        alpha_init: float | None = None,
        shrink: bool = False,
        modalities: Sequence[str] | None = None,
    ):
        if mode not in ("pixels", "patch"):
            raise MuroanError(f"attack.mode must be pixels or patch, got {mode!r}")
        check_whole("attack", k=k, queries=queries)
        self.mode, self.k, self.queries, self.shrink, self.modalities = mode, k, queries, shrink, modalities
        self.alpha_init = (0.3 if mode == "pixels" else 0.4) if alpha_init is None else alpha_init
        check_number("attack", 0, 1, above=True, alpha_init=self.alpha_init)

    def perturb(self, target: Target) -> Sequence[Perturbation | None]:
        """
        Raises:
            MuroanError: the model has no values to change, or several modalities of which a patch could be part.
        """
        names = target.select(self.modalities, target.continuous, "values of images and sounds")
        if self.mode == "patch" and len(names) > 1:
            raise MuroanError(f"a patch lies in one modality, the model has {names}: name one in attack.modalities")
        canvas = Canvas(target, names)
        limits = [target.granted(row, self.queries) for row in range(len(target))]
        current = [self._start(canvas, row) for row in range(len(target))]
        lowest = [math.inf] * len(target)
        found: list[Paint | None] = [None] * len(target)
        alive = [row for row in range(len(target)) if limits[row] >= 1]
        for asked in range(self.queries):
            alive = [row for row in alive if asked < limits[row]]
            if not alive:
                break
            # A start is asked as it is.
            tried = {row: current[row] for row in alive if lowest[row] == math.inf}
            for row in alive:
                if row not in tried:
                    tried[row] = current[row].changed(target.samples[row].rng, self.alpha_init, asked, limits[row])
            prediction = canvas.ask(alive, [tried[row].paint for row in alive])
            rows = target.labels.new_tensor(alive)
            margins = target.margin(prediction, target.labels[rows]).tolist()
            flips = target.flipped(prediction, rows).tolist()
            ended = []
            for row, margin, flipped in zip(alive, margins, flips, strict=True):
                if flipped:
                    found[row] = tried[row].paint
                    target.note([row], [len(tried[row].paint.elements)])
                    half = tried[row].halved(target.samples[row].rng) if self.shrink else None
                    if half is None:
                        ended.append(row)
                    else:
                        current[row], lowest[row] = half, math.inf
                elif margin < lowest[row] - ROUNDING:
                    current[row], lowest[row] = tried[row], margin
            alive = [row for row in alive if row not in ended]
        return [None if paint is None else canvas.perturbation(row, paint) for row, paint in enumerate(found)]

    def _start(self, canvas: Canvas, row: int) -> _Pixels | _Patch:
        rng = canvas.target.samples[row].rng
        if self.mode == "pixels":
            return _Pixels.start(rng, canvas.counts[row], self.k, canvas.channels)
        return _Patch.start(rng, canvas.grids[row][0], self.k, canvas.channels)


@dataclass(frozen=True, slots=True)
class _Pixels:
    """Single elements, of `count`, and their values."""

    count: int
    paint: Paint

    # What alpha is divided by, from which iteration of 10,000 on.
    SCHEDULE = ((0, 1), (1, 2), (51, 4), (201, 5), (501, 6), (1001, 8), (2001, 10), (4001, 12), (6001, 15), (8001, 20))

    @classmethod
    def start(cls, rng: np.random.Generator, count: int, k: int, channels: int) -> _Pixels:
        elements = rng.choice(count, min(k, count), replace=False)
        return cls(count, Paint(elements, rng.integers(0, 2, (len(elements), channels))))

    def changed(self, rng: np.random.Generator, alpha_init: float, asked: int, limit: int) -> _Pixels:
        """Some elements go back to what they were, as many others come in, with new values."""
        elements, values = self.paint.elements.copy(), self.paint.values.copy()
        k = len(elements)
        out = rng.choice(k, max(1, int(alpha_init / divisor(self.SCHEDULE, asked, limit) * k)), replace=False)
        values[out] = rng.integers(0, 2, (len(out), values.shape[1]))
        swapped = out[: self.count - k]  # of the rest, where nearly all are in, only the values change
        if len(swapped):
            # The n-th element that is not in: as many more as there are elements in before it.
            n = rng.choice(self.count - k, len(swapped), replace=False)
            elements[swapped] = n + np.searchsorted(np.sort(elements) - np.arange(k), n, side="right")
        return replace(self, paint=Paint(elements, values))

    def halved(self, rng: np.random.Generator) -> _Pixels | None:
        """Half of the elements; None of a single one."""
        kept = rng.permutation(len(self.paint.elements))[: len(self.paint.elements) // 2]
        return replace(self, paint=Paint(self.paint.elements[kept], self.paint.values[kept])) if len(kept) else None


@dataclass(frozen=True, slots=True)
class _Patch:
    """A box of elements in one grid: its first element, and its values (*sides, C)."""

    grid: tuple[int, ...]
    corner: np.ndarray
    values: np.ndarray

    SCHEDULE = ((0, 1), (11, 2), (51, 4), (201, 8), (501, 16), (1001, 32), (4001, 64), (8001, 128))

    @classmethod
    def start(cls, rng: np.random.Generator, grid: tuple[int, ...], k: int, channels: int) -> _Patch:
        """Stripes along the last axis, at a random place."""
        sides = cls.sides(grid, k)
        corner = rng.integers(0, np.array(grid) - sides + 1)
        stripes = rng.integers(0, 2, (sides[-1], channels))
        return cls(grid, corner, np.broadcast_to(stripes, (*sides, channels)))

    @staticmethod
    def sides(grid: tuple[int, ...], k: int) -> np.ndarray:
        """Equal sides of a box of at most k elements, which end where the grid does."""
        return np.minimum(int(k ** (1 / len(grid)) + 1e-9), grid)

    @property
    def paint(self) -> Paint:
        axes = [np.arange(a, a + n) for a, n in zip(self.corner, self.values.shape, strict=False)]
        elements = np.ravel_multi_index(np.meshgrid(*axes, indexing="ij"), self.grid).ravel()
        return Paint(elements, self.values.reshape(len(elements), -1))

    def changed(self, rng: np.random.Generator, alpha_init: float, asked: int, limit: int) -> _Patch:
        """Every few iterations the patch moves, less and less far; else a square in it gets another value."""
        sides = np.array(self.values.shape[:-1])
        reach = (0.75 * (1 - asked / limit) * np.array(self.grid)).astype(int)
        if asked % (5 * (1 + asked // 1000)) == 0 and reach.any():
            corner = np.clip(self.corner + rng.integers(-reach, reach + 1), 0, np.array(self.grid) - sides)
            return replace(self, corner=corner)
        alpha = alpha_init / divisor(self.SCHEDULE, asked, limit)
        inner = np.maximum(1, (alpha ** (1 / len(sides)) * sides).astype(int))
        at = rng.integers(0, sides - inner + 1)
        values = self.values.copy()
        values[tuple(slice(a, a + n) for a, n in zip(at, inner, strict=True))] = rng.integers(0, 2, values.shape[-1])
        return replace(self, values=values)

    def halved(self, rng: np.random.Generator) -> _Patch | None:
        """A smaller box within, of at most half the elements; None of a single one."""
        before = self.values.shape[:-1]
        if math.prod(before) == 1:
            return None
        sides = np.minimum(before, self.sides(self.grid, math.prod(before) // 2))
        at = rng.integers(0, np.array(before) - sides + 1)
        inside = tuple(slice(int(a), int(a + n)) for a, n in zip(at, sides, strict=True))
        return replace(self, corner=self.corner + at, values=self.values[inside])


def divisor(schedule: Sequence[tuple[int, int]], asked: int, limit: int) -> int:
    """What the schedule of 10,000 iterations says after `asked` of `limit`."""
    place = int(asked / limit * 10_000)
    return next(by for start, by in reversed(schedule) if place >= start)
