"""Whether a difference between paired figures is more than chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest

MOST = 1e6  # units that a sum is counted in at most, and fewer where counting then takes more than
COST = 3e7  # additions; but on the average, a difference has at least
FINE = 10  # units
FEW = 1_000  # differences, among which removals of equal sums are not yet lost
LARGE = 10_000  # differences, beyond which counting takes too long


def sign_flip(differences: np.ndarray) -> float:
    """Two-sided p value of a sum of paired differences, if either of two attacks were as likely to be the better one.

    All flips of their signs are counted (Pagano and Tritchler, JASA 1983). Where the differences are whole multiples of
    one number, as those of success are, p is exact; of one size it is McNemar's. Else they are counted as multiples of
    a small share of the sum of their sizes, and every sum that may be as large as theirs is taken to be: p is a little
    too large, never too small. Of more than 1,000 of no common unit it may be either by next to nothing; of more than
    10,000 it is that of the normal distribution, which the sum then follows.

    Args:
        differences: (N,) weighted so that their sum is the figure tested.

    >>> sign_flip(np.array([3.0, 1.0, 0.0, 2.0]))
    0.25
    """
    differences = differences[differences != 0]
    sizes = np.abs(differences)
    if not len(sizes):
        return 1.0
    if len(sizes) > LARGE:
        if np.ptp(sizes) < 1e-9 * sizes[0]:
            return float(binomtest(int((differences > 0).sum()), len(sizes)).pvalue)
        return math.erfc(abs(differences.sum()) / math.sqrt(2 * (sizes**2).sum()))
    share = sizes.sum() / max(min(MOST, COST / len(sizes)), FINE * len(sizes))
    unit = common_unit(sizes, share)
    units = differences / (unit or share)
    whole = np.rint(units).astype(int)
    doubt = 0.0  # by so much may two equal sums differ
    if unit is None and len(sizes) <= FEW:
        doubt = 2 * float(np.abs(units - whole).sum()) + 1e-6
    seen, most = abs(whole.sum()) - doubt, int(np.abs(whole).sum())
    chance = np.zeros(most + 1)  # of each sum of the sizes whose sign is up
    chance[0], reached = 1, 0
    for size in np.abs(whole[whole != 0]).tolist():
        reached += size
        chance[: reached + 1] *= 0.5
        chance[size : reached + 1] += chance[: reached + 1 - size].copy()
    sums = np.abs(2 * np.arange(most + 1) - most)
    return min(1.0, float(chance[sums >= seen].sum()))


def common_unit(sizes: np.ndarray, least: float) -> float | None:
    """The largest number, at least `least`, of which all sizes (N,) are whole multiples, up to rounding; None without.

    >>> common_unit(np.array([0.75, 1.5, 0.5]), 0.1)
    0.25
    """
    exact = 1e-9 * float(sizes.max())
    unit = float(sizes.min())
    for size in np.unique(sizes).tolist():
        rest = size
        while rest > exact:  # Euclid's algorithm, to the nearest multiple
            unit, rest = rest, abs(unit - rest * round(unit / rest))
            if unit < least:
                return None
    return unit


def over_seeds(seeds: Sequence[Mapping[Any, float]]) -> np.ndarray:
    """(N,) what each sample adds to the mean over seeds: each seed counts the same, however many samples it has.

    The signs of a sample's differences in several seeds are flipped together: they are no independent observations.
    """
    found: dict[Any, float] = {}
    for column in seeds:
        for key, value in column.items():
            found[key] = found.get(key, 0.0) + value / len(column) / len(seeds)
    return np.array(list(found.values()))


def holm(p: Sequence[float]) -> list[float]:
    """The p values after Holm's correction.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, largest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[place]))
        corrected[place] = largest
    return corrected


def probability(p: float) -> str:
    """A p value as text.

    >>> probability(0.00002), probability(0.0123), probability(0.5)
    ('< 0.001', '0.012', '0.50')
    """
    if p < 0.001:
        return "< 0.001"
    return f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
