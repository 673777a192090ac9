"""Adversarial training: the model is trained on what an attack makes of its training samples."""

from __future__ import annotations

import hashlib
import inspect
import os
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from muroan.attacks.base import Attack, Perturbation, ThreatModel
from muroan.callbacks import DONORS, autocast_precision
from muroan.data.base import shard
from muroan.data.samples import Batch, Sample
from muroan.defenses.base import Cost, Defense, without
from muroan.engine import QueryEngine
from muroan.errors import MuroanError, check_whole
from muroan.modalities import Region, Removal, stable_seed
from muroan.models.base import MultimodalModel
from muroan.results import read_json, what_differs, write_json
from muroan.training.module import weights_hash

Found = Removal | Perturbation

PLAIN = (bool, int, float, str, list, tuple, type(None))  # options of an attack that say what they are

CHUNK = 256  # samples of an offline set that are attacked, and kept, at a time


class AdversarialTraining(Defense):
    """Trains on a mixture of clean and adversarial samples (Goodfellow et al. 2015, arXiv 1412.6572, and, mixed within
    the batch, Kurakin et al. 2017, arXiv 1611.01236); with PGD and ratio 1, it is Madry et al. 2018 (arXiv 1706.06083),
    but for samples that the model gets wrong, which stay clean.

    Online, the model as it stands is attacked at every step. Offline, the model that training starts from is attacked
    once, and what was found is mixed in: cheaper, and blind to what the training changes, which is the classic recipe
    of Szegedy et al. 2014 (arXiv 1312.6199).

    Args:
        attack: any attack; null attacks nothing. What its search returns is trained on, whether it flips or not;
            samples that the model gets wrong are not attacked and stay clean.
        mode: `online` or `offline`.
        ratio: share of each batch that is adversarial; the others stay clean.
        samples: offline, how many training samples are attacked; null for all.
        folder: offline, where the adversarial samples are kept, to go on there after an interruption.
        batch_size: rows of the attack's model calls.
        threat_model: the attack's.
        seed, training: see `Defense`.

    Raises:
        MuroanError: see `Defense`; an unknown mode; the attack does not fit the model.
    """

    def __init__(
        self,
        model: MultimodalModel,
        attack: Attack | None = None,
        mode: Literal["online", "offline"] = "online",
        ratio: float = 0.5,
        samples: int | None = None,
        folder: str | Path = "adversarial",
        batch_size: int = 256,
        threat_model: ThreatModel | None = None,
        seed: int = 0,
        **training: Any,
    ):
        super().__init__(model, ratio, threat_model, seed, **training)
        if mode not in ("online", "offline"):
            raise MuroanError(f"defense.mode must be online or offline, got {mode!r}")
        check_whole("defense", batch_size=batch_size, **({} if samples is None else {"samples": samples}))
        self.attack, self.mode, self.samples = attack, mode, samples
        self.folder, self.batch_size = Path(folder), batch_size
        self.engine: QueryEngine | None = None
        self.adversarial: list[Sample] = []
        self._found: dict[str, Found] = {}

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.attack is not None and self.ratio > 0 and self.mode == "offline":
            self.adversarial = self.prepare()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        if self.attack is None or len(batch) == 0:
            return super().training_step(batch, batch_idx)
        rng = self.rng(batch_idx)
        rows = self.draw_rows(batch, rng)
        if self.mode == "online":
            harmed = self.harm([batch.samples[row] for row in rows], stable_seed(self.seed, self.global_step))
        else:
            harmed = [self.adversarial[i] for i in rng.integers(len(self.adversarial), size=len(rows))]
        samples = list(batch.samples)
        for row, sample in zip(rows, harmed, strict=True):
            samples[row] = sample
        return super().training_step(self.batch_of(samples, batch) if rows else batch, batch_idx)

    # -- attacking ------------------------------------------------------------------------------------------

    def harm(self, samples: Sequence[Sample], seed: int) -> list[Sample]:
        """What the attack makes of samples, as the model stands now; those without an answer as they are."""
        found = self.hunt(samples, seed)
        return self.applied(samples, [found.get(sample.id) for sample in samples], seed)

    def hunt(self, samples: Sequence[Sample], seed: int) -> dict[str, Found]:
        """What the attack's search returns for each sample, by its id."""
        modes = [(module, module.training) for module in self.model.modules()]  # parts may be frozen
        self.model.eval()
        try:
            engine = self._engine()
            engine.seed = seed
            self._found = {}
            for result in engine.run(samples):
                self.cost.attack_forwards += result.forwards
                self.cost.attack_backwards += result.backwards
            return self._found
        finally:
            for module, training in modes:
                module.training = training

    def _engine(self) -> QueryEngine:
        if self.engine is None:
            assert self.attack is not None
            self.engine = QueryEngine(
                self.model,
                self.attack,
                self.threat_model,
                self.batch_size,
                autocast_precision(self.trainer),
                keep_media=0,
                donors=self.donors(),
                still_valid=None if self.data is None else self.data.judge("train"),
                on_found=lambda sample, found: self._found.__setitem__(sample.id, found),
                audit=False,
            )
        return self.engine

    def donors(self) -> list[Sample]:
        """Samples that an attack may take parts from: training samples, never ones that are validated or tested on."""
        assert self.attack is not None
        if not self.attack.needs_donors or self.data is None:
            return []
        prepared = self.data.prepared("train")
        found = (prepared[i] for i in range(min(DONORS, len(prepared))))
        return [sample for sample in found if isinstance(sample, Sample)]

    def applied(self, samples: Sequence[Sample], found: Sequence[Found | None], seed: int) -> list[Sample]:
        """The samples with what was found done to them; the seed is that of the hunt, for the same noise."""
        removals = [f if isinstance(f, Removal) else Removal() for f in found]
        changes = without(self.model.modalities, samples, removals, self.threat_model, seed)
        for change, f in zip(changes, found, strict=True):
            if isinstance(f, Perturbation) and f.features:
                raise MuroanError(
                    "defense.attack moves features, and there is no input to train on: choose "
                    "defense=embedding_adversarial_training, which trains on these, or an attack on inputs"
                )
            if isinstance(f, Perturbation):
                change.update({name: x.detach().cpu() for name, x in f.inputs.items()})
                spelled = {name: words for name, words in f.words.items() if name not in f.inputs}
                for name, words in spelled.items():
                    change[name], _ = self.model.modalities[name].prepare(" ".join(words))
        return [
            replace(sample, inputs={**sample.inputs, **change}) if change else sample
            for sample, change in zip(samples, changes, strict=True)
        ]

    # -- the offline set ------------------------------------------------------------------------------------

    def prepare(self) -> list[Sample]:
        """Attack the training set, or its part, and return what was found.

        Every process attacks its shard, a file of `CHUNK` samples at a time; files that are there are not made again.

        Raises:
            MuroanError: the folder holds another set, or a file that cannot be read; nothing was found.
        """
        assert self.attack is not None
        if self.data is None:
            raise MuroanError("offline adversarial training needs a MultimodalData as the trainer's datamodule")
        dataset = self.data.prepared("train")
        order = np.random.default_rng(stable_seed(self.seed, "offline")).permutation(len(dataset))
        chosen = set(order[: self.samples].tolist())
        rank = self.global_rank
        own = [i for i in shard(dataset.examples, rank, self.trainer.world_size) if i in chosen]
        parts = [(self.folder / f"{rank}-{i // CHUNK:05d}.pt", own[i : i + CHUNK]) for i in range(0, len(own), CHUNK)]
        ids = [dataset.examples[i].id for i in sorted(chosen)]
        self._claim(ids, [file for file, _ in parts])
        harmed: list[Sample] = []
        seed = stable_seed(self.seed, "offline")
        for file, indices in tqdm(parts, desc=f"offline {self.attack.name}", unit="chunk", disable=rank > 0):
            samples = [s for s in (dataset[i] for i in indices) if isinstance(s, Sample)]
            if file.exists():
                found, spent = _read(file, self.trainer.ckpt_path is not None)
                if self.trainer.ckpt_path is None:  # else the checkpoint's account has them
                    self.cost.attack_forwards += spent.attack_forwards
                    self.cost.attack_backwards += spent.attack_backwards
                    self.cost.seconds += spent.seconds
            else:
                before, start = replace(self.cost), time.monotonic()
                found = self.hunt(samples, seed)
                spent = Cost(
                    attack_forwards=self.cost.attack_forwards - before.attack_forwards,
                    attack_backwards=self.cost.attack_backwards - before.attack_backwards,
                    seconds=time.monotonic() - start,
                )
                _write(file, found, spent)
            kept = [sample for sample in samples if sample.id in found]
            harmed += self.applied(kept, [found[sample.id] for sample in kept], seed)
        if not harmed:
            raise MuroanError(
                f"offline adversarial training found nothing: {self.attack.name} changed none of {len(own)} training "
                f"samples; choose another attack or a larger hardening.threat_model.max_queries"
            )
        return harmed

    def _claim(self, ids: Sequence[str], own: Sequence[Path]) -> None:
        """Write, or check, what the folder's set is made of."""
        assert self.attack is not None
        held = vars(self.attack)
        options = {key: told(held[key]) for key in inspect.signature(type(self.attack)).parameters if key in held}
        about = {
            "attack": self.attack.name,
            "options": {key: value for key, value in options.items() if value is not None},
            "samples": len(ids),
            "ids": hashlib.sha256("\n".join(ids).encode()).hexdigest()[:12],
            "processes": self.trainer.world_size,
            "seed": self.seed,
            "threat_model": repr(self.threat_model),
        }
        weights = weights_hash(self.model)
        file = self.folder / "set.json"
        # A training that goes on has other weights than it began with, when the set was made and whole.
        goes_on = self.trainer.ckpt_path is not None
        if goes_on and (missing := [str(part) for part in (file, *own) if not part.exists()]):
            raise MuroanError(
                f"the adversarial set lacks {missing[0]}, and the model is no longer the one that it was made with: "
                f"rerun=true makes the set anew, and trains from the start"
            )
        if file.exists():
            known = read_json(file, "rerun=true makes the adversarial set anew, and trains from the start")
            if known.pop("weights") != weights and not goes_on:
                raise MuroanError(f"{self.folder} holds an adversarial set of another model: remove it to make it anew")
            if known != about:
                raise MuroanError(
                    f"{self.folder} holds an adversarial set of another configuration "
                    f"({what_differs(known, about)}): choose another defense.folder, or remove it"
                )
        self.trainer.strategy.barrier("the offline set is checked")
        if self.trainer.is_global_zero and not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(file, {**about, "weights": weights})
        self.trainer.strategy.barrier("the offline set is claimed")


# What was found as plain values and tensors, so that reading a file can run no code.


def told(option: Any) -> str | None:
    """An option of an attack as text that says what it is in every process; None where there is none."""
    if callable(option):
        return getattr(option, "__qualname__", None)
    return repr(option) if isinstance(option, PLAIN) else None


def _write(file: Path, found: Mapping[str, Found], spent: Cost) -> None:
    plain: dict[str, Any] = {}
    for key, f in found.items():
        if isinstance(f, Removal):
            plain[key] = [(region.modality, region.start, region.stop) for region in f.regions]
        else:
            inputs = {name: x.detach().cpu() for name, x in f.inputs.items()}
            plain[key] = {"inputs": inputs, "words": {name: list(words) for name, words in f.words.items()}}
    temporary = file.with_suffix(".part")
    torch.save({"found": plain, "spent": asdict(spent)}, temporary)
    os.replace(temporary, file)


def _read(file: Path, goes_on: bool = False) -> tuple[dict[str, Found], Cost]:
    """What was found, and what that took.

    Args:
        goes_on: whether training has begun, so that no part can be made any more.
    """
    try:
        content = torch.load(file, weights_only=True)
        plain, spent = content["found"], Cost(**content["spent"])
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise MuroanError(
            f"{file} is not a part of an adversarial set ({type(error).__name__}): "
            f"{'start from the beginning with rerun=true' if goes_on else 'remove it, and it is made anew'}"
        ) from None
    found: dict[str, Found] = {
        key: Perturbation(**f) if isinstance(f, dict) else Removal.of(*(Region(*region) for region in f))
        for key, f in plain.items()
    }
    return found, spent
