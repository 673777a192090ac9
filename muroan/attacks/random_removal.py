"""The control that every guided attack must beat: removals drawn at random."""

from __future__ import annotations

from collections.abc import Sequence

from muroan.attacks.base import Ask, Attack, AttackedSample, BudgetExhausted, Search
from muroan.attacks.greedy import Smallest
from muroan.errors import MuroanError, check_names, check_whole
from muroan.modalities import Removal, removed_elements

REPEATS = 4  # draws that bring nothing new, for each query of the budget, until there seems to be nothing new


class RandomRemoval(Attack):
    """Draw removals from the same regions as the guided attacks; keep the smallest that flips.

    Args:
        draws: removals drawn, repeats included; null for as many different ones as the budget allows.
        max_parts: each draw takes 1 to `max_parts` regions, the number drawn uniformly.
        modalities: remove from these alone, as a control of attacks that do; null for all.
    """

    guided = False
    control = True

    def __init__(self, draws: int | None = 20, max_parts: int = 3, modalities: Sequence[str] | None = None):
        check_whole("attack", max_parts=max_parts, **({} if draws is None else {"draws": draws}))
        check_names("attack", modalities=modalities)
        self.draws, self.max_parts, self.modalities = draws, max_parts, modalities
        self.name = "_".join(["random_removal", *(modalities or []), *(["budget"] if draws is None else [])])

    def search(self, sample: AttackedSample) -> Search:
        names = () if self.modalities is None else sample.chosen(self.modalities)
        if self.draws is None:
            removals = self.different(sample, names)
        else:
            removals = [self.draw(sample, names) for _ in range(self.draws)]
        smallest = Smallest(sample)
        try:
            smallest.see(removals, (yield Ask(removals, phase="draw")))
        except BudgetExhausted as refusal:
            smallest.see(removals, refusal.responses)
        return smallest.removal

    def draw(self, sample: AttackedSample, names: Sequence[str]) -> Removal:
        return sample.draw(int(sample.rng.integers(1, self.max_parts + 1)), *names)

    def different(self, sample: AttackedSample, names: Sequence[str]) -> list[Removal]:
        """As many removals of different elements as may be asked, or as there seem to be."""
        most, found = sample.threat_model.max_queries, dict[tuple[tuple[str, int], ...], Removal]()
        if most is None:
            raise MuroanError("attack.draws=null never ends without a budget: set threat_model.max_queries")
        repeats = 0
        while len(found) < most and repeats < REPEATS * most:
            removal = self.draw(sample, names)
            key = tuple(sorted(removed_elements(removal, sample.layouts).items()))
            repeats += key in found
            found.setdefault(key, removal)
        return list(found.values())
