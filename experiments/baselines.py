"""Table 5, baselines: every attack on every model within one budget; see sweep.py for sizes.

    python experiments/baselines.py values=300      # attacks that choose values, and corruptions, on so many samples

The paired tests of `muroan compare`, on the samples that two attacks share, are in
outputs/experiments/baselines/compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

from sweep import KNOWN, OUT, Sweep, write

from muroan.report import compare
from muroan.report.cells import METRICS, Cell, Entry, Table

REMOVAL = ["decoupling", "decoupling_reference", "greedy_occlusion", "greedy_occlusion_rerank", "saliency_removal"]
REMOVAL += ["leave_one_out", "missing_modality", "decoupling_image"]
ONE_MODALITY = {"easy_vqa": ["decoupling_text"], "digit_sum": ["decoupling_audio"]}
VALUES = [
    "sparse_rs",
    "one_pixel",
    "pgd_linf",
    "pgd_l2",
    "pgd_l0",
    "sigma_zero",
    "fusion_embedding",
    "swapped_modality",
]
OF_TEXT = {"easy_vqa": ["word_substitution", "co_attack"], "digit_sum": []}
CORRUPTIONS = {
    "easy_vqa": ["gaussian_noise", "salt_and_pepper", "word_masking"],
    "digit_sum": ["gaussian_noise", "salt_and_pepper", "audio_noise"],
}
CAPTION = (
    "Baselines: every attack on every model, with at most {budget} passes through the model a sample, backward ones "
    "included. Many stop sooner, by limits of their own (docs/attacks.md). Removal attacks on {samples} test samples "
    "of each dataset; what chooses values, and so can do strictly more than remove, and corruptions on {values} of "
    "these."
)
SHOWN = ["clean_accuracy", "robust_accuracy", "attack_success_rate", "valid_success_rate", "curve_area"]
SHOWN += ["decoupled_fraction_mean", "decoupled_fraction_median", "proven", "queries", "backwards"]


def attacks_on(dataset: str) -> list[str]:
    removal = [*REMOVAL, *ONE_MODALITY[dataset], "random_removal", "random_removal_budget"]
    return [*removal, *VALUES, *OF_TEXT[dataset], *CORRUPTIONS[dataset]]


def attacked(sweep: Sweep, dataset: str, attacks: Sequence[str]) -> dict[tuple[str, str], tuple[Cell, ...]]:
    """The cells of all attacks on all models, removal attacks on more samples than the others."""
    others = [*VALUES, *OF_TEXT[dataset], *CORRUPTIONS[dataset]]
    fewer = copy(sweep)
    fewer.samples = sweep.chosen["values"]
    cells = sweep.cells(dataset, [attack for attack in attacks if attack not in others])
    cells |= fewer.cells(dataset, [attack for attack in attacks if attack in others])
    return {(model, attack): cells[model, attack] for model in sweep.models for attack in attacks}


def main() -> None:
    quick = {"attacks": "decoupling,random_removal,sparse_rs,gaussian_noise", "values": "16"}
    sweep = Sweep(full={"values": "100"}, quick=quick)
    entries = []
    for dataset in sweep.datasets:
        cells = attacked(sweep, dataset, sweep.attacks or attacks_on(dataset))
        entries += [Entry(f"{dataset} · {model}", attack, found) for (model, attack), found in cells.items()]
    caption = CAPTION.format(samples=sweep.samples, values=sweep.chosen["values"], budget=sweep.budget)
    table = Table("baselines", caption, [METRICS[name] for name in SHOWN], entries, known=KNOWN)
    table.drawn = lambda row: row.runs[0].kind == "removal"
    write(table)
    folders = [cell.folder for entry in entries for cell in entry.cells if cell.run is not None]
    if folders:
        print(compare.write(folders, OUT / "baselines/compare"))


if __name__ == "__main__":
    main()
