"""Attacks side by side: the table attack by model, paired tests on shared samples, and success within a budget."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from muroan.metrics import columns, pooled
from muroan.report import plots
from muroan.report.markup import Line, TextTable, latex_grid, markdown_grid, write_csv
from muroan.report.paired import UNCONTROLLED, area_differences, shared, success_differences, without_control
from muroan.report.significance import holm, over_seeds, probability, sign_flip
from muroan.report.tables import DEFINITIONS, MAIN, SEARCH, by_modality, figure, interval, present, whole
from muroan.report.tables import Column as Metric
from muroan.results import Kind
from muroan.runs import KINDS, READABLE, Run, differences, find_runs

Estimate = Mapping[str, float | None]

HEADINGS: dict[Kind, str] = {
    "removal": "removal attacks",
    "perturbation": "value-choosing attacks (stronger threat model)",
    "corruption": "natural corruptions, not attacks",
}

_METRICS = {metric.metric: metric for metric in (*MAIN, *SEARCH)}
OUTCOME = [
    _METRICS[name]
    for name in ("clean_accuracy", "robust_accuracy", "attack_success_rate", "valid_success_rate", "curve_area")
]
SIZE = [_METRICS["decoupled_fraction_mean"], _METRICS["decoupled_fraction_median"]]
COST = [_METRICS[name] for name in ("queries", "forwards", "backwards")]
# Shown with theirs; the CSV has all.
INTERVALS = ["clean_accuracy", "robust_accuracy", "attack_success_rate", "valid_success_rate", "curve_area"]
INTERVALS += ["decoupled_fraction_mean"]


@dataclass(frozen=True)
class Row:
    """One attack on one target: a run, or its repeats with other seeds.

    Attributes:
        runs: one a seed, which the figures are of.
        name: what the attack is called, unique on its target.
        left_out: further seeds, of models that not all attacks on the target attacked.
    """

    runs: tuple[Run, ...]
    name: str = ""
    left_out: tuple[Run, ...] = ()

    @property
    def attack(self) -> str:
        return self.runs[0].attack

    @property
    def kind(self) -> Kind:
        return self.runs[0].kind

    @property
    def is_control(self) -> bool:
        return self.runs[0].is_control

    @property
    def is_guided(self) -> bool:
        return self.runs[0].is_guided

    @property
    def rules(self) -> str:
        return self.runs[0].rules

    @property
    def label(self) -> str:
        """The name, with what kind of attack it is unless it removes."""
        return f"{self.name} ({KINDS[self.kind]})" if KINDS[self.kind] else self.name

    @property
    def every(self) -> tuple[Run, ...]:
        return (*self.runs, *self.left_out)

    @property
    def seeds(self) -> str:
        """How many there are, and of how many where some are left out."""
        return f"{len(self.runs)} of {len(self.every)}" if self.left_out else str(len(self.runs))

    @property
    def samples(self) -> int:
        """Records, over all seeds."""
        return sum(len(run.records) for run in self.runs)

    @property
    def finished(self) -> bool:
        return all(run.finished for run in self.runs)

    @cached_property
    def summary(self) -> Mapping[str, Estimate]:
        """Every metric with its interval: of one run, `metrics.summarise`; of several, the mean over seeds."""
        if len(self.runs) == 1:
            return self.runs[0].summary
        judged = any(run.judged for run in self.runs)
        parts: dict[str, list[dict[Any, float]]] = {}
        hows: dict[str, str] = {}
        for run in (run for run in self.runs if run.records):
            for name, (column, how) in columns(run.records, judged).items():
                parts.setdefault(name, []).append(run.by_id(column))
                hows[name] = how
        return {name: pooled(seeds, hows[name]) for name, seeds in parts.items()}

    def value(self, metric: str) -> float | None:
        return self.summary.get(metric, {}).get("value")


@dataclass(frozen=True)
class Target:
    """What was attacked, and the attacks on it: removals first, each kind with its random controls last.

    What was attacked may be several models, one a seed. Rows that are read side by side must be of the same models:
    theirs are those that all of these attacks attacked, unless there is none. Paired tests take what each two share.
    """

    name: str
    rows: list[Row]

    def best(self, rules: str) -> Row | None:
        """The removal attack with the largest curve area, of those under the same rules."""
        rows = (row for row in self.rows if row.kind == "removal" and row.value("curve_area") is not None)
        removals = [row for row in rows if row.rules == rules and all(run.mislabels for run in row.runs)]
        return max(removals, key=lambda row: row.value("curve_area") or 0.0, default=None)


@dataclass(frozen=True)
class Pair:
    """Two attacks on the samples that both attacked. Differences are the attack's figure less the reference's.

    Attributes:
        samples, seeds: shared samples, over all shared seeds.
        only: samples that only the attack flips, and that only the reference flips.
        success, area: differences in percentage points with paired bootstrap intervals, means over seeds.
        success_p, area_p: of the exact sign-flip test over samples, two-sided; for the success of one seed that is the
            exact McNemar test.
        success_holm, area_holm: the same, after Holm's correction over all tests of the table.
    """

    target: Target
    attack: Row
    reference: Row
    samples: int
    seeds: int
    only: tuple[int, int]
    success: Estimate
    success_p: float
    area: Estimate
    area_p: float
    success_holm: float = 1.0
    area_holm: float = 1.0


@dataclass(frozen=True)
class Comparison:
    """All that is written.

    Attributes:
        pairs: on each target, every attack against the random controls and against the best removal attack under the
            same threat model and with the same goal.
        warnings: guided attacks that a random control keeps up with.
        notes: what was left out or not pooled.
    """

    targets: list[Target]
    pairs: list[Pair]
    warnings: list[str]
    notes: list[str]

    @property
    def rows(self) -> list[Row]:
        return [row for target in self.targets for row in target.rows]

    @property
    def runs(self) -> list[Run]:
        return [run for row in self.rows for run in row.runs]


def write(folders: Sequence[Path], out: Path, pool_seeds: bool = True) -> Path:
    """Compare finished, or unfinished, runs from their records alone. No model is loaded.

    The same records give the same bytes.

    Args:
        folders: run folders, or folders that hold such at any depth.
        out: folder for `compare.md`, `compare.tex` (for a document with the package booktabs), `compare.csv` (a row
            a run), `pooled.csv` (a row an attack, only where there are repeats), `pairs.csv` and `compare.png`.
        pool_seeds: take runs that differ in their seed alone, and in the weights that it led to, as one. The tables and
            curves of a target are then over the seeds that all of its attacks share; a note says what is left out.

    Returns:
        The path of `compare.md`.

    Raises:
        MuroanError: a folder holds no run, or a file of a run cannot be understood.
    """
    comparison = compare(find_runs(folders), pool_seeds)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "compare.csv", _figures(Row((run,), row.name) for row in comparison.rows for run in row.every))
    (out / "pooled.csv").unlink(missing_ok=True)  # of an earlier comparison
    if any(len(row.every) > 1 for row in comparison.rows):
        write_csv(out / "pooled.csv", _figures(comparison.rows))
    write_csv(out / "pairs.csv", [_PAIR_FIELDS, *map(_pair_fields, comparison.pairs)])
    drawn = [(target.name, [(row.label, row.runs) for row in target.rows]) for target in comparison.targets]
    (out / "compare.png").write_bytes(plots.budgets(drawn))
    (out / "compare.tex").write_text(latex(comparison), encoding="utf-8")
    page = out / "compare.md"
    page.write_text(markdown(comparison), encoding="utf-8")
    return page


def compare(runs: Sequence[Run], pool_seeds: bool = True) -> Comparison:
    """The attacks of some runs by target, and paired tests between those that have a target in common."""
    rows, notes = _rows(runs, pool_seeds)
    targets = []
    for target in _targets(rows):
        even, note = _evened(target)
        targets.append(even)
        notes += note
    pairs: list[Pair] = []
    for target in targets:
        if len(target.rows) == 1:
            notes.append(f"{target.name}: {target.rows[0].name} is the only attack, so there is no paired test.")
        often = Counter(row.rules for row in target.rows)
        if len(often) > 1 and (alone := [row.name for row in target.rows if often[row.rules] == 1]):
            notes.append(
                f"{target.name}: no other attack has the threat model and the goal of {', '.join(alone)}: "
                f"no paired test."
            )
        uncontrolled = {id(run) for run in without_control([row.runs[0] for row in target.rows])}
        if len(target.rows) > 1 and uncontrolled:
            names = ", ".join(row.name for row in target.rows if id(row.runs[0]) in uncontrolled)
            notes.append(f"{target.name}, {names}: {UNCONTROLLED}")
        for attack, reference in _matches(target):
            pair = _pair(target, attack, reference)
            if pair is None:
                notes.append(
                    f"{target.name}: {attack.name} and {reference.name} attacked no sample in common, so the pair is "
                    f"left out of the tests."
                )
            else:
                pairs.append(pair)
    corrected = holm([p for pair in pairs for p in (pair.success_p, pair.area_p)])
    pairs = [
        replace(pair, success_holm=success, area_holm=area)
        for pair, success, area in zip(pairs, corrected[::2], corrected[1::2], strict=True)
    ]
    return Comparison(targets, pairs, _warnings(pairs), notes)


# ---------------------------------------------------------------------------------------------------------
# Which runs belong together


def _rows(runs: Sequence[Run], pool: bool) -> tuple[list[Row], list[str]]:
    """The runs, those that differ in their seed alone pooled; and what to say about those that were not."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_setup(run) if pool else run.folder, []).append(run)
    rows, notes = [], []
    for group in groups.values():
        group.sort(key=lambda run: (len(str(run.about.get("seed"))), str(run.about.get("seed")), run.folder))
        if len({run.about.get("seed") for run in group}) == len(group):
            rows.append(Row(tuple(group)))
            continue
        # The same seed twice is no repeat: these are other checkpoints, of other training perhaps.
        rows += [Row((run,)) for run in group]
        notes.append(
            f"{group[0].attack} on {group[0].dataset} · {group[0].model}: {len(group)} runs, some with the same seed "
            f"but other weights or folders, are not pooled."
        )
    return rows, notes


def _setup(run: Run) -> str:
    """All that two runs have in common that are repeats with another seed."""
    if not run.identity:
        return run.folder  # written by another program: nothing says what it repeats
    own = {key: value for key, value in run.identity.items() if key not in ("seed", "weights")}
    # Training is no part of an attack's identity, which has the hash of its outcome instead.
    return json.dumps([run.dataset, run.model, run.attack, own, run.training, run.hardening], sort_keys=True)


def _targets(rows: Sequence[Row]) -> list[Target]:
    """The rows by what they attacked: those with a model (dataset, name and weights) in common belong together."""
    groups: list[list[Row]] = []
    for row in rows:
        own = {run.target for run in row.runs}
        linked = [group for group in groups if any(run.target in own for other in group for run in other.runs)]
        groups = [group for group in groups if group not in linked] + [[*itertools.chain(*linked), row]]
    kinds = list(HEADINGS)
    for group in groups:
        group.sort(key=lambda row: (kinds.index(row.kind), row.is_control, row.attack, row.runs[0].folder))
    groups.sort(key=lambda group: (group[0].runs[0].target[:2], group[0].runs[0].folder))
    return [Target(name, _named(group)) for name, group in zip(_target_names(groups), groups, strict=True)]


def _evened(target: Target) -> tuple[Target, list[str]]:
    """The target with each row's runs on the models that all attacks attacked; and what to say about the others."""
    attacked = [{run.target for run in row.runs} for row in target.rows]
    shared = set.intersection(*attacked)
    if all(own == shared for own in attacked):
        return target, []
    if not shared:
        return target, [
            f"{target.name}: no seed is shared by all attacks, so that their rows are not of the same models: "
            + "; ".join(f"{row.name} has {_seeds(row.runs)}" for row in target.rows)
            + "."
        ]
    rows = [
        replace(
            row,
            runs=tuple(run for run in row.runs if run.target in shared),
            left_out=tuple(run for run in row.runs if run.target not in shared),
        )
        for row in target.rows
    ]
    left = "; ".join(f"{row.name} without {_seeds(row.left_out)}" for row in rows if row.left_out)
    kept = _seeds([run for row in rows for run in row.runs])
    return replace(target, rows=rows), [
        f"{target.name}: rows and curves are over {kept}, shared by all attacks: {left}. Paired tests take all seeds "
        f"that the two share."
    ]


def _seeds(runs: Sequence[Run]) -> str:
    found = list(dict.fromkeys(str(run.about.get("seed")) for run in runs))
    return f"seed{'s' if len(found) > 1 else ''} {', '.join(found)}"


def _target_names(groups: Sequence[Sequence[Row]]) -> list[str]:
    """`dataset · model`, with the settings, and then the weights, where that is not enough."""
    first = [group[0].runs[0] for group in groups]
    attackers = ("attack", "threat_model", "precision", "keep_media", "seed", "weights")
    names = []
    for run in first:
        own = differences(run, [other for other in first if other.target[:2] == run.target[:2]], attackers)
        settings = f" ({', '.join(own)})" if 0 < len(own) <= READABLE else ""
        names.append(f"{run.dataset} · {run.model}{settings}")
    weights = [dict.fromkeys(run.target[2][:8] for row in group for run in row.runs) for group in groups]
    return [
        f"{name} (weights {', '.join(own)})" if names.count(name) > 1 else name
        for name, own in zip(names, weights, strict=True)
    ]


def _named(group: Sequence[Row]) -> list[Row]:
    """The rows of a target, named by attack, and by settings or folder where that is not enough."""
    rows = []
    for row in group:
        others = [other for other in group if other.attack == row.attack and other is not row]
        ignore = ("weights", "seed") if len(row.runs) > 1 else ("weights",)
        own = differences(row.runs[0], [other.runs[0] for other in others], ignore)
        rows.append(replace(row, name=f"{row.attack} ({', '.join(own)})" if 0 < len(own) <= READABLE else row.attack))
    names = [row.name for row in rows]
    return [
        replace(row, name=f"{row.attack} ({row.runs[0].folder})") if names.count(row.name) > 1 else row for row in rows
    ]


# ---------------------------------------------------------------------------------------------------------
# Paired tests


def _matches(target: Target) -> list[tuple[Row, Row]]:
    """(attack, reference): every attack against the random controls, then every one against the best removal.

    Both under the same rules: a budget, a replacement or a goal of its own makes another contest, and the modalities
    that a search keeps to do against a control.
    """
    guided = [row for row in target.rows if not row.is_control]
    found = [(row, c) for c in target.rows for row in guided if row.runs[0].must_beat(c.runs[0])]
    for rules in dict.fromkeys(row.rules for row in guided):
        best = target.best(rules)
        if best is not None and not best.is_control:
            found += [(row, best) for row in guided if row is not best and row.rules == rules]
    return found


def _run_pairs(attack: Row, reference: Row) -> list[tuple[Run, Run]]:
    """Runs on the same weights, of the same seed where there is one; none is used twice."""
    left = list(reference.every)
    found: list[tuple[Run, Run]] = []
    for same_seed in (True, False):
        taken = {id(run) for run, _ in found}
        for run in attack.every:
            fits = (
                other
                for other in left
                if other.target == run.target and (not same_seed or other.about.get("seed") == run.about.get("seed"))
            )
            other = next(fits, None)
            if id(run) not in taken and other is not None:
                left.remove(other)
                found.append((run, other))
    return found


def _pair(target: Target, attack: Row, reference: Row) -> Pair | None:
    """Two attacks on their shared samples; None when there are none."""
    found = [pairs for a, b in _run_pairs(attack, reference) if (pairs := shared(a, b))]
    if not found:
        return None
    ids = [[r.id for r, _ in pairs] for pairs in found]
    success = [success_differences(pairs) for pairs in found]
    areas = [area_differences(pairs) for pairs in found]
    every = np.concatenate(success)
    only = int((every > 0).sum()), int((every < 0).sum())
    success_seeds, area_seeds = (
        [dict(zip(own, column.tolist(), strict=True)) for own, column in zip(ids, of_seeds, strict=True)]
        for of_seeds in (success, areas)
    )
    return Pair(
        target,
        attack,
        reference,
        samples=len(every),
        seeds=len(found),
        only=only,
        success=pooled(success_seeds),
        success_p=sign_flip(over_seeds(success_seeds)),
        area=pooled(area_seeds),
        area_p=sign_flip(over_seeds(area_seeds)),
    )


def _warnings(pairs: Iterable[Pair]) -> list[str]:
    """Guided removal attacks whose curve area is not above a random control's beyond what chance explains."""
    return [
        f"guided search is no better than random on {pair.target.name}: the curve area of {pair.attack.name} less that "
        f"of {pair.reference.name} is {figure(pair.area['value'], 'rate')} percentage points, 95 % interval "
        f"[{interval(pair.area, 'rate')}], over {whole(pair.samples)} shared samples."
        for pair in pairs
        if pair.reference.is_control
        and pair.attack.kind == "removal"
        and pair.attack.is_guided
        and (pair.area["low"] or 0.0) <= 0
    ]


# ---------------------------------------------------------------------------------------------------------
# Tables


def grids(comparison: Comparison) -> list[TextTable]:
    """The table of attacks in two parts, what they reach and what it takes, and the paired tests."""
    runs = comparison.runs
    outcome = [*present(OUTCOME, runs)]
    taken = [*SIZE, *by_modality(runs), *present(COST, runs)]
    found = [
        _by_attack(
            comparison,
            "What the attacks reach; intervals are of 95 %.",
            ["seeds", "n"],
            outcome,
        ),
        _by_attack(
            comparison,
            "What it takes: removed elements (changed ones, of value-choosing attacks and corruptions) in percent of "
            "the input and of each modality, over flipped samples; queries and passes of the model, means over "
            "attacked samples.",
            [],
            taken,
        ),
    ]
    if comparison.pairs:
        found.append(_by_pair(comparison.pairs))
    return found


def _by_attack(comparison: Comparison, caption: str, own: Sequence[str], metrics: Sequence[Metric]) -> TextTable:
    heads = [f"{m.heading} ({m.suffix})" if m.suffix else m.heading for m in metrics]
    lines = []
    for target in comparison.targets:
        lines.append(Line(0, [target.name]))
        several = len({row.kind for row in target.rows}) > 1 or target.rows[0].kind != "removal"
        for kind, rows in itertools.groupby(target.rows, key=lambda row: row.kind):
            if several:
                lines.append(Line(1, [HEADINGS[kind]]))
            for row in rows:
                n = whole(row.samples) + ("" if row.finished else " (unfinished)")
                told = {"seeds": row.seeds, "n": n}
                figures = [_estimate(row.summary.get(m.metric, {}), m) for m in metrics]
                lines.append(Line(2, [row.name, *(told[name] for name in own), *figures]))
    return TextTable(caption, ["attack", *own, *heads], lines)


def _estimate(estimate: Estimate, metric: Metric) -> str:
    text = figure(estimate.get("value"), metric.unit)
    span = interval(estimate, metric.unit) if metric.metric in INTERVALS else ""
    return f"{text} [{span}]" if span else text


def _by_pair(pairs: Sequence[Pair]) -> TextTable:
    caption = (
        "Paired tests: each attack against the random control and against the removal attack with the largest curve "
        "area on its target (chosen by these records, which flatters it a little), over the n samples that both "
        "attacked, of all seeds together. A difference is the attack's figure less the reference's, in percentage "
        "points, with its paired 95 % bootstrap interval; p is of the exact sign-flip test over samples (of one seed's "
        "success rates the McNemar test), two-sided, after Holm's correction over these "
        f"{2 * len(pairs)} tests."
    )
    heads = ["attack", "against", "n", "success rate, difference", "success rate, p"]
    heads += ["curve area, difference", "curve area, p"]
    lines = []
    for name, group in itertools.groupby(pairs, key=lambda pair: pair.target.name):
        lines.append(Line(0, [name]))
        for pair in group:
            cells = [pair.attack.label, pair.reference.label, whole(pair.samples)]
            for estimate, p in ((pair.success, pair.success_holm), (pair.area, pair.area_holm)):
                cells += [f"{figure(estimate['value'], 'rate')} [{interval(estimate, 'rate')}]", probability(p)]
            lines.append(Line(2, cells))
    return TextTable(caption, heads, lines, texts=2)


def _terms(comparison: Comparison) -> dict[str, str]:
    """What the words in the tables mean."""
    used = {m.heading.split(",")[0] for m in present([*OUTCOME, *SIZE, *COST], comparison.runs)}
    used |= {KINDS[row.kind] for row in comparison.rows}
    terms = {term: meaning for term, meaning in DEFINITIONS.items() if term in used}
    repeats = "Of several seeds: the mean of their figures; the same samples are resampled of all, the seeds are not."
    return {**terms, "interval": f"{DEFINITIONS['interval']} {repeats}"}


# ---------------------------------------------------------------------------------------------------------
# Markdown, LaTeX, CSV


def markdown(comparison: Comparison) -> str:
    """All tables in Markdown, with columns that line up as plain text, too."""
    tables = [f"{grid.caption}\n\n{markdown_grid(grid)}" for grid in grids(comparison)]
    if not comparison.pairs:
        tables.append("No two attacks on the same target attacked a sample in common: no paired tests.\n")
    said = [f"**Warning:** {text}" for text in comparison.warnings] + [f"Note: {text}" for text in comparison.notes]
    terms = "".join(f"- *{term}*: {meaning}\n" for term, meaning in _terms(comparison).items())
    return "\n".join([*tables, *(f"{text}\n" for text in said), terms])


def latex(comparison: Comparison) -> str:
    r"""All tables in LaTeX: a file to `\input` into a document that uses the package booktabs."""
    said = [f"Warning: {text}" for text in comparison.warnings] + comparison.notes
    parts = [latex_grid(grid, said if place == 0 else []) for place, grid in enumerate(grids(comparison))]
    return "\n".join(["% Written by `muroan compare`; needs \\usepackage{booktabs}\n", *parts])


def _figures(rows: Iterable[Row]) -> list[list[object]]:
    """Every metric of every row with its interval, in full, under a line of headings."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row.summary))
    own = ["dataset", "model", "weights", "attack", "name", "kind", "seeds", "folder", "finished", "samples"]
    parts = (("value", ""), ("low", "_low"), ("high", "_high"))
    lines: list[list[object]] = [[*own, *(name + suffix for name in names for _, suffix in parts)]]
    for row in rows:
        run = row.runs[0]
        lines.append(
            [
                run.dataset,
                run.model,
                " ".join(dict.fromkeys(r.target[2] for r in row.runs)),
                row.attack,
                row.name,
                row.kind,
                " ".join(str(r.about.get("seed")) for r in row.runs),
                " ".join(r.folder for r in row.runs),
                row.finished,
                row.samples,
                *(row.summary.get(name, {}).get(part) for name in names for part, _ in parts),
            ]
        )
    return lines


_PAIR_FIELDS = [
    *("dataset", "model", "attack", "reference", "samples", "seeds"),
    *("success_difference", "success_difference_low", "success_difference_high", "only_attack", "only_reference"),
    *("success_p", "success_p_holm"),
    *("curve_area_difference", "curve_area_difference_low", "curve_area_difference_high"),
    *("curve_area_p", "curve_area_p_holm"),
]


def _pair_fields(pair: Pair) -> list[object]:
    run = pair.attack.runs[0]
    return [
        *(run.dataset, run.model, pair.attack.name, pair.reference.name, pair.samples, pair.seeds),
        *(pair.success[part] for part in ("value", "low", "high")),
        *(*pair.only, pair.success_p, pair.success_holm),
        *(pair.area[part] for part in ("value", "low", "high")),
        *(pair.area_p, pair.area_holm),
    ]
