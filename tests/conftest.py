"""What several test files share: running the real command, and a model that it trained."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def environment(**more: str) -> dict[str, str]:
    """The environment of a command of a user: one thread a process, no tracking service."""
    quiet = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **quiet, **more}


def muroan(*arguments: object, cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `muroan ARGUMENTS` in a folder, as a process of its own."""
    command = [sys.executable, "-m", "muroan.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=300)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


# Fixtures of a module that take long to make: the tests that use one run in one process.
SHARED = ("undisturbed", "attacked", "hardened")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Other tests go to whichever process is free: a process trains the session's model once, whatever it is given."""
    for item in items:
        for name in SHARED:
            if name in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group(name))


# A model that learns in seconds: enough for attacks to have something to flip, not enough to be good.
SMALL = ("dataset.train_limit=2500", "dataset.val_limit=64", "training.epochs=2", "training.lr=3e-3", "device=cpu")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training run on a part of easy-VQA."""
    folder = tmp_path_factory.mktemp("trained")
    muroan("train", *SMALL, "dataset.test_limit=32", f"folders.train={folder / 'model'}", "tracker=wandb", cwd=folder)
    return folder / "model"
