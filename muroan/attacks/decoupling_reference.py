"""The decoupling attack of arXiv 2112.12792 as its authors released it."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import chain, combinations, islice
from typing import Literal

from muroan.attacks.base import Ask, Attack, AttackedSample, Response, Search
from muroan.errors import MuroanError, check_whole
from muroan.modalities import Region, Removal, Text


class DecouplingReference(Attack):
    """Decoupling (Vishwamitra et al., "Understanding and Measuring Robustness of Multimodal Learning", 2021).

    1. Salient datapoints: a region (a word) is salient when occluding it alone moves the argmax of the fusion
       embedding. Salient regions are descended into, depth first.
    2. Coupled datapoints: combinations of 1, 2, 3, … salient datapoints in lexicographic order, regions by
       ascending area (ties in order of discovery), then words in order.
    3. Decoupled datapoints: the first combination whose prediction differs.

    `info` records how many datapoints were salient, how many combinations were tried, and `released_size`, what
    the released code reports: the last member of the winning combination alone, in percent of all elements.

    Args:
        max_combinations: combinations tried at most (500 in the released code).
        coupling: `combinations`, as released, or `pairs`, the cross-modal pairs that the paper's figure draws.

    For an image of even sides the regions are those of the released code; for odd sides its boxes overlap their
    neighbours by a pixel, while ours tile.
    """

    def __init__(self, max_combinations: int = 500, coupling: Literal["combinations", "pairs"] = "combinations"):
        if coupling not in ("combinations", "pairs"):
            raise MuroanError(f"attack.coupling must be combinations or pairs, got {coupling!r}")
        check_whole("attack", max_combinations=max_combinations)
        self.max_combinations, self.coupling = max_combinations, coupling

    def search(self, sample: AttackedSample) -> Search:
        texts = [name for name, modality in sample.modalities.items() if isinstance(modality, Text)]
        points: list[Region] = []
        for name in (n for n in sample.modalities if n not in texts):
            points += yield from self.salient_tree(sample, sample.root(name))
        points.sort(key=lambda region: region.area)  # stable: ties stay in order of discovery
        for name in texts:
            words = sample.split(sample.root(name)) or [sample.root(name)]
            points += yield from self.salient(sample, words)

        coupled = (Removal(combination) for combination in islice(self.couple(points), self.max_combinations))
        responses = yield Ask(coupled, phase="decouple", until=sample.flipped)

        sample.info["salient_points"] = {n: sum(p.modality == n for p in points) for n in sample.modalities}
        sample.info["combinations"] = len(responses)
        if not responses or not sample.flipped(responses[-1]):
            return None
        winner = next(islice(self.couple(points), len(responses) - 1, None))
        sample.info["released_size"] = sample.size(Removal.of(winner[-1]))
        return Removal(winner)

    def salient(self, sample: AttackedSample, regions: list[Region]) -> Generator[Ask, list[Response], list[Region]]:
        """Those of the regions that move the argmax of the fusion embedding when occluded alone."""
        # Labels are not looked at before the last phase.
        responses = yield Ask([Removal.of(region) for region in regions], phase="salient", admissible=False)
        argmax = sample.clean.embedding_argmax
        return [region for region, r in zip(regions, responses, strict=True) if r.embedding_argmax != argmax]

    def salient_tree(self, sample: AttackedSample, region: Region) -> Generator[Ask, list[Response], list[Region]]:
        """The salient regions below a region, depth first."""
        children = sample.split(region)
        if not children:
            return []
        found: list[Region] = []
        for child in (yield from self.salient(sample, children)):
            found.append(child)
            found += yield from self.salient_tree(sample, child)
        return found

    def couple(self, points: list[Region]) -> Iterator[tuple[Region, ...]]:
        if self.coupling == "pairs":
            return (pair for pair in combinations(points, 2) if pair[0].modality != pair[1].modality)
        return chain.from_iterable(combinations(points, size) for size in range(1, len(points) + 1))
