"""One pixel: differential evolution over where it lies and what it becomes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from muroan.attacks.base import BatchAttack, Perturbation, Target
from muroan.attacks.canvas import Canvas, Paint
from muroan.attacks.greedy import ROUNDING
from muroan.errors import MuroanError, check_whole
from muroan.modalities import Image
from muroan.models.base import Prediction


class OnePixel(BatchAttack):
    """One pixel attack (Su, Vargas and Sakurai 2019, arXiv 1710.08864), untargeted.

    Differential evolution as in the paper: places drawn uniformly and values from N(128, 127) of 255, children
    `a + 0.5 (b - c)` of three parents at random without crossover, each of which replaces the candidate of its number
    if it makes the label less likely, by its log-odds. The first generation in which a candidate flips the label ends
    it. What leaves the range, of which the paper says nothing, is put at its edge.

    The evolution is our own, over a batch, as that of scipy handles one sample at a time.

    Args:
        pixels: how many may change; 1, 3 and 5 in the paper.
        queries: asked at most about a sample, where `max_queries` does not allow fewer. The paper takes 40,000, 100
            generations of 400; 500 is our choice.
        population: of a generation; without it, four candidates to each generation, as in the paper.
        modality: an image without it; of a sound, single samples change.
    """

    FACTOR = 0.5

    def __init__(self, pixels: int = 1, queries: int = 500, population: int | None = None, modality: str | None = None):
        check_whole("attack", pixels=pixels, queries=queries)
        if population is not None:
            check_whole("attack", 3, population=population)  # the parents of a child
        self.pixels, self.queries, self.population, self.modality = pixels, queries, population, modality

    def perturb(self, target: Target) -> Sequence[Perturbation | None]:
        """
        Raises:
            MuroanError: the model has no image, or several.
        """
        canvas = Canvas(target, [self._name(target)])
        limits = [target.granted(row, self.queries) for row in range(len(target))]
        rngs = [sample.rng for sample in target.samples]
        found: list[Paint | None] = [None] * len(target)
        alive = [row for row in range(len(target)) if limits[row] >= 1]
        people = {row: self._first(canvas, row, limits[row]) for row in alive}
        fitness = {row: np.full(len(people[row]), np.inf) for row in alive}
        asked = dict.fromkeys(alive, 0)
        while alive:
            # The first generation is asked as it is.
            children = {row: self._children(rngs[row], people[row]) if asked[row] else people[row] for row in alive}
            children = {row: some[: limits[row] - asked[row]] for row, some in children.items()}
            pairs = [(row, child) for row in alive for child in children[row]]
            paints = [self._paint(canvas, row, child) for row, child in pairs]
            prediction = canvas.ask([row for row, _ in pairs], paints)
            rows = target.labels.new_tensor([row for row, _ in pairs])
            odds = log_odds(prediction, target.labels[rows]).cpu().numpy()
            flips = target.flipped(prediction, rows).cpu().numpy()
            start = 0
            for row in alive:
                stop = start + len(children[row])
                new, flipped = odds[start:stop], flips[start:stop]
                if flipped.any():
                    found[row] = paints[start + int(np.argmin(np.where(flipped, new, np.inf)))]
                    target.first_flip[row] = target.queries[row]  # however a generation was cut into passes
                better = np.flatnonzero(new < fitness[row][: len(new)] - ROUNDING)
                people[row][better], fitness[row][better] = children[row][better], new[better]
                asked[row] += len(new)
                start = stop
            alive = [row for row in alive if found[row] is None and asked[row] < limits[row]]
        return [None if paint is None else canvas.perturbation(row, paint) for row, paint in enumerate(found)]

    def _name(self, target: Target) -> str:
        images = [name for name, modality in target.model.modalities.items() if isinstance(modality, Image)]
        if self.modality is not None:
            return target.select([self.modality], target.continuous, "pixels, or samples of a sound")[0]
        (name, *more) = target.select(None, images, "pixels")
        if more:
            raise MuroanError(f"one_pixel changes one image, the model has {images}: name one as attack.modality")
        return name

    def _first(self, canvas: Canvas, row: int, limit: int) -> np.ndarray:
        """(P, pixels, axes + C) the first generation: places in 0 to 1 of each axis, then values."""
        rng, axes = canvas.target.samples[row].rng, len(canvas.grids[row][0])
        # Generations are a quarter of the population: P * P / 4 = limit.
        size = self.population or min(400, max(4, round(math.sqrt(4 * limit))))
        places = rng.random((size, self.pixels, axes))
        values = rng.normal(128 / 255, 127 / 255, (size, self.pixels, canvas.channels))
        return np.concatenate([places, values], 2).clip(0, 1)

    def _children(self, rng: np.random.Generator, people: np.ndarray) -> np.ndarray:
        """(P, ...) one child a candidate, of three different parents."""
        size = len(people)
        a, b, c = rng.integers(0, [size, size - 1, size - 2], (size, 3)).T
        b = b + (b >= a)
        for other in (np.minimum(a, b), np.maximum(a, b)):
            c = c + (c >= other)
        return (people[a] + self.FACTOR * (people[b] - people[c])).clip(0, 1)

    def _paint(self, canvas: Canvas, row: int, genes: np.ndarray) -> Paint:
        grid = np.array(canvas.grids[row][0])
        places = np.minimum((genes[:, : len(grid)] * grid).astype(int), grid - 1)
        elements = np.ravel_multi_index(tuple(places.T), tuple(grid))
        elements, first = np.unique(elements, return_index=True)  # pixels may meet
        return Paint(elements, genes[first, len(grid) :])


def log_odds(prediction: Prediction, labels: Tensor) -> Tensor:
    """(n,) log p - log(1 - p) of the label: in the order of p, but never flat where the softmax saturates."""
    logits = prediction.logits.double()
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return logits.gather(1, labels[:, None])[:, 0] - others.logsumexp(1)
