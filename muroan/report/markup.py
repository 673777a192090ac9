"""Tables as text: Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Line:
    """A line of a table: a heading over the lines below it, or cells.

    Attributes:
        level: 0 for the name of a target, 1 for a kind of attack, 2 for cells.
    """

    level: int
    cells: list[str]


@dataclass(frozen=True)
class TextTable:
    """A table as text, before it is Markdown or LaTeX.

    Attributes:
        heads: one a column; `group, part (unit)` where columns have a group.
        texts: how many columns, from the left, are words.
    """

    caption: str
    heads: list[str]
    lines: list[Line]
    texts: int = 1


def escaped(text: str) -> str:
    """A name as one cell of a Markdown table."""
    text = text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
    return re.sub(r"<(?=\S)", "&lt;", text)  # before a space it opens no tag


def markdown_table(rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A table in Markdown whose columns line up as plain text, too.

    Args:
        rows: cells, the headings first.
        texts: how many columns, from the left, are words; the others are figures, and flush right.
    """
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = [":" + "-" * (w - 1) if place < texts else "-" * (w - 1) + ":" for place, w in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if place < texts else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |\n"

    return "".join(map(line, [rows[0], rule, *rows[1:]]))


def markdown_grid(grid: TextTable) -> str:
    marks = {0: "**{}**", 1: "*{}*", 2: "{}"}
    groups = ["", *(head.partition(", ")[0] for head in grid.heads)]
    # A group is named once, over its first column.
    rows = [[h.removeprefix(f"{last}, ") for h, last in zip(grid.heads, groups, strict=False)]]
    for line in grid.lines:
        first, *others = map(escaped, line.cells)
        rows.append([marks[line.level].format(first), *others, *[""] * (len(grid.heads) - len(line.cells))])
    return markdown_table(rows, grid.texts)


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "·": r"$\cdot$",
    "–": "--",
    "\u202f": r"\,",
    "\n": " ",
    # At the start of a line these would be arguments of the line's end before it.
    "[": "{[}",
    "*": "{*}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}


def tex(text: str) -> str:
    r"""A text with nothing in it that LaTeX would read as a command.

    >>> print(tex("a_b 50%"))
    a\_b 50\%
    """
    return "".join(_TEX.get(c, c) for c in text)


def latex_table(
    caption: str, columns: str, head: Sequence[str], body: Sequence[str], notes: Sequence[str] = (), style: str = ""
) -> str:
    """A table in LaTeX with the rules of the package booktabs.

    Args:
        caption, notes: plain text, above and below the table.
        columns: their alignment, such as `lrr`.
        head, body: lines of LaTeX.
        style: LaTeX commands for the size of type and the room between columns.
    """
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            rf"\centering{style}\setlength{{\belowcaptionskip}}{{6pt}}",
            rf"\caption{{{tex(caption)}}}",
            r"\makebox[\textwidth][c]{%",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            *head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            *(rf"\par\smallskip\parbox{{\textwidth}}{{\footnotesize {tex(note)}}}" for note in notes),
            r"\end{table}",
            "",
        ]
    )


def slanted_table(caption: str, rows: Sequence[Sequence[str]], notes: Sequence[str] = (), texts: int = 1) -> str:
    """A table in LaTeX whose many headings are slanted: it needs the packages booktabs and graphicx.

    Args:
        rows, texts: as for `markdown_table`; notes: below the table.
    """
    heads, *lines = rows
    head = [" & ".join(rf"\rotatebox{{60}}{{{tex(cell)}}}" for cell in heads) + r" \\"]
    body = [" & ".join(map(tex, line)) + r" \\" for line in lines]
    columns = "l" * texts + "r" * (len(heads) - texts)
    return latex_table(caption, columns, head, body, notes, r"\scriptsize\setlength{\tabcolsep}{3pt}")


def latex_grid(grid: TextTable, notes: Sequence[str]) -> str:
    width = len(grid.heads)
    uppers, lowers = zip(*map(_stacked, grid.heads), strict=True)
    upper, rules, start = [], [], 1
    for name, members in itertools.groupby(uppers):
        count = len(list(members))
        if name and count > 1:
            upper.append(rf"\multicolumn{{{count}}}{{c}}{{{tex(name)}}}")
            rules.append(rf"\cmidrule(lr){{{start}-{start + count - 1}}}")
        else:
            upper += [tex(name)] * count
        start += count
    lines = []
    for line in grid.lines:
        first, *others = map(_tex_cell, line.cells)
        if line.level == 2:
            lines.append(" & ".join([rf"\quad {first}", *others]) + r" \\")
        else:
            style = r"\textbf" if line.level == 0 else r"\emph"
            if line.level == 0 and lines:
                lines.append(r"\midrule")
            lines.append(rf"\multicolumn{{{width}}}{{l}}{{{style}{{{first}}}}} \\")
    head = [" & ".join(upper) + r" \\", *(["".join(rules)] if rules else []), " & ".join(map(tex, lowers)) + r" \\"]
    columns = "l" * grid.texts + "r" * (width - grid.texts)
    return latex_table(grid.caption, columns, head, lines, notes, r"\scriptsize\setlength{\tabcolsep}{2.5pt}")


def _stacked(head: str) -> tuple[str, str]:
    """A heading in two lines: its group and part, or all but its last word and that."""
    if ", " in head:
        group, _, part = head.partition(", ")
        return group, part
    words, bracket, unit = head.partition(" (")
    first, _, last = words.rpartition(" ")
    return first, f"{last}{bracket}{unit}"


def _tex_cell(text: str) -> str:
    """A cell; the sign of a negative number is a minus, not a hyphen."""
    numeric = bool(text) and set(text) <= set("0123456789.,-[] \u202f")
    return tex(text).replace("-", "$-$") if numeric else tex(text)


def write_csv(path: Path, lines: Sequence[Sequence[object]]) -> None:
    """Numbers in full; an empty cell where there is nothing to measure."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
