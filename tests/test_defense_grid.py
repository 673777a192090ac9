"""Defences against attacks: the grid, its worst case and its verdicts, from hand-made records."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_compare import record, rows_of

from muroan.errors import MuroanError
from muroan.modalities import stable_seed
from muroan.report import build
from muroan.report.defense_grid import Grid, grids
from muroan.report.defenses import _drawn, latex, markdown, overview, table, write
from muroan.results import RunFolder
from muroan.runs import find_runs

COST = {"rows": 1000, "attack_forwards": 300, "attack_backwards": 20, "seconds": 12.5}


def run(
    path: Path,
    attack: str,
    outcomes: list[int | None],
    defense: str | None = None,
    control: bool = False,
    seed: int = 0,
    budget: int | None = 500,
    lr: float = 0.1,
    judged: bool = False,
    replacement: str = "zero",
    epochs: int = 3,
    model: str = "m",
    valid_only: bool = False,
    hardening: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    **more: Any,
) -> None:
    """An attack on a model under a defence; outcomes as in test_compare: removed percent, 0 held, None wrong before."""
    settings = json.dumps([hardening, options])
    folder = RunFolder(
        path / f"{defense}-{attack}-{budget}-{seed}-{lr}-{epochs}-{model}-{valid_only}{stable_seed(settings)}"
    )
    weights = f"{defense}{seed}{lr}{epochs}{settings}"
    threat_model = {"max_queries": budget, "replacement": replacement}
    training = {"control": control, "cost": COST} if defense else None
    folder.start(
        {
            "identity": {
                "attack": {"valid_only": valid_only},
                "threat_model": threat_model,
                "seed": seed,
                "weights": weights,
            },
            "attack": attack,
            "model": model,
            "dataset": "d",
            "judged": judged or "still_valid" in more,
            "defense": defense,
            "training": training,
            "classes": ["no", "yes"],
            "seed": seed,
            "checkpoint": {"path": "x", "sha256": weights},
            "config": {
                "defense": {"lr": lr, **(options or {})} if defense else None,
                "hardening": {"epochs": 1, **(hardening or {})} if defense else None,
                "training": {"epochs": epochs},
            },
        }
    )
    for index, removed in enumerate(outcomes):
        folder.append(record(index, attack, removed, **more))
    folder.finish()


def small(path: Path) -> Path:
    """An undefended model, a control, and a defence that two attacks break in different places."""
    run(path, "decoupling", [1, 1, 1, 1])
    run(path, "decoupling", [2, 0, 2, None], "plain_training", control=True)
    run(path, "greedy", [0, 0, 5, None], "plain_training", control=True)
    run(path, "decoupling", [0, 4, 0, 0], "hard")
    run(path, "greedy", [8, 2, 0, 0], "hard")
    return path


def grid(path: Path) -> Grid:
    (found,) = grids(find_runs([path]))
    return found


def test_the_worst_case_by_hand(tmp_path: Path) -> None:
    found = grid(small(tmp_path))
    assert [d.name for d in found.defenses] == ["undefended", "plain_training", "hard"]
    assert found.attacks == ["decoupling", "greedy"]
    plain, control, hard = found.defenses
    # Of four samples: none holds; one wrong and one of three holds; two of four hold.
    assert [found.worst(d)["robust_accuracy"]["value"] for d in found.defenses] == [0.0, 25.0, 50.0]
    # 1 % of the input scores 90, 2 % 80 and 8 % 20: the smallest flip of either attack counts.
    assert found.worst(plain)["curve_area"]["value"] == pytest.approx(90)
    assert found.worst(control)["curve_area"]["value"] == pytest.approx((80 + 0 + 80) / 3)
    assert found.worst(hard)["curve_area"]["value"] == pytest.approx((20 + 80 + 0 + 0) / 4)


def test_the_verdict_by_hand(tmp_path: Path) -> None:
    (verdict,) = grid(small(tmp_path)).verdicts
    assert verdict.control is not None
    assert verdict.control.name == "plain_training"
    assert verdict.beyond is not None
    # Pairs: broken / broken, broken / robust, robust / broken, robust / wrong.
    assert verdict.beyond.robust["value"] == pytest.approx((0 - 100 + 100 + 100) / 4)
    # Only samples that both get right have a flip to compare.
    assert verdict.beyond.area["value"] == pytest.approx(((20 - 80) + (80 - 0) + (0 - 80)) / 3)
    assert not verdict.helped
    assert verdict.line.startswith("hard did not help beyond its controls: robust accuracy +25.0 points [")
    assert "(against the undefended model +75.0 points [" in verdict.line
    assert verdict.undefended is not None
    assert verdict.undefended.robust["value"] == 75.0, "by decoupling alone, which both were attacked by"


@pytest.mark.parametrize(
    ("hard", "control", "says"),
    [
        ([0] * 30, [1] * 30, "hard helped beyond its controls: robust accuracy +100.0 points"),
        ([1] * 30, [0] * 30, "hard did worse than a control: robust accuracy -100.0 points"),
        (
            [3] * 30,
            [1] * 30,
            "hard did not help beyond its controls, though flips need larger removals (over the samples that both are "
            "flipped on, curve area -20.0 points [-20.0, -20.0] against noise): robust accuracy",
        ),
        # 5 samples and none: exactly 2 * 0.5^5 = 0.06, though the bootstrap interval leaves 0 out; of the others each
        # flip is as large.
        ([0] * 5 + [1] * 25, [1] * 30, "hard did not help beyond its controls: robust accuracy +16.7 points"),
    ],
)
def test_verdicts(tmp_path: Path, hard: list[Any], control: list[Any], says: str) -> None:
    run(tmp_path, "decoupling", hard, "hard")
    run(tmp_path, "decoupling", control, "plain_training", control=True)
    run(tmp_path, "decoupling", [1] * 30, "noise", control=True)
    (verdict,) = grid(tmp_path).verdicts
    assert says in verdict.line
    assert f"hard {verdict.word} " in says
    assert verdict.beyond is not None
    area = {"helped": -90, "did worse": 90}.get(verdict.word, -20 if hard[0] else -15)
    assert verdict.beyond.area["value"] == pytest.approx(area)


def test_of_equally_robust_controls_the_one_that_takes_larger_removals(tmp_path: Path) -> None:
    run(tmp_path, "decoupling", [5] * 30, "hard")
    for name, size in (("a", 1), ("b", 3), ("c", 2)):
        run(tmp_path, "decoupling", [size] * 30, name, control=True)
    (verdict,) = grid(tmp_path).verdicts
    assert (verdict.control.name, verdict.beyond.area["value"]) == ("b", pytest.approx(-20))  # type: ignore[union-attr]


def test_an_attack_that_flips_nothing_leaves_the_dataset_able_to_tell(tmp_path: Path) -> None:
    for defense in (None, "hard"):
        run(tmp_path, "decoupling", [1, 1, 0, 0], defense, still_valid=True)
        run(tmp_path, "other", [0, 0, 0, 0], defense, judged=True)
    found = grid(tmp_path)
    assert found.worst(found.defenses[1])["robust_to_valid"]["value"] == 50.0
    summary = found.defenses[1].attacks["other"].summary
    assert summary["valid_success_rate"]["value"] == 0.0


def test_where_the_dataset_can_tell_valid_flips_decide(tmp_path: Path) -> None:
    """The defence stops what leaves the label right, and nothing can stop what does not."""
    run(tmp_path, "decoupling", [1] * 30, "hard", still_valid=False)
    run(tmp_path, "decoupling", [1] * 30, "plain_training", control=True, still_valid=True)
    found = grid(tmp_path)
    control, hard = found.defenses
    assert found.worst(hard)["robust_to_valid"]["value"] == 100
    assert found.worst(control)["robust_to_valid"]["value"] == 0
    assert found.worst(hard)["robust_accuracy"]["value"] == 0
    (verdict,) = found.verdicts
    assert verdict.helped
    assert "robust accuracy to valid flips +100.0 points" in verdict.line
    assert "to all flips +0.0 points" in verdict.line


def test_the_smallest_valid_flip_of_any_attack_counts(tmp_path: Path) -> None:
    run(tmp_path, "decoupling", [1, 1], "hard", still_valid=False)
    run(tmp_path, "greedy", [4, 0], "hard", still_valid=True)
    (hard,) = grid(tmp_path).defenses
    outcomes = hard.outcomes(0, ["decoupling", "greedy"])
    assert [(o.size, o.valid) for o in outcomes.values()] == [(1, 4), (1, float("inf"))]
    assert [o.robust_to_valid for o in outcomes.values()] == [0, 100]


def test_a_goal_that_leaves_the_label_as_it_is_breaks_no_defence(tmp_path: Path) -> None:
    run(tmp_path, "decoupling_embedding", [1, 1], "hard", adversarial_label=0)
    run(tmp_path, "decoupling", [4, 0], "hard")
    outcomes = grid(tmp_path).defenses[0].outcomes(0, ["decoupling_embedding", "decoupling"])
    assert [o.size for o in outcomes.values()] == [4, float("inf")]


def test_an_attack_that_searches_valid_flips_alone_is_another_one(tmp_path: Path) -> None:
    run(tmp_path, "decoupling", [1, 1], "hard")
    folder = RunFolder(tmp_path / "hard-valid")
    about = RunFolder(next(tmp_path.glob("hard-decoupling*"))).run
    identity = {**about["identity"], "attack": {"valid_only": True}}
    folder.start({**about, "identity": identity})
    folder.append(record(0, "decoupling", 2))
    folder.append(record(1, "decoupling", 0))
    folder.finish()
    assert grid(tmp_path).attacks == ["decoupling (all flips)", "decoupling (valid flips)"]


def test_a_sample_that_an_attack_has_not_seen_does_not_hold_against_it(tmp_path: Path) -> None:
    """Both models are flipped by the strong attack wherever it was run: on the hardened one, a third of the samples."""
    for name, control, seen in (("hard", False, 20), ("plain_training", True, 60)):
        run(tmp_path, "weak", [0] * 60, name, control)
        run(tmp_path, "strong", [1] * seen, name, control)
    found = grid(tmp_path)
    (verdict,) = found.verdicts
    assert verdict.beyond is not None
    assert (verdict.beyond.samples, verdict.beyond.robust["value"], verdict.word) == (20, 0.0, "did not help")
    assert [found.worst(d)["robust_accuracy"]["value"] for d in found.defenses] == [0.0, 0.0]


def test_every_control_has_to_be_beaten(tmp_path: Path) -> None:
    """Six samples more than one control, for which p is 0.03, and eight more than the other by 20 against 12."""
    run(tmp_path, "decoupling", [0] * 40 + [1] * 60, "hard")
    run(tmp_path, "decoupling", [0] * 34 + [1] * 66, "near", control=True)
    run(tmp_path, "decoupling", [1] * 20 + [0] * 20 + [0] * 12 + [1] * 48, "far", control=True)
    (verdict,) = grid(tmp_path).verdicts
    assert verdict.control is not None
    assert (verdict.control.name, verdict.word) == ("far", "did not help")
    # 2 P(at least 20 of 32), by hand: 0.2153.
    assert verdict.p == pytest.approx(2 * sum(math.comb(32, k) for k in range(20, 33)) / 2**32)


def test_worse_than_one_of_several_controls_counts_them_all(tmp_path: Path) -> None:
    """Six against none is p = 0.03 for one control, and 0.06 for the two that it was chosen from."""
    run(tmp_path, "decoupling", [1] * 6 + [0] * 10, "hard")
    run(tmp_path, "decoupling", [0] * 16, "a", control=True)
    (verdict,) = grid(tmp_path).verdicts
    assert (verdict.word, verdict.p) == ("did worse", pytest.approx(2 / 2**6))
    run(tmp_path, "decoupling", [1] * 16, "b", control=True)
    (verdict,) = grid(tmp_path).verdicts
    assert verdict.control is not None
    assert (verdict.control.name, verdict.word, verdict.p) == ("a", "did not help", pytest.approx(4 / 2**6))


def test_a_control_without_a_sample_in_common_withholds_the_verdict(tmp_path: Path) -> None:
    run(tmp_path, "decoupling", [0] * 30, "hard")
    run(tmp_path, "decoupling", [1] * 30, "plain_training", control=True)
    (verdict,) = grid(tmp_path).verdicts
    assert verdict.helped
    run(tmp_path, "decoupling", [1] * 30, "noise", control=True, seed=5)
    (verdict,) = grid(tmp_path).verdicts
    assert not verdict.helped
    assert "hard cannot be said to have helped beyond its controls" in verdict.line
    assert "not compared with noise, which share no sample" in verdict.line


def test_larger_than_under_one_control_is_not_larger(tmp_path: Path) -> None:
    run(tmp_path / "a", "decoupling", [3] * 30, "hard")
    run(tmp_path / "a", "decoupling", [1] * 30, "a", control=True)
    (verdict,) = grid(tmp_path / "a").verdicts
    assert (verdict.larger, verdict.smaller) == (True, False)
    run(tmp_path / "a", "decoupling", [4] * 30, "b", control=True)
    (verdict,) = grid(tmp_path / "a").verdicts
    assert not verdict.larger
    assert verdict.smaller
    told = "hard did not help beyond its controls, and smaller removals flip it than under b (over the samples that "
    assert f"{told}both are flipped on, curve area +10.0 points [+10.0, +10.0]): " in verdict.line
    run(tmp_path / "b", "decoupling", [1] * 5 + [3] * 25, "hard")  # 5 samples and none: exactly 2 * 0.5^5 = 0.06
    run(tmp_path / "b", "decoupling", [3] * 30, "a", control=True)
    (verdict,) = grid(tmp_path / "b").verdicts
    assert (verdict.larger, verdict.smaller, verdict.p_smaller) == (False, False, pytest.approx(2 * 0.5**5))


def test_larger_flips_are_those_that_count(tmp_path: Path) -> None:
    """Flips that leave the label right are as large as before; only such as do not are larger."""
    for name, control, first in (("hard", False, 3), ("plain_training", True, 1)):
        run(tmp_path, "decoupling", [first] * 30, name, control, still_valid=False)
        run(tmp_path, "greedy", [5] * 30, name, control, still_valid=True)
    (verdict,) = grid(tmp_path).verdicts
    assert verdict.beyond is not None
    assert (verdict.beyond.area["value"], verdict.beyond.larger["value"]) == (pytest.approx(-20), 0)
    assert "larger removals:" not in verdict.line


def test_an_attack_under_another_threat_model_is_another_one(tmp_path: Path) -> None:
    run(tmp_path, "decoupling", [0] * 30, "hard")
    run(tmp_path, "greedy", [1] * 30, "hard")
    run(tmp_path, "decoupling", [1] * 30, "plain_training", control=True, replacement="noise")
    run(tmp_path, "greedy", [1] * 30, "plain_training", control=True)
    found = grid(tmp_path)
    assert found.attacks == ["greedy"]
    assert [name for d in found.defenses for name in d.attacks] == [
        "decoupling (threat_model.replacement=noise)",
        "greedy",
        "decoupling (threat_model.replacement=zero)",
        "greedy",
    ]
    (verdict,) = found.verdicts
    assert not verdict.helped


def test_models_of_other_training_are_no_match(tmp_path: Path) -> None:
    run(tmp_path, "decoupling", [0] * 30, "hard", epochs=3)
    run(tmp_path, "decoupling", [1] * 30, "plain_training", control=True, epochs=5)
    run(tmp_path, "decoupling", [1] * 30, epochs=5)
    run(tmp_path, "decoupling", [1] * 30, epochs=3)
    found = grid(tmp_path)
    names = ["undefended (training.epochs=3)", "undefended (training.epochs=5)", "plain_training", "hard"]
    assert [d.name for d in found.defenses] == names
    (verdict,) = found.verdicts
    assert "no control to compare with" in verdict.line
    assert verdict.undefended is not None, "the one of the same training"


def test_an_attack_on_more_seeds_takes_none_away(tmp_path: Path) -> None:
    for seed in range(3):
        run(tmp_path, "decoupling", [0] * 30, "hard", seed=seed)
        run(tmp_path, "decoupling", [1] * 30, "plain_training", control=True, seed=seed)
    run(tmp_path, "extra", [1] * 30, "plain_training", control=True, seed=0)
    (verdict,) = grid(tmp_path).verdicts
    assert verdict.beyond is not None
    assert (verdict.beyond.samples, verdict.beyond.by_seed) == (90, {0: 100.0, 1: 100.0, 2: 100.0})
    run(tmp_path, "pgd", [1] * 30, "plain_training", control=True, seed=7, kind="perturbation")
    (verdict,) = grid(tmp_path).verdicts
    assert verdict.beyond is not None
    assert (verdict.beyond.samples, verdict.beyond.by_seed) == (90, {0: 100.0, 1: 100.0, 2: 100.0})


def test_without_a_control_no_claim_is_made(tmp_path: Path) -> None:
    run(tmp_path, "decoupling", [0, 0], "hard")
    (verdict,) = grid(tmp_path).verdicts
    assert "no control to compare with, so that no claim can be made" in verdict.line


def test_seeds_are_paired_with_their_own(tmp_path: Path) -> None:
    for seed, (hard, control) in enumerate([([0, 0], [1, 0]), ([1, 1], [0, 1])]):
        run(tmp_path, "decoupling", hard, "hard", seed=seed)
        run(tmp_path, "decoupling", control, "plain_training", control=True, seed=seed)
    run(tmp_path, "decoupling", [1, 1], "plain_training", control=True, seed=7)
    (verdict,) = grid(tmp_path).verdicts
    assert verdict.beyond is not None
    assert (verdict.beyond.samples, verdict.beyond.by_seed) == (4, {0: 50.0, 1: -50.0})
    assert verdict.beyond.robust["value"] == pytest.approx((50 - 50) / 2)


def test_budgets_and_settings_tell_attacks_and_defences_apart(tmp_path: Path) -> None:
    for budget in (500, 5000):
        run(tmp_path, "decoupling", [0, 1], "hard", budget=budget)
        run(tmp_path, "decoupling", [1, 1], "hard", budget=budget, lr=0.2)
    run(tmp_path, "pgd", [1, 1], "hard", kind="perturbation")
    found = grid(tmp_path)
    assert [d.name for d in found.defenses] == ["hard (lr=0.1)", "hard (lr=0.2)"]
    assert found.attacks == ["decoupling (500 queries)", "decoupling (5\u202f000 queries)"]
    robust = found.worst(found.defenses[0])["robust_accuracy"]["value"]
    assert robust == 50.0, "value-choosing attacks are no part of the worst case"


def test_variants_have_names_of_their_own(tmp_path: Path) -> None:
    """However many settings it takes; so that each has its own verdict."""
    run(tmp_path, "decoupling", [1] * 30, "plain_training", control=True)
    same = {"a": 1, "b": 1, "c": 1}
    for last, outcome in ((1, 0), (2, 1)):
        run(tmp_path, "decoupling", [outcome] * 30, "hard", options={**same, "d": last})
    run(tmp_path, "decoupling", [1] * 30, "hard", options={"a": 2, "b": 2, "c": 2, "d": 1})
    found = grid(tmp_path)
    assert len({d.name for d in found.defenses}) == 4
    assert {v.defense.name: v.word for v in found.verdicts} == {
        "hard (a=1, b=1, c=1, d=1)": "helped",
        "hard (a=1, b=1, c=1, d=2)": "did not help",
        "hard (a=2, b=2, c=2, d=1)": "did not help",
    }


def test_a_control_that_was_trained_for_less_is_none(tmp_path: Path) -> None:
    run(tmp_path, "decoupling", [1] * 30, "plain_training", control=True)
    run(tmp_path, "decoupling", [0] * 30, "hard", hardening={"epochs": 5})
    (verdict,) = grid(tmp_path).verdicts
    assert verdict.word == ""
    assert "no control to compare with (trained longer or otherwise: plain_training), so that" in verdict.line
    run(tmp_path, "decoupling", [1] * 30, "modality_dropout", control=True, hardening={"epochs": 5, "samples": 9})
    (verdict,) = grid(tmp_path).verdicts
    assert verdict.word == "helped"
    assert verdict.control is not None
    assert verdict.control.name == "modality_dropout"


def test_what_cannot_be_told_apart_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "a", "decoupling", [0, 1], "hard")
    run(tmp_path / "b", "decoupling", [0, 0], "hard")
    with pytest.raises(MuroanError, match="2 runs with the seeds 0, 0, and nothing tells which"):
        grid(tmp_path)
    run(tmp_path / "c", "decoupling", [0, 1])
    with pytest.raises(MuroanError, match=r"no run is of a hardened model: `muroan harden"):
        grid(tmp_path / "c")


def test_the_report_has_the_grid(tmp_path: Path) -> None:
    page = build([small(tmp_path / "runs")], tmp_path / "out").read_text()
    assert "Did the defence help?" in page
    assert "hard did not help beyond its controls" in page
    assert "<td>75.0 (25.0 at 4.00)</td>" in page
    run(tmp_path / "runs/again", "decoupling", [0, 1, 0, 0], "hard")
    page = build([tmp_path / "runs"], tmp_path / "out").read_text()
    assert "There is no table of defences: hard, decoupling: 2 runs with the seeds 0, 0" in page


def test_several_models_have_an_overview(tmp_path: Path) -> None:
    twelve = [1, 2] * 6
    run(tmp_path, "decoupling", twelve)
    run(tmp_path, "decoupling", twelve, "plain_training", control=True)
    run(tmp_path, "decoupling", [0] * 12, "hard")
    run(tmp_path, "decoupling", twelve, "other", lr=0.2)
    run(tmp_path, "decoupling", [1, 0, 0, None], model="n")
    run(tmp_path, "decoupling", [0, 0, 0, 0], "plain_training", control=True, model="n")
    run(tmp_path, "decoupling", [1, 1, 1, 1], "hard", model="n")
    run(tmp_path, "decoupling", [0] * 12, "plain_training", control=True, model="k", still_valid=False)
    run(tmp_path, "decoupling", [1] * 12, "hard", model="k", still_valid=False)
    found = grids(find_runs([tmp_path]))
    assert overview(found) == [
        ["defence", "d · k", "d · m", "d · n"],
        ["undefended", "", "0.0", "50.0"],
        ["plain_training (control)", "100.0", "0.0", "100.0"],
        ["hard", "100.0", "100.0 +", "0.0"],  # of k no flip leaves the label right; of n there are too few to tell
        ["other", "", "0.0", ""],
    ]
    text, tex = markdown(found), latex(found)
    page = build([tmp_path], tmp_path / "out").read_text()
    assert page.index("What each defence leaves of each model") < page.index("<h3>d · k</h3>")
    assert "<td>100.0 +</td>" in page
    assert text.startswith("Robust to all flips: ")
    assert text.index("### All models\n") < text.index("### d · k\n")
    assert ["hard", "100.0", "100.0 +", "0.0"] in rows_of(text)
    assert tex.count(r"\begin{tabular}") == 4
    run(tmp_path, "decoupling", [1] * 12, "worse", model="k", still_valid=True)
    assert ["worse", "0.0 -", "", ""] in overview(grids(find_runs([tmp_path])))


def test_a_defence_over_fewer_seeds_says_so(tmp_path: Path) -> None:
    for seed in (0, 3):
        run(tmp_path, "decoupling", [1] * 8, "plain_training", control=True, seed=seed)
        run(tmp_path, "decoupling", [0] * (8 - seed) + [1] * seed, "hard", seed=seed)
    run(tmp_path, "decoupling", [1] * 8, "other", seed=3)
    run(tmp_path, "decoupling", [1] * 8, "plain_training", control=True, model="n")
    found = grids(find_runs([tmp_path]))
    shown = [row[0] for row in table(next(grid for grid in found if grid.model == "m"))]
    assert shown[1:] == ["plain_training (control)", "hard", "other (seed 3)"]
    assert ["other", "0.0 (seed 3)", ""] in overview(found)
    write([tmp_path], tmp_path / "out")
    with (tmp_path / "out/defenses.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["model"] == "m"]
    for attack in ("decoupling", "worst case"):  # the only one
        own = {line["defense"]: line for line in lines if line["attack"] == attack}
        assert {name: line["seeds"] for name, line in own.items()} == {
            "plain_training": "0 3",
            "hard": "0 3",
            "other": "3",
        }
        each = {name: json.loads(line["robust_accuracy_by_seed"]) for name, line in own.items()}
        assert each["hard"] == {"0": 100.0, "3": 62.5}
        assert each["other"] == {"3": 0.0}


def test_a_training_helped_if_it_did_in_every_seed(tmp_path: Path) -> None:
    """Chance in training is seen in the seeds alone: 30 samples in one seed say nothing of the next."""
    for seed, (hard, control) in enumerate([(0, 1), (0, 1), (1, 1)]):
        run(tmp_path, "decoupling", [hard] * 30, "hard", seed=seed)
        run(tmp_path, "decoupling", [control] * 30, "plain_training", control=True, seed=seed)
    (verdict,) = grid(tmp_path).verdicts
    assert verdict.p < 0.001
    assert verdict.word == "did not help"
    assert verdict.line.startswith(
        "hard did not help beyond its controls in every seed: robust accuracy +66.7 points ["
    )
    assert "against plain_training (by seed +100.0, +100.0, +0.0), p < 0.001" in verdict.line
    assert verdict.line.endswith("; 90 paired samples, seeds 0, 1, 2.")


def test_a_training_did_worse_if_it_did_in_every_seed(tmp_path: Path) -> None:
    for seed, control in enumerate([0, 0, 1]):
        run(tmp_path, "decoupling", [1] * 30, "hard", seed=seed)
        run(tmp_path, "decoupling", [control] * 30, "plain_training", control=True, seed=seed)
    (verdict,) = grid(tmp_path).verdicts
    assert verdict.word == "did not help"
    run(tmp_path, "decoupling", [1] * 30, "plain_training", control=True, seed=3)
    for seed in (0, 1):
        run(tmp_path, "decoupling", [0] * 30, "modality_dropout", control=True, seed=seed)
    (verdict,) = grid(tmp_path).verdicts
    assert verdict.word == "did worse", "than the other control, in each of the seeds that both have"


def test_of_each_defence_the_control_that_leaves_least_is_told(tmp_path: Path) -> None:
    for name, held, control in (("hard", 3, False), ("strong", 2, True), ("weak", 1, True), ("other", 4, False)):
        run(tmp_path, "decoupling", [0] * 4, name, control=control)
        if name != "other":
            run(tmp_path, "stronger", [0] * held + [1] * (4 - held), name, control=control)
    (more,) = grid(tmp_path).further
    assert [(d.name, c.name) for d, c, _ in more.differences] == [("hard", "strong"), ("hard", "weak")]
    assert "; hard against strong" in more.line
    assert "against weak" not in more.line


def test_what_an_attack_on_some_adds(tmp_path: Path) -> None:
    """The stronger attack was run on one seed, and not on all controls: it stands apart, over what has it."""
    for seed in (0, 3):
        run(tmp_path, "decoupling", [1] * 4, seed=seed)
        run(tmp_path, "decoupling", [0, 1, 1, 1], "plain_training", control=True, seed=seed)
        run(tmp_path, "decoupling", [1, 1, 1, 1], "modality_dropout", control=True, seed=seed)
        run(tmp_path, "decoupling", [0, 0, 0, 1], "hard", seed=seed)
    run(tmp_path, "stronger", [0] * 4, seed=3)  # what the others flip is flipped
    run(tmp_path, "stronger", [0, 0, 1, 1], "plain_training", control=True, seed=3)
    run(tmp_path, "stronger", [2, 0, 2, 0], "hard", seed=3)
    found = grid(tmp_path)
    (more,) = found.further
    assert more.attack == "stronger"
    held = {d.name: (seeds, figures["robust_accuracy"]["value"]) for d, seeds, figures in more.held}
    assert held == {"undefended": ([3], 0.0), "plain_training": ([3], 25.0), "hard": ([3], 25.0)}
    ((hard, control, difference),) = more.differences
    assert (hard.name, control.name) == ("hard", "plain_training")
    assert difference.robust["value"] == 0.0
    assert difference.p == 1.0
    assert more.line == (
        "With stronger added to the attacks (seed 3), robust accuracy is 0.0 % undefended, 25.0 % plain_training "
        "(control), 25.0 % hard; hard against plain_training +0.0 points [-75.0, +75.0], p 1.00."
    )
    assert more.line in markdown([found])
    write([tmp_path], tmp_path / "out")
    with (tmp_path / "out/defenses.csv").open() as file:
        lines = {(line["defense"], line["attack"]): line for line in csv.DictReader(file)}
    apart = lines["hard", "worst case with stronger"]
    assert (apart["seeds"], float(apart["robust_accuracy"]), apart["verdict"]) == ("3", 25.0, "")
    assert float(lines["hard", "worst case"]["robust_accuracy"]) == 75.0
    assert ("modality_dropout", "worst case with stronger") not in lines


def test_an_attack_on_other_seeds_takes_nothing_away(tmp_path: Path) -> None:
    """Whether only some were attacked by it, or all, but each in a seed of its own."""
    for seed in (0, 3):
        run(tmp_path, "decoupling", [1, 1, 1, 1], "plain_training", control=True, seed=seed)
        run(tmp_path, "decoupling", [0, 0, 0, 1], "hard", seed=seed)
        run(tmp_path, "decoupling", [0, 0, 1, 1], "other", seed=seed)
    run(tmp_path, "stronger", [1, 1, 1, 1], "plain_training", control=True, seed=0)
    run(tmp_path, "stronger", [0, 0, 1, 1], "hard", seed=0)
    before = grid(tmp_path)
    ((_, _, difference),) = before.further[0].differences
    assert difference.robust["value"] == 50
    run(tmp_path, "stronger", [1, 1, 1, 0], "other", seed=3)
    after = grid(tmp_path)
    assert after.attacks == before.attacks == ["decoupling"]
    assert [verdict.line for verdict in after.verdicts] == [verdict.line for verdict in before.verdicts]
    assert after.further[0].differences[0][2] == difference
    assert after.further[0].line.startswith(
        "With stronger added to the attacks, robust accuracy is 0.0 % plain_training (control) (seed 0), 50.0 % hard "
        "(seed 0), 0.0 % other (seed 3); hard against plain_training +50.0 points"
    )
    assert not after.left_out

    run(tmp_path, "stronger", [1, 1, 1, 0], "other", seed=0)  # now all have a seed in common, and most lack one
    assert grid(tmp_path).attacks == ["decoupling"]
    run(tmp_path, "stronger", [0, 0, 0, 1], "hard", seed=3)
    common = grid(tmp_path)
    assert set(common.attacks) == {"decoupling", "stronger"}
    assert (
        common.said[-1] == "Not in the worst case, as not all of its attacks were run there: seed 3 of plain_training."
    )


def test_every_pair_in_full(tmp_path: Path) -> None:
    write([small(tmp_path / "runs")], tmp_path / "out")
    run(tmp_path / "runs", "stronger", [0, 0, 1, 1], "plain_training", control=True)
    run(tmp_path / "runs", "stronger", [0, 0, 0, 0], "hard")
    run(tmp_path / "runs", "decoupling", [1, 1, 1, 1], "other")
    run(tmp_path / "runs", "greedy", [1, 1, 1, 1], "other")
    write([tmp_path / "runs"], tmp_path / "out")
    with (tmp_path / "out/defenses-pairs.csv").open() as file:
        lines = {(line["defense"], line["attack"]): line for line in csv.DictReader(file)}
    verdicts = {verdict.defense.name: verdict for verdict in grid(tmp_path / "runs").verdicts}
    assert set(lines) == {("hard", "worst case"), ("other", "worst case"), ("hard", "worst case with stronger")}
    for name, verdict in verdicts.items():
        line, beyond = lines[name, "worst case"], verdict.beyond
        assert beyond is not None
        assert (line["control"], line["decides"], line["verdict"]) == ("plain_training", "True", verdict.word)
        assert [float(line[key]) for key in ("verdict_p", "p", "robust_accuracy")] == [
            pytest.approx(value) for value in (verdict.p, beyond.p, beyond.robust["value"])
        ]
        assert json.loads(line["by_seed"]) == {"0": pytest.approx(beyond.points)}
    assert lines["hard", "worst case with stronger"]["verdict"] == ""


def test_the_plot_is_of_what_defences_are_judged_by(tmp_path: Path) -> None:
    """Of many controls the best one is enough, and of several attacks the one in search of valid flips."""
    for valid_only in (False, True):
        options = {"valid_only": valid_only, "still_valid": True}
        run(tmp_path, "decoupling", [1, 1, 1, 1], **options)
        run(tmp_path, "decoupling", [1, 1, 1, 0], "noise", control=True, **options)
        run(tmp_path, "decoupling", [1, 1, 0, 0], "dropout", control=True, **options)
        run(tmp_path, "decoupling", [1, 0, 0, 0], "hard", **options)
    title, curves = _drawn(grid(tmp_path))
    assert title == "d · m, decoupling (valid flips)"
    assert [name for name, _ in curves] == ["undefended", "dropout (control)", "hard"]
    assert all(run.identity["attack"]["valid_only"] for _, runs in curves for run in runs)
    run(tmp_path / "alone", "greedy", [1, 1], "hard")
    assert _drawn(grid(tmp_path / "alone"))[0] == "d · m, greedy"


def test_files(tmp_path: Path) -> None:
    page = write([small(tmp_path / "runs")], tmp_path / "out")
    text = page.read_text()
    rows = rows_of(text)
    assert len({len(row) for row in rows}) == 1
    assert [row[0] for row in rows[2:]] == ["undefended", "plain_training (control)", "hard"]
    assert rows[4][5:7] == ["75.0 (25.0 at 4.00)", "50.0 (50.0 at 5.00)"]
    assert rows[4][-3:] == ["1\u202f000", "320", "12"]
    assert "- hard did not help beyond its controls" in text
    with (tmp_path / "out/defenses.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 5 + 3
    worst = next(line for line in lines if line["defense"] == "hard" and line["attack"] == "worst case")
    assert float(worst["robust_accuracy"]) == 50
    assert float(worst["attack_forwards"]) == 300
    assert [line["verdict"] for line in lines if line["verdict"]] == ["did not help"]
    assert worst["verdict"] == "did not help"
    found = grids(find_runs([tmp_path / "runs"]))
    assert text == markdown(found)
    tex = latex(found)
    assert (tmp_path / "out/defenses.tex").read_text() == tex
    assert tex.count("{") == tex.count("}")
    assert all(line.count("&") == 9 for line in tex.splitlines() if re.search(r"(?<!\\)&", line))
    assert Image.open(tmp_path / "out/defenses.png").size[0] > 800


def holding(path: Path, defense: str, seed: int, held: int, control: bool = True) -> None:
    """A run of 40 samples under a defence, of which the first so many hold."""
    run(path, "decoupling", [0] * held + [1] * (40 - held), defense, control=control, seed=seed)


def test_the_control_that_was_better_in_every_seed_decides(tmp_path: Path) -> None:
    """Another one is further ahead, but not in each."""
    for seed, hard, other in [(0, 10, 40), (1, 12, 11)]:
        holding(tmp_path, "hard", seed, hard, control=False)
        holding(tmp_path, "plain_training", seed, other)
    (verdict,) = grid(tmp_path).verdicts
    assert (verdict.word, verdict.steady) == ("did not help", False)
    assert "hard did worse than a control, but not in every seed: robust accuracy -36.2 points" in verdict.line
    for seed, other in [(0, 18), (1, 20)]:
        holding(tmp_path, "modality_dropout", seed, other)
    (verdict,) = grid(tmp_path).verdicts
    assert verdict.word == "did worse"
    assert "against modality_dropout (by seed -20.0, -20.0), p 0.004" in verdict.line
    alone = {control.name: difference.p for control, difference in verdict.against}
    assert alone["plain_training"] < alone["modality_dropout"]


def test_the_control_that_stands_against_a_gain_is_named(tmp_path: Path) -> None:
    for seed, hard, dropout, plain in [(0, 20, 14, 1), (1, 20, 13, 21)]:
        holding(tmp_path, "hard", seed, hard, control=False)
        holding(tmp_path, "modality_dropout", seed, dropout)
        holding(tmp_path, "plain_training", seed, plain)
    (verdict,) = grid(tmp_path).verdicts
    assert verdict.word == "did not help"
    assert verdict.p < 0.05
    assert "hard did not help beyond its controls in every seed: robust accuracy +22.5 points" in verdict.line
    assert "against plain_training (by seed +47.5, -2.5)" in verdict.line
