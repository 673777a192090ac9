"""The README's examples are run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, environment, muroan

from muroan.results import read_records

README = (ROOT / "README.md").read_text()
EXAMPLES = {m[2]: m[1] for m in re.finditer(r"```python\n(# (my_\w+\.py)\n.*?)```", README, re.DOTALL)}


def test_there_is_an_example_of_each_kind_under_thirty_lines() -> None:
    assert set(EXAMPLES) == {"my_attack.py", "my_model.py", "my_data.py"}
    assert all(len(text.splitlines()) < 30 for text in EXAMPLES.values())


def test_your_own_model_dataset_and_attack(tmp_path: Path) -> None:
    for name, text in EXAMPLES.items():
        (tmp_path / name).write_text(text)
    targets = {
        "model/bag": "_target_: my_model.Bag\n_partial_: true",
        "dataset/parity": "_target_: my_data.Parity\nbatch_size: 32",
        "attack/longest_words": "_target_: my_attack.LongestWords",
    }
    for name, target in targets.items():
        path = tmp_path / "my_conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(target)
    (command,) = re.findall(r"\$ muroan attack (--config-dir .*)", README)
    chosen = [word for word in command.split() if not word.startswith("attack=")]
    shared = ("training.epochs=1", "device=cpu")
    # Both find the folder of configurations again: the command that a message tells, and a second process.
    told = muroan("attack", *command.split(), *shared, cwd=tmp_path, check=False).stderr
    (first,) = re.findall(r"run `muroan train (.*?)` first", " ".join(told.split()))
    muroan("train", *first.split(), cwd=tmp_path)
    judged = ("attack=decoupling", "attack.valid_only=true")
    refused = muroan("attack", *chosen, *judged, *shared, cwd=tmp_path, check=False).stderr
    assert "attack.valid_only needs a dataset that can tell whether a label is still right" in refused
    muroan("attack", *command.split(), *shared, "device=ddp_cpu", cwd=tmp_path)
    (file,) = tmp_path.glob("outputs/attack/parity-bag-longest_words-*/records.jsonl")
    records = read_records(file)
    assert len(records) == 100
    assert any(r.attacked and r.queries == len(r.regions) for r in records)


def test_from_python(trained: Path, tmp_path: Path) -> None:
    (snippet,) = re.findall(r"```python\n(from pathlib.*?)```", README, re.DOTALL)
    (tmp_path / "outputs/demo").mkdir(parents=True)
    (tmp_path / "outputs/demo/model").symlink_to(trained)
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 20
