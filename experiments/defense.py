"""Table 4, defence: models undefended, under controls, adversarially trained and under MMCert, attacked knowingly.

    python experiments/defense.py                           # see sweep.py for sizes; here 100 samples
    python experiments/defense.py defenses=plain_training,adversarial_training hardening.batches=null strong=none

Every model is attacked by the attack that its defence was trained on, by the others, by the removals that flip the
undefended model, by ours in search of flips that leave the label right (`valid` names the defences that this is done
for), and by that with ten times the budget, for which any flip will do (`strong`). What is certain: certified.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sweep import OUT, Sweep

from muroan.errors import MuroanError
from muroan.report import defenses
from muroan.report.cells import Cell
from muroan.report.defense_grid import UNDEFENDED

DEFENSES = ["plain_training", "random_removal_augmentation", "valid_removal_augmentation", "modality_dropout"]
DEFENSES += ["noise_augmentation"]
DEFENSES += ["adversarial_training", "adversarial_training_offline", "adversarial_training_pgd"]
DEFENSES += ["embedding_adversarial_training"]
ATTACKS = ["decoupling", "decoupling_fast", "random_removal", "pgd_linf", "feature_pgd"]
VALID = "attack.valid_only=true"
TEN_TIMES = [VALID, "threat_model.max_queries=5000"]
EVERY = ",".join(["none", *DEFENSES])
FULL = {
    "defenses": ",".join(DEFENSES),
    "attacks": ",".join(ATTACKS),
    "valid": EVERY,
    "strong": EVERY,
    "samples": "100",
}
QUICK = {
    "defenses": "plain_training,adversarial_training",
    "attacks": "decoupling",
    "valid": "",
    "strong": "",
}
# So much for every defence and control: 300 steps, 19,200 samples.
HARDENING = ["hardening.epochs=3", "hardening.batches=100"]
QUICK_HARDENING = ["hardening.epochs=1", "hardening.batches=2", "hardening.samples=8"]

COMPARISON = (
    "- for comparison: the paper (arXiv 2112.12792) finds traditional adversarial training insufficient against "
    "decoupling, on other data and with other weights; its tables are not available to us\n"
)


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
        places: dict[tuple[str, str], dict[tuple[str, int], None]] = {}  # of a defence and an attack
        nothing: dict[tuple[str, int], None] = {}  # where no model is hardened
        for (target, seed, attack), names in self.lacking.items():
            if (target, seed) not in self.hardened:
                nothing[target, seed] = None
                continue
            for name in names:
                places.setdefault((name, attack), {})[target, seed] = None
        together: dict[tuple[tuple[str, int], ...], dict[str, list[str]]] = {}
        for (name, attack), where in places.items():
            together.setdefault(tuple(where), {}).setdefault(name, []).append(attack)
        lines = [f"- not run: {_where(list(nothing))}\n"] if nothing else []
        for found, attacks_of in together.items():
            alike: dict[tuple[str, ...], list[str]] = {}
            for name, attacks in attacks_of.items():
                alike.setdefault(tuple(attacks), []).append(name)
            lines += [
                f"- not run: {_where(found)}: {', '.join(names)} under {', '.join(attacks)}\n"
                for attacks, names in alike.items()
            ]
        return lines


def _where(places: Sequence[tuple[str, int]]) -> str:
    """Targets and seeds; targets of the same seeds together."""
    seeds: dict[str, list[int]] = {}
    for target, seed in places:
        seeds.setdefault(target, []).append(seed)
    targets: dict[tuple[int, ...], list[str]] = {}
    for target, own in seeds.items():
        targets.setdefault(tuple(sorted(own)), []).append(target)
    return "; ".join(f"{', '.join(names)}, seed {', '.join(map(str, own))}" for own, names in targets.items())


def transferred(sweep: Sweep, dataset: str, defense: str, gathered: Gathered) -> None:
    """What flips each undefended model, tried on the hardened one."""
    for (model, _), sources in sweep.cells(dataset, ["decoupling"]).items():
        for source in (cell for cell in sources if cell.run is not None):
            one, run = sweep.only(model, source.seed), f"attack.run={source.folder}"
            gathered.add(defense, one.cells(dataset, ["transferred"], run, defense=defense))


def main() -> None:
    sweep = Sweep(full=FULL, quick=QUICK)
    sweep.options[:0] = QUICK_HARDENING if sweep.quick else HARDENING  # what was typed wins
    chosen = {key: [name for name in sweep.chosen[key].split(",") if name] for key in ("defenses", "valid", "strong")}
    gathered = Gathered()
    for dataset in sweep.datasets:
        gathered.add("none", sweep.cells(dataset, sweep.attacks))
        for defense in chosen["defenses"]:
            gathered.add(defense, sweep.cells(dataset, sweep.attacks, defense=defense))
            transferred(sweep, dataset, defense, gathered)
        for defense in chosen["valid"]:
            gathered.add(defense, sweep.cells(dataset, ["decoupling"], VALID, defense=defense), " (valid flips)")
        for defense in chosen["strong"]:
            gathered.add(defense, sweep.cells(dataset, ["decoupling_first"], *TEN_TIMES, defense=defense))
    try:
        page = defenses.write(gathered.folders, OUT / "defense", "defense")
    except MuroanError as error:
        sys.exit("".join([*gathered.missing(), str(error)]))
    page.write_text("".join([page.read_text(), *gathered.missing(), COMPARISON]))
    sweep.finish(page)


if __name__ == "__main__":
    main()
