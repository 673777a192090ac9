"""Elements of a batch that get new values: what the attacks paint on that only ask, and choose values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from muroan.attacks.base import Perturbation, Target
from muroan.models.base import Prediction

ROWS = 16  # a pass has as many rows as the batch; of a small batch, up to so many


@dataclass(frozen=True, slots=True)
class Paint:
    """New values of some elements of a sample.

    Attributes:
        elements: (n,) distinct indices, counted through the canvas's modalities in order, each row-major.
        values: (n, C) in 0 to 1, from the lowest to the highest that an input can have; a modality of fewer channels
            takes the first.
    """

    elements: np.ndarray
    values: np.ndarray


class Canvas:
    """The elements of some continuous modalities of a batch.

    Attributes:
        grids: (B) of each sample, the shapes of its element grids in the order of the modalities.
        counts: (B) of each sample, its elements.
        channels: C, the most that a modality has.
    """

    def __init__(self, target: Target, names: Sequence[str]):
        self.target, self.names = target, list(names)
        self.grids = [[sample.layouts[name].grid for name in names] for sample in target.samples]
        self.counts = [sum(map(math.prod, grids)) for grids in self.grids]
        # (B, C, elements): an image has channels before its grid, a sound has none.
        inputs = {name: target.inputs[name] for name in names}
        self._clean = {name: x.flatten(2) if x.ndim > 2 else x[:, None] for name, x in inputs.items()}
        self._span = {name: [end.reshape(1, -1) for end in target.span(name)] for name in names}
        self.channels = max(x.shape[1] for x in self._clean.values())

    def painted(self, rows: Sequence[int], paints: Sequence[Paint]) -> dict[str, Tensor]:
        """Inputs of samples with new values.

        Args:
            rows: (n) which sample each is of, a sample may come several times; paints: (n) what goes on each.

        Returns:
            (n, *shape) a modality.
        """
        device, inputs = self.target.device, {}
        for at, name in enumerate(self.names):
            x = self._clean[name][torch.tensor(rows, device=device)]
            index, elements, values = [], [], []
            for i, (row, paint) in enumerate(zip(rows, paints, strict=True)):
                start = sum(map(math.prod, self.grids[row][:at]))
                own = (paint.elements >= start) & (paint.elements < start + math.prod(self.grids[row][at]))
                elements.append(paint.elements[own] - start)
                values.append(paint.values[own, : x.shape[1]])
                index.append(np.full(len(elements[-1]), i))
            share = torch.as_tensor(np.concatenate(values)).to(x)
            low, high = (end.to(x).expand_as(share) for end in self._span[name])
            which = torch.as_tensor(np.concatenate(index), device=device)
            where = torch.as_tensor(np.concatenate(elements), device=device)
            x[which, :, where] = torch.lerp(low, high, share)  # exact at both ends
            inputs[name] = x.reshape(len(rows), *self.target.inputs[name].shape[1:])
        return inputs

    def ask(self, rows: Sequence[int], paints: Sequence[Paint]) -> Prediction:
        """What the model says to painted samples, (n, D) and (n, C); each is a query."""
        return predict_in_passes(self.target, rows, lambda part: self.painted(rows[part], paints[part]))

    def perturbation(self, row: int, paint: Paint) -> Perturbation:
        return Perturbation({name: x[0] for name, x in self.painted([row], [paint]).items()})


def predict_in_passes(target: Target, rows: Sequence[int], make: Callable[[slice], Mapping[str, Tensor]]) -> Prediction:
    """Predictions of any number of rows, in passes of the batch's size, so that memory that ran out can be halved.

    Args:
        rows: (n) which sample each is of.
        make: the changed inputs of a part of the rows, (part, *shape) a modality.

    Returns:
        (n, D) and (n, C).
    """

    def parts() -> Iterator[Prediction]:
        size = max(ROWS, len(target))
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            yield target.predict(make(part), torch.tensor(rows[part], device=target.device))

    return Prediction(*map(torch.cat, zip(*parts(), strict=True)))
