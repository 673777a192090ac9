"""Decoupling in a few rounds of questions, for training: a strong removal a sample, at the price of some forwards."""

from __future__ import annotations

from collections.abc import Sequence

from muroan.attacks.base import Ask, Attack, AttackedSample, BudgetExhausted, Search, descend
from muroan.attacks.greedy import ROUNDING, ranked
from muroan.errors import check_whole
from muroan.modalities import Removal


class DecouplingFast(Attack):
    """Greedy joint removal among random regions: what adversarial training can afford at every step.

    Each round draws regions (a modality, a depth in its tree and a place, each uniformly), asks what is removed so far
    together with each of them, and keeps the best. The first flip ends it. What is returned is the removal with the
    lowest margin, a flip or not: training gains from both. All questions of a round are independent, so that a batch
    of samples fills batches of the model. For measuring robustness, `Decoupling` is the one: it minimises.

    Args:
        rounds: most regions that a removal has.
        width: regions drawn a round.
        modalities: attack these alone; null for all.
        valid_only: take only removals after which the label is still right, where the dataset can tell; else training
            on them would teach wrong labels.

    Raises:
        MuroanError: a number below 1; modalities that the model does not have.
    """

    def __init__(
        self, rounds: int = 2, width: int = 8, modalities: Sequence[str] | None = None, valid_only: bool = True
    ):
        check_whole("attack", rounds=rounds, width=width)
        self.rounds, self.width, self.valid_only = rounds, width, valid_only
        self.modalities = modalities

    def search(self, sample: AttackedSample) -> Search:
        names = sample.chosen(self.modalities)
        best, lowest = Removal(), sample.clean.margin
        for _ in range(self.rounds):
            roots = [sample.root(names[sample.rng.integers(len(names))]) for _ in range(self.width)]
            drawn = [descend(root, sample.modalities, sample.threat_model, sample.rng) for root in roots]
            removals = [best | Removal.of(region) for region in drawn]
            if self.valid_only and sample.valid is not None:
                removals = [removal for removal in removals if sample.valid(removal) is not False]
            try:
                responses = yield Ask(removals, "round")
            except BudgetExhausted as refusal:
                responses = refusal.responses
            if responses:
                first = int(ranked([response.margin for response in responses])[0])
                if lowest - responses[first].margin > ROUNDING:
                    best, lowest = removals[first], responses[first].margin
            if lowest < 0 or len(responses) < len(removals):
                break
        return best if best.regions else None
