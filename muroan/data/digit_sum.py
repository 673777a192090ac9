"""A handwritten digit and a spoken digit; the class is their sum, so that neither alone tells it."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage
from torch import Tensor

from muroan.data.base import SPLITS, MultimodalData, check_visible
from muroan.data.samples import Example, Sample
from muroan.errors import MuroanError, check_whole
from muroan.modalities import Audio, Image, Modality, Removal, element_mask, removed_elements, stable_seed

RATE = 8000
SIDE = 32
RECORDING = re.compile(r"(?P<digit>\d)_(?P<speaker>\w+)_(?P<number>\d+)\.wav")
SPEAKERS = {"lucas": "val", "theo": "test"}  # split_by=speaker; all others are in train


class DigitSum(MultimodalData):
    """Pairs of a scikit-learn 8x8 digit, shown as (1, 32, 32), and a recording of the Free Spoken Digit Dataset.

    No picture and no recording is in two splits. The pairs of a split are drawn at random once and for all; a
    larger split begins with the pairs of a smaller one. Ids name the pair: "test-17-digit1034-7_theo_3".
    """

    name = "digit_sum"

    def __init__(
        self,
        root: str,
        split_by: str = "recording",
        train_size: int = 20000,
        val_size: int = 1000,
        test_size: int = 2000,
        audio_length: int = 6400,
        augment: bool = True,
        visible: float = 0.5,
        **options: Any,
    ):
        """
        Args:
            root: folder with the recordings, or one with a folder `recordings` in it.
            split_by: "recording", the official test set (numbers 0 to 4 of each digit and speaker; 5 to 9 are val),
                or "speaker", where the voices of val and test are not in train.
            train_size, val_size, test_size: pairs in each split.
            audio_length: samples at 8 kHz that a model takes; the end of longer recordings is cut off.
            augment: vary the training recordings at random: onset, speed, loudness and noise.
            visible: shares of the picture's ink and of the sound's energy that must both be left for the label to be
                still right, above 0, at most 1.
            options: those of `MultimodalData`.

        Raises:
            MuroanError: an unknown `split_by`, a size that is no count, or `visible` is no such share; when examples
                are loaded, `root` does not hold the recordings.
        """
        super().__init__(**options)
        if split_by not in ("recording", "speaker"):
            raise MuroanError(f"dataset.split_by must be recording or speaker, got {split_by!r}")
        sizes = {"train_size": train_size, "val_size": val_size, "test_size": test_size}
        check_whole("dataset", audio_length=audio_length, **sizes)
        self.root, self.split_by, self.augmented = Path(root), split_by, augment
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        self.audio_length, self.visible = audio_length, check_visible(visible)
        self.classes = [str(total) for total in range(19)]

    def natural_modalities(self) -> dict[str, Modality]:
        return {"image": Image((SIDE, SIDE), mean=(0.5,), std=(0.5,)), "audio": Audio(self.audio_length, RATE)}

    def load(self, split: str) -> list[Example]:
        from sklearn.datasets import load_digits

        recordings = self._recordings(split)
        digits = load_digits()
        # A tenth of the pictures is val, a fifth is test.
        order = np.random.default_rng(stable_seed(self.name)).permutation(len(digits.target))
        val, test = len(order) // 10, len(order) // 10 * 3
        chosen = dict(zip(SPLITS, (order[test:], order[:val], order[val:test]), strict=True))[split]
        pictures = {i: upscaled(digits.images[i]) for i in chosen}
        rng = np.random.default_rng(stable_seed(self.name, self.split_by, split))
        examples = []
        for number, (p, r) in enumerate(rng.random((self.sizes[split], 2))):
            picture, recording = chosen[int(p * len(chosen))], recordings[int(r * len(recordings))]
            total = int(digits.target[picture]) + int(recording.name[0])
            inputs = {"image": pictures[picture], "audio": recording}
            examples.append(Example(f"{split}-{number}-digit{picture}-{recording.stem}", inputs, total))
        return examples

    def _recordings(self, split: str) -> list[Path]:
        folder = self.root / "recordings" if (self.root / "recordings").is_dir() else self.root
        found = [path for path in sorted(folder.glob("*.wav")) if RECORDING.fullmatch(path.name)]
        mine = [path for path in found if self._split_of(path) == split]
        if not mine:
            have = f"has {len(found)} recordings, none for {split}" if folder.is_dir() else "is not a folder"
            raise MuroanError(
                f"dataset.root={self.root} {have}: it must hold the recordings (like 7_theo_3.wav) of the Free Spoken "
                f"Digit Dataset: git clone https://github.com/Jakobovski/free-spoken-digit-dataset, "
                f"then dataset.root=free-spoken-digit-dataset or the environment variable FSDD_ROOT"
            )
        return mine

    def _split_of(self, path: Path) -> str:
        parts = RECORDING.fullmatch(path.name)
        assert parts is not None
        if self.split_by == "speaker":
            return SPEAKERS.get(parts["speaker"], "train")
        number = int(parts["number"])
        return "test" if number < 5 else "val" if number < 10 else "train"

    def augment(self, modality: str, raw: Any, rng: np.random.Generator) -> Any:
        """The recording at 0.82 to 1.22 times its speed and pitch, later or clipped, louder or softer, noisier."""
        if modality != "audio":
            return raw
        speed = np.exp(rng.uniform(-0.2, 0.2))
        wave = np.interp(np.arange(0, len(raw), speed), np.arange(len(raw)), raw)
        if rng.random() < 0.5:
            wave = np.concatenate([np.zeros(rng.integers(RATE // 7)), wave])
        else:
            wave = wave[rng.integers(1 + len(wave) // 10) :]
        noise = wave.std() * 10 ** rng.uniform(-2.5, -1) * rng.standard_normal(len(wave))
        return (10 ** rng.uniform(-0.4, 0.4) * (wave + noise)).clip(-1, 1).astype(np.float32)

    def still_valid(self, sample: Sample, removal: Removal) -> bool | None:
        """Whether enough of both digits is left: the share `visible` of the ink, and of the sound's energy.

        Ink is what a pixel is brighter than the darkest one, energy the square of a sample. None where picture or
        sound is not in use, blank or silent.

        Raises:
            MuroanError: the removal does not lie inside the sample.
        """
        if not {"image", "audio"} <= sample.layouts.keys():
            return None
        removed = removed_elements(removal, sample.layouts)
        enough = True
        for name, weigh in (("image", ink), ("audio", energy)):
            grid = sample.layouts[name].grid
            weights, total = weigh(sample.inputs[name], grid)
            if total == 0:
                return None
            gone = weights @ element_mask(removed[name], grid).ravel() if name in removed else 0
            enough = enough and bool(total - gone >= self.visible * total)
        return enough


# A search asks about the same few tensors again and again; a tensor is its own key, whatever its values are.


@lru_cache(maxsize=1024)
def ink(image: Tensor, grid: tuple[int, ...]) -> tuple[np.ndarray, float]:
    """How much brighter each pixel of a (C, H, W) image is than the darkest, (H * W,), and the sum."""
    grey = image.detach().double().cpu().mean(0).numpy().ravel()
    weights = grey - grey.min()
    return weights, float(weights.sum())


@lru_cache(maxsize=1024)
def energy(wave: Tensor, grid: tuple[int, ...]) -> tuple[np.ndarray, float]:
    """The square of each sample that a sound really has, (samples,), and the sum."""
    weights = wave[: grid[0]].detach().double().cpu().numpy() ** 2
    return weights, float(weights.sum())


def upscaled(digit: np.ndarray) -> np.ndarray:
    """An 8x8 digit with values 0 to 16 as (32, 32) bytes."""
    picture = PILImage.fromarray((digit * (255 / 16)).round().astype(np.uint8))
    return np.asarray(picture.resize((SIDE, SIDE), PILImage.Resampling.BICUBIC))
