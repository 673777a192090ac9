"""What lies on the device for the samples that the engine is at: their inputs, and the features of parts of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from muroan.attacks.base import ThreatModel
from muroan.data.samples import Sample
from muroan.models.base import Features, MultimodalModel, map_features, model_dtype

# Features of occluded inputs that are remembered, a modality: of so many batches, within so many bytes.
BATCHES, BYTES = 64, 2**28


def take_rows(places: Tensor) -> Callable[[Tensor], Tensor]:
    """Takes the rows at these places out of a tensor; on a CPU five times as fast as by indexing."""
    return lambda room: room.index_select(0, places)


class Memory:
    """Features of the last occluded inputs of one modality that were encoded, by what is left of which sample.

    A removal across modalities often has a part that an earlier one had: a search tries the same words beside many
    regions of an image, or one more region beside the same sound.
    """

    def __init__(self, features: Features, rows: int):
        self.held: list[Any] = [None] * rows
        self.places: dict[Any, int] = {}
        self.next = 0
        self.features = map_features(lambda t: t.new_empty((rows, *t.shape[1:])), features)

    def take_in(self, parts: Sequence[Any]) -> list[int]:
        """Places for the features of some parts, those of what has been held longest."""
        places = [(self.next + i) % len(self.held) for i in range(len(parts))]
        for part, place in zip(parts, places, strict=True):
            self.places.pop(self.held[place], None)
            self.held[place], self.places[part] = part, place
        self.next = (self.next + len(parts)) % len(self.held)
        return places


class DeviceStore:
    """Tensors of the live samples, one row a slot: static memory, however many samples there are."""

    def __init__(self, model: MultimodalModel, threat_model: ThreatModel, slots: int, device: torch.device):
        self.model, self.threat_model, self.slots, self.device = model, threat_model, slots, device
        self.dtype = model_dtype(model)
        self.inputs: dict[str, Tensor] = {}
        self.baselines: dict[str, Tensor] = {}
        self.features: dict[str, Features] = {}
        self.memories: dict[str, Memory | None] = {}  # None where nothing is remembered
        self.embedding: Tensor | None = None
        self.labels = torch.zeros(slots, dtype=torch.long, device=device)

    def tensor(self, values: Any) -> Tensor:
        return self.moved(torch.tensor(values))

    def moved(self, x: Tensor) -> Tensor:
        """A tensor of the CPU's on the model's device, without waiting for what a GPU has been given to do before."""
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x.to(self.device)

    def _room(self, like: Tensor) -> Tensor:
        return torch.zeros((self.slots, *like.shape[1:]), dtype=like.dtype, device=self.device)

    def admit(self, samples: Sequence[tuple[int, Sample, int]]) -> None:
        """Put samples into slots: (slot, sample, seed of its noise) each."""
        rows = self.tensor([slot for slot, _, _ in samples])
        self.labels[rows] = self.tensor([s.label for _, s, _ in samples])
        for name, modality in self.model.modalities.items():
            replacement = self.threat_model.replacement[name]
            # One by one: what stands in for removed elements must not depend on who is admitted together.
            found = [modality.baseline(s.inputs[name], s.layouts[name], replacement, seed) for _, s, seed in samples]
            self._fill(self.inputs, name, rows, [s.inputs[name] for _, s, _ in samples])
            self._fill(self.baselines, name, rows, [baseline for baseline in found if baseline is not None])

    def _fill(self, store: dict[str, Tensor], name: str, rows: Tensor, values: list[Tensor]) -> None:
        if values:
            stacked = torch.stack(values)
            stacked = self.moved(stacked.to(self.dtype) if stacked.is_floating_point() else stacked)
            if name not in store:
                store[name] = self._room(stacked)
                if name in self.model.channels_last:
                    store[name] = store[name].movedim(1, -1).contiguous().movedim(-1, 1)
            store[name][rows] = stacked

    def inputs_at(self, name: str, places: Tensor) -> tuple[Tensor, Tensor | None]:
        """The inputs (P, *shape) of the slots at these places, and what stands in for their removed elements, if that
        needs values: both laid out in memory as the model wants them."""

        def rows(room: Tensor) -> Tensor:
            if name in self.model.channels_last:
                return take_rows(places)(room.movedim(1, -1)).movedim(-1, 1)
            return take_rows(places)(room)

        return rows(self.inputs[name]), rows(self.baselines[name]) if name in self.baselines else None

    def keep_features(self, name: str, slots: Tensor, features: Features) -> None:
        if name not in self.features:
            self.features[name] = map_features(self._room, features)
        map_features(lambda room, new: room.index_copy_(0, slots, new), self.features[name], features)

    def recall(self, name: str, part: Any) -> int | None:
        """Where the features of a part are remembered."""
        memory = self.memories.get(name)
        return None if memory is None else memory.places.get(part)

    def recalled(self, name: str, places: Tensor) -> Features:
        """The features (P, ...) at these places."""
        memory = self.memories[name]
        assert memory is not None
        return map_features(take_rows(places), memory.features)

    def remember(self, name: str, parts: Sequence[Any], features: Features) -> None:
        """Keep the features (P, ...) of some parts, as far as there is room for them."""
        if name not in self.memories:
            tensors = features if isinstance(features, tuple) else (features,)
            rows = min(BATCHES * self.slots, BYTES // max(1, sum(t[0].nbytes for t in tensors)))
            self.memories[name] = None
            if rows >= 4 * self.slots:  # fewer would be gone before they are asked for again
                try:
                    self.memories[name] = Memory(features, rows)
                except torch.OutOfMemoryError:
                    return
        if (memory := self.memories[name]) is not None:
            at = self.tensor(memory.take_in(parts))
            map_features(lambda room, new: room.index_copy_(0, at, new), memory.features, features)

    def keep_embedding(self, slots: Tensor, embedding: Tensor) -> None:
        if self.embedding is None:
            self.embedding = self._room(embedding)
        self.embedding[slots] = embedding
