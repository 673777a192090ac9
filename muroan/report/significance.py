"""Whether a difference between paired figures is more than chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest

STEPS = 20_000  # in which the sum of all paired differences is counted, and at least so many a difference:
FINE = 10
LARGE = 10_000  # differences, beyond which counting takes too long


def sign_flip(differences: np.ndarray) -> float:
    """Two-sided p value of a sum of paired differences, if either of two attacks were as likely to be the better one.

    All flips of their signs are counted, of the differences as multiples of a 20,000th of the sum of their sizes, or
    less where they are many (Pagano and Tritchler, JASA 1983). Of differences of one size this is the exact McNemar
    test. Of more than 10,000 of several sizes p is that of the normal distribution, which the sum then follows.

    Args:
        differences: (N,) weighted so that their sum is the figure tested.

    >>> sign_flip(np.array([3.0, 1.0, 0.0, 2.0]))
    0.25
    """
    total = np.abs(differences).sum()
    if total == 0:
        return 1.0
    sizes = np.abs(differences[differences != 0])
    if len(sizes) > LARGE:
        if np.ptp(sizes) < 1e-9 * sizes[0]:
            return float(binomtest(int((differences > 0).sum()), len(sizes)).pvalue)
        return math.erfc(abs(differences.sum()) / math.sqrt(2 * (sizes**2).sum()))
    units = np.rint(differences / total * max(STEPS, FINE * len(differences))).astype(int)
    seen, most = abs(units.sum()), int(np.abs(units).sum())
    chance = np.zeros(most + 1)  # of each sum of the sizes whose sign is up
    chance[0] = 1
    for size in np.abs(units[units != 0]):
        chance *= 0.5
        chance[size:] += chance[:-size].copy()
    sums = np.abs(2 * np.arange(most + 1) - most)
    return min(1.0, float(chance[sums >= seen].sum()))


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
