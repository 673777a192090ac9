"""The control that every guided attack must beat: removals drawn at random."""

from __future__ import annotations

from muroan.attacks.base import Ask, Attack, AttackedSample, BudgetExhausted, Search
from muroan.attacks.greedy import Smallest
from muroan.errors import MuroanError, check_whole
from muroan.modalities import Removal, removed_elements

REPEATS = 4  # draws that bring nothing new, for each query of the budget, until there seems to be nothing new


class RandomRemoval(Attack):
    """Draw removals from the same regions as the guided attacks; keep the smallest that flips.

    Args:
        draws: removals drawn, repeats included; null for as many different ones as the budget allows.
        max_parts: each draw takes 1 to `max_parts` regions, the number drawn uniformly.
    """

    guided = False
    control = True

    def __init__(self, draws: int | None = 20, max_parts: int = 3):
        check_whole("attack", max_parts=max_parts, **({} if draws is None else {"draws": draws}))
        self.draws, self.max_parts = draws, max_parts
        if draws is None:
            self.name = "random_removal_budget"

    def search(self, sample: AttackedSample) -> Search:
        if self.draws is None:
            removals = self.different(sample)
        else:
            removals = [self.draw(sample) for _ in range(self.draws)]
        smallest = Smallest(sample)
        try:
            smallest.see(removals, (yield Ask(removals, phase="draw")))
        except BudgetExhausted as refusal:
            smallest.see(removals, refusal.responses)
        return smallest.removal

    def draw(self, sample: AttackedSample) -> Removal:
        return sample.draw(int(sample.rng.integers(1, self.max_parts + 1)))

    def different(self, sample: AttackedSample) -> list[Removal]:
        """As many removals of different elements as may be asked, or as there seem to be."""
        most, found = sample.threat_model.max_queries, dict[tuple[tuple[str, int], ...], Removal]()
        if most is None:
            raise MuroanError("attack.draws=null never ends without a budget: set threat_model.max_queries")
        repeats = 0
        while len(found) < most and repeats < REPEATS * most:
            removal = self.draw(sample)
            key = tuple(sorted(removed_elements(removal, sample.layouts).items()))
            repeats += key in found
            found.setdefault(key, removal)
        return list(found.values())
