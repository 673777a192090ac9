"""Table 5, baselines: every attack on every model within one budget; see sweep.py for sizes.

    python experiments/baselines.py values=300      # attacks that choose values, and corruptions, on so many samples

Two tables: `baselines` has what removes, `values` what does strictly more, and corruptions. The paired tests of
`muroan compare`, on the samples that two removal attacks share, are in outputs/experiments/baselines/compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sweep import KNOWN, TRAINED, Sweep

from muroan.report.cells import METRICS, Entry, Table

REMOVAL = ["decoupling", "decoupling_reference", "greedy_occlusion", "greedy_occlusion_rerank", "saliency_removal"]
REMOVAL += ["missing_modality", "decoupling_image"]
OWN = {"easy_vqa": ["decoupling_text", "leave_one_out"], "digit_sum": ["decoupling_audio"]}  # leave_one_out is of words
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
BUDGET = (
    "with at most {budget} passes through the model a sample, backward ones included. Many stop sooner, by limits of "
    "their own (docs/attacks.md)."
)
REMOVING = "Baselines: every removal attack on every model, on {samples} test samples of each dataset, "
CHOOSING = (
    "What chooses values, and so can do strictly more than remove, and corruptions, on {values} test samples of each "
    "dataset, "
)
SHOWN = ["clean_accuracy", "robust_accuracy", "attack_success_rate", "valid_success_rate", "curve_area"]
SHOWN += ["decoupled_fraction_mean", "decoupled_fraction_median", "proven", "queries", "backwards"]


def choosing(dataset: str) -> list[str]:
    return [*VALUES, *OF_TEXT[dataset]]


def removing(dataset: str) -> list[str]:
    return [*REMOVAL, *OWN[dataset], "random_removal", "random_removal_budget"]


def entries(sweep: Sweep, attacks: Callable[[str], Sequence[str]], *options: str) -> list[Entry]:
    """The rows of those of a dataset's attacks that are asked for, run with these options of muroan."""
    found = []
    for dataset in sweep.datasets:
        chosen = [attack for attack in attacks(dataset) if not sweep.attacks or attack in sweep.attacks]
        cells = sweep.cells(dataset, chosen, *options)
        found += [Entry(f"{dataset} · {model}", attack, cells[model, attack]) for model, attack in cells]
    return found


def corrupted(sweep: Sweep) -> list[Entry]:
    """The rows of those of the corruptions that are asked for, by severity."""
    found = []
    for dataset in sweep.datasets:
        chosen = [name for name in CORRUPTIONS[dataset] if not sweep.attacks or name in sweep.attacks]
        for severity in sweep.chosen["severities"].split(",") if chosen else ():
            # With ++, as Hydra looks for the option in its default attack before it comes to those of a sweep.
            cells = sweep.cells(dataset, chosen, f"++attack.severity={severity}")
            found += [Entry(f"{dataset} · {m}", f"{name}, severity {severity}", cells[m, name]) for m, name in cells]
    return found


def main() -> None:
    quick = {
        "attacks": "decoupling,random_removal,sparse_rs,gaussian_noise,word_masking",
        "values": "16",
        "severities": "3",
    }
    sweep = Sweep(full={"values": "100", "severities": "1,3,5"}, quick=quick)
    sweep.refuse_attacks_but({a for d in TRAINED for a in [*removing(d), *choosing(d), *CORRUPTIONS[d]]})
    metrics = [METRICS[name] for name in SHOWN]
    if removal := entries(sweep, removing):
        caption = (REMOVING + BUDGET).format(samples=sweep.samples, budget=sweep.budget)
        table = Table("baselines", caption, metrics, removal, known=KNOWN)
        sweep.write(table)
        sweep.compare(table)
    sweep.samples = sweep.chosen["values"]
    values = [*entries(sweep, choosing), *corrupted(sweep)]
    places = list(dict.fromkeys(entry.group for entry in values))
    values.sort(key=lambda entry: places.index(entry.group))  # a model's attacks and corruptions together
    if any(entry.runs for entry in values):
        caption = (CHOOSING + BUDGET).format(values=sweep.samples, budget=sweep.budget)
        # A corruption has nothing to draw: it is one draw at one severity, whatever the queries.
        attacks = {name for dataset in sweep.datasets for name in choosing(dataset)}
        sweep.write(Table("values", caption, metrics, values, drawn=lambda entry: entry.name in attacks))


if __name__ == "__main__":
    main()
