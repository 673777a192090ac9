"""Table 5 again, for the removal attacks that come in several forms: saliency_removal by each of its rankings, and
missing_modality with the mean picture, not only an empty one, in place of the image; see sweep.py for sizes.

Captum ranks by occlusion: pip install -e '.[captum]'. What puts another sample's values in the place of a modality
does more than remove, and is swapped_modality of the table of values.
"""

from __future__ import annotations

import sys

from baselines import SHOWN
from sweep import KNOWN, Sweep

from muroan.attacks.saliency_removal import METHODS
from muroan.report.cells import METRICS, Entry, Table

MEAN = "threat_model.replacement.image=mean"
CAPTION = (
    "Variants: removal attacks of the table of baselines in their other forms. {samples} test samples of each "
    "dataset, with at most {budget} passes through the model a sample, backward ones included."
)


def main() -> None:
    sweep = Sweep(full={"methods": ",".join(METHODS)}, quick={"methods": "gradient,integrated_gradients"})
    if sweep.attacks:
        got = ",".join(sweep.attacks)
        sys.exit(f"variants.py has attacks of its own, got attacks={got}: choose of methods={','.join(METHODS)}")
    entries = []
    for dataset in sweep.datasets:
        plain = sweep.cells(dataset, ["decoupling", "missing_modality"])
        mean = sweep.cells(dataset, ["decoupling", "missing_modality"], MEAN)
        ranked = {
            # With ++, as Hydra looks for the option in its default attack before it comes to those of a sweep.
            method: sweep.cells(dataset, ["saliency_removal"], f"++attack.method={method}")
            for method in sweep.chosen["methods"].split(",")
        }
        for model in sweep.models:
            where = f"{dataset} · {model}"
            entries += [Entry(where, attack, plain[model, attack]) for attack in ("decoupling", "missing_modality")]
            entries += [
                Entry(where, f"saliency_removal, {method.replace('_', ' ')}", cells[model, "saliency_removal"])
                for method, cells in ranked.items()
            ]
            where = f"{where}, mean in place of image regions"
            entries += [Entry(where, attack, mean[model, attack]) for attack in ("decoupling", "missing_modality")]
    caption = CAPTION.format(samples=sweep.samples, budget=sweep.budget)
    table = Table("variants", caption, [METRICS[name] for name in SHOWN], entries, known=KNOWN)
    sweep.write(table)
    sweep.compare(table)


if __name__ == "__main__":
    main()
