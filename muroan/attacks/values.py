"""Continuous inputs as rows of numbers, for attacks that choose new values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from muroan.attacks.target import Perturbation, Target
from muroan.errors import MuroanError


class Values:
    """The chosen continuous modalities of B samples, one after another as N numbers a sample.

    What an attack moves is `delta` (n, N), the change of each value in units of its modality's range (high - low): a
    `delta` of 8/255 is 8 of the 255 grey levels of an image, whatever its normalisation, and 8/255 of the way from -1
    to 1 of a sound. Several modalities share one `delta`, and so one norm.

    Only values of real elements move: the padding of a short sound stays as it is. A value that a sample has outside
    its modality's range may stay there, but goes no further.

    All of it is at least float32, gradients too as soon as they come, whatever the model's type: steps and guards
    against a division by 0 would vanish in half precision. Only what the model is given has its type.

    Attributes:
        names: the modalities.
        scale: (N,) high - low of each value, in units of the model's input.
        low, high: (B, N) the least and largest delta; both 0 for padding.
        real: (B, N) bool, False for padding.
        real_elements: (B, E) bool, the same by element (a pixel is one element, all channels).

    Raises:
        MuroanError: a modality that the model does not have or that has no values, or there is none.
    """

    def __init__(self, target: Target, modalities: Sequence[str] | None):
        self.target = target
        self.names = target.select(modalities, target.continuous, "continuous values")
        self.shapes = [tuple(target.inputs[name].shape[1:]) for name in self.names]
        self.positions = [self._positions(name, shape) for name, shape in zip(self.names, self.shapes, strict=True)]
        self.channels = [math.prod(s) // p for s, p in zip(self.shapes, self.positions, strict=True)]
        self.sizes = [p * c for p, c in zip(self.positions, self.channels, strict=True)]

        x = self._flat(target.inputs)
        ends = {name: [end.expand_as(target.inputs[name]) for end in target.span(name)] for name in self.names}
        low, high = (self._flat({name: both[i] for name, both in ends.items()}) for i in (0, 1))
        self.scale = (high - low)[0]
        self.real_elements = torch.cat([self._real(name) for name in self.names], 1)
        self.real = self.spread(self.real_elements)
        # A sample's own values are always allowed: they may lie a rounding error (or a loud sound) outside the range.
        self._clean, self._lowest, self._highest = x, torch.minimum(low, x), torch.maximum(high, x)
        self.low = (self._lowest - x) / self.scale * self.real
        self.high = (self._highest - x) / self.scale * self.real

    def zeros(self) -> Tensor:
        """(B, N)"""
        return torch.zeros_like(self._clean)

    def inputs(self, delta: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """The changed inputs (n, *shape), a modality, of the model's type. A value whose delta is 0 keeps its bits."""
        moved = self._clean[rows] + delta * self.scale
        return self._unflat(torch.minimum(torch.maximum(moved, self._lowest[rows]), self._highest[rows]))

    def perturbation(self, delta: Tensor, row: int) -> Perturbation:
        """One sample's change, delta (N,)."""
        changed = self.inputs(delta[None], torch.tensor([row], device=delta.device))
        return Perturbation({name: x[0].detach() for name, x in changed.items()})

    def gradient(self, gradients: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """(n, N) gradients by the model's inputs as gradients by `delta`; 0 for padding."""
        return self._flat(gradients) * self.scale * self.real[rows]

    def mean_square_gradient(self, delta: Tensor) -> Tensor:
        """(n, N) the gradient, by the model's inputs, of the mean squared change of each modality in their units."""
        parts = (delta * self.scale).split(self.sizes, 1)
        return torch.cat([2 * part / size for part, size in zip(parts, self.sizes, strict=True)], 1)

    def clip(self, delta: Tensor, rows: Tensor) -> Tensor:
        """(n, N) the nearest delta that keeps the values in their range."""
        return torch.minimum(torch.maximum(delta, self.low[rows]), self.high[rows])

    def draw(self, rows: Tensor, how: Callable[[np.random.Generator, int], np.ndarray]) -> Tensor:
        """(n, N) random numbers.

        Args:
            how: takes a sample's own generator and N, returns (N,).
        """
        size = self.scale.numel()
        draws = [how(self.target.samples[row].rng, size) for row in rows.tolist()]
        return torch.as_tensor(np.stack(draws) if draws else np.zeros((0, size))).to(self._clean)

    def sparse(self, delta: Tensor, most: Tensor, rows: Tensor) -> Tensor:
        """(n, N) the nearest delta in the range that changes at most so many elements.

        An element is worth keeping for what it gains: the squared distance to 0 less that to the range.

        Args:
            most: (n,) integers.
        """
        clipped = self.clip(delta, rows)
        worth = self.by_element(delta.square() - (delta - clipped).square())
        rank = worth.argsort(dim=1, descending=True, stable=True).argsort(1)
        return clipped * self.spread(rank < most[:, None])

    def by_element(self, values: Tensor, combine: Callable[[Tensor, int], Tensor] = torch.sum) -> Tensor:
        """(n, E) the values (n, N) of each element combined, summed without more being said."""
        parts = zip(values.split(self.sizes, 1), self.channels, self.positions, strict=True)
        return torch.cat([combine(part.reshape(-1, c, p), 1) for part, c, p in parts], 1)

    def spread(self, of_elements: Tensor) -> Tensor:
        """(n, N) what each element (n, E) has, for each of its values."""
        parts = of_elements.split(self.positions, 1)
        return torch.cat([e.repeat(1, c) for e, c in zip(parts, self.channels, strict=True)], 1)

    def changed(self, delta: Tensor) -> Tensor:
        """(n,) elements that delta (n, N) changes."""
        return self.by_element(delta != 0).ne(0).sum(1)

    # -- inside ---------------------------------------------------------------------------------------------

    def _positions(self, name: str, shape: tuple[int, ...]) -> int:
        axes = len(self.target.samples[0].layouts[name].grid)
        return math.prod(shape[len(shape) - axes :])

    def _real(self, name: str) -> Tensor:
        """(B, positions) bool."""
        grids = [sample.layouts[name].grid for sample in self.target.samples]
        sides = self.target.inputs[name].shape[-len(grids[0]) :]
        real = torch.zeros((len(grids), *sides), dtype=torch.bool, device=self.target.device)
        for mask, grid in zip(real, grids, strict=True):
            mask[tuple(slice(side) for side in grid)] = True
        return real.flatten(1)

    def _flat(self, inputs: Mapping[str, Tensor]) -> Tensor:
        flat = torch.cat([inputs[name].flatten(1) for name in self.names], 1)
        return flat.to(torch.promote_types(flat.dtype, torch.float32))

    def _unflat(self, values: Tensor) -> dict[str, Tensor]:
        parts = values.split(self.sizes, 1)
        named = zip(self.names, parts, self.shapes, strict=True)
        return {n: v.reshape(len(v), *s).to(self.target.inputs[n]) for n, v, s in named}


class Adam:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) for rows that stop one by one, with its usual 0.9, 0.999 and 1e-8.

    Args:
        like: (B, N) what is to be moved.
    """

    def __init__(self, like: Tensor):
        self.first, self.second, self.step = torch.zeros_like(like), torch.zeros_like(like), 0

    def __call__(self, gradient: Tensor, rows: Tensor) -> Tensor:
        """(n, N) the direction to descend by; every row that is still moved must be in every call."""
        self.step += 1
        self.first[rows] = 0.9 * self.first[rows] + 0.1 * gradient
        self.second[rows] = 0.999 * self.second[rows] + 0.001 * gradient.square()
        first, second = self.first[rows] / (1 - 0.9**self.step), self.second[rows] / (1 - 0.999**self.step)
        return first / (second.sqrt() + 1e-8)


def check_choice(attack: str, name: str, chosen: str, among: Sequence[str]) -> None:
    """
    Raises:
        MuroanError: an option of an attack is none of its choices.
    """
    if chosen not in among:
        raise MuroanError(f"attack.{name} of {attack} must be one of {', '.join(among)}, got {chosen!r}")
