"""The samples that a report shows, and what it takes to draw them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from muroan.modalities import word_edits
from muroan.results import AttackResult
from muroan.runs import Run

SMALL = 0.07  # of the picture's longer side: a smaller region gets a ring around it, or nobody would find it


@dataclass(frozen=True)
class Picture:
    """An image and its removed boxes, (x, y, width, height), and rings, (x, y, radius), in pixels of the image."""

    width: int
    height: int
    png: str
    boxes: list[tuple[int, int, int, int]]
    rings: list[tuple[float, float, float]]
    kind: str = "image"


@dataclass(frozen=True)
class Wave:
    """A sound: the outline of its peaks as the path of an SVG of width 1000 and height 100, and removed stretches.

    Attributes:
        stretches: (x, width) in the units of the SVG.
        seconds: its length.
        times: the stretches in words.
    """

    outline: str
    stretches: list[tuple[float, float]]
    seconds: float
    times: list[str]
    kind: str = "audio"


@dataclass(frozen=True)
class Words:
    """A text: its words, each with `del` where it was removed, `ins` where it was put in, or nothing."""

    words: list[tuple[str, str]]
    kind: str = "text"


@dataclass(frozen=True)
class Other:
    """An input of a kind that the report cannot draw: its removed regions in words."""

    regions: list[str]
    kind: str = "other"


Drawing = Picture | Wave | Words | Other


def draw(result: AttackResult, modality: str) -> Drawing:
    """One input of a sample that was kept for display, with what the attack removed of it."""
    removed = [(start, stop) for name, start, stop in result.regions if name == modality]
    return _drawn((result.media or {})[modality], removed)


def _drawn(media: dict[str, Any], removed: Sequence[Any] = (), beside: dict[str, Any] | None = None) -> Drawing:
    kind = media.get("kind")
    if kind == "image":
        return _picture(media, removed)
    if kind == "audio":
        return _wave(media, removed, [*media["peaks"], *(beside or media)["peaks"]])
    if kind == "text":
        gone = {i for (a,), (b,) in removed for i in range(a, b)}
        return Words([(str(word), "del" if i in gone else "") for i, word in enumerate(media["words"])])
    return Other([f"{list(start)} to {list(stop)}" for start, stop in removed])


def draw_all(result: AttackResult) -> list[tuple[str, list[Drawing]]]:
    """Every input of a sample that was kept for display, by modality: as it was with what was removed of it, and beside
    it what a perturbation made of it, where that is another. A text is one drawing, with its changed words marked.
    """
    shown: list[tuple[str, list[Drawing]]] = []
    for name, before in (result.media or {}).items():
        after = (result.perturbed_media or {}).get(name, before)
        if after == before:
            shown.append((name, [draw(result, name)]))
        elif before.get("kind") == "text":
            edits = word_edits(before["words"], after["words"])
            shown.append((name, [Words([pair for old, new in edits for pair in _edit(old, new)])]))
        else:
            shown.append((name, [_drawn(before, beside=after), _drawn(after, beside=before)]))
    return shown


def _edit(old: str | None, new: str | None) -> list[tuple[str, str]]:
    if old == new:
        return [(str(old), "")]
    return [(word, mark) for word, mark in ((old, "del"), (new, "ins")) if word is not None]


def _picture(media: dict[str, Any], removed: Sequence[Any]) -> Picture:
    height, width = media["grid"]
    boxes = [(x, y, right - x, bottom - y) for (y, x), (bottom, right) in removed]
    small = SMALL * max(height, width)
    rings = [(x + w / 2, y + h / 2, small) for x, y, w, h in boxes if max(w, h) < small]
    return Picture(width, height, str(media["png"]), boxes, rings)


def _wave(media: dict[str, Any], removed: Sequence[Any], scale: Sequence[Sequence[float]]) -> Wave:
    """The loudest peak of `scale` fills the height."""
    (length,), rate, peaks = media["grid"], media["rate"], media["peaks"]
    loudest = max((abs(p) for pair in scale for p in pair), default=0) or 1
    step = 1000 / max(1, len(peaks))

    def point(i: int, peak: float) -> str:
        return f"{(i + 0.5) * step:.1f} {50 - 46 * peak / loudest:.1f}"

    upper = [point(i, high) for i, (_, high) in enumerate(peaks)]
    lower = [point(i, low) for i, (low, _) in reversed(list(enumerate(peaks)))]
    spans = sorted((a, b) for (a,), (b,) in removed)
    stretches = [(round(1000 * a / length, 2), round(1000 * (b - a) / length, 2)) for a, b in spans]
    times = [f"{a / rate:.3f}–{b / rate:.3f} s" for a, b in spans]
    return Wave(f"M{' L'.join(upper + lower)} Z", stretches, length / rate, times)


def choose(runs: Sequence[Run], least: int = 12, most: int = 24) -> list[tuple[Run, AttackResult]]:
    """A spread of attacked samples that can be drawn: three quarters flipped, by different modalities; some held.

    Every choice is by the samples' order: the same records give the same examples. Inputs that were not shown yet
    come first.
    """
    flipped, others = _buckets(runs, True), _buckets(runs, False)
    count = min(most, max(least, 3 * len(runs)))
    held = min(sum(map(len, others)), count // 4)
    shown: set[str] = set()
    first = _take(flipped, count - held, shown)
    rest = _take(others, count - len(first), shown)
    return [example for part in (first, rest) for run in runs for example in part if example[0] is run]


def _buckets(runs: Sequence[Run], flipped: bool) -> list[list[tuple[Run, AttackResult]]]:
    """The flipped samples, or the others, by run and kind, in the order to take from them.

    Every run comes once before any comes twice, and each begins with another kind than the run before it.
    """
    turns: list[list[list[tuple[Run, AttackResult]]]] = []
    for place, run in enumerate(runs):
        kinds: dict[tuple[str, ...], list[tuple[Run, AttackResult]]] = {}
        for r in run.records:
            if r.media and r.attacked and r.flipped is flipped:
                kinds.setdefault(tuple(sorted(r.removed)) if flipped else (r.status,), []).append((run, r))
        ordered = [kinds[kind] for kind in sorted(kinds)]
        cut = place % max(1, len(ordered))
        turns.append(ordered[cut:] + ordered[:cut])
    return [bucket for turn in zip_longest(*turns) for bucket in turn if bucket]


def _take(buckets: list[list[tuple[Run, AttackResult]]], count: int, shown: set[str]) -> list[tuple[Run, AttackResult]]:
    """Up to `count` in turn from every bucket; `shown` remembers the inputs between calls."""
    taken: list[tuple[Run, AttackResult]] = []
    while any(buckets) and len(taken) < count:
        for bucket in buckets:
            if bucket and len(taken) < count:
                looks = [_look(r) for _, r in bucket]
                place = next((i for i, look in enumerate(looks) if look not in shown), 0)
                shown.add(looks[place])
                taken.append(bucket.pop(place))
    return taken


def _look(result: AttackResult) -> str:
    """What an example looks like at a glance: its first input. Many questions can be about one picture."""
    media = result.media or {}
    return repr(media[next(iter(media))])
