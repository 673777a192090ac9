"""What the tables have in common: their sizes, the sweeps behind them, and the cells that these leave.

    python experiments/TABLE.py                 # in full: four models, two datasets, three seeds, 300 samples
    python experiments/TABLE.py quick           # a minute: one small model, few samples
    python experiments/TABLE.py seeds=0 models=mmbt datasets=easy_vqa samples=100 attacks=decoupling
    python experiments/TABLE.py tabulate        # runs nothing: the table of the cells that there are

Every table trains what is not trained and attacks what is not attacked: a killed one goes on where it was, and a cell
that another table made is not made again. Any other `key=value` goes on to `muroan train` and `muroan attack`
(`hydra/launcher=joblib`, `device=gpu`, `tracker=wandb`). A table is outputs/experiments/TABLE/TABLE.md, .tex, .csv and
.png; `python experiments/results.py` publishes all of them in docs/tables and makes docs/results.md of them. The
records behind published tables are in experiments/records: `python experiments/archive.py unpack` lays them where
`tabulate` finds them.
digit_sum needs its recordings: see the README.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from copy import copy
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from muroan import cli
from muroan.cli.jobs import planned
from muroan.errors import MuroanError
from muroan.report import compare
from muroan.report.cells import Cell, Known, Table, read_cell
from muroan.report.markup import markdown_table, slanted_table
from muroan.results import write_json

OUT = Path("outputs/experiments")
CELLS = f"{OUT}/attacks/${{hydra:runtime.choices.dataset}}-${{hydra:runtime.choices.model}}"
CELLS += "-${hydra:runtime.choices.attack}-${cell:attack}"

FULL = {"models": "mmbt,concat,cross_attention,late_fusion", "datasets": "easy_vqa,digit_sum", "seeds": "0,1,2"}
FULL |= {"samples": "300"}
QUICK = {"models": "late_fusion", "datasets": "easy_vqa", "seeds": "0", "samples": "16"}
QUICK_OPTIONS = ["dataset.train_limit=1000", "dataset.val_limit=64", "training.epochs=1", "training.lr=3e-3"]
QUICK_OPTIONS += ["threat_model.max_queries=100", "device=cpu", "tracker=none"]
# What each dataset is trained with, besides the model's own defaults.
TRAINED = {"easy_vqa": ["dataset=easy_vqa"], "digit_sum": ["experiment=digit_sum"]}

# All that is published and comparable at all; the tables of the paper are not available to us.
KNOWN = [
    Known(
        "paper, worst case (1.16 %)",
        {"attack_success_rate": 100},
        "100 % success by removing 1.16 % of the input (arXiv 2112.12792); whether a mean or a median, we do not know",
    ),
    Known(
        "authors' demonstration",
        {"attack_success_rate": 100, "decoupled_fraction_mean": 3.85, "decoupled_fraction_median": 0.098},
        "of 2022, MMBT on seven Hateful Memes",
    ),
]

Plan = dict[tuple[str, str], list[tuple[Path, dict]]]  # (model, attack) -> folder and identity, one a seed
Found = dict[tuple[str, str], tuple[Cell, ...]]  # likewise a cell a seed


class Sweep:
    """What was asked for on the command line of a table.

    Args:
        full, quick: the table's own defaults, beside those of all tables.

    Attributes:
        chosen: all options, as they were typed, the table's own too.
        models, datasets, attacks: names; seeds: numbers; samples: of the test set.
        budget: queries a sample.
        quick: whether it is the small size.
        tabulate: whether nothing is to be run.
        options: what goes on to muroan.
        weights: hashes of the models whose cells were read, by the folder of their training.
        torch: the versions that made these cells.
        done: of every cell and training that was asked for, by its folder, whether it is there.
        again: whether to make anew what is there, and the folders that this command has `remade` so far.
    """

    def __init__(self, full: dict[str, str], quick: dict[str, str]):
        words = [word for word in sys.argv[1:] if "=" not in word]
        given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
        self.quick, self.tabulate = "quick" in words, "tabulate" in words
        chosen = {"attacks": "", **FULL, **full, **({**QUICK, **quick} if self.quick else {})}
        if unknown := set(words) - {"quick", "full", "tabulate"}:
            sys.exit(f"expected quick, full, tabulate or key=value, got {', '.join(sorted(unknown))}")
        self.options = QUICK_OPTIONS if self.quick else []
        self.options = [*self.options, *(f"{key}={value}" for key, value in given.items() if key not in chosen)]
        chosen |= {key: value for key, value in given.items() if key in chosen}
        self.models, self.datasets = chosen["models"].split(","), chosen["datasets"].split(",")
        self.attacks = [name for name in chosen["attacks"].split(",") if name]
        if not all(seed.isdecimal() for seed in chosen["seeds"].split(",")):
            sys.exit(f"seeds must be whole numbers, got {chosen['seeds']}")
        self.seeds, self.samples = [int(seed) for seed in chosen["seeds"].split(",")], chosen["samples"]
        self.chosen = chosen
        self.weights: dict[str, str] = {}
        self.torch: set[str] = set()
        self.done: dict[Path, bool] = {}
        self.again, self.remade = "rerun=true" in self.options, set[Path]()
        self.budget = dict(word.split("=", 1) for word in self.options).get("threat_model.max_queries", "500")
        if unknown := set(self.datasets) - set(TRAINED):
            sys.exit(f"datasets must be among {', '.join(TRAINED)}, got {', '.join(sorted(unknown))}")

    def refuse_attacks_but(self, known: set[str]) -> None:
        """Exit where another attack is asked for."""
        if unknown := set(self.attacks) - known:
            sys.exit(f"attacks must be among {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}")

    def only(self, model: str, seed: int) -> Sweep:
        """The sweep for one model and seed."""
        one = copy(self)
        one.models, one.seeds = [model], [seed]
        return one

    def cells(self, dataset: str, attacks: Sequence[str], *options: str, defense: str = "none") -> Found:
        """Train, harden and attack what is not done, and read what is.

        Args:
            options: of muroan, for these cells alone; they win over those of the command line.
            defense: what the models are hardened by before they are attacked.

        Returns:
            (model, attack) -> a cell a seed, with or without a run.
        """
        # One W&B group a table, also when it is resumed with fewer cells left.
        shared = [f"sweep={Path(sys.argv[0]).stem}", *TRAINED[dataset], f"defense={defense}", *self.options, *options]
        limit, folder = f"dataset.test_limit={self.samples}", f"folders.attack='{CELLS}'"
        chosen = [(model, attack) for model in self.models for attack in attacks]
        jobs = [[*shared, f"model={model}", f"attack={attack}", limit, folder] for model, attack in chosen]
        try:
            plan = dict(zip(chosen, planned("attack", jobs, self.seeds), strict=True))
            found = self._read(dataset, plan)
        except MuroanError as error:
            sys.exit(str(error))
        every = [cell for cells in found.values() for cell in cells]
        # muroan skips finished cells itself, but has to load a model to see that they are.
        left = [cell for cell in every if cell.run is None or (self.again and cell.folder not in self.remade)]
        if self.tabulate or not left:
            return self._noted(found)
        axes = [f"model={_listed(c.model for c in left)}", f"seed={_listed(c.seed for c in left)}"]
        ready = [*shared, f"attack={left[0].attack}", *([limit] if self.quick else [])]  # options may be its own
        self._prepare("train", ready, left)
        if defense != "none":
            self._check_starts(ready, left)
            self._prepare("harden", ready, left)
        for cell in () if self.again else every:
            if cell.run is not None:
                _check_weights(cell)
        muroan("attack", "-m", *shared, *axes, f"attack={_listed(c.attack for c in left)}", limit, folder)
        self.remade |= {cell.folder for cell in left}
        return self._noted(self._read(dataset, plan))

    def _prepare(self, command: str, words: Sequence[str], left: Sequence[Cell]) -> None:
        """Train, or harden, the models of some cells; with `rerun=true` each once, however many cells it has."""
        models, seeds = list(dict.fromkeys(c.model for c in left)), list(dict.fromkeys(c.seed for c in left))
        if self.again:
            places = [
                {folder for folder, _ in own}
                for own in planned(command, [[*words, f"model={model}"] for model in models], seeds)
            ]
            models = [model for model, own in zip(models, places, strict=True) if not own <= self.remade]
            self.remade |= set[Path]().union(*places)
        if models:
            muroan(command, "-m", *words, f"model={_listed(models)}", f"seed={_listed(seeds)}")

    def _check_starts(self, words: Sequence[str], left: Sequence[Cell]) -> None:
        """Refuse to harden what was trained again, to other weights than those of the runs that were read so far."""
        jobs = [[*words, f"model={model}"] for model in dict.fromkeys(c.model for c in left)]
        for places in planned("train", jobs, list(dict.fromkeys(c.seed for c in left))):
            for folder, _ in places:
                known, file = self.weights.get(folder.name), folder / "summary.json"
                weights = json.loads(file.read_text())["weights"][:12] if known and file.exists() else known
                if weights != known:
                    sys.exit(
                        f"{folder} was trained again, to other weights ({weights}) than those of the table's runs on "
                        f"it ({known}), so that nothing that is hardened from it can stand beside them: remove these "
                        f"runs, and run the table again"
                    )

    def trained(self, dataset: str, *options: str) -> dict[str, list[dict[str, Any] | None]]:
        """Train what is not trained.

        Returns:
            model -> the summary of its training, one a seed, None where there is none.
        """
        shared = [f"sweep={Path(sys.argv[0]).stem}", *TRAINED[dataset], *self.options, *options]
        try:
            plan = list(planned("train", [[*shared, f"model={model}"] for model in self.models], self.seeds))
        except MuroanError as error:
            sys.exit(str(error))
        files = [[folder / "summary.json" for folder, _ in places] for places in plan]
        if not self.tabulate and not all(file.exists() for row in files for file in row):
            muroan("train", "-m", *shared, f"model={_listed(self.models)}", f"seed={_listed(self.seeds)}")
        self.done |= {file.parent: file.exists() for row in files for file in row}
        found = [[json.loads(file.read_text()) if file.exists() else None for file in row] for row in files]
        return dict(zip(self.models, found, strict=True))

    def _read(self, dataset: str, plan: Plan) -> Found:
        return {
            (model, attack): tuple(
                read_cell(dataset, model, attack, seed, *place) for seed, place in zip(self.seeds, places, strict=True)
            )
            for (model, attack), places in plan.items()
        }

    def _noted(self, found: Found) -> Found:
        """The cells of a table, whose models are noted, or refused beside others of the same training."""
        for cell in (cell for cells in found.values() for cell in cells):
            self.done[cell.folder] = cell.run is not None
            if cell.run is None:
                continue
            self.torch.add(str((cell.run.about.get("versions") or {}).get("torch")).partition("+")[0])
            trained, weights = trained_in(cell).name, cell.run.target[2][:12]
            if self.weights.setdefault(trained, weights) != weights:
                sys.exit(
                    f"{cell.folder} is of other weights ({weights}) than the table's other runs of {trained} "
                    f"({self.weights[trained]}), so that they cannot stand side by side: remove it, or those, and run "
                    f"the table again"
                )
            if (start := started_from(cell)) and self.weights.setdefault(*start) != start[1]:
                sys.exit(
                    f"{cell.folder} is of a model that was hardened from other weights ({start[1]}) than those of the "
                    f"table's other runs of {start[0]} ({self.weights[start[0]]}), so that they cannot stand side by "
                    f"side: remove it, or those, and run the table again"
                )
        return found

    def write(self, table: Table) -> None:
        """Write a table to its folder and show it."""
        self.finish(table.write(OUT / table.name))

    def compare(self, table: Table) -> None:
        """Write beside a table the paired tests of `muroan compare`, on the samples that its runs share."""
        if folders := [cell.folder for entry in table.entries for cell in entry.cells if cell.run is not None]:
            print(compare.write(folders, OUT / table.name / "compare"))

    def page(self, name: str, caption: str, rows: Sequence[Sequence[str]], texts: int, *notes: str) -> None:
        """Write a table of other figures than attacks have, in Markdown and LaTeX, to its folder, and show it.

        Args:
            rows, texts: see `markdown_table`; notes: below the table, each with its line end.
        """
        out = OUT / name
        out.mkdir(parents=True, exist_ok=True)
        told = [line.removeprefix("- ") for line in "".join(notes).splitlines() if line]
        latex = f"% Needs the packages booktabs and graphicx.\n{slanted_table(caption, rows, told, texts)}"
        (out / f"{name}.tex").write_text(latex, encoding="utf-8")
        page = out / f"{name}.md"
        page.write_text("\n".join([f"{caption}\n", markdown_table(rows, texts), "".join(notes)]), encoding="utf-8")
        self.finish(page)

    def finish(self, page: Path) -> None:
        """Note beside a page what made it, and show the page."""
        words = [f"experiments/{Path(sys.argv[0]).name}", *(word for word in sys.argv[1:] if word != "tabulate")]
        about = {
            "command": f"python {shlex.join(words)}",
            "date": date.today().isoformat(),
            "torch": ", ".join(sorted(self.torch)) or version("torch").partition("+")[0],
            "cells": [sum(self.done.values()), len(self.done)],  # that are there, and that were asked for
            "weights": dict(sorted(self.weights.items())),
        }
        write_json(page.with_name("about.json"), about)
        print(f"\n{page.read_text(encoding='utf-8')}\n{page}")


def trained_in(cell: Cell) -> Path:
    """The folder that the model of a cell was trained in; of one that came trained, its name."""
    assert cell.run is not None
    path = (cell.run.about.get("checkpoint") or {}).get("path")
    return Path(path).parent if path else Path(f"{cell.dataset}-{cell.model}")


def started_from(cell: Cell) -> tuple[str, str] | None:
    """The folder's name and the weights of what a cell's model was hardened from, where its training tells."""
    file = trained_in(cell) / "summary.json"
    told = json.loads(file.read_text()) if file.exists() else {}
    return (Path(told["start"]).parent.name, told["start_weights"][:12]) if told.get("start_weights") else None


def _check_weights(cell: Cell) -> None:
    """Refuse to go on beside a finished cell whose model was trained again since, to other weights."""
    assert cell.run is not None
    file = trained_in(cell) / "summary.json"
    if file.exists() and (weights := json.loads(file.read_text())["weights"]) != cell.run.target[2]:
        sys.exit(
            f"{file.parent} was trained again, to other weights ({weights[:12]}) than those of {cell.folder} "
            f"({cell.run.target[2][:12]}), so that new attacks on it cannot stand beside old ones: remove the folders "
            f"of this model under {OUT}/attacks, and run the table again"
        )


def _listed(values: Iterable[object]) -> str:
    return ",".join(map(str, dict.fromkeys(values)))


def muroan(*words: str) -> None:
    """The command, in this process: importing torch takes as long as a small cell."""
    argv, trace = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [cli.__file__, *words]  # what Lightning starts its further processes with
    try:
        cli.main()
    finally:
        sys.argv = argv
        if trace is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
