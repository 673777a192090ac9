"""What searches share that put single regions together by how much each does."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence

import numpy as np

from muroan.attacks.base import Ask, AttackedSample, Response
from muroan.modalities import Removal

ROUNDING = 1e-5  # margins closer than this may differ by the arithmetic of another batch size alone


def ranked(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Places of values from the lowest up. Those within `ROUNDING` of the one before keep their order of position.

    >>> ranked([0.3, 0.1 + 1e-9, 0.1, -2.0])
    array([3, 1, 2, 0])
    """
    values = np.asarray(values, dtype=float)
    order = np.argsort(values, kind="stable")
    with np.errstate(invalid="ignore"):
        higher = np.diff(values[order]) > ROUNDING  # of two infinite ones it is not
    run = np.concatenate([[0], np.cumsum(higher)])[: len(order)]
    return order[np.lexsort((order, run))]


def lowest(values: np.ndarray) -> int:
    """The first place that `ranked` gives, in less time.

    >>> lowest(np.array([0.3, 0.1 + 1e-9, 0.1]))
    1
    """
    edge = values.min()
    if np.isinf(edge):
        return int(ranked(values)[0])
    while True:
        near = values - edge <= ROUNDING
        further = values[near].max()
        if further == edge:
            return int(near.argmax())
        edge = further


class Smallest:
    """The smallest flip seen so far, in elements; the first of equals.

    Attributes:
        removal: None as long as nothing has flipped.
    """

    def __init__(self, sample: AttackedSample):
        self.sample = sample
        self.removal: Removal | None = None

    def see(self, removals: Iterable[Removal], responses: Sequence[Response]) -> bool:
        """Take note of answers to removals, of which there may be more than answers; whether any flips."""
        flips = [removal for removal, r in zip(removals, responses, strict=False) if self.sample.flipped(r)]
        known = [self.removal] if self.removal is not None else []
        self.removal = min(known + flips, key=self.sample.size, default=None)
        return bool(flips)


def prune(sample: AttackedSample, smallest: Smallest) -> Generator[Ask, list[Response], None]:
    """Drop parts of the smallest flip, one at a time, until no single part can be dropped.

    The largest parts are tried first, of equals the last added. What is found is noted in `smallest` as it is found.
    """
    if smallest.removal is None:
        return
    parts = list(smallest.removal.regions)
    queue = sorted(reversed(parts), key=lambda region: -region.area)
    while len(queue) > 1:
        without = (Removal(tuple(part for part in parts if part is not dropped)) for dropped in queue)
        responses = yield Ask(without, phase="prune", until=sample.flipped)
        if not sample.flipped(responses[-1]):
            return
        # The round goes on where it stands; parts that were needed before may no longer be, and come again at its end.
        tried = len(responses)
        parts = [part for part in parts if part is not queue[tried - 1]]
        smallest.see([Removal(tuple(parts))], responses[-1:])
        queue = queue[tried:] + queue[: tried - 1]
