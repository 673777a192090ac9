"""How attacks on the same model compare, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from muroan.metrics import bootstrap, curve_score
from muroan.results import AttackResult
from muroan.runs import Run

UNCONTROLLED = (
    "whether the search is any better than a random one cannot be told without random removals under the same threat "
    "model and in the same modalities: run attack=random_removal, or with the same attack.modalities one such as "
    "attack=random_removal_image."
)


def by_target(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs of each target, in the report's order."""
    return [list(group) for _, group in groupby(runs, key=lambda run: run.target)]


@dataclass(frozen=True)
class AgainstControl:
    """A guided attack against a random control on the same samples.

    Attributes:
        n: samples that both attacked.
        success: difference of the success rates in percentage points, with its paired bootstrap interval.
        area: the same of the area under the success curve, in which smaller removals count more.
    """

    guided: Run
    control: Run
    n: int
    success: dict[str, float | None]
    area: dict[str, float | None]

    @property
    def better(self) -> bool:
        """Whether the guided attack flips more, or by smaller removals, beyond what chance explains."""
        return self.area["low"] is not None and self.area["low"] > 0


def attacked_ids(run: Run) -> list[str]:
    """(A,) which samples were attacked."""
    return [r.id for r in run.records if r.attacked]


def flip_sizes(run: Run) -> np.ndarray:
    """(A,) decoupled fraction, in percent, that flips each attacked sample; infinite for one that was not flipped."""
    return np.array([r.decoupled_fraction if r.flipped else np.inf for r in run.records if r.attacked])


def flip_queries(run: Run) -> np.ndarray:
    """(A,) queries after which each attacked sample was first seen flipped; infinite for one that was not.

    Records of older versions do not say when: theirs is the number of all their queries.
    """

    def first(r: AttackResult) -> float:
        return min((queries for queries, _ in r.trajectory), default=r.queries)

    return np.array([first(r) if r.flipped else np.inf for r in run.records if r.attacked], dtype=float)


def shared(a: Run, b: Run) -> list[tuple[AttackResult, AttackResult]]:
    """The records of two runs for each sample that both attacked, by its id."""
    theirs = {r.id: r for r in b.records if r.attacked}
    return [(r, theirs[r.id]) for r in a.records if r.attacked and r.id in theirs]


def success_differences(pairs: Sequence[tuple[AttackResult, AttackResult]]) -> np.ndarray:
    """(N,) 100 where only the first flips, -100 where only the second does; the mean is in percentage points."""
    return np.array([100.0 * (r.flipped - other.flipped) for r, other in pairs])


def area_differences(pairs: Sequence[tuple[AttackResult, AttackResult]]) -> np.ndarray:
    """(N,) how much more the first contributes to the area under its success curve, in percentage points."""

    def area(r: AttackResult) -> float:
        return 100 * curve_score(r.decoupled_fraction) if r.flipped else 0.0

    return np.array([area(r) - area(other) for r, other in pairs])


def against_controls(runs: Sequence[Run]) -> list[AgainstControl]:
    """Every guided attack against every random control on the same target, paired by sample id.

    Corruptions, attacks that try what they try whatever the model says, and controls that may do something else or are
    after something else are left out.
    """
    found = []
    for group in by_target(runs):
        for control in (run for run in group if run.is_control):
            for guided in (run for run in group if run.is_guided and run.must_beat(control)):
                pairs = shared(guided, control)
                success, area = bootstrap(success_differences(pairs)), bootstrap(area_differences(pairs))
                found.append(AgainstControl(guided, control, len(pairs), success, area))
    return found


def without_control(runs: Sequence[Run]) -> list[Run]:
    """Those of some attacks on one target that search for flips by removal, where none did the same at random: nobody
    can tell whether the search is worth its questions. Goals that random removal has not are left out."""
    guided = (run for run in runs if run.kind == "removal" and run.is_guided and not run.goal)
    return [run for run in guided if not any(run.must_beat(other) for other in runs)]
