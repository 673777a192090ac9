"""What jobs are made of: dataset and model, the checkpoint, the Trainer and the tracker.

What takes seconds to import (torch, Lightning) is imported where it is needed, here and in all commands: help and
unknown choices come at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from muroan.cli.jobs import identity, own_overrides, plain
from muroan.errors import MuroanError

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "32", "64", "bf16", "16")


def versions() -> dict[str, str]:
    packages = ("muroan", "torch", "pytorch-lightning", "transformers", "torchmetrics", "hydra-core", "numpy")
    return {"python": sys.version.split()[0], **{package: metadata.version(package) for package in packages}}


def build(config: DictConfig) -> tuple[Any, Any]:
    """Dataset and model, prepared for each other."""
    import pytorch_lightning as pl

    check_switches(config)
    if not isinstance(config.seed, int) or config.seed < 0:
        raise MuroanError(f"seed must be a whole number, 0 or more, got {config.seed!r}")
    data = instantiate(config.dataset)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    model = instantiate(config.model)(modalities=data.modalities(), num_classes=len(data.classes))
    data.prepare_for(model.modalities)
    return data, model


ANEW = "rerun=true trains anew"  # what helps where a file of a training is damaged
SWITCHES = ("rerun", "certification.smoothed")  # those that are options of no class


def check_switches(config: DictConfig) -> None:
    """Check every option that is on or off: Hydra takes `no` for a word, and Python every word for a yes.

    Raises:
        MuroanError: one is neither true nor false.
    """
    found = {key: OmegaConf.select(config, key) for key in SWITCHES}

    def look(node: Any, key: str) -> None:
        if not isinstance(node, dict):
            return
        for name, value in node.items():
            look(value, f"{key}.{name}" if key else str(name))
        try:
            target = get_object(node["_target_"])
        except Exception:  # there is none, or it is for `instantiate` to say what is wrong with it
            return
        makers = [vars(base)["__init__"] for base in getattr(target, "__mro__", ()) if "__init__" in vars(base)]
        for maker in makers or [target]:  # what a constructor does not name it hands on to the class below
            named = getattr(maker, "__annotations__", {})
            switches = (name for name, kind in named.items() if kind in (bool, "bool") and name in node)
            found.update({f"{key}.{name}": node[name] for name in switches})

    look(OmegaConf.to_container(config, resolve=False), "")
    for key, value in found.items():
        if not isinstance(value, bool) and not str(value).startswith("${"):
            raise MuroanError(f"{key} must be true or false, got {value!r}")


def tracker(config: DictConfig) -> Any:
    """The logger of the job, False for none. What it cannot log after its start, it warns of: records come first."""
    if not config.tracker:
        return False
    from muroan.report.tracked import forgiving

    logger = instantiate(config.tracker)
    logger.log_metrics = forgiving(logger.log_metrics)
    return logger


def begin_tracking(logger: Any, config: DictConfig, weights: str | None = None) -> None:
    """Log the configuration, and the hash of the weights that are attacked or certified.

    Raises:
        MuroanError: Weights & Biases refuses, and there is nothing to lose yet.
    """
    if not logger:
        return
    from wandb.errors import Error

    try:
        logger.log_hyperparams({**plain(config), **({} if weights is None else {"weights": weights})})
    except Error as error:
        reason = str(error).strip().splitlines()[0]
        raise MuroanError(
            f"tracker=wandb cannot start a run ({reason}): `wandb login` first, or set WANDB_MODE=offline, "
            f"or choose another tracker"
        ) from None


def close_trackers(failed: bool = False) -> None:
    """Finish the Weights & Biases run of this job, so that the next job of a sweep gets one of its own."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        from muroan.report.tracked import forgiving

        forgiving(wandb.finish)(exit_code=int(failed))


def trainer_options(config: DictConfig) -> dict[str, Any]:
    """What every Trainer is made with.

    Raises:
        MuroanError: there is no such precision.
    """
    import torch

    if str(config.device.precision) not in PRECISIONS:
        raise MuroanError(f"device.precision must be one of {', '.join(PRECISIONS)}, got {config.device.precision!r}")
    device = plain(config.device)
    device.pop("jobs", None)  # how many share a GPU, which `own_gpu` has seen to
    if device["accelerator"] == "auto" and torch.backends.mps.is_available():
        device["accelerator"] = "cpu"  # what Apple's GPUs cannot do is float64, by which margins are compared
    return {
        **device,
        # The dataset shards itself: Lightning's sampler would repeat samples to make the shards equal.
        "use_distributed_sampler": False,
        "enable_model_summary": False,
        "default_root_dir": config.out,
    }


def ablation_options(config: DictConfig) -> dict[str, Any]:
    """What the chosen defence keeps, as options of `Ablation`.

    Raises:
        MuroanError: no defence is chosen, or one that keeps nothing.
    """
    defense = plain(config.get("defense")) or {}
    if "keep" not in defense:
        raise MuroanError("there is no vote to certify or attack without a defence that ablates: add defense=mmcert")
    return {key: defense[key] for key in ("keep", "element") if key in defense}


def check_texts(data: Any, model: Any, splits: Sequence[str], ablation: Any = None) -> None:
    """Refuse what a text that the model cannot take would end after hours.

    Args:
        ablation: which has to find as many elements in each text as it keeps.

    Raises:
        MuroanError: there is such a text, and no word of skipping it; or one of too few elements.
    """
    from muroan.modalities import Text

    for name, modality in model.modalities.items():
        if not isinstance(modality, Text):
            continue
        for split in splits:
            for text, id in {example.inputs[name]: example.id for example in data.examples(split)}.items():
                try:
                    x, _ = modality.prepare(text)
                except MuroanError as error:
                    if data.skip_bad:
                        continue
                    raise MuroanError(f"sample {id!r} of {split}, {name}: {error}") from None
                if ablation is not None:
                    ablation.check(name, int(ablation.elements(name, x[None]).sum()), f" in sample {id!r} of {split}")


def find_checkpoint(config: DictConfig, model: Any, defense: Any = None, option: str = "checkpoint") -> Path | None:
    """The checkpoint to attack, or to harden; None for a model that comes trained.

    Args:
        defense: what the model shall have been hardened by; None for the model as `train` leaves it.
        option: by which another one can be named.

    Raises:
        MuroanError: there is none, or another one; the message says how to train one.
    """
    if config.checkpoint:
        checkpoint = Path(config.checkpoint)
        # A vote over ablations may be one of any model.
        if defense and "keep" not in defense and (differing := other_hardening(checkpoint, config)):
            raise MuroanError(
                f"checkpoint={checkpoint} is of a model that no defense={HydraConfig.get().runtime.choices['defense']} "
                f"has hardened ({differing}): give the options that it was hardened with, attack it without a defense, "
                f"or leave the checkpoint out"
            )
        return checkpoint
    command, state = ("harden", "hardened") if defense else ("train", "trained")
    words = " ".join([f"muroan {command}", *own_overrides(*trained_without(defense))])
    trained = Path(config.folders[command]) / "best.ckpt"
    if trained.is_file():
        if differing := other_training(trained.parent, identity(config, command)):
            raise MuroanError(
                f"{trained} is of another training ({differing}): train this one in another folder, or name the "
                f"checkpoint with {option}=FILE"
            )
        if not (trained.parent / "summary.json").is_file():
            raise MuroanError(
                f"{trained} is of a model that is not {state} to the end: the same command goes on with it, "
                f"`{words}`, or name it with {option}=FILE"
            )
        return trained
    if not defense and model.pretrained:
        return None
    raise MuroanError(f"no {state} model in {trained.parent}: run `{words}` first, or name one with {option}=FILE")


def trained_without(defense: Any) -> list[str]:
    """The groups of options of an attack that the training of its model does not have."""
    without = ["attack", "out", "threat_model", "engine", "certification", "sweep"]
    return without if defense else [*without, "defense", "hardening", "attack@defense", "attack@hardening"]


def other_hardening(checkpoint: Path, config: DictConfig) -> str:
    """In what the hardening that is told of beside a checkpoint differs from the chosen one."""
    return other_training(checkpoint.parent, identity(config, "harden"), ("defense", "hardening"))


def other_training(folder: Path, own: Mapping[str, Any], groups: Sequence[str] = ()) -> str:
    """In what the training that a folder holds differs from one's own; nothing where it does not, or holds none.

    Args:
        groups: of options; all of them where none is named.
    """
    from muroan.results import read_json, what_differs

    for name in ("identity.json", "summary.json"):
        if (folder / name).exists():
            told = read_json(folder / name, ANEW)
            known, asked = told.get("identity", told), json.loads(json.dumps(own))
            if groups:
                known, asked = ({key: each.get(key) for key in groups} for each in (known, asked))
            return what_differs(known, asked)
    return ""


def load_trained(config: DictConfig, model: Any) -> Path | None:
    """Give a model the weights that it is attacked with; returns the checkpoint that they are from."""
    from muroan.training.module import load_weights

    checkpoint = find_checkpoint(config, model, config.defense)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return checkpoint
