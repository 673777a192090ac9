"""Success by threat model: what stands in for what is removed, how fine it may be, how often one may ask, and whether
the label must stay right; see sweep.py.

One model by default. The budgets are read off one run, from the trajectories of its records.
"""

from __future__ import annotations

from sweep import KNOWN, Sweep

from muroan.report.cells import METRICS, Entry, Table

IMAGE = {"zero (the default)": "null", "mean": "mean", "blur": "blur", "noise": "noise"}
FINEST = {"10 pixels (the default)": "null", "5 pixels": "5", "20 pixels": "20"}
COARSER = {"easy_vqa": {"40 pixels": "40"}, "digit_sum": {}}  # as far as a picture is larger than that
REPLACED = {
    "easy_vqa": ("words", "text", {"left out (the default)": "null", "mask token": "mask"}),
    "digit_sum": ("sound", "audio", {"zero (the default)": "null", "noise": "noise"}),
}
VALID = {"all (the default)": "false", "those that leave the label right": "true"}
BUDGETS = (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
CAPTION = (
    "Threat model: {samples} test samples, at most {budget} queries each, and one thing at a time that is "
    "not as in the other tables. Regions with a side longer than the finest one are split. The smaller budgets are "
    "what the same run had in hand after so many queries; a search that knew of them might do better."
)
SHOWN = ["clean_accuracy", "robust_accuracy", "attack_success_rate", "valid_success_rate", "curve_area"]
SHOWN += ["decoupled_fraction_mean", "decoupled_fraction_median", "one_minimal", "queries"]


def settings(dataset: str, few: bool) -> dict[str, dict[str, str]]:
    """Heading -> name of a value -> its override."""
    what, modality, values = REPLACED[dataset]
    every = {
        "in place of image regions": ("threat_model.replacement.image", IMAGE),
        f"in place of {what}": (f"threat_model.replacement.{modality}", values),
        "finest image region": ("threat_model.min_side.image", FINEST | COARSER[dataset]),
        "flips searched for": ("attack.valid_only", VALID),
    }
    return {
        heading: {name: f"{key}={value}" for name, value in list(named.items())[: 2 if few else None]}
        for heading, (key, named) in every.items()
    }


def main() -> None:
    default = {"models": "mmbt", "attacks": "decoupling"}
    sweep = Sweep(full=default, quick={"attacks": "decoupling"})
    entries = []
    for dataset in sweep.datasets:
        found = {
            (heading, name): sweep.cells(dataset, sweep.attacks, override)
            for heading, values in settings(dataset, sweep.quick).items()
            for name, override in values.items()
        }
        for target in next(iter(found.values())):
            where = " · ".join((dataset, *target))
            entries += [Entry(f"{where}, {heading}", name, cells[target]) for (heading, name), cells in found.items()]
            run = next(iter(found.values()))[target]
            within = [most for most in BUDGETS if sweep.budget == "null" or most <= int(sweep.budget)]
            entries += [Entry(f"{where}, queries", f"at most {most}", run, most) for most in within]
    caption = CAPTION.format(samples=sweep.samples, budget=sweep.budget)
    sweep.write(
        Table("threat_model", caption, [METRICS[name] for name in SHOWN], entries, row="threat model", known=KNOWN)
    )


if __name__ == "__main__":
    main()
