"""What is measured: pure functions for the maths, thin `torchmetrics.Metric` classes that sum across processes.

Every figure of a run is a mean or a median of one column over samples, NaN where a sample has no say in it
(a sample that was wrong before the attack has none in the success rate). That makes the bootstrap one function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from muroan.modalities import stable_seed
from muroan.results import AttackResult

CURVE_LIMIT = 10.0  # percent of the input up to which the area under the success curve is taken


def success_curve(fractions: Sequence[float], attacked: int) -> tuple[np.ndarray, np.ndarray]:
    """Success rate as a function of the decoupled fraction.

    Args:
        fractions: decoupled fraction, in percent, of every flipped sample.
        attacked: number of attacked samples, flipped or not.

    Returns:
        x, y: (K,) sorted fractions and the percentage of attacked samples flipped by removing no more than that.

    >>> success_curve([2.0, 0.5], attacked=4)
    (array([0.5, 2. ]), array([25., 50.]))
    """
    x = np.sort(np.asarray(fractions, dtype=float))
    return x, 100 * np.arange(1, len(x) + 1) / max(1, attacked)


def curve_score(fraction: float, limit: float = CURVE_LIMIT) -> float:
    """One flipped sample's share of the area under the success curve from 0 to `limit` percent, 0 to 1.

    The mean over attacked samples (0 for one that held) is that area over the largest possible one.

    >>> curve_score(2.5), curve_score(0.0), curve_score(40.0)
    (0.75, 1.0, 0.0)
    """
    return max(0.0, 1 - fraction / limit)


def columns(results: Sequence[AttackResult], judged: bool | None = None) -> dict[str, tuple[np.ndarray, str]]:
    """Every metric as a column over samples and how it is reduced; see `reduce_column`.

    Args:
        judged: whether the dataset can tell if a label is still right after a flip; None to go by whether it has.
    """
    nan = float("nan")
    modalities = sorted({name for r in results for name in r.total})

    def column(value, among=lambda r: True) -> np.ndarray:
        return np.array([float(value(r)) if among(r) else nan for r in results])

    def attacked(r: AttackResult) -> bool:
        return r.attacked

    def flipped(r: AttackResult) -> bool:
        return r.flipped

    fraction = column(lambda r: r.decoupled_fraction, flipped)
    table = {
        "clean_accuracy": (100 * column(lambda r: r.clean_label == r.label), "rate"),
        "robust_accuracy": (100 * column(lambda r: r.clean_label == r.label == r.adversarial_label), "rate"),
        "attack_success_rate": (100 * column(lambda r: r.flipped, attacked), "rate"),
        "decoupled_fraction_mean": (fraction, "mean"),
        "decoupled_fraction_median": (fraction, "median"),
        "curve_area": (
            100 * column(lambda r: curve_score(r.decoupled_fraction) if r.flipped else 0, attacked),
            "mean",
        ),
        "queries": (column(lambda r: r.queries, attacked), "mean"),
        "forwards": (column(lambda r: r.forwards, attacked), "mean"),
        "backwards": (column(lambda r: r.backwards, attacked), "mean"),
        "cache_hits": (column(lambda r: r.cache_hits, attacked), "mean"),
    }
    for name in modalities:
        part = column(lambda r, name=name: r.modality_fraction(name), flipped)
        table[f"decoupled_fraction_{name}_mean"] = (part, "mean")
        table[f"decoupled_fraction_{name}_median"] = (part, "median")
        alone = column(lambda r, name=name: [n for n, count in r.removed.items() if count] == [name], flipped)
        table[f"modality_share_{name}"] = (100 * alone, "rate")
    joint = column(lambda r: sum(count > 0 for count in r.removed.values()) > 1, flipped)
    table["modality_share_joint"] = (100 * joint, "rate")

    def audited(r: AttackResult) -> bool:
        return r.flipped and r.one_minimal is not None

    table["interaction"] = (100 * column(lambda r: r.interaction is True, audited), "rate")
    table["one_minimal"] = (100 * column(lambda r: r.one_minimal is True, audited), "rate")
    table["proven"] = (100 * column(lambda r: r.proven, lambda r: r.flipped and r.proven is not None), "rate")
    judged = any(r.still_valid is not None for r in results) if judged is None else judged
    # A dataset can tell of removals alone.
    valid = column(
        lambda r: r.flipped and r.still_valid is True, lambda r: r.attacked and judged and r.kind == "removal"
    )
    table["valid_success_rate"] = (100 * valid, "rate")
    return table


def reduce_column(column: np.ndarray, how: str, axis: int | None = None) -> np.ndarray | float:
    """Mean or median of what is not NaN; NaN where nothing is left. A `rate` is the mean of what is all 0 or 100."""
    with np.errstate(invalid="ignore"):
        valid = ~np.isnan(column)
        if how != "median":
            count = valid.sum(axis)
            return np.where(count > 0, np.where(valid, column, 0).sum(axis) / np.maximum(count, 1), np.nan)
        order = np.sort(column, axis=-1)  # NaN last
        count = valid.sum(-1)
        low, high = np.maximum(count - 1, 0) // 2, np.minimum(count // 2, column.shape[-1] - 1)
        pick = (np.take_along_axis(order, np.expand_dims(i, -1), -1)[..., 0] for i in (low, high))
        return np.where(count > 0, sum(pick) / 2, np.nan)


def bootstrap(
    column: np.ndarray, how: str = "mean", resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, float | None]:
    """The mean or median of a column over samples and its percentile bootstrap interval; see `pooled`.

    Args:
        column: (N,) one number a sample, NaN where the sample has no say.
        how: see `reduce_column`.
        resamples: bootstrap resamples of the N samples; the same ones for every column of that length.
        level: of the interval.

    Returns:
        value, low and high; None where there is nothing to measure.
    """
    return pooled([dict(enumerate(column.tolist()))], how, resamples, level, seed)


def pooled(
    seeds: Sequence[Mapping[Any, float]],
    how: str = "mean",
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, float | None]:
    """The mean over training seeds of a metric, and its percentile bootstrap interval over samples.

    Models of all seeds are attacked on the same samples, and what is hard to flip in one is hard in the others. So
    samples are drawn once for all seeds; the seeds themselves are not resampled.

    A rate of 0 or 100 % is the same in every resample, though another sample may well differ. So the interval of a rate
    reaches as far from its ends as that of Clopper and Pearson (Biometrika 1934) does there, for as many samples.

    Args:
        seeds: for each, one number a sample by its id, NaN where the sample has no say.
        how: of each seed's samples; see `reduce_column`.
        resamples, level: see `bootstrap`, which this is for one seed.

    Returns:
        value, low and high; None where there is nothing to measure. Seeds with nothing to measure are left out.
    """
    places = {key: place for place, key in enumerate(dict.fromkeys(key for column in seeds for key in column))}
    table = np.full((len(seeds), len(places)), np.nan)
    for row, column in zip(table, seeds, strict=True):
        row[[places[key] for key in column]] = list(column.values())
    table, n = table[~np.isnan(table).all(1)], len(places)
    if not table.size:
        return {"value": None, "low": None, "high": None}
    rng = np.random.default_rng(stable_seed("bootstrap", seed))
    parts = []
    at_once = max(1, 4_000_000 // n)  # a few times 32 MB, however many samples
    for done in range(0, resamples, at_once):
        drawn = rng.integers(0, n, (min(at_once, resamples - done), n))
        parts.append(np.mean([np.asarray(reduce_column(row[drawn], how, axis=-1)) for row in table], axis=0))
    spread = np.concatenate(parts)
    spread = spread[~np.isnan(spread)]
    tails = [100 * (1 - level) / 2, 100 * (1 + level) / 2]
    low, high = np.percentile(spread, tails) if len(spread) else (np.nan, np.nan)
    value = np.mean([reduce_column(row, how) for row in table])
    if how == "rate":
        beyond = 100 * (1 - ((1 - level) / 2) ** (1 / (~np.isnan(table)).any(0).sum()))
        low, high = min(low, 100 - beyond), max(high, beyond)
    named = {"value": value, "low": low, "high": high}
    return {key: None if np.isnan(x) else float(x) for key, x in named.items()}


def summarise(
    results: Sequence[AttackResult],
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    judged: bool | None = None,
) -> dict[str, dict[str, float | None]]:
    """Every metric of one attack with its bootstrap confidence interval.

    Args:
        results: one a sample, skipped ones included.
        judged: see `columns`.
        resamples: bootstrap resamples of the samples; percentile intervals.
        level: of the interval.

    Returns:
        name -> {value, low, high}; None where there is nothing to measure (no sample flipped). Rates, fractions
        and shares are in percent. Without results, nothing.
    """
    table = columns(results, judged) if results else {}
    return {name: bootstrap(column, how, resamples, level, seed) for name, (column, how) in table.items()}


class CleanAccuracy(MeanMetric):
    """Percentage right without attack, over all samples."""

    def update(self, clean: Tensor, labels: Tensor) -> None:  # type: ignore[override]
        """
        Args:
            clean: (N,) predictions before the attack; labels: (N,).
        """
        super().update(100.0 * (clean == labels).float())


class RobustAccuracy(MeanMetric):
    """Percentage still right after the attack, over all samples."""

    def update(self, clean: Tensor, adversarial: Tensor, labels: Tensor) -> None:  # type: ignore[override]
        """
        Args:
            clean, adversarial, labels: (N,).
        """
        super().update(100.0 * ((clean == labels) & (adversarial == labels)).float())


class AttackSuccessRate(MeanMetric):
    """Percentage flipped, over attacked samples; those wrong before the attack are not counted."""

    def update(self, flipped: Tensor, attacked: Tensor) -> None:  # type: ignore[override]
        """
        Args:
            flipped, attacked: (N,) bool.
        """
        super().update(100.0 * flipped[attacked].float())


class QueryCount(MeanMetric):
    """Mean queries of an attacked sample."""

    def update(self, queries: Tensor, attacked: Tensor) -> None:  # type: ignore[override]
        """
        Args:
            queries: (N,); attacked: (N,) bool.
        """
        super().update(queries[attacked].float())


class DecoupledFraction(Metric):
    """Mean and median of the decoupled fraction, in percent, over flipped samples."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.fractions: list[Tensor]
        self.add_state("fractions", default=[], dist_reduce_fx="cat")

    def update(self, fractions: Tensor, flipped: Tensor) -> None:
        """
        Args:
            fractions: (N,) percent; flipped: (N,) bool.
        """
        self.fractions.append(fractions[flipped].float())

    def compute(self) -> dict[str, Tensor]:
        found = self.fractions  # a list of parts here, one tensor after they were gathered from all processes
        every = found if isinstance(found, Tensor) else torch.cat(found) if found else torch.zeros(0)
        if every.numel() == 0:
            nothing = torch.tensor(float("nan"))
            return {"decoupled_fraction_mean": nothing, "decoupled_fraction_median": nothing}
        return {
            "decoupled_fraction_mean": every.mean(),
            "decoupled_fraction_median": torch.quantile(every, 0.5),
        }
