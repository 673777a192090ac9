"""How near the smallest flip there is: ours beside brute force, which asks every removal, the smallest first.

    python experiments/minimum.py asked=11000    # of brute force a sample; in digit_sum all pairs of regions

A sample of which brute force runs out of questions has no known minimum, and is counted apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sweep import OUT, Sweep, command

from muroan.report.cells import Cell
from muroan.report.tables import figure, markdown_table, write_csv
from muroan.results import AttackResult

CAPTION = (
    "The first {samples} test samples, the usual regions; decoupling with at most {budget} queries, brute force with "
    "at most {asked}. What brute force finds is the smallest flip there is; ours *reaches* it where it is as small."
)
HEADS = ["dataset", "model", "seeds", "attacked", "minimum known", "reached (%)"]
HEADS += ["smallest flip, mean (%)", "ours, mean (%)", "ours where brute force ran out, mean (%)"]


def records(cell: Cell) -> dict[str, AttackResult]:
    return {} if cell.run is None else {r.id: r for r in cell.run.records if r.attacked}


def compared(ours: Sequence[Cell], brute: Sequence[Cell]) -> list[float | None]:
    """The figures of a row, over all seeds together."""
    both = zip(map(records, ours), map(records, brute), strict=True)
    pairs = [(a[key], b[key]) for a, b in both for key in a if key in b]
    known = [(a.decoupled_fraction, b.decoupled_fraction) for a, b in pairs if b.flipped and a.flipped]
    beyond = [a.decoupled_fraction for a, b in pairs if a.flipped and not b.flipped]
    reached = [100.0 * (a <= b + 1e-9) for a, b in known]
    minimum = sum(b.flipped for _, b in pairs)
    reached += [0.0] * (minimum - len(known))  # that ours did not flip at all
    columns = [reached, [b for _, b in known], [a for a, _ in known], beyond]
    return [len(pairs), minimum, *(sum(column) / len(column) if column else None for column in columns)]


def main() -> None:
    full = {"seeds": "0", "samples": "100", "asked": "11000"}
    sweep = Sweep(full=full, quick={"asked": "200"})
    rows: list[list[Any]] = []
    for dataset in sweep.datasets:
        ours = sweep.cells(dataset, ["decoupling"])
        asked = ["attack.max_atoms=1000", f"threat_model.max_queries={sweep.chosen['asked']}"]
        brute = sweep.cells(dataset, ["exhaustive"], *asked)
        for model in sweep.models:
            mine, theirs = ours[model, "decoupling"], brute[model, "exhaustive"]
            seeds = [a.seed for a, b in zip(mine, theirs, strict=True) if a.run is not None and b.run is not None]
            rows.append([dataset, model, " ".join(map(str, seeds)), *compared(mine, theirs)])
    out = OUT / "minimum"
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "minimum.csv", [HEADS, *rows])
    lines = []
    for row in rows:
        reached, *fractions = row[5:]
        lines.append([*map(str, row[:5]), figure(reached, "rate"), *(figure(f, "fraction") for f in fractions)])
    caption = CAPTION.format(samples=sweep.samples, budget=sweep.budget, asked=sweep.chosen["asked"])
    page = out / "minimum.md"
    page.write_text(f"{caption}\n\n{markdown_table([HEADS, *lines], texts=3)}")
    command(page)


if __name__ == "__main__":
    main()
