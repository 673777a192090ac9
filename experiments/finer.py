"""Table 5 again, with smaller image regions: how few elements a flip takes depends on how small a part may be.

    python experiments/finer.py finest=5       # halves what is longer than so many pixels

See sweep.py for sizes.
"""

from __future__ import annotations

from baselines import SHOWN, entries, removing
from sweep import KNOWN, TRAINED, Sweep

from muroan.report.cells import METRICS, Table

CAPTION = (
    "Finer regions: every removal attack as in the table of baselines, but image regions are split where they have a "
    "side longer than {finest} pixels, the other tables' longer than 10. {samples} test samples of each dataset, at "
    "most {budget} queries each."
)


def main() -> None:
    sweep = Sweep(full={"finest": "5"}, quick={"attacks": "decoupling,random_removal", "finest": "5"})
    sweep.refuse_attacks_but({attack for dataset in TRAINED for attack in removing(dataset)})
    finest = sweep.chosen["finest"]
    found = entries(sweep, removing, f"threat_model.min_side.image={finest}")
    caption = CAPTION.format(finest=finest, samples=sweep.samples, budget=sweep.budget)
    table = Table("finer", caption, [METRICS[name] for name in SHOWN], found, known=KNOWN)
    sweep.write(table)
    sweep.compare(table)


if __name__ == "__main__":
    main()
