"""The figures of a report: the success curve by matplotlib, shares and queries as numbers that the page draws."""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator
from PIL import Image as PILImage

from muroan.metrics import success_curve
from muroan.modalities import stable_seed
from muroan.report.paired import attacked_ids, by_target, flip_queries, flip_sizes
from muroan.results import AttackResult
from muroan.runs import Run

if TYPE_CHECKING:
    from muroan.certification import Certificate

# After Okabe and Ito, who chose colours that people with any colour vision tell apart; the second row is for
# dark paper. The yellow is left out: it cannot be read on white.
COLOURS = (
    ("#0072b2", "#d55e00", "#009e73", "#b8578f", "#c98a00", "#3d9ad1", "#5f5f5f", "#7a4f1d"),
    ("#58aee6", "#ff8a4a", "#2fc79b", "#e59ac6", "#f0b93a", "#9bd3f5", "#b5b5b5", "#cfa071"),
)
DASHES = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)))
PAPER = ("#ffffff", "#16181c")
INK = ("#1d2127", "#e6e8eb")
MUTED = ("#66707c", "#98a1ad")
RULE = ("#e4e7eb", "#2d3138")


def colour(place: int) -> int:
    """Which colour the run, or attack, at this place of the report has."""
    return place % len(COLOURS[0])


def crowded(runs: Sequence[Run]) -> bool:
    """Whether there are more runs than can be told apart by their colour."""
    return len(runs) > len(COLOURS[0])


def colours(runs: Sequence[Run]) -> dict[str, int]:
    """The colour of each run by its label: its own, or of too many its attack's."""
    attacks = list(dict.fromkeys(run.attack for run in runs))
    shared = crowded(runs) and len(by_target(runs)) > 1
    return {run.label: colour(attacks.index(run.attack) if shared else place) for place, run in enumerate(runs)}


def success_at(seeds: Sequence[np.ndarray], budgets: np.ndarray) -> np.ndarray:
    """Success rate within each of some budgets, the mean over seeds.

    Args:
        seeds: for each seed, (A,) what it took to flip every attacked sample (a decoupled fraction, or queries),
            infinite for one that was not flipped.
        budgets: (G,) in the same unit.

    Returns:
        (G,) percent of attacked samples.

    >>> success_at([np.array([1, 4, np.inf, np.inf])], np.array([0.5, 1, 10]))
    array([ 0., 25., 50.])
    """
    parts = [100 * np.searchsorted(np.sort(took), budgets, side="right") / len(took) for took in seeds]
    return np.asarray(np.mean(parts, axis=0))


def success_band(
    seeds: Sequence[np.ndarray], ids: Sequence[Sequence[str]], grid: np.ndarray, resamples: int = 400
) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % bootstrap band of a success curve; samples are drawn once for all seeds, as in `metrics.pooled`.

    Args:
        seeds: as in `success_at`.
        ids: (A,) of each seed, which samples these are.
        grid: (G,) budgets.

    Returns:
        low, high: (G,) percent of attacked samples.
    """
    rng = np.random.default_rng(stable_seed("curve"))
    rates = np.zeros((resamples, len(grid)))
    places = {key: place for place, key in enumerate(dict.fromkeys(key for own in ids for key in own))}
    n = len(places)
    # A resample is how often each sample was drawn: its curve is one product of matrices.
    times = rng.multinomial(n, np.full(n, 1 / n), resamples).astype(float)  # whole numbers multiply slowly
    for took, own in zip(seeds, ids, strict=True):
        drawn = times[:, [places[key] for key in own]]
        rates += 100 * drawn @ (took[:, None] <= grid) / np.maximum(drawn.sum(1, keepdims=True), 1) / len(seeds)
    low, high = np.percentile(rates, [2.5, 97.5], axis=0)
    return low, high


def curve(runs: Sequence[Run], dark: bool = False, width: float = 7.2, height: float = 4.4) -> bytes:
    """Success rate against decoupled fraction with bootstrap bands, all runs in one plot, or of many a panel a target.

    Args:
        dark: for a dark page.
        width, height: inches.

    Returns:
        A PNG; the same bytes for the same records.
    """
    if crowded(runs) and len(by_target(runs)) > 1:
        return _panels(runs, dark, width)
    paper, ink, muted = (pair[dark] for pair in (PAPER, INK, MUTED))
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    ncols = 1 if width < 5 or max(len(run.label) for run in runs) > 44 else 2
    lines = -(-len(runs) // ncols)
    height += 0.21 * max(0, lines - 3)  # the axes keep theirs, however long the legend
    picture = Figure(figsize=(width, height), dpi=200, facecolor=paper, layout=layout)
    FigureCanvasAgg(picture)
    axes = picture.add_subplot(facecolor=paper)
    flips = [[r.decoupled_fraction for r in run.records if r.flipped] for run in runs]
    left, right = _range(runs)
    grid = np.geomspace(left, right, 300)
    attacks = list(dict.fromkeys(run.attack for run in runs))
    for place, (run, fractions) in enumerate(zip(runs, flips, strict=True)):
        attacked = sum(r.attacked for r in run.records)
        if not attacked:
            continue
        x, y = success_curve(np.maximum(fractions, left).tolist(), attacked)
        last = y[-1] if len(y) else 0.0
        x, y = np.concatenate([[left], x, [right]]), np.concatenate([[0.0], y, [last]])
        shade = COLOURS[dark][colour(place)]
        dash = DASHES[attacks.index(run.attack) % len(DASHES)]
        axes.step(x, y, where="post", color=shade, linestyle=dash, linewidth=1.9, label=run.label)
        axes.fill_between(
            grid,
            *success_band([flip_sizes(run)], [attacked_ids(run)], grid),
            step="post",
            color=shade,
            alpha=0.14,
            linewidth=0,
        )
    if not any(map(any, flips)):
        axes.text(0.5, 0.5, "no sample was flipped", transform=axes.transAxes, ha="center", color=muted, fontsize=11)
    _dress(axes, left, right, dark)
    axes.set_xlabel("decoupled fraction, % of the input (log scale)", color=ink, fontsize=10.5, labelpad=8)
    axes.set_ylabel("success rate, % of attacked samples", color=ink, fontsize=10.5, labelpad=8)
    lines_by_name = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    _legend(picture, lines_by_name, ncols, dark)
    return _png(picture)


def _range(runs: Sequence[Run]) -> tuple[float, float]:
    """The decoupled fractions, in percent, from which and up to which there is something to draw."""
    positive = [r.decoupled_fraction for run in runs for r in run.records if r.flipped and r.decoupled_fraction > 0]
    return min(positive, default=0.1) / 1.6, min(100.0, max(positive, default=10.0) * 1.6)


def _panels(runs: Sequence[Run], dark: bool, width: float) -> bytes:
    """The same with a panel a target, on one scale; attacks of one name share a colour."""
    targets, attacks = by_target(runs), list(dict.fromkeys(run.attack for run in runs))
    across = 1 if width < 5 else 3
    down, ncols = -(-len(targets) // across), 1 if width < 5 else 3
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    size = (width, 2 * down + 0.21 * -(-len(attacks) // ncols) + 0.5)
    picture = Figure(figsize=size, dpi=200, facecolor=PAPER[dark], layout=layout)
    FigureCanvasAgg(picture)
    grid = picture.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    left, right = _range(runs)
    marks: dict[str, Artist] = {}
    for group, axes in zip(targets, grid.flat, strict=False):
        axes.set_facecolor(PAPER[dark])
        for run in group:
            if len(took := np.maximum(flip_sizes(run), left)):
                line = _success(axes, [(took, attacked_ids(run))], left, right, attacks.index(run.attack), dark)
                marks.setdefault(run.attack, line)
        _dress(axes, left, right, dark)
        axes.tick_params(labelsize=8.5)
        title = "\n".join(textwrap.wrap(group[0].where, 32 if across > 1 else 60))
        axes.set_title(title, loc="left", color=INK[dark], fontsize=8.5, pad=6, parse_math=False)
    for axes in grid.flat[len(targets) :]:
        axes.set_visible(False)
    for axes in grid.flat[max(0, len(targets) - across) : len(targets)]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
    picture.supxlabel("decoupled fraction, % of the input (log scale)", color=INK[dark], fontsize=10)
    picture.supylabel("success rate, % of attacked samples", color=INK[dark], fontsize=10)
    _legend(picture, marks, ncols, dark)
    return _png(picture)


def _legend(
    place: Figure | Axes, marks: Mapping[str, Artist], ncols: int, dark: bool, loc: Any = "outside upper left"
) -> None:
    if not marks:
        return
    legend = place.legend(
        list(marks.values()),
        list(marks),
        loc=loc,
        ncols=ncols,
        frameon=False,
        labelcolor=INK[dark],
        fontsize=10,
        handlelength=2.6,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name with $ in it is a name


def _dress(axes: Axes, left: float, right: float, dark: bool) -> None:
    """Axes of a success rate against something on a logarithmic scale."""
    muted, rule = MUTED[dark], RULE[dark]
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(0, 101)  # room for the width of a line at 100
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if right / left > 30 else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.minorticks_off()
    axes.set_yticks(range(0, 101, 20))
    axes.tick_params(which="both", colors=muted, labelsize=10, length=0)
    axes.tick_params(axis="x", which="major", length=4, color=rule)
    axes.grid(axis="y", color=rule, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(rule)


def _png(picture: Figure) -> bytes:
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", facecolor=picture.get_facecolor(), metadata={"Software": None})
    # Nothing is transparent, and a tall figure is a tenth smaller without that.
    smaller = io.BytesIO()
    PILImage.open(buffer).convert("RGB").save(smaller, "png", optimize=True)
    return smaller.getvalue()


def budgets(targets: Sequence[tuple[str, Sequence[tuple[str, Sequence[Run]]]]]) -> bytes:
    """Success rate against decoupled fraction and against queries, side by side, one row of the two a target.

    Args:
        targets: for each target, its name and its attacks: what an attack is called, and its runs, one a seed.
            Attacks of one name share a colour. Where targets fall into groups without a name in common, each target has
            a legend of its own, and colours begin anew in every group.

    Returns:
        A PNG with bootstrap bands; the same bytes for the same records.
    """
    related: list[list[str]] = []  # names that have to do with each other, in order
    for own in ([name for name, _ in attacks] for _, attacks in targets if attacks):
        touched = [group for group in related if {*group} & {*own}]
        related = [group for group in related if group not in touched]
        related.append(list(dict.fromkeys(itertools.chain(*touched, own))))
    apart = len(related) > 1
    places = {name: place for group in related for place, name in enumerate(group)}
    names = [] if apart else list(places)
    wide = max((len(name) for name in names), default=0) > 44
    lines = -(-len(names) // (1 if wide else 3))
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    picture = Figure(
        figsize=(10, 3.4 * len(targets) + 0.3 * lines + 0.4), dpi=160, facecolor=PAPER[False], layout=layout
    )
    FigureCanvasAgg(picture)
    grid = picture.subplots(len(targets), 2, sharey=True, squeeze=False)
    marks: dict[str, Artist] = {}
    kinds = {run.kind for _, attacks in targets for _, runs in attacks for run in runs}
    fraction = "decoupled" if kinds <= {"removal"} else "changed" if "removal" not in kinds else "decoupled or changed"
    for side, (took, label) in enumerate(
        ((flip_sizes, f"{fraction} fraction, % of the input (log scale)"), (flip_queries, "queries (log scale)"))
    ):
        curves = [
            [(name, [(took(run), attacked_ids(run)) for run in runs]) for name, runs in attacks]
            for _, attacks in targets
        ]
        found = np.concatenate([np.zeros(0), *(a for attacks in curves for _, seeds in attacks for a, _ in seeds)])
        found = found[np.isfinite(found) & (found > 0)]
        least, most = (found.min(), found.max()) if len(found) else (1.0, 10.0)
        # The same scale for all targets; a flip for nothing stands at the left edge.
        left, right = (least / 1.6, min(108.0, 1.6 * most)) if side == 0 else (max(0.8, least / 1.6), 1.6 * most)
        for (title, _), attacks, axes in zip(targets, curves, grid[:, side], strict=True):
            found_here: dict[str, Artist] = {}
            for name, seeds in attacks:
                seeds = [(np.maximum(seed, left), ids) for seed, ids in seeds if len(seed)]
                if seeds:
                    found_here[name] = _success(axes, seeds, left, right, places[name])
            if not any(np.isfinite(seed).any() for _, seeds in attacks for seed, _ in seeds):
                axes.text(0.5, 0.5, "no sample was flipped", transform=axes.transAxes, ha="center", color=MUTED[False])
            _dress(axes, left, right, False)
            axes.tick_params(labelleft=True)
            if not apart:
                marks |= found_here
            elif side == 1:
                _legend(axes, found_here, 1, dark=False, loc="lower right")
            if side == 0:
                axes.set_title(title, loc="left", color=INK[False], fontsize=11, pad=10, parse_math=False)
                axes.set_ylabel("success rate, % of attacked", color=INK[False], fontsize=10.5, labelpad=8)
        grid[-1, side].set_xlabel(label, color=INK[False], fontsize=10.5, labelpad=8)
    _legend(picture, marks, 1 if wide else 3, dark=False)
    return _png(picture)


def _success(
    axes: Axes,
    runs: Sequence[tuple[np.ndarray, Sequence[str]]],
    left: float,
    right: float,
    place: int,
    dark: bool = False,
) -> Artist:
    """One success curve with its band."""
    seeds = [took for took, _ in runs]
    # The colours come round after eight attacks, with other dashes.
    shade, dash = COLOURS[dark][colour(place)], DASHES[(place + place // len(COLOURS[0])) % len(DASHES)]
    x = np.unique(np.concatenate([[left, right], *seeds]))
    x = x[x <= right]
    (line,) = axes.step(x, success_at(seeds, x), where="post", color=shade, linestyle=dash, linewidth=1.9)
    grid = np.geomspace(left, right, 300)
    axes.fill_between(
        grid, *success_band(seeds, [ids for _, ids in runs], grid), step="post", color=shade, alpha=0.14, linewidth=0
    )
    return line


# Certificates of a vote, and name and records of attacks on it.
Certified = tuple[Sequence["Certificate"], Sequence[tuple[str, Sequence[AttackResult]]]]


def certified_curves(votes: Mapping[str, Certified], dark: bool = False) -> bytes:
    """Certified accuracy beside the accuracy that attacks leave, against what the attacker may alter.

    Args:
        votes: by name; one panel each.
        dark: for a dark page.

    Returns:
        A PNG; the same bytes for the same records.
    """
    paper, ink = PAPER[dark], INK[dark]
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    many = len(votes) > 1
    rows, columns = -(-len(votes) // 2), 1 + many
    size = (10, 2.7 * rows + 0.6) if many else (7.2, 4.4)
    picture = Figure(figsize=size, dpi=200, facecolor=paper, layout=layout)
    FigureCanvasAgg(picture)
    for place, (name, vote) in enumerate(votes.items()):
        axes = picture.add_subplot(rows, columns, place + 1, facecolor=paper)
        _certified(axes, *vote, dark)
        if many:
            axes.set_title(textwrap.fill(name, 48), color=ink, fontsize=10.5, loc="left")
    picture.supxlabel("altered, % of the elements of every modality (log scale)", color=ink, fontsize=10.5)
    picture.supylabel("accuracy, % of all samples", color=ink, fontsize=10.5)
    marks = (axes.get_legend_handles_labels() for axes in picture.axes)
    _legend(picture, {label: mark for found in marks for mark, label in zip(*found, strict=True)}, 1, dark)
    return _png(picture)


def _certified(
    axes: Axes, certificates: Sequence[Certificate], attacks: Sequence[tuple[str, Sequence[AttackResult]]], dark: bool
) -> None:
    """The curves of one vote."""
    from muroan.certification import certified_accuracy, robust_accuracy  # brings Lightning, which no report needs

    left = min(1 / max(2, *c.n.values()) for c in certificates) / 1.6  # before the first element
    shares = np.geomspace(left, 1, 600)
    curves = [("certified", certified_accuracy(certificates, shares))]
    curves += [(f"left by {name}", robust_accuracy(certificates, records, shares)) for name, records in attacks]
    for place, (name, accuracy) in enumerate(curves):
        shade, dash = COLOURS[dark][colour(place)], DASHES[place % len(DASHES)]
        axes.step(100 * shares, accuracy, where="post", color=shade, linestyle=dash, linewidth=1.9, label=name)
    axes.fill_between(100 * shares, curves[0][1], step="post", color=COLOURS[dark][0], alpha=0.14, linewidth=0)
    _dress(axes, 100 * left, 100, dark)


@dataclass(frozen=True)
class Share:
    """A part of the flipped samples of a run.

    Attributes:
        name: what the removal lies in.
        kind: which of four colours the modality has by its place, `joint`, or `interaction`.
        percent: of the flipped samples.
    """

    name: str
    kind: str
    percent: float


def shares(run: Run, modalities: Sequence[str]) -> list[Share]:
    """Which modality carries the winning removals: parts that make up 100 % of the flipped samples."""
    if not run.statuses["flipped"]:
        return []
    parts = [
        Share(f"{name} alone", str(place % 4), run.value(f"modality_share_{name}") or 0.0)
        for place, name in enumerate(modalities)
    ]
    interaction = run.value("interaction") or 0.0
    joint = (run.value("modality_share_joint") or 0.0) - interaction
    parts += [Share("joint", "joint", max(0.0, joint)), Share("joint, only together", "interaction", interaction)]
    return [part for part in parts if part.percent > 0]


@dataclass(frozen=True)
class Histogram:
    """Attacked samples by the number of queries.

    Attributes:
        bars: (flipped, others) of each bin, in percent of the fullest one.
        median: queries; None when nothing was attacked.
    """

    bars: list[tuple[float, float]]
    median: float | None


def query_histograms(runs: Sequence[Run], bins: int = 32) -> tuple[list[Histogram], list[tuple[float, int]]]:
    """How many queries the attacks took: one histogram a run over the same logarithmic bins.

    Returns:
        The histograms, and the axis's ticks: (place in percent of the width, queries).
    """
    most = max((r.queries for run in runs for r in run.records if r.attacked), default=1)
    end = max(10.0, float(most)) * 1.02
    edges = np.geomspace(1, end, bins + 1)
    found = []
    for run in runs:
        asked = {
            flag: np.array([max(1, r.queries) for r in run.records if r.attacked and r.flipped is flag], dtype=float)
            for flag in (True, False)
        }
        counts = [np.histogram(asked[flag], edges)[0] for flag in (True, False)]
        fullest = max(1, (counts[0] + counts[1]).max())
        bars = [(100 * float(a) / fullest, 100 * float(b) / fullest) for a, b in zip(*counts, strict=True)]
        every = [r.queries for r in run.records if r.attacked]
        found.append(Histogram(bars, float(np.median(every)) if every else None))
    powers = range(int(np.log10(end)) + 1)
    return found, [(100 * power / float(np.log10(end)), 10**power) for power in powers]
