"""What the figures of a report are called, how they are written, and the tables of one attack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from muroan.metrics import CURVE_LIMIT
from muroan.report.markup import escaped
from muroan.report.paired import AgainstControl
from muroan.runs import KINDS, Run

Unit = Literal["rate", "fraction", "count"]

NOTHING = "–"  # stands where there is nothing to measure


@dataclass(frozen=True)
class Column:
    """A metric of `muroan.metrics.summarise` as the report shows it.

    Attributes:
        optional: left out of a table whose runs have nothing to say in it.
    """

    metric: str
    heading: str
    unit: Unit
    optional: bool = False

    @property
    def suffix(self) -> str:
        return "" if self.unit == "count" else "%"


VALID = Column("valid_success_rate", "valid success rate", "rate", optional=True)
BACKWARDS = Column("backwards", "backwards", "count", optional=True)

MAIN = (
    Column("clean_accuracy", "clean accuracy", "rate"),
    Column("robust_accuracy", "robust accuracy", "rate"),
    Column("attack_success_rate", "success rate", "rate"),
    VALID,
    Column("decoupled_fraction_mean", "decoupled fraction, mean", "fraction"),
    Column("decoupled_fraction_median", "decoupled fraction, median", "fraction"),
    Column("queries", "queries", "count"),
)

DEFINITIONS = {
    "clean accuracy": "samples that the model gets right without attack, over all samples.",
    "robust accuracy": "samples that it still gets right after the attack, over all samples.",
    "success rate": "samples whose prediction the attack flips (or moves to its target, or whose fusion embedding it "
    "moves, if that is its goal), over attacked samples. A sample that the model gets wrong beforehand is skipped and "
    "never counted as a success.",
    "valid success rate": "samples that the attack flips and whose true label the removal leaves right, says the "
    "dataset, over attacked samples. Only where the dataset can tell.",
    "decoupled fraction": "removed elements (pixels, words, audio samples), each counted once, over all elements "
    "of the input; mean and median over flipped samples. By modality: over the elements of that modality alone. Of a "
    "value-choosing attack or a corruption it is the changed fraction: elements that have another value.",
    "value-choosing": "an attack that chooses new values for elements instead of removing them (a perturbation). It "
    "can do strictly more, so its figures are not those of a removal of the same size.",
    "corruption": "noise or damage that nobody chose: how the model stands up to nature, not to an attacker.",
    "curve area": "area under the curve of success rate against decoupled fraction, from 0 to "
    f"{CURVE_LIMIT:g} % of the input, over the largest possible area.",
    "queries": "different questions that the attack asked the model, mean over attacked samples; a backward pass is "
    "one, too.",
    "forwards": "times that the model ran for a sample, checks of the result included, mean over attacked samples.",
    "backwards": "times that a gradient was taken for a sample, mean over attacked samples.",
    "cache hits": "questions answered without a run, because the same elements had been removed before, mean over "
    "attacked samples.",
    "one-minimal": "flipped samples in which putting any one removed part back restores the prediction, over those "
    "where that was checked.",
    "proven": "flipped samples of which the attack shows that no removal of its universe that is smaller, by its "
    "objective, flips; over those of attacks that can tell.",
    "interaction": "flipped samples in which the removal flips only jointly: none of its one-modality parts does "
    "alone; over those where that was checked.",
    "modality share": "flipped samples whose removal lies in one modality alone, or in several jointly; over flipped "
    "samples.",
    "interval": "95 % percentile bootstrap over samples, 1000 resamples, fixed seed; that of a rate reaches as far "
    "from 0 and 100 % as Clopper and Pearson's does there, where all resamples are the same.",
}

STATUSES = {
    "flipped": "the prediction changed, or whatever else the attack is after was reached",
    "held": "the attack found nothing and gave up",
    "budget_exhausted": "the attack ran out of queries",
    "skipped": "the model was wrong before the attack, or the sample is of the class that the attack is after",
}


SEARCH = (
    Column("curve_area", "curve area", "rate"),
    Column("one_minimal", "one-minimal", "rate"),
    Column("proven", "proven", "rate", optional=True),
    Column("interaction", "interaction", "rate"),
    Column("forwards", "forwards", "count"),
    BACKWARDS,
    Column("cache_hits", "cache hits", "count"),
)


def present(columns: Sequence[Column], runs: Sequence[Run]) -> list[Column]:
    """The columns less the optional ones that no run has anything to say in."""
    return [c for c in columns if not c.optional or any(_says(run, c) for run in runs)]


def _says(run: Run, column: Column) -> bool:
    # That nothing was proven, or no success was valid, is a finding; that nobody took a gradient is not.
    value = run.value(column.metric)
    return value is not None and (value > 0 or column.unit != "count")


def by_modality(runs: Sequence[Run]) -> list[Column]:
    """The decoupled fractions of every modality that a run has."""
    return [
        Column(f"decoupled_fraction_{name}_{how}", f"{name} fraction, {how}", "fraction")
        for name in sorted({name for run in runs for name in run.modalities})
        for how in ("mean", "median")
    ]


def whole(n: float) -> str:
    """A whole number with thin spaces between thousands."""
    return f"{n:,.0f}".replace(",", "\u202f")


def decimals(value: float, unit: Unit) -> int:
    """How many decimals a figure deserves: a rate has one, a small fraction two digits that mean something."""
    if unit == "rate":
        return 1
    if unit == "count":
        return 0 if abs(value) >= 100 else 1
    if value == 0 or abs(value) >= 10:
        return 1
    return 2 if abs(value) >= 0.1 else 1 - math.floor(math.log10(abs(value)))


def figure(value: float | None, unit: Unit, like: float | None = None) -> str:
    """A figure as text, with the decimals that `like` would have."""
    if value is None:
        return NOTHING
    places = decimals(value if like is None else like, unit)
    return f"{value:,.{places}f}".replace(",", "\u202f")


def interval(estimate: Mapping[str, float | None], unit: Unit) -> str:
    """`low, high` with as many decimals as the value; empty where there is none."""
    if estimate.get("low") is None:
        return ""
    return f"{figure(estimate['low'], unit, estimate['value'])}, {figure(estimate['high'], unit, estimate['value'])}"


def cell(run: Run, column: Column) -> tuple[str, str]:
    """A metric of a run and its interval, as text."""
    estimate = run.summary.get(column.metric, {})
    return figure(estimate.get("value"), column.unit), interval(estimate, column.unit)


def markdown(runs: Sequence[Run]) -> str:
    """The tables in Markdown, figures with their intervals in brackets, and what they mean."""

    def table(columns: Sequence[Column]) -> str:
        heads = [f"{c.heading} ({c.suffix})" if c.suffix else c.heading for c in columns]
        lines = [["run", "n", *heads], [":--", *["--:"] * (1 + len(heads))]]
        for run in runs:
            texts = (cell(run, c) for c in columns)
            figures = [f"{value} [{span}]" if span else value for value, span in texts]
            n = whole(len(run.records)) + ("" if run.finished else " (unfinished)")
            kind = f" ({KINDS[run.kind]})" if KINDS[run.kind] else ""
            lines.append([escaped(run.label) + kind, n, *figures])
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    terms = "; ".join(f"*{term}*: {meaning.rstrip('.')}" for term, meaning in DEFINITIONS.items())
    parts = (present(MAIN, runs), by_modality(runs), present(SEARCH, runs))
    return "\n".join(map(table, parts)) + f"\n{terms}.\n"


def summary(runs: Sequence[Run], comparisons: Sequence[AgainstControl]) -> dict[str, Any]:
    """Everything measured, and where it comes from, as plain JSON."""
    kept = ("attack", "model", "dataset", "fingerprint", "seed", "checkpoint", "versions", "config")
    return {
        "runs": [
            {
                "label": run.label,
                "folder": run.folder,
                "kind": run.kind,
                **{key: run.about.get(key) for key in kept},
                "finished": run.finished,
                "records": len(run.records),
                "statuses": {status: run.statuses[status] for status in STATUSES},
                "unreadable": run.unreadable,
                "disagreements": run.about.get("disagreements"),
                "metrics": run.summary,
            }
            for run in runs
        ],
        "against_random": [
            {
                "guided": c.guided.label,
                "control": c.control.label,
                "samples": c.n,
                "attack_success_rate_difference": c.success,
                "curve_area_difference": c.area,
            }
            for c in comparisons
        ],
    }
