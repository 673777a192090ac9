"""The same code on every device and in half precision; `pytest -m gpu` runs what needs a GPU."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger

import muroan
from muroan.attacks.base import ThreatModel
from muroan.attacks.decoupling import Decoupling
from muroan.attacks.decoupling_reference import DecouplingReference
from muroan.attacks.greedy_occlusion import GreedyOcclusion
from muroan.attacks.pgd import PgdLinf
from muroan.attacks.random_removal import RandomRemoval
from muroan.callbacks import AttackCallback
from muroan.data.base import MultimodalData
from muroan.data.samples import Batch, Example, PreparedDataset, Sample
from muroan.modalities import Audio, Image, Text, WordTokenizer
from muroan.models.encoders import AudioConv, ConvTokens, WordEmbedding
from muroan.models.fusion.mmbt import MMBTFusion
from muroan.models.fusion_model import FusionModel
from muroan.models.heads import LinearHead
from muroan.results import RunFolder
from muroan.training.module import MultimodalModule

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = pytest.param("cuda", marks=needs_gpu)


@pytest.fixture(scope="module")
def target() -> tuple[FusionModel, list[Sample]]:
    """A random model of three modalities, and samples labelled as it answers."""
    torch.manual_seed(0)
    words = [f"w{i}" for i in range(30)]
    modalities = {"image": Image((32, 32)), "text": Text(WordTokenizer(words), 12), "audio": Audio(1600, 8000)}
    encoders = {
        "image": partial(ConvTokens, width=32),
        "text": partial(WordEmbedding, width=32),
        "audio": partial(AudioConv, width=32),
    }
    model = FusionModel(modalities, 5, encoders, partial(MMBTFusion, width=32, layers=2, heads=2), LinearHead).eval()
    rng = np.random.default_rng(0)
    examples = [
        Example(
            str(i),
            {
                "image": rng.integers(0, 255, (32, 32, 3), dtype=np.uint8),
                "text": " ".join(rng.choice(words, rng.integers(1, 10))),
                "audio": rng.uniform(-1, 1, rng.integers(400, 2000)),
            },
            0,
        )
        for i in range(60)
    ]
    samples = [s for s in PreparedDataset(examples, modalities, 5) if isinstance(s, Sample)]
    batch = Batch.of(samples)
    with torch.inference_mode():
        labels = model(batch.inputs, batch.rows).logits.argmax(1).tolist()
    return model, [replace(s, label=label) for s, label in zip(samples, labels, strict=True)]


ATTACKS = [DecouplingReference(60), RandomRemoval(40), Decoupling(), GreedyOcclusion()]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_records_are_those_of_the_cpu(target, attack, device) -> None:
    model, samples = target
    model, limit = model.double(), ThreatModel(max_queries=200)
    cpu = muroan.evaluate(model, samples, attack, threat_model=limit, device="cpu", batch_size=16)
    other = muroan.evaluate(model, samples, attack, threat_model=limit, device=device, batch_size=64)
    small = muroan.evaluate(model, samples, attack, threat_model=limit, device=device, batch_size=8)
    assert sum(a == b for a, b in zip(other, small, strict=True)) >= len(cpu) - 1
    assert sum(a == b for a, b in zip(cpu, other, strict=True)) >= len(cpu) - 1  # a tie may fall otherwise


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_half_precision_flips_about_as_many(target, device) -> None:
    model, samples = target
    attack = RandomRemoval(40)
    full = muroan.evaluate(model.float(), samples, attack, device=device)
    half = muroan.evaluate(model, samples, attack, device=device, precision="bf16")
    assert any(a != b for a, b in zip(full, half, strict=True)), "half precision made no difference at all"
    assert abs(sum(r.flipped for r in full) - sum(r.flipped for r in half)) <= len(samples) // 5
    model.cpu()


class Noise(MultimodalData):
    """The random samples of a model as a dataset of their own."""

    name, classes = "noise", [str(i) for i in range(5)]

    def natural_modalities(self):
        words = Text(WordTokenizer(["a", "b", "c"]), 6)
        return {"image": Image((16, 16)), "text": words, "audio": Audio(800, 8000)}

    def load(self, split):
        rng = np.random.default_rng(0)
        raw = [
            {
                "image": rng.integers(0, 255, (16, 16, 3), dtype=np.uint8),
                "text": " ".join(rng.choice(["a", "b", "c"], 3)),
                "audio": rng.uniform(-1, 1, 700),
            }
            for _ in range(24)
        ]
        return [Example(f"{split}{i}", inputs, i % 5) for i, inputs in enumerate(raw)]


@pytest.mark.filterwarnings("ignore")
def test_no_sample_of_a_batch_could_be_read_and_other_processes_wait(target, monkeypatch) -> None:
    """Alone it is passed over; of several, Lightning wants gradients, which then are 0."""
    module = MultimodalModule(target[0])
    for several in (False, True):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda several=several: several)
        loss = module.training_step(Batch([], {}, {}, torch.zeros(0, dtype=torch.long), []), 0)
        assert (loss is not None) == several
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.model.parameters())
    module.zero_grad()


KINDS = (ConvTokens, WordEmbedding, AudioConv)


class Steps(Logger):
    """Remembers at which steps running figures were logged."""

    name, version = "steps", "0"

    def __init__(self):
        super().__init__()
        self.steps: list[int] = []

    def log_hyperparams(self, *arguments, **options) -> None:
        pass

    def log_metrics(self, metrics, step=None) -> None:
        self.steps += [step] if any(name.startswith("running/") for name in metrics) else []


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_goes_on_logs_no_figure_twice(tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    data = Noise(batch_size=8, test_batch_size=8)
    encoders = {name: partial(kind, width=16) for name, kind in zip(data.modalities(), KINDS, strict=True)}
    fusion = partial(MMBTFusion, width=16, layers=1, heads=2)
    module = MultimodalModule(FusionModel(data.modalities(), 5, encoders, fusion, LinearHead))
    append, logged = RunFolder.append, []

    def interrupted(self, record) -> None:
        if len(self.records()) == 10:
            raise KeyboardInterrupt
        append(self, record)

    for stop in (interrupted, append):
        monkeypatch.setattr(RunFolder, "append", stop)
        callback, logger = AttackCallback(RandomRemoval(5), tmp_path, {"identity": {}}, progress=False), Steps()
        trainer = pl.Trainer(
            accelerator="cpu",
            callbacks=[callback],
            logger=logger,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with suppress(KeyboardInterrupt, SystemExit):
            trainer.test(module, data, verbose=False)
        logged.append(logger.steps)
    assert logged == [list(range(1, 11)), list(range(11, 25))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16), ("16-true", torch.float16)]
)
def test_lightning_trains_and_attacks_in_a_precision_of_its_own(tmp_path, precision, dtype) -> None:
    torch.manual_seed(0)
    data = Noise(batch_size=8, test_batch_size=8)
    encoders = {
        "image": partial(ConvTokens, width=16, grid=(2, 2)),
        "text": partial(WordEmbedding, width=16),
        "audio": partial(AudioConv, width=16),
    }
    fusion = partial(MMBTFusion, width=16, layers=1, heads=2)
    module = MultimodalModule(FusionModel(data.modalities(), 5, encoders, fusion, LinearHead), lr=1e-4)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"enable_checkpointing": False, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    if precision != "16-true":  # in which the 1e-8 of Adam is 0
        trainer = pl.Trainer(max_epochs=1, precision=precision, **quiet)
        trainer.fit(module, data)
        assert torch.isfinite(trainer.callback_metrics["val/loss"])
    for attack in (RandomRemoval(10), PgdLinf(0.3, 0.1, 4, modalities=["image"])):
        callback = AttackCallback(attack, tmp_path / attack.name, {"identity": {}}, progress=False, batch_size=8)
        pl.Trainer(precision=precision, callbacks=[callback], **quiet).test(module, data, verbose=False)
        assert {p.dtype for p in module.model.parameters()} == {dtype}
        assert len(callback.records) == 24
        if attack.kind == "perturbation":
            flipped = [r for r in callback.records if r.flipped]
            assert all(list(r.removed) == ["image"] and r.distance["image"]["linf"] > 0.01 for r in flipped)
    # The engine takes the type that Lightning gave the model, also where Lightning is not there.
    expected = muroan.evaluate(module.model, data.prepared("test"), PgdLinf(0.3, 0.1, 4, modalities=["image"]))
    assert [(r.id, r.status) for r in callback.records] == [(r.id, r.status) for r in expected]
