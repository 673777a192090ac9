"""The attack as a Lightning callback: `trainer.test(module, data)` attacks every sample that it tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from torchmetrics import Metric
from tqdm.auto import tqdm

from muroan.attacks.base import Attack, ThreatModel
from muroan.data.base import MultimodalData
from muroan.data.samples import Batch, Sample
from muroan.engine import QueryEngine
from muroan.errors import MuroanError
from muroan.metrics import AttackSuccessRate, CleanAccuracy, DecoupledFraction, QueryCount, RobustAccuracy
from muroan.models.base import MultimodalModel
from muroan.results import AttackResult, RecordFolder, RunFolder

RUNNING_POINTS = 100  # how often the figures so far are logged in a run
DONORS = 64  # validation samples that an attack may take parts from


def donors(data: MultimodalData) -> list[Sample]:
    """The first validation samples, be they within its limit or not: they are neither trained on nor attacked."""
    prepared = data.prepared("val", limited=False)
    found = (prepared[i] for i in range(min(DONORS, len(prepared))))
    return [sample for sample in found if isinstance(sample, Sample)]


def autocast_precision(trainer: pl.Trainer) -> str:
    """The engine's `precision` for a trainer's."""
    return {"bf16-mixed": "bf16", "16-mixed": "16"}.get(str(trainer.precision), "32")


class RobustValidation(pl.Callback):
    """Attacks validation samples after each epoch of training and logs `val/robust_accuracy` and
    `val/attack_success_rate`, in percent.

    Args:
        attack, threat_model, batch_size, seed: see `QueryEngine`; the draws are the same after every epoch.
        samples: the first so many validation samples, over all processes.
    """

    def __init__(
        self, attack: Attack, samples: int, threat_model: ThreatModel | None = None, batch_size: int = 64, seed: int = 0
    ):
        self.attack, self.samples, self.threat_model = attack, samples, threat_model
        self.batch_size, self.seed = batch_size, seed

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(data, MultimodalData):
            raise MuroanError("RobustValidation needs a MultimodalData as the trainer's datamodule")
        model: Any = pl_module.model
        engine = QueryEngine(
            model,
            self.attack,
            self.threat_model,
            self.batch_size,
            autocast_precision(trainer),
            self.seed,
            keep_media=0,
            donors=donors(data) if self.attack.needs_donors else (),
            still_valid=data.judge("val"),
            audit=False,
        )
        robust, success = RobustAccuracy(), AttackSuccessRate()  # on the CPU: a GPU would be waited for at each sample
        prepared = data.prepared("val")
        places = range(trainer.global_rank, min(self.samples, len(prepared)), trainer.world_size)
        samples = (prepared[place] for place in places)
        for r in engine.run(sample for sample in samples if isinstance(sample, Sample)):
            labels = (r.clean_label, r.adversarial_label, r.label)
            robust.update(*(torch.tensor([label]) for label in labels))
            success.update(*(torch.tensor([x]) for x in (r.flipped, r.attacked)))
        pl_module.log("val/robust_accuracy", robust.to(pl_module.device).compute().float(), prog_bar=True)
        pl_module.log("val/attack_success_rate", success.to(pl_module.device).compute().float())


class StopEarly(EarlyStopping):
    """Lightning's, which, when a training goes on from its last checkpoint, knows that it had stopped already."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        trainer.should_stop |= self.wait_count >= max(1, self.patience)


class RecordingCallback(pl.Callback):
    """Makes a record of every test sample; records stream to a run folder as they come.

    A sample that has a record in the folder already is not asked about again. With several processes each sees to the
    samples that its loader gives it, and the records of all are merged at the end.

    Args:
        what: is done to the samples: the progress bar's name.
        folder: the kind of the run's folder; path: where it is.
        run: what `run.json` shall say, with at least `identity`.
        progress: show a progress bar (in the first process).

    After the test, `records` holds all records (in the first process).
    """

    def __init__(self, what: str, folder: type[RecordFolder], path: str | Path, run: Mapping[str, Any], progress: bool):
        self.what, self.folder, self.path, self.run, self.progress = what, folder, Path(path), dict(run), progress
        self.records: list[Any] = []

    def model(self, pl_module: pl.LightningModule) -> MultimodalModel:
        """The model of the module that is tested.

        Raises:
            MuroanError: it has none.
        """
        model = getattr(pl_module, "model", None)
        if not isinstance(model, MultimodalModel):
            raise MuroanError(
                f"{type(self).__name__} needs a LightningModule with a MultimodalModel as `model`, "
                f"{type(pl_module).__name__}.model is {type(model).__name__}"
            )
        return model

    def start(self, trainer: pl.Trainer) -> list[Any]:
        """Claim the folder, which is for when all options are known to be good; returns the records that it holds."""
        self._folder = self.folder(self.path, trainer.global_rank)
        if trainer.is_global_zero:
            self._folder.start(self.run)
        trainer.strategy.barrier("the run's folder is ready")
        loaders: Any = trainer.test_dataloaders
        self.total = sum(len(loader.sampler) for loader in (loaders if isinstance(loaders, list) else [loaders]))
        quiet = not (self.progress and trainer.is_global_zero)
        self._bar = tqdm(total=self.total, desc=self.what, unit="sample", disable=quiet, dynamic_ncols=True)
        return self._folder.records()

    def take_unreadable(self, batch: Batch) -> None:
        """Note the samples of a batch that could not be read."""
        self._folder.append_unreadable(batch.bad)
        self._bar.update(len(batch.bad))

    def close(self) -> None:
        self._bar.close()
        self._folder.close()

    def finish(self, trainer: pl.Trainer, **told: Any) -> None:
        """Merge the records of all processes, when all have closed their folders.

        Raises:
            MuroanError: there are none, since no sample could be read.
        """
        trainer.strategy.barrier("all records are written")
        why = ""
        if trainer.is_global_zero and not self._folder.records():
            why = next(iter(self._folder.unreadable().values()), "")
        if why := trainer.strategy.broadcast(why):  # else the first process would wait for the others in vain
            raise MuroanError(f"no test sample could be read, of {self.total}; the first: {why}")
        if trainer.is_global_zero:
            self.records = self._folder.finish(**told)
        trainer.strategy.barrier("records are merged")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "_bar"):
            self.close()


class AttackCallback(RecordingCallback):
    """Attacks the samples of every test batch; see `RecordingCallback` for what becomes of the records.

    The engine keeps searches alive across test batches, so that its own batches stay full.

    Args:
        attack, threat_model, batch_size, seed, keep_media, search_processes: see `QueryEngine`.
        folder: of the run; see `RunFolder`.
        run, progress: see `RecordingCallback`.

    After the test, the metrics are logged as `attack/...`.
    Until then the means so far, over the first process's own samples, are logged as `running/...`, some hundred times
    a run; their step is the number of samples.
    """

    def __init__(
        self,
        attack: Attack,
        folder: str | Path,
        run: Mapping[str, Any],
        threat_model: ThreatModel | None = None,
        batch_size: int = 64,
        seed: int = 0,
        keep_media: int = 48,
        progress: bool = True,
        search_processes: int = 0,
    ):
        told = {"guided": attack.guided, "control": attack.control, "goal": attack.goal}
        super().__init__(attack.name, RunFolder, folder, {**run, **told}, progress)
        self.attack, self.threat_model = attack, threat_model
        self.batch_size, self.seed, self.keep_media = batch_size, seed, keep_media
        self.search_processes = search_processes

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        multimodal = data if isinstance(data, MultimodalData) else None
        still_valid = multimodal.judge("test") if multimodal else None
        model = self.model(pl_module)
        self.run["judged"] = still_valid is not None and self.attack.kind == "removal"
        self.run["threat_model"] = (self.threat_model or ThreatModel()).beyond_defaults(model.modalities)
        self.engine = QueryEngine(
            model,
            self.attack,
            self.threat_model,
            self.batch_size,
            autocast_precision(trainer),
            self.seed,
            self.keep_media,
            donors=donors(multimodal) if multimodal and self.attack.needs_donors else (),
            still_valid=still_valid,
            search_processes=self.search_processes,
        )
        self._done = {r.id: r for r in self.start(trainer) if r.attack == self.attack.name}
        self.metrics: dict[str, Metric] = {
            "clean_accuracy": CleanAccuracy(),
            "robust_accuracy": RobustAccuracy(),
            "attack_success_rate": AttackSuccessRate(),
            "decoupled_fraction": DecoupledFraction(),
            "queries": QueryCount(),
        }
        self._sums: Counter[str] = Counter()
        self._stride = max(1, self.total // RUNNING_POINTS)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.take_unreadable(batch)
        known = [self._done[s.id] for s in batch.samples if s.id in self._done]
        self._take(trainer, known, store=False)
        self._take(trainer, self.engine.push(s for s in batch.samples if s.id not in self._done))

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._take(trainer, self.engine.drain())
        self.close()
        for name, metric in self.metrics.items():
            # Until here on the CPU: a GPU would be waited for at each sample. This sums across processes.
            value = metric.to(pl_module.device).compute()
            for key, figure in (value if isinstance(value, dict) else {name: value}).items():
                pl_module.log(f"attack/{key}", figure.float(), rank_zero_only=True)
        # Lightning's word for the step of what is logged with it: after `running/...`.
        pl_module.log("step", float(self._sums["samples"]), rank_zero_only=True)
        disagreements = torch.tensor(self.engine.statistics.disagreements, device=pl_module.device)
        found = int(trainer.strategy.reduce(disagreements, reduce_op="sum"))
        self.finish(trainer, disagreements=found + self._folder.run.get("disagreements", 0))  # before it went on

    def close(self) -> None:
        self.engine.close()
        super().close()

    def _take(self, trainer: pl.Trainer, results: Iterable[AttackResult], store: bool = True) -> None:
        for r in results:
            if store:
                self._folder.append(r)
            label, clean, final = (torch.tensor([x]) for x in (r.label, r.clean_label, r.adversarial_label))
            flipped, attacked = torch.tensor([r.flipped]), torch.tensor([r.attacked])
            self.metrics["clean_accuracy"].update(clean, label)
            self.metrics["robust_accuracy"].update(clean, final, label)
            self.metrics["attack_success_rate"].update(flipped, attacked)
            self.metrics["decoupled_fraction"].update(torch.tensor([r.decoupled_fraction]), flipped)
            self.metrics["queries"].update(torch.tensor([r.queries]), attacked)
            running = self._count(r)
            self._bar.set_postfix_str(f"success {running['attack_success_rate']:.1f} %", refresh=False)
            self._bar.update()
            if store and self._sums["samples"] % self._stride == 0:  # known ones were logged when they were new
                for logger in trainer.loggers:
                    logger.log_metrics({f"running/{k}": v for k, v in running.items()}, step=self._sums["samples"])

    def _count(self, r: AttackResult) -> dict[str, float]:
        """Means over the samples of this process so far: torchmetrics would wait for the other processes."""
        sums = self._sums
        sums.update(samples=1, attacked=r.attacked, flipped=r.flipped, queries=r.queries if r.attacked else 0)
        sums.update(right=r.clean_label == r.label, robust=r.clean_label == r.label == r.adversarial_label)
        attacked = max(1, sums["attacked"])
        return {
            "clean_accuracy": 100 * sums["right"] / sums["samples"],
            "robust_accuracy": 100 * sums["robust"] / sums["samples"],
            "attack_success_rate": 100 * sums["flipped"] / attacked,
            "queries": sums["queries"] / attacked,
        }
