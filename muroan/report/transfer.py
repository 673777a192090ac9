"""Transfer matrices, models by models, as Markdown, LaTeX, CSV and a picture."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from muroan.report.markup import escaped, latex_table, markdown_table, tex, write_csv
from muroan.report.plots import INK, MUTED, PAPER
from muroan.report.tables import DEFINITIONS, figure, interval, whole
from muroan.transfer import Cell, Matrix

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


def write(matrices: Sequence[Matrix], notes: Sequence[str], out: Path) -> Path:
    """Write what `muroan.transfer.measure` found.

    Args:
        out: folder for `transfer.md`, `transfer.tex` (for a document with the package booktabs), `transfer.csv` (a
            row a pair of models) and `transfer.png`.

    Returns:
        The path of `transfer.md`.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "transfer.csv", _rows(matrices))
    (out / "transfer.png").write_bytes(heat_map(matrices))
    (out / "transfer.tex").write_text(latex(matrices, notes), encoding="utf-8")
    page = out / "transfer.md"
    page.write_text(markdown(matrices, notes), encoding="utf-8")
    return page


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
    return markdown_table(lines)


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
    head = [
        rf" & \multicolumn{{{len(columns)}}}{{c}}{{asked of}} \\",
        rf"\cmidrule(l){{2-{len(columns) + 1}}}",
        " & ".join(["found on", *heads]) + r" \\",
    ]
    return latex_table(caption, "l" + "r" * len(columns), head, lines, notes, r"\small\setlength{\tabcolsep}{4pt}")


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
