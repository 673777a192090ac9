"""Whether a removal found on one model flips another: models by models, from finished attack runs.

The removals that won against each model are asked of every other model on the same samples, through the query engine.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from muroan.attacks.base import Ask, Attack, AttackedSample, Search, ThreatModel
from muroan.data.base import MultimodalData
from muroan.data.samples import Sample
from muroan.engine import QueryEngine
from muroan.errors import MuroanError
from muroan.metrics import bootstrap
from muroan.modalities import Audio, Layout, Modality, Region, Removal, Text
from muroan.models.base import MultimodalModel
from muroan.report.compare import tex
from muroan.report.plots import INK, MUTED, PAPER
from muroan.report.runs import Run, differences, find_runs
from muroan.report.tables import DEFINITIONS, KINDS, escaped, figure, interval, whole
from muroan.results import AttackResult
from muroan.training.module import load_weights, weights_hash

log = logging.getLogger("muroan")

# Makes dataset and model, untrained, of what a `run.json` says.
Build = Callable[[Mapping[str, Any]], tuple[MultimodalData, MultimodalModel]]

RATE = (
    "transfer rate: of the samples that the attack flips on the model of the row, and that the model of the column "
    "gets right when nothing is removed, those that the latter gets wrong after the same removal. The diagonal is "
    "100 % by construction."
)
SAME = (
    "same class: of the same n samples, those that the model of the column then takes for the same wrong class as the "
    "model of the row."
)
FITTED = (
    "Regions of an image are scaled to the size that the model of the column takes, rounded outwards, so that it "
    "never loses less of the picture. Where a text has another number of words for it, or a sound another duration "
    "(the end was cut off), and for samples that its test data lacks, the sample is left out and counted as such."
)


# ---------------------------------------------------------------------------------------------------------
# Asking one model what was found on others


@dataclass(frozen=True)
class Source:
    """What an attack found on one model.

    Attributes:
        name: of the model, in tables.
        records: of the attack; those that are not flipped have no say.
        modalities: of the model, which the records' regions lie in.
    """

    name: str
    records: Sequence[AttackResult]
    modalities: Mapping[str, Modality]

    @property
    def flipped(self) -> list[AttackResult]:
        return [record for record in self.records if record.flipped]


@dataclass(frozen=True)
class Cell:
    """What a model makes of the removals that were found on another.

    Attributes:
        source, target: names of the models.
        own: whether they are one and the same.
        flipped: samples that the source was flipped on.
        left_out: of these, the samples that the removal could not be asked on.
        n: of these, the samples that it could be and that the target gets right when nothing is removed.
        rate: percent of n that the target gets wrong after the removal, with its bootstrap interval.
        same_class: percent of n that it takes for the same wrong class as the source; None without any.
    """

    source: str
    target: str
    own: bool
    flipped: int
    left_out: int
    n: int
    rate: Mapping[str, float | None]
    same_class: float | None


class Replay(Attack):
    """Ask removals that were found on other models. Nothing is searched, and nothing returned.

    `info["answers"]` says the class for the removal of each source that flipped the sample, by the source's place; None
    where the removal cannot be made of this model's input.
    """

    def __init__(self, sources: Sequence[Source]):
        self.sources = sources
        self.found: dict[str, dict[int, AttackResult]] = {}
        for place, source in enumerate(sources):
            for record in source.flipped:
                self.found.setdefault(record.id, {})[place] = record

    def search(self, sample: AttackedSample) -> Search:
        fitting: dict[int, Removal] = {}
        for place, record in self.found[sample.id].items():
            removal = fitted(record, self.sources[place].modalities, sample.modalities, sample.layouts)
            if removal is not None:
                fitting[place] = removal
        responses = yield Ask(list(fitting.values()), phase="replay")
        labels = dict(zip(fitting, (response.label for response in responses), strict=True))
        sample.info["answers"] = [(place, labels.get(place)) for place in self.found[sample.id]]
        return None


def fitted(
    record: AttackResult,
    found_on: Mapping[str, Modality],
    modalities: Mapping[str, Modality],
    layouts: Mapping[str, Layout],
) -> Removal | None:
    """The winning removal of a record in the elements of another model's input, see `FITTED`.

    Args:
        found_on: modalities of the model that the record is about.
        modalities, layouts: of the other model, and of this sample as it takes it.

    Returns:
        None where the parts of the input do not correspond.
    """
    regions = []
    for region in record.removal.regions:
        name = region.modality
        before, after = found_on[name], layouts[name].grid
        # A text or a sound has its own number of elements, an image those that its model takes.
        sides = len(region.start)
        grid = (record.total[name],) if sides == 1 else tuple(before.shape[-sides:])
        if math.prod(grid) != record.total[name]:
            raise MuroanError(
                f"the record of sample {record.id!r} has {record.total[name]} elements of {name}, its model takes "
                f"{grid}: the record is of another model"
            )
        if len(after) != sides or not _corresponds(before, modalities[name], grid, after):
            return None
        axes = list(zip(region.start, region.stop, grid, after, strict=True))
        start = tuple(a * new // old for a, _, old, new in axes)
        stop = tuple(-(-b * new // old) for _, b, old, new in axes)
        regions.append(Region(name, start, stop))
    return Removal.of(*regions)


def _corresponds(before: Modality, after: Modality, old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Whether two element grids of one sample span the same thing, so that places in one are places in the other."""
    if isinstance(before, Text) or isinstance(after, Text):
        return old == new
    if isinstance(before, Audio) and isinstance(after, Audio):
        return abs(old[0] / before.rate - new[0] / after.rate) < 1 / min(before.rate, after.rate)
    return True  # pictures are resized as a whole


def ask(
    name: str,
    model: MultimodalModel,
    samples: Iterable[Sample],
    sources: Sequence[Source],
    *,
    own: Sequence[bool] = (),
    replacement: Mapping[str, str] | None = None,
    batch_size: int = 64,
    precision: str = "32",
    seed: int = 0,
) -> list[Cell]:
    """Ask a model the removals that were found on others, all in one pass over the samples.

    Args:
        name: of the model, in tables.
        model: in evaluation mode.
        samples: as the model takes them; those that no source was flipped on cost nothing.
        sources: the others, the model itself perhaps among them.
        own: for each source, whether it is this very model; by name when not given.
        replacement: what stands in for removed elements; see `ThreatModel`.
        batch_size, precision, seed: see `QueryEngine`; the seed is that of noise replacements.

    Returns:
        One cell a source.

    Raises:
        MuroanError: see `QueryEngine`; a sample has another label than in a record.
    """
    replay = Replay(sources)

    def wanted() -> Iterator[Sample]:
        for sample in samples:
            for place, record in replay.found.get(sample.id, {}).items():
                if record.label != sample.label:
                    raise MuroanError(
                        f"sample {sample.id!r} is of class {sample.label} in the data of {name}, and of class "
                        f"{record.label} in the records of {sources[place].name}: they are not of the same data"
                    )
            if sample.id in replay.found:
                yield sample

    # Nothing is split, so that any image is large enough; and nothing is limited.
    threat_model = ThreatModel(dict(replacement or {}), min_side=dict.fromkeys(model.modalities, 1))
    engine = QueryEngine(model, replay, threat_model, batch_size, precision, seed, keep_media=0)
    answers: list[dict[str, int | None]] = [{} for _ in sources]
    seen: set[str] = set()
    for result in engine.run(wanted()):
        seen.add(result.id)
        for place, label in result.info.get("answers", ()):
            answers[place][result.id] = label
    cells = []
    for place, source in enumerate(sources):
        flipped = source.flipped
        asked = [(record, answers[place].get(record.id)) for record in flipped]
        told = [(record, label) for record, label in asked if label is not None]
        unfitting = sum(label is None for label in answers[place].values())
        cells.append(
            Cell(
                source.name,
                name,
                own[place] if own else source.name == name,
                flipped=len(flipped),
                left_out=unfitting + sum(record.id not in seen for record in flipped),
                n=len(told),
                rate=bootstrap(np.array([100.0 * (label != record.label) for record, label in told])),
                same_class=float(np.mean([100.0 * (label == record.adversarial_label) for record, label in told]))
                if told
                else None,
            )
        )
    return cells


# ---------------------------------------------------------------------------------------------------------
# Which runs belong together


@dataclass(frozen=True)
class Group:
    """Runs of one attack, with the same settings and threat model, on several models for the same data.

    Attributes:
        name: of dataset and attack, unique.
        attack: of the attack, with the settings that tell it from another group's.
        rows: the runs by name.
        columns: the name of each model, by its run's `target`.
    """

    name: str
    attack: str
    rows: dict[str, Run]
    columns: dict[tuple[str, str, str], str]

    @property
    def dataset(self) -> str:
        return next(iter(self.rows.values())).dataset

    @property
    def replacement(self) -> dict[str, str]:
        threat_model = _identity(next(iter(self.rows.values()))).get("threat_model") or {}
        return {k: v for k, v in (threat_model.get("replacement") or {}).items() if v is not None}


@dataclass(frozen=True)
class Matrix:
    """The cells of a group, row by row."""

    group: Group
    cells: list[list[Cell]]


def grouped(runs: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """The finished removal runs by dataset, attack and threat model; and what was left out.

    Each checkpoint is a model of its own. A model that was attacked several times alike (with other seeds of the
    attack) has a row for each.

    Raises:
        MuroanError: there are no such runs, or none of the groups has two models.
    """
    why = ["" if run.finished and run.kind == "removal" else KINDS[run.kind] or "unfinished" for run in runs]
    fit = [run for run, reason in zip(runs, why, strict=True) if not reason]
    notes = []
    if len(fit) < len(runs):
        left = ", ".join(f"{count} {reason}" for reason, count in sorted(Counter(why).items()) if reason)
        notes.append(f"{len(runs) - len(fit)} of {len(runs)} runs have no part in this: {left}.")
        if not fit:
            raise MuroanError(
                f"none of these {len(runs)} run(s) is a finished removal attack ({left}): attack two or more models "
                f"with `muroan attack` first"
            )
    found: dict[str, list[Run]] = {}
    for run in sorted(fit, key=lambda run: (run.dataset, run.is_control, run.attack, run.model, _seed(run))):
        found.setdefault(_setup(run), []).append(run)
    names = _group_names(list(found.values()))
    groups = []
    for members, (attack, name) in zip(found.values(), names, strict=True):
        columns = _model_names(members)
        if len(columns) < 2:
            (only,) = columns.values()
            notes.append(f"{name}: left out, as {only} is the only model.")
            continue
        often = Counter(run.target for run in members)
        rows = {columns[run.target] + (f", {run.folder}" if often[run.target] > 1 else ""): run for run in members}
        groups.append(Group(name, attack, rows, columns))
    if not groups:
        listed = "; ".join(
            f"{name} has {next(iter(_model_names(m).values()))}"
            for m, (_, name) in zip(found.values(), names, strict=True)
        )
        raise MuroanError(
            f"at least two models are needed, attacked alike (dataset, attack, its settings and threat model): {listed}"
        )
    return groups, notes


def _identity(run: Run) -> Mapping[str, Any]:
    identity = run.about.get("identity")
    return identity if isinstance(identity, dict) else {}


def _seed(run: Run) -> tuple[int, str, str]:
    seed = str(run.about.get("seed"))
    return len(seed), seed, run.folder


def _setup(run: Run) -> str:
    """All that the runs of a group have in common. Other options of the dataset may differ, such as image sizes:
    samples are known by their ids.
    """
    about, identity = run.about, _identity(run)
    data = [run.dataset, about["classes"], sorted(about.get("modalities", ()))]
    return json.dumps([data, run.attack, identity.get("attack"), identity.get("threat_model")], sort_keys=True)


def _group_names(groups: Sequence[Sequence[Run]]) -> list[tuple[str, str]]:
    """For each group the attack, with settings or a folder where that is not enough, and the same with the dataset."""
    first = [_only(group[0], attack=True) for group in groups]
    names = []
    for run in first:
        others = [other for other in first if (other.dataset, other.attack) == (run.dataset, run.attack)]
        own = differences(run, others, ())
        attack = f"{run.attack} ({', '.join(own)})" if own else run.attack
        names.append((attack, f"{run.dataset} · {attack}"))
    often = Counter(names)
    return [
        (f"{attack} ({run.folder})", f"{name} ({run.folder})") if often[attack, name] > 1 else (attack, name)
        for run, (attack, name) in zip(first, names, strict=True)
    ]


def _model_names(group: Sequence[Run]) -> dict[tuple[str, str, str], str]:
    """The models of a group, by name, and by seed and settings, and then weights, where that is not enough."""
    first = {run.target: _only(run, attack=False) for run in reversed(group)}
    first = dict(reversed(first.items()))
    names = {}
    for target, run in first.items():
        own = differences(run, [other for other in first.values() if other.model == run.model], ())
        names[target] = f"{run.model} ({', '.join(own)})" if 0 < len(own) <= 3 else run.model
    often = Counter(names.values())
    return {t: f"{name} (weights {t[2][:8]})" if often[name] > 1 else name for t, name in names.items()}


def _only(run: Run, attack: bool) -> Run:
    """The run with what tells attacks, or else models, apart as its identity."""
    identity, config = _identity(run), run.about.get("config") or {}
    keys = ("attack", "threat_model") if attack else ("model", "seed")
    own = {key: identity.get(key) for key in keys}
    own |= {} if attack else {key: config.get(key) for key in ("training", "defense")}
    return replace(run, about={**run.about, "identity": own})


# ---------------------------------------------------------------------------------------------------------
# From run folders to matrices


def write(
    folders: Sequence[Path],
    out: Path,
    build: Build,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
) -> Path:
    """Ask the models of finished removal attacks what was found on each other.

    Args:
        folders: run folders, or folders that hold such at any depth.
        out: folder for `transfer.md`, `transfer.tex` (for a document with the package booktabs), `transfer.csv` (a
            row a pair of models) and `transfer.png`.
        build: makes dataset and model, untrained, of what a `run.json` says.
        batch_size, device: of the questions.

    Returns:
        The path of `transfer.md`.

    Raises:
        MuroanError: see `grouped`; a checkpoint is missing or was changed, a dataset is not there.
    """
    groups, notes = grouped(find_runs(folders))
    matrices = measure(groups, build, batch_size, device)
    notes = [*_warnings(matrices), *notes]
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "transfer.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(_rows(matrices))
    (out / "transfer.png").write_bytes(heat_map(matrices))
    (out / "transfer.tex").write_text(latex(matrices, notes), encoding="utf-8")
    page = out / "transfer.md"
    page.write_text(markdown(matrices, notes), encoding="utf-8")
    return page


def measure(groups: Sequence[Group], build: Build, batch_size: int, device: str | torch.device) -> list[Matrix]:
    """The matrices of some groups. One model at a time is in memory; all are checked before the first is asked."""
    about = {run.target: run for group in reversed(groups) for run in reversed(group.rows.values())}
    about = dict(reversed(about.items()))
    modalities = {target: trained(run, build)[1].modalities for target, run in about.items()}
    cells: dict[tuple[str, str, str], Cell] = {}
    for number, (target, run) in enumerate(about.items(), start=1):
        data, model = trained(run, build)
        model = model.eval().to(device)
        precision = {"bf16-mixed": "bf16", "16-mixed": "16"}.get(str(_identity(run).get("precision")), "32")
        for group in groups:
            if target not in group.columns:
                continue
            name = group.columns[target]
            log.info("%s: asking %s (model %d of %d)", group.name, name, number, len(about))
            # Noise differs by the seed of the run that it was found in; nothing else does.
            noise = "noise" in group.replacement.values()
            by_seed: dict[int, list[tuple[str, Run]]] = {}
            for row, source in group.rows.items():
                by_seed.setdefault(int(source.about.get("seed") or 0) if noise else 0, []).append((row, source))
            for seed, rows in by_seed.items():
                sources = [Source(row, source.records, modalities[source.target]) for row, source in rows]
                ids = {record.id for source in sources for record in source.flipped}
                try:
                    found = ask(
                        name,
                        model,
                        _samples(data, ids),
                        sources,
                        own=[source.target == target for _, source in rows],
                        replacement=group.replacement,
                        batch_size=batch_size,
                        precision=precision,
                        seed=seed,
                    )
                except MuroanError as error:
                    raise MuroanError(f"{group.name}, asking {name}: {error}") from None
                cells.update({(group.name, cell.source, name): cell for cell in found})
    return [
        Matrix(group, [[cells[group.name, row, name] for name in group.columns.values()] for row in group.rows])
        for group in groups
    ]


def trained(run: Run, build: Build) -> tuple[MultimodalData, MultimodalModel]:
    """Dataset and model of a run, with the very weights that were attacked.

    Raises:
        MuroanError: the checkpoint is missing or was changed, or the test split cannot be read.
    """
    checkpoint = run.about.get("checkpoint") or {}
    if not isinstance(run.about.get("config"), dict) or "sha256" not in checkpoint:
        raise MuroanError(f"{run.folder}: its run.json does not say what was attacked (config, checkpoint)")
    try:
        data, model = build(run.about)
        data.limits["test"] = None  # other runs may have attacked other samples
        data.examples("test")
        if checkpoint.get("path") is not None:
            load_weights(model, Path(checkpoint["path"]))
    except MuroanError as error:
        raise MuroanError(f"{run.folder}: {error}") from None
    weights = weights_hash(model)
    if weights != checkpoint["sha256"]:
        raise MuroanError(
            f"{run.folder}: {checkpoint.get('path') or 'the model'} has changed since it was attacked (its weights "
            f"were {str(checkpoint['sha256'])[:8]}…, they are {weights[:8]}…): attack it again, or bring back the old"
        )
    return data, model


def _samples(data: MultimodalData, ids: set[str]) -> Iterator[Sample]:
    dataset = data.prepared("test")
    for index, example in enumerate(dataset.examples):
        if example.id in ids:
            sample = dataset[index]
            if isinstance(sample, Sample):
                yield sample


def _warnings(matrices: Sequence[Matrix]) -> list[str]:
    """Models that their own removals do not flip again."""
    found = []
    for matrix in matrices:
        for cell in itertools.chain.from_iterable(matrix.cells):
            again = round(cell.n * (cell.rate["value"] or 0) / 100)
            if cell.own and again < cell.flipped:
                found.append(
                    f"Warning: {matrix.group.name}: {cell.source} is flipped again by {again} of its own "
                    f"{cell.flipped} removals, not by all: its arithmetic was rounded differently (another device, "
                    f"precision or batch size), or its data has changed."
                )
    return found


# ---------------------------------------------------------------------------------------------------------
# Tables


FIELDS = ["attack", "dataset", "source", "target", "n", "rate", "low", "high", "same_class", "flipped", "left_out"]


def _rows(matrices: Sequence[Matrix]) -> list[list[object]]:
    """Every pair of models in full, under a line of headings."""
    rows: list[list[object]] = [[*FIELDS]]
    for matrix in matrices:
        for cell in itertools.chain.from_iterable(matrix.cells):
            rates = (cell.rate["value"], cell.rate["low"], cell.rate["high"])
            own = (matrix.group.attack, matrix.group.dataset, cell.source, cell.target, cell.n)
            rows.append([*own, *rates, cell.same_class, cell.flipped, cell.left_out])
    return rows


def _span(cell: Cell) -> str:
    """The interval of a cell, which is of interest off the diagonal."""
    return "" if cell.own else interval(cell.rate, "rate")


def markdown(matrices: Sequence[Matrix], notes: Sequence[str] = ()) -> str:
    """All matrices in Markdown, with columns that line up as plain text, too."""

    def rate(cell: Cell) -> str:
        span = f" [{_span(cell)}]" if _span(cell) else ""
        return f"{figure(cell.rate['value'], 'rate')}{span}, n {whole(cell.n)}"

    def same(cell: Cell) -> str:
        return figure(cell.same_class, "rate") + (f", {whole(cell.left_out)} left out" if cell.left_out else "")

    parts = []
    for matrix in matrices:
        parts.append(f"**{escaped(matrix.group.name)}**\n")
        parts.append(_markdown_table(matrix, "transfer rate, %", rate))
        parts.append(_markdown_table(matrix, "same class, %", same))
    parts += [f"{note}\n" for note in notes]
    terms = "".join(
        f"- *{text.replace(':', '*:', 1)}\n" for text in (RATE, SAME, f"interval: {DEFINITIONS['interval']}")
    )
    return "\n".join([*parts, f"{terms}\n{FITTED}\n"])


def _markdown_table(matrix: Matrix, title: str, text: Callable[[Cell], str]) -> str:
    lines = [[f"{title}: found on ↓, asked of →", *map(escaped, matrix.group.columns.values())]]
    lines += [[escaped(row), *map(text, cells)] for row, cells in zip(matrix.group.rows, matrix.cells, strict=True)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in (lines[0], rule, *lines[1:])
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def latex(matrices: Sequence[Matrix], notes: Sequence[str] = ()) -> str:
    r"""All matrices in LaTeX: a file to `\input` into a document that uses the package booktabs."""
    tables = [_latex_table(matrix, notes if place == 0 else ()) for place, matrix in enumerate(matrices)]
    return "\n".join(["% Written by `muroan transfer`; needs \\usepackage{booktabs}\n", *tables])


def _stacked(name: str) -> tuple[str, str]:
    """The name of a model in two lines of LaTeX: what tells it from others of its kind goes below."""
    first, bracket, rest = name.partition(" (")
    return tex(first), tex(f"{bracket}{rest}".strip())


def _latex_table(matrix: Matrix, notes: Sequence[str]) -> str:
    columns = list(matrix.group.columns.values())
    lines = []
    heads = [rf"\shortstack[r]{{{upper}\\{lower}}}" if lower else upper for upper, lower in map(_stacked, columns)]
    for row, cells in zip(matrix.group.rows, matrix.cells, strict=True):
        upper, lower = _stacked(row)
        lines.append(" & ".join([upper, *(tex(figure(cell.rate["value"], "rate")) for cell in cells)]) + r" \\")
        below = [f"[{_span(cell)}], n {cell.n}" if _span(cell) else f"n {cell.n}" for cell in cells]
        lines.append(" & ".join([lower, *(rf"{{\tiny {tex(text)}}}" for text in below)]) + r" \\[2pt]")
    caption = (
        f"{matrix.group.name}: percent of the removals found on the model of the row that flip the model of the column "
        f"too, of the n samples that the latter gets right when nothing is removed; 95 % bootstrap intervals."
    )
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            r"\centering\small\setlength{\tabcolsep}{4pt}\setlength{\belowcaptionskip}{6pt}",
            rf"\caption{{{tex(caption)}}}",
            r"\makebox[\textwidth][c]{%",
            rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
            r"\toprule",
            rf" & \multicolumn{{{len(columns)}}}{{c}}{{asked of}} \\",
            rf"\cmidrule(l){{2-{len(columns) + 1}}}",
            " & ".join(["found on", *heads]) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}}",
            *(rf"\par\smallskip\parbox{{\textwidth}}{{\footnotesize {tex(note)}}}" for note in notes),
            r"\end{table}",
            "",
        ]
    )


# ---------------------------------------------------------------------------------------------------------
# Picture


BLUES = LinearSegmentedColormap.from_list("muroan", ["#f3f7fb", "#8dbfe3", "#0072b2", "#00446b"])
OWN = "#eceef1"  # the diagonal says nothing


def heat_map(matrices: Sequence[Matrix]) -> bytes:
    """The matrices below each other, each cell in the colour of its rate and with it and n in writing.

    Returns:
        A PNG; the same bytes for the same records.
    """
    names = [name for m in matrices for name in (*m.group.rows, *m.group.columns.values())]
    longest = max(map(len, names))
    wide = max(len(matrix.group.columns) for matrix in matrices)
    tall = [0.62 * len(matrix.group.rows) for matrix in matrices]
    slanted = longest > 12
    room = 0.9 + (0.055 * longest if slanted else 0.2)  # for title and names
    size = (max(4.6, 1.6 + 0.085 * longest + 1.12 * wide), sum(tall) + room * len(matrices) + 0.3)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    picture = Figure(figsize=size, dpi=160, facecolor=PAPER[False], layout=layout)
    FigureCanvasAgg(picture)
    grid = picture.subplots(len(matrices), 1, squeeze=False, height_ratios=[room + side for side in tall])
    for matrix, axes in zip(matrices, grid[:, 0], strict=True):
        _draw(axes, matrix, slanted)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", facecolor=picture.get_facecolor(), metadata={"Software": None})
    return buffer.getvalue()


def _luminance(colour: Any) -> float:
    """Relative luminance as WCAG has it, 0 to 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def _draw(axes: Axes, matrix: Matrix, slanted: bool) -> None:
    group = matrix.group
    for y, cells in enumerate(matrix.cells):
        for x, cell in enumerate(cells):
            rate = cell.rate["value"]
            shown = OWN if cell.own or rate is None else BLUES(rate / 100)
            axes.fill([x, x + 1, x + 1, x], [y, y, y + 1, y + 1], color=shown, linewidth=0)
            ink = INK[False] if _luminance(shown) > 0.25 else PAPER[False]
            axes.text(x + 0.5, y + 0.4, figure(rate, "rate"), ha="center", va="center", color=ink, fontsize=11)
            axes.text(x + 0.5, y + 0.74, f"n {whole(cell.n)}", ha="center", va="center", color=ink, fontsize=8)
    for place in range(1, len(group.columns)):
        axes.axvline(place, color=PAPER[False], linewidth=2)
    for place in range(1, len(group.rows)):
        axes.axhline(place, color=PAPER[False], linewidth=2)
    axes.set_xlim(0, len(group.columns))
    axes.set_ylim(len(group.rows), 0)
    turned: dict[str, Any] = {"rotation": 20, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks([x + 0.5 for x in range(len(group.columns))], [*group.columns.values()], parse_math=False, **turned)
    axes.set_yticks([y + 0.5 for y in range(len(group.rows))], [*group.rows], parse_math=False)
    axes.tick_params(colors=INK[False], labelsize=10, length=0)
    axes.set_xlabel("asked of", color=MUTED[False], fontsize=10.5, labelpad=6)
    axes.set_ylabel("found on", color=MUTED[False], fontsize=10.5, labelpad=6)
    title = f"{group.name}: transfer rate, %"
    axes.set_title(title, loc="left", color=INK[False], fontsize=11, pad=10, parse_math=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
