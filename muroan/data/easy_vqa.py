"""easy-VQA: questions about one coloured shape, small enough to train on in minutes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from muroan.data.base import MultimodalData, scratch_text
from muroan.data.samples import Example
from muroan.errors import MuroanError
from muroan.modalities import Image, Modality, stable_seed


class EasyVQA(MultimodalData):
    """4,000 + 1,000 pictures of 64x64 pixels and 38,575 + 9,673 questions about them; 13 answers.

    Train and val are the package's training pictures, test is its test. A group is a picture. Ids name the split in
    the package, the picture and the question about it, "test-432-3", whatever the options are.
    """

    name = "easy_vqa"

    def __init__(self, val_pictures: int = 400, **options: Any):
        """
        Args:
            val_pictures: training pictures that are held out, with their questions, for validation.
            options: those of `MultimodalData`.

        Raises:
            MuroanError: the package easy-vqa is not installed, or no picture would be left to train on.
        """
        super().__init__(**options)
        try:
            import easy_vqa
        except ImportError:
            raise MuroanError("the dataset easy_vqa is a Python package: pip install easy-vqa") from None
        self._package = easy_vqa
        self.val_pictures = val_pictures
        self.classes = sorted(easy_vqa.get_answers())

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
