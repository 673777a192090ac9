"""The real command in processes of its own: what it teaches, refuses, computes, resumes and shares out."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, environment, muroan
from hydra.core.override_parser.overrides_parser import OverridesParser

from muroan import cli
from muroan.cli import quoted
from muroan.cli.jobs import planned
from muroan.results import AttackResult, read_records

ATTACK = (*SMALL, "dataset.test_limit=40", "attack=random_removal", "attack.draws=30", "engine.keep_media=3")


def attack(
    trained: Path, out: Path, *more: object, tracker: str = "none", check: bool = True
) -> subprocess.CompletedProcess[str]:
    options = (*ATTACK, f"folders.train={trained}", f"out={out}", f"tracker={tracker}", *more)
    return muroan("attack", *options, cwd=out.parent, check=check)


def by_id(path: Path) -> dict[str, AttackResult]:
    records = read_records(path)
    found = {record.id: record for record in records}
    assert len(found) == len(records), "a sample has two records"
    return found


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The message of a refused command: no traceback around it."""
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def undisturbed(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished attack run in one go, by one process."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    attack(trained, out)
    return out


def test_help_teaches_commands_and_choices(tmp_path: Path) -> None:
    for arguments in ((), ("--help",), ("attack", "--help")):
        text = muroan(*arguments, cwd=tmp_path).stdout
        for word in ("muroan train", "muroan attack", "muroan report", "decoupling_reference", "easy_vqa", "mmbt"):
            assert word in text


def test_unknown_command_lists_the_commands(tmp_path: Path) -> None:
    message = one_line(muroan("atack", cwd=tmp_path, check=False))
    assert "'atack'" in message
    assert "train, harden, attack, certify, report" in message


def test_unknown_choice_lists_the_choices(tmp_path: Path) -> None:
    message = one_line(muroan("attack", "model=mmbtt", cwd=tmp_path, check=False))
    assert "model/mmbtt" in message
    assert "late_fusion" in message
    assert "Config search path" not in message


def test_unknown_option_is_named(tmp_path: Path) -> None:
    assert "modell" in one_line(muroan("attack", "modell=3", cwd=tmp_path, check=False))


def test_attack_without_a_model_says_how_to_train_one(tmp_path: Path) -> None:
    done = muroan("attack", "model=concat", "seed=3", "attack=random_removal", cwd=tmp_path, check=False)
    assert "run `muroan train model=concat seed=3` first" in one_line(done)


def test_a_fixed_folder_holds_one_training(trained: Path, tmp_path: Path) -> None:
    """Neither is another one taken for trained, nor what it left for its model."""
    options = (*SMALL, f"folders.train={trained}", "tracker=none", "seed=1")
    message = one_line(muroan("train", *options, cwd=tmp_path, check=False))
    assert "holds another training (seed: 0 there, 1 asked for): choose another folder with out=" in message
    message = one_line(attack(trained, tmp_path / "run", "seed=1", check=False))
    assert "best.ckpt is of another training (seed: 0 there, 1 asked for)" in message
    assert not (tmp_path / "run/run.json").exists()


def test_a_checkpoint_of_another_model_is_refused(trained: Path, tmp_path: Path) -> None:
    checkpoint = f"checkpoint={trained / 'best.ckpt'}"
    message = one_line(attack(trained, tmp_path / "run", "model.fusion.layers=2", checkpoint, check=False))
    assert "does not fit the model" in message
    assert "unknown here" in message
    (tmp_path / "no.ckpt").write_text("nothing")
    broken = attack(trained, tmp_path / "run", f"checkpoint={tmp_path / 'no.ckpt'}", check=False)
    assert "is not a checkpoint of `muroan train`" in one_line(broken)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("attack.draws=0", "attack.draws must be a whole number, at least 1, got 0"),
        ("dataset.test_limit=0", "dataset.test_limit must be a positive whole number, got 0"),
        ("threat_model.max_queries=-1", "threat_model.max_queries must be a whole number, at least 1, or null, got -1"),
        (
            "threat_model.max_queries=abc",
            "threat_model.max_queries must be a whole number, at least 1, or null, got 'abc'",
        ),
        (
            "threat_model.min_side.image=abc",
            "threat_model.min_side.image must be a whole number, at least 1, got 'abc'",
        ),
        (
            "threat_model.replacement=blur",
            "threat_model.replacement goes by modality, got 'blur' for all: threat_model.replacement.image=blur, and "
            "so on for image, text",
        ),
        ("threat_model.min_side=5", "threat_model.min_side goes by modality, got 5 for all"),
        ("engine.keep_media=null", "engine.keep_media must be a whole number, at least 0, got None"),
        ("engine.batch_size=abc", "engine.batch_size must be a whole number, at least 1, got 'abc'"),
        ("engine.search_processes=-1", "engine.search_processes must be a whole number, at least 0, got -1"),
        ("dataset.num_workers=-1", "dataset.num_workers must be a whole number, 0 or more, got -1"),
        ("device.precision=bf17", "device.precision must be one of 32-true, "),
        ("dataset.skip_bad=no", "dataset.skip_bad must be true or false, got 'no'"),
        ("device.devices=0", "devices=0"),
    ],
)
def test_a_bad_option_is_one_line_and_leaves_no_run_behind(option: str, expected: str, trained: Path, tmp_path: Path):
    message = one_line(attack(trained, tmp_path / "run", option, check=False))
    assert expected in message
    assert "MuroanError(" not in message
    assert not (tmp_path / "run/run.json").exists()


def test_an_option_of_swept_choices_is_told_how_to_be_given(tmp_path: Path) -> None:
    """Hydra applies it to the default choice before it comes to the sweep, and advises a + that its jobs refuse."""
    sweep = ("attack", "-m", "attack=gaussian_noise,salt_and_pepper", "attack.severity=1")
    message = one_line(muroan(*sweep, cwd=tmp_path, check=False))
    assert message.endswith("in the default attack, which has none: write ++attack.severity=1")


@pytest.mark.parametrize("seed", ["abc", "-1"])
def test_a_bad_seed_is_one_line(seed: str, trained: Path, tmp_path: Path) -> None:
    checkpoint = f"checkpoint={trained / 'best.ckpt'}"
    message = one_line(attack(trained, tmp_path / "run", f"seed={seed}", checkpoint, check=False))
    assert "seed must be a whole number, 0 or more" in message


def test_a_folder_without_brackets_is_a_folder(tmp_path: Path) -> None:
    message = one_line(muroan("report", "runs=outputs/attack", cwd=tmp_path, check=False))
    assert "muroan report: outputs/attack is not a folder: name a folder that `muroan attack` wrote" in message


def test_a_run_that_was_cut_off_while_it_summed_up_is_summed_up(trained: Path, tmp_path: Path) -> None:
    attack(trained, tmp_path / "run", "tracker=none")
    summary, records = tmp_path / "run/summary.json", tmp_path / "run/records.jsonl"
    before, made = summary.read_text(), records.stat().st_mtime_ns
    summary.unlink()
    again = attack(trained, tmp_path / "run", "tracker=none")
    assert "already finished" in again.stdout
    assert summary.read_text() == before
    assert records.stat().st_mtime_ns == made


MANIFEST = ("dataset=manifest", "dataset.classes=[a,b]", "dataset.text=text")


def manifest(folder: Path, labels: str, extra: str = "") -> str:
    """A dataset of the user's own; the same layout with other labels is another one."""
    folder.mkdir()
    for split in ("train", "val", "test"):
        rows = [{"text": f"a word {i}", "label": label} for i, label in enumerate(labels)]
        rows += [{"text": extra, "label": "a"}] if extra and split == "test" else []
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"dataset.root={folder}"


@pytest.mark.parametrize("command", ["train", "attack"])
def test_another_dataset_under_the_same_name_is_another_job(command: str, tmp_path: Path) -> None:
    one, same, other = (
        manifest(tmp_path / name, labels) for name, labels in [("1", "abab"), ("2", "abab"), ("3", "baba")]
    )
    planned_jobs = planned(command, [[*MANIFEST, root] for root in (one, same, other)], [0])
    (first,), (moved,), (changed,) = planned_jobs
    assert first == moved, "where it lies does not matter"
    assert first[0] != changed[0]
    assert first[1] != changed[1]


def test_a_text_that_would_end_a_training_late_is_found_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    root = manifest(tmp_path / "data", "abab", extra="a text with many more words than any")
    monkeypatch.chdir(tmp_path)
    words = ["train", *MANIFEST, root, "device=cpu", "tracker=none", "training.epochs=1", "model=late_fusion"]
    monkeypatch.setattr(sys, "argv", ["muroan", *words])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    with pytest.raises(SystemExit, match=r"sample 'test-4' of test, text: a text of 8 words is .* set truncate=true"):
        cli.main()
    assert "Epoch" not in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("value", ["runs (v2)/a", "é[x],{y}", 'a "b" \\ c', "k=v#1 'q'", "ends in \\"])
def test_a_folder_is_passed_on_as_it_is(value: str) -> None:
    """To the further processes of a job, by way of Hydra's parser."""
    assert OverridesParser.create().parse_override(f"out={quoted(value)}").value() == value


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_that_it_goes_on(number: int, trained: Path, tmp_path: Path) -> None:
    words = [*ATTACK, f"folders.train={trained}", f"out={tmp_path / 'run'}", "tracker=none", "dataset.test_limit=400"]
    command = [sys.executable, "-m", "muroan.cli", "attack", *words]
    # In the background of a script a shell has SIGINT ignored, and what the tests start would inherit that.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    options = {"cwd": tmp_path, "env": environment(), "stdout": -1, "stderr": -1, "text": True}
    process = subprocess.Popen(command, preexec_fn=heard, **options)
    wait_for_lines(tmp_path / "run/records.part-0.jsonl", 5)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.rstrip().endswith("muroan attack: interrupted; the same command goes on from here")


def wait_for_lines(path: Path, count: int) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (path.exists() and path.read_bytes().count(b"\n") >= count):
        time.sleep(0.005)


def test_records_and_summary_of_a_run(undisturbed: Path) -> None:
    records = by_id(undisturbed / "records.jsonl")
    assert len(records) == 40
    assert {r.status for r in records.values()} >= {"flipped", "held", "skipped"}
    assert all(r.queries <= 30 for r in records.values())
    assert sum(r.media is not None for r in records.values()) == 3
    summary = json.loads((undisturbed / "summary.json").read_text())
    flipped = sum(r.flipped for r in records.values())
    attacked = sum(r.attacked for r in records.values())
    assert summary["attack_success_rate"]["value"] == pytest.approx(100 * flipped / attacked)
    run = json.loads((undisturbed / "run.json").read_text())
    assert run["versions"]["torch"]
    assert len(run["checkpoint"]["sha256"]) == 64
    assert run["judged"] is True
    valid = sum(r.flipped and r.still_valid is True for r in records.values())
    assert summary["valid_success_rate"]["value"] == pytest.approx(100 * valid / attacked)


def test_a_finished_run_is_not_run_again_unless_asked(trained: Path, undisturbed: Path) -> None:
    before = (undisturbed / "records.jsonl").stat().st_mtime_ns
    assert "already finished" in attack(trained, undisturbed).stdout
    assert (undisturbed / "records.jsonl").stat().st_mtime_ns == before
    records = by_id(undisturbed / "records.jsonl")
    attack(trained, undisturbed, "rerun=true")
    assert (undisturbed / "records.jsonl").stat().st_mtime_ns > before
    assert by_id(undisturbed / "records.jsonl") == records


def test_records_of_another_configuration_are_refused(trained: Path, undisturbed: Path) -> None:
    message = one_line(attack(trained, undisturbed, "attack.draws=31", check=False))
    assert "attack.draws: 30 there, 31 asked for" in message
    assert "rerun=true" in message


def test_a_killed_run_goes_on_and_ends_with_the_same_records(trained: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = [*ATTACK, f"folders.train={trained}", f"out={out}", "tracker=wandb", "dataset.test_batch_size=2"]
    command = [sys.executable, "-m", "muroan.cli", "attack", *options, "engine.batch_size=8"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=-1, stderr=-1)
    part = out / "records.part-0.jsonl"
    wait_for_lines(part, 5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    written = part.read_bytes().count(b"\n")
    assert 5 <= written < 40, "the run was not killed midway"
    assert not (out / "records.jsonl").exists()
    with part.open("a") as file:
        file.write('{"id": "test-')  # a line that the kill cut short
    # Other batch sizes may finish the job: records do not depend on them.
    attack(trained, out, tracker="wandb")
    assert by_id(out / "records.jsonl") == by_id(undisturbed / "records.jsonl")
    assert not part.exists()
    # Both starts are one run of Weights & Biases, which `wandb sync` puts together.
    starts = list(out.glob("wandb/offline-run-*"))
    assert len(starts) == 2
    assert {start.name.split("-")[-1] for start in starts} == {(out / "wandb-id").read_text().strip()}


def test_two_processes_write_the_records_of_one(trained: Path, undisturbed: Path, tmp_path: Path) -> None:
    # As the second job of a sweep, which must not inherit the first one's processes.
    folders = f"folders.attack='{tmp_path}/${{attack.draws}}'"
    options = [o for o in ATTACK if "draws" not in o and "device" not in o]
    sweep = ("attack.draws=2,30", "device=ddp_cpu", folders, f"folders.train={trained}")
    muroan("attack", "-m", *options, *sweep, cwd=tmp_path)
    assert len(by_id(tmp_path / "2/records.jsonl")) == 40
    run = tmp_path / "30"
    assert by_id(run / "records.jsonl") == by_id(undisturbed / "records.jsonl")
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert json.loads((run / "summary.json").read_text()) == summary
    # What Lightning logged is summed over both processes.
    with (run / "version_0/metrics.csv").open() as file:
        *running, logged_metrics = csv.DictReader(file)
    assert [int(row["step"]) for row in running] == list(range(1, len(running) + 1))
    assert 15 < len(running) < 25, "running figures are of the first process's share"
    for name in ("attack_success_rate", "robust_accuracy", "decoupled_fraction_median", "queries"):
        assert float(logged_metrics[f"attack/{name}"]) == pytest.approx(summary[name]["value"], rel=1e-5)


def test_searches_in_other_processes_write_the_same_records(trained: Path, tmp_path: Path) -> None:
    """Of an attack in the jobs of a sweep, which run in processes themselves."""
    options = (*SMALL, "dataset.test_limit=12", "attack=decoupling", "threat_model.max_queries=60", "seed=0")
    swept = f"folders.attack='{tmp_path}/${{engine.search_processes}}'", f"folders.train={trained}", "tracker=none"
    jobs = "engine.search_processes=0,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"
    muroan("attack", "-m", *options, *swept, *jobs, cwd=tmp_path)
    alone, apart = (by_id(tmp_path / number / "records.jsonl") for number in "02")
    assert len(alone) == 12
    assert apart == alone


@pytest.mark.slow
def test_a_killed_training_goes_on(tmp_path: Path) -> None:
    options = [*SMALL, "training.epochs=4", "dataset.test_limit=32", f"folders.train={tmp_path / 'model'}"]
    command = [sys.executable, "-m", "muroan.cli", "train", *options]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=-1, stderr=-1)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (tmp_path / "model/last.ckpt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "model/summary.json").exists()
    done = muroan("train", *options, cwd=tmp_path)
    assert "Epoch 0" not in done.stderr + done.stdout
    assert (tmp_path / "model/summary.json").exists()
    before, after = (tmp_path / f"model/version_{i}/metrics.csv" for i in range(2))
    assert before.exists()  # what was logged before the kill is still there
    assert after.exists()
    assert "already trained" in muroan("train", *options, cwd=tmp_path).stdout


def test_installed_wheel_in_an_empty_folder(trained: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    built, site, work = tmp_path / "built", tmp_path / "site", tmp_path / "work"
    work.mkdir()
    source = tmp_path / "source"  # a copy, so that building leaves nothing in the checkout
    copy_tracked(source)
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", built, source], check=True)
    (wheel,) = built.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    env = {"PYTHONPATH": str(site)}
    where = "import muroan; print(muroan.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=work, env=environment(**env), capture_output=True, text=True
    )
    assert found.stdout.startswith(str(site))
    options = (*SMALL, "dataset.test_limit=12", f"folders.train={trained}")
    muroan("attack", *options, cwd=work, **env)
    muroan("report", cwd=work, **env)
    assert (work / "outputs/report/report.html").read_text().count("<svg") > 0
    assert (work / "outputs/report/table.md").exists()


def copy_tracked(to: Path) -> None:
    """Copy what git knows of the checkout, changes included."""
    import shutil

    names = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(names, check=True, capture_output=True, text=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
