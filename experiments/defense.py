"""Table 4, defence: models undefended, under controls, adversarially trained and under MMCert, attacked knowingly.

    python experiments/defense.py                           # see sweep.py for sizes; here 100 samples
    python experiments/defense.py defenses=plain_training,adversarial_training hardening.batches=null strong=none

Every model is attacked by the attack that its defence was trained on, by the others, by the removals that flip the
undefended model, by ours in search of flips that leave the label right (`valid` names the defences that this is done
for), and by that with ten times the budget, for which any flip will do (`strong`). MMCert is certified, and its vote
attacked, on `certified` samples.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sweep import OUT, TRAINED, Sweep, command, muroan

from muroan.cli.jobs import planned
from muroan.errors import MuroanError
from muroan.report import defenses
from muroan.report.cells import Cell
from muroan.report.defenses import UNDEFENDED
from muroan.report.tables import figure

DEFENSES = ["plain_training", "random_removal_augmentation", "modality_dropout", "noise_augmentation"]
DEFENSES += ["adversarial_training", "adversarial_training_offline", "adversarial_training_pgd"]
DEFENSES += ["embedding_adversarial_training"]
ATTACKS = ["decoupling", "decoupling_fast", "random_removal", "pgd_linf"]
VALID = "attack.valid_only=true"
TEN_TIMES = [VALID, "threat_model.max_queries=5000"]
EVERY = ",".join(["none", *DEFENSES])
FULL = {
    "defenses": ",".join(DEFENSES),
    "attacks": ",".join(ATTACKS),
    "valid": EVERY,
    "strong": EVERY,
    "certified": "50",
    "samples": "100",
}
QUICK = {
    "defenses": "plain_training,adversarial_training",
    "attacks": "decoupling",
    "valid": "",
    "strong": "",
    "certified": "8",
}
# So much for every defence and control: 300 steps, 19,200 samples.
HARDENING = ["hardening.epochs=3", "hardening.batches=100"]
QUICK_HARDENING = ["hardening.epochs=1", "hardening.batches=2", "hardening.samples=8"]
VOTE = ["certification.votes=20", "threat_model.max_queries=60"]
VOTES = ["certification.samples=40", "certification.selection=10"]  # when quick


class Gathered:
    """The folders of the cells that there are, and what there is not."""

    def __init__(self) -> None:
        self.folders: list[Path] = []
        self.hardened: set[tuple[str, int]] = set()  # target and seed of which there is any hardened model
        self.lacking: dict[tuple[str, int, str], dict[str, None]] = {}  # target, seed and attack: on which models

    def add(self, defense: str, cells: dict[tuple[str, str], tuple[Cell, ...]], searched: str = "") -> None:
        name = UNDEFENDED if defense == "none" else defense
        for cell in (cell for several in cells.values() for cell in several):
            target = f"{cell.dataset} · {cell.model}"
            if cell.run is None:
                self.lacking.setdefault((target, cell.seed, cell.attack + searched), {})[name] = None
                continue
            self.folders.append(cell.folder)
            if name != UNDEFENDED:
                self.hardened.add((target, cell.seed))

    def missing(self) -> list[str]:
        """A line for each group of cells that there are not."""
        groups: dict[tuple[str, str], dict[int, None]] = {}
        for (target, seed, attack), names in self.lacking.items():
            what = f", {', '.join(names)}, {attack}" if (target, seed) in self.hardened else ""
            groups.setdefault((target, what), {})[seed] = None
        return [
            f"- not run: {target}{what}, seed {', '.join(map(str, seeds))}\n"
            for (target, what), seeds in groups.items()
        ]


def transferred(sweep: Sweep, dataset: str, defense: str, gathered: Gathered) -> None:
    """What flips each undefended model, tried on the hardened one."""
    for (model, _), sources in sweep.cells(dataset, ["decoupling"]).items():
        for source in (cell for cell in sources if cell.run is not None):
            one, run = sweep.only(model, source.seed), f"attack.run={source.folder}"
            gathered.add(defense, one.cells(dataset, ["transferred"], run, defense=defense))


def certified(sweep: Sweep, dataset: str, samples: str) -> list[str]:
    """Certify MMCert's vote, attack it, and say in a line a model what holds."""
    lines = []
    options = [*VOTE, *(VOTES if sweep.quick else [])]
    for one in (sweep.only(model, seed) for model in sweep.models for seed in sweep.seeds):
        one.samples = samples
        attacked = Gathered()
        cells = one.cells(dataset, ["decoupling"], *options, "certification.smoothed=true", defense="mmcert")
        attacked.add("mmcert", cells)
        words = [*TRAINED[dataset], *sweep.options, *options, "defense=mmcert", f"model={one.models[0]}"]
        words += [f"seed={one.seeds[0]}", f"dataset.test_limit={samples}"]
        words += [f"certification.attacked=[{','.join(map(str, attacked.folders))}]"]
        ((folder, _),) = next(planned("certify", [words], one.seeds))
        if not sweep.tabulate:
            muroan("certify", *words)
        if (file := folder / "summary.json").exists():
            told = certificate(json.loads(file.read_text()))
            lines.append(f"- {dataset} · {one.models[0]}, seed {one.seeds[0]}: {told}\n")
    return lines


def certificate(summary: dict) -> str:
    """The summary of a certification in words."""
    alone = ", ".join(
        f"{figure(size['elements'], 'count')} of {name} ({figure(size['percent'], 'fraction')} %)"
        for name, size in summary["alone"].items()
    )
    broken = sum(len(attack["broken"]) for attack in summary["attacks"].values())
    robust = ", ".join(figure(attack["robust_accuracy"], "rate") for attack in summary["attacks"].values())
    return (
        f"{figure(summary['accuracy'], 'rate')} % right and not abstaining (of {summary['samples']} samples, "
        f"{summary['abstained']} abstained), half of these certified against {alone or 'nothing'} or more; robust "
        f"accuracy of the vote under decoupling {robust or '–'} %, certificates broken: {broken}"
    )


def main() -> None:
    sweep = Sweep(full=FULL, quick=QUICK)
    sweep.options[:0] = QUICK_HARDENING if sweep.quick else HARDENING  # what was typed wins
    chosen = {key: [name for name in sweep.chosen[key].split(",") if name] for key in ("defenses", "valid", "strong")}
    gathered, lines = Gathered(), []
    for dataset in sweep.datasets:
        gathered.add("none", sweep.cells(dataset, sweep.attacks))
        for defense in chosen["defenses"]:
            gathered.add(defense, sweep.cells(dataset, sweep.attacks, defense=defense))
            transferred(sweep, dataset, defense, gathered)
        for defense in chosen["valid"]:
            gathered.add(defense, sweep.cells(dataset, ["decoupling"], VALID, defense=defense), " (valid flips)")
        for defense in chosen["strong"]:
            gathered.add(defense, sweep.cells(dataset, ["decoupling_first"], *TEN_TIMES, defense=defense))
        if sweep.chosen["certified"] != "0":
            lines += certified(sweep, dataset, sweep.chosen["certified"])
    try:
        page = defenses.write(gathered.folders, OUT / "defense", "defense")
    except MuroanError as error:
        sys.exit("".join([*gathered.missing(), str(error)]))
    parts = [page.read_text(), *gathered.missing()]
    parts += ["\nMMCert, a vote over ablated inputs:\n\n", *lines] if lines else []
    page.write_text("".join(parts))
    command(page)


if __name__ == "__main__":
    main()
