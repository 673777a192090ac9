"""What is certain: MMCert's certificates beside what decoupling leaves of the same vote; see sweep.py for sizes.

    python experiments/certified.py elements=single        # or larger

Every model is fine-tuned on ablated inputs as the defences of Table 4 are, its vote certified, and attacked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from defense import HARDENING, QUICK_HARDENING
from sweep import OUT, TRAINED, Sweep, muroan

from muroan.certification import CertificateFolder, summarise
from muroan.cli.jobs import planned
from muroan.report.cells import Cell
from muroan.report.markup import markdown_table, write_csv
from muroan.report.plots import Certified, certified_curves
from muroan.report.tables import figure
from muroan.runs import Run

# What an element is, and what is kept: pixels, samples of sound and tokens, as conf/defense/mmcert.yaml has it; or
# squares, stretches of 10 ms, and a fixed number of tokens, which an attacker can only delete.
ELEMENTS = {
    "single": {"easy_vqa": [], "digit_sum": []},
    "larger": {
        "easy_vqa": ["defense.element.image=8", "defense.keep.text=3", "certification.deleted=[text]"],
        "digit_sum": [
            "defense.element.image=4",
            "defense.element.audio=80",
            "defense.keep.image=0.2",
            "defense.keep.audio=0.2",
        ],
    },
}
VOTE = ["certification.votes=20", "threat_model.max_queries=60"]
VOTES = ["certification.samples=40", "certification.selection=10"]  # when quick
CAPTION = (
    "MMCert on {samples} test samples. *single*: an element is a pixel, a token or a sample of sound, and of each "
    "input a tenth of the pixels, half of the tokens and a fifth of the sound are kept. *larger*: on easy_vqa squares "
    "of 8 × 8 pixels, of which a tenth are kept, and three tokens, for an attacker who can only delete words; on "
    "digit_sum squares of 4 × 4 and stretches of 10 ms, of which a fifth are kept. *Undefended* is the accuracy of the "
    "model that the fine-tuning started from, on the whole test set. *Right* are votes that are right and do not "
    "abstain; *certified* are those of them that no attacker can change who alters one element of that modality "
    "alone, in percent of all samples; *at most* is the largest certificate, in elements. *Left* is what decoupling, "
    "with {budget} queries to a vote of 20, leaves right."
)
HEADS = ["dataset", "model", "elements", "seeds", "undefended (%)", "right (%)", "abstained (%)"]
HEADS += ["image certified (%)", "at most", "text or audio certified (%)", "at most"]
HEADS += ["left (%)", "broken"]


def certify(sweep: Sweep, dataset: str, cell: Cell, options: Sequence[str]) -> Path | None:
    """The folder of a model's certificates, held against the attack; None where there is none."""
    words = [f"sweep={Path(__file__).stem}", *TRAINED[dataset], *options, "defense=mmcert", f"model={cell.model}"]
    words += [f"dataset.test_limit={sweep.samples}", f"certification.attacked=[{cell.folder}]"]
    ((place,),) = planned("certify", [words], [cell.seed])
    if not sweep.tabulate:
        muroan("certify", *words, f"seed={cell.seed}")
    return place[0] if (place[0] / "summary.json").exists() else None


def figures(folders: Mapping[Path, Run]) -> list[float | int | None]:
    """The figures of a row, means over the seeds; sizes and breaks are the largest and all.

    Args:
        folders: of certificates, with the attack that each was held against; there may have been others.
    """
    certificates = [CertificateFolder(folder).records() for folder in folders]
    found = [summarise(one) for one in certificates]
    held = [(json.loads((f / "summary.json").read_text())["attacks"], run.key) for f, run in folders.items()]
    attacks = [known[key] for known, key in held if key in known]
    alone: list[float | int] = []
    for name in certificates[0][0].n:
        alone += [mean(one["alone"][name]["any"] if one["alone"] else 0.0 for one in found)]
        alone += [max((c.alone[name] for each in certificates for c in each if c.limit), default=0)]
    return [
        mean(one["accuracy"] for one in found),
        mean(100 * one["abstained"] / one["samples"] for one in found),
        *alone,
        mean(attack["robust_accuracy"] for attack in attacks) if attacks else None,
        sum(len(attack["broken"]) for attack in attacks),
    ]


def main() -> None:
    full = {"samples": "50", "elements": "single,larger"}
    sweep = Sweep(full=full, quick={**full, "samples": "8", "elements": "larger"})
    rows: list[list[object]] = []
    votes: dict[str, Certified] = {}  # of the first seed
    missing = ""
    for dataset in sweep.datasets:
        base = sweep.trained(dataset)
        for elements in sweep.chosen["elements"].split(","):
            # What was typed wins.
            options = [*(QUICK_HARDENING if sweep.quick else HARDENING), *VOTE, *(VOTES if sweep.quick else [])]
            options += [*ELEMENTS[elements][dataset], *sweep.options]
            attacked = sweep.cells(dataset, ["decoupling"], *options, "certification.smoothed=true", defense="mmcert")
            for (model, _), cells in attacked.items():
                found = {cell.seed: certify(sweep, dataset, cell, options) for cell in cells if cell.run is not None}
                folders = {seed: folder for seed, folder in found.items() if folder is not None}
                if lacking := [seed for seed in sweep.seeds if seed not in folders]:
                    missing += f"- not run: {dataset} · {model}, {elements}, seed {', '.join(map(str, lacking))}\n"
                if folders:
                    first = next(cell for cell in cells if cell.seed in folders)
                    assert first.run is not None
                    certificates = CertificateFolder(folders[first.seed]).records()
                    votes[f"{dataset} · {model}, {elements}"] = certificates, [("decoupling", first.run.records)]
                    summaries = [s for seed, s in zip(sweep.seeds, base[model], strict=True) if s and seed in folders]
                    accuracy = mean(summary["accuracy"]["test"] for summary in summaries) if summaries else None
                    seeds = " ".join(map(str, folders))
                    attacks = {folders[cell.seed]: cell.run for cell in cells if cell.run and cell.seed in folders}
                    rows.append([dataset, model, elements, seeds, accuracy, *figures(attacks)])
    out = OUT / "certified"
    out.mkdir(parents=True, exist_ok=True)
    names = ["image_at_most", "other_at_most"]
    write_csv(out / "certified.csv", [[names.pop(0) if head == "at most" else head for head in HEADS], *rows])
    if votes:
        (out / "certified.png").write_bytes(certified_curves(votes))
    budget = dict(word.split("=", 1) for word in [*VOTE, *sweep.options])["threat_model.max_queries"]
    page = out / "certified.md"
    caption = CAPTION.format(samples=sweep.samples, budget=budget)
    page.write_text(f"{caption}\n\n{markdown_table([HEADS, *map(written, rows)], texts=4)}\n{missing}")
    sweep.finish(page)


def written(row: Sequence[object]) -> list[str]:
    """A row as the page has it: whole numbers are counts, and others percent."""
    return [figure(value, "rate") if isinstance(value, float | None) else str(value) for value in row]


if __name__ == "__main__":
    main()
