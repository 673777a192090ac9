"""The grid of defences by attacks as a page: tables, findings, curves and every figure as CSV; see `defense_grid`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from muroan.report import plots
from muroan.report.compare import Estimate, Row
from muroan.report.defense_grid import Defended, Difference, Grid, grids, valid_only
from muroan.report.markup import escaped, markdown_table, slanted_table, write_csv
from muroan.report.tables import figure, interval, whole
from muroan.runs import Run, find_runs

WORST = "worst case"

METRICS = ["clean_accuracy", "robust_accuracy", "robust_to_valid", "attack_success_rate", "decoupled_fraction_mean"]
METRICS += ["decoupled_fraction_median", "curve_area", "queries"]
BY_SEED = ["robust_accuracy", "robust_to_valid"]  # told of each seed, too


def write(folders: Sequence[Path], out: Path, name: str = "defenses") -> Path:
    """The grid of defences by attacks from the records of finished runs, undefended ones included. No model is loaded.

    Args:
        folders: run folders, or folders that hold such at any depth.
        out: folder for `defenses.md`, `defenses.tex`, `defenses.csv`, `defenses-pairs.csv` and `defenses.png`, or what
            else `name` says.

    Returns:
        The path of the page in Markdown.

    Raises:
        MuroanError: a folder holds no run, or no run is of a hardened model; two runs cannot be told apart.
    """
    found = grids(find_runs(folders))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / f"{name}.csv", _lines(found))
    write_csv(out / f"{name}-pairs.csv", _pairs(found))
    (out / f"{name}.tex").write_text(latex(found), encoding="utf-8")
    (out / f"{name}.png").write_bytes(plots.budgets([_drawn(grid) for grid in found]))
    page = out / f"{name}.md"
    page.write_text(markdown(found), encoding="utf-8")
    return page


def _drawn(grid: Grid) -> tuple[str, Sequence[tuple[str, Sequence[Run]]]]:
    """A title and the curves of a guided removal attack that all were attacked by, one a defence.

    Where the dataset can tell, it is one in search of valid flips, by which defences are judged; of the controls the
    best one stands for all.
    """
    guided = [
        name
        for name in grid.attacks
        if all(name in d.attacks and d.attacks[name].runs[0].is_guided for d in grid.defenses)
        and grid.defenses[0].attacks[name].kind == "removal"
    ]
    if not guided:
        return grid.name, []
    attack = next((name for name in guided if valid_only(grid.defenses[0].attacks[name].runs[0])), guided[0])

    def gain(control: Defended) -> tuple[float, float]:
        worst = {metric: estimate["value"] or 0.0 for metric, estimate in grid.worst(control).items()}
        return worst["robust_to_valid" if control.judged else "robust_accuracy"], -worst["curve_area"]

    best = max((d for d in grid.defenses if d.control), key=gain, default=None)
    shown = [(d.title, d.attacks[attack].runs) for d in grid.defenses if not d.control or d is best]
    return f"{grid.name}, {attack}", shown


HEAD = ["defence", "clean accuracy (%)", "robust to all flips (%)", "robust to valid flips (%)"]
HEAD += [f"curve area, {WORST} (%)"]
COST = ["training samples", "attack passes", "seconds"]


def _cells(grid: Grid, defense: Defended) -> list[str]:
    worst = grid.worst(defense)
    cells = [defense.title + grid.fewer(defense)]
    for estimate in worst.values():
        span = interval(estimate, "rate")
        cells.append(figure(estimate["value"], "rate") + (f" [{span}]" if span else ""))
    for name in grid.attacks:
        row = defense.attacks.get(name)
        if row is None:
            cells.append("")
            continue
        robust, success = row.value("robust_accuracy"), row.value("attack_success_rate")
        size = row.value("decoupled_fraction_mean")
        at = f" at {figure(size, 'fraction')}" if size is not None else ""
        cells.append(f"{figure(robust, 'rate')} ({figure(success, 'rate')}{at})")
    cost = defense.cost()
    passes = cost.get("attack_forwards", 0) + cost.get("attack_backwards", 0)
    return cells + ([whole(cost["rows"]), whole(passes), whole(cost["seconds"])] if cost else [""] * 3)


NOTE = (
    "Robust to all flips: of the removal attacks with a column here (those that choose values or features aside) "
    "none flips the sample (the worst case); the smallest of their flips goes into the curve. Robust to valid flips: "
    "likewise, where only flips count after which the label is still right, says the dataset; where it can tell, a "
    "defence is judged by these. Columns of attacks: robust accuracy, in brackets the success rate and the mean "
    "decoupled (or changed) fraction of the flips, all in percent. p is of the exact sign-flip test over the samples "
    "that a defence and a control share (of one seed, McNemar's): the largest over the controls where it is better "
    "than all, the smallest times their number where it is worse than one; after Holm's correction over the defences "
    "of the model. A defence helped, or did worse, if p is below 0.05 and if it did in every seed: p tells of other "
    "samples, and only the seeds of other trainings. In the lines on an attack that only some models were attacked "
    "by, p is that of the pair alone, uncorrected. Cost: samples trained on, repeats counted, passes of the "
    "training's own attack, wall time; means over seeds. Brackets after a figure: 95 % interval over samples, by the "
    "bootstrap; of a rate, as far from 0 and 100 % as Clopper and Pearson's reaches there."
)


def table(grid: Grid) -> list[list[str]]:
    """The grid as text: the headings, then a row a defence."""
    return [[*HEAD, *grid.attacks, *COST], *(_cells(grid, defense) for defense in grid.defenses)]


OVERVIEW = (
    f"What each defence leaves of each model under the removal attacks that all were attacked by ({WORST}): robust "
    "accuracy, in percent, to valid flips where the dataset can tell, else to all. With a +: it helped beyond every "
    "control, beyond chance and in every seed; with a -: it did worse than a control."
)


def overview(found: Sequence[Grid]) -> list[list[str]]:
    """Several grids in one: the headings, then a row a defence and a column a model."""
    marks = {"helped": " +", "did worse": " -"}
    columns: list[dict[str, str]] = []
    for grid in found:
        said = {verdict.defense.name: marks.get(verdict.word, "") for verdict in grid.verdicts}
        held = {d.name: grid.worst(d)["robust_to_valid" if d.judged else "robust_accuracy"] for d in grid.defenses}
        fewer = {d.name: grid.fewer(d) for d in grid.defenses}
        columns.append({n: figure(e["value"], "rate") + said.get(n, "") + fewer[n] for n, e in held.items()})
    every = sorted({d.name: d for grid in found for d in grid.defenses}.values(), key=lambda defense: defense.place)
    rows = [[d.title, *(column.get(d.name, "") for column in columns)] for d in every]
    return [["defence", *(grid.name for grid in found)], *rows]


def markdown(found: Sequence[Grid]) -> str:
    """The grids with the verdicts in Markdown, several with an overview before them."""
    parts = [f"{NOTE}\n"]
    if len(found) > 1:
        shown = markdown_table([[escaped(cell) for cell in row] for row in overview(found)])
        parts.append(f"### All models\n\n{shown}\n{OVERVIEW}\n")
    for grid in found:
        shown = markdown_table([[escaped(cell) for cell in row] for row in table(grid)])
        lines = "".join(f"- {escaped(line)}\n" for line in grid.said)
        parts.append(f"### {escaped(grid.name)}\n\n{shown}\n{lines}")
    return "\n".join([*parts, ""])


def latex(found: Sequence[Grid]) -> str:
    """The same in LaTeX, for a document with the package booktabs."""
    each = [(g.name, table(g), [*g.said, NOTE]) for g in found]
    if len(found) > 1:
        each.insert(0, ("All models", overview(found), [OVERVIEW]))
    tables = [slanted_table(caption, rows, notes) for caption, rows, notes in each]
    return "% Needs the packages booktabs and graphicx.\n" + "\n".join(tables)


def _lines(found: Sequence[Grid]) -> list[list[object]]:
    """Every figure in full, a line a defence and attack, and one for each worst case."""
    spans = ("", "_low", "_high")
    head: list[object] = ["dataset", "model", "defense", "control", "attack", "seeds", "samples"]
    head += [metric + span for metric in METRICS for span in spans]
    costs = ["rows", "attack_forwards", "attack_backwards", "seconds"]
    lines = [[*head, *costs, "verdict", "larger", "smaller", *(f"{metric}_by_seed" for metric in BY_SEED)]]
    for grid in found:
        verdicts = {verdict.defense.name: verdict for verdict in grid.verdicts}
        for defense in grid.defenses:
            cost = defense.cost()
            paid = [cost.get(key, "") for key in costs]
            own: list[object] = [grid.dataset, grid.model, defense.name, defense.control]
            for name, row in defense.attacks.items():
                seeds = " ".join(str(run.about.get("seed")) for run in row.runs)
                each = {run.about.get("seed"): Row((run,), name).value(BY_SEED[0]) for run in row.runs}
                told = ["", "", "", json.dumps(each), ""]
                lines.append([*own, name, seeds, row.samples, *_numbers(row.summary), *paid, *told])
            verdict = verdicts.get(defense.name)
            said = ["", "", ""] if verdict is None else [verdict.word, verdict.larger, verdict.smaller]
            worst = [(WORST, grid.attacks, defense.seeds(grid.attacks), grid.worst(defense), said)]
            for more in grid.further:
                held = [(seeds, figures) for other, seeds, figures in more.held if other is defense]
                named = f"{WORST} with {more.attack}", [*grid.attacks, more.attack]
                worst += [(*named, list(seeds), figures, ["", "", ""]) for seeds, figures in held]
            for name, attacks, run_on, figures, said in worst:
                alone = {seed: grid.worst(defense, attacks, [seed]) for seed in run_on}
                by_seed = [json.dumps({seed: f[metric]["value"] for seed, f in alone.items()}) for metric in BY_SEED]
                samples = sum(len(defense.outcomes(seed, attacks)) for seed in run_on)
                seeds = " ".join(map(str, run_on))
                lines.append([*own, name, seeds, samples, *_numbers(figures), *paid, *said, *by_seed])
    return lines


def _pairs(found: Sequence[Grid]) -> list[list[object]]:
    """Every difference of a defence to a control in full, a line each.

    p is that of the pair; `verdict` and `verdict_p` are of the defence against all of its controls.
    """
    figures = ("robust_to_valid", "robust_accuracy", "curve_area", "curve_area_of_shared_flips")
    head: list[object] = ["dataset", "model", "defense", "control", "attack", "seeds", "samples"]
    head += [f"{name}{span}" for name in figures for span in ("", "_low", "_high")]
    lines = [[*head, "by_seed", "p", "p_larger", "decides", "verdict", "verdict_p"]]

    def line(grid: Grid, pair: tuple[Defended, Defended, Difference], attack: str, *said: object) -> list[object]:
        defense, control, d = pair
        own: list[object] = [grid.dataset, grid.model, defense.name, control.name, attack]
        own += [" ".join(map(str, d.by_seed)), d.samples]
        for estimate in (d.valid, d.robust, d.area, d.larger):
            own += ["" if estimate[key] is None else estimate[key] for key in ("value", "low", "high")]
        return [*own, json.dumps(d.by_seed), d.p, d.p_larger, *said]

    for grid in found:
        for verdict in grid.verdicts:
            for control, difference in verdict.against:
                said = control is verdict.control, verdict.word, verdict.p
                lines.append(line(grid, (verdict.defense, control, difference), WORST, *said))
        for more in grid.further:
            name = f"{WORST} with {more.attack}"
            lines += [line(grid, pair, name, "", "", "") for pair in more.differences]
    return lines


def _numbers(summary: Mapping[str, Estimate]) -> list[object]:
    found: list[object] = []
    for metric in METRICS:
        estimate = summary.get(metric, {})
        found += ["" if estimate.get(key) is None else estimate[key] for key in ("value", "low", "high")]
    return found
