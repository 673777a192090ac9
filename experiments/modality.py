"""Table 3, modality: decoupling in one modality alone and jointly, and who carries the joint removals; see sweep.py."""

from __future__ import annotations

from sweep import KNOWN, Sweep

from muroan.report.cells import BY_MODALITY, METRICS, SHARES, Entry, Table

NAMES = {
    "decoupling_image": "image alone",
    "decoupling_text": "text alone",
    "decoupling_audio": "audio alone",
    "decoupling": "jointly",
}
ATTACKS = {
    "easy_vqa": ["decoupling_image", "decoupling_text", "decoupling"],
    "digit_sum": ["decoupling_image", "decoupling_audio", "decoupling"],
}
CAPTION = (
    "Modality: {samples} test samples, at most {budget} queries each. Fractions by modality are over the "
    "elements of that modality. The shares say in which modality alone a removal lies, or that it lies in several "
    "jointly; interaction, that it flips only jointly, none of its parts in one modality alone."
)
SHOWN = ["clean_accuracy", "robust_accuracy", "attack_success_rate", "valid_success_rate"]
SHOWN += ["decoupled_fraction_mean", "decoupled_fraction_median"]


def main() -> None:
    sweep = Sweep(full={}, quick={})
    entries = []
    for dataset in sweep.datasets:
        cells = sweep.cells(dataset, sweep.attacks or ATTACKS[dataset])
        entries += [
            Entry(f"{dataset} · {model}", NAMES.get(attack, attack), found) for (model, attack), found in cells.items()
        ]
    columns = [*(METRICS[name] for name in SHOWN), *BY_MODALITY, *SHARES]
    caption = CAPTION.format(samples=sweep.samples, budget=sweep.budget)
    sweep.write(Table("modality", caption, columns, entries, row="removed from", known=KNOWN))


if __name__ == "__main__":
    main()
