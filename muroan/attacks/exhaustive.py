"""The truth on small inputs: every removal, the smallest first."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import islice

from muroan.attacks.atoms import atoms
from muroan.attacks.base import Ask, Attack, AttackedSample, Search
from muroan.errors import MuroanError
from muroan.modalities import Removal


class Exhaustive(Attack):
    """Ask every set of finest regions, by the number of elements that it removes, until one flips.

    What it finds is the smallest flip that there is, and `proven` says so; finding none proves that there is none. Of
    sets of one size, those of fewer regions come first, then the order of the universe decides. Its limit is our own
    choice: 65,535 removals.

    Args:
        max_atoms: the most finest regions that a sample may have; each one more doubles the removals.
    """

    def __init__(self, max_atoms: int = 16):
        if max_atoms < 1:
            raise MuroanError(f"attack.max_atoms must be at least 1, got {max_atoms}")
        self.max_atoms = max_atoms

    def search(self, sample: AttackedSample) -> Search:
        """
        Raises:
            MuroanError: the sample has more than `max_atoms` regions.
        """
        parts = atoms(sample)
        if len(parts) > self.max_atoms:
            raise MuroanError(
                f"exhaustive asks every removal: sample {sample.id!r} has {len(parts)} finest regions, which makes "
                f"{2 ** len(parts) - 1:,} removals; attack.max_atoms allows {self.max_atoms} regions: "
                f"raise it, or have fewer regions with a larger threat_model.min_side"
            )
        areas = [part.area for part in parts]
        removals = (Removal(tuple(parts[i] for i in chosen)) for chosen in ascending(areas))
        responses = yield Ask(removals, phase="exhaust", until=sample.flipped)
        sample.proven = True  # a budget that runs out is raised above
        if not sample.flipped(responses[-1]):
            return None
        winner = next(islice(ascending(areas), len(responses) - 1, None))
        return Removal(tuple(parts[i] for i in winner))


def ascending(costs: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All non-empty sets of positions, by their total cost; ties by number, then by position in ascending order.

    They are made as they are taken: what is kept is the sets one step beyond those given out.

    Args:
        costs: of each position, positive.

    >>> list(ascending([4, 1, 3]))
    [(1,), (2,), (0,), (1, 2), (0, 1), (0, 2), (0, 1, 2)]
    """
    order = sorted(range(len(costs)), key=lambda i: costs[i])
    # A set is known by ranks in `order`. It is reached in one way alone: from the set whose last rank is one lower, or,
    # where that is taken, from the set without the last.
    heap = [(costs[order[0]], 1, (order[0],), (0,))] if order else []
    while heap:
        _, _, chosen, ranks = heapq.heappop(heap)
        yield chosen
        last = ranks[-1] + 1
        if last < len(order):
            for kept in (ranks, ranks[:-1]):
                further = (*kept, last)
                total = sum(costs[order[r]] for r in further)
                heapq.heappush(heap, (total, len(further), tuple(sorted(order[r] for r in further)), further))
