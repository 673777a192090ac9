"""Occlusion sensitivity made an attack: remove first what alone lowers the margin most."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from muroan.attacks.base import Ask, Attack, AttackedSample, BudgetExhausted, Search
from muroan.attacks.greedy import ROUNDING, Smallest, prune, ranked
from muroan.modalities import Region, Removal


class GreedyOcclusion(Attack):
    """Greedy removal by occlusion sensitivity.

    1. Rank: every finest region of every modality is removed alone; the lower the margin, the earlier it comes
       (Zeiler and Fergus 2013, arXiv 1311.2901).
    2. Add: regions go in that order, the most relevant first, until the label flips (Samek et al. 2015,
       arXiv 1509.06321).
    3. Prune: a part is dropped if it still flips without it, until no single part can be dropped.

    With `rerank`, all that is left is asked again after each addition, and the best in context is added: the greedy
    form of our own, which is named `greedy_occlusion_rerank`. Margins that are equal up to rounding go by position.
    When the budget runs out, the smallest flip so far is returned.

    Args:
        rerank: ask again after each addition, which costs as many queries as there are regions left.
        prune: whether to prune.
    """

    def __init__(self, rerank: bool = False, prune: bool = True):
        self.rerank, self.prune = rerank, prune
        if rerank:
            self.name = "greedy_occlusion_rerank"

    def search(self, sample: AttackedSample) -> Search:
        smallest = Smallest(sample)
        try:
            yield from self.in_context(sample, smallest) if self.rerank else self.in_order(sample, smallest)
            if self.prune:
                yield from prune(sample, smallest)
        except BudgetExhausted:
            pass
        return smallest.removal

    def in_order(self, sample: AttackedSample, smallest: Smallest) -> Generator[Ask, Any, None]:
        """Rank once, then add until the label flips."""
        parts = sample.atoms()
        margins = yield from self.margins(sample, smallest, Removal(), parts)
        order = [parts[i] for i in ranked(margins)]
        added = (Removal(tuple(order[:count])) for count in range(1, len(order) + 1))
        responses = yield Ask(added, phase="add", until=sample.flipped)
        smallest.see([Removal(tuple(order[: len(responses)]))], responses[-1:])

    def in_context(self, sample: AttackedSample, smallest: Smallest) -> Generator[Ask, Any, None]:
        """Add whatever lowers the margin most beside what is already removed, until the label flips."""
        left, removed = sample.atoms(), Removal()
        while left and smallest.removal is None:
            margins = yield from self.margins(sample, smallest, removed, left)
            best = next(i for i, margin in enumerate(margins) if margin < min(margins) + ROUNDING)
            removed |= Removal.of(left.pop(best))

    def margins(
        self, sample: AttackedSample, smallest: Smallest, removed: Removal, parts: list[Region]
    ) -> Generator[Ask, Any, list[float]]:
        """The margin with each of the parts removed as well."""
        removals = [removed | Removal.of(part) for part in parts]
        try:
            responses = yield Ask(removals, phase="rank")
        except BudgetExhausted as refusal:
            smallest.see(removals, refusal.responses)
            raise
        smallest.see(removals, responses)
        return [response.margin for response in responses]
