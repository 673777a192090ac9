"""From raw examples to the samples and batches that models take. No Lightning in here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from muroan.errors import MuroanError
from muroan.modalities import Layout, Modality, stable_seed


@dataclass(frozen=True, slots=True)
class Example:
    """One raw example of a dataset.

    Attributes:
        id: unique in its split, and stable: records are matched by it.
        inputs: one raw value a modality: a PIL image or array, a string, a waveform, or the path of a file.
        label: index of the class.
        group: examples of one group share an input (the questions about one picture) and are batched together.
    """

    id: str
    inputs: Mapping[str, Any]
    label: int
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """An example as a model takes it.

    Attributes:
        index: place in its split; records are sorted by it.
        inputs: (*shape) tensor a modality.
        layouts: where the elements of each input lie.
    """

    id: str
    index: int
    inputs: dict[str, Tensor]
    layouts: dict[str, Layout]
    label: int


class Batch:
    """Samples and their stacked inputs. An input that several samples share is stacked, and encoded, once.

    No dataclass: Lightning would look into one, samples and all, for numbers to convert to the trainer's precision.

    Args:
        inputs: (U, *shape) a modality, the distinct inputs.
        rows: (B,) a modality: which of them each sample has.
        labels: (B,) classes.
        bad: (id, reason) of the samples that were left out of this batch.
    """

    def __init__(
        self,
        samples: list[Sample],
        inputs: dict[str, Tensor],
        rows: dict[str, Tensor],
        labels: Tensor,
        bad: Sequence[tuple[str, str]] = (),
    ):
        self.samples, self.inputs, self.rows, self.labels, self.bad = samples, inputs, rows, labels, list(bad)

    @classmethod
    def of(cls, samples: Sequence[Sample | BadSample]) -> Batch:
        good = [s for s in samples if isinstance(s, Sample)]
        bad = [(s.id, s.reason) for s in samples if isinstance(s, BadSample)]
        inputs: dict[str, Tensor] = {}
        rows: dict[str, Tensor] = {}
        for name in good[0].inputs if good else ():
            distinct: dict[int, int] = {}
            tensors: list[Tensor] = []
            for sample in good:
                tensor = sample.inputs[name]
                if id(tensor) not in distinct:
                    distinct[id(tensor)] = len(tensors)
                    tensors.append(tensor)
            inputs[name] = torch.stack(tensors)
            rows[name] = torch.tensor([distinct[id(s.inputs[name])] for s in good])
        return cls(good, inputs, rows, torch.tensor([s.label for s in good], dtype=torch.long), bad)

    def __len__(self) -> int:
        return len(self.samples)

    def __getstate__(self) -> dict[str, Any]:
        # A loader process hands over the stacked tensors alone: every tensor costs it a file descriptor, and the
        # samples' own would soon use up what the system allows.
        return {**self.__dict__, "samples": [replace(sample, inputs={}) for sample in self.samples]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        views = {name: tensor.unbind() for name, tensor in self.inputs.items()}
        for i, sample in enumerate(self.samples):
            self.samples[i] = replace(sample, inputs={name: views[name][self.rows[name][i]] for name in views})

    def to(self, device: Any, **kwargs: Any) -> Batch:
        """The batch with its stacked tensors on the device; Lightning's batch transfer calls this."""

        def move(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device, **kwargs) for name, tensor in tensors.items()}

        labels = self.labels.to(device, **kwargs)
        return Batch(self.samples, move(self.inputs), move(self.rows), labels, self.bad)


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that could not be read, and why: it is skipped and counted."""

    id: str
    reason: str


class PreparedDataset(Dataset):
    """Examples prepared for a model, lazily; files and texts that neighbouring examples share are prepared once.

    Args:
        classes: number of classes; a label outside is an error.
        skip_bad: yield a `BadSample` for an example that cannot be read instead of raising.
        remember: how many of the last prepared files and texts are kept.

    Attributes:
        augment: varies a raw input of the named modality at random, or None. The random numbers depend on `seed`,
            `epoch` and the example alone, not on the order or the number of loader processes.

    Raises:
        MuroanError: on access, naming the example and what is wrong with it.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        modalities: Mapping[str, Modality],
        classes: int,
        skip_bad: bool = False,
        remember: int = 128,
    ):
        self.examples, self.modalities = examples, modalities
        self.classes, self.skip_bad = classes, skip_bad
        self.augment: Callable[[str, Any, np.random.Generator], Any] | None = None
        self.seed = self.epoch = 0
        self._remember = remember
        self._prepared: OrderedDict[tuple[str, Path | str], tuple[Tensor, Layout]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Sample | BadSample]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Sample | BadSample:
        example = self.examples[index]
        if not 0 <= example.label < self.classes:
            raise MuroanError(
                f"sample {example.id!r} has label {example.label}, but there are {self.classes} classes "
                f"(0 to {self.classes - 1}): name every class in dataset.classes"
            )
        try:
            prepared = {name: self._prepare(name, example) for name in self.modalities}
        except MuroanError as error:
            if self.skip_bad:
                return BadSample(example.id, str(error))
            raise
        inputs = {name: tensor for name, (tensor, _) in prepared.items()}
        layouts = {name: layout for name, (_, layout) in prepared.items()}
        return Sample(example.id, index, inputs, layouts, example.label)

    def _prepare(self, name: str, example: Example) -> tuple[Tensor, Layout]:
        if name not in example.inputs:
            raise MuroanError(f"sample {example.id!r} has {sorted(example.inputs)}, but the model takes {name!r}")
        raw = example.inputs[name]
        # A varied input is nobody else's, so it is not remembered.
        key = (name, raw) if isinstance(raw, Path | str) and self.augment is None else None
        if key is not None and key in self._prepared:
            self._prepared.move_to_end(key)
            return self._prepared[key]
        try:
            modality = self.modalities[name]
            value = modality.read(raw) if isinstance(raw, Path) else raw
            if self.augment is not None:
                rng = np.random.default_rng(stable_seed(self.seed, self.epoch, example.id, name))
                value = self.augment(name, value, rng)
            prepared = modality.prepare(value)
        except MuroanError as error:
            raise MuroanError(f"sample {example.id!r}, {name}: {error}") from None
        if key is not None:
            self._prepared[key] = prepared
            if len(self._prepared) > self._remember:
                self._prepared.popitem(last=False)
        return prepared
