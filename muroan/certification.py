"""Certification as a run: how many elements an attacker may alter before the vote of `SmoothedModel` can change.

A `CertificationCallback` makes `trainer.test(module, data)` vote over fresh ablations of every sample and write a
`Certificate` each; what these promise is then held against attacks on the smoothed model.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from muroan.callbacks import RecordingCallback, autocast_precision
from muroan.data.samples import Batch, Sample
from muroan.defenses.certificate import alone, along_diagonal, bounds, is_certified
from muroan.defenses.mmcert import Ablation
from muroan.engine import AUTOCAST
from muroan.errors import MuroanError, check_number, check_whole
from muroan.models.base import MultimodalModel, model_dtype
from muroan.results import AttackResult, RecordFolder


@dataclass(slots=True)
class Certificate:
    """What is certain about the smoothed model's answer to one sample, at the run's level alpha.

    Attributes:
        n, k: elements, and how many of them are kept, a modality.
        predicted: the class that the vote gives; None where it abstains.
        lower, upper: bounds of that class's chance from below and of every other's from above.
        joint: the largest r of all modalities together, at an equal share of each; empty where it abstains.
        alone: the largest r of each modality, when the others are left alone; likewise.
        side: pixels a side, or samples of sound, of an element.
        tokens: of a text, the tokens of each word.
    """

    id: str
    index: int
    label: int
    n: dict[str, int]
    k: dict[str, int]
    predicted: int | None
    lower: float
    upper: float
    joint: dict[str, int] = field(default_factory=dict)
    alone: dict[str, int] = field(default_factory=dict)
    side: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str]:
        return (self.id,)

    @property
    def order(self) -> tuple[int, str]:
        return self.index, self.id

    @property
    def limit(self) -> float:
        """The answer is right for all attackers with a share of every modality below this; 0 where it is not right."""
        if self.predicted != self.label:
            return 0.0
        return min((self.joint[name] + 1) / n for name, n in self.n.items() if n)

    def altered(self, record: AttackResult) -> dict[str, int] | None:
        """How many of the certificate's elements an attack altered, a modality; None where that is not known.

        Of a removal, elements of which any part was removed. Of chosen values only their number is recorded: each may
        lie in an element of its own; and new words may be more tokens than the old ones.
        """
        if record.kind != "removal":
            known = not set(record.removed) & set(self.tokens)
            return {name: record.removed.get(name, 0) for name in self.n} if known else None
        touched: dict[str, set[tuple[int, ...]]] = {name: set() for name in self.n}
        for name, start, stop in record.regions:
            side = self.side.get(name, 1)
            axes = [range(a // side, (b - 1) // side + 1) for a, b in zip(start, stop, strict=True)]
            touched[name].update(itertools.product(*axes))
        return {
            name: sum(self.tokens[name][word] for (word,) in found) if name in self.tokens else len(found)
            for name, found in touched.items()
        }

    def covers(self, altered: Mapping[str, int]) -> bool:
        """Whether the certificate promises that no attack of this size changes the answer."""
        if self.predicted is None:
            return False
        if all(altered.get(name, 0) <= r for name, r in self.joint.items()):
            return True
        names = [name for name, r in altered.items() if r]
        return len(names) == 1 and altered[names[0]] <= self.alone[names[0]]

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))


class CertificateFolder(RecordFolder[Certificate]):
    """The folder of one certification run; see `RecordFolder`."""

    stem, task, kind = "certificates", "certify", "a certificate"

    @staticmethod
    def parse(line: str) -> Certificate:
        return Certificate(**json.loads(line))


@dataclass(frozen=True)
class Certifier:
    """Votes over fresh ablations of a sample, whose draws depend on the seed and the sample's id alone.

    Args:
        model: the base model, in evaluation mode.
        ablation: what is kept.
        samples: ablations that estimate the chances; selection: ablations that choose the class.
        alpha: chance that a certificate is wrong.
        deleted: modalities whose elements the attacker can only delete, which certifies more; see `certificate`.
        batch_size: rows of a model call.
        precision: see `QueryEngine`.

    Raises:
        MuroanError: an option is out of range, or a name in `deleted` is not that of a text.
    """

    model: MultimodalModel
    ablation: Ablation
    samples: int = 1000
    selection: int = 100
    alpha: float = 0.001
    deleted: Sequence[str] = ()
    batch_size: int = 256
    seed: int = 0
    precision: str = "32"

    def __post_init__(self) -> None:
        check_whole("certification", samples=self.samples, selection=self.selection, batch_size=self.batch_size)
        check_number("certification", 0, 1, above=True, alpha=self.alpha)
        if self.alpha == 1:
            raise MuroanError("certification.alpha must lie between 0 and 1, got 1")
        if isinstance(self.deleted, str):
            object.__setattr__(self, "deleted", (self.deleted,))
        for name in self.deleted:
            if name not in self.ablation.texts:
                raise MuroanError(
                    f"certification.deleted names {name!r}: only of texts can elements be deleted, here of "
                    f"{self.ablation.texts}; what is put to zero is changed"
                )

    @torch.inference_mode()
    def votes(self, sample: Sample, inputs: Mapping[str, Tensor]) -> np.ndarray:
        """(2, C) votes for each class, first those that choose, then those that estimate.

        Args:
            inputs: (*shape) a modality, on the model's device.
        """
        ablation, counts = self.ablation, np.zeros((2, self.model.num_classes), dtype=int)
        autocast = AUTOCAST[self.precision]
        for part, (first, last) in enumerate([(0, self.selection), (self.selection, self.selection + self.samples)]):
            for start in range(first, last, self.batch_size):
                stop = min(last, start + self.batch_size)
                ablated = {}
                for name, x in inputs.items():
                    seeds = ablation.seeds(name, [f"{self.seed} {sample.id}"], x.device)
                    ablated[name] = ablation.ablate(name, x[None], ablation.scores(name, seeds, start, stop))
                device = next(iter(inputs.values())).device.type
                with torch.autocast(device, autocast) if autocast else nullcontext():
                    logits = self.model(ablated).logits
                if not torch.isfinite(logits).all():
                    raise MuroanError(
                        f"the model returned a value that is not finite for an ablation of sample {sample.id!r}: check "
                        f"its weights, or precision=32"
                    )
                counts[part] += np.bincount(logits.argmax(1).cpu(), minlength=self.model.num_classes)
        return counts

    def certify(self, sample: Sample, inputs: Mapping[str, Tensor] | None = None) -> Certificate:
        """The certificate of one sample.

        Args:
            inputs: the sample's own on the model's device, where they are not there already.

        Raises:
            MuroanError: more elements shall be kept than the sample has, or the model's answer is not finite.
        """
        ablation, inputs = self.ablation, inputs or sample.inputs
        names = list(inputs)
        n = [int(ablation.elements(name, inputs[name][None]).sum()) for name in names]
        for name, count in zip(names, n, strict=True):
            ablation.check(name, count, f" in sample {sample.id!r}")
        k = [ablation.kept(name, count) for name, count in zip(names, n, strict=True)]
        steady = [ablation.steady(name, count) for name, count in zip(names, n, strict=True)]
        selection, estimation = self.votes(sample, inputs)
        found = bounds(selection, estimation, self.alpha)

        def certified(r: Sequence[int]) -> bool:
            return is_certified(found, n, k, r, [name in self.deleted for name in names], steady)

        joint = along_diagonal(n, certified)
        single = [alone(place, n, certified) for place in range(len(names))]
        return Certificate(
            sample.id,
            sample.index,
            sample.label,
            dict(zip(names, n, strict=True)),
            dict(zip(names, k, strict=True)),
            found.predicted,
            found.lower,
            found.upper,
            {} if joint is None else dict(zip(names, joint, strict=True)),
            {name: r for name, r in zip(names, single, strict=True) if r is not None},
            {name: side for name, side in ablation.side.items() if name not in ablation.texts},
            {name: [b - a for a, b in sample.layouts[name].spans] for name in ablation.texts},
        )


class CertificationCallback(RecordingCallback):
    """Certifies the samples of every test batch; see `RecordingCallback` for what becomes of the certificates.

    Args:
        ablation: what is kept; options: see `Certifier`.
        folder: of the run; see `CertificateFolder`.
        run, progress: see `RecordingCallback`.
    """

    def __init__(
        self, ablation: Ablation, folder: str | Path, run: Mapping[str, Any], progress: bool = True, **options: Any
    ):
        super().__init__("certify", CertificateFolder, folder, run, progress)
        self.ablation, self.options = ablation, options

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model, precision = self.model(pl_module), autocast_precision(trainer)
        self.certifier = Certifier(model, self.ablation, precision=precision, **self.options)
        self._done = {record.id for record in self.start(trainer)}

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
        dtype = model_dtype(self.certifier.model)
        given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.inputs.items()}
        for row, sample in enumerate(batch.samples):
            if sample.id not in self._done:
                inputs = {name: x[batch.rows[name][row]] for name, x in given.items()}
                self._folder.append(self.certifier.certify(sample, inputs))
            self._bar.update()

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.close()
        self.finish(trainer)


# ---------------------------------------------------------------------------------------------------------
# What the certificates of a run say, and whether attacks keep to it


def certified_accuracy(certificates: Sequence[Certificate], shares: ArrayLike) -> np.ndarray:
    """Samples whose answer is right whatever an attacker does with a share of the elements of every modality.

    Args:
        shares: (G,) from 0 to 1.

    Returns:
        (G,) percent of all samples.
    """
    limits = np.array([c.limit for c in certificates])
    return 100 * np.mean(limits[:, None] > np.asarray(shares) + 1e-12, 0)


def flip_share(certificate: Certificate, record: AttackResult) -> float:
    """The share of every modality's elements that it takes to do what this attack did; infinite if it did nothing.

    All of them where that is not known. Of chosen values no more than all elements are ever altered, be they larger
    than the pixels, or samples of sound, that the record counts.
    """
    if not record.mislabelled:
        return float("inf")
    altered = certificate.altered(record)
    if altered is None:
        return 1.0
    return max(min(1.0, r / certificate.n[name]) for name, r in altered.items() if certificate.n[name])


def robust_accuracy(
    certificates: Sequence[Certificate], records: Sequence[AttackResult], shares: ArrayLike
) -> np.ndarray:
    """Samples that are right, and that this attack did not flip within a share of the elements of every modality.

    Args:
        shares: (G,) from 0 to 1.

    Returns:
        (G,) percent of the samples that have both a record and a certificate.

    Raises:
        MuroanError: there are none.
    """
    pairs = matched(certificates, records)
    flips = np.array([flip_share(c, r) if r.attacked else -1.0 for c, r in pairs])  # wrong before: at no share right
    return 100 * np.mean(flips[:, None] > np.asarray(shares) + 1e-12, 0)


def matched(
    certificates: Sequence[Certificate], records: Sequence[AttackResult]
) -> list[tuple[Certificate, AttackResult]]:
    """Certificates and records of the same samples.

    Raises:
        MuroanError: there are none.
    """
    by_id = {c.id: c for c in certificates}
    pairs = [(by_id[r.id], r) for r in records if r.id in by_id]
    if not pairs:
        raise MuroanError(
            f"none of the {len(records)} attacked samples has a certificate: attack and certify the same dataset"
        )
    return pairs


def broken(
    certificates: Sequence[Certificate], records: Sequence[AttackResult]
) -> list[tuple[Certificate, AttackResult]]:
    """Samples that an attack on the smoothed model flipped within their certified size. There should be none."""
    found = []
    for certificate, record in matched(certificates, records):
        altered = certificate.altered(record) if record.mislabelled else None
        if altered is not None and certificate.predicted == record.clean_label and certificate.covers(altered):
            found.append((certificate, record))
    return found


def summarise(certificates: Sequence[Certificate]) -> dict[str, Any]:
    """The figures of a certification run.

    Returns:
        `samples`; `abstained`; `accuracy` (right for the untouched input, percent); `curve`: pairs of a share and the
        certified accuracy just below it, percent both; `alone`: by modality the samples that are right whatever an
        attacker does with one element of it alone, percent of all (`any`), and the median certified size over right
        samples, in elements and in percent of n.
    """
    limits = sorted({c.limit for c in certificates if c.limit})
    right = [c for c in certificates if c.limit]
    below = certified_accuracy(certificates, np.array(limits) - 1e-9)
    return {
        "samples": len(certificates),
        "abstained": sum(c.predicted is None for c in certificates),
        "accuracy": 100 * len(right) / max(1, len(certificates)),
        "curve": [[100 * share, float(accuracy)] for share, accuracy in zip(limits, below, strict=True)],
        "alone": {
            name: {
                "any": 100 * sum(c.alone[name] > 0 for c in right) / len(certificates),
                "elements": float(np.median([c.alone[name] for c in right])),
                "percent": float(np.median([100 * c.alone[name] / max(1, c.n[name]) for c in right])),
            }
            for name in (right[0].n if right else ())
        },
    }
