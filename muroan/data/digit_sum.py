"""A handwritten digit and a spoken digit; the class is their sum, so that neither alone tells it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from muroan.data.base import SPLITS, MultimodalData
from muroan.data.samples import Example
from muroan.errors import MuroanError
from muroan.modalities import Audio, Image, Modality, stable_seed

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
            options: those of `MultimodalData`.

        Raises:
            MuroanError: an unknown `split_by`; when examples are loaded, `root` does not hold the recordings.
        """
        super().__init__(**options)
        if split_by not in ("recording", "speaker"):
            raise MuroanError(f"dataset.split_by must be recording or speaker, got {split_by!r}")
        self.root, self.split_by, self.augmented = Path(root), split_by, augment
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        self.audio_length = audio_length
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


def upscaled(digit: np.ndarray) -> np.ndarray:
    """An 8x8 digit with values 0 to 16 as (32, 32) bytes."""
    picture = PILImage.fromarray((digit * (255 / 16)).round().astype(np.uint8))
    return np.asarray(picture.resize((SIDE, SIDE), PILImage.Resampling.BICUBIC))
