"""Table 4, defence: models undefended, under controls, adversarially trained and under MMCert, attacked knowingly.

    python experiments/defense.py                                       # see sweep.py for sizes
    python experiments/defense.py defenses=plain_training,adversarial_training hardening.batches=100

Every model is attacked by the attack that its defence was trained on, by the others, by ours with ten times the budget,
and by the removals that flip the undefended model. MMCert is certified, and its vote attacked, on fewer samples.
"""

from __future__ import annotations

import json
from pathlib import Path

from sweep import OUT, TRAINED, Sweep, command, muroan

from muroan import cli
from muroan.report import defenses
from muroan.report.cells import Cell
from muroan.report.tables import figure

DEFENSES = ["plain_training", "random_removal_augmentation", "modality_dropout", "noise_augmentation"]
DEFENSES += ["adversarial_training", "adversarial_training_offline", "adversarial_training_pgd"]
DEFENSES += ["embedding_adversarial_training"]
ATTACKS = ["decoupling", "decoupling_fast", "decoupling_reference", "random_removal", "pgd_linf"]
STRONG = ["threat_model.max_queries=5000", "attack.patience=3000"]
FULL = {"defenses": ",".join(DEFENSES), "attacks": ",".join(ATTACKS), "certified": "50", "strong": "1"}
QUICK = {"defenses": "plain_training,adversarial_training", "attacks": "decoupling", "certified": "8", "strong": "0"}
QUICK_OPTIONS = ["hardening.epochs=1", "hardening.batches=2", "hardening.samples=8"]
CERTIFICATION = ["certification.votes=20", "threat_model.max_queries=60"]
QUICK_CERTIFICATION = ["certification.samples=40", "certification.selection=10"]


def found(cells: dict[tuple[str, str], tuple[Cell, ...]]) -> list[Path]:
    return [cell.folder for several in cells.values() for cell in several if cell.run is not None]


def transferred(sweep: Sweep, dataset: str, defense: str) -> list[Path]:
    """What flips each undefended model, tried on the hardened one."""
    folders = []
    for (model, _), sources in sweep.cells(dataset, ["decoupling"]).items():
        for source in (cell for cell in sources if cell.run is not None):
            one = sweep.only(model, source.seed)
            folders += found(one.cells(dataset, ["transferred"], f"attack.run={source.folder}", defense=defense))
    return folders


def certified(sweep: Sweep, dataset: str, samples: str) -> list[str]:
    """Certify MMCert's vote, attack it, and say in a line a model what holds."""
    lines = []
    options = [*CERTIFICATION, *(QUICK_CERTIFICATION if sweep.quick else [])]
    for model in sweep.models:
        for seed in sweep.seeds:
            one = sweep.only(model, seed)
            one.samples = samples
            attacked = found(
                one.cells(dataset, ["decoupling"], *options, "certification.smoothed=true", defense="mmcert")
            )
            words = [*TRAINED[dataset], *options, *sweep.options, "defense=mmcert", f"model={model}", f"seed={seed}"]
            words += [f"dataset.test_limit={samples}", f"certification.attacked=[{','.join(map(str, attacked))}]"]
            ((folder, _),) = next(cli.planned("certify", [words], [seed]))
            if not sweep.tabulate:
                muroan("certify", *words)
            if (folder / "summary.json").exists():
                lines.append(
                    f"- {dataset} · {model}, seed {seed}: {told(json.loads((folder / 'summary.json').read_text()))}"
                )
    return lines


def told(summary: dict) -> str:
    """The summary of a certification in words."""
    alone = ", ".join(
        f"{figure(size['elements'], 'count')} of {name} ({figure(size['percent'], 'fraction')} %)"
        for name, size in summary["alone"].items()
    )
    broken = sum(len(attack["broken"]) for attack in summary["attacks"].values())
    robust = ", ".join(figure(attack["robust_accuracy"], "rate") for attack in summary["attacks"].values())
    return (
        f"{figure(summary['accuracy'], 'rate')} % right with a certificate (of {summary['samples']} samples, "
        f"{summary['abstained']} abstained); median certified elements: {alone or 'none'}; robust accuracy of the vote "
        f"under decoupling {robust} %, certificates broken: {broken}"
    )


def main() -> None:
    sweep = Sweep(full=FULL, quick=QUICK)
    sweep.options += QUICK_OPTIONS if sweep.quick else []
    chosen = sweep.chosen
    folders, lines = [], []
    for dataset in sweep.datasets:
        folders += found(sweep.cells(dataset, sweep.attacks))
        for defense in filter(None, chosen["defenses"].split(",")):
            folders += found(sweep.cells(dataset, sweep.attacks, defense=defense))
            folders += transferred(sweep, dataset, defense)
        if chosen["strong"] != "0":
            for defense in ["none", *filter(None, chosen["defenses"].split(","))]:
                folders += found(sweep.cells(dataset, ["decoupling"], *STRONG, defense=defense))
        if chosen["certified"] != "0":
            lines += certified(sweep, dataset, chosen["certified"])
    page = defenses.write(folders, OUT / "defense", "defense")
    if lines:
        page.write_text(page.read_text() + "\nMMCert, a vote over ablated inputs:\n\n" + "\n".join(lines) + "\n")
    command(page)


if __name__ == "__main__":
    main()
