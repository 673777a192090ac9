"""Attacks side by side: hand-made records, and the figures, tests, tables and files that follow from them."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import muroan
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import binomtest, wilcoxon

from muroan.attacks.base import ThreatModel
from muroan.errors import MuroanError
from muroan.metrics import bootstrap, pooled, summarise
from muroan.modalities import Image as Pictures
from muroan.modalities import Text, WordTokenizer
from muroan.report import build, plots
from muroan.report.compare import Comparison, compare, latex, markdown, write
from muroan.report.html import warnings
from muroan.report.markup import tex
from muroan.report.paired import UNCONTROLLED, against_controls, flip_queries, flip_sizes
from muroan.report.plots import success_at, success_band
from muroan.report.significance import common_unit, holm, over_seeds, sign_flip
from muroan.results import AttackResult, Count, RunFolder
from muroan.runs import find_runs

# Removed elements of 100, a sample; 0 for one that held, None for one that was wrong before the attack.
GUIDED = [1, 2, 5, 20, 0, 0, 1, 1, None]
RANDOM = [5, 0, 10, 0, 0, 0, 0, 1, None]
# 20 samples of which the guided attack flips all by 1 % and random removal none: beyond chance.
CLEAR = [1] * 20
NOTHING = [0] * 20


def record(index: int, attack: str, removed: int | None, queries: int = 10, **more: Any) -> AttackResult:
    status = "skipped" if removed is None else "flipped" if removed else "held"
    before, after = int(removed is None), int(removed is None or removed > 0)
    size = {"image": removed} if removed else {}
    result = AttackResult(f"q{index}", index, attack, 0, before, after, status, removed=size, total={"image": 100})
    result.ledger = {"clean": Count(0, 1, 0), "search": Count(queries, queries, 1)}
    for name, value in more.items():
        setattr(result, name, value)
    return result


def write_run(
    path: Path,
    attack: str,
    outcomes: list[int | None],
    model: str = "m",
    seed: int = 0,
    weights: str = "w",
    finish: bool = True,
    setting: int = 0,
    first: int = 0,
    **more: Any,
) -> Path:
    folder = RunFolder(path)
    about = {
        "identity": {"attack": {"kind": attack, "setting": setting}, "model": model, "seed": seed, "weights": weights},
        "attack": attack,
        "model": model,
        "dataset": "d",
        "classes": ["no", "yes"],
        "seed": seed,
        "checkpoint": {"path": "x", "sha256": weights},
    }
    folder.start(about)
    for index, removed in enumerate(outcomes, start=first):
        folder.append(record(index, attack, removed, **more))
    folder.close()
    if finish:
        folder.finish()
    return path


def two(path: Path) -> Path:
    """A guided attack and the random control, on the same samples."""
    write_run(path / "guided", "guided", GUIDED)
    write_run(path / "random", "random_removal", RANDOM)
    return path


def compared(path: Path, **options: Any) -> Comparison:
    return compare(find_runs([path]), **options)


def rows_of(text: str) -> list[list[str]]:
    """The cells of all tables of a Markdown text."""
    return [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines() if line[:1] == "|"]


class TestFigures:
    def test_success_and_curve_area_by_hand(self, tmp_path):
        (target,) = compared(two(tmp_path)).targets
        guided, control = target.rows
        assert [guided.value("attack_success_rate"), control.value("attack_success_rate")] == [75.0, 37.5]
        # 1 % of the input scores 90, 2 % 80, 5 % 50 and 10 % or more nothing.
        assert guided.value("curve_area") == pytest.approx((90 + 80 + 50 + 0 + 90 + 90) / 8)
        assert control.value("curve_area") == pytest.approx((50 + 0 + 90) / 8)
        assert target.best(guided.rules) is guided
        assert control.is_control

    def test_success_within_budgets_by_hand(self, tmp_path):
        (run,) = find_runs([write_run(tmp_path, "x", GUIDED)])
        assert success_at([flip_sizes(run)], np.array([0.5, 1, 2, 19.9, 20])).tolist() == [0, 37.5, 50, 62.5, 75]

    def test_queries_at_the_first_flip(self, tmp_path):
        records = [
            record(0, "x", 1, queries=50, trajectory=[(3, 9.0), (20, 1.0)]),
            record(1, "x", 1, queries=50),  # an older record: all of its queries
            record(2, "x", 0, queries=50, trajectory=[(3, 9.0)]),  # a flip that the check did not confirm is none
            record(3, "x", None),
        ]
        folder = RunFolder(write_run(tmp_path, "x", [], finish=False))
        for r in records:
            folder.append(r)
        folder.close()
        took = flip_queries(find_runs([tmp_path])[0])
        assert took.tolist() == [3, 50, np.inf]
        assert success_at([took], np.array([2, 3, 49, 50])) == pytest.approx([0, 100 / 3, 100 / 3, 200 / 3])

    def test_success_of_seeds_is_their_mean(self):
        seeds = [np.array([1.0, np.inf]), np.array([1.0, 2.0, 3.0, 4.0])]
        assert success_at(seeds, np.array([1, 2, 4])).tolist() == [37.5, 50, 75]

    @given(
        st.lists(
            st.lists(st.one_of(st.floats(0.001, 100), st.just(float("inf"))), min_size=1, max_size=12),
            min_size=1,
            max_size=3,
        )
    )
    def test_success_never_falls_with_the_budget(self, seeds):
        took = [np.array(seed) for seed in seeds]
        grid = np.geomspace(0.0005, 100, 50)
        low, high = success_band(took, [[f"s{i}" for i in range(len(seed))] for seed in seeds], grid, resamples=20)
        for curve in (success_at(took, grid), low, high):
            assert (np.diff(curve) >= -1e-9).all()
            assert ((curve >= 0) & (curve <= 100 + 1e-9)).all()
        rate = np.mean([100 * np.isfinite(seed).mean() for seed in took])
        assert success_at(took, grid)[-1] == pytest.approx(rate)

    def test_the_band_of_seeds_that_say_the_same_is_that_of_one(self):
        took, ids, grid = np.array([1.0, 2, np.inf, 4]), list("abcd"), np.array([1, 2, 4])
        one, three = success_band([took], [ids], grid), success_band([took] * 3, [ids] * 3, grid)
        np.testing.assert_allclose(one, three)


class TestSeeds:
    def seeds(self, path: Path) -> Path:
        """Two of four flipped with seed 0, two of two with seed 1, each on the model that its seed trained."""
        write_run(path / "a", "guided", [1, 1, 0, 0], seed=0, weights="w0")
        write_run(path / "b", "guided", [3, 3], seed=1, weights="w1")
        write_run(path / "c", "random_removal", [0, 5, 0, 0], seed=0, weights="w0")
        write_run(path / "d", "random_removal", [0, 0], seed=1, weights="w1")
        return path

    def test_seeds_of_a_hardened_model_are_pooled_wherever_its_adversarial_set_lies(self, tmp_path):
        for seed in (0, 1):
            file = write_run(tmp_path / str(seed), "guided", [1, 0], seed=seed, weights=f"w{seed}") / "run.json"
            config = {"defense": {"ratio": 0.5, "folder": f"outputs/{seed}/adversarial"}, "hardening": {"epochs": 1}}
            file.write_text(json.dumps({**json.loads(file.read_text()), "config": config, "defense": "adversarial"}))
        (target,) = compared(tmp_path).targets
        assert [row.seeds for row in target.rows] == ["2"]

    def test_mean_over_seeds_whatever_their_samples(self, tmp_path):
        (target,) = compared(self.seeds(tmp_path)).targets
        row = target.rows[0]
        assert [row.attack, len(row.runs), row.samples] == ["guided", 2, 6]
        assert row.value("attack_success_rate") == 75.0  # (50 + 100) / 2, and not 4 of 6
        assert row.value("decoupled_fraction_median") == 2.0

    def test_the_interval_is_over_samples(self, tmp_path):
        write_run(tmp_path / "a", "guided", [1, 1, 0, 0] * 10, seed=0, weights="w0")
        write_run(tmp_path / "b", "guided", [3, 3, 3, 3] * 10, seed=1, weights="w1")
        ((row,),) = (target.rows for target in compared(tmp_path).targets)
        estimate = row.summary["attack_success_rate"]
        # All of seed 1 flipped in any resample: only seed 0 spreads, and counts half.
        alone = bootstrap(np.array([100.0, 100, 0, 0] * 10))
        assert estimate["low"] == pytest.approx((alone["low"] + 100) / 2)
        assert estimate["high"] == pytest.approx((alone["high"] + 100) / 2)

    def test_pairs_are_of_the_same_seed(self, tmp_path):
        (pair,) = compared(self.seeds(tmp_path)).pairs
        assert [pair.samples, pair.seeds, pair.only] == [6, 2, (3, 0)]
        assert pair.success["value"] == pytest.approx((25 + 100) / 2)
        assert pair.area["value"] == pytest.approx(((90 + 90 - 50) / 4 + 70) / 2)

    def uneven(self, path: Path) -> Path:
        """A guided attack on the models of three seeds, another on that of seed 1 alone, random removal on 1 and 2."""
        for seed, outcomes in enumerate(([1, 1], [1, 0], [0, 0])):
            write_run(path / f"a{seed}", "guided", outcomes, seed=seed, weights=f"w{seed}")
        write_run(path / "b1", "other", [5, 5], seed=1, weights="w1")
        for seed in (1, 2):
            write_run(path / f"c{seed}", "random_removal", [0, 5], seed=seed, weights=f"w{seed}")
        return path

    def test_rows_are_over_the_seeds_that_all_attacks_share(self, tmp_path):
        page = write([self.uneven(tmp_path / "runs")], tmp_path / "out")
        comparison = compared(tmp_path / "runs")
        (target,) = comparison.targets
        found = {row.name: (row.seeds, row.samples, row.value("attack_success_rate")) for row in target.rows}
        assert found == {"guided": ("1 of 3", 2, 50.0), "other": ("1", 2, 100.0), "random_removal": ("1 of 2", 2, 50.0)}
        assert target.best(target.rows[0].rules).name == "other"  # an area of 50 against 90 / 2
        assert comparison.notes == [
            "d · m: rows and curves are over seed 1, shared by all attacks: guided without seeds 0, 2; random_removal "
            "without seed 2. Paired tests take all seeds that the two share."
        ]
        text = page.read_text()
        assert comparison.notes[0] in text
        assert ["guided", "1 of 3", "2"] in [row[:3] for row in rows_of(text)]
        # The files of figures leave out nothing.
        lines = list(csv.DictReader((page.parent / "compare.csv").open()))
        assert sorted((line["name"], line["seeds"]) for line in lines) == [
            *(("guided", seed) for seed in "012"),
            ("other", "1"),
            *(("random_removal", seed) for seed in "12"),
        ]
        assert [line["seeds"] for line in csv.DictReader((page.parent / "pooled.csv").open())] == ["1", "1", "1"]

    def test_pairs_take_all_seeds_that_the_two_share(self, tmp_path):
        pairs = {(p.attack.name, p.reference.name): p for p in compared(self.uneven(tmp_path)).pairs}
        assert {names: pair.seeds for names, pair in pairs.items()} == {
            ("guided", "random_removal"): 2,
            ("other", "random_removal"): 1,
            ("guided", "other"): 1,
        }
        assert pairs["guided", "random_removal"].success["value"] == pytest.approx((0 - 50) / 2)

    def test_no_seed_that_all_share(self, tmp_path):
        for attack, seeds in (("guided", (0, 1)), ("other", (1, 2)), ("random_removal", (2, 0))):
            for seed in seeds:
                write_run(tmp_path / f"{attack}{seed}", attack, GUIDED, seed=seed, weights=f"w{seed}")
        comparison = compared(tmp_path)
        assert [row.seeds for row in comparison.rows] == ["2", "2", "2"]
        assert comparison.notes == [
            "d · m: no seed is shared by all attacks, so that their rows are not of the same models: guided has seeds "
            "0, 1; other has seeds 1, 2; random_removal has seeds 0, 2."
        ]

    def test_other_seeds_of_an_attack_on_the_same_weights_are_not_left_out(self, tmp_path):
        for seed in (0, 1):
            write_run(tmp_path / f"a{seed}", "random_removal", RANDOM, seed=seed)
        write_run(tmp_path / "b", "guided", GUIDED)
        comparison = compared(tmp_path)
        assert [row.seeds for row in comparison.rows] == ["1", "2"]
        assert comparison.notes == []

    def test_not_pooled_when_asked_not_to(self, tmp_path):
        targets = compared(self.seeds(tmp_path), pool_seeds=False).targets
        assert [target.name for target in targets] == ["d · m (weights w0)", "d · m (weights w1)"]
        assert [len(row.runs) for target in targets for row in target.rows] == [1] * 4

    def test_the_same_seed_with_other_weights_is_no_repeat(self, tmp_path):
        for name in ("plain", "hardened"):
            write_run(tmp_path / name / "a", "guided", GUIDED, weights=name)
            write_run(tmp_path / name / "b", "random_removal", RANDOM, weights=name)
        comparison = compared(tmp_path)
        assert [target.name for target in comparison.targets] == ["d · m (weights hardened)", "d · m (weights plain)"]
        assert "guided on d · m: 2 runs, some with the same seed" in comparison.notes[0]

    @pytest.mark.parametrize("dataset", [{"train_limit": 1000}, {"batch_size": 8}, {"test_limit": 10}])
    def test_another_training_is_no_repeat(self, tmp_path, dataset):
        for seed, options in ((0, {}), (1, dataset)):
            path = write_run(tmp_path / str(seed), "guided", GUIDED, seed=seed, weights=f"w{seed}")
            about = json.loads((path / "run.json").read_text())
            config = {"model": {"width": 8}, "training": {"lr": 0.1}, "dataset": options}
            (path / "run.json").write_text(json.dumps({**about, "config": config}))
        alike = "test_limit" in dataset
        assert [row.seeds for row in compared(tmp_path).rows] == (["2"] if alike else ["1", "1"])

    def test_what_reaches_another_goal_is_not_the_best(self, tmp_path):
        write_run(tmp_path / "a", "decoupling_embedding", [1] * 8, adversarial_label=0)
        write_run(tmp_path / "b", "guided", GUIDED)
        (target,) = compared(tmp_path).targets
        found = {row.attack: target.best(row.rules) for row in target.rows}
        assert found["decoupling_embedding"] is None
        assert found["guided"].attack == "guided"

    def test_other_settings_are_another_attack(self, tmp_path):
        write_run(tmp_path / "a", "guided", GUIDED, setting=1)
        write_run(tmp_path / "b", "guided", GUIDED, setting=2)
        (target,) = compared(tmp_path).targets
        assert [row.name for row in target.rows] == ["guided (attack.setting=1)", "guided (attack.setting=2)"]

    @given(st.lists(st.one_of(st.floats(0, 100), st.just(float("nan"))), min_size=1, max_size=20))
    def test_one_seed_is_the_plain_bootstrap(self, values):
        column = np.array(values)
        for how in ("mean", "median"):
            seeds = [{f"s{i}": value for i, value in enumerate(values)}]
            assert pooled(seeds, how, resamples=50) == bootstrap(column, how, resamples=50)

    def test_nothing_to_measure(self):
        nothing = dict.fromkeys("abc", np.nan)
        assert pooled([nothing]) == pooled([]) == {"value": None, "low": None, "high": None}
        assert pooled([nothing, dict.fromkeys("abc", 1.0)])["value"] == 1.0

    def test_seeds_of_the_same_samples_are_resampled_together(self):
        """Three seeds that say the same say no more than one; three that have nothing to do with each other do."""
        rng = np.random.default_rng(0)
        first, second, third = ({i: float(x) for i, x in enumerate(rng.normal(size=400))} for _ in range(3))

        def width(seeds) -> float:
            estimate = pooled(seeds)
            return estimate["high"] - estimate["low"]

        assert width([first] * 3) == pytest.approx(width([first]))
        assert width([first, second, third]) == pytest.approx(width([first]) / np.sqrt(3), rel=0.15)
        apart = [{(place, i): x for i, x in column.items()} for place, column in enumerate([first] * 3)]
        assert width(apart) == pytest.approx(width([first]) / np.sqrt(3), rel=0.15)


class TestPairs:
    def test_by_hand(self, tmp_path):
        (pair,) = compared(two(tmp_path)).pairs
        assert [pair.attack.name, pair.reference.name, pair.samples] == ["guided", "random_removal", 8]
        assert pair.only == (3, 0)
        assert pair.success["value"] == 37.5
        assert pair.success_p == pytest.approx(2 * 0.5**3)
        assert pair.area["value"] == pytest.approx((40 + 80 + 50 + 90) / 8)
        assert pair.area_p == pytest.approx(2 * 0.5**4)  # four differences, all for the guided attack
        assert [pair.success_holm, pair.area_holm] == [0.25, 0.25]

    @given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 50))
    @settings(deadline=None)
    def test_differences_of_one_size_are_mcnemar(self, only_first, only_second, neither):
        differences = np.array([100.0] * only_first + [-100.0] * only_second + [0.0] * neither)
        n = only_first + only_second
        exact = binomtest(only_first, n).pvalue if n else 1.0
        assert sign_flip(differences) == pytest.approx(exact, rel=1e-6)

    @given(
        st.lists(st.lists(st.sampled_from([-1, 0, 1]), min_size=3, max_size=3), min_size=1, max_size=10),
        st.sampled_from([(100, 100, 100), (97, 98, 100), (2**0.5, 3**0.5, 5**0.5)]),
    )
    def test_all_sign_flips_of_a_few_by_brute_force(self, wins, counts):
        """Samples of three seeds, which succeed by one of the attacks or by both alike, of so many samples each: in one
        unit, in one that is small, and in none. Sums are compared by their terms, so that rounding decides no tie."""
        terms = np.array(wins)
        differences = (terms / np.array(counts) * 100 / 3).sum(1)
        signs = np.array(list(itertools.product((1, -1), repeat=len(wins))))
        sums, seen = signs @ terms, terms.sum(0)
        if len(set(counts)) == 1:
            sums, seen = sums.sum(1, keepdims=True), seen[None].sum(1)
        same = (sums == seen).all(1) | (sums == -seen).all(1)
        shares = 1 / np.array(counts[: sums.shape[1]])
        larger = np.abs(sums @ shares) > np.abs(seen @ shares) + 1e-9
        assert sign_flip(differences) == pytest.approx(np.mean(same | larger), rel=1e-9)

    @given(st.lists(st.integers(1, 500), min_size=1, max_size=8), st.floats(0.01, 100))
    def test_the_common_unit_is_the_greatest_divisor(self, numbers, scale):
        unit = common_unit(scale * np.array(numbers, dtype=float), scale / 2)
        assert unit == pytest.approx(scale * math.gcd(*numbers), rel=1e-6)
        assert common_unit(scale * np.array(numbers, dtype=float), 1.01 * scale * math.gcd(*numbers)) is None

    def test_without_a_common_unit_p_is_too_large_by_little(self):
        """As many as in a table: counted more coarsely than above, against the same numbers made whole."""
        rng = np.random.default_rng(5)
        whole = rng.integers(1, 3_000, 300) * rng.choice([1, -1], 300, p=[0.53, 0.47])
        chance = np.zeros(np.abs(whole).sum() + 1)
        chance[0] = 1
        for size in np.abs(whole):
            chance = 0.5 * (chance + np.concatenate([np.zeros(size), chance[:-size]]))
        sums = np.abs(2 * np.arange(len(chance)) - len(chance) + 1)
        exact = chance[sums >= abs(whole.sum())].sum()
        several = whole + rng.uniform(-1e-3, 1e-3, 300)
        assert 0.001 < exact < 0.9
        assert exact <= sign_flip(several) <= 1.1 * exact

    def test_more_differences_than_can_be_counted(self):
        """Of one size they are still exact; of several, as near as the normal distribution, which is checked below."""
        one = np.repeat([100.0, -100.0], [10_200, 10_000])
        assert sign_flip(one) == pytest.approx(binomtest(10_200, 20_200).pvalue)
        several = np.random.default_rng(0).normal(0.02, 1, 10_000)
        counted, beyond = sign_flip(several), sign_flip(np.concatenate([several, [1e-9]]))
        assert 0.001 < counted < 0.5
        assert beyond == pytest.approx(counted, rel=0.05)

    def test_many_sign_flips(self):
        many = np.random.default_rng(1).normal(0.1, 1, 400)
        assert sign_flip(many) == pytest.approx(wilcoxon(many).pvalue, abs=0.05)
        assert 0 < sign_flip(np.abs(many)) < 1e-100, "no floor, which a correction for many tests would lift above 0.05"

    def test_a_sample_of_several_seeds_is_one_observation(self):
        assert over_seeds([{"a": 4.0, "b": -2.0}, {"a": 6.0}]).tolist() == [1.0 + 3.0, -0.5]
        alike = [dict.fromkeys("abcd", 100.0)] * 3
        assert sign_flip(over_seeds(alike)) == pytest.approx(2 * 0.5**4), "and not of twelve"

    @given(st.lists(st.floats(0, 1), max_size=8))
    def test_holm(self, p):
        corrected = holm(p)
        assert all(1 >= after >= before for before, after in zip(p, corrected, strict=True))
        assert min(corrected, default=0.0) == min(1.0, len(p) * min(p, default=0.0))

    def test_against_the_controls_and_the_best_removal(self, tmp_path):
        two(tmp_path)
        write_run(tmp_path / "best", "better", [1] * 8)
        write_run(tmp_path / "pgd", "pgd", [80] * 8, kind="perturbation")
        write_run(tmp_path / "shuffle", "random_words", RANDOM)
        pairs = [(pair.attack.name, pair.reference.name) for pair in compared(tmp_path).pairs]
        guided = ["better", "guided", "pgd"]
        expected = [(name, control) for control in ("random_removal", "random_words") for name in guided]
        assert pairs == [*expected, ("guided", "better"), ("pgd", "better")]

    def test_shared_samples_alone_count(self, tmp_path):
        write_run(tmp_path / "a", "guided", [1] * 6)
        write_run(tmp_path / "b", "random_removal", [0] * 6, first=4)
        (pair,) = compared(tmp_path).pairs
        assert [pair.samples, pair.only] == [2, (2, 0)]

    def test_without_shared_samples_the_pair_is_left_out(self, tmp_path):
        write_run(tmp_path / "a", "guided", [1] * 3)
        write_run(tmp_path / "b", "random_removal", [0] * 3, first=3)
        comparison = compared(tmp_path)
        assert comparison.pairs == []
        assert comparison.warnings == []
        assert "guided and random_removal attacked no sample in common, so the pair is left out" in comparison.notes[0]
        assert "no paired tests" in markdown(comparison)
        assert (write([tmp_path], tmp_path / "out").parent / "pairs.csv").read_text().count("\n") == 1


class TestWarning:
    def test_guided_search_no_better_than_random(self, tmp_path):
        write_run(tmp_path / "a", "guided", GUIDED[::-1], model="weak_m")
        write_run(tmp_path / "b", "random_removal", GUIDED[::-1], model="weak_m")
        comparison = compared(tmp_path)
        assert comparison.warnings == [
            "guided search is no better than random on d · weak_m: the curve area of guided less that of "
            "random_removal is 0.0 percentage points, 95 % interval [0.0, 0.0], over 8 shared samples."
        ]
        assert markdown(comparison).count("**Warning:** guided search is no better than random") == 1
        assert r"Warning: guided search is no better than random on d $\cdot$ weak\_m" in latex(comparison)

    def test_a_better_attack_is_not_warned_of(self, tmp_path):
        write_run(tmp_path / "a", "guided", CLEAR)
        write_run(tmp_path / "b", "random_removal", NOTHING)
        comparison = compared(tmp_path)
        assert comparison.warnings == []
        assert "Warning" not in markdown(comparison)

    def test_what_nothing_guides_is_not_warned_of(self, tmp_path):
        """Older runs say it by their name alone, newer ones in their `run.json`."""
        for attack in ("missing_modality", "leave_one_out", "exhaustive", "mine"):
            write_run(tmp_path / attack, attack, NOTHING)
        write_run(tmp_path / "random", "random_removal", CLEAR)

        def warned() -> list[str]:
            comparison = compared(tmp_path)
            assert len(comparison.pairs) == 4  # each against random removal, which is the best
            return [re.search(r"curve area of (\w+) less", text)[1] for text in comparison.warnings]

        assert warned() == ["mine"]
        assert [c.guided.attack for c in against_controls(find_runs([tmp_path]))] == ["mine"]
        for attack, guided in (("mine", False), ("exhaustive", True)):
            file = tmp_path / attack / "run.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "guided": guided}))
        assert warned() == ["exhaustive"]

    def test_a_control_says_so_and_is_not_known_by_its_name(self, tmp_path):
        for attack, outcomes, control in (("random_restart", GUIDED, False), ("shuffled", RANDOM, True)):
            file = write_run(tmp_path / attack, attack, outcomes) / "run.json"
            told = {"guided": not control, "control": control}
            file.write_text(json.dumps({**json.loads(file.read_text()), **told}))
        assert [(run.attack, run.is_control) for run in find_runs([tmp_path])] == [
            ("random_restart", False),
            ("shuffled", True),
        ]
        (found,) = against_controls(find_runs([tmp_path]))
        assert (found.guided.attack, found.control.attack) == ("random_restart", "shuffled")

    def test_other_rules_are_another_contest(self, tmp_path):
        """Each replacement has its own control and best attack; what has no other of its rules is said to."""

        def told(name: str, attack: str, outcomes: list[int | None], **about: Any) -> None:
            file = write_run(tmp_path / name, attack, outcomes) / "run.json"
            run = json.loads(file.read_text())
            threat_model = {"replacement": about.pop("replacement", "zero"), "max_queries": about.pop("budget", 500)}
            run["identity"]["threat_model"] = threat_model
            file.write_text(json.dumps({**run, **about}))

        told("a", "guided", NOTHING, replacement="mean")
        told("b", "random_removal", NOTHING, replacement="mean")
        told("c", "guided", CLEAR)
        told("d", "random_removal", CLEAR)
        told("e", "decoupling_targeted", NOTHING)
        told("f", "decoupling_embedding", NOTHING, goal="another fusion embedding")
        told("g", "guided", NOTHING, budget=5)
        comparison = compared(tmp_path)
        pairs = [(p.attack.runs[0].folder, p.reference.runs[0].folder) for p in comparison.pairs]
        assert pairs == [("a", "b"), ("c", "d")]
        (note,) = [note for note in comparison.notes if "the threat model and the goal of" in note]
        assert "the goal of decoupling_embedding, decoupling_targeted, guided (" in note
        assert "threat_model.max_queries=5)" in note
        found = against_controls(find_runs([tmp_path]))
        assert [(c.guided.folder, c.control.folder) for c in found] == [("a", "b"), ("c", "d")]
        assert [run.goal for run in find_runs([tmp_path]) if run.folder in "ef"] == [
            "another fusion embedding",
            "another class",
        ]

    def test_a_search_in_one_modality_has_a_control_in_it(self, tmp_path):
        """Random removal that may take from the others has more to choose from, and says nothing about the search."""

        def told(name: str, attack: str, outcomes: list[int | None], *modalities: str) -> None:
            file = write_run(tmp_path / name, attack, outcomes, total={"image": 100, "text": 9}) / "run.json"
            run = json.loads(file.read_text())
            run["identity"]["attack"]["modalities"] = list(modalities) or None
            file.write_text(json.dumps(run))

        def against() -> list[tuple[str, str]]:
            found = against_controls(find_runs([tmp_path]))
            assert [(c.guided.attack, c.control.attack) for c in found] == [
                (pair.attack.name, pair.reference.name)
                for pair in compared(tmp_path).pairs
                if pair.reference.is_control
            ]
            return [(c.guided.attack, c.control.attack) for c in found]

        told("all", "decoupling", CLEAR)
        told("both", "greedy", GUIDED, "text", "image")  # which are all that there are
        told("image", "decoupling_image", NOTHING, "image")
        told("random", "random_removal", RANDOM)
        assert sorted(against()) == [("decoupling", "random_removal"), ("greedy", "random_removal")]
        comparison = compared(tmp_path)
        assert not any("decoupling_image" in warning for warning in comparison.warnings)
        assert [note for note in comparison.notes if UNCONTROLLED in note] == [
            f"d · m, decoupling_image: {UNCONTROLLED}"
        ]
        told("random_image", "random_removal_image", CLEAR, "image")
        assert ("decoupling_image", "random_removal_image") in against()
        assert ("decoupling", "random_removal_image") not in against()
        assert any("decoupling_image less that of random_removal_image" in w for w in compared(tmp_path).warnings)

    def test_what_takes_valid_flips_alone_is_another_contest(self, tmp_path):
        """Where the dataset can tell; where it cannot, any flip is taken."""

        def told(name: str, attack: str, judged: bool, **options: Any) -> None:
            file = write_run(tmp_path / name, attack, CLEAR) / "run.json"
            run = json.loads(file.read_text())
            run["identity"]["attack"] |= options
            file.write_text(json.dumps({**run, "goal": "", "judged": judged}))

        for judged, pairs in ((True, []), (False, [("decoupling_fast", "random_removal")])):
            told(f"{judged}/fast", "decoupling_fast", judged, valid_only=True)
            told(f"{judged}/random", "random_removal", judged)
            found = against_controls(find_runs([tmp_path / str(judged)]))
            assert [(c.guided.attack, c.control.attack) for c in found] == pairs

    def test_what_is_a_default_may_be_spelled_out(self, tmp_path):
        """Beside what earlier versions wrote, null for every default."""

        def told(name: str, attack: str, outcomes: list[int | None], **about: Any) -> None:
            file = write_run(tmp_path / name, attack, outcomes) / "run.json"
            run = json.loads(file.read_text())
            run["identity"]["threat_model"] = about.pop("typed", None)
            file.write_text(json.dumps({**run, **about}))

        old = {"_target_": "ThreatModel", "replacement": {"image": None, "text": None}, "max_queries": 500}
        new = ThreatModel({"image": "zero", "audio": "noise"}, {"image": 10}, 500)
        modalities = {"image": Pictures((16, 16)), "text": Text(WordTokenizer(["a"]), 5)}
        told(
            "a", "guided", CLEAR, typed={"replacement": {"image": "zero"}}, threat_model=new.beyond_defaults(modalities)
        )
        told("b", "random_removal", NOTHING, typed=old)
        other = ThreatModel({"image": "mean"}, max_queries=500).beyond_defaults(modalities)
        told("c", "guided", CLEAR, threat_model=other)
        (pair,) = compared(tmp_path).pairs
        assert (pair.attack.runs[0].folder, pair.reference.runs[0].folder) == ("a", "b")

    def test_many_variants_are_known_by_what_few_have(self, tmp_path):
        for number in range(6):
            file = write_run(tmp_path / str(number), "guided", CLEAR) / "run.json"
            run = json.loads(file.read_text())
            options = dict.fromkeys("abcdef", 0)
            run["identity"]["attack"] = {**options, "abcdef"[number]: number} if number else options
            file.write_text(json.dumps(run))
        (target,) = compared(tmp_path).targets
        assert [row.name for row in target.rows] == [
            "guided",
            *(f"guided (attack.{'abcdef'[i]}={i})" for i in range(1, 6)),
        ]

    def test_without_random_removals_it_is_said_that_a_question_is_open(self, tmp_path):
        write_run(tmp_path / "a", "guided", CLEAR)
        write_run(tmp_path / "b", "other", CLEAR)
        write_run(tmp_path / "c", "pgd", CLEAR, kind="perturbation")
        (note,) = compared(tmp_path).notes
        assert note == f"d · m, guided, other: {UNCONTROLLED}"
        (said,) = (said for said in warnings(find_runs([tmp_path]), []) if "random" in said)
        assert said.endswith(UNCONTROLLED)
        assert "pgd" not in said
        write_run(tmp_path / "d", "random_removal", NOTHING)
        assert compared(tmp_path).notes == []
        assert warnings(find_runs([tmp_path]), []) == []

    def test_certificates_below_are_passed_over(self, tmp_path):
        write_run(tmp_path / "attack/a", "guided", GUIDED)
        (tmp_path / "certify/b").mkdir(parents=True)  # one that was killed before its first certificate
        told = '{"identity": {"certification": {"samples": 9}}, "model": "m", "dataset": "d"}'
        (tmp_path / "certify/b/run.json").write_text(told)
        assert [run.attack for run in find_runs([tmp_path])] == ["guided"]
        with pytest.raises(MuroanError, match="it is not of an attack run"):
            find_runs([tmp_path / "certify/b"])
        with pytest.raises(
            MuroanError, match=r"certify holds certificates alone; .* of `muroan certify` puts them beside runs"
        ):
            find_runs([tmp_path / "certify"])

    def test_other_kinds_are_not_warned_of(self, tmp_path):
        write_run(tmp_path / "a", "noise", NOTHING, kind="corruption")
        write_run(tmp_path / "b", "pgd", NOTHING, kind="perturbation")
        write_run(tmp_path / "c", "random_removal", CLEAR)
        assert compared(tmp_path).warnings == []


class TestPlot:
    @staticmethod
    def drawn(targets: dict[str, dict[str, str]], path: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
        """What `budgets` draws of targets: their attacks by the kind."""
        drawn: list[Figure] = []
        monkeypatch.setattr(plots, "_png", lambda picture: drawn.append(picture) or b"")
        for target, attacks in targets.items():
            for attack, kind in attacks.items():
                write_run(path / target / attack, attack, [3] * 8, kind=kind)
        runs = {target: find_runs([path / target]) for target in targets}
        plots.budgets([(target, [(run.attack, [run]) for run in found]) for target, found in runs.items()])
        return drawn[0]

    def test_targets_with_an_attack_in_common_share_a_legend(self, tmp_path, monkeypatch):
        kinds = {"a": "removal", "b": "perturbation"}
        picture = self.drawn({"x": kinds, "y": {"a": "removal"}}, tmp_path, monkeypatch)
        assert [text.get_text() for legend in picture.legends for text in legend.get_texts()] == ["a", "b"]
        assert not [axes for axes in picture.axes if axes.get_legend()]
        assert [axes.lines[0].get_color() for axes in picture.axes] == [plots.COLOURS[0][0]] * 4
        assert picture.axes[2].get_xlabel() == "decoupled or changed fraction, % of the input (log scale)"

    def test_targets_without_have_their_own(self, tmp_path, monkeypatch):
        picture = self.drawn({"x": {"a": "removal"}, "y": {"b": "removal", "c": "removal"}}, tmp_path, monkeypatch)
        legends = [axes.get_legend() for axes in picture.axes]
        shown = [[text.get_text() for text in legend.get_texts()] for legend in legends if legend]
        assert shown == [["a"], ["b", "c"]]
        assert not picture.legends
        assert picture.axes[2].get_xlabel().startswith("decoupled fraction")

    def test_a_name_has_one_colour(self, tmp_path, monkeypatch):
        """Also where the first target and the last share nothing, and beside one that has nothing to do with them."""
        chain = {place: dict.fromkeys(names, "removal") for place, names in zip("xyz", ("ab", "bc", "cd"), strict=True)}
        picture = self.drawn(chain, tmp_path / "one", monkeypatch)
        assert [text.get_text() for legend in picture.legends for text in legend.get_texts()] == ["a", "b", "c", "d"]

        def shades(picture: Figure) -> list[list[int]]:
            return [[plots.COLOURS[0].index(line.get_color()) for line in axes.lines] for axes in picture.axes[::2]]

        assert shades(picture) == [[0, 1], [1, 2], [2, 3]]
        apart = self.drawn({**chain, "w": {"e": "removal"}}, tmp_path / "two", monkeypatch)
        assert shades(apart) == [[0, 1], [1, 2], [2, 3], [0]]
        assert not apart.legends

    def test_what_chooses_values_changes(self, tmp_path, monkeypatch):
        picture = self.drawn({"x": {"a": "perturbation", "b": "corruption"}}, tmp_path, monkeypatch)
        assert picture.axes[0].get_xlabel().startswith("changed fraction")


class TestTables:
    def kinds(self, path: Path) -> Path:
        two(path)
        write_run(path / "a", "a_corruption", [3] * 8, kind="corruption")
        write_run(path / "b", "a_perturbation", [90] * 8, kind="perturbation")
        return path

    def test_kinds_are_grouped(self, tmp_path):
        text = markdown(compared(self.kinds(tmp_path)))
        first = [row[0] for row in rows_of(text)]
        assert first[2 : first.index("attack", 1)] == [
            "**d · m**",
            "*removal attacks*",
            "guided",
            "random_removal",
            "*value-choosing attacks (stronger threat model)*",
            "a_perturbation",
            "*natural corruptions, not attacks*",
            "a_corruption",
        ]
        assert "changed fraction" in text

    def test_removals_alone_need_no_heading(self, tmp_path):
        text = markdown(compared(two(tmp_path)))
        assert "removal attacks*" not in text
        assert "backwards" not in text
        assert "valid success" not in text

    def test_columns_that_some_run_has(self, tmp_path):
        two(tmp_path)
        ledger = {"search": Count(5, 5, 0, 4)}
        write_run(tmp_path / "c", "gradient", [2] * 8, still_valid=True, ledger=ledger)
        heads = [cell for row in rows_of(markdown(compared(tmp_path))) if row[0] == "attack" for cell in row]
        assert {"valid success rate (%)", "backwards"} <= set(heads)

    def test_cells(self, tmp_path):
        rows = rows_of(markdown(compared(two(tmp_path))))
        guided = next(row for row in rows if row[0] == "guided")
        estimate = bootstrap(100 * np.array([1.0, 1, 1, 1, 0, 0, 1, 1, np.nan]))
        assert guided[:3] == ["guided", "1", "9"]
        assert [cell.split()[0] for cell in guided[3:5]] == ["88.9", "22.2"]
        assert guided[5] == f"75.0 [{estimate['low']:.1f}, {estimate['high']:.1f}]"
        pair = rows[-1]
        assert pair[:3] == ["guided", "random_removal", "8"]
        assert pair[4] == "0.25"

    def test_lines_up_as_plain_text(self, tmp_path):
        lines = [line for line in markdown(compared(self.kinds(tmp_path))).splitlines() if line[:1] == "|"]
        assert len({len(line) for line in lines}) <= 3  # three tables

    def test_unfinished_is_marked(self, tmp_path):
        write_run(tmp_path / "a", "guided", GUIDED, finish=False)
        write_run(tmp_path / "b", "random_removal", RANDOM)
        assert "9 (unfinished)" in markdown(compared(tmp_path))

    def test_targets_with_one_attack_are_shown_and_said_to_have_no_test(self, tmp_path):
        two(tmp_path)
        write_run(tmp_path / "c", "guided", GUIDED, model="other", weights="v")
        comparison = compared(tmp_path)
        assert [target.name for target in comparison.targets] == ["d · m", "d · other"]
        assert comparison.notes == ["d · other: guided is the only attack, so there is no paired test."]


HOSTILE = r"a_b 50% & {x} $y$ #1 ~^\ | < [2] *"


class TestLatex:
    def hostile(self, path: Path) -> Path:
        write_run(path / "a", HOSTILE, GUIDED, model="late_fusion%")
        write_run(path / "b", "random_removal", GUIDED, model="late_fusion%", finish=False)
        write_run(path / "c", "*pgd", [90] * 8, model="late_fusion%", kind="perturbation", still_valid=True)
        return path

    def test_escapes(self):
        assert tex("late_fusion 5% & #1 {x} $y$") == r"late\_fusion 5\% \& \#1 \{x\} \$y\$"
        assert tex(r"~^\|<>") == (
            r"\textasciitilde{}\textasciicircum{}\textbackslash{}\textbar{}\textless{}\textgreater{}"
        )

    def test_every_line_has_its_cells(self, tmp_path):
        text = latex(compared(self.hostile(tmp_path)))
        assert r"late\_fusion\%" in text
        tables = re.findall(r"\\begin\{tabular\}\{([lr]+)\}(.*?)\\end\{tabular\}", text, re.DOTALL)
        assert len(tables) == 3
        for columns, body in tables:
            for line in body.splitlines():
                if not line.endswith(r"\\"):
                    assert re.fullmatch(r"(\\(top|mid|bottom)rule|(\\cmidrule\(lr\)\{\d+-\d+\})+)?", line), line
                    continue
                spans = [int(n) for n in re.findall(r"\\multicolumn\{(\d+)\}", line)]
                cells = len(re.findall(r"(?<!\\)&", line)) + 1
                assert cells + sum(spans) - len(spans) == len(columns), line
                assert not re.search(r"(?<!\\)[%#]", line)

    @pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
    def test_compiles(self, tmp_path):
        write([self.hostile(tmp_path / "runs")], tmp_path)
        body = r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{compare}\end{document}"
        (tmp_path / "page.tex").write_text(body)
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout[-2000:]
        assert (tmp_path / "page.pdf").exists()


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class TestFiles:
    def test_csv_is_the_summary_in_full(self, tmp_path):
        out = write([two(tmp_path / "runs")], tmp_path / "out").parent
        lines = read_csv(out / "compare.csv")
        assert [line["attack"] for line in lines] == ["guided", "random_removal"]
        for line in lines:
            summary = summarise(RunFolder(tmp_path / "runs" / line["folder"]).records())
            assert summary
            for name, estimate in summary.items():
                for part, suffix in (("value", ""), ("low", "_low"), ("high", "_high")):
                    text = line[name + suffix]
                    assert (float(text) if text else None) == estimate[part], name
        assert not (out / "pooled.csv").exists()

    def test_pooled_csv_has_a_row_an_attack(self, tmp_path):
        TestSeeds().seeds(tmp_path / "runs")
        out = write([tmp_path / "runs"], tmp_path / "out").parent
        assert [line["seeds"] for line in read_csv(out / "compare.csv")] == ["0", "1", "0", "1"]
        guided, control = read_csv(out / "pooled.csv")
        assert [guided["seeds"], guided["weights"], guided["samples"]] == ["0 1", "w0 w1", "6"]
        assert float(guided["attack_success_rate"]) == 75.0
        assert float(control["attack_success_rate"]) == 12.5
        write([tmp_path / "runs"], out, pool_seeds=False)
        assert not (out / "pooled.csv").exists()

    def test_pairs_csv(self, tmp_path):
        (line,) = read_csv(write([two(tmp_path / "runs")], tmp_path / "out").parent / "pairs.csv")
        assert [line["attack"], line["reference"], line["samples"]] == ["guided", "random_removal", "8"]
        assert float(line["success_p"]) == 0.25
        assert float(line["curve_area_p"]) == 0.125
        assert float(line["curve_area_difference"]) == pytest.approx(32.5)

    def test_the_same_records_give_the_same_bytes(self, tmp_path):
        TestSeeds().seeds(tmp_path / "runs")
        one, other = (write([tmp_path / "runs"], tmp_path / name).parent for name in ("one", "other"))
        names = sorted(file.name for file in one.iterdir())
        assert names == ["compare.csv", "compare.md", "compare.png", "compare.tex", "pairs.csv", "pooled.csv"]
        for name in names:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name

    def test_curves_are_a_picture_even_without_flips(self, tmp_path):
        write_run(tmp_path / "a", "guided", [0, 0, None])
        write_run(tmp_path / "b", "random_removal", [None, None, None])
        with Image.open(write([tmp_path], tmp_path / "out").parent / "compare.png") as picture:
            assert picture.width > picture.height > 300

    def test_refuses(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(MuroanError, match=r"empty has no run.json"):
            write([tmp_path / "empty"], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_attacks_on_different_models_make_a_table_without_tests(self, tmp_path):
        write_run(tmp_path / "a", "guided", GUIDED, weights="w")
        write_run(tmp_path / "b", "random_removal", RANDOM, weights="v")
        comparison = compared(tmp_path)
        assert len(comparison.targets) == 2
        assert comparison.pairs == []
        assert sum("is the only attack" in note for note in comparison.notes) == 2
        write([tmp_path], tmp_path / "out")


class TestReportPage:
    def test_new_metrics_and_kinds_are_shown(self, tmp_path):
        write_run(tmp_path / "a", "guided", GUIDED, still_valid=True, proven=True)
        write_run(tmp_path / "b", "pgd", [90] * 8, kind="perturbation", ledger={"search": Count(4, 4, 0, 4)})
        write_run(tmp_path / "c", "blur", [3] * 8, kind="corruption")
        page = build([tmp_path], tmp_path / "out").read_text()
        for words in ("valid success rate", "proven", "backwards", "m, value-choosing", "m, corruption"):
            assert words in page
        # The headline is of the removal attack, though the stronger one flips more.
        assert '<p class="lead">guided flips 75.0 %' in page
        assert "pgd flips 100.0 % by changing 90.0 %" in page
        assert "(value-choosing)" in (tmp_path / "out" / "table.md").read_text()

    def test_without_them_the_tables_are_as_before(self, tmp_path):
        build([two(tmp_path / "runs")], tmp_path / "out")
        table = (tmp_path / "out" / "table.md").read_text().split("*clean accuracy*")[0]
        for words in ("valid success rate", "proven", "backwards"):
            assert words not in table


def test_command(tmp_path):
    write_run(tmp_path / "outputs/attack/a", "guided", GUIDED)
    write_run(tmp_path / "outputs/attack/b", "random_removal", GUIDED)
    done = muroan("compare", cwd=tmp_path)
    out = tmp_path / "outputs/compare"
    assert (out / "compare.md").read_text() in done.stdout
    assert done.stdout.count("guided search is no better than random on d · m") == 1
    assert all((out / f"compare.{kind}").stat().st_size for kind in ("md", "tex", "csv", "png"))
    refused = muroan("compare", "runs=[outputs/compare]", cwd=tmp_path, check=False)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    assert refused.stderr.splitlines()[-1].startswith("muroan compare: outputs/compare has no run.json")
