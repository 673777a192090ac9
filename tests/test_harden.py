"""`muroan harden` as a real command: the model it leaves, what the attack on it records, and the grid of both."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, environment, muroan
from omegaconf import OmegaConf
from test_cli import wait_for_lines
from test_compare import rows_of

from muroan import cli
from muroan.cli.parts import other_hardening
from muroan.cli.training import already_trained, begin_from, told_weights
from muroan.errors import MuroanError
from muroan.results import read_records

HARDEN = (
    *SMALL,
    "hardening.epochs=2",
    "hardening.batches=3",
    "hardening.samples=12",
    "hardening.threat_model.max_queries=20",
)
ATTACK = ("dataset.test_limit=24", "threat_model.max_queries=20", "attack=decoupling_reference", "engine.keep_media=0")


@pytest.fixture(scope="module")
def place(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder, and the options by which all commands find the trained model and each other in it."""
    folder = tmp_path_factory.mktemp("harden")
    names = "${hydra:runtime.choices.defense}"
    options = [f"folders.train={trained}", f"folders.harden='{folder}/models/{names}'", "tracker=none"]
    return folder, [*options, f"folders.attack='{folder}/attacks/{names}-${{hydra:runtime.choices.attack}}'"]


@pytest.fixture(scope="module")
def hardened(place: tuple[Path, list[str]]) -> Path:
    folder, options = place
    muroan("harden", "-m", *HARDEN, *options, "defense=plain_training,adversarial_training", cwd=folder)
    muroan("attack", "-m", *HARDEN, *ATTACK, *options, "defense=none,plain_training,adversarial_training", cwd=folder)
    return folder


@pytest.mark.slow  # so are all with hardened models: `experiments/defense.py quick` hardens, attacks and compares in CI
def test_the_summary_tells_what_it_took(hardened: Path) -> None:
    plain, trained = (
        json.loads((hardened / "models" / name / "summary.json").read_text())
        for name in ("plain_training", "adversarial_training")
    )
    assert plain["control"] is True
    assert trained["control"] is False
    assert plain["cost"]["rows"] == trained["cost"]["rows"] == 2 * 3 * 64
    assert plain["cost"]["attack_forwards"] == 0 < trained["cost"]["attack_forwards"]
    assert trained["cost"]["seconds"] > 0
    assert trained["best"]["monitor"] == "val/robust_accuracy"
    assert trained["start"].endswith("best.ckpt")
    assert trained["start_weights"] == plain["start_weights"] != plain["weights"]
    assert plain["weights"] != trained["weights"]
    assert (hardened / "models/adversarial_training/best.ckpt").exists()


@pytest.mark.slow
def test_an_attack_on_it_says_what_it_attacked(hardened: Path) -> None:
    runs = {
        name: json.loads((hardened / f"attacks/{name}-decoupling_reference/run.json").read_text())
        for name in ("none", "plain_training", "adversarial_training")
    }
    assert [run["defense"] for run in runs.values()] == [None, "plain_training", "adversarial_training"]
    assert len({run["checkpoint"]["sha256"] for run in runs.values()}) == 3
    assert runs["adversarial_training"]["training"]["cost"]["attack_forwards"] > 0


@pytest.mark.slow
def test_what_flipped_the_undefended_model_is_tried_on_it_and_all_are_put_into_a_grid(
    hardened: Path, place: tuple[Path, list[str]]
) -> None:
    folder, options = place
    undefended = folder / "attacks/none-decoupling_reference"
    transferred = [*HARDEN, *ATTACK[:2], *options, "attack=transferred", f"attack.run={undefended}"]
    muroan("attack", "-m", *transferred, "defense=plain_training,adversarial_training", cwd=folder)
    found = read_records(folder / "attacks/adversarial_training-transferred/records.jsonl")
    assert {r.queries for r in found if r.attacked} <= {0, 1}
    flipped = {r.id: r.removed for r in read_records(undefended / "records.jsonl") if r.flipped}
    assert all(flipped[r.id] == r.removed for r in found if r.flipped)
    shown = muroan("defenses", f"runs=[{folder / 'attacks'}]", f"out={folder / 'grid'}", cwd=folder).stdout
    rows = rows_of(shown)
    assert [row[0] for row in rows[2:]] == ["undefended", "plain_training (control)", "adversarial_training"]
    assert rows[0][5:7] == ["decoupling_reference", "transferred"]
    assert "adversarial_training did" in shown or "adversarial_training helped" in shown
    assert (folder / "grid/defenses.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_finished_one_is_not_hardened_again(hardened: Path, place: tuple[Path, list[str]]) -> None:
    folder, options = place
    done = muroan("harden", *HARDEN, *options, "defense=plain_training", cwd=folder)
    assert "already trained" in done.stdout


@pytest.mark.slow
def test_one_in_double_precision_is_not_hardened_again(place: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Its start's weights have another hash there than in the type that a model is made in."""
    _, options = place
    words = [*HARDEN, *options, "defense=plain_training", "device.precision=64-true", "tracker=none"]
    shared = (f"folders.train={tmp_path / 'base'}", f"folders.harden={tmp_path / 'hardened'}")
    words = [word for word in words if not word.startswith(("folders.", "out="))]
    trained = [w for w in words if not w.startswith(("defense", "hardening"))]
    muroan("train", *trained, *shared, cwd=tmp_path)
    muroan("harden", *words, *shared, cwd=tmp_path)
    assert "already trained" in muroan("harden", *words, *shared, cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("harden", (), "harden needs a defence, such as defense=adversarial_training: adversarial_training, "),
        (
            "harden",
            ("defense=modality_dropout", "defense.ratio=2"),
            "defense.ratio must be a number at least 0 and at most 1, got 2",
        ),
        ("harden", ("defense=modality_dropout", "defense.ratio=null"), "defense.ratio must be a number .*, got None"),
        ("harden", ("defense=plain_training", "+defense.shares=2"), "plain_training cannot be made: .*'shares'"),
        ("harden", ("defense=plain_training", "hardening.start=else"), "hardening.start must be trained, scratch or a"),
        ("harden", ("defense=plain_training", "hardening.start=null"), "hardening.start must be .*, got None"),
        ("train", ("model.encoders.image.grid=2",), "the grid of ConvTokens must be two whole .*, got 2"),
        ("train", ("dataset.val_pictures=1e2",), "dataset.val_pictures must be a whole number, .*, got 100.0"),
        ("report", ("runs=null",), r"runs must name folders of runs, such as runs=\[outputs/attack\], got None"),
        (
            "harden",
            ("defense=plain_training", "checkpoint=x.ckpt"),
            "checkpoint names the model to attack: .*start=x.ckpt",
        ),
        (
            "harden",
            ("defense=plain_training", "hardening.epochs=0"),
            "hardening.epochs must be a whole number, at least 1",
        ),
        (
            "harden",
            ("defense=plain_training", "hardening.batches=0"),
            "hardening.batches must be a whole number, at lea",
        ),
        (
            "harden",
            ("defense=plain_training", "hardening.samples=-5"),
            "hardening.samples must be a whole number, at le",
        ),
        (
            "harden",
            ("defense=plain_training", "hardening.warmup=1.5"),
            "hardening.warmup must be 0 to 1, got 1.5",
        ),
        ("harden", ("defense=plain_training", "hardening.lr=-1"), "hardening.lr must be above 0, got -1"),
        ("train", ("training.lr=abc",), "training.lr must be a number, got 'abc'"),
        ("train", ("training.epochs=ten",), "training.epochs must be a whole number, at least 1, got 'ten'"),
        (
            "harden",
            ("defense=modality_dropout", "defense.ratio=x"),
            "defense.ratio must be a number at least 0 and at most 1, got 'x'",
        ),
        ("certify", ("defense=mmcert", "defense.keep.image=ten"), "defense.keep.image must be a share above 0"),
        ("harden", ("defense=plain_training", "device.precision=16-true"), "device.precision=16-true is too narrow"),
        ("train", ("device.precision=16-true",), "device.precision=16-true is too narrow to train in"),
        ("harden", ("defense=plain_training", "hardening.start=trained"), "no trained model in .*: run `muroan train"),
        ("attack", ("defense=plain_training", "seed=3"), "no hardened model in .*: run `muroan harden .*seed=3"),
    ],
)
def test_refusals_are_one_line(
    command: str, words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path
) -> None:
    """In this process: what `main` exits with is the line that the shell shows."""
    monkeypatch.chdir(tmp_path)
    if command == "certify" or any("defense." in word for word in words):
        words = (*words, f"folders.train={trained}")
    monkeypatch.setattr(sys, "argv", ["muroan", command, *HARDEN, "tracker=none", *words])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    with pytest.raises(SystemExit, match=f"muroan {command}: {message}"):
        cli.main()


def test_what_is_not_trained_to_the_end_is_not_attacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path
) -> None:
    """After its first epoch a training leaves a checkpoint, too."""
    half = shutil.copytree(trained, tmp_path / "half")
    (half / "summary.json").unlink()
    for command, words in (("attack", ATTACK), ("harden", ("defense=plain_training",))):
        words = (*HARDEN, *words, f"folders.train={half}", "tracker=none", "seed=0")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["muroan", command, *words])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "")
        with pytest.raises(
            SystemExit, match=r"not trained to the end: the same command goes on with it, `muroan train"
        ):
            cli.main()


def test_a_summary_without_its_weights_is_no_training(tmp_path, monkeypatch):
    """As archives of records have it: training begins anew, and is not done before it has ended."""
    monkeypatch.setattr("muroan.cli.training.identity", lambda config, command: {"seed": 0})
    for name, content in (("summary.json", {"identity": {"seed": 0}}), ("identity.json", {"seed": 0})):
        (tmp_path / name).write_text(json.dumps(content))
    config = OmegaConf.create({"out": str(tmp_path), "rerun": False})
    assert not already_trained(config, "train")
    (tmp_path / "best.ckpt").touch()  # of the first epoch; then it is killed
    assert not already_trained(config, "train")
    (tmp_path / "summary.json").write_text(json.dumps({"identity": {"seed": 0}}))
    assert already_trained(config, "train")


def test_a_hardening_of_a_model_that_was_trained_again_is_not_taken_for_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("muroan.cli.training.identity", lambda config, command: {"seed": 0})
    start, out = tmp_path / "base/best.ckpt", tmp_path / "hardened"
    config = OmegaConf.create({"out": str(out), "rerun": False})
    assert not already_trained(config, "harden")
    begin_from(config, start, "a" * 64)
    begin_from(config, start, "b" * 64)  # nothing was trained yet
    (out / "last.ckpt").touch()
    assert not already_trained(config, "harden"), "it goes on"
    begin_from(config, start, "b" * 64)
    other = (
        r"hardened holds a hardening that began from other weights \(b{12}\) than .*best.ckpt has now \(c{12}\): start"
    )
    with pytest.raises(MuroanError, match=other):
        begin_from(config, start, "c" * 64)

    (out / "best.ckpt").touch()
    told = {"identity": {"seed": 0}, "start": str(start), "start_weights": "b" * 64}
    (out / "summary.json").write_text(json.dumps(told))
    assert already_trained(config, "harden"), "where it began from is gone"
    start.parent.mkdir()
    for weights in "bc":
        (start.parent / "summary.json").write_text(json.dumps({"weights": weights * 64}))
        if weights == "b":
            assert already_trained(config, "harden")
    with pytest.raises(MuroanError, match=other):
        already_trained(config, "harden")
    config.rerun = True
    assert not already_trained(config, "harden")
    begin_from(config, start, "c" * 64)


def test_which_weights_a_summary_tells_of(tmp_path):
    """Those of the best epoch alone; and what else lies beside a checkpoint may be of another kind."""
    assert told_weights(tmp_path / "best.ckpt") is None
    (tmp_path / "summary.json").write_text(json.dumps({"weights": "ab"}))
    assert told_weights(tmp_path / "best.ckpt") == "ab"
    assert told_weights(tmp_path / "last.ckpt") is None
    (tmp_path / "summary.json").write_text(json.dumps({"metrics": {}}))
    assert told_weights(tmp_path / "best.ckpt") is None


def test_a_checkpoint_of_another_training_is_not_taken_for_a_hardened_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path
) -> None:
    words = (*HARDEN, *ATTACK, "defense=plain_training", f"checkpoint={trained / 'best.ckpt'}", "tracker=none")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["muroan", "attack", *words])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    with pytest.raises(SystemExit, match="is of a model that no defense=plain_training has hardened"):
        cli.main()


def test_a_checkpoint_of_another_variant_of_a_defense_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several defences are of one class, and how long it trained counts, too."""
    config = OmegaConf.create(
        {"defense": {"_target_": "A", "ratio": 1.0, "folder": "x"}, "hardening": {"epochs": 2}, "checkpoint": None}
    )
    checkpoint = tmp_path / "best.ckpt"
    told = {"defense": {"_target_": "A", "ratio": 1.0}, "hardening": {"epochs": 2}, "seed": 7}

    monkeypatch.setattr("muroan.cli.parts.identity", lambda config, command: told)

    def differing(**other: Any) -> str:
        (tmp_path / "summary.json").write_text(json.dumps({"identity": {**told, **other}}))
        return other_hardening(checkpoint, config)

    assert differing() == differing(seed=8) == ""
    assert differing(defense={"_target_": "A", "ratio": 0.5}) == "defense.ratio: 0.5 there, 1.0 asked for"
    assert differing(hardening={"epochs": 3}) == "hardening.epochs: 3 there, 2 asked for"
    (tmp_path / "summary.json").write_text('{"identity": {')
    with pytest.raises(MuroanError, match=r"summary\.json is damaged \(.*\): rerun=true trains anew"):
        other_hardening(checkpoint, config)
    (tmp_path / "summary.json").unlink()
    assert other_hardening(checkpoint, config) == "", "a file from elsewhere tells nothing"


@pytest.mark.slow
def test_a_killed_offline_hardening_goes_on_where_it_was(place: tuple[Path, list[str]], tmp_path: Path) -> None:
    _, options = place
    out = tmp_path / "model"
    words = [
        *HARDEN,
        *options,
        "defense=adversarial_training_offline",
        "attack@defense.attack=random_removal",
        f"out={out}",
    ]
    words += ["defense.samples=700"]
    process = subprocess.Popen(
        [sys.executable, "-m", "muroan.cli", "harden", *words], cwd=tmp_path, env=environment(), stdout=-1, stderr=-1
    )
    wait_for_lines(out / "adversarial/0-00000.pt", 1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = (out / "adversarial/0-00000.pt").stat().st_mtime_ns
    assert not (out / "summary.json").exists()
    for file, before, told in (
        (out / "adversarial/set.json", (out / "adversarial/set.json").read_bytes(), "set.json is damaged (Expecting"),
        (out / "last.ckpt", None, "the training cannot go on: "),
    ):
        file.write_text("junk")
        refused = muroan("harden", *words, cwd=tmp_path, check=False)
        assert refused.returncode == 1
        (line,) = [line for line in refused.stderr.splitlines() if told in line]
        assert f"{file}" in line
        assert "rerun=true" in line
        assert "Traceback" not in refused.stderr
        file.unlink() if before is None else file.write_bytes(before)
    muroan("harden", *words, cwd=tmp_path)
    assert (out / "adversarial/0-00000.pt").stat().st_mtime_ns == first
    assert len(list((out / "adversarial").glob("*.pt"))) == 3
    assert (out / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "defense", ["adversarial_training", "adversarial_training_offline", "embedding_adversarial_training"]
)
def test_two_processes_harden_together(defense: str, place: tuple[Path, list[str]], tmp_path: Path) -> None:
    _, options = place
    words = [*HARDEN, *options, f"defense={defense}", f"out={tmp_path / 'model'}", "device=ddp_cpu"]
    words += ["defense.samples=200"] if defense.endswith("offline") else []
    muroan("harden", *words, cwd=tmp_path)
    summary = json.loads((tmp_path / "model/summary.json").read_text())
    assert summary["cost"]["rows"] == 2 * 2 * 3 * 64, "both processes train on batches of their own"
    assert summary["cost"]["attack_forwards"] > 0
