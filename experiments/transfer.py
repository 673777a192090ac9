"""Transfer: whether what flips one model flips the others, asked of `muroan transfer`; see sweep.py for sizes."""

from __future__ import annotations

import sys

from sweep import OUT, Sweep, muroan


def main() -> None:
    sweep = Sweep(full={"attacks": "decoupling", "seeds": "0"}, quick={"models": "late_fusion,concat"})
    cells = [
        cell
        for dataset in sweep.datasets
        for found in sweep.cells(dataset, sweep.attacks or ["decoupling"]).values()
        for cell in found
    ]
    folders = ",".join(str(cell.folder) for cell in cells if cell.run is not None)
    if sweep.tabulate:
        sys.exit("transfer has nothing to tabulate: it asks the models anew, which takes seconds; leave the word out")
    muroan("transfer", f"runs=[{folders}]", f"out={OUT}/transfer", *sweep.options)
    sweep.finish(OUT / "transfer/transfer.md")


if __name__ == "__main__":
    main()
