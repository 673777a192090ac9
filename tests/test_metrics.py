"""Metrics: figures worked out by hand on a handful of records, and the bootstrap around them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from muroan.metrics import (
    AttackSuccessRate,
    CleanAccuracy,
    DecoupledFraction,
    RobustAccuracy,
    bootstrap,
    columns,
    curve_score,
    pooled,
    reduce_column,
    success_curve,
    summarise,
)
from muroan.results import AttackResult, Count

TOTAL = {"image": 96, "text": 4}
IMAGE, WORD = ("image", (0, 0), (2, 3)), ("text", (1,), (2,))


def flip(i, image=0, text=0, minimal=None, interaction=None, spent=(0, 0, 0), **more) -> AttackResult:
    regions = [IMAGE] * (image > 0) + [WORD] * (text > 0)
    removed = {name: n for name, n in (("image", image), ("text", text)) if n}
    ledger = {"clean": Count(0, 1, 0), "search": Count(*spent)}
    return AttackResult(
        str(i),
        i,
        "x",
        1,
        1,
        0,
        "flipped",
        regions,
        removed,
        TOTAL,
        ledger,
        one_minimal=minimal,
        interaction=interaction,
        **more,
    )


def other(i, status, spent=(0, 0, 0)) -> AttackResult:
    clean = 0 if status == "skipped" else 1
    ledger = {"clean": Count(0, 1, 0), "search": Count(*spent)}
    return AttackResult(str(i), i, "x", 1, clean, clean, status, total=TOTAL, ledger=ledger)


# Eight samples, six attacked, four flipped by removing 1, 2, 6 and 48 of 100 elements.
RESULTS = [
    flip(0, text=1, minimal=True, spent=(4, 3, 1), proven=True, still_valid=False),
    flip(1, image=2, minimal=False, spent=(6, 5, 0, 3), proven=False, still_valid=True),
    flip(2, image=4, text=2, minimal=True, interaction=True, spent=(20, 16, 5)),
    flip(3, image=45, text=3, spent=(30, 30, 0)),
    other(4, "held", spent=(40, 38, 2)),
    other(5, "budget_exhausted", spent=(80, 74, 10)),
    other(6, "skipped"),
    other(7, "skipped"),
]

BY_HAND = {
    "clean_accuracy": 75.0,  # 6 of 8
    "robust_accuracy": 25.0,  # 2 of 8
    "attack_success_rate": 100 * 4 / 6,
    "decoupled_fraction_mean": (1 + 2 + 6 + 48) / 4,
    "decoupled_fraction_median": 4.0,
    "curve_area": 100 * (0.9 + 0.8 + 0.4 + 0 + 0 + 0) / 6,
    "queries": (4 + 6 + 20 + 30 + 40 + 80) / 6,
    "forwards": (3 + 5 + 16 + 30 + 38 + 74) / 6 + 1,
    "backwards": 3 / 6,
    "cache_hits": (1 + 0 + 5 + 0 + 2 + 10) / 6,
    "decoupled_fraction_image_mean": 100 * (0 + 2 + 4 + 45) / 96 / 4,
    "decoupled_fraction_image_median": 100 * 3 / 96,
    "decoupled_fraction_text_mean": (25 + 0 + 50 + 75) / 4,
    "decoupled_fraction_text_median": 37.5,
    "modality_share_image": 25.0,
    "modality_share_text": 25.0,
    "modality_share_joint": 50.0,
    "interaction": 100 / 3,  # the fourth flip was not audited
    "one_minimal": 100 * 2 / 3,
    "proven": 50.0,
    "valid_success_rate": 100 * 1 / 6,
}


def test_what_no_dataset_can_judge_has_no_valid_success_rate():
    chosen = [replace(r, kind="perturbation", still_valid=None) for r in RESULTS]
    assert summarise(chosen, resamples=10, judged=True)["valid_success_rate"]["value"] is None


class TestByHand:
    def test_no_metric_is_forgotten(self):
        assert set(columns(RESULTS)) == set(BY_HAND)

    @pytest.mark.parametrize("name", BY_HAND)
    def test_value(self, name):
        assert summarise(RESULTS, resamples=10)[name]["value"] == pytest.approx(BY_HAND[name])

    def test_shares_add_up(self):
        assert sum(BY_HAND[f"modality_share_{name}"] for name in ("image", "text", "joint")) == 100

    def test_a_goal_that_leaves_the_label_right_leaves_the_model_robust(self):
        """An attack on the embedding may reach it while the prediction is still the label, 1."""
        moved = flip(0, text=1)
        moved.adversarial_label = 1
        summary = summarise([moved, flip(1, text=1)], resamples=10)
        assert summary["attack_success_rate"]["value"] == 100
        assert summary["robust_accuracy"]["value"] == 50

    def test_clean_robust_and_success_belong_together(self):
        assert BY_HAND["robust_accuracy"] == pytest.approx(
            BY_HAND["clean_accuracy"] * (1 - BY_HAND["attack_success_rate"] / 100)
        )


class TestNothingToMeasure:
    def test_nobody_flipped(self):
        summary = summarise([other(0, "held", (7, 7, 0)), other(1, "held", (9, 9, 0))], resamples=20)
        assert summary["attack_success_rate"] == pytest.approx({"value": 0.0, "low": 0.0, "high": 84.19}, abs=0.01)
        assert summary["robust_accuracy"]["value"] == summary["clean_accuracy"]["value"] == 100
        assert summary["curve_area"]["value"] == 0
        assert summary["queries"]["value"] == 8
        of_flipped = [
            n for n in summary if n.startswith(("decoupled", "modality", "interaction", "one_minimal", "proven"))
        ]
        assert len(of_flipped) == 12
        for name in of_flipped:
            assert summary[name] == {"value": None, "low": None, "high": None}, name

    def test_all_skipped(self):
        summary = summarise([other(0, "skipped"), other(1, "skipped")], resamples=20)
        assert summary["clean_accuracy"]["value"] == summary["robust_accuracy"]["value"] == 0
        assert {n for n, v in summary.items() if v["value"] is not None} == {"clean_accuracy", "robust_accuracy"}

    def test_no_results(self):
        assert summarise([]) == {}
        assert bootstrap(np.array([]))["value"] is None

    def test_one_flip_among_many(self):
        """Most resamples miss the one flip; the others still agree on its size."""
        summary = summarise([flip(0, image=5), *(other(i, "held") for i in range(1, 6))], resamples=200)
        assert summary["decoupled_fraction_median"] == {"value": 5.0, "low": 5.0, "high": 5.0}
        assert summary["attack_success_rate"]["low"] == 0


class TestCurve:
    def test_curve(self):
        x, y = success_curve([6, 1, 48, 2], attacked=6)
        assert x.tolist() == [1, 2, 6, 48]
        assert y == pytest.approx([100 / 6, 200 / 6, 50, 400 / 6])

    def test_nobody_flipped(self):
        x, y = success_curve([], attacked=0)
        assert len(x) == len(y) == 0

    @given(st.lists(st.floats(0, 100), max_size=20), st.integers(0, 10))
    def test_score_is_the_area_under_the_curve(self, fractions, held):
        attacked = len(fractions) + held
        x, y = success_curve(fractions, attacked)
        steps = np.concatenate([np.minimum(x, 10), [10]])
        area = (np.diff(steps) * y).sum() / (10 * 100) if len(x) else 0.0
        assert sum(map(curve_score, fractions)) / max(1, attacked) == pytest.approx(area, abs=1e-9)


class TestReduce:
    @given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=12))
    def test_like_numpy(self, values):
        column = np.array(values)
        if np.isnan(column).all():
            assert np.isnan(reduce_column(column, "mean"))
            assert np.isnan(reduce_column(column, "median"))
        else:
            assert reduce_column(column, "mean") == pytest.approx(np.nanmean(column), abs=1e-6)
            assert reduce_column(column, "median") == pytest.approx(np.nanmedian(column), abs=1e-6)

    def test_rows(self):
        rows = np.array([[1.0, 2.0, np.nan], [np.nan, np.nan, np.nan], [5.0, 1.0, 3.0]])
        np.testing.assert_equal(reduce_column(rows, "mean", axis=-1), [1.5, np.nan, 3.0])
        np.testing.assert_equal(reduce_column(rows, "median", axis=-1), [1.5, np.nan, 3.0])


class TestBootstrap:
    def test_deterministic_and_seeded(self):
        column = np.random.default_rng(0).normal(size=50)
        assert bootstrap(column) == bootstrap(column)
        assert bootstrap(column, seed=1) != bootstrap(column)
        assert bootstrap(column, seed=1)["value"] == bootstrap(column)["value"]

    @pytest.mark.parametrize("n", [1, 10, 300])
    @pytest.mark.parametrize("value", [0.0, 100.0])
    def test_a_rate_at_an_end_is_not_certain(self, n, value):
        """No resample differs; 0 of 10 may well be 30.8 % of all (Clopper and Pearson's two-sided 95 %)."""
        column = np.array([value] * n + [np.nan])
        exact = scipy.stats.binomtest(round(n * value / 100), n).proportion_ci(method="exact")
        expected = {"value": value, "low": 100 * exact.low, "high": 100 * exact.high}
        assert bootstrap(column, "rate") == pytest.approx(expected)
        assert bootstrap(column) == {"value": value, "low": value, "high": value}  # of no rate nothing is known
        if n == 10 and not value:
            assert bootstrap(column, "rate")["high"] == pytest.approx(30.85, abs=0.01)

    def test_of_a_rate_at_an_end_in_several_seeds_each_sample_counts_once(self):
        seeds = [dict.fromkeys("abc", 100.0), {**dict.fromkeys("bcd", 100.0), "e": np.nan}]
        assert pooled(seeds, "rate")["low"] == pytest.approx(bootstrap(np.full(4, 100.0), "rate")["low"])
        assert pooled(seeds, "rate")["high"] == 100

    @pytest.mark.parametrize("seeds", [1, 3])
    def test_of_a_rate_one_more_never_lowers_an_end(self, seeds):
        """The bootstrap alone is narrower at 1 of 100 than what is left open at 0 of 100."""
        columns = [np.array([100.0] * k + [0.0] * (100 - k)) for k in (0, 1, 2, 3, 50, 97, 98, 99, 100)]
        others = [dict(enumerate(columns[0])) for _ in range(seeds - 1)]
        for low_or_high in ("low", "high"):
            ends = [pooled([*others, dict(enumerate(column))], "rate")[low_or_high] for column in columns]
            assert ends == sorted(ends)
        middle = columns[4]
        assert bootstrap(middle, "rate") == bootstrap(middle, "mean"), "far from the ends nothing is changed"

    def test_like_the_textbook(self):
        """The percentile interval of a mean is close to the normal one."""
        column = np.random.default_rng(1).normal(3, 2, size=400)
        estimate = bootstrap(column, resamples=4000)
        error = column.std() / 20
        assert estimate["low"] == pytest.approx(column.mean() - 1.96 * error, abs=0.2 * error)
        assert estimate["high"] == pytest.approx(column.mean() + 1.96 * error, abs=0.2 * error)

    def test_covers_the_truth_about_as_often_as_it_says(self):
        rng = np.random.default_rng(2)
        spans = [bootstrap((rng.random(80) < 0.4).astype(float), resamples=200) for _ in range(200)]
        assert 0.89 <= np.mean([span["low"] <= 0.4 <= span["high"] for span in spans]) <= 0.99

    def test_a_wider_level_is_a_wider_interval(self):
        column = np.arange(30.0)
        narrow, wide = bootstrap(column, "median", level=0.5), bootstrap(column, "median", level=0.99)
        assert wide["low"] < narrow["low"] <= narrow["value"] <= narrow["high"] < wide["high"]

    def test_order_of_samples_does_not_move_the_value(self):
        forward, backward = summarise(RESULTS, resamples=10), summarise(RESULTS[::-1], resamples=10)
        assert {n: v["value"] for n, v in forward.items()} == pytest.approx(
            {n: v["value"] for n, v in backward.items()}
        )

    def test_many_samples_are_resampled_in_parts(self):
        column = np.random.default_rng(3).random(9000)  # more than one part of 1000 resamples
        estimate = bootstrap(column)
        assert estimate["high"] - estimate["low"] == pytest.approx(2 * 1.96 * column.std() / 9000**0.5, rel=0.1)


def tensors(results):
    """Columns as a callback has them."""
    clean = torch.tensor([r.clean_label for r in results])
    adversarial = torch.tensor([r.adversarial_label for r in results])
    labels = torch.tensor([r.label for r in results])
    flipped = torch.tensor([r.flipped for r in results])
    attacked = torch.tensor([r.attacked for r in results])
    fractions = torch.tensor([r.decoupled_fraction for r in results])
    return {
        CleanAccuracy: (clean, labels),
        RobustAccuracy: (clean, adversarial, labels),
        AttackSuccessRate: (flipped, attacked),
        DecoupledFraction: (fractions, flipped),
    }


def figures(metric) -> dict[str, float]:
    name = {CleanAccuracy: "clean_accuracy", RobustAccuracy: "robust_accuracy"}.get(type(metric), "attack_success_rate")
    value = metric.compute()
    return {n: float(x) for n, x in (value if isinstance(value, dict) else {name: value}).items()}


METRICS = (CleanAccuracy, RobustAccuracy, AttackSuccessRate, DecoupledFraction)


@pytest.mark.parametrize("kind", METRICS)
class TestStatefulMetrics:
    def test_equal_the_pure_functions(self, kind):
        metric = kind()
        for at in range(0, 8, 3):  # batches of 3, 3 and 2, the last one all skipped
            metric.update(*tensors(RESULTS[at : at + 3])[kind])
        for name, value in figures(metric).items():
            assert value == pytest.approx(BY_HAND[name]), name

    def test_two_processes_sum_up(self, kind):
        """As `compute` gathers them: state after state, a list of parts joined before."""
        metric, second = kind(), kind()
        metric.update(*tensors(RESULTS[:3])[kind])
        second.update(*tensors(RESULTS[3:])[kind])
        states = iter(second.metric_state.values())

        def gather(mine, group=None):
            theirs = next(states)
            return [mine, torch.cat(theirs) if isinstance(theirs, list) else theirs]

        metric.dist_sync_fn, metric.distributed_available_fn = gather, lambda: True
        for name, value in figures(metric).items():
            assert value == pytest.approx(BY_HAND[name]), name

    def test_merged_state(self, kind):
        metric, second = kind(), kind()
        metric.update(*tensors(RESULTS[:3])[kind])
        second.update(*tensors(RESULTS[3:])[kind])
        if not hasattr(metric, "merge_state"):
            pytest.skip("this torchmetrics has no merge_state")
        metric.merge_state(second)
        for name, value in figures(metric).items():
            assert value == pytest.approx(BY_HAND[name]), name


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_decoupled_fraction_of_nothing_is_not_a_number():
    metric = DecoupledFraction()
    assert all(math.isnan(value) for value in figures(metric).values())
    metric.update(torch.tensor([1.0, 2.0]), torch.tensor([False, False]))
    assert all(math.isnan(value) for value in figures(metric).values())


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_figures_stay_on_the_device_that_they_came_from():
    """Parts on an accelerator cannot be joined with anything that is not; `meta` stands in for one."""
    metric = DecoupledFraction().to("meta")
    metric.fractions = [torch.ones(2, device="meta"), torch.ones(1, device="meta")]
    assert {figure.device.type for figure in metric.compute().values()} == {"meta"}


def test_all_states_have_the_type_that_an_empty_process_contributes():
    """Gathering stands in for a process without any sample, in the metric's own type: others have other bytes."""
    for kind, inputs in tensors(RESULTS).items():
        metric = kind()
        metric.update(*inputs)
        states = [s for state in metric.metric_state.values() for s in (state if isinstance(state, list) else [state])]
        assert {state.dtype for state in states} == {metric.dtype}


def test_success_rate_of_nobody_attacked_does_not_raise():
    metric = AttackSuccessRate()
    metric.update(torch.tensor([False]), torch.tensor([False]))
    assert math.isnan(float(metric.compute()))
