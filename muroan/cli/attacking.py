"""The commands that ask trained models: `attack`, `certify` and `transfer`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from muroan.cli.jobs import folders, identity, plain
from muroan.cli.parts import (
    ablation_options,
    begin_tracking,
    build,
    check_texts,
    load_trained,
    tracker,
    trainer_options,
    versions,
)
from muroan.errors import MuroanError

if TYPE_CHECKING:
    from muroan.certification import CertificateFolder
    from muroan.results import AttackResult, RunFolder

log = logging.getLogger("muroan")


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
        **about(config, "attack", model, checkpoint),
        "attack": HydraConfig.get().runtime.choices["attack"],
        "smoothed": bool(config.certification.smoothed),
        "training": training_summary(checkpoint),
        "modalities": list(model.modalities),
        "classes": list(data.classes),
    }
    if config.certification.smoothed:
        from muroan.defenses.mmcert import SmoothedModel

        model = SmoothedModel(model, **ablation_options(config), votes=config.certification.votes, seed=config.seed)
        check_texts(data, model, ("test",), model.ablation)
    if config.rerun:
        folder.clear()
    if done(folder, run, bool(config.dataset.get("skip_bad"))):
        log.info("already finished: %s (rerun=true runs it again)", folder.path)
        if not (folder.path / "summary.json").exists():  # the run was cut off while it summed up
            logger = tracker(config)
            begin_tracking(logger, config, run["identity"]["weights"])
            finish_attack(folder, folder.records(), data.classes, logger)
        return
    if config.attack.get("target") is not None:
        config.attack.target = class_index(config.attack.target, data.classes)
    callback = AttackCallback(
        instantiate(config.attack),
        folder.path,
        run,
        instantiate(config.threat_model),
        config.engine.batch_size,
        config.seed,
        config.engine.keep_media,
        search_processes=config.engine.search_processes,
    )
    logger = tracker(config)
    trainer = pl.Trainer(**trainer_options(config), callbacks=[callback], logger=logger, enable_progress_bar=False)
    begin_tracking(logger, config, run["identity"]["weights"])
    trainer.test(MultimodalModule(model), data, verbose=False)
    if trainer.is_global_zero:
        finish_attack(folder, callback.records, data.classes, logger)


def done(folder: RunFolder | CertificateFolder, run: Mapping[str, Any], skip_bad: bool) -> bool:
    """Whether a folder holds this run in full. One that left unreadable samples out goes on without `skip_bad`."""
    if not folder.finished or not folder.matches(run):
        return False
    if unreadable := folder.unreadable():
        log.warning(
            "%s left %d samples out that could not be read%s",
            folder.path,
            len(unreadable),
            " (dataset.skip_bad=false tries them again)" if skip_bad else ": trying them again",
        )
    return skip_bad or not unreadable


def about(config: DictConfig, command: str, model: Any, checkpoint: Path | None) -> dict[str, Any]:
    """What `run.json` of attacks and certificates tells."""
    from muroan.training.module import weights_hash

    weights, chosen = weights_hash(model), HydraConfig.get().runtime.choices
    return {
        "identity": {**identity(config, command), "weights": weights},
        "model": chosen["model"],
        "dataset": chosen["dataset"],
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
    from muroan.results import read_json

    summary = read_json(file, "train the model again with rerun=true, or take the file away")
    return {key: summary[key] for key in ("accuracy", "best", "start", "control", "cost") if key in summary}


def class_index(target: Any, classes: Sequence[str]) -> Any:
    """The index of a class by its name; an index is taken as it is, unless it is the name of a class.

    Raises:
        MuroanError: there is no such class.
    """
    if str(target) in classes:
        return list(classes).index(str(target))
    if isinstance(target, str) or all(name.isdecimal() for name in classes):
        shown = ", ".join(classes[:20]) + (", …" if len(classes) > 20 else "")
        raise MuroanError(f"attack.target={target}: the dataset has no such class; it has {shown}")
    return target


def finish_attack(folder: RunFolder, records: Sequence[AttackResult], classes: Sequence[str], logger: Any) -> None:
    """Summarise a finished run, show the figures, and hand all that to the tracker."""
    from muroan.metrics import summarise
    from muroan.report.tracked import log_attack
    from muroan.results import write_json

    summary = summarise(records, judged=folder.run.get("judged"))
    log_attack(logger, folder, records, classes, summary)
    write_json(folder.path / "summary.json", summary)  # last: it says that all is done
    log.info("%s", headline(summary, len(records), len(folder.unreadable())))
    log.info("records: %s", folder.records_file)


def headline(summary: Mapping[str, Mapping[str, float | None]], samples: int, unreadable: int = 0) -> str:
    def show(name: str, digits: int = 1) -> str:
        figure = summary[name]
        if figure["value"] is None:
            return "-"
        return f"{figure['value']:.{digits}f} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"

    left_out = f" ({unreadable} more could not be read)" if unreadable else ""
    return (
        f"{samples} samples{left_out}, 95 % intervals: clean accuracy {show('clean_accuracy')} %, "
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
    run = about(config, "certify", model, load_trained(config, model))
    if config.rerun:
        folder.clear()
    if done(folder, run, bool(config.dataset.get("skip_bad"))):
        log.info("already certified: %s (rerun=true certifies again)", folder.path)
        cut_off = not (folder.path / "summary.json").exists()
        logger = tracker(config) if config.certification.attacked or cut_off else False  # else there is nothing new
        begin_tracking(logger, config, run["identity"]["weights"])
        finish_certify(config, folder, logger)
        return
    keys = ("samples", "selection", "alpha", "deleted", "batch_size")
    options = {key: plain(config.certification[key]) for key in keys}
    callback = CertificationCallback(ablation, folder.path, run, seed=config.seed, **options)
    logger = tracker(config)
    trainer = pl.Trainer(**trainer_options(config), callbacks=[callback], logger=logger, enable_progress_bar=False)
    begin_tracking(logger, config, run["identity"]["weights"])
    trainer.test(MultimodalModule(model), data, verbose=False)
    if trainer.is_global_zero:
        finish_certify(config, folder, logger)


def finish_certify(config: DictConfig, folder: CertificateFolder, logger: Any) -> None:
    """Summarise certificates, count what attacks on the smoothed model broke, draw both, and hand all to the tracker.

    Attacks that the same certificates were held against before stay in the summary.
    """
    from muroan.certification import summarise
    from muroan.report.certificates import hold_against
    from muroan.report.plots import certified_curves
    from muroan.report.tracked import log_certificates
    from muroan.results import read_json, write_json
    from muroan.runs import find_runs

    certificates = folder.records()
    summary = summarise(certificates)
    unreadable = len(folder.unreadable())
    log.info(
        "%d samples%s, certified accuracy %.1f %%, abstained on %d",
        summary["samples"],
        f" ({unreadable} more could not be read)" if unreadable else "",
        summary["accuracy"],
        summary["abstained"],
    )
    for share, accuracy in summary["curve"]:
        log.info("  below %.3f %% of the elements of every modality: %.1f %%", share, accuracy)
    for name, size in summary["alone"].items():
        told = "whatever is done to one element of %s: %.1f %%; median size of right samples: %g elements, %.3f %%"
        log.info(f"  {told}", name, size["any"], size["elements"], size["percent"])
    attacked = folders(config.certification.attacked or [], "certification.attacked")
    attacks = find_runs(attacked) if attacked else []
    file = folder.path / "summary.json"
    before = read_json(file, "rerun=true certifies anew")["attacks"] if file.exists() else {}
    summary["attacks"] = dict(before)
    for run in attacks:
        try:
            held = hold_against(folder, certificates, run)
        except MuroanError as error:
            raise MuroanError(f"certification.attacked: {error}") from None
        summary["attacks"][run.key] = {
            "label": run.label,
            "broken": held.broken,
            "robust_accuracy": held.accuracy,
        }
        log.info("  %s: %d certificates broken, robust accuracy %.1f %%", run.label, len(held.broken), held.accuracy)
    if attacks or not before:
        curve = certified_curves({"": (certificates, [(r.label, r.records) for r in attacks])})
        (folder.path / "certified.png").write_bytes(curve)
    write_json(file, summary)
    log_certificates(logger, folder, summary)
    log.info("certificates: %s", folder.records_file)


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
        accelerator=trainer_options(config)["accelerator"],
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
