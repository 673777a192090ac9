"""What several test files share: running the real command, and a model that it trained."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A command is a process of its own, but a fork of one that has imported all that is slow to import: that takes longer
# than most of what the tests ask of it. Tests that need a real one (signals, an installed wheel) start it themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["muroan.cli", "muroan.callbacks", "muroan.report.tracked", "muroan.models.huggingface"])


def environment(**more: str) -> dict[str, str]:
    """The environment of a command of a user: one thread a process, no tracking service."""
    quiet = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **quiet, **more}


def muroan(*arguments: object, cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `muroan ARGUMENTS` in a folder, as a process of its own."""
    words = ["muroan", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        texts = [Path(folder) / name for name in ("out", "err")]
        process = FORKS.Process(target=_command, args=(words, cwd, environment(**env), *texts))
        process.start()
        process.join(timeout=300)
        if process.exitcode is None:
            process.kill()
            process.join()
        out, err = (text.read_text() for text in texts)
    done = subprocess.CompletedProcess(words, process.exitcode or 0, out, err)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(words)} exited with {done.returncode}:\n{out}\n{err}")
    return done


def _command(words: list[str], cwd: Path, env: dict[str, str], out: Path, err: Path) -> None:
    """What the forked process does: all that starting Python for it would have done."""
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    warnings.simplefilter("ignore")  # PYTHONWARNINGS is read when Python starts
    sys.argv = words
    try:
        runpy.run_module("muroan.cli", run_name="__main__", alter_sys=True)
    finally:
        threading._shutdown()  # as when Python ends: a launcher stops its processes here
        atexit._run_exitfuncs()


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
