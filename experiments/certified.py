"""What is certain: MMCert's certificates beside what decoupling leaves of the same vote; see sweep.py for sizes.

    python experiments/certified.py elements=single        # or larger

Every model is fine-tuned on ablated inputs as the defences of Table 4 are, its vote certified, and attacked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean

from defense import HARDENING, QUICK_HARDENING
from sweep import OUT, TRAINED, Sweep, muroan, trained_in

from muroan.certification import Certificate, CertificateFolder, matched, summarise
from muroan.cli.jobs import planned
from muroan.metrics import pooled
from muroan.report.cells import Cell
from muroan.report.compare import Estimate
from muroan.report.markup import write_csv
from muroan.report.plots import Certified, certified_curves
from muroan.report.tables import figure, interval
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
    "input a tenth of the pixels, half of the tokens and a fifth of the sound (the silence after it included) are "
    "kept. *larger*: on easy_vqa squares of 8 × 8 pixels, of which a tenth are kept, and three tokens, for an "
    "attacker who can only delete words; on digit_sum squares of 4 × 4 and stretches of 10 ms, of which a fifth are"
    " kept. Where half of the tokens are kept, no vote, however clear, can certify a single one (delta is at least "
    "a half), so that the 0.0 of words in *single* are a matter of that setting. *Undefended* is the accuracy of "
    "the model that the fine-tuning started from, *ablated* that of the fine-tuned one on single ablated inputs, "
    "both on the whole test set: a fine-tuning as short as that of Table 4 leaves these models far from what they "
    "might learn, and a vote is no better than its voters. *Right* are votes that are right and do not abstain; "
    "*certified* are those of them that no attacker can change who alters one element of that modality alone, in "
    "percent of all samples, with the 95 % interval over these; the largest certificates are in elements. *Left* is"
    " what decoupling, with {budget} queries to a vote of 20 fixed masks, leaves right. *Broken* are certificates "
    "within which the attack flipped the vote, and *within reach* those that could have been: that are no smaller "
    "than some flip of a sample of the row."
)
JOINT = {
    False: "No certificate covers an element of both modalities at once, so that the certified curves end before the "
    "first one of the modality with fewer elements. ",
    True: "",
}
CURVES = (
    "The curves are those of the first seed. That of the attack is of another vote, of fixed masks and without "
    "abstaining, so that it may begin higher, and of the one removal in its record, so that it is an upper bound."
)
HEADS = ["dataset", "model", "elements", "seed numbers", "undefended (%)", "ablated (%)", "right (%)", "abstained (%)"]
HEADS += ["image certified (%)", "largest", "text or audio certified (%)", "largest"]
HEADS += ["left (%)", "broken", "within reach"]
SPANNED = ("right (%)", "image certified (%)", "text or audio certified (%)")  # with an interval


def certify(sweep: Sweep, dataset: str, cell: Cell, options: Sequence[str]) -> Path | None:
    """The folder of a model's certificates, held against the attack; None where there is none."""
    words = [f"sweep={Path(__file__).stem}", *TRAINED[dataset], *options, "defense=mmcert", f"model={cell.model}"]
    words += [f"dataset.test_limit={sweep.samples}", f"certification.attacked=[{cell.folder}]"]
    ((place,),) = planned("certify", [words], [cell.seed])
    if not sweep.tabulate:
        muroan("certify", *words, f"seed={cell.seed}")
    return place[0] if (place[0] / "summary.json").exists() else None


def figures(folders: Mapping[Path, Run]) -> tuple[list[float | int | None], list[Estimate]]:
    """The figures of a row, means over the seeds; sizes and breaks are the largest and all.

    Args:
        folders: of certificates, with the attack that each was held against; there may have been others.

    Returns:
        The figures, and the intervals of those in `SPANNED`.
    """
    certificates = [CertificateFolder(folder).records() for folder in folders]
    found = [summarise(one) for one in certificates]
    held = [(json.loads((f / "summary.json").read_text())["attacks"], run.key) for f, run in folders.items()]
    attacks = [known[key] for known, key in held if key in known]

    def rate(certain: Callable[[Certificate], bool]) -> Estimate:
        return pooled([{c.id: 100.0 * bool(c.limit and certain(c)) for c in one} for one in certificates], "rate")

    names = list(certificates[0][0].n)
    right, *alone = rate(lambda c: True), *(rate(lambda c, name=name: c.alone[name] > 0) for name in names)
    told: list[float | int | None] = []
    for name, estimate in zip(names, alone, strict=True):
        told += [estimate["value"], max((c.alone[name] for one in certificates for c in one if c.limit), default=0)]
    figures = [
        right["value"],
        mean(100 * one["abstained"] / one["samples"] for one in found),
        *told,
        mean(attack["robust_accuracy"] for attack in attacks) if attacks else None,
        sum(len(attack["broken"]) for attack in attacks),
        within_reach(list(zip(certificates, folders.values(), strict=True))),
    ]
    return figures, [right, *alone]


def within_reach(seeds: Sequence[tuple[Sequence[Certificate], Run]]) -> int:
    """Certificates, of all seeds, that would cover what flipped any sample: flips were small enough to break them."""
    pairs = [pair for certificates, run in seeds for pair in matched(certificates, run.records)]
    flips = [altered for c, record in pairs if record.mislabelled and (altered := c.altered(record)) is not None]
    return sum(bool(c.limit) and any(map(c.covers, flips)) for certificates, _ in seeds for c in certificates)


def main() -> None:
    full = {"samples": "50", "elements": "single,larger"}
    sweep = Sweep(full=full, quick={**full, "samples": "8", "elements": "larger"})
    rows: list[list[object]] = []
    intervals: list[list[Estimate]] = []
    votes: dict[str, Certified] = {}  # of the first seed
    joint = False
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
                    seeds = " ".join(map(str, folders))
                    attacks = {folders[cell.seed]: cell.run for cell in cells if cell.run and cell.seed in folders}
                    files = [trained_in(cell) / "summary.json" for cell in cells if cell.seed in folders]
                    tuned = [json.loads(file.read_text()) for file in files if file.exists()]
                    accuracies = [
                        mean(s["accuracy"]["test"] for s in own) if own else None for own in (summaries, tuned)
                    ]
                    told, spans = figures(attacks)
                    rows.append([dataset, model, elements, seeds, *accuracies, *told])
                    intervals.append(spans)
                    every = (c for folder in folders.values() for c in CertificateFolder(folder).records())
                    joint |= any(min(c.joint.values(), default=0) > 0 for c in every)
    out = OUT / "certified"
    out.mkdir(parents=True, exist_ok=True)
    names = ["image largest", "other largest"]
    heads = [names.pop(0) if head == "largest" else head for head in HEADS]
    heads += [f"{head} {end}" for head in SPANNED for end in ("low", "high")]
    ends = [[span[end] for span in spans for end in ("low", "high")] for spans in intervals]
    write_csv(out / "certified.csv", [heads, *([*row, *own] for row, own in zip(rows, ends, strict=True))])
    if votes:
        (out / "certified.png").write_bytes(certified_curves(votes))
    budget = dict(word.split("=", 1) for word in [*VOTE, *sweep.options])["threat_model.max_queries"]
    caption = CAPTION.format(samples=sweep.samples, budget=budget)
    lines = [written(row, spans) for row, spans in zip(rows, intervals, strict=True)]
    sweep.page("certified", caption, [HEADS, *lines], 4, f"{JOINT[joint]}{CURVES}\n\n", missing)


def written(row: Sequence[object], spans: Sequence[Estimate]) -> list[str]:
    """A row as the page has it: whole numbers are counts, and others percent, some with their interval."""
    found = [figure(value, "rate") if isinstance(value, float | None) else str(value) for value in row]
    for head, span in zip(SPANNED, spans, strict=True):
        found[HEADS.index(head)] += f" [{interval(span, 'rate')}]"
    return found


if __name__ == "__main__":
    main()
