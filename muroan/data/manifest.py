"""Your own data: a manifest a split, in JSON lines or CSV, that names the files, the texts and the labels."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from muroan.data.base import MultimodalData, scratch_text
from muroan.data.samples import Example
from muroan.errors import MuroanError
from muroan.modalities import Audio, Image, Modality


class Manifest(MultimodalData):
    """Examples listed in one file a split: JSON lines, or CSV with a header where the name ends in .csv.

    Files and texts that examples share (questions about one picture) are grouped, where they are neighbours.
    """

    def __init__(
        self,
        root: str,
        classes: Sequence[str | int],
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        image: str | None = None,
        audio: str | None = None,
        text: str | None = None,
        label: str = "label",
        id: str | None = None,
        name: str = "manifest",
        obtain: str = "",
        image_size: int | Sequence[int] = (224, 224),
        image_mean: float | Sequence[float] = (0.5, 0.5, 0.5),
        image_std: float | Sequence[float] = (0.5, 0.5, 0.5),
        audio_length: int = 16000,
        audio_rate: int = 16000,
        max_length: int | None = None,
        truncate: bool = False,
        **options: Any,
    ):
        """
        Args:
            root: folder that file names in the manifests are relative to, and the manifests' own too.
            classes: names of the classes. A label is a name, or the place of one in this list, from 0.
            train, val, test: manifests; None where a split is not needed.
            image, audio, text: columns of the file names and the text; None where there is no such modality.
            label: column of the labels.
            id: column of the ids, unique in a split; None numbers the rows: "test-0".
            name: of the dataset, for tables.
            obtain: where to get the data, for the message when it is missing.
            image_size, image_mean, image_std: (height, width) in pixels, or the side of a square, and the normalisation
                of models trained from scratch; a single mean and std make it greyscale.
            audio_length, audio_rate: samples, and samples a second, of models trained from scratch.
            max_length: tokens of models trained from scratch; None takes the longest training text.
            truncate: leave out the last words of longer texts instead of refusing them.
            options: those of `MultimodalData`.

        Raises:
            MuroanError: no column of a modality is given, or a class is named twice; when examples are loaded, a
                manifest is missing or not readable, or a row lacks a column or has a bad label or id.
        """
        super().__init__(**options)
        self.name, self.root, self.obtain = name, Path(root), obtain
        if isinstance(classes, str) or any(isinstance(c, bool) for c in classes):
            raise MuroanError(
                f"dataset.classes is a list of names, got {classes!r}; in YAML, quote yes, no, on, off, true and false"
            )
        self.classes = [str(c) for c in classes]
        self.manifests = {"train": train, "val": val, "test": test}
        columns = {"image": image, "audio": audio, "text": text}
        self.columns = {modality: column for modality, column in columns.items() if column is not None}
        self.label, self.id = label, id
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.image_mean = [image_mean] if isinstance(image_mean, int | float) else list(image_mean)
        self.image_std = [image_std] if isinstance(image_std, int | float) else list(image_std)
        self.audio_length, self.audio_rate = audio_length, audio_rate
        self.max_length, self.truncate = max_length, truncate
        # A label is a name where classes are numerals (["1", "2", "3"]), and never the place of another.
        self._labels = {c: i for i, c in enumerate(self.classes)}
        if not any(c.isdecimal() for c in self.classes):
            self._labels |= {str(i): i for i in range(len(self.classes))}
        if not self.columns:
            raise MuroanError("a manifest needs the column of a modality: dataset.image, dataset.audio, dataset.text")
        if len(set(self.classes)) < max(2, len(self.classes)):
            raise MuroanError(f"dataset.classes must name two or more different classes, got {self.classes}")

    def natural_modalities(self) -> dict[str, Modality]:
        modalities: dict[str, Modality] = {}
        if "image" in self.columns:
            height, width = self.image_size
            modalities["image"] = Image((height, width), self.image_mean, self.image_std)
        if "audio" in self.columns:
            modalities["audio"] = Audio(self.audio_length, self.audio_rate)
        if "text" in self.columns:
            # Without a manifest to train on, the words only serve models that bring their own tokenizer.
            split = next((s for s, manifest in self.manifests.items() if manifest is not None), "train")
            texts = [e.inputs["text"] for e in self.load(split) if isinstance(e.inputs["text"], str)]
            modalities["text"] = scratch_text(texts, self.max_length, self.truncate)
        return modalities

    def load(self, split: str) -> list[Example]:
        manifest = self.manifests[split]
        if manifest is None:
            raise MuroanError(f"the {split} split is needed, but dataset.{split} does not name a manifest")
        path = self.root / manifest
        if not path.is_file():
            raise MuroanError(f"{split} manifest {path} is missing. {self.obtain}".rstrip())
        rows = _csv_rows if path.suffix == ".csv" else _json_rows
        examples: list[Example] = []
        lines: dict[str, int] = {}
        for line, row in rows(path):
            example = self._example(row, f"{path}, line {line}", f"{split}-{len(examples)}")
            if example.id in lines:
                raise MuroanError(f"{path}, line {line}: id {example.id!r} is already that of line {lines[example.id]}")
            lines[example.id] = line
            examples.append(example)
        return examples

    def _example(self, row: dict[str, Any], place: str, number: str) -> Example:
        wanted = [*self.columns.values(), self.label, *([self.id] if self.id is not None else [])]
        for column in wanted:
            if column not in row:
                hint = ": samples without a label cannot be scored" if column == self.label else ""
                raise MuroanError(f"{place} has no column {column!r}, it has {', '.join(map(str, row))}{hint}")
        label = self._labels.get(str(row[self.label]))
        if label is None:
            classes = ", ".join(self.classes[:10]) + (", …" if len(self.classes) > 10 else "")
            raise MuroanError(
                f"{place}: label {row[self.label]!r} is none of the {len(self.classes)} classes: {classes}"
            )
        inputs: dict[str, Any] = {}
        for modality, column in self.columns.items():
            value = row[column]
            if modality != "text":
                if not isinstance(value, str) or not value:
                    raise MuroanError(f"{place}: column {column!r} must name a file, got {value!r}")
                value = self.root / value
            inputs[modality] = value
        shared = next((str(value) for value in inputs.values() if isinstance(value, Path)), None)
        return Example(number if self.id is None else str(row[self.id]), inputs, label, shared)


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and row of a file with a JSON object on each line; empty lines are passed over."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise MuroanError(f"{path}, line {number} is not JSON ({error}): {line[:60]!r}") from None
            if not isinstance(row, dict):
                raise MuroanError(f"{path}, line {number} must be a JSON object with named columns, got {line[:60]!r}")
            yield number, row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and row of a comma-separated file whose first line names the columns."""
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), restkey="(more values than columns)")
    try:
        for row in reader:
            # A short row lacks its last columns.
            yield reader.line_num, {column: value for column, value in row.items() if value is not None}
    except csv.Error as error:
        raise MuroanError(f"{path}, line {reader.line_num} is not CSV ({error})") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise MuroanError(f"manifest {path} is not UTF-8 text ({error})") from None
