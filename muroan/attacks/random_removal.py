"""The control that every guided attack must beat: removals drawn at random."""

from __future__ import annotations

from muroan.attacks.base import Ask, Attack, AttackedSample, BudgetExhausted, Search
from muroan.attacks.greedy import Smallest
from muroan.errors import MuroanError


class RandomRemoval(Attack):
    """Draw removals from the same regions as the guided attacks; keep the smallest that flips.

    Args:
        draws: removals asked; null for as many as the budget allows.
        max_parts: each draw takes 1 to `max_parts` regions, the number drawn uniformly.
    """

    guided = False
    control = True

    def __init__(self, draws: int | None = 20, max_parts: int = 3):
        if (draws is not None and draws < 1) or max_parts < 1:
            raise MuroanError(f"attack.draws and attack.max_parts must be at least 1, got {draws} and {max_parts}")
        self.draws, self.max_parts = draws, max_parts
        if draws is None:
            self.name = "random_removal_budget"

    def search(self, sample: AttackedSample) -> Search:
        draws = sample.threat_model.max_queries if self.draws is None else self.draws
        if draws is None:
            raise MuroanError("attack.draws=null never ends without a budget: set threat_model.max_queries")
        removals = [sample.draw(int(sample.rng.integers(1, self.max_parts + 1))) for _ in range(draws)]
        smallest = Smallest(sample)
        try:
            smallest.see(removals, (yield Ask(removals, phase="draw")))
        except BudgetExhausted as refusal:
            smallest.see(removals, refusal.responses)
        return smallest.removal
