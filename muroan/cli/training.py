"""The commands that train: `train` and `harden`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from muroan.cli.jobs import identity, of
from muroan.cli.parts import (
    ANEW,
    ablation_options,
    begin_tracking,
    build,
    check_switches,
    check_texts,
    find_checkpoint,
    other_training,
    tracker,
    trainer_options,
    versions,
)
from muroan.errors import MuroanError, check_whole

log = logging.getLogger("muroan")


def train(config: DictConfig) -> None:
    """Train a target model; `best.ckpt` is the one with the best validation accuracy."""
    from muroan.training.module import MultimodalModule

    check_training(config, "training")
    if already_trained(config, "train"):
        return
    data, model = build(config)
    check_texts(data, model, ("val", "test"))
    module = MultimodalModule(model, **optimisation(config.training))
    fit(config, "train", config.training, data, module, "val/accuracy")


def harden(config: DictConfig) -> None:
    """Retrain a model under a defence; `best.ckpt` is the one with the best robust accuracy on validation samples."""
    from pytorch_lightning.callbacks import Callback

    from muroan.callbacks import RobustValidation, StopEarly
    from muroan.defenses.mmcert import Ablation
    from muroan.training.module import load_weights, weights_hash

    if not config.defense:
        raise MuroanError(f"harden needs a defence, such as defense=adversarial_training: {', '.join(of('defense'))}")
    options = config.hardening
    check_training(config, "hardening")
    if config.checkpoint:
        raise MuroanError(
            f"checkpoint names the model to attack: to harden another than what was trained, "
            f"hardening.start={config.checkpoint}"
        )
    if already_trained(config, "harden"):
        return
    if options.start not in ("trained", "scratch") and not Path(str(options.start)).is_file():
        raise MuroanError(f"hardening.start must be trained, scratch or a checkpoint, got {options.start!r}")
    data, model = build(config)
    start = None if options.start == "scratch" else Path(options.start)
    if options.start == "trained":
        start = find_checkpoint(config, model, option="hardening.start")
    if start is not None:
        load_weights(model, start)
        begin_from(config, start, told_weights(start) or weights_hash(model))
    check_texts(data, model, ("val", "test"))
    if "keep" in config.defense:
        check_texts(data, model, ("train", "val", "test"), Ablation(model.modalities, **ablation_options(config)))
    if config.rerun and config.defense.get("folder"):
        forget_set(Path(config.defense.folder))
    threat_model = instantiate(options.threat_model)
    defense = instantiate(config.defense)
    try:
        module = defense(model=model, threat_model=threat_model, seed=config.seed, **optimisation(options))
    except TypeError as error:  # an option that it does not have
        raise MuroanError(f"{HydraConfig.get().runtime.choices['defense']} cannot be made: {error}") from None
    callbacks: list[Callback] = []
    monitor = "val/accuracy"
    if options.samples and not module.voting:
        monitor = "val/robust_accuracy"
        judge = instantiate(options.attack)
        callbacks.append(RobustValidation(judge, options.samples, threat_model, config.engine.batch_size, config.seed))
    callbacks.append(StopEarly(monitor, mode="max", patience=options.patience))
    fit(config, "harden", options, data, module, monitor, callbacks, start)


def optimisation(options: DictConfig) -> dict[str, Any]:
    """Those of the options of a training that its module takes."""
    return {key: options[key] for key in ("lr", "weight_decay", "warmup")}


def check_training(config: DictConfig, section: str) -> None:
    """Refuse what cannot be trained with.

    Raises:
        MuroanError: a number that nothing can be trained with; a type of number that the optimiser makes NaN of.
    """
    check_switches(config)  # before rerun=no is taken for a yes
    options = config[section]
    whole = {"epochs": 1, "batches": 1, "samples": 0, "patience": 0}
    for name, least in whole.items():
        value = options.get(name, least)
        if value is None and name == "batches":
            continue
        check_whole(section, least, **{name: value})
    for name in ("lr", "weight_decay", "warmup", "clip"):
        value = options[name]
        if value is None and name == "clip":
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise MuroanError(f"{section}.{name} must be a number, got {value!r}")
        if value < 0 or (name == "lr" and value == 0) or (name == "warmup" and value > 1):
            ends = {"lr": "above 0", "warmup": "0 to 1"}.get(name, "0 or more")
            raise MuroanError(f"{section}.{name} must be {ends}, got {value}")
    if config.device.precision == "16-true":
        raise MuroanError(
            "device.precision=16-true is too narrow to train in: choose 16-mixed, bf16-mixed or bf16-true (to attack "
            "in 16-true, train in another one and name its checkpoint=FILE)"
        )


def forget_set(folder: Path) -> None:
    """Remove the adversarial set of an offline training that is run again."""
    for file in (*folder.glob("*-*.pt"), folder / "set.json"):
        file.unlink(missing_ok=True)


def already_trained(config: DictConfig, command: str) -> bool:
    """Whether the folder holds this training, done; else it is claimed for it.

    Raises:
        MuroanError: the folder holds another training, or one that left samples out where none shall be.
    """
    from muroan.results import read_json, write_json

    out = Path(config.out)
    if config.rerun:
        for name in ("identity.json", "summary.json", "last.ckpt"):
            (out / name).unlink(missing_ok=True)
    if differing := other_training(out, identity(config, command)):
        raise MuroanError(
            f"{out} holds another training ({differing}): choose another folder with out=..., or start anew with "
            f"rerun=true"
        )
    if (out / "summary.json").exists() and (out / "best.ckpt").exists():
        summary = read_json(out / "summary.json", ANEW)
        left_out = left_out_of(summary)
        if left_out and not config.dataset.get("skip_bad"):
            raise MuroanError(
                f"{out} holds a training without samples that could not be read ({left_out}): start anew with "
                f"rerun=true, or take it as it is with dataset.skip_bad=true"
            )
        _check_start(out, summary)
        if left_out:
            log.warning("trained without samples that could not be read: %s", left_out)
        log.info("already trained: %s (rerun=true trains again)", out / "best.ckpt")
        return True
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").unlink(missing_ok=True)  # of a model whose weights are gone
    if not (out / "identity.json").exists():  # one that goes on may have more in it
        write_json(out / "identity.json", {"identity": identity(config, command)})
    return False


def told_weights(checkpoint: Path) -> str | None:
    """The hash of a checkpoint's weights as the training beside it tells; None for one that is not its outcome."""
    beside = checkpoint.parent / "summary.json"
    if checkpoint.name != "best.ckpt" or not beside.is_file():
        return None
    from muroan.results import read_json

    return read_json(beside, f"train that model again ({ANEW})").get("weights")


def begin_from(config: DictConfig, start: Path, weights: str) -> None:
    """Note the weights that a hardening begins from, by the hash that is told of them.

    Raises:
        MuroanError: the folder holds one that is not done and began from others.
    """
    from muroan.results import read_json, write_json

    out = Path(config.out)
    before = read_json(out / "identity.json", ANEW).get("start_weights", weights)
    if (out / "last.ckpt").exists() and before != weights:
        raise MuroanError(_other_start(out, start, before, weights))
    write_json(out / "identity.json", {"identity": identity(config, "harden"), "start_weights": weights})


def _check_start(out: Path, summary: Mapping[str, Any]) -> None:
    """Refuse to take a finished hardening for one of a model that was trained again since, to other weights."""
    start, before = summary.get("start"), summary.get("start_weights")
    if start is None or before is None:
        return
    weights = told_weights(Path(start))
    if weights not in (None, before):
        raise MuroanError(_other_start(out, Path(start), before, weights))


def _other_start(out: Path, start: Path, before: str, now: object) -> str:
    return (
        f"{out} holds a hardening that began from other weights ({before[:12]}) than {start} has now "
        f"({str(now)[:12]}): start anew with rerun=true, or choose another folder with out=..."
    )


def left_out_of(summary: Mapping[str, Any]) -> str:
    """How many samples a training could not read, as text; empty where it read all."""
    counts = summary.get("unreadable") or {}
    return ", ".join(f"{count} of {split}" for split, count in counts.items() if count)


def fit(
    config: DictConfig,
    command: str,
    options: DictConfig,
    data: Any,
    module: Any,
    monitor: str,
    callbacks: Sequence[Any] = (),
    start: Path | None = None,
) -> None:
    """Train a module, keep its best and last checkpoints, test it, and sum up.

    Args:
        command: whose identity the summary tells.
        options: with `epochs` and `clip`.
        monitor: the logged figure that is highest at the best epoch.
        start: the checkpoint whose weights the model has been given.
    """
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar

    from muroan.defenses.base import Defense
    from muroan.report.tracked import log_model
    from muroan.results import read_json, write_json
    from muroan.training.module import load_weights, read_weights, weights_hash

    out = Path(config.out)
    keep = ModelCheckpoint(out, "best", monitor=monitor, mode="max", enable_version_counter=False)
    latest = ModelCheckpoint(out, "last", enable_version_counter=False)  # of every epoch, be it better or not
    logger = tracker(config)
    trainer = pl.Trainer(
        **trainer_options(config),
        max_epochs=options.epochs,
        limit_train_batches=options.get("batches"),
        gradient_clip_val=options.clip,
        # What judges comes before what keeps and stops by its judgement.
        callbacks=[*callbacks, keep, latest, TQDMProgressBar(refresh_rate=20)],
        logger=logger,
        num_sanity_val_steps=0,
        log_every_n_steps=20,
    )
    begin_tracking(logger, config)
    last = out / "last.ckpt"
    if last.exists():
        try:
            read_weights(last)
        except MuroanError as error:
            raise MuroanError(f"the training cannot go on: {error}; {ANEW}") from None
    trainer.fit(module, data, ckpt_path=last if last.exists() else None)
    cost = module.total_cost() if isinstance(module, Defense) else None
    load_weights(module.model, out / "best.ckpt")
    (metrics,) = trainer.test(module, data, verbose=False)
    if not trainer.is_global_zero:
        return
    best = float(keep.best_model_score)  # type: ignore[arg-type]
    summary: dict[str, Any] = {
        "identity": identity(config, command),
        "accuracy": {"val": best, "test": metrics["test/accuracy"]},
        "weights": weights_hash(module.model),
        "versions": versions(),
    }
    if any(module.unreadable.values()):
        summary["unreadable"] = {split: len(found) for split, found in module.unreadable.items()}
        log.warning("samples that could not be read were left out: %s", left_out_of(summary))
    if cost is not None:
        summary["accuracy"] = {"test": metrics["test/accuracy"]}
        summary["control"] = module.control
        summary["best"] = {"monitor": monitor, "value": best}
        summary |= {"cost": asdict(cost), "start": None if start is None else str(start)}
        summary["start_weights"] = read_json(out / "identity.json", ANEW).get("start_weights")
    log_model(logger, out / "best.ckpt", summary)
    write_json(out / "summary.json", summary)  # last: it says that all is done
    log.info("test accuracy %.1f %%, checkpoint %s", metrics["test/accuracy"], out / "best.ckpt")
