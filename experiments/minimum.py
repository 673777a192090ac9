"""How near the smallest flip there is: ours beside brute force, which asks every removal, the smallest first.

    python experiments/minimum.py asked=11000    # of brute force a sample; in digit_sum all pairs of regions

A sample of which brute force runs out of questions has no known minimum, and is counted apart: beside what ours finds
there stands what it finds with as many questions as brute force had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sweep import OUT, Sweep

from muroan.report.cells import Cell
from muroan.report.markup import write_csv
from muroan.report.tables import figure
from muroan.results import AttackResult

CAPTION = (
    "{samples} test samples, the usual regions; decoupling with at most {budget} queries, brute force with "
    "at most {asked}. What brute force finds is the smallest flip there is; ours *reaches* it where it is as small. "
    "Where brute force *ran out* the minimum is not known; ours *longer* is our search with {asked} queries and "
    "no limit to its patience. Both means there are over the samples that both *flipped*, where there are at least "
    "{least}; *longer alone* are those that only the longer search flipped."
)
HEADS = ["dataset", "model", "seed numbers", "attacked", "minimum known", "reached (%)"]
HEADS += ["smallest flip, mean (%)", "ours, mean (%)", "ran out", "flipped", "longer alone"]
HEADS += ["ours there, mean (%)", "ours longer, mean (%)"]
LEAST = 5  # samples that a mean is told of


def records(cell: Cell) -> dict[str, AttackResult]:
    return {} if cell.run is None else {r.id: r for r in cell.run.records if r.attacked}


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def compared(ours: Sequence[Cell], brute: Sequence[Cell], longer: Sequence[Cell]) -> list[float | None]:
    """The figures of a row, over the samples of all seeds; the longer search may be lacking."""
    every = [tuple(map(records, cells)) for cells in zip(ours, brute, longer, strict=True)]
    found = [(a[key], b[key], c.get(key)) for a, b, c in every for key in a if key in b]
    known = [(a.decoupled_fraction, b.decoupled_fraction) for a, b, _ in found if b.flipped and a.flipped]
    beyond = [(a, c) for a, b, c in found if not b.flipped]
    searched = [(a, c) for a, c in beyond if c is not None]
    both = [(a.decoupled_fraction, c.decoupled_fraction) for a, c in searched if a.flipped and c.flipped]
    minimum = len(found) - len(beyond)
    reached = [100.0 * (a <= b + 1e-9) for a, b in known] + [0.0] * (minimum - len(known))  # not flipped at all
    told = both if len(both) >= LEAST else []
    return [
        len(found),
        minimum,
        mean(reached),
        mean([b for _, b in known]),
        mean([a for a, _ in known]),
        len(beyond),
        len(both),
        sum(c.flipped and not a.flipped for a, c in searched),
        mean([a for a, _ in told]),
        mean([c for _, c in told]),
    ]


def main() -> None:
    full = {"seeds": "0", "samples": "100", "asked": "11000"}
    sweep = Sweep(full=full, quick={"asked": "200"})
    rows: list[list[Any]] = []
    missing = ""
    for dataset in sweep.datasets:
        ours = sweep.cells(dataset, ["decoupling"])
        asked = f"threat_model.max_queries={sweep.chosen['asked']}"
        brute = sweep.cells(dataset, ["exhaustive"], "attack.max_atoms=1000", asked)
        longer = sweep.cells(dataset, ["decoupling"], "attack.patience=null", asked)
        for model in sweep.models:
            mine, theirs = ours[model, "decoupling"], brute[model, "exhaustive"]
            seeds = [a.seed for a, b in zip(mine, theirs, strict=True) if a.run is not None and b.run is not None]
            if lacking := [seed for seed in sweep.seeds if seed not in seeds]:
                missing += f"- not run: {dataset} · {model}, seed {', '.join(map(str, lacking))}\n"
            short = [str(cell.seed) for cell in longer[model, "decoupling"] if cell.run is None and cell.seed in seeds]
            if short:
                missing += f"- no longer search: {dataset} · {model}, seed {', '.join(short)}\n"
            if seeds:
                figures = compared(mine, theirs, longer[model, "decoupling"])
                rows.append([dataset, model, " ".join(map(str, seeds)), *figures])
    out = OUT / "minimum"
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "minimum.csv", [HEADS, *rows])
    lines = []
    for row in rows:
        sizes = [figure(size, "fraction") for size in (*row[6:8], *row[11:])]
        lines.append([*map(str, row[:5]), figure(row[5], "rate"), *sizes[:2], *map(str, row[8:11]), *sizes[2:]])
    asked = sweep.chosen["asked"]
    caption = CAPTION.format(samples=sweep.samples, budget=sweep.budget, asked=asked, least=LEAST)
    sweep.page("minimum", caption, [HEADS, *lines], 3, missing)


if __name__ == "__main__":
    main()
