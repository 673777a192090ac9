"""The base of every dataset: limits, splits, batches whose samples share inputs, and shards for many processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from itertools import groupby
from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch.utils.data import DataLoader, Sampler

from muroan.data.samples import Batch, Example, PreparedDataset, Sample
from muroan.errors import MuroanError, check_number
from muroan.modalities import Modality, Removal, Text, WordTokenizer, stable_seed

SPLITS = ("train", "val", "test")
JUDGED = 16  # samples that are asked about to see whether a dataset can tell what is still valid


class MultimodalData(pl.LightningDataModule, ABC):
    """Base of every dataset. A subclass defines `name`, `classes`, `load` and `natural_modalities`.

    The model's modalities are authoritative, since a pretrained model brings its own tokenizer and image size:
    `prepare_for(model.modalities)` comes before the loaders. Without it the dataset's own modalities are used.

    Attributes:
        name: short name for tables and file names.
        classes: names of the classes; a label is an index into them.
    """

    name: str
    classes: list[str]

    def __init__(
        self,
        *,
        batch_size: int = 64,
        test_batch_size: int | None = None,
        train_limit: int | None = None,
        val_limit: int | None = None,
        test_limit: int | None = None,
        use: Sequence[str] | None = None,
        skip_bad: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ):
        """
        Args:
            batch_size: training samples a batch and process.
            test_batch_size: the same for validation and test; as `batch_size` when None.
            train_limit, val_limit, test_limit: take a random part of so many examples, in dataset order; a larger
                limit takes the same ones and more. None takes all.
            use: names of the modalities to use, None for all: a unimodal model is trained with one name.
            skip_bad: leave out and count samples that cannot be read, instead of stopping at the first.
            num_workers: loader processes.
            seed: of the limits, of the training order and of the augmentation.

        Raises:
            MuroanError: an option is not a positive number.
        """
        super().__init__()
        self.batch_size, self.test_batch_size = batch_size, test_batch_size or batch_size
        self.limits = {"train": train_limit, "val": val_limit, "test": test_limit}
        self.use = [use] if isinstance(use, str) else None if use is None else list(use)
        self.skip_bad, self.num_workers, self.seed = skip_bad, num_workers, seed
        self._examples: dict[str, list[Example]] = {}
        self._natural: dict[str, Modality] | None = None
        self._modalities: dict[str, Modality] | None = None
        sizes = {"batch_size": batch_size, "test_batch_size": test_batch_size}
        sizes |= {f"{split}_limit": limit for split, limit in self.limits.items()}
        for option, value in sizes.items():
            if value is not None and (not isinstance(value, int) or value < 1):
                raise MuroanError(f"dataset.{option} must be a positive whole number, got {value!r}")
        for option, value in (("num_workers", num_workers), ("seed", seed)):
            if not isinstance(value, int) or value < 0:
                raise MuroanError(f"dataset.{option} must be a whole number, 0 or more, got {value!r}")

    # What a subclass defines

    @abstractmethod
    def load(self, split: str) -> list[Example]:
        """All examples of a split ("train", "val" or "test"), in a stable order."""

    @abstractmethod
    def natural_modalities(self) -> dict[str, Modality]:
        """All modalities, as a model trained from scratch takes them."""

    def augment(self, modality: str, raw: Any, rng: np.random.Generator) -> Any:
        """A random variation of a raw input of a training example. The base varies nothing."""
        return raw

    def still_valid(self, sample: Sample, removal: Removal) -> bool | None:
        """Whether the label is still right for what the removal leaves, for a reader who knows what was removed.

        A flip is the model's fault only then; otherwise the evidence itself is gone. What stands in for removed
        elements does not matter. Where it is in doubt the answer is False.

        Returns:
            None when the dataset cannot tell, as here in the base.

        Raises:
            MuroanError: the removal does not lie inside the sample.
        """
        return None

    def judge(self, split: str) -> Callable[[Sample, Removal], bool | None] | None:
        """`still_valid`, or None where the dataset cannot tell: not even when nothing is removed.

        A few samples of the split are asked about.
        """
        if type(self).still_valid is MultimodalData.still_valid:
            return None
        prepared = self.prepared(split)
        few = (prepared[i] for i in range(min(JUDGED, len(prepared))))
        told = any(self.still_valid(s, Removal()) is not None for s in few if isinstance(s, Sample))
        if not told:
            return None
        judge = copy(self)
        judge.trainer = None  # cannot be sent to another process, and has no say
        return judge.still_valid

    augmented = False  # a subclass that overrides `augment` sets this to True when it is wanted

    # What everyone else calls

    def modalities(self) -> dict[str, Modality]:
        """The natural modalities that `use` names, for a model trained from scratch.

        Raises:
            MuroanError: `use` names one that the dataset does not have, or none at all.
        """
        if self._natural is None:
            self._natural = self.natural_modalities()
        if self.use is None:
            return dict(self._natural)
        unknown = [name for name in self.use if name not in self._natural]
        if unknown or not self.use:
            raise MuroanError(f"dataset.use must name some of {', '.join(self._natural)}, got {self.use}")
        return {name: modality for name, modality in self._natural.items() if name in self.use}

    def prepare_for(self, modalities: Mapping[str, Modality]) -> None:
        """Prepare inputs as this model takes them.

        Raises:
            MuroanError: the model takes a modality that the dataset does not have, or that `use` leaves out.
        """
        missing = [name for name in modalities if name not in self.modalities()]
        if missing:
            used = "" if self.use is None else f" with dataset.use={self.use}"
            raise MuroanError(
                f"the model takes {', '.join(modalities)}, but dataset {self.name}{used} has "
                f"{', '.join(self.modalities())}: {', '.join(missing)} is missing"
            )
        self._modalities = dict(modalities)

    def examples(self, split: str) -> list[Example]:
        """The examples of a split within its limit, in dataset order.

        Raises:
            MuroanError: there is no such split, it has no examples, or two of one id.
        """
        if split not in SPLITS:
            raise MuroanError(f"a split is one of {', '.join(SPLITS)}, got {split!r}")
        if split not in self._examples:
            examples = self.load(split)
            if not examples:
                raise MuroanError(f"the {split} split of {self.name} has no examples")
            often = Counter(example.id for example in examples)
            if twice := [id for id, times in often.items() if times > 1]:
                raise MuroanError(
                    f"the {split} split of {self.name} has {len(twice)} ids of more than one sample, such as "
                    f"{twice[0]!r} ({often[twice[0]]} samples): records go by ids; give every sample its own"
                )
            limit = self.limits[split]
            if limit is not None and limit < len(examples):
                order = np.random.default_rng(stable_seed(self.seed, self.name, split)).permutation(len(examples))
                examples = [examples[i] for i in sorted(order[:limit])]
            self._examples[split] = examples
        return self._examples[split]

    def prepared(self, split: str, limited: bool = True) -> PreparedDataset:
        """The samples of a split as the model takes them, never augmented; those within its limit, or all."""
        modalities = self._modalities or self.modalities()
        examples = self.examples(split) if limited or self.limits[split] is None else self.load(split)
        return PreparedDataset(examples, modalities, len(self.classes), skip_bad=self.skip_bad)

    def train_dataloader(self) -> DataLoader:
        dataset = self.prepared("train")
        if self.augmented:
            dataset.augment, dataset.seed = self.augment, self.seed
        order = GroupShuffle(dataset, self.seed, *self._process())
        return self._loader(dataset, self.batch_size, order)

    def val_dataloader(self) -> DataLoader:
        return self._in_order("val")

    def test_dataloader(self) -> DataLoader:
        return self._in_order("test")

    def _in_order(self, split: str) -> DataLoader:
        dataset, (rank, processes) = self.prepared(split), self._process()
        if len(groups(dataset.examples)) < processes:
            raise MuroanError(
                f"the {split} split of {self.name} has {len(groups(dataset.examples))} groups of samples that belong "
                f"together, fewer than the {processes} processes that share them: take fewer devices or more samples"
            )
        return self._loader(dataset, self.test_batch_size, shard(dataset.examples, rank, processes))

    def _process(self) -> tuple[int, int]:
        """Rank of this process and number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _loader(self, dataset: PreparedDataset, batch_size: int, order: Any) -> DataLoader:
        workers = min(self.num_workers, len(dataset))
        return DataLoader(dataset, batch_size, sampler=order, collate_fn=Batch.of, num_workers=workers)


def groups(examples: Sequence[Example]) -> list[list[int]]:
    """Indices of neighbouring examples of one group; an example without a group stands alone."""
    keyed = groupby(range(len(examples)), key=lambda i: (i,) if examples[i].group is None else examples[i].group)
    return [list(members) for _, members in keyed]


def shard(examples: Sequence[Example], rank: int, world_size: int) -> list[int]:
    """The examples of one process, in order: every `world_size`-th group. Each example is in exactly one shard."""
    return [i for members in groups(examples)[rank::world_size] for i in members]


class GroupShuffle(Sampler[int]):
    """A new random order of the groups in every epoch; the members of a group stay together.

    With several processes each takes an equal stretch of the same order, as gradients are averaged batch by batch;
    up to `world_size - 1` examples come twice to make them equal.
    """

    def __init__(self, dataset: PreparedDataset, seed: int, rank: int = 0, world_size: int = 1):
        self.dataset, self.seed, self.rank = dataset, seed, rank
        self._groups = groups(dataset.examples)
        self._length, self._total = -(-len(dataset) // world_size), len(dataset)

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before every epoch."""
        self.dataset.epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng(stable_seed(self.seed, self.dataset.epoch))
        order = [i for g in rng.permutation(len(self._groups)) for i in self._groups[g]]
        start = self.rank * self._length
        return iter([order[i % self._total] for i in range(start, start + self._length)])


def check_visible(visible: float) -> float:
    """The option `visible` of a dataset that can tell whether a label is still right.

    Raises:
        MuroanError: it does not lie in (0, 1].
    """
    check_number("dataset", 0, 1, above=True, visible=visible)
    return visible


def scratch_text(texts: Sequence[str], max_length: int | None = None, truncate: bool = False) -> Text:
    """Text for models trained from scratch on these training texts: their words, and room for the longest of them."""
    tokenizer = WordTokenizer.from_texts(texts)
    if max_length is None:
        longest = max((sum(map(len, tokenizer.words_to_ids(text.split()))) for text in set(texts)), default=0)
        max_length = len(tokenizer.prefix) + longest + len(tokenizer.suffix)
    return Text(tokenizer, max_length, truncate)
