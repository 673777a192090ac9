"""What defences share: choosing and changing samples of a training batch, and what the training cost."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from muroan.attacks.base import ThreatModel
from muroan.data.base import MultimodalData
from muroan.data.samples import Batch, Sample
from muroan.errors import check_number
from muroan.modalities import Modality, Removal, stable_seed
from muroan.models.base import MultimodalModel
from muroan.training.module import MultimodalModule

Changes = Mapping[int, Mapping[str, Tensor]]  # by row of a batch, then by modality: (*shape)


@dataclass
class Cost:
    """What hardening took.

    Attributes:
        rows: samples that went forwards and backwards through the model to train it, repeats counted.
        attack_forwards, attack_backwards: passes of the attacks on training samples, counted a sample.
        seconds: of wall time, without what judges the epochs.
    """

    rows: int = 0
    attack_forwards: int = 0
    attack_backwards: int = 0
    seconds: float = 0.0


class Defense(MultimodalModule):
    """Base of every defence: a subclass writes the `training_step` that makes the model harder to flip.

        class Forgetful(Defense):
            def training_step(self, batch, batch_idx):
                rows = self.draw_rows(batch, self.rng(batch_idx))
                blank = {row: {"image": torch.zeros_like(batch.samples[row].inputs["image"])} for row in rows}
                return super().training_step(self.changed(batch, blank), batch_idx)

    What is drawn depends on the seed, the epoch, the place of the batch and the process alone, never on a global
    generator, so that a defence that changes nothing trains as if it were not there.

    Args:
        model: the target model, trained or not.
        ratio: share of each batch that is changed, 0 to 1.
        threat_model: what stands in for removed parts, and how fine they are.
        seed: of all that is drawn.
        training: see `MultimodalModule`.

    Attributes:
        control: whether it is a cheap control, without which no claim about a defence stands.
        voting: whether it trains the base of a vote, which is not to be judged by attacks on it alone.
        cost: what the training took in this process so far.

    Raises:
        MuroanError: the ratio is none; the threat model or the defence does not fit the model.
    """

    control = False
    voting = False

    def __init__(
        self,
        model: MultimodalModel,
        ratio: float = 0.5,
        threat_model: ThreatModel | None = None,
        seed: int = 0,
        **training: Any,
    ):
        super().__init__(model, **training)
        check_number("defense", 0, 1, ratio=ratio)
        self.ratio, self.seed = ratio, seed
        self.threat_model = (threat_model or ThreatModel()).complete(model.modalities)
        self.cost = Cost()

    # -- for subclasses -------------------------------------------------------------------------------------

    def rng(self, batch_idx: int) -> np.random.Generator:
        """A generator of this batch's own."""
        place = self.current_epoch, batch_idx, self.global_rank
        return np.random.default_rng(stable_seed(self.seed, type(self).__name__, *place))

    def draw_rows(self, batch: Batch, rng: np.random.Generator) -> list[int]:
        """The rows of a batch that shall be changed: a random part of it."""
        count = int(self.ratio * len(batch) + 0.5)
        return sorted(rng.permutation(len(batch))[:count].tolist())

    def changed(self, batch: Batch, changes: Changes) -> Batch:
        """The batch with other inputs in some rows. Without changes it is the batch itself, to the bit."""
        if not changes:
            return batch
        samples = list(batch.samples)
        for row, inputs in changes.items():
            samples[row] = replace(samples[row], inputs={**samples[row].inputs, **inputs})
        return self.batch_of(samples, batch)

    @staticmethod
    def batch_of(samples: Sequence[Sample], like: Batch) -> Batch:
        """A batch of these samples on the device of another."""
        return Batch.of(samples).to(like.labels.device)

    @property
    def data(self) -> MultimodalData | None:
        """The dataset that is trained on."""
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, MultimodalData) else None

    # -- the account ----------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._clock = time.monotonic()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.cost.rows += len(batch)
        self._spend()

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING:  # not where a trained model is judged by itself
            self._spend()

    def on_validation_end(self) -> None:
        self._clock = time.monotonic()  # what judges an epoch is no part of its cost

    def _spend(self) -> None:
        now = time.monotonic()
        self.cost.seconds, self._clock = self.cost.seconds + now - self._clock, now

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["cost"] = asdict(self.cost)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.cost = Cost(**checkpoint["cost"])

    def total_cost(self) -> Cost:
        """What the training took: passes of all processes, seconds of this one."""
        passes = torch.tensor([self.cost.rows, self.cost.attack_forwards, self.cost.attack_backwards])
        strategy = self.trainer.strategy
        # After training the module lies on the CPU again, where NCCL sums nothing up.
        total: Any = strategy.reduce(passes.to(strategy.root_device), reduce_op="sum")
        rows, forwards, backwards = total.tolist()
        return Cost(rows, forwards, backwards, self.cost.seconds)


def without(
    modalities: Mapping[str, Modality],
    samples: Sequence[Sample],
    removals: Sequence[Removal],
    threat_model: ThreatModel,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """What removals make of samples' inputs.

    Args:
        removals: one a sample.
        threat_model: complete.
        seed: of noise that stands in for removed elements, as the engine's.

    Returns:
        For each sample, (*shape) a modality that its removal touches.
    """
    changed: list[dict[str, Tensor]] = [{} for _ in samples]
    for name, modality in modalities.items():
        rows = [row for row, removal in enumerate(removals) if name in removal.modalities]
        if not rows:
            continue
        layouts = [samples[row].layouts[name] for row in rows]
        clean = [samples[row].inputs[name] for row in rows]
        replacement = threat_model.replacement[name]
        found = [
            modality.baseline(x, layout, replacement, stable_seed(seed, "noise", samples[row].id))
            for row, x, layout in zip(rows, clean, layouts, strict=True)
        ]
        baselines = [x for x in found if x is not None]
        boxes = modality.boxes([[r for r in removals[row].regions if r.modality == name] for row in rows], layouts)
        occluded = modality.occlude(
            torch.stack(clean), boxes, replacement, torch.stack(baselines) if baselines else None
        )
        for row, x in zip(rows, occluded, strict=True):
            changed[row][name] = x
    return changed
