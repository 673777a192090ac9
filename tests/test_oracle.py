"""The engine with the reference attack against a sequential loop that knows nothing of it (see `oracle`)."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from oracle import Oracle, OracleResult, children, coordinates

import muroan
from muroan.attacks.base import ThreatModel
from muroan.attacks.decoupling import Decoupling
from muroan.attacks.decoupling_reference import DecouplingReference
from muroan.data.digit_sum import DigitSum
from muroan.data.easy_vqa import EasyVQA
from muroan.data.samples import Batch, Example, PreparedDataset, Sample
from muroan.modalities import Audio, Image, Text, WordTokenizer
from muroan.models.base import MultimodalModel
from muroan.models.encoders import AudioConv, ConvTokens, WordEmbedding
from muroan.models.fusion.mmbt import MMBTFusion
from muroan.models.fusion_model import FusionModel
from muroan.models.heads import LinearHead
from muroan.results import AttackResult

FSDD = Path(__file__).parents[2] / "shared" / "data" / "fsdd"
COUPLINGS = ["combinations", "pairs"]
MOST = 30  # combinations tried at most, which keeps the oracle short; the toys below try 500


@dataclass
class Case:
    """A model, samples of which every sixth is given a wrong label, and the oracle's results by coupling."""

    model: MultimodalModel
    samples: list[Sample]
    min_side: dict[str, int]
    expected: dict[str, list[OracleResult]]


def small_mmbt(data) -> FusionModel:
    torch.manual_seed(0)
    encoders = {
        "image": partial(ConvTokens, width=16, grid=(2, 2)),
        "text": partial(WordEmbedding, width=16),
        "audio": partial(AudioConv, width=16, grid=(1, 4)),
    }
    fusion = partial(MMBTFusion, width=32, layers=1, heads=2)
    return FusionModel(data.modalities(), len(data.classes), encoders, fusion, LinearHead).eval()


@torch.no_grad()
def sensitise(model: FusionModel, samples: list[Sample], favour: float) -> None:
    """Make a random model lively: its image and sound features, its embedding and its logits are standardised.

    Without it the same component and class win whatever the input. The first class is favoured, or the winner would
    hang by a thread and fall at the first combination tried.
    """
    batch = Batch.of(samples)
    inputs = {name: x.to(torch.float64) if x.is_floating_point() else x for name, x in batch.inputs.items()}

    def standardise(layer: nn.Module, values: torch.Tensor) -> None:
        """Let the affine `layer`, whose outputs over the samples are `values` (N, D), have mean 0 and deviation 1."""
        std = values.std(0)
        layer.weight.div_(std if layer.weight.ndim == 1 else std[:, None])
        layer.bias.sub_(values.mean(0)).div_(std)

    for name, encoder in model.encoders.items():
        if not isinstance(encoder, WordEmbedding):
            standardise(encoder.norm, (model.encode(name, inputs[name])[0] - encoder.position).flatten(0, 1))
    standardise(model.fusion.norm, model(inputs, batch.rows).embedding)
    standardise(model.classifier, model(inputs, batch.rows).logits)
    model.classifier.bias[1:] -= favour


@torch.no_grad()
def with_own_labels(model: MultimodalModel, samples: list[Sample]) -> list[Sample]:
    """The samples labelled as the model answers; every sixth (0, 6, 12, …) with another class."""
    labelled = []
    dtype = next(model.parameters()).dtype
    for i, sample in enumerate(samples):
        inputs = {n: (x.to(dtype) if x.is_floating_point() else x)[None] for n, x in sample.inputs.items()}
        label = int(model(inputs).logits.argmax())
        labelled.append(replace(sample, label=label if i % 6 else (label + 1) % model.num_classes))
    return labelled


def oracle_results(model: MultimodalModel, samples: list[Sample], min_side: dict[str, int], most: int):
    oracles = [Oracle(model, sample, min_side) for sample in samples]
    return {coupling: [oracle.decouple(most, coupling) for oracle in oracles] for coupling in COUPLINGS}


def case(data, indices: list[int], min_side: dict[str, int], favour: float) -> Case:
    dataset = data.prepared("test")
    samples = [dataset[i] for i in indices]
    model = small_mmbt(data).double()
    sensitise(model, samples, favour)
    samples = with_own_labels(model, samples)
    return Case(model, samples, min_side, oracle_results(model, samples, min_side, MOST))


@pytest.fixture(scope="session")
def easy_vqa() -> Case:
    # Two questions about each of 63 pictures, of which 105 are attacked.
    return case(EasyVQA(), [10 * i + j for i in range(63) for j in (0, 1)], {"image": 10}, 2.0)


@pytest.fixture(scope="session")
def digit_sum() -> Case:
    if not FSDD.is_dir():
        pytest.skip(f"needs {FSDD}")
    # 51 pairs are attacked. An audio region of 80 samples (10 ms) is not cut again.
    return case(DigitSum(str(FSDD)), list(range(62)), {"image": 10, "audio": 80}, 4.5)


@pytest.fixture(params=["easy_vqa", "digit_sum"])
def prepared(request: pytest.FixtureRequest) -> Case:
    return request.getfixturevalue(request.param)


def difference(record: AttackResult, expected: OracleResult) -> str:
    """What of a record differs from the oracle's, or nothing."""
    removed: dict[str, set[tuple[int, ...]]] = {}
    for part in record.regions:
        removed.setdefault(part[0], set()).update(coordinates(part))
    pairs = {
        "status": (record.status, expected.status),
        "parts": (tuple(record.regions), expected.parts),
        "removed": (removed, expected.removed),
        "counts": (record.removed, {name: len(gone) for name, gone in expected.removed.items()}),
        "percent": (round(record.decoupled_fraction, 9), round(expected.percent, 9)),
        "label": (record.adversarial_label, expected.adversarial_label),
    }
    if expected.status != "skipped":
        pairs["combinations"] = (record.info["combinations"], expected.combinations)
        pairs["salient"] = (record.info["salient_points"], expected.salient)
    if expected.status == "flipped":
        pairs["released"] = (round(record.info["released_size"], 9), round(expected.released_percent, 9))
    return "; ".join(f"{what}: engine {a}, oracle {b}" for what, (a, b) in pairs.items() if a != b)


def assert_equal(records: list[AttackResult], samples: list[Sample], expected: list[OracleResult]) -> None:
    assert [r.id for r in records] == [s.id for s in samples]
    differing = [f"{r.id}: {d}" for r, e in zip(records, expected, strict=True) if (d := difference(r, e))]
    assert not differing, f"{len(differing)} of {len(records)} differ:\n" + "\n".join(differing[:3])


# ---------------------------------------------------------------------------------------------------------
# The oracle itself, by hand


def test_oracle_cuts_as_the_design_says():
    assert children((0, 0), (224, 224)) == [
        ((0, 0), (112, 112)),  # top-left
        ((112, 0), (224, 112)),  # bottom-left
        ((0, 112), (112, 224)),  # top-right
        ((112, 112), (224, 224)),  # bottom-right
    ]
    assert children((0,), (5,)) == [((0,), (3,)), ((3,), (5,))]
    assert children((2, 7), (5, 8)) == [((2, 7), (4, 8)), ((4, 7), (5, 8))]


class Switchboard(MultimodalModel):
    """Four quadrants of a 4x4 image and three words; the logits are written down in the test."""

    def __init__(self):
        text = Text(WordTokenizer(["a", "b", "c"]), 5)
        super().__init__({"image": Image((4, 4), mean=(0.5,), std=(0.5,)), "text": text}, 2)
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def encode(self, modality, x):
        if modality == "image":
            return torch.stack([x[:, 0, :2, :2], x[:, 0, 2:, :2], x[:, 0, :2, 2:], x[:, 0, 2:, 2:]], 1).mean((2, 3))
        return torch.stack([(x == 5 + i).any(1) for i in range(3)], 1).double()

    def fuse(self, features):
        return torch.cat([features["image"], features["text"]], 1)

    def head(self, embedding):
        tl, bl, tr, br, a, b, c = embedding.unbind(1)
        return self.logits(tl, bl, tr, br, a, b, c)


def test_oracle_by_hand():
    class Hand(Switchboard):
        def fuse(self, features):
            # Component 1 overtakes component 0 when the bottom-left or top-right quadrant, or word b, is gone.
            (_, bl, tr, _), (_, b, _) = features["image"].unbind(1), features["text"].unbind(1)
            some = torch.stack([bl, tr, b], 1).sum(1)
            return torch.stack([some, torch.full_like(some, 2.5), tr, b], 1)

        def head(self, embedding):
            # Flips when both the top-right quadrant and word b are gone.
            return torch.stack([embedding[:, 2] + embedding[:, 3], torch.full_like(embedding[:, 0], 0.5)], 1)

    model = Hand()
    white = np.full((4, 4), 255, np.uint8)
    (sample,) = PreparedDataset([Example("s", {"image": white, "text": "a b c"}, 0)], model.modalities, 2)
    oracle = Oracle(model, sample, {"image": 2})
    result = oracle.decouple()
    assert result.status == "flipped"
    assert result.salient == {"image": 2, "text": 1}
    # bl, tr, b, bl+tr, bl+b, tr+b
    assert result.combinations == 6
    assert result.parts == (("image", (0, 2), (2, 4)), ("text", (1,), (2,)))
    assert result.percent == pytest.approx(100 * (4 + 1) / (16 + 3))
    assert result.released_percent == pytest.approx(100 * 1 / (16 + 3))
    pairs = oracle.decouple(coupling="pairs")  # bl+b, tr+b
    assert (pairs.parts, pairs.combinations) == (result.parts, 2)
    assert oracle.decouple(max_combinations=5).status == "held"
    assert Oracle(model, replace(sample, label=1), {"image": 2}).decouple().status == "skipped"


# ---------------------------------------------------------------------------------------------------------
# Real data, MMBT fusion


def test_the_comparison_means_something(prepared: Case):
    """Many samples flip, some hold, many need more than one combination, some a combination of two."""
    attacked = [r for r in prepared.expected["combinations"] if r.status != "skipped"]
    assert len(attacked) >= (100 if "text" in prepared.model.modalities else 50)
    flipped = [r for r in attacked if r.status == "flipped"]
    assert len(flipped) >= 0.4 * len(attacked)
    assert sum(r.combinations > 1 for r in flipped) >= 0.2 * len(attacked)
    assert sum(len(r.parts) >= 2 for r in flipped) >= 0.05 * len(attacked)
    assert len(flipped) < len(attacked)
    for name in prepared.model.modalities:
        assert sum(r.salient[name] > 0 for r in attacked) >= 0.2 * len(attacked)
        assert any(name in r.removed for r in flipped)
    paired = [r for r in prepared.expected["pairs"] if r.status == "flipped"]
    assert sum(r.combinations > 1 for r in paired) >= 0.1 * len(attacked)
    assert all(len(r.removed) == 2 for r in paired)


@pytest.mark.parametrize(
    ("batch_size", "coupling", "most"),
    [
        (1, "combinations", None),
        (7, "combinations", None),
        (64, "combinations", None),
        (1, "pairs", 24),  # the slow test has all
        (7, "pairs", None),
        (64, "pairs", None),
        pytest.param(1, "pairs", None, marks=pytest.mark.slow),
    ],
)
def test_engine_equals_oracle(prepared: Case, batch_size: int, coupling: str, most: int | None):
    attack, samples = DecouplingReference(MOST, coupling), prepared.samples[:most]
    records = muroan.evaluate(prepared.model, samples, attack, batch_size=batch_size)
    assert_equal(records, samples, prepared.expected[coupling][:most])
    assert [r.status == "skipped" for r in records] == [i % 6 == 0 for i in range(len(records))]


def single_precision_mismatch(prepared: Case, samples: list[Sample]) -> float:
    """Share of attacked samples whose record differs between the engine at batch 64 and the oracle, in float32."""
    model = copy.deepcopy(prepared.model).float()
    expected = [Oracle(model, sample, prepared.min_side).decouple(MOST) for sample in samples]
    records = muroan.evaluate(model, samples, DecouplingReference(MOST), batch_size=64)
    attacked = [(r, e) for r, e in zip(records, expected, strict=True) if e.status != "skipped"]
    return sum(bool(difference(r, e)) for r, e in attacked) / len(attacked)


def test_single_precision_mismatch_is_rare(prepared: Case, record_property):
    """Rounding that depends on the batch size may turn a near tie, and then the search goes another way."""
    rate = single_precision_mismatch(prepared, prepared.samples[:24])
    record_property("mismatch_float32", rate)
    print(f"float32, engine at batch 64 against oracle: {100 * rate:.2f} % of samples differ")
    assert rate <= 0.1


def test_our_search_does_not_hang_on_the_batch_size(prepared: Case):
    """Nor on the last bits that come with it: what it weighs is often equal, and ties go by place."""
    few, many = (
        muroan.evaluate(
            prepared.model, prepared.samples, Decoupling(), threat_model=ThreatModel(max_queries=120), batch_size=size
        )
        for size in (1, 64)
    )
    assert not [a.id for a, b in zip(few, many, strict=True) if a.to_json() != b.to_json()]
    assert any(record.queries > 60 for record in few)


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["easy_vqa", "digit_sum"])
def test_single_precision_mismatch_of_many(dataset: str, request: pytest.FixtureRequest, record_property):
    prepared = request.getfixturevalue(dataset)
    data = EasyVQA() if dataset == "easy_vqa" else DigitSum(str(FSDD))
    source = data.prepared("test")
    model = copy.deepcopy(prepared.model).float()
    samples = with_own_labels(model, [source[i] for i in range(100, 100 + 3 * 480, 3)])
    rate = single_precision_mismatch(prepared, samples)
    record_property("mismatch_float32", rate)
    print(f"{dataset}, float32, 400 samples, engine at batch 64 against oracle: {100 * rate:.2f} % differ")
    assert rate <= 0.02


# ---------------------------------------------------------------------------------------------------------
# Odd shapes and three modalities, on a model so cheap that all 500 combinations can be tried


class RandomNet(MultimodalModel):
    """A random projection a modality, added up; cheap, smooth and touchy."""

    def __init__(self, seed: int):
        vocabulary = [f"w{i}" for i in range(30)] + list(",.?!")
        modalities = {
            "audio": Audio(37, 1000),
            "text": Text(WordTokenizer(vocabulary), 16),
            "image": Image((21, 13), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)),
        }
        super().__init__(modalities, 4)
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.audio, self.image = random(37, 6), random(3 * 21 * 13, 6)
        self.word, self.place = random(40, 6), random(16, 1)
        self.mix, self.out, self.bias = random(6, 12), random(12, 4), random(12)

    def encode(self, modality, x):
        if modality == "audio":
            return x @ self.audio / 3
        if modality == "image":
            return x.flatten(1) @ self.image / 20
        return ((x != 0)[..., None] * self.word[x] * (1 + 0.3 * self.place)).sum(1) / 3

    def fuse(self, features):
        summed = features["audio"] + features["text"] + features["image"]
        return torch.sin(summed @ self.mix / 2 + self.bias) + 0.2 * self.bias

    def head(self, embedding):
        return embedding @ self.out + torch.tensor([2.0, 1.0, 0.0, 0.0], dtype=torch.float64)


@pytest.fixture(scope="session")
def odd() -> Case:
    model = RandomNet(3).eval()
    rng = np.random.default_rng(0)
    examples = []
    for i in range(72):
        words = [f"w{rng.integers(36)}{rng.choice(['', '', ',', '?!'])}" for _ in range(rng.integers(1, 6))]
        inputs = {
            "audio": rng.standard_normal(rng.integers(1, 45)).astype(np.float32),
            "text": " ".join(words),
            "image": rng.integers(0, 256, (21, 13, 3), dtype=np.uint8),
        }
        examples.append(Example(f"odd-{i}", inputs, 0))
    samples = with_own_labels(model, list(PreparedDataset(examples, model.modalities, 4)))
    min_side = {"audio": 3, "image": 4}
    return Case(model, samples, min_side, oracle_results(model, samples, min_side, 500))


def test_the_odd_comparison_means_something(odd: Case):
    for coupling in COUPLINGS:
        attacked = [r for r in odd.expected[coupling] if r.status != "skipped"]
        flipped = [r for r in attacked if r.status == "flipped"]
        assert 0.3 * len(attacked) < len(flipped) < len(attacked)
        assert sum(r.combinations > 10 for r in flipped) >= 5
        assert sum(r.status == "held" and r.combinations == 500 for r in attacked) >= 1 or coupling == "pairs"
    for names in ({"audio", "text"}, {"audio", "image"}, {"image", "text"}):
        assert any(set(r.removed) == names for r in odd.expected["pairs"]), names


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_engine_equals_oracle_on_odd_shapes(odd: Case, batch_size: int, coupling: str):
    threat_model = ThreatModel(min_side=odd.min_side)
    attack = DecouplingReference(500, coupling)
    records = muroan.evaluate(odd.model, odd.samples, attack, threat_model=threat_model, batch_size=batch_size)
    assert_equal(records, odd.samples, odd.expected[coupling])
