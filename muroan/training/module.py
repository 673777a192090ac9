"""The LightningModule around a target model: trains it, and gives `trainer.test` something to attack."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric

from muroan.data.samples import Batch
from muroan.errors import MuroanError
from muroan.models.base import MultimodalModel, Prediction, model_dtype


class MultimodalModule(pl.LightningModule):
    """Cross-entropy training with AdamW and a one-cycle learning rate (Smith and Topin, arXiv 1708.07120).

    Args:
        model: the target model.
        lr: peak learning rate.
        weight_decay: of matrices; biases, norms and embeddings of one axis are not decayed.
        warmup: share of the steps in which the learning rate rises.

    Logs `train/loss`, `val/loss`, `val/accuracy` and `test/accuracy` (percent).

    Attributes:
        unreadable: of each split, why samples were left out, by their ids; of all processes since the end of an epoch.

    Raises:
        MuroanError: at the end of an epoch, no sample of a split could be read.
    """

    def __init__(self, model: MultimodalModel, lr: float = 1e-3, weight_decay: float = 0.01, warmup: float = 0.3):
        super().__init__()
        self.model = model
        self.lr, self.weight_decay, self.warmup = lr, weight_decay, warmup
        self.accuracy = MeanMetric()
        self.unreadable: dict[str, dict[str, str]] = {"train": {}, "val": {}, "test": {}}
        self._read = dict.fromkeys(self.unreadable, 0)

    def on_fit_start(self) -> None:
        # Pretrained models come in evaluation mode, and Lightning leaves modes as they are. Where some parts are in one
        # and some in the other, that is what their owner wants.
        if not any(module.training for module in self.model.modules()):
            self.model.train()

    def forward(self, batch: Batch) -> Prediction:
        return self.model(self.inputs(batch), batch.rows)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The distinct inputs of a batch in the model's type, which precision=64-true, bf16-true or 16-true changes."""
        dtype = model_dtype(self.model)
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.inputs.items()}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        if len(batch) == 0:
            return self.no_loss()
        loss = F.cross_entropy(self(batch).logits, batch.labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def no_loss(self) -> Tensor | None:
        """The loss of a batch of which no sample could be read; other processes wait for its gradients."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return None
        return 0.0 * torch.stack([p.sum() for p in self.model.parameters() if p.requires_grad]).sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._judge(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._judge(batch, "test")

    def _judge(self, batch: Batch, split: str) -> None:
        if len(batch) == 0:
            return
        logits = self(batch).logits
        self.accuracy.update(100.0 * (logits.argmax(1) == batch.labels).float())
        self.log(f"{split}/accuracy", self.accuracy, prog_bar=True, on_epoch=True, on_step=False, batch_size=len(batch))
        if split == "val":
            loss = F.cross_entropy(logits, batch.labels)
            self.log("val/loss", loss, prog_bar=True, batch_size=len(batch), sync_dist=True)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._count(batch, "train")

    def on_validation_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._count(batch, "val")

    def on_test_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._count(batch, "test")

    def on_train_epoch_end(self) -> None:
        self._check_read("train")

    def on_validation_epoch_end(self) -> None:
        self._check_read("val")

    def on_test_epoch_end(self) -> None:
        self._check_read("test")

    def _count(self, batch: Batch, split: str) -> None:
        self._read[split] += len(batch)
        self.unreadable[split].update(batch.bad)

    def _check_read(self, split: str) -> None:
        counts = torch.tensor([self._read[split], sum(map(len, self.unreadable.values()))], device=self.device)
        read, left_out = self.trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        if left_out:
            self._share_unreadable()  # by now, as checkpoints are the first process's
        if not read and (why := next(iter(self.unreadable[split].values()), "")):
            raise MuroanError(f"no sample of {split} could be read, of {len(self.unreadable[split])}; the first: {why}")

    def _share_unreadable(self) -> None:
        """Let all processes know what any could not read; a sample may come to another one in every epoch."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            found: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(found, self.unreadable)
            for split, own in self.unreadable.items():
                own.update({id: why for theirs in found for id, why in theirs[split].items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["unreadable"] = self.unreadable

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for split, known in checkpoint.get("unreadable", {}).items():
            self.unreadable[split].update(known)

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.model.parameters() if p.requires_grad and p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.requires_grad and p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        rising = float(self.warmup)
        if rising * steps == 1:  # the schedule would divide by how many steps come after the first of them
            rising *= 1 + 1e-6
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps, pct_start=rising)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The model's weights in a Lightning checkpoint of `MultimodalModule`.

    Raises:
        MuroanError: the file is missing, or is no such checkpoint.
    """
    if not checkpoint.is_file():
        raise MuroanError(f"checkpoint {checkpoint} is not there")
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        return {k.removeprefix("model."): v for k, v in content["state_dict"].items() if k.startswith("model.")}
    except Exception as error:  # broken bytes raise all kinds of errors
        reason = next(iter(str(error).splitlines()), "")
        raise MuroanError(
            f"{checkpoint} is not a checkpoint of `muroan train`, or damaged ({type(error).__name__}: {reason})"
        ) from None


def load_weights(model: MultimodalModel, checkpoint: Path) -> None:
    """Load the model's weights from a Lightning checkpoint of `MultimodalModule`.

    Raises:
        MuroanError: the file is missing, is no such checkpoint, or its weights do not fit the model.
    """
    state = read_weights(checkpoint)
    own = model.state_dict()
    shapes = [
        f"{k} is {tuple(state[k].shape)} there and {tuple(own[k].shape)} here"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    missing = [f"{k} is missing there" for k in own if k not in state]
    unknown = [f"{k} is unknown here" for k in state if k not in own]
    problems = shapes + missing + unknown
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise MuroanError(
            f"checkpoint {checkpoint} does not fit the model: {'; '.join(problems[:3])}{more}: attack with the same "
            f"model and dataset options that it was trained with"
        )
    model.load_state_dict(state)


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 over the names, types and bytes of all weights: equal models have equal hashes, whatever the file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
