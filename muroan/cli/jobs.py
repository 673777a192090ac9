"""A job: its configuration, the part of it that decides the outcome, and the folder that the outcome is kept in."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from muroan.errors import MuroanError

# Options that do not change what a record says: they are no part of a run's identity.
LOADING = ("num_workers", "batch_size", "test_batch_size", "root", "skip_bad", "obtain")


def config_folder() -> Path:
    """The folder `conf`: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).parent.parent
    return next(f for f in (package.parent / "conf", package / "conf") if (f / "config.yaml").is_file())


def of(group: str) -> list[str]:
    """What can be chosen in a group."""
    return sorted(file.stem for file in (config_folder() / group).glob("*.yaml"))


def told(error: BaseException) -> str:
    """The message of an error; what Hydra adds on its search path is of use to Hydra's authors."""
    return str(error).split("Config search path:")[0].strip()


def plain(config: Any, resolve: bool = True) -> Any:
    return OmegaConf.to_container(config, resolve=resolve) if OmegaConf.is_config(config) else config


def folders(chosen: Any, option: str = "runs") -> list[Path]:
    """The folders that an option names: a list of them, or one.

    Raises:
        MuroanError: it names something else.
    """
    names = [chosen] if isinstance(chosen, str) else chosen
    if (not OmegaConf.is_list(names) and not isinstance(names, list)) or not all(isinstance(n, str) for n in names):
        raise MuroanError(f"{option} must name folders of runs, such as {option}=[outputs/attack], got {chosen!r}")
    return [Path(name) for name in names]


def own_overrides(*without: str) -> list[str]:
    """The overrides of this job as its user would type them, less those of the given keys.

    With where else configurations are looked for: what they name may lie there.
    """
    hydra_config = HydraConfig.get()
    places = [f"--config-dir={s.path}" for s in hydra_config.runtime.config_sources if s.provider == "command-line"]
    places += [o for o in hydra_config.overrides.hydra if o.startswith("hydra.searchpath=")]
    overrides = hydra_config.overrides.task
    own = [o for o in overrides if o.lstrip("+~").split("=")[0].split(".")[0] not in ("command", *without)]
    return [*places, *own]


def identity(config: DictConfig, command: str, resolve: bool = True) -> dict[str, Any]:
    """The part of the configuration that decides what `train` or `harden` learns, or what the others record."""
    own = {
        "train": ("training",),
        "harden": ("training", "defense", "hardening"),
        "attack": ("attack", "threat_model"),
        "certify": (),
    }[command]
    keys = ("model", "dataset", "seed", *own)
    chosen = {key: plain(config[key], resolve) for key in keys}
    judging = command in ("attack", "certify")
    split = ("train_limit", "val_limit") if judging else ("test_limit", "visible")
    chosen["dataset"] = {k: v for k, v in chosen["dataset"].items() if k not in (*LOADING, *split)}
    if listed := content(config.dataset, ("val", "test") if judging else ("train", "val")):
        chosen["dataset"]["content"] = listed
    if command == "harden":
        chosen["start"] = config.checkpoint
        chosen["defense"] = {k: v for k, v in (chosen["defense"] or {}).items() if k != "folder"}
    if judging:
        chosen["precision"] = config.device.precision
    else:
        chosen["batch_size"] = config.dataset.batch_size
    if command == "attack":
        chosen["keep_media"] = config.engine.keep_media
    if command == "certify" or (command == "attack" and config.certification.smoothed):
        options = ("votes",) if command == "attack" else ("samples", "selection", "alpha", "deleted")
        chosen["defense"] = plain(config.get("defense"), resolve)
        chosen["certification"] = {key: plain(config.certification[key], resolve) for key in options}
    return chosen


def content(dataset: DictConfig, splits: Sequence[str]) -> dict[str, str]:
    """Hashes of the files that list the samples of a dataset of the user's own: under one name they may be others."""
    found = {}
    for split in splits:
        file = Path(str(dataset.get("root"))) / str(dataset.get(split))
        if dataset.get("root") and dataset.get(split) and file.is_file():
            found[split] = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    return found


def cell(command: str, *, _root_: DictConfig) -> str:
    """Hash of the part of the configuration that decides a job's outcome, to name its folder."""
    from muroan.results import fingerprint

    chosen = identity(_root_, command, resolve=False)
    if command in ("attack", "certify"):
        trained = "harden" if _root_.defense else "train"
        chosen["trained"] = _root_.checkpoint or identity(_root_, trained, resolve=False)
    return fingerprint(chosen)[:6]


def planned(
    command: str, jobs: Iterable[Sequence[str]], seeds: Sequence[int]
) -> Iterator[list[tuple[Path, dict[str, Any]]]]:
    """Where jobs would keep their results, and the identity that these would have. Nothing is run.

    Args:
        jobs: the overrides of each, without `seed`.

    Yields:
        For each job: folder and identity, one a seed.

    Raises:
        MuroanError: an override that the command would refuse, too, or one with several values.
    """
    with hydra.initialize_config_dir(str(config_folder().absolute()), version_base="1.3"):
        for overrides in jobs:
            try:
                config = hydra.compose("config", [f"command={command}", *overrides], return_hydra_config=True)
            except (HydraException, OmegaConfBaseException) as error:
                raise MuroanError(told(error)) from None
            HydraConfig.instance().set_config(config)
            found = []
            for seed in seeds:
                config.seed = seed
                found.append((Path(config.out), identity(config, command)))
            yield found


OmegaConf.register_new_resolver("cell", cell, replace=True)
OmegaConf.register_new_resolver("absolute", os.path.abspath, replace=True)
