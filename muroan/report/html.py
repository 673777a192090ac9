"""One self-contained page about one or several runs, and the files beside it."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from muroan.errors import MuroanError
from muroan.report import certificates, defense_grid, defenses, examples, plots, tables
from muroan.report.paired import UNCONTROLLED, AgainstControl, against_controls, by_target, without_control
from muroan.report.tables import figure, interval, whole
from muroan.results import Count, write_json
from muroan.runs import Run, find_runs

NAMED = 4  # models that a title names


def build(folders: Sequence[Path], out: Path) -> Path:
    """Write the report of finished, or unfinished, runs from their records alone. No model is loaded.

    The same records give the same bytes.

    Args:
        folders: run folders, or folders that hold such at any depth; folders of certificates may be among them.
        out: folder for `report.html`, `table.md`, `curve.png`, `summary.json` and `records.jsonl`, the records
            of all runs, each with its `run`, `model` and `dataset`; made when missing.

    Returns:
        The path of `report.html`.

    Raises:
        MuroanError: a folder holds no run, or a file of a run cannot be understood.
    """
    certified, attacked = certificates.certificate_folders(folders)
    runs = find_runs(attacked or folders)
    votes, said = certificates.find_votes(certified, runs)
    comparisons = against_controls(runs)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "records.jsonl").open("w") as file:
        for run in runs:
            which = {"run": run.folder, "model": run.model, "dataset": run.dataset}
            file.writelines(json.dumps({**which, **json.loads(r.to_json())}) + "\n" for r in run.records)
    summary = tables.summary(runs, comparisons)
    write_json(out / "summary.json", {**summary, "certificates": certificates.summary(votes)} if votes else summary)
    (out / "table.md").write_text(tables.markdown(runs), encoding="utf-8")
    curve = plots.curve(runs)
    (out / "curve.png").write_bytes(curve)
    page = out / "report.html"
    text = render(runs, comparisons, curve, votes, said)
    page.write_text(text, encoding="utf-8", errors="replace")  # of half an emoji
    return page


def render(
    runs: Sequence[Run],
    comparisons: Sequence[AgainstControl],
    curve: bytes,
    votes: Sequence[certificates.Vote],
    doubts: Sequence[str],
) -> str:
    """The page, everything that it shows inside it.

    Args:
        curve: the PNG for a wide, light page; votes, doubts: see `find_votes`.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters.update(
        figure=figure,
        whole=whole,
        json=lambda content: json.dumps(content, indent=2, ensure_ascii=False),
    )
    template = environment.from_string(
        resources.files("muroan.report").joinpath("report.html.jinja").read_text("utf-8")
    )
    modalities = sorted({name for run in runs for name in run.modalities})
    narrow = (4.4, 4.8)  # inches: a phone, where the wide figure's letters would be too small
    curves = {
        "wide": curve,
        "wide_dark": plots.curve(runs, dark=True),
        "narrow": plots.curve(runs, False, *narrow),
        "narrow_dark": plots.curve(runs, True, *narrow),
    }
    said, grids = [*warnings(runs, comparisons), *doubts], []
    if any(run.about.get("defense") for run in runs):
        try:
            grids = defense_grid.grids(runs)
        except MuroanError as error:  # of runs that are too many for a grid the rest of the page can still be told
            said.append(f"There is no table of defences: {error}")
    histograms, ticks = plots.query_histograms(runs)
    # The target that its attack hurts most comes first.
    groups = sorted(by_target(runs), key=lambda group: -(_strongest(group).value("attack_success_rate") or 0.0))
    models = sorted({str(run.about["model"]) for run in runs})
    page = template.render(
        runs=runs,
        lead=_strongest(groups[0]),
        title=f"Robustness of {_listed(models) if len(models) <= NAMED else f'{len(models)} models'}",
        many=plots.crowded(runs),
        findings=[finding(group) for group in groups],
        warnings=said,
        comparisons=comparisons,
        grids=grids,
        defenses=defenses,
        votes=votes,
        certificates=certificates,
        certified={
            name: base64.b64encode(certificates.picture(votes, dark)).decode()
            for name, dark in {"light": False, "dark": True}.items()
            if votes
        },
        samples={run.dataset: len({r.id for x in runs if x.dataset == run.dataset for r in x.records}) for run in runs},
        attacks=list(dict.fromkeys(run.attack for run in runs)),
        colour=plots.colours(runs),
        palettes=plots.COLOURS,
        main=tables.present(tables.MAIN, runs),
        by_modality=tables.by_modality(runs),
        search=tables.present(tables.SEARCH, runs),
        kinds=tables.KINDS,
        cell=tables.cell,
        interval=interval,
        definitions=tables.DEFINITIONS,
        statuses=tables.STATUSES,
        nothing=tables.NOTHING,
        curves={name: base64.b64encode(png).decode() for name, png in curves.items()},
        modalities=modalities,
        shares=[plots.shares(run, modalities) for run in runs],
        histograms=histograms,
        ticks=ticks,
        examples=examples.choose(runs),
        draw_all=examples.draw_all,
        ledger=mean_ledger,
    )
    return page.lstrip()


def mean_ledger(run: Run) -> dict[str, Count]:
    """What an attacked sample cost on average, by phase; the fields of each count are means."""
    spent = [r.ledger for r in run.records if r.attacked]
    phases = dict.fromkeys(phase for ledger in spent for phase in ledger)

    def mean(phase: str, what: str) -> Any:
        return sum(getattr(ledger.get(phase, Count()), what) for ledger in spent) / len(spent)

    fields = ("queries", "forwards", "cache_hits", "backwards")
    return {phase: Count(*(mean(phase, field) for field in fields)) for phase in phases}


def _strongest(group: Sequence[Run]) -> Run:
    """The guided removal attack that flips most; another kind or a random control where there is nothing else."""

    def rank(run: Run) -> tuple[bool, bool, bool, float]:
        guided = run.is_guided and run.kind == "removal"
        return run.mislabels and not run.goal, guided, not run.is_control, run.value("attack_success_rate") or 0.0

    return max(group, key=rank)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _doing(run: Run) -> str:
    return "removing" if run.kind == "removal" else "changing"


def _reaches(run: Run, samples: str) -> str:
    """What an attack does to some samples: flips them, unless it is after something else."""
    return f"brings {samples} to {run.goal}" if run.goal else f"flips {samples}"


def finding(group: Sequence[Run]) -> str:
    """One plain sentence about the attacks on one target, the strongest first."""
    lead = _strongest(group)
    rate, size = lead.value("attack_success_rate"), lead.value("decoupled_fraction_median")
    if rate is None:
        return f"{lead.model} got no sample of {lead.dataset} right, so there was nothing to attack."
    if not lead.statuses["flipped"]:
        none = _reaches(lead, f"none of the samples that {lead.model} gets right on {lead.dataset}")
        said = f"{lead.attack} {none}"
    else:
        by = f" by {_doing(lead)} {figure(size, 'fraction')} % of the input (median)" if size else ""
        whose = f"{figure(rate, 'rate')} % of the samples that {lead.model} gets right on {lead.dataset}"
        said = f"{lead.attack} {_reaches(lead, whose)}{by}"
    others = []
    for run in group:
        rate, size = run.value("attack_success_rate"), run.value("decoupled_fraction_median")
        if run is not lead and rate is not None:
            by = f" by {_doing(run)} {figure(size, 'fraction')} %" if size else ""
            share = f"{figure(rate, 'rate')} %"
            others.append(f"{run.attack} {_reaches(run, share)}{by}")
    return f"{'; '.join([said, *others])}."


def warnings(runs: Sequence[Run], comparisons: Sequence[AgainstControl]) -> list[str]:
    """What a reader must know before believing the figures."""
    said = []
    for run in runs:
        if not run.finished:
            said.append(f"{run.label} is unfinished: {whole(len(run.records))} records so far.")
        if run.about.get("disagreements"):
            said.append(
                f"{run.label}: for {run.about['disagreements']} samples the model, asked again about the winning "
                f"removal, answered otherwise than during the search; only what the check confirmed is counted."
            )
    unreadable = [f"{whole(len(run.unreadable))} of {run.label}" for run in runs if run.unreadable]
    if unreadable:
        said.append(f"Samples that could not be read and are not counted: {_listed(unreadable)}.")
    uncontrolled = [without_control(group) for group in by_target(runs)]
    said += [f"{_listed([run.label for run in alone])}: {UNCONTROLLED}" for alone in uncontrolled if alone]
    for c in comparisons:
        if not c.n:
            said.append(f"{c.guided.label} and {c.control.label} attacked no sample in common: no comparison.")
        elif c.guided.kind == "removal" and not c.better:  # what else it may do is not comparable in size
            said.append(
                f"{c.guided.label} is no better than the random control {c.control.label}: the difference of their "
                f"curve areas is {figure(c.area['value'], 'rate')} percentage points, 95 % interval "
                f"[{interval(c.area, 'rate')}], over {whole(c.n)} samples that both attacked."
            )
    return said
