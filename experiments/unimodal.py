"""What each modality alone reaches: the same model trained on each part of a dataset and on all of it.

    python experiments/unimodal.py dataset=easy_vqa image text
    python experiments/unimodal.py experiment=digit_sum image audio model=concat

Words without `=` are the modalities, the others go to `muroan train`. Prints a Markdown table; finished trainings are
not run again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def main() -> None:
    modalities = [word for word in sys.argv[1:] if "=" not in word]
    overrides = [word for word in sys.argv[1:] if "=" in word]
    uses = [*(f"[{name}]" for name in modalities), "null"]
    out = Path("outputs/unimodal")
    folder = (
        f"folders.train='{out}/${{hydra:runtime.choices.dataset}}-${{hydra:runtime.choices.model}}-${{cell:train}}'"
    )
    command = [sys.executable, "-m", "muroan.cli", "train", "-m", *overrides, folder, f"dataset.use={','.join(uses)}"]
    subprocess.run(command, check=True)

    found: dict[tuple[str, str], tuple[float, float]] = {}
    for file in out.glob("*/summary.json"):
        summary = json.loads(file.read_text())
        used = summary["identity"]["dataset"]["use"]
        what = "all" if used is None else " + ".join(used)
        found[file.parent.name.rsplit("-", 1)[0], what] = summary["accuracy"]["val"], summary["accuracy"]["test"]
    print("\n| dataset, model | modalities | validation accuracy, % | test accuracy, % |\n|---|---|---:|---:|")
    for (trained, what), (val, test) in sorted(found.items(), key=lambda item: (item[0][0], item[1][1])):
        print(f"| {trained} | {what} | {val:.1f} | {test:.1f} |")


if __name__ == "__main__":
    main()
