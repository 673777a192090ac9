"""The truth on small inputs: every removal, the smallest first."""

from __future__ import annotations

from itertools import islice

from muroan.attacks.base import Ask, Attack, AttackedSample, Search
from muroan.attacks.universe import ascending
from muroan.errors import MuroanError, check_whole
from muroan.modalities import Removal


class Exhaustive(Attack):
    """Ask every set of finest regions, by the number of elements that it removes, until one flips.

    What it finds is the smallest flip that there is, and `proven` says so; finding none proves that there is none. Of
    sets of one size, those of fewer regions come first, then the order of the universe decides. Its limit is our own
    choice: 65,535 removals.

    Args:
        max_atoms: the most finest regions that a sample may have; each one more doubles the removals.
    """

    guided = False

    def __init__(self, max_atoms: int = 16):
        check_whole("attack", max_atoms=max_atoms)
        self.max_atoms = max_atoms

    def search(self, sample: AttackedSample) -> Search:
        """
        Raises:
            MuroanError: the sample has more than `max_atoms` regions.
        """
        parts = sample.atoms()
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
