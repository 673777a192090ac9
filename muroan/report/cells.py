"""Cells of a sweep, over seeds, as one table: Markdown, LaTeX, CSV and a plot.

A cell is one attack on one trained model with one seed. A table is made of the cells that it names and of no others: a
cell that was not run, or not to its end, is named in a note, and a folder with other settings is never read as one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from muroan.attacks.base import Kind
from muroan.metrics import pooled
from muroan.report import plots
from muroan.report.compare import HEADINGS, INTERVALS, Estimate, Row
from muroan.report.markup import Line, TextTable, latex_grid, markdown_grid, write_csv
from muroan.report.tables import DEFINITIONS, MAIN, SEARCH, Column, figure, interval, present
from muroan.results import RunFolder
from muroan.runs import Run, find_runs

SHARES = (
    *(Column(f"modality_share_{name}", f"share, {name}", "rate") for name in ("image", "text", "audio", "joint")),
    Column("interaction", "interaction", "rate"),
)
BY_MODALITY = tuple(
    Column(f"decoupled_fraction_{name}_mean", f"fraction by modality, {name}", "fraction")
    for name in ("image", "text", "audio")
)
METRICS = {column.metric: column for column in (*MAIN, *SEARCH, *SHARES, *BY_MODALITY)}


@dataclass(frozen=True)
class Cell:
    """One attack on one trained model, as a sweep has it.

    Attributes:
        folder: where its records are, or would be.
        run: its records; None where it is not finished.
        lacks: why there is no run.
    """

    dataset: str
    model: str
    attack: str
    seed: int
    folder: Path
    run: Run | None = None
    lacks: str = ""


def read_cell(dataset: str, model: str, attack: str, seed: int, folder: Path, identity: Mapping[str, Any]) -> Cell:
    """A cell with its records, if the folder holds all of them and `run.json` says that they are of this identity.

    Args:
        identity: all that decides what the records say, but for the weights, which training led to.
    """
    cell = Cell(dataset, model, attack, seed, folder)
    if not (folder / "run.json").exists():
        return replace(cell, lacks="not run")
    about = RunFolder(folder).run
    found = {key: value for key, value in about["identity"].items() if key != "weights"}
    named = [about.get(key) for key in ("dataset", "model", "attack", "seed")]
    if found != json.loads(json.dumps(identity)) or named != [dataset, model, attack, seed]:
        return replace(cell, lacks="of another configuration")
    if not RunFolder(folder).finished:
        return replace(cell, lacks="unfinished")
    return replace(cell, run=_run(folder, RunFolder(folder).records_file.stat().st_mtime_ns))


@cache  # tables have cells in common with themselves: the default of every option
def _run(folder: Path, written: int) -> Run:
    (run,) = find_runs([folder])
    return run


@dataclass(frozen=True)
class Entry:
    """A row of a table: the cells of one setting, one a seed.

    Attributes:
        group: the heading that it stands under; entries of a group are compared.
        name: unique in its group.
        within: figures as of a budget of so many queries, from the trajectories of a run with a larger one.
    """

    group: str
    name: str
    cells: tuple[Cell, ...]
    within: int | None = None

    @property
    def runs(self) -> tuple[Run, ...]:
        return tuple(cell.run for cell in self.cells if cell.run is not None)

    @property
    def seeds(self) -> list[int]:
        return [cell.seed for cell in self.cells if cell.run is not None]

    @cached_property
    def summary(self) -> Mapping[str, Estimate]:
        """Every metric over all seeds, with its interval over samples."""
        if self.within is None:
            return Row(self.runs).summary if self.runs else {}
        seeds = [(run, columns_within(run, self.within)) for run in self.runs]
        hows = {name: how for _, table in seeds for name, (_, how) in table.items()}
        return {name: pooled([run.by_id(table[name][0]) for run, table in seeds], how) for name, how in hows.items()}

    @cached_property
    def by_seed(self) -> list[Mapping[str, Estimate]]:
        """The same of each seed."""
        return [replace(self, cells=(cell,)).summary for cell in self.cells if cell.run is not None]

    def spread(self, metric: str) -> tuple[float, float] | None:
        """The smallest and the largest figure of a seed; None where there are not several."""
        values = [value for seed in self.by_seed if (value := seed.get(metric, {}).get("value")) is not None]
        return (min(values), max(values)) if len(values) > 1 else None


def columns_within(run: Run, queries: int) -> dict[str, tuple[np.ndarray, str]]:
    """What a run had in hand after so many queries, as `metrics.columns` has it of the whole run.

    A search that had known of the smaller budget might have gone another way.

    Returns:
        name -> (N,) one number a sample, NaN where it has no say, and how it is reduced.
    """
    nan = float("nan")
    success, fraction, asked = [], [], []
    for r in run.records:
        seen = (r.trajectory or [(r.queries, r.decoupled_fraction)]) if r.flipped else []
        sizes = [size for at, size in seen if at <= queries]
        success.append(100.0 * bool(sizes) if r.attacked else nan)
        fraction.append(min(sizes, default=nan))
        asked.append(min(r.queries, queries) if r.attacked else nan)
    return {
        "attack_success_rate": (np.array(success), "rate"),
        "decoupled_fraction_mean": (np.array(fraction), "mean"),
        "decoupled_fraction_median": (np.array(fraction), "median"),
        "queries": (np.array(asked, dtype=float), "mean"),
    }


def side_by_side(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """The entries that have runs, and notes on what is left out.

    Those of a group and kind are on the seeds that all of them have: a mean over three seeds beside the figure of one
    says something about the seeds.
    """
    kept, notes = [], _missing(entries)
    for group, members in groupby(entries, key=lambda entry: entry.group):
        kinds: dict[Kind, list[Entry]] = {}
        for entry in members:
            if entry.runs:
                kinds.setdefault(entry.runs[0].kind, []).append(entry)
        for kind, rows in kinds.items():
            common = set(rows[0].seeds).intersection(*(row.seeds for row in rows))
            where = f"{group}, {HEADINGS[kind]}" if len(kinds) > 1 else group
            if not common:
                notes.append(f"{where}: the rows have no seed in common; each is over its own.")
            elif left := sorted({seed for row in rows for seed in row.seeds} - common):
                notes.append(f"{where}: seed {_listed(left)} is left out, since not all rows have it.")
            for row in rows:
                found = (cell for cell in row.cells if cell.run is not None)
                kept.append(replace(row, cells=tuple(cell for cell in found if cell.seed in common or not common)))
    return kept, notes


def _missing(entries: Sequence[Entry]) -> list[str]:
    """A note a group and a reason on the cells that are not there, rows that lack the same seeds together."""
    lacking: dict[tuple[str, str], dict[str, list[int]]] = {}
    for entry in entries:
        for cell in entry.cells:
            if cell.run is None:
                lacking.setdefault((entry.group, cell.lacks), {}).setdefault(entry.name, []).append(cell.seed)
    notes = []
    for (group, why), seeds in lacking.items():
        names: dict[str, list[str]] = {}
        for name, numbers in seeds.items():
            names.setdefault(_listed(numbers), []).append(name)
        parts = (f"seed {numbers} of {', '.join(rows)}" for numbers, rows in names.items())
        notes.append(f"missing in {group}, {why}: {'; '.join(parts)}")
    return notes


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(numbers))))


@dataclass(frozen=True)
class Known:
    """Figures that others published, to stand below ours.

    Attributes:
        figures: by metric; what was not published is not there.
        source: where they come from.
    """

    name: str
    figures: Mapping[str, float]
    source: str


@dataclass
class Table:
    """A table of entries.

    Attributes:
        name: of its files.
        caption: what it shows, in words.
        metrics: a column each; optional ones are left out where nobody has anything to say.
        entries: as planned; `rows` are those that there is something to show of.
        row: what a row is: heading of the first column.
        known: published figures, below.
        drawn: the rows that are plotted.
    """

    name: str
    caption: str
    metrics: Sequence[Column]
    entries: Sequence[Entry]
    row: str = "attack"
    known: Sequence[Known] = ()
    drawn: Callable[[Entry], bool] = lambda entry: entry.within is None
    rows: list[Entry] = field(init=False)
    notes: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.rows, self.notes = side_by_side(self.entries)
        self.notes += [f"{known.name}: {known.source}." for known in self.known]

    def write(self, out: Path) -> Path:
        """Write `NAME.md`, `.tex`, `.csv`, `_seeds.csv` (a row a seed) and `.png` to a folder; return the first."""
        out.mkdir(parents=True, exist_ok=True)
        page = out / f"{self.name}.md"
        page.write_text(self.markdown(), encoding="utf-8")
        (out / f"{self.name}.tex").write_text(self.latex(), encoding="utf-8")
        write_csv(out / f"{self.name}.csv", _figures(self.rows))
        each = [replace(row, cells=(cell,)) for row in self.rows for cell in row.cells]
        write_csv(out / f"{self.name}_seeds.csv", _figures(each))
        drawn = [row for row in self.rows if self.drawn(row)]
        targets = [(g, [(row.name, row.runs) for row in rows]) for g, rows in groupby(drawn, lambda row: row.group)]
        (out / f"{self.name}.png").write_bytes(plots.budgets(targets or [("nothing was run", [])]))
        return page

    @property
    def columns(self) -> list[Column]:
        """The metrics that a row has a figure of, or that a table is not without."""
        shown = present(self.metrics, [run for row in self.rows for run in row.runs])
        said = {name for row in self.rows for name, estimate in row.summary.items() if estimate["value"] is not None}
        return [column for column in shown if column.metric in said or column in MAIN]

    def grid(self, narrow: bool = False) -> TextTable:
        """The table as text; a narrow one, for a printed page, has no intervals where it has seeds."""
        columns = self.columns
        heads = [f"{column.heading} ({column.suffix})" if column.suffix else column.heading for column in columns]
        lines = []
        for group, members in groupby(self.rows, key=lambda row: row.group):
            rows = list(members)
            lines.append(Line(0, [group]))
            rows.sort(key=lambda row: list(HEADINGS).index(row.runs[0].kind))
            several = len({row.runs[0].kind for row in rows}) > 1
            for kind, part in groupby(rows, key=lambda row: row.runs[0].kind):
                if several:
                    lines.append(Line(1, [HEADINGS[kind]]))
                for row in part:
                    seeds = ", ".join(map(str, row.seeds))
                    lines.append(Line(2, [row.name, seeds, *(_text(row, column, narrow) for column in columns)]))
        if self.known:
            lines.append(Line(0, ["for comparison: published, on other data and other weights"]))
        for known in self.known:
            figures = (figure(known.figures.get(column.metric), column.unit) for column in columns)
            lines.append(Line(2, [known.name, "", *figures]))
        how = (
            "Means over the seeds; in brackets the 95 % interval over samples, in parentheses the smallest "
            "and the largest of the seeds."
        )
        return TextTable(f"{self.caption} {how}", [self.row, "seeds", *heads], lines)

    def markdown(self) -> str:
        """Caption, table, notes, and what the words mean."""
        grid = self.grid()
        used = {part for column in self.columns for part in (column.heading, column.heading.split(",")[0])}
        terms = "".join(f"- *{term}*: {meaning}\n" for term, meaning in DEFINITIONS.items() if term in used)
        notes = "".join(f"Note: {note}\n\n" for note in self.notes)
        return f"{grid.caption}\n\n{markdown_grid(grid)}\n{notes}{terms}"

    def latex(self) -> str:
        r"""The table in LaTeX: a file to `\input` into a document that uses the package booktabs."""
        return "% Needs \\usepackage{booktabs}\n" + latex_grid(self.grid(narrow=True), self.notes)


def _text(row: Entry, column: Column, narrow: bool) -> str:
    """A figure with its interval over samples, where it has one, and its spread over seeds."""
    estimate = row.summary.get(column.metric, {})
    value = estimate.get("value")
    text = figure(value, column.unit)
    seeds = row.spread(column.metric)
    if column.metric in INTERVALS and not (narrow and seeds) and (span := interval(estimate, column.unit)):
        text += f" [{span}]"
    if seeds:
        text += " ({}–{})".format(*(figure(seed, column.unit, value) for seed in seeds))
    return text


def _figures(rows: Sequence[Entry]) -> list[list[object]]:
    """Every metric of every row in full: over seeds with its interval, and the smallest and the largest seed's."""
    names = list(dict.fromkeys(name for row in rows for name in row.summary))
    own = ["group", "name", "dataset", "model", "attack", "kind", "seeds", "samples"]
    parts = ("", "_low", "_high", "_min", "_max")
    lines: list[list[object]] = [[*own, *(name + part for name in names for part in parts)]]
    for row in rows:
        run = row.runs[0]
        told: list[object] = [row.group, row.name, run.dataset, run.model, run.attack, run.kind]
        told += [" ".join(map(str, row.seeds)), sum(len(r.records) for r in row.runs)]
        for name in names:
            estimate = row.summary.get(name, {})
            told += [estimate.get("value"), estimate.get("low"), estimate.get("high")]
            told += row.spread(name) or (estimate.get("value"), estimate.get("value"))
        lines.append(told)
    return lines
