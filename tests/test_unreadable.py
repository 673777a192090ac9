"""Samples that cannot be read: left out where that is asked for, counted, said, and tried again when they can be."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import muroan
from PIL import Image

from muroan.callbacks import RecordingCallback
from muroan.errors import MuroanError
from muroan.results import RunFolder, read_records

CHOSEN = ("dataset=manifest", "dataset.classes=[a,b]", "dataset.text=text", "dataset.image=picture")
CHOSEN += ("dataset.image_size=[8,8]", "model=late_fusion", "training.epochs=1", "device=cpu", "tracker=none")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pictures and words, six in a split."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "val", "test"):
        rows = [{"picture": f"{split}{i}.png", "text": f"word {i}", "label": "ab"[i % 2]} for i in range(6)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for row in rows:
            Image.new("RGB", (8, 8), (40, 90, 200)).save(folder / row["picture"])
    return folder


def told(done) -> str:
    return " ".join((done.stdout + done.stderr).split())


def spoil(data: Path, split: str, count: int = 6) -> None:
    for i in range(count):
        (data / f"{split}{i}.png").write_bytes(b"no picture")


def mend(data: Path, split: str) -> None:
    for i in range(6):
        Image.new("RGB", (8, 8), (40, 90, 200)).save(data / f"{split}{i}.png")


def train(data: Path, *more: str, check: bool = True):
    out = f"out={data.parent / 'model'}"
    return muroan("train", *CHOSEN, f"dataset.root={data}", out, *more, cwd=data.parent, check=check)


def attack(data: Path, *more: str, check: bool = True):
    words = ["attack=random_removal", f"checkpoint={data.parent / 'model/best.ckpt'}", f"out={data.parent / 'run'}"]
    return muroan("attack", *CHOSEN, f"dataset.root={data}", *words, *more, cwd=data.parent, check=check)


def test_a_training_says_what_it_left_out(data: Path) -> None:
    spoil(data, "train", 2)
    spoil(data, "test", 1)
    done = train(data, "dataset.skip_bad=true")
    assert "samples that could not be read were left out: 2 of train, 1 of test" in told(done)
    summary = json.loads((data.parent / "model/summary.json").read_text())
    assert summary["unreadable"] == {"train": 2, "val": 0, "test": 1}
    (data.parent / "model/summary.json").unlink()  # as if it was killed during the test
    train(data, "dataset.skip_bad=true")
    assert json.loads((data.parent / "model/summary.json").read_text())["unreadable"] == summary["unreadable"]
    again = told(train(data, "dataset.skip_bad=true"))
    assert "trained without samples that could not be read: 2 of train, 1 of test" in again
    assert "already trained" in again
    mend(data, "train")
    mend(data, "test")
    refused = train(data, check=False)
    assert "holds a training without samples that could not be read (2 of train, 1 of test): start anew" in told(
        refused
    )
    assert "Traceback" not in refused.stderr
    train(data, "rerun=true")
    assert "unreadable" not in json.loads((data.parent / "model/summary.json").read_text())


def test_processes_count_what_neither_could_read_once(data: Path) -> None:
    """A sample comes to another one in every epoch."""
    spoil(data, "train", 2)
    spoil(data, "val", 1)
    spoil(data, "test", 3)
    train(data, "dataset.skip_bad=true", "device=ddp_cpu", "training.epochs=6")
    summary = json.loads((data.parent / "model/summary.json").read_text())
    assert summary["unreadable"] == {"train": 2, "val": 1, "test": 3}
    attack(data, "dataset.skip_bad=true", "device=ddp_cpu")
    assert len(read_records(data.parent / "run/records.jsonl")) == 3


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_training_on_nothing_is_none(data: Path, split: str) -> None:
    spoil(data, split)
    done = train(data, "dataset.skip_bad=true", check=False)
    assert done.returncode == 1
    assert f"no sample of {split} could be read, of 6; the first: sample '{split}-" in told(done)
    assert "Traceback" not in done.stderr
    assert not (data.parent / "model/summary.json").exists()
    mend(data, split)
    train(data)
    assert (data.parent / "model/summary.json").exists()


def test_an_attack_goes_on_when_samples_can_be_read(data: Path) -> None:
    train(data)
    spoil(data, "test", 2)
    done = told(attack(data, "dataset.skip_bad=true"))
    assert "4 samples (2 more could not be read), 95 % intervals: clean accuracy" in done
    again = told(attack(data, "dataset.skip_bad=true"))
    assert "left 2 samples out that could not be read (dataset.skip_bad=false tries them again)" in again
    assert "already finished" in again
    before = {r.id: r.to_json() for r in read_records(data.parent / "run/records.jsonl")}
    refused = attack(data, check=False)
    assert "left 2 samples out that could not be read: trying them again" in told(refused)
    assert "sample 'test-0', image: image file" in told(refused), "they still cannot be"
    run, summary = data.parent / "run/run.json", data.parent / "run/summary.json"
    assert [id for id, _ in json.loads(run.read_text())["unreadable"]] == ["test-0", "test-1"]
    assert not summary.exists(), "there are to be more records than it tells of"
    assert "4 samples (2 more could not be read)" in told(attack(data, "dataset.skip_bad=true"))
    assert [id for id, _ in json.loads(run.read_text())["unreadable"]] == ["test-0", "test-1"]
    assert summary.exists()
    mend(data, "test")
    done = told(attack(data))
    assert "6 samples, 95 % intervals" in done
    after = {r.id: r.to_json() for r in read_records(data.parent / "run/records.jsonl")}
    assert len(after) == 6
    assert before.items() <= after.items()
    assert "unreadable" not in json.loads((data.parent / "run/run.json").read_text())
    assert "already finished" in told(attack(data))


def test_an_attack_on_nothing_is_none(data: Path) -> None:
    train(data)
    spoil(data, "test")
    done = attack(data, "dataset.skip_bad=true", check=False)
    assert done.returncode == 1
    assert "no test sample could be read, of 6; the first: sample 'test-0', image: image file" in told(done)
    assert "Traceback" not in done.stderr
    mend(data, "test")
    assert "6 samples, 95 % intervals" in told(attack(data))


@pytest.mark.parametrize("why", ["", "sample 'test-0': torn"])
def test_only_the_first_process_reads_the_folder_that_it_merges(why: str, tmp_path: Path) -> None:
    """The others would find parts that it has begun to remove; all stop alike where nothing was read."""
    callback = RecordingCallback("x", RunFolder, tmp_path / "no folder of this process's", {}, progress=False)
    callback.total, callback._folder = 6, None  # type: ignore[assignment]
    strategy = SimpleNamespace(barrier=lambda name: None, broadcast=lambda own: why)
    trainer: Any = SimpleNamespace(is_global_zero=False, strategy=strategy)
    stopped = pytest.raises(MuroanError, match="no test sample could be read, of 6; the first: sample")
    with stopped if why else nullcontext():
        callback.finish(trainer)
