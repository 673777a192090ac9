"""Leave one out: does a single word decide the label?"""

from __future__ import annotations

from muroan.attacks.base import Ask, Attack, AttackedSample, BudgetExhausted, Search
from muroan.attacks.greedy import Smallest
from muroan.errors import MuroanError
from muroan.modalities import Removal, Text


class LeaveOneOut(Attack):
    """Remove each word alone (Li, Monroe and Jurafsky 2016, arXiv 1612.08220, "representation erasure").

    It flips only where one word suffices. There is nothing to set in the paper but what is erased.

    Args:
        every: also remove each finest region of the other modalities alone.
    """

    guided = False

    def __init__(self, every: bool = False):
        self.every = every

    def search(self, sample: AttackedSample) -> Search:
        """
        Raises:
            MuroanError: the model takes no text, and `every` is not set.
        """
        texts = [name for name, modality in sample.modalities.items() if isinstance(modality, Text)]
        if not texts and not self.every:
            raise MuroanError(
                f"leave_one_out removes words, the model takes {', '.join(sample.modalities)} and no text: "
                f"set attack.every=true to remove each region of any modality"
            )
        removals = [Removal.of(atom) for atom in sample.atoms() if self.every or atom.modality in texts]
        smallest = Smallest(sample)
        try:
            smallest.see(removals, (yield Ask(removals, phase="leave")))
        except BudgetExhausted as refusal:
            smallest.see(removals, refusal.responses)
        return smallest.removal
