"""Vulnerability again, with smaller image regions: how few elements a flip takes depends on how small a part may be.

    python experiments/finer.py finest=5       # halves what is longer than so many pixels

See sweep.py for sizes.
"""

from __future__ import annotations

from sweep import KNOWN, Sweep

from muroan.report.cells import METRICS, Entry, Table

# Some of the removal attacks of Table 5, of which those of text or sound alone do not depend on image regions.
ATTACKS = "decoupling,decoupling_reference,greedy_occlusion,saliency_removal,random_removal"
CAPTION = (
    "Finer regions: as for vulnerability, but image regions are split where they have a side longer than {finest} "
    "pixels, the other tables' longer than 10. {samples} test samples of each dataset, at most {budget} queries each."
)
SHOWN = ["clean_accuracy", "robust_accuracy", "attack_success_rate", "valid_success_rate", "curve_area"]
SHOWN += ["decoupled_fraction_mean", "decoupled_fraction_median", "proven", "queries"]


def main() -> None:
    sweep = Sweep(
        full={"attacks": ATTACKS, "finest": "5"}, quick={"attacks": "decoupling,random_removal", "finest": "5"}
    )
    finest = sweep.chosen["finest"]
    entries = []
    for dataset in sweep.datasets:
        cells = sweep.cells(dataset, sweep.attacks, f"threat_model.min_side.image={finest}")
        entries += [Entry(f"{dataset} · {model}", attack, found) for (model, attack), found in cells.items()]
    caption = CAPTION.format(finest=finest, samples=sweep.samples, budget=sweep.budget)
    table = Table("finer", caption, [METRICS[name] for name in SHOWN], entries, known=KNOWN)
    sweep.write(table)
    sweep.compare(table)


if __name__ == "__main__":
    main()
