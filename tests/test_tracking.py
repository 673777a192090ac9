"""Sweeps: what a job leaves in Weights & Biases, and the launchers that run several jobs at once."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import wandb
from conftest import SMALL, muroan
from omegaconf import OmegaConf
from pytorch_lightning.loggers import CSVLogger, WandbLogger

from muroan import cli
from muroan.cli import parts
from muroan.errors import MuroanError
from muroan.report.tracked import log_model
from muroan.results import read_records

cli_group = pytest.mark.xdist_group("cli")  # those that share the trained model share a worker


@dataclass
class OfflineRun:
    """What the folder of an offline run holds; values are JSON, artifacts are type -> path -> local file."""

    folder: Path
    group: str = ""
    run_id: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, dict[str, Path]] = field(default_factory=dict)
    exit_code: int | None = None

    @classmethod
    def of(cls, job: Path) -> OfflineRun:
        """The only run below a job's folder."""
        from wandb.proto import wandb_internal_pb2

        (log,) = job.glob("wandb/offline-run-*/run-*.wandb")
        run = cls(log.parent)
        for data in leveldb_records(log.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                run.group, run.run_id = record.run.run_group, record.run.run_id
            if record.HasField("history"):
                items = record.history.item
                run.history.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
            for update in (*record.config.update, *record.run.config.update):
                run.config[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
            for update in record.summary.update:
                run.summary[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
            artifact = record.artifact if record.HasField("artifact") else record.request.log_artifact.artifact
            if artifact.type:
                files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
                run.artifacts.setdefault(artifact.type, {}).update(files)
            if record.HasField("exit"):
                run.exit_code = record.exit.exit_code
        return run

    def steps(self, metric: str) -> dict[int, float]:
        """A metric by the step that it is drawn over."""
        return {entry["trainer/global_step"]: entry[metric] for entry in self.history if metric in entry}


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log: 32 KiB blocks of pieces with a checksum, a length and a type each."""
    at, record = 7, b""  # W&B's own header
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # too little room for a piece: the block was padded
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            yield record
            record = b""


@cli_group
def test_a_training_is_a_run_with_its_checkpoint(trained: Path) -> None:
    run = OfflineRun.of(trained)
    assert run.config["training"]["epochs"] == 2
    assert run.config["command"] == "train"
    assert run.group == ""  # no sweep
    losses = run.steps("train/loss")
    assert list(losses) == [19, 39, 59, 79]  # 80 steps; every 20th is logged
    assert list(run.steps("val/accuracy")) == list(run.steps("val/loss")) == [39, 79]
    summary = json.loads((trained / "summary.json").read_text())
    assert list(run.steps("test/accuracy").values()) == [pytest.approx(summary["accuracy"]["test"])]
    assert run.artifacts["model"] == {"best.ckpt": trained / "best.ckpt"}
    assert run.exit_code == 0


@pytest.fixture(scope="module")
def sweep(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Three jobs on two processes, the first of which is refused."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher.joblib_launcher")
    folder = tmp_path_factory.mktemp("sweep")
    options = (*SMALL, "dataset.test_limit=12", f"folders.train={trained}", "engine.keep_media=6", "tracker=wandb")
    runs = "folders.attack='jobs/${attack.draws}'"
    swept = ("attack=random_removal", "attack.draws=0,20,30", "hydra/launcher=joblib")
    return folder / "jobs", muroan("attack", "-m", *options, runs, *swept, cwd=folder, check=False)


@cli_group
def test_a_refused_job_is_one_line_and_stops_no_other(sweep) -> None:
    folder, done = sweep
    assert done.returncode == 1
    message = "muroan attack: attack.draws must be a whole number, at least 1, got 0"
    assert done.stderr.splitlines()[-1] == message
    assert not any(word in done.stderr for word in ("Traceback", "ConfigStore schema"))
    assert not (folder / "0/run.json").exists()
    for draws in (20, 30):
        assert len(read_records(folder / f"{draws}/records.jsonl")) == 12


@cli_group
def test_a_sweep_is_a_group_and_each_job_a_run(sweep, trained: Path) -> None:
    folder, _ = sweep
    runs = {draws: OfflineRun.of(folder / str(draws)) for draws in (20, 30)}
    assert runs[20].run_id != runs[30].run_id
    assert runs[20].group == runs[30].group
    assert re.fullmatch(r"attack-[0-9a-f]{6}", runs[20].group)
    for draws, run in runs.items():
        job = folder / str(draws)
        assert run.exit_code == 0
        assert run.config["attack"]["draws"] == draws
        for name in ("clean_accuracy", "robust_accuracy", "attack_success_rate", "queries"):
            running, final = run.steps(f"running/{name}"), run.steps(f"attack/{name}")
            assert list(running) == list(range(1, 13)), "a point a sample, in their order"
            assert final == {12: pytest.approx(running[12])}, "after the last of them"
        weights = json.loads((job / "run.json").read_text())["checkpoint"]["sha256"]
        assert run.config["weights"] == weights
        assert run.artifacts["model"] == {"best.ckpt": trained / "best.ckpt"}
        assert set(run.artifacts["records"]) == {"records.jsonl", "run.json"}
        for name, file in run.artifacts["records"].items():
            assert file == job / name
        table = json.loads(next(run.folder.glob("files/media/table/*.json")).read_text())
        assert {"id", "image", "text", "status"} <= set(table["columns"])
        pictures = [file for path, file in run.artifacts["run_table"].items() if path.endswith(".png")]
        assert len(pictures) == len(table["data"]) > 0
        for picture in pictures:
            assert picture.is_relative_to(job), "the job's folder holds all that there is to upload"
            assert picture.read_bytes().startswith(b"\x89PNG")


@cli_group
def test_a_certification_is_a_run_with_its_certificates(trained: Path, tmp_path: Path) -> None:
    few = ("dataset.test_limit=4", "certification.samples=40", "certification.selection=10", f"out={tmp_path / 'c'}")
    muroan("certify", *SMALL, f"folders.train={trained}", "defense=mmcert", *few, "tracker=wandb",
           f"checkpoint={trained / 'best.ckpt'}", cwd=tmp_path)  # fmt: skip
    run = OfflineRun.of(tmp_path / "c")
    assert set(run.artifacts["certificates"]) == {"certificates.jsonl", "run.json", "summary.json"}
    assert run.config["command"] == "certify"
    told = json.loads((tmp_path / "c/summary.json").read_text())
    assert [run.summary[f"summary/{key}"] for key in ("samples", "accuracy")] == [4, told["accuracy"]]
    assert next(run.folder.glob("files/media/images/certified*.png")).read_bytes().startswith(b"\x89PNG")
    assert run.exit_code == 0


def test_a_sweep_keeps_its_name_when_it_is_started_again() -> None:
    name = cli.sweep_name("attack", ["seed=0,1", "attack=decoupling", "attack.patience=3"])
    again = ["hydra/launcher=joblib", "attack=decoupling", "+hydra.launcher.verbose=1", "attack.patience=3", "seed=0,1"]
    assert cli.sweep_name("attack", [*again, "device=gpu", "device.precision=32-true", "tracker.project=x"]) == name
    assert cli.sweep_name("train", again) != name
    assert cli.sweep_name("attack", [*again, "seed=2"]) != name


class Broken(CSVLogger):
    """A tracker that cannot log."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        raise OSError("no room left")


def test_a_tracker_that_breaks_costs_no_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = OmegaConf.create({"tracker": {"_target_": "test_tracking.Broken", "save_dir": str(tmp_path)}})
    with caplog.at_level(logging.WARNING):
        parts.tracker(config).log_metrics({"attack/queries": 1.0}, step=3)
    assert "not tracked, and the job goes on: OSError: no room left" in caplog.text
    # A file that is not there stands for all that an upload may meet.
    log_model(Refusing(save_dir=str(tmp_path)), tmp_path / "best.ckpt", {})
    assert "no API key" in caplog.text


class Refusing(WandbLogger):
    """Weights & Biases without a login."""

    @property
    def experiment(self) -> Any:
        raise wandb.errors.UsageError("no API key\nand more")


def test_wandb_without_a_login_is_told_before_there_is_anything_to_lose(tmp_path: Path) -> None:
    with pytest.raises(MuroanError, match=r"tracker=wandb cannot start a run \(no API key\): `wandb login` first"):
        parts.begin_tracking(Refusing(save_dir=str(tmp_path)), OmegaConf.create({"seed": 0}))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["hydra.launcher._target_=hydra_plugins.hydra_absent_launcher.launcher.AbsentLauncher"],
            "this launcher is not installed: pip install -e '.[absent]'",
        ),
        pytest.param(
            ["hydra/launcher=submitit_slurm"],
            "there is no SLURM here (no srun): hydra/launcher=submitit_local tries a sweep out",
            marks=pytest.mark.skipif(not find_spec("submitit"), reason="needs muroan[submitit]"),
        ),
    ],
)
def test_a_launcher_that_cannot_run_is_one_line(overrides, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # `main` sets it: this puts it back
    monkeypatch.setattr(sys, "argv", ["muroan", "attack", "-m", *overrides])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == f"muroan attack: {message}"


@pytest.mark.slow
@cli_group
@pytest.mark.parametrize("name", ["ray", "submitit_local"])
def test_other_launchers_run_the_jobs_too(name: str, sweep, trained: Path, tmp_path: Path) -> None:
    pytest.importorskip(name.split("_")[0])
    options = (*SMALL, "dataset.test_limit=12", f"folders.train={trained}", "engine.keep_media=6", "tracker=csv")
    swept = ("attack=random_removal", "attack.draws=20,30", f"hydra/launcher={name}")
    muroan("attack", "-m", *options, "folders.attack='jobs/${attack.draws}'", *swept, cwd=tmp_path)
    for draws in (20, 30):
        records = (f"jobs/{draws}/records.jsonl", f"{draws}/records.jsonl")
        assert (tmp_path / records[0]).read_bytes() == (sweep[0] / records[1]).read_bytes()
