"""Publish the tables in docs/tables, and docs/results.md from them: `python experiments/results.py`.

    python experiments/results.py docs=FOLDER      # elsewhere than in docs

A table of outputs/experiments takes the place of the published one unless it is of a part alone, lacks cells that the
other has, or is older. results.md.jinja has the words; every figure in them is looked up in the CSV files of the
published tables.
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
from muroan.report.significance import probability
from muroan.report.tables import NOTHING, figure, whole

DOCS = Path(next((word.partition("=")[2] for word in sys.argv[1:] if word.startswith("docs=")), "docs"))
TABLES = DOCS / "tables"
# What a command may add without leaving anything out.
HARMLESS = re.compile(r"full|(device|tracker|hydra/launcher)=.*")


def objection(table: Path) -> str:
    """Why a table does not take the place of the published one; empty where it does."""
    own = json.loads((table / "about.json").read_text())
    known = about(table.name)
    there, asked = own["cells"]
    if not there:
        return "nothing of it was run"
    if not known:
        return ""
    narrowing = [word for word in own["command"].split()[2:] if not HARMLESS.fullmatch(word)]
    if narrowing and own["command"] != known["command"]:
        return f"it is of a part alone ({' '.join(narrowing)})"
    if there < asked and there < (known.get("cells") or [asked])[0]:
        return f"{asked - there} of its {asked} cells are missing"
    return "it is older" if own["date"] < known["date"] else ""


def publish(table: Path) -> None:
    """Copy a table to the published ones."""
    published = TABLES / table.name
    if why := objection(table):
        print(f"{table} is not published, {why}: {published} stays (remove it to have the other)")
        return
    shutil.rmtree(published, ignore_errors=True)
    published.mkdir(parents=True)
    found = [f for f in table.iterdir() if f.is_file() and (f.name.startswith(table.name) or f.name == "about.json")]
    for file in [*found, *table.glob("compare/pairs.csv")]:
        shutil.copyfile(file, published / file.name)


def about(name: str) -> dict[str, Any]:
    """What made a published table; nothing where there is none."""
    file = TABLES / name / "about.json"
    return json.loads(file.read_text()) if file.exists() else {}


def section(name: str, script: str = "") -> str:
    """How a table was made, the table without the meaning of its words, and its plot, where it has one.

    Args:
        script: which makes it, where that is not the one of its name.
    """
    page = TABLES / name / f"{name}.md"
    if not page.exists():
        return f"`python experiments/{script or name}.py` has not been run yet."
    made = about(name)
    table = "".join(line for line in page.read_text().splitlines(keepends=True) if not line.startswith("- *"))
    text = f"`{made['command']}`, {made['date']}{_part(name)}{_models(name)}\n\n{table.rstrip()}"
    if not (picture := page.with_suffix(".png")).exists():
        return text
    return f"{text}\n\n![{name}](tables/{name}/{picture.name})"


def _part(name: str) -> str:
    """How much of what its command makes a table has, where that is not all."""
    there, asked = about(name)["cells"]
    return f"; {whole(there)} of the command's {whole(asked)} cells are there" if there < asked else ""


def _models(name: str) -> str:
    """Whether a table's models are those of Table 1, where it has some of the same name."""
    own, first = about(name).get("weights"), about("vulnerability").get("weights")
    if name == "vulnerability" or not first or not own:
        return ""
    shared = [key for key in own if key in first]
    others = [key for key in shared if own[key] != first[key]]
    return f"; of its models {len(others)} have other weights than in Table 1" if others else ""


def terms() -> str:
    """What the words in all tables mean, as the latest of them says it."""
    pages = sorted(TABLES.glob("*/*.md"), key=lambda page: (about(page.parent.name)["date"], page))
    lines = [line for page in pages for line in page.read_text().splitlines() if line.startswith("- *")]
    return "\n".join(sorted({line.split(":")[0]: line for line in lines}.values()))


def rows(name: str, file: str = "", **where: str) -> list[dict[str, Any]]:
    """The rows of a table's CSV, or of another one in its folder, whose cells are as said; numbers are numbers."""
    path = TABLES / name / (file or f"{name}.csv")
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as lines:
        found = [{key: _read(text) for key, text in row.items()} for row in csv.DictReader(lines)]
    for row in found:
        row.setdefault("group", f"{row['dataset']} · {row.get('model')}")
        row["heading"] = row["group"].rpartition(", ")[2]
        row["spread"] = row.get("curve_area_max", 0) - row.get("curve_area_min", 0)
        if row.get("by_seed"):
            row["steady"] = all(points > 0 for points in json.loads(str(row["by_seed"])).values())
        if "robust_to_valid" in row and "rows" in row:
            row["passes"] = (row["attack_forwards"] + row["attack_backwards"]) / row["rows"]  # of a sample's training
            row["half"] = row["robust_to_valid"] < row["clean_accuracy"] / 2
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
    for file in sorted(OUT.glob("*/about.json")):
        publish(file.parent)
    versions = {json.loads(file.read_text())["torch"] for file in TABLES.glob("*/about.json")}
    torch = ", ".join(sorted(versions)) or NOTHING
    words = {
        "section": section,
        "rows": rows,
        "told": told,
        "span": span,
        "probability": probability,
        "terms": terms,
        "torch": torch,
    }
    page = DOCS / "results.md"
    text = environment.get_template("results.md.jinja").render(words)
    page.write_text(text.rstrip() + "\n", encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
