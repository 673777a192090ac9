"""easy-VQA: questions about one coloured shape, small enough to train on in minutes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image as PILImage

from muroan.data.base import MultimodalData, check_visible, scratch_text
from muroan.data.samples import Example, Sample
from muroan.errors import MuroanError, check_whole
from muroan.files import read_image
from muroan.modalities import ElementSet, Image, Modality, Removal, removed_elements, stable_seed

# As the package draws them.
COLOURS = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
KINDS = ("circle", "rectangle", "triangle")

# Words that tell what is asked; see `answer`.
THINGS = frozenset({*COLOURS, *KINDS, "shape"})
ONE_IN_THE_PICTURE = frozenset({*COLOURS, "shape", "image", "contain", "present"})
THERE_IS = frozenset({"there", "a", "no", "not", "in", "contain", "present"})


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows.

    Attributes:
        colour, kind: of its one shape.
        pixels: the elements of the image that show the shape.
    """

    colour: str
    kind: str
    pixels: ElementSet


class EasyVQA(MultimodalData):
    """4,000 + 1,000 pictures of 64x64 pixels and 38,575 + 9,673 questions about them; 13 answers.

    Train and val are the package's training pictures, test is its test. A group is a picture. Ids name the split in
    the package, the picture and the question about it, "test-432-3", whatever the options are.
    """

    name = "easy_vqa"

    def __init__(self, val_pictures: int = 400, visible: float = 0.5, **options: Any):
        """
        Args:
            val_pictures: training pictures that are held out, with their questions, for validation.
            visible: share of the shape's pixels that must be left for the label to be still right, above 0, at most 1.
            options: those of `MultimodalData`.

        Raises:
            MuroanError: the package easy-vqa is not installed, no picture would be left to train on, `val_pictures` is
                no whole number, or `visible` no such share.
        """
        super().__init__(**options)
        try:
            self.classes = sorted(self._package.get_answers())
        except ImportError:
            raise MuroanError("the dataset easy_vqa is a Python package: pip install easy-vqa") from None
        check_whole("dataset", val_pictures=val_pictures)
        self.val_pictures, self.visible = val_pictures, check_visible(visible)
        self._paths: dict[str, dict[int, str]] = {}
        self._scenes: dict[tuple[str, tuple[int, ...]], Scene] = {}

    @property
    def _package(self) -> ModuleType:
        import easy_vqa

        return easy_vqa  # not kept: a module cannot be sent to another process

    def load(self, split: str) -> list[Example]:
        part = "test" if split == "test" else "train"
        questions, answers, pictures = getattr(self._package, f"get_{part}_questions")()
        paths = {k: Path(path) for k, path in getattr(self._package, f"get_{part}_image_paths")().items()}
        chosen = set(paths)
        if split != "test":
            if not 0 < self.val_pictures < len(paths):
                raise MuroanError(
                    f"dataset.val_pictures must lie between 1 and {len(paths) - 1}, got {self.val_pictures}"
                )
            # Whatever dataset.seed is: a model must never be validated on what another run trained it on.
            order = np.random.default_rng(stable_seed(self.name)).permutation(sorted(paths))
            held_out = set(order[: self.val_pictures].tolist())
            chosen = held_out if split == "val" else chosen - held_out
        asked: Counter[int] = Counter()
        examples = []
        for question, answer, picture in zip(questions, answers, pictures, strict=True):
            number = asked[picture]
            asked[picture] += 1
            if picture in chosen:
                inputs = {"image": paths[picture], "text": question}
                label = self.classes.index(answer)
                examples.append(Example(f"{part}-{picture}-{number}", inputs, label, f"{part}-{picture}"))
        return examples

    def natural_modalities(self) -> dict[str, Modality]:
        texts, _, _ = self._package.get_train_questions()
        return {"image": Image((64, 64)), "text": scratch_text(texts)}

    def still_valid(self, sample: Sample, removal: Removal) -> bool | None:
        """Whether what is left of the question has the label as its answer, and enough of the shape is left to see it.

        The share `visible` of the shape's pixels must be left whatever is asked: its colour could be told from less,
        its kind hardly. None where picture or question is not in use, or no element of a coarser image shows the
        shape.

        Raises:
            MuroanError: the sample is not one of this dataset, or the removal does not lie inside it.
        """
        if not {"image", "text"} <= sample.layouts.keys():
            return None
        removed = removed_elements(removal, sample.layouts)
        scene = self.scene(sample.id, sample.layouts["image"].grid)
        if not scene.pixels:
            return None
        left = scene.pixels & ~removed.get("image", 0)
        if left.bit_count() < self.visible * scene.pixels.bit_count():
            return False
        gone = removed.get("text", 0)
        words = [word for i, word in enumerate(sample.layouts["text"].words) if not gone >> i & 1]
        return answer(words, scene.colour, scene.kind) == self.classes[sample.label]

    def scene(self, sample_id: str, grid: tuple[int, ...]) -> Scene:
        """What the picture of a sample shows, on an element grid (H, W).

        It is read from the package's file, not from the input, so that it does not depend on how a model normalises.

        Raises:
            MuroanError: there is no such sample, or its picture cannot be read.
        """
        picture = sample_id.rpartition("-")[0]
        key = (picture, grid)
        if key not in self._scenes:
            part, _, number = picture.partition("-")
            if part not in ("train", "test"):
                raise MuroanError(f"sample {sample_id!r} is not one of {self.name}, whose ids are like test-432-3")
            if part not in self._paths:
                self._paths[part] = getattr(self._package, f"get_{part}_image_paths")()
            path = self._paths[part].get(int(number)) if number.isdecimal() else None
            if path is None:
                raise MuroanError(f"sample {sample_id!r}: {self.name} has no picture {picture}")
            self._scenes[key] = scene_of(read_image(Path(path)).convert("RGB"), grid)
        return self._scenes[key]


def scene_of(picture: PILImage.Image, grid: tuple[int, ...]) -> Scene:
    """The colour, kind and place of the one shape on a plain light ground.

    Args:
        picture: in RGB, as the package has it.
        grid: element grid (height, width) of the image that is resized from it.
    """
    pixels = np.asarray(picture).astype(int)
    counts = {rgb: count for count, rgb in picture.getcolors(pixels.size) or ()}
    ground = max(counts, key=lambda rgb: counts[rgb])  # no shape fills half a picture
    colour = max(COLOURS, key=lambda name: counts.get(COLOURS[name], 0))
    # The edge is smoothed: a pixel shows the shape when three quarters of its colour are the shape's.
    far, near = (np.abs(pixels - np.array(rgb)).sum(2) for rgb in (ground, COLOURS[colour]))
    shape = 3 * near <= far
    rows, columns = np.flatnonzero(shape.any(1)), np.flatnonzero(shape.any(0))
    full = shape.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
    # Upright triangles fill half of their box (small ones, being jagged, up to 0.61), circles 0.77 to 0.86.
    kind = "triangle" if full < 0.7 else "circle" if full < 0.93 else "rectangle"
    y, x = ((np.arange(side) * 2 + 1) * old // (2 * side) for side, old in zip(grid, shape.shape, strict=True))
    packed = np.packbits(shape[np.ix_(y, x)], bitorder="little")
    return Scene(colour, kind, int.from_bytes(packed.tobytes(), "little"))


def answer(words: Iterable[str], colour: str, kind: str) -> str | None:
    """What the words of a whole or torn question, taken at face value, have as their answer for a picture.

    The picture shows one shape, so that "what color is?" can be answered without naming it:

    - with "color" the colour is asked;
    - else with "what" the kind is, if a colour or one of shape, image, contain, present says of what;
    - else it asks whether something is there, if a colour, a kind or "shape" says what, and one of there, a, no, not,
      in, contain, present says that it asks this; "no" and "not" turn the answer round;
    - else nobody can tell what is asked: "is the blue shape?", "is there a?".

    Returns:
        One of the 13 answers; None when nobody can tell.

    >>> answer("is there not a blue shape?".split(), "red", "circle")
    'yes'
    >>> answer("is there a shape?".split(), "red", "circle")
    'yes'
    >>> answer("what is the red".split(), "red", "circle")
    'circle'
    """
    left = {word.strip("?").lower() for word in words}
    if "color" in left:
        return colour
    if "what" in left:
        return kind if left & ONE_IN_THE_PICTURE else None
    named = left & THINGS
    if not named or not left & THERE_IS:
        return None
    there = colour in named or kind in named or named == {"shape"}
    return "yes" if there != bool(left & {"no", "not"}) else "no"
