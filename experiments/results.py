"""docs/results.md, from what the tables wrote: `python experiments/results.py`, or with another folder, `docs=FOLDER`.

results.md.jinja has the words; every figure in them is looked up in the CSV files of the tables.
"""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from sweep import OUT

from muroan.report.cells import METRICS
from muroan.report.tables import NOTHING, figure

DOCS = Path(next((word.partition("=")[2] for word in sys.argv[1:] if word.startswith("docs=")), "docs"))


def section(name: str) -> str:
    """The command that made a table, the table without the meaning of its words, and its plot, where it has one."""
    page = OUT / name / f"{name}.md"
    if not page.exists():
        return f"`python experiments/{name}.py` has not been run yet."
    table = "".join(line for line in page.read_text().splitlines(keepends=True) if not line.startswith("- *"))
    text = f"`{page.with_name('command.txt').read_text().strip()}`\n\n{table.rstrip()}"
    if not (picture := page.with_suffix(".png")).exists():
        return text
    shutil.copyfile(picture, DOCS / picture.name)
    return f"{text}\n\n![{name}]({picture.name})"


def terms() -> str:
    """What the words in all tables mean."""
    lines = [line for page in sorted(OUT.glob("*/*.md")) for line in page.read_text().splitlines()]
    return "\n".join(sorted({line for line in lines if line.startswith("- *")}))


def rows(name: str, file: str = "", **where: str) -> list[dict[str, Any]]:
    """The rows of a table's CSV, or of another one in its folder, whose cells are as said; numbers are numbers."""
    path = OUT / name / (file or f"{name}.csv")
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as lines:
        found = [{key: _read(text) for key, text in row.items()} for row in csv.DictReader(lines)]
    for row in found:
        row.setdefault("group", f"{row['dataset']} · {row.get('model')}")
        row["heading"] = row["group"].rpartition(", ")[2]
        row["spread"] = row.get("curve_area_max", 0) - row.get("curve_area_min", 0)
    return [row for row in found if all(row.get(key) == value for key, value in where.items())]


def _read(text: str) -> float | str:
    try:
        return float(text or "nan")  # a comparison with what was not measured is false
    except ValueError:
        return text


def told(value: float, metric: str) -> str:
    """A figure as the tables write it."""
    unit = METRICS[metric].unit if metric in METRICS else "rate"
    return NOTHING if math.isnan(value) else figure(value, unit)


def span(found: list[dict[str, Any]], metric: str) -> str:
    """The smallest and the largest figure of some rows, or the only one."""
    values = [row[metric] for row in found if not math.isnan(row.get(metric, math.nan))]
    ends = dict.fromkeys(told(value, metric) for value in (min(values), max(values))) if values else [NOTHING]
    return " to ".join(ends)


def main() -> None:
    DOCS.mkdir(parents=True, exist_ok=True)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    about = [json.loads(file.read_text()) for file in sorted(OUT.glob("attacks/*/run.json"))]
    torch = ", ".join(sorted({run["versions"]["torch"].partition("+")[0] for run in about})) or NOTHING
    words = {"section": section, "rows": rows, "told": told, "span": span, "terms": terms, "torch": torch}
    for file in sorted(OUT.glob("*/command.txt")):
        if re.search(r"\b(models|datasets|attacks|defenses)=", made := file.read_text().strip()):
            print(f"{file.parent} is of a part alone, by {made}: tabulate it with fewer words to have all of it here")
    page = DOCS / "results.md"
    text = environment.get_template("results.md.jinja").render(words)
    page.write_text(text.rstrip() + "\n", encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
