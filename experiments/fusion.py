"""Table 2, fusion: the same encoders under every fusion mechanism, attacked by ours; see sweep.py for sizes."""

from __future__ import annotations

from sweep import KNOWN, Sweep

from muroan.report.cells import METRICS, Entry, Table

MODELS = "concat,gated,tensor_fusion,low_rank_fusion,late_fusion,cross_attention,mmbt"
# One choice of conf/model/encoders for all fusions of a dataset: a transformer for each modality where there are words
# to be read before pooling; light convolutions for digits, as in all of experiment=digit_sum.
ENCODERS = {"easy_vqa": "transformer", "digit_sum": "small"}
CAPTION = (
    "Fusion: the same encoders (model/encoders={encoders}) under every fusion mechanism, trained alike; the head is "
    "the fusion's own: a sum of votes for late_fusion, a linear layer for mmbt, a small perceptron for the others. "
    "Attacked are {samples} test samples, with at most {budget} queries each. Samples that a model gets wrong are not "
    "attacked, so that the attacked ones differ a little from row to row."
)
SHOWN = ["clean_accuracy", "robust_accuracy", "attack_success_rate", "valid_success_rate", "curve_area"]
SHOWN += ["decoupled_fraction_mean", "decoupled_fraction_median", "queries"]


def main() -> None:
    sweep = Sweep(full={"models": MODELS, "attacks": "decoupling"}, quick={"models": "late_fusion,concat"})
    entries = []
    for dataset in sweep.datasets:
        cells = sweep.cells(dataset, sweep.attacks, f"model/encoders={ENCODERS[dataset]}")
        entries += [
            Entry(f"{dataset} · {attack}", model, cells[model, attack])
            for attack in sweep.attacks
            for model in sweep.models
        ]
    used = " and ".join(f"{ENCODERS[dataset]} on {dataset}" for dataset in sweep.datasets)
    caption = CAPTION.format(encoders=used, samples=sweep.samples, budget=sweep.budget)
    sweep.write(Table("fusion", caption, [METRICS[name] for name in SHOWN], entries, row="fusion", known=KNOWN))


if __name__ == "__main__":
    main()
