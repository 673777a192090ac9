"""What if a modality is missing? The coarsest removals that there are."""

from __future__ import annotations

from itertools import chain, combinations

from muroan.attacks.base import Ask, Attack, AttackedSample, BudgetExhausted, Search
from muroan.attacks.greedy import Smallest
from muroan.errors import MuroanError
from muroan.modalities import Removal


class MissingModality(Attack):
    """Remove whole modalities (Ma et al. 2022, arXiv 2204.05454, "Are Multimodal Transformers Robust to Missing
    Modality?"); the threat model's replacement stands in for them.

    All sets of modalities are asked, but not all of them together. The smallest flip is returned; `info` says for
    each modality whether the label flips without it alone. There is nothing to set.
    """

    guided = False

    def search(self, sample: AttackedSample) -> Search:
        """
        Raises:
            MuroanError: the model takes one modality alone, so that nothing would be left.
        """
        names = proper_subsets(self.name, tuple(sample.modalities))
        removals = [Removal.of(*map(sample.root, chosen)) for chosen in names]
        smallest = Smallest(sample)
        try:
            responses = yield Ask(removals, phase="miss")
        except BudgetExhausted as refusal:
            responses = refusal.responses
        smallest.see(removals, responses)
        answers = zip(names, responses, strict=False)
        sample.info["flips_without"] = {chosen[0]: sample.flipped(r) for chosen, r in answers if len(chosen) == 1}
        return smallest.removal


def proper_subsets(attack: str, names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The sets of 1 to n - 1 of n modalities, the small ones first.

    Raises:
        MuroanError: there is one alone.
    """
    if len(names) < 2:
        raise MuroanError(f"{attack} leaves at least one modality as it is; the model takes {', '.join(names)} alone")
    return list(chain.from_iterable(combinations(names, size) for size in range(1, len(names))))
