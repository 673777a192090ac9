"""The rules that keep the tree simple: who imports whom, and one list of dependencies."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# docs/architecture.md: a module imports only from those before it.
ORDER = ["errors", "files", "modalities", "data", "models", "attacks", "results", "device_store"]
ORDER += ["search_processes", "engine", "metrics", "callbacks", "training", "defenses", "certification", "runs"]
ORDER += ["transfer", "report", "cli"]
FILES = sorted((ROOT / "muroan").rglob("*.py"))


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_one_way(file: Path) -> None:
    parts = file.relative_to(ROOT / "muroan").with_suffix("").parts
    names = imported(file)
    if parts[0] != "cli":
        assert not {n for n in names if n.split(".")[0] in ("hydra", "omegaconf")}, "only cli imports Hydra"
    assert not {n for n in names if n.split(".")[0] in ("torchvision", "timm")}
    if parts[0] == "__init__":
        return
    for name in names:
        if name.startswith("muroan."):
            assert ORDER.index(name.split(".")[1]) <= ORDER.index(parts[0]), f"{name} comes after {parts[0]}"


def test_environment_installs_the_package_and_lists_nothing_twice() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = {line.split(">")[0] for line in setup["options"]["install_requires"].split()}
    assert required >= {
        "torch",
        "pytorch-lightning",
        "hydra-core",
        "omegaconf",
        "torchmetrics",
        "wandb",
        "transformers",
    }
    lines = [line.strip() for line in (ROOT / "environment.yml").read_text().splitlines()]
    installed = [line.removeprefix("- ") for line in lines[lines.index("- pip:") + 1 :]]
    assert installed == ["-c constraints.txt", "-e ."]
    assert not [line for line in lines if any(line.startswith(f"- {name}") for name in required)]


def test_every_package_is_installed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = {".".join(f.parent.relative_to(ROOT).parts) for f in (ROOT / "muroan").rglob("__init__.py")}
    assert set(setup["options"]["packages"].split()) == folders | {"muroan.conf"}


def test_constraints_pin_what_is_required() -> None:
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"}
    assert pinned >= {"torch", "pytorch-lightning", "hydra-core", "omegaconf", "torchmetrics", "wandb", "transformers"}


def test_a_notebook_needs_neither_hydra_nor_lightning() -> None:
    code = "import sys, muroan; muroan.evaluate; print({'hydra', 'omegaconf', 'pytorch_lightning'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
