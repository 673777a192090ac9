"""The universe of removals: everything that can be made of the regions that a threat model allows."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence

import numpy as np

from muroan.attacks.base import AttackedSample
from muroan.modalities import Region, Removal


class Universe:
    """The regions of a sample as rows of numbers, so that a search can weigh all of them at once.

    An *atom* is a region that is not split further. Every removal that an attack may ask is a set of atoms, held as a
    boolean vector (A,). The atoms of a region lie side by side, so that what it holds of a set is a difference of
    running counts: a picture of 384 x 384 pixels has 4,096 atoms in 5,461 regions.

    Attributes:
        names: the modalities.
        regions: (N,) all regions, roots first, each followed by what lies below it.
        first, last: (N,) the atoms of each region, from the first to before the last.
        children: (N,) the rows of each region's parts; none for an atom.
        parent: (N,) the row of the region that each is a part of; -1 for a root.
        modality: (N,) which modality each region belongs to, by place.
        roots: row of each modality's root.
        atoms: (A,) rows of the atoms.
        named: rows of the regions that a removal may name: all but roots with parts.
        elements: (A,) float, number of elements of each atom.
        coarseness: (M,) of each modality, how many atoms there would be by default to one that there is; 1 unless it
            is split further than by default.
    """

    def __init__(self, sample: AttackedSample, modalities: Sequence[str]):
        self.names = list(modalities)
        self.regions: list[Region] = []
        self.children: list[list[int]] = []
        self.parent: list[int] = []
        self.roots: list[int] = []
        owner: list[int] = []
        spans: list[tuple[int, int]] = []
        atoms: list[int] = []

        def add(region: Region, place: int, parent: int) -> int:
            row, first = len(self.regions), len(atoms)
            self.regions.append(region)
            self.children.append([])
            self.parent.append(parent)
            owner.append(place)
            spans.append((0, 0))
            parts = sample.split(region)
            if not parts:
                atoms.append(row)
            self.children[row] += [add(part, place, row) for part in parts]
            spans[row] = (first, len(atoms))
            return row

        for place, name in enumerate(self.names):
            self.roots.append(add(sample.root(name), place, -1))
        self.atoms, self.modality = np.array(atoms), np.array(owner)
        self.elements = np.array([float(self.regions[row].area) for row in atoms])
        self.first, self.last = np.array(spans).T
        self._held = self.sums(self.elements)
        small = np.array([r.longest_side <= sample.modalities[r.modality].min_side for r in self.regions])
        by_default = small.copy()  # what would be split no further by default, and is not below such a region
        by_default[self.atoms] = True
        by_default &= ~np.append(small, False)[self.parent]
        would_be, are = (
            np.bincount(self.modality[rows], minlength=len(self.names)) for rows in (by_default, self.atoms)
        )
        self.coarseness = would_be / are
        # A root with parts is no region that an attack may name.
        self._part = np.array([p >= 0 or not c for p, c in zip(self.parent, self.children, strict=True)])
        self.named = np.flatnonzero(self._part).tolist()
        self._above = np.array([row if p < 0 else p for row, p in enumerate(self.parent)])
        self._below_root = np.array([p >= 0 for p in self.parent])

    def covers(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n, A) bool, the atoms of each of the regions of these rows (n,)."""
        found = np.zeros((len(rows), len(self.atoms)), dtype=bool)
        for place, row in zip(found, rows, strict=True):
            place[self.first[row] : self.last[row]] = True
        return found

    def sums(self, weight: np.ndarray) -> np.ndarray:
        """(N,) the weights (A,) of each region's atoms together."""
        edges = np.stack([self.first, self.last], 1).ravel()
        return np.add.reduceat(np.append(weight, 0.0), edges)[::2]

    def inside(self, sets: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(n, m) of the regions of these rows (m,), the share of their elements that lie in each set (n, A)."""
        return self._within(sets * self.elements, rows) / self._held[rows]

    def _within(self, counts: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(n, m) whole numbers (n, A) of the atoms of each of these regions together."""
        running = np.zeros((len(counts), len(self.atoms) + 1))
        np.cumsum(counts, axis=1, out=running[:, 1:])
        return running.take(self.last[rows], axis=1) - running.take(self.first[rows], axis=1)

    def parts(self, chosen: np.ndarray) -> list[int]:
        """Rows of the largest regions below the roots that make up a set of atoms (A,): as few as there can be."""
        return np.flatnonzero(self._largest(chosen[None])[0]).tolist()

    def count_parts(self, sets: np.ndarray) -> np.ndarray:
        """(n,) how many `parts` each of the sets of atoms (n, A) has."""
        return self._largest(sets).sum(1)

    def _largest(self, sets: np.ndarray) -> np.ndarray:
        """(n, N) bool, which regions are wholly in each set (n, A) and not part of another such."""
        whole = self._part & (self._within(~sets, np.arange(len(self.regions))) == 0)
        return whole & ~(self._below_root & whole[:, self._above])

    def removal(self, chosen: np.ndarray) -> Removal:
        """A set of atoms (A,) as the removal of its largest regions."""
        return self.removals(chosen[None])[0]

    def removals(self, sets: np.ndarray) -> list[Removal]:
        """The same of each of the sets (n, A)."""
        parts: list[list[Region]] = [[] for _ in sets]
        for place, row in zip(*(found.tolist() for found in np.nonzero(self._largest(sets))), strict=True):
            parts[place].append(self.regions[row])
        return [Removal(tuple(regions)) for regions in parts]

    def union(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """The atoms (A,) of some regions together."""
        return np.logical_or.reduce(self.covers(rows))


def ascending(costs: Sequence[float] | np.ndarray) -> Iterator[tuple[int, ...]]:
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


def cheaper(costs: Sequence[float] | np.ndarray, bound: float, most: float) -> int:
    """How many non-empty sets of positions cost less than the bound in total; counted no further than beyond `most`.

    Args:
        costs: of each position, positive.

    >>> cheaper([4, 1, 3], 5, 100)  # {4}, {1}, {3} and {1, 3}
    4
    """
    alike: dict[float, int] = {}
    for cost in sorted(costs, reverse=True):
        alike[cost] = alike.get(cost, 0) + 1
    groups = list(alike.items())

    def count(place: int, room: float, most: float) -> int:
        """Sets of the groups from a place on, the empty one too, that cost less than there is room for."""
        if place == len(groups):
            return 1
        (cost, number), found, taken = groups[place], 0, 0
        while taken <= number and taken * cost < room and found <= most:
            ways = math.comb(number, taken)
            found += ways * count(place + 1, room - taken * cost, (most - found) / ways)
            taken += 1
        return found

    return count(0, bound, most + 1) - 1 if bound > 0 else 0
