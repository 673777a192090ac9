"""Attacked examples as a table of Weights & Biases."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from muroan.report.examples import Picture, Wave, Words, draw
from muroan.results import AttackResult

if TYPE_CHECKING:
    import wandb

SIDE = 256  # pixels that pictures are enlarged to


def examples_table(records: Sequence[AttackResult], classes: Sequence[str]) -> wandb.Table:
    """One row for every attacked sample that was kept for display.

    Columns: id, one a modality (pictures with the removed regions marked, removed words in brackets, removed
    stretches of sound in seconds), the true class, the predictions before and after, status, size and queries.
    """
    import wandb

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
            *(_cell(r, name) for name in modalities),
            *(classes[label] for label in (r.label, r.clean_label, r.adversarial_label)),
            r.status,
            r.decoupled_fraction,
            r.queries,
        ]
        for r in shown
    ]
    return wandb.Table(columns=columns, data=rows)


def _cell(result: AttackResult, modality: str) -> Any:
    import wandb

    drawing = draw(result, modality)
    if isinstance(drawing, Picture):
        return wandb.Image(marked_picture(drawing))
    if isinstance(drawing, Words):
        return " ".join(f"[{word}]" if removed else word for word, removed in drawing.words)
    if isinstance(drawing, Wave):
        return f"{drawing.seconds:.2f} s; removed: {', '.join(drawing.times) or 'nothing'}"
    return "; ".join(drawing.regions) or "nothing removed"


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
