"""What a job leaves in Weights & Biases: a run that goes on with the job, a table of examples, files as artifacts."""

from __future__ import annotations

import base64
import functools
import io
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
from PIL import Image, ImageDraw
from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from muroan.certification import CertificateFolder
from muroan.report.examples import Drawing, Picture, Wave, Words, draw_all
from muroan.results import AttackResult, RunFolder

log = logging.getLogger(__name__)

SIDE = 256  # pixels that pictures are enlarged to


def wandb_logger(folder: str, anew: bool = False, **options: Any) -> WandbLogger:
    """The run of a job, with all its files below the job's folder; nothing starts before the first figure.

    Args:
        folder: of the job; `wandb-id` in it names the run, so that a job that goes on does so in the same one.
        anew: forget that run.
        options: see `WandbLogger`.
    """
    # Where W&B keeps the files of a run until they are uploaded.
    os.environ.setdefault("WANDB_DATA_DIR", str(Path(folder, "wandb").absolute()))
    return WandbLogger(save_dir=folder, id=_run_id(Path(folder), anew), **options)


@rank_zero_only
def _run_id(folder: Path, anew: bool) -> str:
    file = folder / "wandb-id"
    if anew or not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(4) + "\n")
    return file.read_text().strip()


def forgiving(function: Callable[..., None]) -> Callable[..., None]:
    """The function, warning where it would fail: a tracker that breaks must not cost a job its results."""

    @functools.wraps(function)
    def attempt(*args: Any, **options: Any) -> None:
        try:
            function(*args, **options)
        except Exception as error:
            log.warning("not tracked, and the job goes on: %s: %s", type(error).__name__, error)

    return attempt


@forgiving
def log_model(logger: Logger | None, checkpoint: Path, summary: Mapping[str, Any]) -> None:
    """The best checkpoint as an artifact of type `model`; what `summary.json` says of it goes along.

    It is named after its weights: the attacks on it log the same one, which is kept once.
    """
    if isinstance(logger, WandbLogger):
        name = f"model-{str(summary.get('weights'))[:12]}"
        logger.experiment.log_artifact(_artifact(name, "model", [checkpoint], summary))


@forgiving
def log_attack(
    logger: Logger | None,
    folder: RunFolder,
    records: Sequence[AttackResult],
    classes: Sequence[str],
    summary: Mapping[str, Mapping[str, float | None]],
) -> None:
    """The table of examples, the figures, the checkpoint that was attacked, and the records with `run.json` as an
    artifact of type `records`.
    """
    if isinstance(logger, WandbLogger):
        logger.experiment.summary.update({f"summary/{name}": figure["value"] for name, figure in summary.items()})
        files = [folder.records_file, folder.path / "run.json"]
        about = {key: folder.run.get(key) for key in ("fingerprint", "checkpoint")}
        logger.experiment.log_artifact(_artifact(f"records-{logger.experiment.id}", "records", files, about))
        log_attacked(logger, folder.run)
        logger.experiment.log({"examples": examples_table(records, classes)})


@forgiving
def log_certificates(logger: Logger | None, folder: CertificateFolder, summary: Mapping[str, Any]) -> None:
    """The figures, the curve, and the certificates with `run.json` and `summary.json` as an artifact."""
    if isinstance(logger, WandbLogger):
        figures = {name: summary[name] for name in ("samples", "abstained", "accuracy")}
        figures |= {f"{modality}/{name}": x for modality, size in summary["alone"].items() for name, x in size.items()}
        for attack, found in summary["attacks"].items():
            figures |= {f"{attack}/broken": len(found["broken"]), f"{attack}/robust": found["robust_accuracy"]}
        logger.experiment.summary.update({f"summary/{name}": figure for name, figure in figures.items()})
        files = [folder.records_file, folder.path / "run.json", folder.path / "summary.json"]
        about = {key: folder.run.get(key) for key in ("fingerprint", "checkpoint")}
        name = f"certificates-{logger.experiment.id}"
        logger.experiment.log_artifact(_artifact(name, "certificates", files, about))
        log_attacked(logger, folder.run)
        logger.experiment.log({"certified": wandb.Image(str(folder.path / "certified.png"))})


def log_attacked(logger: WandbLogger, run: Mapping[str, Any]) -> None:
    """The checkpoint that a run is of, if it is a file."""
    checkpoint = run.get("checkpoint") or {}
    path = checkpoint.get("path")
    if path is not None and Path(path).is_file():
        log_model(logger, Path(path), {"weights": checkpoint.get("sha256")})


def _artifact(name: str, kind: str, files: Sequence[Path], about: Mapping[str, Any]) -> wandb.Artifact:
    artifact = wandb.Artifact(name, kind, metadata=dict(about))
    for file in files:
        # Finished files of the job's own folder: there is no need of a copy beside them.
        artifact.add_file(str(file.absolute()), policy="immutable", skip_cache=True)
    return artifact


def examples_table(records: Sequence[AttackResult], classes: Sequence[str]) -> wandb.Table:
    """One row for every attacked sample that was kept for display.

    Columns: id, one a modality (pictures with the removed regions marked, removed words in brackets, removed
    stretches of sound in seconds), the true class, the predictions before and after, status, size and queries.
    """
    shown = [r for r in records if r.media and r.attacked]
    modalities = list(shown[0].media or {}) if shown else []
    columns: list[str | int] = [
        "id",
        *modalities,
        "label",
        "before",
        "after",
        "status",
        "decoupled_fraction",
        "queries",
    ]
    rows = [
        [
            r.id,
            *_cells(r, modalities),
            *(classes[label] for label in (r.label, r.clean_label, r.adversarial_label)),
            r.status,
            r.decoupled_fraction,
            r.queries,
        ]
        for r in shown
    ]
    return wandb.Table(columns=columns, data=rows)


def _cells(result: AttackResult, modalities: Sequence[str]) -> list[Any]:
    """What the attack did to each input: words [left out] or {put in}; a changed picture beside what it was."""
    drawn = dict(draw_all(result))
    return [_cell(result, drawn[name]) if name in drawn else "" for name in modalities]


def _cell(result: AttackResult, drawings: Sequence[Drawing]) -> Any:
    pictures = [marked_picture(drawing) for drawing in drawings if isinstance(drawing, Picture)]
    if pictures:
        return wandb.Image(side_by_side(pictures))
    told, first = "removed" if result.kind == "removal" else "changed", drawings[0]
    if isinstance(first, Words):
        return " ".join({"del": f"[{word}]", "ins": f"{{{word}}}"}.get(mark, word) for word, mark in first.words)
    if isinstance(first, Wave):
        what = ", ".join(first.times) or ("nothing" if len(drawings) == 1 else "its values")
        return f"{first.seconds:.2f} s; {told}: {what}"
    return "; ".join(getattr(first, "regions", ())) or f"nothing {told}"


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one height in a row."""
    gap = 8
    row = Image.new("RGB", (sum(p.width + gap for p in pictures) - gap, pictures[0].height), "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + gap
    return row


def marked_picture(picture: Picture) -> Image.Image:
    """The picture, enlarged, with the removed boxes outlined."""
    image = Image.open(io.BytesIO(base64.b64decode(picture.png))).convert("RGB")
    scale = max(1, SIDE // max(image.size))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    for x, y, width, height in picture.boxes:
        box = (x * scale, y * scale, (x + width) * scale - 1, (y + height) * scale - 1)
        pen.rectangle(box, outline=(213, 94, 0), width=2)
    return image
