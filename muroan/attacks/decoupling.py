"""MUROAN's own decoupling attack: the smallest joint removal that flips the prediction, found by queries alone."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations
from typing import Literal

import numpy as np
from scipy.special import log_ndtr

from muroan.attacks.base import Ask, Attack, AttackedSample, BudgetExhausted, Response, Search
from muroan.attacks.greedy import ROUNDING, lowest, ranked
from muroan.attacks.universe import Universe, ascending, cheaper
from muroan.errors import MuroanError, check_names, check_whole
from muroan.modalities import Removal, removed_elements

Asking = Generator[Ask, list[Response], None]

# How the search weighs what it knows. Chosen on 100 to 300 test samples of three models of seed 0 (easy_vqa's
# mmbt and cross_attention, digit_sum's concat); docs/results.md has what the attack makes of other models.
CHEAP = 0.3  # share of the budget (of 500 of a larger one) for trying all sets of atoms that cost next to nothing
SCREEN = 0.4  # likewise, after which single regions are no longer screened
UNIVERSES = 64  # universes that are remembered
# Shares of everything, of regions as fine as by default; of finer ones, so much less as there are more of them (chosen
# on validation samples of digit_sum's concat and late_fusion of seed 4).
GROWN = 0.05  # flips of more than this call for growing one from small removals
FINE = 0.01  # savings are weighed by their logarithm, from 2 to 1 % as from 100 to 50 %; below this cost they are not
GROWTH = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
ROUND = 8  # removals an ask: fewer would learn more between asks, more would fill batches better
POOL = 96  # known removals from which new ones are made, each by adding or putting back one region
SHORT = 96  # new removals that are looked at closely before a round is chosen
OWN, OTHER = 0.5, 0.25  # how far an effect may differ in company: shares of its own size, and of its modality's
FLOOR = 0.02  # and at least this share of the clean margin
TRUST = 2.0  # answers' worth of trust that effects in company are what they are alone
FORGET = 0.98  # how fast that trust follows what is seen
SETS = 4001  # smaller sets of atoms among which a proof is sought
# These on 30 validation samples of easy_vqa's mmbt of seed 2, those whose flips were larger than 3 % without them.
AGAIN = 0.9  # a large flip that has become smaller than this share of what it was is shrunk again
NEAR = 300  # known removals of which the linear model around a large flip is made
NOISE = 0.3  # what it leaves unexplained, as a share of what effects in company vary by
TEMPER = 0.2  # deviations of its draws from the mean, in those that it believes in
DIGITS = 2.0**17  # to so many steps are distances told apart


class Decoupling(Attack):
    """The strongest decoupling that this project has: removal only, queries only, over any set of modalities.

    The paper (Vishwamitra et al., arXiv 2112.12792) looks for salient datapoints, couples them and takes the first
    combination that flips. This search keeps that picture and is guided by the margin (without labels, by the fusion
    embedding's own; see `embedding`):

    1. *Cheap atoms*: where all atoms of a kind together cost less than any other one (words beside image regions),
       their sets are tried by number; where these cost alike, the first flip is the proven minimum.
    2. *Screen*: single regions, coarse to fine over the region tree, those with the largest effect first; whole
       modalities and their unions too, so that a flip is known where effects alone say nothing. A modality that is
       split further than by default comes before the others, as smaller flips may lie there.
    3. *Grow and shrink*: where no small flip has turned up, more and more of the regions with the largest effects
       together; then what of the flip can be put back, coarse to fine, in rounds until nothing can. Where that leaves
       a large one, once more in the modality that is split furthest beyond its default, alone.
    4. *Improve*: every known removal with one region more or one less is a candidate. Its margin is predicted from
       the nearest known removal and the effects of what lies between, with an uncertainty learned from what earlier
       predictions missed by. Asked are those with the best chance of a flip times what it would save, so that the
       same rule grows a removal until it flips and shrinks it afterwards. That rule takes long shots at small removals
       as long as the best flip is large: then every other round comes from a linear model of the margin around that
       flip, and a flip that is much smaller is shrunk again. In the end, single parts are put back until none can be.
    5. *Prove*: when no more smaller removals are left than the budget allows, all are asked, the smallest first: a
       removal is proven to be the smallest by the objective (with `parts`, no flip takes fewer of them; with
       `valid_only`, of those after which the label is still right).

    `info` records how many atoms there were; the ledger's phases tell what each step took.

    Args:
        objective: what is to be small: `fraction` of all elements removed; `normalised`, the mean over modalities of
            each one's fraction, so that a word is not worth 1/50,000 of an image; `parts`, the number of regions.
        modalities: attack these alone; null for all.
        target: reach this class (an index) instead of any wrong one. Samples of that class are skipped.
        embedding: instead of a label: decouple until the largest entry of the fusion embedding is another one
            (`argmax`), or until its cosine distance to the clean one reaches this number (0 to 2). Samples that the
            model gets wrong are skipped all the same.
        valid_only: accept and ask only removals after which the label is still right, as the dataset tells.
        patience: stop after so many queries without a smaller flip; null for never. Without any flip, a search under
            a budget goes on until that is spent.
        first: any flip will do, however large: for robust accuracy under a large budget, without minimising.

    Raises:
        MuroanError: an option that does not exist or does not fit the model; a budget below what the first phase
            needs.
    """

    apart = True

    def __init__(
        self,
        objective: Literal["fraction", "normalised", "parts"] = "fraction",
        modalities: Sequence[str] | None = None,
        target: int | None = None,
        embedding: Literal["argmax"] | float | None = None,
        valid_only: bool = False,
        patience: int | None = 300,
        first: bool = False,
    ):
        if objective not in ("fraction", "normalised", "parts"):
            raise MuroanError(f"attack.objective must be fraction, normalised or parts, got {objective!r}")
        if target is not None and embedding is not None:
            raise MuroanError("attack.target and attack.embedding are two different goals: set one of them to null")
        if target is not None and (isinstance(target, bool) or not isinstance(target, int)):
            raise MuroanError(f"attack.target must be the index of a class, got {target!r}")
        number = isinstance(embedding, int | float) and not isinstance(embedding, bool)
        if embedding not in (None, "argmax") and not (number and 0 < float(embedding) <= 2):  # type: ignore[arg-type]
            raise MuroanError(f"attack.embedding must be argmax or a cosine distance in (0, 2], got {embedding!r}")
        if patience is not None:
            check_whole("attack", patience=patience)
        check_names("attack", modalities=modalities)
        self.objective, self.valid_only, self.first = objective, valid_only, first
        self.patience = math.inf if patience is None else patience
        self.modalities = None if modalities is None else list(modalities)
        self.target, self.embedding = target, embedding
        self._universes: dict[object, Universe] = {}
        if target is not None:
            self.goal = f"class number {target}"
        elif embedding is not None:
            how_far = "" if embedding == "argmax" else f" at a distance of {float(embedding):g}"
            self.goal = f"another fusion embedding{how_far}"
        if valid_only:
            self.goal = f"{self.goal or 'another label'} with the old label still right"
        # A record must not look as if it came from the untargeted, joint attack.
        goal = ["targeted"] if target is not None else ["embedding"] if embedding is not None else []
        self.name = "_".join(["decoupling", *(self.modalities or []), *goal, *(["first"] if first else [])])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_universes": {}}  # large, and soon made again

    # -- the goal -------------------------------------------------------------------------------------------

    def attackable(self, label: int, classes: int) -> bool:
        if self.target is not None and not 0 <= self.target < classes:
            raise MuroanError(f"attack.target={self.target}, but the model has the classes 0 to {classes - 1}")
        return label != self.target

    def reached(self, label: int, response: Response) -> bool:
        if self.embedding == "argmax":
            return response.embedding_margin < 0  # at 0 two entries are equal, perhaps from the start
        if self.embedding is not None:
            return self.distance(response) <= 0
        return response.label != label if self.target is None else response.label == self.target

    def distance(self, response: Response) -> float:
        """How far a response is from the goal, in units of the margin or the embedding; 0 or less when reached."""
        if self.embedding == "argmax":
            return response.embedding_margin
        if self.embedding is not None:
            return float(self.embedding) - response.embedding_shift
        if self.target is not None:
            others = np.delete(response.logits, self.target)
            return float(others.max() - response.logits[self.target])
        return response.margin

    def cost(self, sample: AttackedSample, removal: Removal) -> float:
        if self.objective == "fraction":
            return sample.size(removal)
        names = self.modalities or list(sample.modalities)
        removed = removed_elements(removal, sample.layouts)
        totals = {name: max(1, sample.layouts[name].count) for name in names}
        if self.objective == "normalised":
            return 100 * sum(removed.get(name, 0).bit_count() / totals[name] for name in names) / len(names)
        share = sum(bits.bit_count() for bits in removed.values()) / sum(totals.values())
        return len(removal.regions) + share / 10  # between equal numbers of parts the smaller fraction wins

    def universe(self, sample: AttackedSample, names: Sequence[str]) -> Universe:
        """The sample's universe; samples of equal layout under one threat model share one."""
        sides = sample.threat_model.min_side
        key = tuple((name, sample.layouts[name].grid, sides[name], sample.modalities[name]) for name in names)
        if key not in self._universes:
            if len(self._universes) >= UNIVERSES:
                self._universes.clear()
            self._universes[key] = Universe(sample, names)
        return self._universes[key]

    # -- the search -----------------------------------------------------------------------------------------

    def search(self, sample: AttackedSample) -> Search:
        names = sample.chosen(self.modalities)
        if self.valid_only and sample.valid is None:
            raise MuroanError("attack.valid_only needs a dataset that can tell whether a label is still right")
        if sample.threat_model.max_queries is None and self.patience == math.inf:
            raise MuroanError("attack.patience=null never ends without a budget: set threat_model.max_queries")
        hunt = Hunt(self, sample, self.universe(sample, names))
        try:
            yield from hunt.run()
        except Enough:
            pass
        except BudgetExhausted as refusal:
            hunt.learn(hunt.asking, refusal.responses)
        sample.info["atoms"] = len(hunt.universe.atoms)
        if hunt.best is None:
            if hunt.left <= 0 and hunt.known < 2 ** len(hunt.universe.atoms):
                raise BudgetExhausted  # the search did not give up
            return None
        # The budget may have ended the search after the last smaller removal was asked.
        sample.proven = hunt.proven or (not self.first and hunt.unasked() == [])
        return hunt.universe.removal(hunt.best)


class Enough(Exception):
    """A flip is known, and any will do."""


@dataclass
class Moves:
    """What one region more or less makes of known removals, the regions of a kind (`Hunt.kinds`) together.

    A move is a number: that of the region that is added, or with as many more as there are regions, put back.

    Attributes:
        rows: (M,) which known removal each changes.
        first: (M,) 0 where a region is added, as many as there are regions where one is put back.
        kind: (M,) of which kind it is.
        predicted: (M,) the distance from the goal afterwards.
        score: (M,) the logarithm of what is worth asking; -inf where nothing is left to try.
        order: (N,) all regions, kind by kind; starts: (C + 1,) where each kind starts and the last one ends.
        tried: of each row, the moves that were made to no avail.
    """

    rows: np.ndarray
    first: np.ndarray
    kind: np.ndarray
    predicted: np.ndarray
    score: np.ndarray
    order: np.ndarray
    starts: np.ndarray
    tried: dict[int, set[int]]

    def untried(self, place: int) -> list[int]:
        kind = self.kind[place]
        moves = self.order[self.starts[kind] : self.starts[kind + 1]] + self.first[place]
        return [move for move in moves.tolist() if move not in self.tried[int(self.rows[place])]]

    def best(self, most: int) -> list[tuple[int, int, float]]:
        """Those of the highest scores that are not tried, best first: row, move and predicted distance."""
        found: list[tuple[int, int, int]] = []
        spent: list[int] = []
        for place in highest(self.score, most).tolist():
            moves = self.untried(place)
            found += [(int(self.rows[place]), move, place) for move in moves[: most - len(found)]]
            if not moves:
                spent.append(place)
            if len(found) == most:
                break
        self.score[spent] = -np.inf
        if spent and len(found) < most:  # in their place others are among the highest
            return self.best(most)
        found.sort()
        found = [found[i] for i in ranked(-self.score[[place for _, _, place in found]])]
        return [(row, move, float(self.predicted[place])) for row, move, place in found]


class Hunt:
    """The search of one sample: what was asked, what came back, and what it tells about the rest.

    Every removal is a set of atoms, a boolean vector (A,); the answers are kept in arrays of P rows, one a removal,
    of which `known` are filled. Row 0 is the clean input.

    Attributes:
        distances: (P,) from the goal; shifts: (P,) of the fusion embedding from the clean one; by_shift: whether the
            former are made of the latter.
        best: (A,) the smallest flip so far, None without one; bound: its cost, or what a first flip may cost.
        proven: whether all removals that are cheaper were asked.
        coarseness: (M,) `Universe.coarseness`; ones where it says nothing of the objective.
        grown, fine: above this cost a flip is large; below this one, what saving more is worth hardly rises.
        effect: (N,) by how much removing each region alone brings the goal nearer.
    """

    def __init__(self, attack: Decoupling, sample: AttackedSample, universe: Universe):
        self.attack, self.sample, self.universe = attack, sample, universe
        u = universe
        atom_modality = u.modality[u.atoms]
        totals = np.bincount(atom_modality, u.elements, len(u.names))
        if attack.objective == "normalised":
            self.price = 100 * u.elements / totals[atom_modality] / len(u.names)
        else:
            self.price = 100 * u.elements / totals.sum()
        self.region_price = u.sums(self.price)
        self.budget = float("inf") if sample.threat_model.max_queries is None else sample.threat_model.max_queries
        self.asked = self.since = 0
        self.asking: list[np.ndarray] = []
        self.valid: dict[bytes, bool] = {}  # what the dataset said of sets
        self.best: np.ndarray | None = None
        self.proven = False
        everything = np.ones(len(u.atoms), dtype=bool)
        self.bound = len(u.atoms) + 1.0 if attack.objective == "parts" else 1.5 * self.cost(everything)
        # However fine, by their number a part is a part.
        self.coarseness = np.ones(len(u.names)) if attack.objective == "parts" else u.coarseness
        self.grown = GROWN * self.coarseness.min() * self.cost(everything)
        self.fine = 0.5 if attack.objective == "parts" else FINE * self.coarseness.min() * self.cost(everything)

        room, regions = 64, len(u.regions)
        self.known = 1
        self.sets = np.zeros((room, len(u.atoms)), dtype=bool)
        self.distances = np.full(room, attack.distance(sample.clean))
        self.shifts = np.zeros(room)
        self.by_shift = False
        self.flipped = np.zeros(room, dtype=bool)
        self.costs = np.zeros(room)
        self.tried: dict[int, set[int]] = {}  # of each row, the regions added (as N more: put back) to no avail
        self.rows = {self.sets[0].tobytes(): 0}
        self.effect = np.full(regions, np.nan)
        self.group = np.zeros(len(u.atoms), dtype=int)  # of each atom; all known sets have all of a group, or none

    def cost(self, chosen: np.ndarray) -> float:
        """What the objective makes of a set of atoms (A,); between equal numbers of parts the smaller fraction wins."""
        return float(self.costs_of(chosen[None])[0])

    def costs_of(self, sets: np.ndarray) -> np.ndarray:
        """The costs (n,) of sets of atoms (n, A)."""
        price = sets @ self.price
        if self.attack.objective != "parts":
            return price
        return self.universe.count_parts(sets) + price / 1000

    @property
    def left(self) -> float:
        return self.budget - self.asked

    @property
    def large(self) -> bool:
        """Whether no flip is known but ones of a good part of everything."""
        return self.bound > self.grown

    @property
    def weary(self) -> bool:
        """Whether patience is at its end: without a flip, it is only where no budget ends the search."""
        return self.since >= self.attack.patience and (self.best is not None or self.budget == math.inf)

    # -- asking ---------------------------------------------------------------------------------------------

    def ask(self, sets: Sequence[np.ndarray], phase: str, until_flip: bool = False) -> Asking:
        """Ask those of the sets (A,) that are not known yet."""
        fresh = {chosen.tobytes(): chosen for chosen in sets if chosen.tobytes() not in self.rows}
        self.asking = self.allowed(list(fresh.values()))
        if self.asking:
            removals = self.universe.removals(np.array(self.asking))
            until = partial(self.attack.reached, self.sample.label) if until_flip else None
            self.learn(self.asking, (yield Ask(removals, phase, until)))
            if self.attack.first and self.best is not None:
                raise Enough
        self.asking = []

    def allowed(self, sets: list[np.ndarray]) -> list[np.ndarray]:
        """Those of the sets (A,) that may be asked."""
        if not self.attack.valid_only:
            return sets
        assert self.sample.valid is not None
        new = {key: chosen for chosen in sets if (key := chosen.tobytes()) not in self.valid}
        if new:
            removals = self.universe.removals(np.array(list(new.values())))
            self.valid |= {key: self.sample.valid(r) is True for key, r in zip(new, removals, strict=True)}
        return [chosen for chosen in sets if self.valid[chosen.tobytes()]]

    def flips(self, response: Response) -> bool:
        return self.attack.reached(self.sample.label, response)

    def learn(self, sets: Sequence[np.ndarray], responses: Sequence[Response]) -> None:
        """Keep the answers to the first so many sets."""
        first, count = self.known, len(responses)
        if not count:
            return
        while first + count > len(self.distances):
            arrays = self.sets, self.distances, self.shifts, self.flipped, self.costs
            grown = (np.concatenate([a, np.zeros_like(a)]) for a in arrays)
            self.sets, self.distances, self.shifts, self.flipped, self.costs = grown
        new, answered = np.array(sets[:count]), slice(first, first + count)
        self.sets[answered], self.costs[answered] = new, self.costs_of(new)
        self.distances[answered] = [self.attack.distance(response) for response in responses]
        self.shifts[answered] = [response.embedding_shift for response in responses]
        self.flipped[answered] = [self.flips(response) for response in responses]
        if self.by_shift:
            self.go_by_shifts(answered)
        for row, chosen in enumerate(sets[:count], first):
            self.rows[chosen.tobytes()] = row
            self.since += 1
            if self.flipped[row] and self.costs[row] < self.bound - 1e-12:
                self.best, self.bound, self.since = chosen, float(self.costs[row]), 0
        self.known += count
        self.asked += count
        self.tell_apart(new)

    def tell_apart(self, sets: np.ndarray) -> None:
        """Split groups of atoms of which some are in one of the sets (n, A), and others not."""
        for start in range(0, len(sets), 32):  # numbers of 64 bits have room for so many sets more
            for chosen in sets[start : start + 32]:
                self.group = 2 * self.group + chosen
            self.group = np.unique(self.group, return_inverse=True)[1]

    def single(self, regions: Sequence[int], phase: str) -> Asking:
        """Ask regions alone and note their effects."""
        covers = self.universe.covers(regions)
        yield from self.ask(list(covers), phase)
        for region, alone in zip(regions, covers, strict=True):
            row = self.rows.get(alone.tobytes())
            self.effect[region] = 0.0 if row is None else self.distances[0] - self.distances[row]

    # -- the steps ------------------------------------------------------------------------------------------

    def run(self) -> Asking:
        u = self.universe
        tops = [child for root in u.roots for child in (u.children[root] or [root])]
        self.sample.demand(self.attack.name, len(tops), f"{len(tops)} regions")
        yield from self.try_cheap()
        if not self.proven:
            yield from self.screen(tops)
            self.look_at_embedding()
            self.believe()
            if self.best is not None and self.attack.objective == "parts":  # to grow one would only add parts
                yield from self.prove()
        if not self.proven:
            if self.large:
                nearest = self.sets[ranked(self.distances[: self.known])[0]]
                yield from self.grow(np.ones(len(u.atoms), dtype=bool), (self.sets[0], nearest))
                yield from self.shrink()
                yield from self.again_in_finest()
            yield from self.improve()

    def try_cheap(self) -> Asking:
        """All sets of atoms that together cost less than any other one, by number, as far as there is room.

        Where these cost alike the first flip is the minimum.
        """
        if self.attack.objective == "parts":
            return
        u = self.universe
        order = np.argsort(self.price, kind="stable")
        together = np.cumsum(self.price[order])
        few = next((k for k in range(len(order) - 1, 0, -1) if together[k - 1] < self.price[order[k]]), 0)
        if not few and np.ptp(self.price) < 1e-9:
            few = len(order)  # all cost the same, as where there is one modality
        cheap = [int(u.atoms[place]) for place in sorted(order[:few])]
        room = CHEAP * min(self.budget, 500)
        for size in range(1, few + 1):
            number = math.comb(few, size)
            room -= number
            if room < 0:
                return
            if size == 1:
                yield from self.single(cheap, "cheap")
            else:
                sets = [u.union(members) for members in combinations(cheap, size)]
                yield from self.ask(sets, "cheap")
            if self.best is not None:
                self.proven = bool(np.ptp(self.price[np.sort(order[:few])]) < 1e-9)
                return

    def screen(self, tops: Sequence[int]) -> Asking:
        """Single regions, coarse to fine; whole modalities, and their unions.

        Modalities in finer parts come first. Of the queries that these leave, others get so much less as their parts
        are coarser.
        """
        u = self.universe
        yield from self.single(tops, "screen")
        yield from self.single(u.roots, "screen")
        unions = [pick for size in range(2, len(u.roots) + 1) for pick in combinations(u.roots, size)]
        yield from self.ask([u.union(pick) for pick in unions], "screen")
        room = SCREEN * min(self.budget, 500) - self.asked
        before = self.coarseness.min()
        for coarseness in np.unique(self.coarseness):
            room, before = room * before / coarseness, coarseness
            inner = [row for row in tops if u.children[row] and self.coarseness[u.modality[row]] == coarseness]
            while inner and room > 0:
                order = ranked(-np.abs(self.effect[inner]))
                chosen, inner = [inner[i] for i in order[:4]], [inner[i] for i in order[4:]]
                parts = [part for region in chosen for part in u.children[region]][: math.ceil(room)]
                room -= len(parts)
                yield from self.single(parts, "screen")
                inner += [part for part in parts if u.children[part]]

    def look_at_embedding(self) -> None:
        """Where the margin has said nothing, as of a model that tells labels alone, go by how far the fusion embedding
        moves."""
        held = ~self.flipped[: self.known]
        distances, shifts = self.distances[: self.known][held], self.shifts[: self.known][held]
        flat = np.ptp(distances) <= ROUNDING * abs(distances[0])
        if not flat or self.attack.embedding is not None or np.ptp(shifts) <= ROUNDING:
            return
        self.by_shift = True
        self.go_by_shifts(slice(self.known))
        for region in np.flatnonzero(~np.isnan(self.effect)).tolist():
            row = self.rows.get(self.universe.covers([region])[0].tobytes(), 0)
            self.effect[region] = self.distances[0] - self.distances[row]

    def go_by_shifts(self, rows: slice) -> None:
        """Take what these removals move the embedding by (0 to 2) for how far they bring the goal nearer."""
        nearer = self.distances[0] * (1 - self.shifts[rows] / 2)
        self.distances[rows] = np.where(self.flipped[rows], self.distances[rows], nearer)

    def grow(self, among: np.ndarray, bases: Sequence[np.ndarray]) -> Asking:
        """Where no small flip is known: more and more of some atoms (A,), those with the largest effects first, with
        each of some removals that are known."""
        u = self.universe
        order = ranked(-self.effect[u.atoms])
        order = order[among[order]]
        sizes = [size for size in GROWTH if size < len(order)]
        for base in bases:
            yield from self.ask([base | u.union(u.atoms[order[:size]]) for size in sizes], "grow")

    def shrink(self) -> Asking:
        """While the best flip is large: what of it can be put back, coarse to fine."""
        u = self.universe
        pieces = [] if self.best is None else u.parts(self.best)
        while pieces and self.large:
            spare = pieces
            while spare and self.large and self.left > self.reserve:
                spare = yield from self.put_back(spare, "shrink")
            kept = self.held(pieces)
            pieces = [part for piece in kept for part in u.children[piece]]

    def again_in_finest(self) -> Asking:
        """Where the best flip is still large and takes other modalities: grow and shrink one in the finest parts alone.

        It may start from a larger flip and end with a smaller one. By default no modality is the finest: all are.
        """
        u = self.universe
        finest = (self.coarseness == self.coarseness.min())[u.modality[u.atoms]]
        if not self.large or self.best is None or not (self.best & ~finest).any():
            return
        yield from self.grow(finest, (self.sets[0],))
        try:
            self.take_smallest(np.all(self.sets[: self.known] <= finest, axis=1))
            yield from self.shrink()
        finally:
            self.take_smallest(np.ones(self.known, dtype=bool))

    def take_smallest(self, rows: np.ndarray) -> None:
        """Take the smallest flip among these rows (P,) for the best, if there is one."""
        flips = np.flatnonzero(rows & self.flipped[: self.known])
        if len(flips):
            row = flips[self.costs[flips].argmin()]
            self.best, self.bound = self.sets[row].copy(), float(self.costs[row])

    def put_back(self, pieces: Sequence[int], phase: str) -> Generator[Ask, list[Response], list[int]]:
        """Put back what can be of some parts of the best flip, alone and then together.

        Returns:
            Those that could be put back alone and still are not; none where nothing was gained, as by more parts of
            less.
        """
        best, u = self.best, self.universe
        assert best is not None
        less = dict(zip(pieces, best & ~u.covers(pieces), strict=True))
        yield from self.ask(list(less.values()), phase)
        rows = {piece: self.rows[chosen.tobytes()] for piece, chosen in less.items() if chosen.tobytes() in self.rows}
        spare = [piece for piece, row in rows.items() if self.flipped[row]]
        # The large ones first, and those that matter least.
        spare = [spare[i] for i in ranked([self.distances[rows[piece]] * self.region_price[piece] for piece in spare])]
        sizes = [size for size in GROWTH if size < len(spare)] + [len(spare)]
        yield from self.ask([best & ~u.union(spare[:size]) for size in sizes], phase)
        if self.best is best:
            return []
        return self.held(spare)

    def held(self, pieces: Sequence[int]) -> list[int]:
        """Those of some regions that lie wholly in the best flip."""
        whole = ~(self.universe.covers(pieces) & ~self.best).any(1)  # type: ignore[operator]
        return [piece for piece, is_whole in zip(pieces, whole, strict=True) if is_whole]

    def improve(self) -> Asking:
        """Ask what promises most, until the budget or the patience is at its end, or nothing smaller is left."""
        proof_failed_at, shrunk, draw = float("inf"), self.bound, True
        while self.left > 0 and not self.weary:
            if self.best is not None and self.bound < proof_failed_at:
                yield from self.prove()
                if self.proven:
                    return
                proof_failed_at = self.bound
            far = self.best is not None and self.large and self.attack.objective != "parts"
            if far and self.bound < AGAIN * shrunk:
                yield from self.shrink()
                shrunk = self.bound
            if self.left <= self.reserve:
                yield from self.tidy()
            if self.left <= 0:
                return
            # The chance times what it saves calls for long shots alone while the best flip is large.
            chosen = self.drawn() if far and draw else []
            draw = not draw
            if not chosen:
                candidates = self.candidates()
                if not candidates:
                    break
                chosen = self.choose(candidates)
            first = self.known
            yield from self.ask(chosen, "improve")
            self.update(first)
        yield from self.tidy()

    def drawn(self) -> list[np.ndarray]:
        """Smaller sets that may flip as well, if the distance is linear in what is removed, around the best flip.

        A Bayesian linear regression of what the nearest known removals differ by, with what is believed about single
        atoms as its prior. The first set is what its mean makes the smallest flip, the others what draws from it make
        (Thompson sampling): of the atoms that bring most for their price, as many as it takes.
        """
        best, known, rng = self.best, self.known, self.sample.rng
        assert best is not None
        variance = self.uncertainty()
        variance = np.maximum(variance, variance.mean())
        steps = self.sets[:known].astype(float) - best
        far = np.abs(steps) @ variance
        near = ranked(far)[:NEAR]
        steps, noise = steps[near], NOISE * np.maximum(far[near], self.floor)  # (K, A), (K,)
        distance = self.distances[self.rows[best.tobytes()]]
        # A draw from the prior, corrected by what it misses the answers by, is one from the posterior.
        effects, errors = rng.standard_normal((4 * ROUND, len(best))), rng.standard_normal((4 * ROUND, len(near)))
        effects[0], errors[0] = 0, 0
        effects = self.effects()[self.universe.atoms] + TEMPER * effects * np.sqrt(variance)
        missed = distance - self.distances[near] - effects @ steps.T - TEMPER * errors * np.sqrt(noise)
        scaled = steps * variance
        effects += np.linalg.solve(scaled @ steps.T + np.diag(noise), missed.T).T @ scaled

        found: dict[bytes, np.ndarray] = {}
        for effect in effects:
            order = ranked(-effect / self.price)
            flips = distance + effect @ best - np.cumsum(effect[order]) <= 0
            most = int((np.cumsum(self.price[order]) < self.bound - 1e-9).sum())
            chosen = np.zeros_like(best)
            chosen[order[: min(int(flips.argmax()) + 1, most) if flips.any() else most]] = True
            if chosen.tobytes() not in self.rows and self.allowed([chosen]):
                found[chosen.tobytes()] = chosen
            if len(found) >= min(ROUND, self.left):
                break
        return list(found.values())

    def tidy(self) -> Asking:
        """Put back parts of the best flip until no single one can be."""
        before: np.ndarray | None = None
        while self.best is not None and self.best is not before:
            before = self.best
            spare = self.universe.parts(before)
            while spare:
                spare = yield from self.put_back(spare, "tidy")

    @property
    def reserve(self) -> float:
        """Queries to keep for `tidy`: each part once more than is known, again after some are put back, and two
        rounds."""
        if self.best is None:
            return 0
        less = self.best & ~self.universe.covers(self.universe.parts(self.best))
        unknown = sum(chosen.tobytes() not in self.rows for chosen in less)
        return 2 * (unknown + ROUND) if unknown else 0

    def prove(self) -> Asking:
        """If all smaller removals can be asked, ask them, the smallest first: a flip is then the minimum."""
        missing = self.unasked()
        if missing is not None:
            yield from self.ask(missing, "prove", until_flip=True)
            self.proven = True

    def unasked(self) -> list[np.ndarray] | None:
        """All smaller removals than the best flip that have not been asked, the smallest first; None where they are
        more than may be asked."""
        below = self.bound - 1e-9
        most = min(int((self.costs[1 : self.known] < below).sum()) + self.left, SETS)
        smaller = self.of_fewer_parts(most) if self.attack.objective == "parts" else self.cheaper_sets(below, most)
        if smaller is None:
            return None
        missing = self.allowed([chosen for chosen in smaller if chosen.tobytes() not in self.rows])
        return missing if len(missing) <= self.left else None

    def cheaper_sets(self, below: float, most: float) -> list[np.ndarray] | None:
        """All sets of atoms that cost less, the cheapest first; None where they are more than so many."""
        if cheaper(self.price, below, most) > most:
            return None
        found: list[np.ndarray] = []
        for places in ascending(self.price):
            chosen = np.zeros(len(self.price), dtype=bool)
            chosen[list(places)] = True
            if self.cost(chosen) >= below:
                break
            found.append(chosen)
        return found

    def of_fewer_parts(self, most: float) -> list[np.ndarray] | None:
        """All unions of fewer regions than the best flip has, the fewest first; None where more than so many."""
        named = self.universe.named
        fewer = range(1, len(self.universe.parts(self.best)))  # type: ignore[arg-type]
        if sum(math.comb(len(named), size) for size in fewer) > most:
            return None
        found = [self.universe.union(pick) for size in fewer for pick in combinations(named, size)]
        return list({chosen.tobytes(): chosen for chosen in found}.values())

    # -- what is believed about removals that were not asked ---------------------------------------------------

    def believe(self) -> None:
        """Effects of all regions, and how far each atom's may differ in company, before anything else is known."""
        u = self.universe
        for region in np.flatnonzero(np.isnan(self.effect)):  # parents come first
            parent = u.parent[region]
            self.effect[region] = self.effect[parent] / len(u.children[parent]) if parent >= 0 else 0.0
        effect = self.effect[u.atoms]
        place = u.modality[u.atoms]
        count = np.maximum(1, np.bincount(place, minlength=len(u.names)))
        mean_square = np.bincount(place, effect**2, len(u.names)) / count
        self.floor = (FLOOR * self.distances[0]) ** 2 + 1e-18
        mean_square = np.maximum(mean_square, self.floor)
        self.squares = np.maximum((OWN * np.abs(effect) + OTHER * np.sqrt(mean_square)[place]) ** 2, self.floor)
        self.times = np.ones(len(u.atoms))
        # By modality, how what an atom does in company relates to what it does alone: a regression through 0.
        self.both, self.alone = TRUST * mean_square, TRUST * mean_square

    def uncertainty(self) -> np.ndarray:
        """(A,) the variance of each atom's effect in company."""
        return np.maximum(self.squares / self.times, self.floor / 16)

    def effects(self) -> np.ndarray:
        """(N,) what each region is expected to do in company."""
        return self.effect * np.clip(self.both / self.alone, 0, 1.5)[self.universe.modality]

    def groups(self, regions: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Atoms that every known set has, or has not, together; and every set that some regions (rows) are added to.

        Of a large picture most are: what is summed over atoms is summed over groups of them in less time.

        Returns:
            (A,) the group of each atom; (G,) an atom of each group.
        """
        inner = np.zeros(len(self.group), dtype=int)
        spans = {(self.universe.first[region], self.universe.last[region]) for region in regions}
        # Regions lie within each other or apart, so that the innermost tells which ones an atom is in.
        for number, (first, last) in enumerate(sorted(spans, key=lambda span: span[0] - span[1]), 1):
            inner[first:last] = number
        _, one, group = np.unique(self.group * (len(spans) + 1) + inner, return_index=True, return_inverse=True)
        return group, one

    def candidates(self) -> list[tuple[np.ndarray, int, int, float]]:
        """The best new sets that one region more or less makes of known ones.

        Returns:
            (A,) the set, the row it was made of, the move, and the predicted distance from the goal.
        """
        known = self.known
        variance, effect = self.uncertainty(), self.effects()
        spread = np.sqrt(variance.mean())
        near = ranked(self.distances[:known] / spread + 2 * np.log1p(self.costs[:known] / self.fine))
        for first in range(0, known, POOL):  # further ones only where nothing is left to make of the nearest
            pool = np.sort(near[first : first + POOL])
            if self.best is not None:
                pool = np.union1d(pool, self.rows[self.best.tobytes()])
            found = self.made_of(pool, effect, variance)
            if found:
                return found
        return []

    def made_of(
        self, pool: np.ndarray, effect: np.ndarray, variance: np.ndarray
    ) -> list[tuple[np.ndarray, int, int, float]]:
        """The best new sets that one region more or less makes of these rows (P,); see `candidates`."""
        u, regions = self.universe, len(self.universe.regions)
        moves = self.weighed(pool, effect, variance)
        while top := moves.best(SHORT):
            rows, made = [row for row, _, _ in top], np.array([move for _, move, _ in top])
            sets, whole = self.sets[rows], u.covers(made % regions)
            sets = np.where((made < regions)[:, None], sets | whole, sets & ~whole)
            keys = [chosen.tobytes() for chosen in sets]
            new = {key: chosen for key, chosen in zip(keys, sets, strict=True) if key not in self.rows}
            new = {chosen.tobytes(): chosen for chosen in self.allowed(list(new.values()))}
            found: dict[bytes, tuple[np.ndarray, int, int, float]] = {}
            for (row, move, predicted), key in zip(top, keys, strict=True):
                if key in new and key not in found:
                    found[key] = new[key], row, move, predicted
                else:
                    self.tried[row].add(move)
            if found:
                return list(found.values())
        return []

    def weighed(self, pool: np.ndarray, effect: np.ndarray, variance: np.ndarray) -> Moves:
        """What one region more or less would make of these rows (P,), as far as it may be worth a look."""
        u, regions = self.universe, len(self.universe.regions)
        spread = u.sums(variance)
        order, starts = self.kinds(effect, spread)
        one, many = order[starts], np.diff(np.append(starts, regions))
        inside = u.inside(self.sets[pool], one)  # (P, C)
        moved = np.concatenate([1 - inside, inside], 1)  # (P, 2C): of each kind, how much adding or dropping one moves
        step = np.ones(len(one)) if self.attack.objective == "parts" else self.region_price[one]
        cost = np.concatenate([step, -step]) * moved + self.costs[pool][:, None]
        # Where nothing is saved the score is -inf anyway: as soon as a flip is small, nearly everywhere.
        worth = (moved >= 1e-9) & (cost < self.bound)
        tried = [self.tried.setdefault(row, set()) for row in pool.tolist()]
        kind_of = np.repeat(np.arange(len(one)), many)[np.argsort(order)]  # (N,)
        places = np.repeat(np.arange(len(pool)), [len(moves) for moves in tried]) * 2 * len(one)
        moves = np.fromiter(chain.from_iterable(tried), int, len(places))
        gone = np.bincount(places + moves // regions * len(one) + kind_of[moves % regions], minlength=worth.size)
        # From here on (M,): what is worth a look and not tried with all of its kind.
        at = np.flatnonzero(worth & (gone.reshape(worth.shape) < np.tile(many, 2)))
        rows, moves = np.divmod(at, 2 * len(one))
        back, kind = np.divmod(moves, len(one))
        share = moved.ravel()[at]
        predicted = self.distances[pool][rows] - np.where(back, -effect[one[kind]], effect[one[kind]]) * share
        chance = log_ndtr(-predicted / np.sqrt(spread[one[kind]] * share))
        score = self.worth_of(cost.ravel()[at]) + chance
        return Moves(pool[rows], back * regions, kind, predicted, score, order, np.append(starts, regions), self.tried)

    def kinds(self, effect: np.ndarray, spread: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Regions of which nothing tells one from the others: of equal price, effect (N,), and variance (N,), which no
        known set has told apart. Of a large picture they are most, and what is weighed is one of each kind.

        Returns:
            (N,) all regions, those of a kind side by side; (C,) where each kind starts.
        """
        u = self.universe
        changes = np.append(0, np.cumsum(self.group[1:] != self.group[:-1]))
        apart = changes[u.first] != changes[u.last - 1]  # some atoms of it are known without others
        known = np.where(apart, len(self.group) + np.arange(len(effect)), self.group[u.first])
        order = np.lexsort((spread, effect, self.region_price, known))
        ordered = [values[order] for values in (known, self.region_price, effect, spread)]
        differs = np.any([values[1:] != values[:-1] for values in ordered], axis=0)
        return order, np.flatnonzero(np.append(True, differs))

    def worth_of(self, cost: np.ndarray) -> np.ndarray:
        """Logarithm of what flips of these costs would save.

        With the logarithm of the chance that a set flips it is the set's score.
        """
        saved = np.log((self.bound + self.fine) / (np.maximum(cost, 0) + self.fine))
        with np.errstate(divide="ignore"):
            return np.log(np.maximum(saved, 0))

    def choose(self, candidates: Sequence[tuple[np.ndarray, int, int, float]]) -> list[np.ndarray]:
        """A round of the candidates, best first; one that is near another of the round tells little new."""
        sets = np.array([chosen for chosen, _, _, _ in candidates])
        variance = self.uncertainty()
        group, one = self.groups([move % len(self.effect) for _, _, move, _ in candidates])
        weight, grouped = np.bincount(group, variance), sets[:, one]
        far = between(grouped, self.sets[: self.known, one], weight)
        nearest = far.argmin(1)
        far = far[np.arange(len(sets)), nearest]
        step = sets.astype(float) - self.sets[nearest]
        predicted = self.distances[nearest] - step @ self.effects()[self.universe.atoms]
        made_of = np.array([row for _, row, _, _ in candidates])
        predicted = np.where(nearest == made_of, [p for _, _, _, p in candidates], predicted)
        worth = self.worth_of(self.costs_of(sets))
        among = between(grouped, grouped, weight)
        picked: list[int] = []
        while len(picked) < min(ROUND, self.left, len(sets)):
            score = worth + log_ndtr(-predicted / np.sqrt(np.maximum(far, 1e-12)))
            score[picked] = -np.inf
            best = lowest(-score)
            if score[best] == -np.inf and picked:
                break
            picked.append(best)
            far = np.minimum(far, among[best])
        for place in picked:
            _, row, move, _ = candidates[place]
            self.tried.setdefault(row, set()).add(move)
        return [sets[place] for place in picked]

    def update(self, first: int) -> None:
        """Learn how far effects can be trusted, from each new answer and those that lie nearest to it."""
        u = self.universe
        new = np.arange(first, self.known)
        if not len(new):
            return
        variance, effect = self.uncertainty(), self.effects()[u.atoms]
        group, one = self.groups()
        sets = self.sets[: self.known, one]
        steps = between(sets[new], sets, np.bincount(group).astype(float))
        far = between(sets[new], sets, np.bincount(group, variance))
        far[np.arange(len(new)), new] = np.inf
        pairs = {(min(a, b), max(a, b)) for a, b in zip(new, far.argmin(1), strict=True)}
        pairs |= {(min(new[i], b), max(new[i], b)) for i, b in np.argwhere(np.abs(steps - 1) < 1e-6)}
        for a, b in sorted(pairs):
            differ = self.sets[a] ^ self.sets[b]
            sign = np.where(self.sets[b][differ], 1.0, -1.0)
            change = self.distances[a] - self.distances[b]
            missed = change - float(sign @ effect[differ])
            blame = variance[differ] / variance[differ].sum()
            self.squares[differ] += (blame * missed) ** 2
            self.times[differ] += blame
            if len(sign) == 1:
                atom = int(np.flatnonzero(differ)[0])
                place, alone = u.modality[u.atoms[atom]], self.effect[u.atoms[atom]]
                self.both[place] = FORGET * (self.both[place] + change * sign[0] * alone)
                self.alone[place] = FORGET * (self.alone[place] + alone**2)


def between(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(n, m) the summed weights (A,) of the atoms in which sets a (n, A) and b (m, A) differ, to some five digits.

    Many are equal but for their last bits, which come with the model's batch size: these are not to say which is least.
    """
    weighted, b = a * weight, b.astype(float)
    share, power = np.frexp(np.maximum(weighted.sum(1)[:, None] + b @ weight - 2 * weighted @ b.T, 0))
    return np.ldexp(np.rint(share * DIGITS), power) / DIGITS


def highest(values: np.ndarray, most: int) -> np.ndarray:
    """Places of the highest values from the top down, at least `most` where there are so many; none of -inf.

    Of equal ones the first comes first.
    """
    least = np.partition(values, -most)[-most] if len(values) > most else -np.inf
    places = np.flatnonzero((values >= least) & (values > -np.inf))
    return places[np.argsort(-values[places], kind="stable")]
