"""The commands, each a function of a job's configuration.

What takes seconds to import (torch, Lightning) is imported where it is needed: help and unknown choices come at once.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from muroan.cli.jobs import identity, of, own_overrides, plain
from muroan.errors import MuroanError

if TYPE_CHECKING:
    from muroan.certification import CertificateFolder
    from muroan.results import AttackResult, RunFolder

log = logging.getLogger("muroan")

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "32", "64", "bf16", "16")


def versions() -> dict[str, str]:
    packages = ("muroan", "torch", "pytorch-lightning", "transformers", "torchmetrics", "hydra-core", "numpy")
    return {"python": sys.version.split()[0], **{package: metadata.version(package) for package in packages}}


def build(config: DictConfig) -> tuple[Any, Any]:
    """Dataset and model, prepared for each other."""
    import pytorch_lightning as pl

    if not isinstance(config.seed, int) or config.seed < 0:
        raise MuroanError(f"seed must be a whole number, 0 or more, got {config.seed!r}")
    data = instantiate(config.dataset)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    model = instantiate(config.model)(modalities=data.modalities(), num_classes=len(data.classes))
    data.prepare_for(model.modalities)
    return data, model


def folders(chosen: Any) -> list[Path]:
    """The folders that an option names: a list of them, or one."""
    return [Path(chosen)] if isinstance(chosen, str) else [Path(folder) for folder in chosen]


def tracker(config: DictConfig) -> Any:
    """The logger of the job, False for none. What it cannot log after its start, it warns of: records come first."""
    if not config.tracker:
        return False
    from muroan.report.tracked import forgiving

    logger = instantiate(config.tracker)
    logger.log_metrics = forgiving(logger.log_metrics)
    return logger


def begin_tracking(logger: Any, config: DictConfig) -> None:
    """Log the configuration.

    Raises:
        MuroanError: Weights & Biases refuses, and there is nothing to lose yet.
    """
    if not logger:
        return
    from wandb.errors import Error

    try:
        logger.log_hyperparams(plain(config))
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
    # The dataset shards itself: Lightning's sampler would repeat samples to make the shards equal.
    device = plain(config.device)
    if device["accelerator"] == "auto" and torch.backends.mps.is_available():
        device["accelerator"] = "cpu"  # what Apple's GPUs cannot do is float64, by which margins are compared
    return {
        **device,
        "use_distributed_sampler": False,
        "enable_model_summary": False,
        "default_root_dir": config.out,
    }


def train(config: DictConfig) -> None:
    """Train a target model; `best.ckpt` is the one with the best validation accuracy."""
    from muroan.training.module import MultimodalModule

    check_training(config, "training")
    if already_trained(config, "train"):
        return
    data, model = build(config)
    check_texts(data, model)
    module = MultimodalModule(model, **optimisation(config.training))
    fit(config, "train", config.training, data, module, "val/accuracy")


def harden(config: DictConfig) -> None:
    """Retrain a model under a defence; `best.ckpt` is the one with the best robust accuracy on validation samples."""
    from pytorch_lightning.callbacks import Callback

    from muroan.callbacks import RobustValidation, StopEarly
    from muroan.training.module import load_weights

    if not config.defense:
        raise MuroanError(f"harden needs a defence, such as defense=adversarial_training: {', '.join(of('defense'))}")
    options = config.hardening
    check_training(config, "hardening")
    if config.checkpoint:
        raise MuroanError(
            f"checkpoint names the model to attack: to harden another than what was trained, "
            f"hardening.start={config.checkpoint}"
        )
    if options.start not in ("trained", "scratch") and not Path(options.start).is_file():
        raise MuroanError(f"hardening.start must be trained, scratch or a checkpoint, got {options.start!r}")
    if already_trained(config, "harden"):
        return
    data, model = build(config)
    start = None if options.start == "scratch" else Path(options.start)
    if options.start == "trained":
        start = find_checkpoint(config, model)
    if start is not None:
        load_weights(model, start)
    check_texts(data, model)
    if config.rerun and config.defense.get("folder"):
        forget_set(Path(config.defense.folder))
    threat_model = instantiate(options.threat_model)
    defense = instantiate(config.defense)
    module = defense(model=model, threat_model=threat_model, seed=config.seed, **optimisation(options))
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
    options = config[section]
    whole = {"epochs": 1, "batches": 1, "samples": 0, "patience": 0}
    for name, least in whole.items():
        value = options.get(name, least)
        if value is None and name == "batches":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise MuroanError(f"{section}.{name} must be a whole number, at least {least}, got {value!r}")
    for name in ("lr", "weight_decay", "warmup", "clip"):
        value = options[name]
        if value is None and name == "clip":
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise MuroanError(f"{section}.{name} must be a number, got {value!r}")
        if value < 0 or (name == "lr" and value == 0) or (name == "warmup" and not 0 < value < 1):
            ends = {"lr": "above 0", "warmup": "between 0 and 1"}.get(name, "0 or more")
            raise MuroanError(f"{section}.{name} must be {ends}, got {value}")
    if config.device.precision == "16-true":
        raise MuroanError(
            "device.precision=16-true is too narrow to train in: choose 16-mixed, bf16-mixed or bf16-true (to attack "
            "in 16-true, train in another one and name its checkpoint=FILE)"
        )


def check_texts(data: Any, model: Any) -> None:
    """Refuse a training that a text of val or test, which the model cannot take, would end after hours.

    Raises:
        MuroanError: there is such a text, and no word of skipping it.
    """
    from muroan.modalities import Text

    for name, modality in model.modalities.items():
        if not isinstance(modality, Text) or data.skip_bad:
            continue
        for split in ("val", "test"):
            asked = {example.inputs[name]: example.id for example in data.examples(split)}
            for text, id in asked.items():
                try:
                    modality.prepare(text)
                except MuroanError as error:
                    raise MuroanError(f"sample {id!r} of {split}, {name}: {error}") from None


def forget_set(folder: Path) -> None:
    """Remove the adversarial set of an offline training that is run again."""
    for file in (*folder.glob("*-*.pt"), folder / "set.json"):
        file.unlink(missing_ok=True)


def already_trained(config: DictConfig, command: str) -> bool:
    """Whether the folder holds this training, done; else it is claimed for it.

    Raises:
        MuroanError: the folder holds another training.
    """
    from muroan.results import write_json

    out = Path(config.out)
    if config.rerun:
        for name in ("identity.json", "summary.json", "last.ckpt"):
            (out / name).unlink(missing_ok=True)
    if differing := other_training(out, identity(config, command)):
        raise MuroanError(
            f"{out} holds another training ({differing}): choose another folder with out=..., or start anew with "
            f"rerun=true"
        )
    if (out / "summary.json").exists():
        log.info("already trained: %s (rerun=true trains again)", out / "best.ckpt")
        return True
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "identity.json", identity(config, command))
    return False


def other_training(folder: Path, own: Mapping[str, Any]) -> str:
    """In what the training that a folder holds differs from one's own; nothing where it does not, or holds none."""
    from muroan.results import differences

    for name in ("identity.json", "summary.json"):
        if (folder / name).exists():
            known = json.loads((folder / name).read_text())
            return differences(known.get("identity", known), json.loads(json.dumps(own)))
    return ""


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
    from muroan.results import write_json
    from muroan.training.module import load_weights, weights_hash

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
    if cost is not None:
        summary["accuracy"] = {"test": metrics["test/accuracy"]}
        summary["control"] = module.control
        summary["best"] = {"monitor": monitor, "value": best}
        summary |= {"cost": asdict(cost), "start": None if start is None else str(start)}
    write_json(out / "summary.json", summary)
    log_model(logger, out / "best.ckpt", summary)
    log.info("test accuracy %.1f %%, checkpoint %s", metrics["test/accuracy"], out / "best.ckpt")


def find_checkpoint(config: DictConfig, model: Any, defense: Any = None) -> Path | None:
    """The checkpoint to attack, or to harden; None for a model that comes trained.

    Args:
        defense: what the model shall have been hardened by; None for the model as `train` leaves it.

    Raises:
        MuroanError: there is none, or another one; the message says how to train one.
    """
    if config.checkpoint:
        checkpoint = Path(config.checkpoint)
        # A vote over ablations may be one of any model.
        if defense and "keep" not in defense and not hardened(checkpoint, config):
            raise MuroanError(
                f"checkpoint={checkpoint} is of a model that no defense={HydraConfig.get().runtime.choices['defense']} "
                f"has hardened: attack it without a defense, or leave the checkpoint out"
            )
        return checkpoint
    trained = Path(config.folders.harden if defense else config.folders.train) / "best.ckpt"
    if trained.is_file():
        own = identity(config, "harden" if defense else "train")
        if differing := other_training(trained.parent, own):
            raise MuroanError(
                f"{trained} is of another training ({differing}): train this one in another folder, or name the "
                f"checkpoint with checkpoint=FILE"
            )
        if not (trained.parent / "summary.json").is_file():
            command, state = ("harden", "hardened") if defense else ("train", "trained")
            raise MuroanError(
                f"{trained} is of a model that is not {state} to the end: the same command goes on with it, "
                f"`{' '.join([f'muroan {command}', *own_overrides(*trained_without(defense))])}`, or name it with "
                f"checkpoint=FILE"
            )
        return trained
    if not defense and model.pretrained:
        return None
    command, state = ("harden", "hardened") if defense else ("train", "trained")
    words = [f"muroan {command}", *own_overrides(*trained_without(defense))]
    raise MuroanError(
        f"no {state} model in {trained.parent}: run `{' '.join(words)}` first, or name one with checkpoint=FILE"
    )


def trained_without(defense: Any) -> list[str]:
    """The groups of options of an attack that the training of its model does not have."""
    without = ["attack", "out", "threat_model", "engine", "certification", "sweep"]
    return without if defense else [*without, "defense", "hardening", "attack@defense", "attack@hardening"]


def hardened(checkpoint: Path, config: DictConfig) -> bool:
    """Whether a checkpoint may be of the chosen defence: what lies beside it does not tell of another training."""
    file = checkpoint.parent / "summary.json"
    known = json.loads(file.read_text()).get("identity", {}) if file.is_file() else None
    return known is None or (known.get("defense") or {}).get("_target_") == config.defense.get("_target_")


def attack(config: DictConfig) -> None:
    """Attack a trained model; records go to `out`, from where a killed run goes on."""
    import pytorch_lightning as pl

    from muroan.callbacks import AttackCallback
    from muroan.results import RunFolder
    from muroan.training.module import MultimodalModule

    folder = RunFolder(config.out)
    data, model = build(config)
    checkpoint = load_trained(config, model)
    run = {
        **about(config, "attack", data, model, checkpoint),
        "attack": HydraConfig.get().runtime.choices["attack"],
        "smoothed": bool(config.certification.smoothed),
        "training": training_summary(checkpoint),
        "modalities": list(model.modalities),
        "classes": list(data.classes),
    }
    if config.certification.smoothed:
        from muroan.defenses.mmcert import SmoothedModel

        model = SmoothedModel(model, **ablation_options(config), votes=config.certification.votes, seed=config.seed)
    if config.rerun:
        folder.clear()
    if folder.finished and folder.matches(run):
        log.info("already finished: %s (rerun=true runs it again)", folder.path)
        if not (folder.path / "summary.json").exists():  # the run was cut off while it summed up
            logger = tracker(config)
            begin_tracking(logger, config)
            finish_attack(folder, folder.records(), data.classes, logger)
        return
    if isinstance(config.attack.get("target"), str):
        config.attack.target = class_index(config.attack.target, data.classes)
    callback = AttackCallback(
        instantiate(config.attack),
        folder.path,
        run,
        instantiate(config.threat_model),
        config.engine.batch_size,
        config.seed,
        config.engine.keep_media,
    )
    logger = tracker(config)
    trainer = pl.Trainer(**trainer_options(config), callbacks=[callback], logger=logger, enable_progress_bar=False)
    begin_tracking(logger, config)
    trainer.test(MultimodalModule(model), data, verbose=False)
    if trainer.is_global_zero:
        finish_attack(folder, callback.records, data.classes, logger)


def load_trained(config: DictConfig, model: Any) -> Path | None:
    """Give a model the weights that it is attacked with; returns the checkpoint that they are from."""
    from muroan.training.module import load_weights

    checkpoint = find_checkpoint(config, model, config.defense)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return checkpoint


def about(config: DictConfig, command: str, data: Any, model: Any, checkpoint: Path | None) -> dict[str, Any]:
    """What `run.json` of attacks and certificates tells."""
    from muroan.training.module import weights_hash

    weights, chosen = weights_hash(model), HydraConfig.get().runtime.choices
    return {
        "identity": {**identity(config, command), "weights": weights},
        "model": chosen["model"],
        "dataset": data.name,
        "defense": chosen["defense"] if config.defense else None,
        "seed": config.seed,
        "checkpoint": {"path": None if checkpoint is None else str(checkpoint), "sha256": weights},
        "config": plain(config),
        "versions": versions(),
    }


def training_summary(checkpoint: Path | None) -> dict[str, Any] | None:
    """How the attacked model came to be, and what that cost, as the summary beside its checkpoint tells."""
    file = None if checkpoint is None else checkpoint.parent / "summary.json"
    if file is None or not file.is_file():
        return None
    summary = json.loads(file.read_text())
    return {key: summary[key] for key in ("accuracy", "best", "start", "control", "cost") if key in summary}


def ablation_options(config: DictConfig) -> dict[str, Any]:
    """What the chosen defence keeps, as options of `Ablation`.

    Raises:
        MuroanError: no defence is chosen, or one that keeps nothing.
    """
    defense = plain(config.get("defense")) or {}
    if "keep" not in defense:
        raise MuroanError("there is no vote to certify or attack without a defence that ablates: add defense=mmcert")
    return {key: defense[key] for key in ("keep", "element") if key in defense}


def class_index(name: str, classes: Sequence[str]) -> int:
    """The index of a class by its name.

    Raises:
        MuroanError: there is no such class.
    """
    if name not in classes:
        shown = ", ".join(classes[:20]) + (", …" if len(classes) > 20 else "")
        raise MuroanError(f"attack.target={name}: the dataset has no such class; it has {shown}")
    return list(classes).index(name)


def finish_attack(folder: RunFolder, records: Sequence[AttackResult], classes: Sequence[str], logger: Any) -> None:
    """Summarise a finished run, show the figures, and hand all that to the tracker."""
    from muroan.metrics import summarise
    from muroan.report.tracked import log_attack
    from muroan.results import write_json

    summary = summarise(records, judged=folder.run.get("judged"))
    log_attack(logger, folder, records, classes, summary)
    write_json(folder.path / "summary.json", summary)  # last: it says that all is done
    log.info("%s", headline(summary, len(records)))
    log.info("records: %s", folder.records_file)


def headline(summary: Mapping[str, Mapping[str, float | None]], samples: int) -> str:
    def show(name: str, digits: int = 1) -> str:
        figure = summary[name]
        if figure["value"] is None:
            return "-"
        return f"{figure['value']:.{digits}f} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"

    return (
        f"{samples} samples, 95 % intervals: clean accuracy {show('clean_accuracy')} %, "
        f"robust accuracy {show('robust_accuracy')} %, success rate {show('attack_success_rate')} %, "
        f"decoupled fraction mean {show('decoupled_fraction_mean', 2)} % "
        f"median {show('decoupled_fraction_median', 2)} %, queries {show('queries')}"
    )


def certify(config: DictConfig) -> None:
    """Certify the vote over ablations of a trained model; hold the certificates against attacks on it."""
    import pytorch_lightning as pl

    from muroan.certification import CertificateFolder, CertificationCallback
    from muroan.defenses.mmcert import Ablation
    from muroan.training.module import MultimodalModule

    folder = CertificateFolder(config.out)
    data, model = build(config)
    ablation = Ablation(model.modalities, **ablation_options(config))
    run = about(config, "certify", data, model, load_trained(config, model))
    if config.rerun:
        folder.clear()
    if folder.finished and folder.matches(run):
        log.info("already certified: %s (rerun=true certifies again)", folder.path)
        finish_certify(config, folder)
        return
    keys = ("samples", "selection", "alpha", "deleted", "batch_size")
    options = {key: plain(config.certification[key]) for key in keys}
    callback = CertificationCallback(ablation, folder.path, run, seed=config.seed, **options)
    trainer = pl.Trainer(**trainer_options(config), callbacks=[callback], logger=False, enable_progress_bar=False)
    trainer.test(MultimodalModule(model), data, verbose=False)
    if trainer.is_global_zero:
        finish_certify(config, folder)


def finish_certify(config: DictConfig, folder: CertificateFolder) -> None:
    """Summarise certificates, count what attacks on the smoothed model broke, and draw both."""
    from muroan.certification import broken, robust_accuracy, summarise
    from muroan.report.plots import certified_curve
    from muroan.results import write_json
    from muroan.runs import find_runs

    certificates = folder.records()
    summary = summarise(certificates)
    log.info(
        "%d samples, certified accuracy %.1f %%, abstained on %d",
        summary["samples"],
        summary["accuracy"],
        summary["abstained"],
    )
    for share, accuracy in summary["curve"]:
        log.info("  below %.3f %% of the elements of every modality: %.1f %%", share, accuracy)
    log.info("  whatever is done to one element of each modality: %.1f %%", summary["each"])
    for name, size in summary["alone"].items():
        told = "to one element of %s alone: %.1f %%; median size of right samples: %g elements, %.3f %%"
        log.info(f"  {told}", name, size["any"], size["elements"], size["percent"])
    attacks = find_runs(folders(config.certification.attacked)) if config.certification.attacked else []
    summary["attacks"] = {}
    deleted = folder.run["identity"]["certification"]["deleted"]
    for run in attacks:
        theirs, ours = run.about["identity"], folder.run["identity"]
        if "certification" not in theirs or any(theirs.get(key) != ours[key] for key in ("weights", "defense")):
            raise MuroanError(
                f"certification.attacked: {run.folder} attacked another model or vote than was certified; attack it "
                f"with certification.smoothed=true and the same checkpoint and defense"
            )
        # A deletion moves all later sound; a masked word is a changed one.
        replaced = (theirs.get("threat_model") or {}).get("replacement") or {}
        beyond = [name for name in deleted if replaced.get(name) not in (None, "delete")]
        beyond += [name for name, how in replaced.items() if how == "delete" and name not in certificates[0].tokens]
        if beyond:
            raise MuroanError(
                f"certification.attacked: {run.folder} replaces parts of {', '.join(beyond)} in a way that the "
                f"certificates say nothing about: attack with what they are made for, or certify without "
                f"certification.deleted"
            )
        found = broken(certificates, run.records)
        everything = float(robust_accuracy(certificates, run.records, [1.0])[0])
        summary["attacks"][run.label] = {"broken": [c.id for c, _ in found], "robust_accuracy": everything}
        log.info("  %s: %d certificates broken, robust accuracy %.1f %%", run.label, len(found), everything)
    write_json(folder.path / "summary.json", summary)
    (folder.path / "certified.png").write_bytes(certified_curve(certificates, [(r.label, r.records) for r in attacks]))
    log.info("certificates: %s", folder.records_file)


def report(config: DictConfig) -> None:
    """Build the report of finished runs from their records alone."""
    from muroan.report import build as build_report

    page = build_report(folders(config.runs), Path(config.out))
    log.info("report: %s", page)


def compare(config: DictConfig) -> None:
    """Put finished runs side by side, from their records alone, and show the tables."""
    from muroan.report.compare import write

    page = write(folders(config.runs), Path(config.out))
    log.info("%s", page.read_text(encoding="utf-8"))
    log.info("comparison: %s", page)


def defenses(config: DictConfig) -> None:
    """Put defences beside each other and beside the undefended models, from the records of attacks on all of them."""
    from muroan.report.defenses import write

    page = write(folders(config.runs), Path(config.out))
    log.info("%s", page.read_text(encoding="utf-8"))
    log.info("defences: %s", page)


def transfer(config: DictConfig) -> None:
    """Ask the models of finished removal attacks what flipped the others, and show the matrices.

    Model and data are those that `run.json` of each run tells; only `runs`, `out`, `device` and `engine.batch_size` are
    this command's own. One process on one device asks.
    """
    import pytorch_lightning as pl

    from muroan.report.transfer import write
    from muroan.transfer import measure

    devices = plain(config.device.devices)
    trainer = pl.Trainer(
        accelerator=config.device.accelerator,
        devices=devices[:1] if isinstance(devices, list) else 1,
        logger=False,
        enable_checkpointing=False,
    )
    matrices, notes = measure(
        folders(config.runs),
        lambda about: build(DictConfig(about["config"])),
        config.engine.batch_size,
        trainer.strategy.root_device,
    )
    page = write(matrices, notes, Path(config.out))
    log.info("%s", page.read_text(encoding="utf-8"))
    log.info("transfer: %s", page)
