"""What each modality alone reaches: models trained on each part of a dataset and on all; see sweep.py for sizes."""

from __future__ import annotations

from statistics import mean

from sweep import OUT, Sweep

from muroan.report.markup import write_csv
from muroan.report.tables import figure

MODALITIES = {"easy_vqa": ["image", "text"], "digit_sum": ["image", "audio"]}
CAPTION = "Test accuracy of the same model trained on each modality alone and on all of them; means over the seeds."


def main() -> None:
    sweep = Sweep(full={"models": "mmbt,concat", "seeds": "0"}, quick={"models": "concat"})
    missing = ""
    rows: list[list[object]] = [["dataset", "model", "trained on", "seeds", "test_accuracy"]]
    for dataset in sweep.datasets:
        parts = [*MODALITIES[dataset], "all"]
        chosen = ["null" if part == "all" else f"[{part}]" for part in parts]
        found = [sweep.trained(dataset, f"dataset.use={use}") for use in chosen]
        for model in sweep.models:
            for part, summaries in zip(parts, found, strict=True):
                known = {seed: summary for seed, summary in zip(sweep.seeds, summaries[model], strict=True) if summary}
                accuracy = mean(summary["accuracy"]["test"] for summary in known.values()) if known else None
                rows.append([dataset, model, part, " ".join(map(str, known)), accuracy])
                if lacking := [seed for seed in sweep.seeds if seed not in known]:
                    missing += f"- not run: {dataset} · {model} on {part}, seed {', '.join(map(str, lacking))}\n"
    out = OUT / "unimodal"
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "unimodal.csv", rows)
    lines = [[*map(str, rows[0][:-1]), "test accuracy (%)"]]
    lines += [[*map(str, names), figure(accuracy, "rate")] for *names, accuracy in rows[1:]]
    sweep.page("unimodal", CAPTION, lines, 4, missing)


if __name__ == "__main__":
    main()
