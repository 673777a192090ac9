"""The same code on every device and in half precision; `pytest -m gpu` runs what needs a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import muroan
from muroan.attacks.decoupling_reference import DecouplingReference
from muroan.attacks.random_removal import RandomRemoval
from muroan.data.samples import Batch, Example, PreparedDataset, Sample
from muroan.modalities import Audio, Image, Text, WordTokenizer
from muroan.models.encoders import AudioConv, ConvTokens, WordEmbedding
from muroan.models.fusion.mmbt import MMBTFusion
from muroan.models.fusion_model import FusionModel
from muroan.models.heads import LinearHead

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


@pytest.mark.parametrize("attack", [DecouplingReference(60), RandomRemoval(40)], ids=lambda a: a.name)
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_records_are_those_of_the_cpu(target, attack, device) -> None:
    model, samples = target
    model = model.double()
    cpu = muroan.evaluate(model, samples, attack, device="cpu", batch_size=16)
    other = muroan.evaluate(model, samples, attack, device=device, batch_size=64)
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
