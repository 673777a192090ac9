"""Attacks that follow gradients, on toy models whose steps can be worked out by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import muroan
from muroan.attacks.base import AttackedSample, BatchAttack, Perturbation, Response, ThreatModel
from muroan.attacks.co_attack import CoAttack, divergence
from muroan.attacks.feature_pgd import FeaturePgd
from muroan.attacks.fusion_embedding import FusionEmbedding
from muroan.attacks.pgd import Pgd, PgdL2, PgdLinf
from muroan.attacks.pgd_l0 import PgdL0
from muroan.attacks.saliency_removal import SaliencyRemoval
from muroan.attacks.sigma_zero import SigmaZero
from muroan.attacks.target import Target
from muroan.attacks.values import Values
from muroan.callbacks import AttackCallback
from muroan.data.base import MultimodalData
from muroan.data.samples import Example, PreparedDataset, Sample
from muroan.defenses.adversarial_training import AdversarialTraining
from muroan.defenses.mmcert import SmoothedModel
from muroan.errors import MuroanError
from muroan.modalities import Audio, Image, Region, Text, WordTokenizer
from muroan.models.base import MultimodalModel, Prediction
from muroan.results import AttackResult, Count, RunFolder
from muroan.training.module import MultimodalModule

WORDS = ["red", "blue", "green", "cat", "dog", "house"]
# Unequal deviations, so that a unit of the input is not a unit of the range.
IMAGE = {"image": Image((4, 3), mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))}
TEXT = {"text": Text(WordTokenizer(WORDS), 8)}
AUDIO = {"audio": Audio(20, 1000)}
FINE = {"image": 1, "audio": 4}  # the threat model's min_side


class Toy(MultimodalModel):
    """Each modality times a matrix, summed; then a tangent (unless `linear`), then logits. In double precision, unless
    made another."""

    def __init__(self, modalities: dict, classes: int = 3, linear: bool = False, seed: int = 0, bias: float = 0):
        super().__init__(modalities, classes)
        width, self.bias = 6, bias  # of the first class
        draw = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=draw, dtype=torch.float64) / shape[0] ** 0.5)

        self.linear = linear
        self.weights = nn.ParameterDict()
        for name, modality in modalities.items():
            if isinstance(modality, Text):
                self.word = nn.Embedding(modality.tokenizer.size, width, dtype=torch.float64)
                self.word.weight.data = torch.randn(self.word.weight.shape, generator=draw, dtype=torch.float64)
                self.weights[name] = random(modality.max_length, 1)
            else:
                self.weights[name] = random(int(np.prod(modality.shape)), width)
        self.out = random(width, classes)
        self.calls: list[tuple[str, int]] = []
        self.eval()

    def encode(self, modality, x):
        if modality == "text":
            return (self.word(x) * self.weights["text"]).sum(1)
        return x.flatten(1).to(self.weights[modality]) @ self.weights[modality]

    def fuse(self, features):
        self.calls.append(("fuse", len(next(iter(features.values())))))
        z = torch.stack(list(features.values())).sum(0)
        return z if self.linear else torch.tanh(z)

    def head(self, embedding):
        logits = embedding @ self.out
        return logits + self.bias * torch.eye(self.num_classes).to(logits)[0]


class Stubborn(Toy):
    """Never changes its mind, and still has a gradient."""

    def head(self, embedding):
        rest = 0.001 * torch.tanh(embedding @ self.out)
        return rest + torch.eye(self.num_classes).to(rest)[0]


def examples(count: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [
        Example(
            f"s{i}",
            {
                "image": rng.integers(30, 220, (4, 3, 3), dtype=np.uint8),
                "text": " ".join(rng.choice(WORDS, rng.integers(2, 6))),
                "audio": rng.uniform(-0.6, 0.6, int(rng.integers(8, 21))),
            },
            0,
        )
        for i in range(count)
    ]


def samples_of(model: MultimodalModel, count: int = 12, seed: int = 0) -> list[Sample]:
    """Random samples, labelled with the model's answer."""
    parts = [replace(e, inputs={n: e.inputs[n] for n in model.modalities}) for e in examples(count, seed)]
    samples = list(PreparedDataset(parts, model.modalities, model.num_classes))
    return [replace(s, label=int(answer(model, s.inputs)[1].argmax())) for s in samples]


def answer(model: MultimodalModel, inputs: dict[str, torch.Tensor]) -> Prediction:
    with torch.no_grad():
        return model({n: x[None].double() if x.is_floating_point() else x[None] for n, x in inputs.items()})


def target_of(model: MultimodalModel, samples: Sequence[Sample], budget: float = float("inf"), **more: Any) -> Target:
    """What the engine would hand to an attack."""
    batch = {n: torch.stack([s.inputs[n] for s in samples]) for n in model.modalities}
    batch = {n: x.double() if x.is_floating_point() else x for n, x in batch.items()}
    with torch.no_grad():
        features = {n: model.encode(n, x) for n, x in batch.items()}
        clean = model(batch)
    labels = torch.tensor([s.label for s in samples])
    views = [
        AttackedSample(
            s.id,
            s.label,
            Response(s.label, 0.0, 0, 0.0, logits.numpy()),
            model.modalities,
            s.layouts,
            ThreatModel(min_side=FINE).complete(model.modalities),
            np.random.default_rng(s.index),
        )
        for s, logits in zip(samples, clean.logits, strict=True)
    ]
    return Target(model, views, batch, labels, [budget] * len(samples), features, clean, more.get("donors", {}))


def attacked(model: MultimodalModel, attack: Any, samples: Sequence[Sample], **options: Any) -> list[AttackResult]:
    threat_model = ThreatModel(min_side=FINE, max_queries=options.pop("max_queries", None))
    return muroan.evaluate(model, samples, attack, threat_model=threat_model, **options)


def passes(record: AttackResult) -> tuple[int, int, int]:
    """Queries, forwards and backwards of the attack's own."""
    own = [count for phase, count in record.ledger.items() if phase not in ("clean", "verify", "audit")]
    return tuple(sum(getattr(c, what) for c in own) for what in ("queries", "forwards", "backwards"))


def loss_gradient(model: Toy, sample: Sample, name: str, loss: Callable) -> torch.Tensor:
    """The gradient by one input, without any of the engine's machinery."""
    inputs = {n: x[None].double() if x.is_floating_point() else x[None] for n, x in sample.inputs.items()}
    inputs[name].requires_grad_()
    (gradient,) = torch.autograd.grad(loss(model(inputs), torch.tensor([sample.label])).sum(), inputs[name])
    return gradient[0]


def cross_entropy(prediction: Prediction, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(prediction.logits, labels, reduction="none")


def span(name: str = "image") -> tuple[torch.Tensor, torch.Tensor]:
    low, high = IMAGE["image"].span()
    return low.double()[:, None, None], high.double()[:, None, None]


ATTACKS: dict[str, Callable[[], Any]] = {
    "pgd_linf": lambda: PgdLinf(0.3, 0.1, 6),
    "pgd_l2": lambda: PgdL2(1.5, None, 6),
    "pgd_l0": lambda: PgdL0(0.5, steps=4),
    "sigma_zero": lambda: SigmaZero(20),
    "feature_pgd": lambda: FeaturePgd(0.5, 0.2, 6),
    "fusion_embedding": lambda: FusionEmbedding(12, step=0.05),
    "co_attack": lambda: CoAttack(0.2, 5, candidates=3),
    "saliency_removal": lambda: SaliencyRemoval(),
    "integrated_gradients": lambda: SaliencyRemoval("integrated_gradients", 4),
}
BOTH = pytest.mark.parametrize("make", ATTACKS.values(), ids=ATTACKS)


# ---------------------------------------------------------------------------------------------------------
# Steps by hand


@pytest.mark.parametrize("epsilon", [0.01, 0.2])
def test_a_step_of_pgd_linf_moves_every_value_by_epsilon(epsilon):
    model = Toy(IMAGE, linear=True)
    sample = samples_of(model, 1)[0]
    attack = PgdLinf(epsilon, epsilon, 1, random_start=False, stop_early=False)
    (found,) = returned(attack, model, [sample])
    x, (low, high) = sample.inputs["image"].double(), span()
    sign = loss_gradient(model, sample, "image", cross_entropy).sign()
    expected = (x + epsilon * (high - low) * sign).clamp(low, high)
    torch.testing.assert_close(found, expected)
    if epsilon == 0.01:  # nothing is cut off at the ends of the range: 8/255 of the range are 8 grey levels
        grey = (found - x) * torch.tensor([0.5, 0.25, 0.2])[:, None, None]
        torch.testing.assert_close(grey.abs(), torch.full_like(grey, epsilon))


def test_a_step_of_pgd_l2_is_the_gradient_at_length_epsilon():
    model = Toy(IMAGE, linear=True)
    sample = samples_of(model, 1)[0]
    (found,) = returned(PgdL2(0.05, 0.05, 1, random_start=False, stop_early=False), model, [sample])
    x, (low, high) = sample.inputs["image"].double(), span()
    gradient = loss_gradient(model, sample, "image", cross_entropy) * (high - low)
    torch.testing.assert_close((found - x) / (high - low), 0.05 * gradient / gradient.norm())


def test_the_margin_loss_climbs_the_margin():
    model = Toy(IMAGE)
    sample = samples_of(model, 1)[0]
    (found,) = returned(PgdLinf(0.01, 0.01, 1, "margin", False, False), model, [sample])
    gradient = loss_gradient(model, sample, "image", lambda p, y: -Target.margin(p, y))
    assert torch.equal((found - sample.inputs["image"]).sign(), gradient.sign())


def returned(attack: BatchAttack, model: Toy, samples: list[Sample]) -> list[torch.Tensor]:
    """Images that an attack returns; it must look at nothing afterwards, as it may find no flip."""
    budget = 2 * attack.steps if isinstance(attack, Pgd) else float("inf")
    return [p.inputs["image"] for p in attack.perturb(target_of(model, samples, budget))]


def test_modalities_move_jointly_in_one_ball():
    model = Toy(IMAGE | AUDIO, linear=True)
    samples = samples_of(model, 4)
    found = PgdL2(0.05, 0.05, 1, random_start=False, stop_early=False).perturb(target_of(model, samples, 2))
    for sample, perturbation in zip(samples, found, strict=True):
        parts = []
        for name, scale in (("image", torch.tensor([2, 4, 5.0])[:, None, None]), ("audio", torch.tensor(2.0))):
            parts.append(((perturbation.inputs[name] - sample.inputs[name]) / scale).flatten())
        assert float(torch.cat(parts).norm()) == pytest.approx(0.05)
        assert all(part.norm() > 0.001 for part in parts)
        real = sample.layouts["audio"].count
        assert torch.equal(perturbation.inputs["audio"][real:], sample.inputs["audio"][real:].double())


@pytest.mark.parametrize(("named", "epsilon"), [(None, 0.06), (["image"], 0.2), (["text", "audio"], 0.2)])
def test_features_are_moved_as_far_as_helps(named, epsilon):
    """Where logits are linear in the features, the balls' farthest points towards another class are known."""
    model = Toy(IMAGE | TEXT | AUDIO, linear=True, seed=2)
    samples = samples_of(model, 30)
    records = attacked(model, FeaturePgd(epsilon, epsilon / 3, 60, "margin", named), samples)
    outcomes: list[tuple[bool, bool]] = []  # of each sample: whether a flip is within reach, and whether it was found
    for sample, record in zip(samples, records, strict=True):
        inputs = {n: x[None].double() if x.is_floating_point() else x[None] for n, x in sample.inputs.items()}
        with torch.no_grad():
            lengths = sum(float(model.encode(n, inputs[n]).norm()) for n in named or model.modalities)
        logits, label = answer(model, sample.inputs).logits[0], sample.label
        others = [c for c in range(model.num_classes) if c != label]
        reach = {c: epsilon * lengths * (model.out[:, c] - model.out[:, label]).norm().item() for c in others}
        best = min(float(logits[label] - logits[c]) - reach[c] for c in others)
        if abs(best) > 0.02 * float(logits[label] - logits[others].max()):
            # It climbs towards the nearest class at each step, which may not be the one within reach.
            assert best < 0 or not record.flipped
            outcomes.append((best < 0, record.flipped))
        if record.flipped:
            assert set(record.removed) == set(named or model.modalities) == set(record.info["feature_shift"])
            assert all(0 < share <= epsilon + 1e-4 for share in record.info["feature_shift"].values())
    found = [flipped for within, flipped in outcomes if within]
    assert sum(found) >= max(3, 0.8 * len(found))
    assert len(found) < len(outcomes), "some are out of reach"


def test_features_that_cannot_be_moved_or_do_not_fit_are_refused():
    class Counts(Toy):
        def encode(self, modality, x):
            return super().encode(modality, x).round().long() if modality == "text" else super().encode(modality, x)

    model = Counts(IMAGE | TEXT)
    with pytest.raises(MuroanError, match=r"feature_pgd does not fit .* of 'text' are torch.int64 .* name other"):
        attacked(model, FeaturePgd(), samples_of(model, 2))
    attacked(model, FeaturePgd(modalities=["image"]), samples_of(model, 2))
    with pytest.raises(MuroanError, match=r"attack.modalities names \['audio'\]"):
        attacked(model, FeaturePgd(modalities=["audio"]), samples_of(model, 2))

    class Wrong(BatchAttack):
        features: ClassVar = {}
        inputs: ClassVar = {}

        def perturb(self, target):
            return [Perturbation(self.inputs, features=self.features) for _ in range(len(target))]

    toy = Toy(IMAGE | TEXT)
    for features, inputs, said in (
        ({"image": torch.zeros(3)}, {}, r"features of 'image' of shape \(3,\), expected finite values of shape \(\d"),
        ({"sound": torch.zeros(3)}, {}, r"features of \['sound'\], expected some of the model's modalities"),
        ({"image": torch.zeros(3)}, {"image": torch.zeros(3, 4, 3)}, "whose inputs stay clean"),
    ):
        Wrong.features, Wrong.inputs = features, inputs
        with pytest.raises(MuroanError, match=said):
            attacked(toy, Wrong(), samples_of(toy, 1))


def test_features_are_no_inputs_to_train_on():
    model = Toy(IMAGE | TEXT)
    defense = AdversarialTraining(model, FeaturePgd())
    with pytest.raises(MuroanError, match="choose defense=embedding_adversarial_training"):
        defense.applied(samples_of(model, 1), [Perturbation(features={"image": torch.zeros(3)})], 0)


def test_named_modalities_alone_move():
    model = Toy(IMAGE | TEXT | AUDIO)
    (found,) = PgdLinf(0.1, 0.1, 1, modalities=["audio"]).perturb(target_of(model, samples_of(model, 1), 2))
    assert list(found.inputs) == ["audio"]


def pixels_needed(model: Toy, sample: Sample) -> int:
    """Fewest pixels that flip a linear model: for each other class, the pixels that can gain most, set to an end."""
    x, (low, high) = sample.inputs["image"].double(), span()
    logits = answer(model, sample.inputs).logits[0]
    fewest = 10**6
    for other in range(model.num_classes):
        if other == sample.label:
            continue
        slope = (model.weights["image"] @ (model.out[:, other] - model.out[:, sample.label])).reshape(x.shape).detach()
        gain = torch.maximum(slope * (low - x), slope * (high - x)).sum(0).flatten().sort(descending=True).values
        enough = (gain.cumsum(0) > logits[sample.label] - logits[other]).nonzero()
        fewest = min([fewest, *(int(i) + 1 for i in enough[:1])])
    return fewest


@pytest.mark.parametrize("make", [lambda: PgdL0(12, step=1e4, random_start=False), lambda: SigmaZero(300)])
def test_the_fewest_pixels_of_a_linear_model(make):
    """Two classes: the gradient never turns. A step far out of the range makes an element worth what it can gain there,
    so that PGD_0 finds the optimum."""
    model = Toy(IMAGE, classes=2, linear=True, bias=5)
    samples = samples_of(model, 10)
    records = attacked(model, make(), samples)
    needed = [pixels_needed(model, s) for s in samples]
    assert len(set(needed)) > 1
    assert all(r.flipped for r in records)
    found = [r.removed["image"] for r in records]
    assert all(a >= b for a, b in zip(found, needed, strict=True))
    if make().name == "pgd_l0":
        assert found == needed
    else:
        assert np.mean(found) <= np.mean(needed) + 1


def reference_sigma_zero(model: Toy, sample: Sample, steps: int) -> tuple[torch.Tensor | None, int]:
    """Sigma-zero by components from the paper's algorithm and torch's own Adam and schedule; in range units."""
    x, (low, high) = sample.inputs["image"].double(), span()
    unit, label = (x - low) / (high - low), torch.tensor([sample.label])
    delta = torch.zeros_like(unit, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=1.0)
    anneal = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps, eta_min=0.1)
    tau, best, fewest = 0.3, None, unit.numel() + 1
    for _ in range(steps):
        prediction = model({"image": ((unit + delta) * (high - low) + low)[None]})
        flipped = bool(prediction.logits.argmax(1) != label)
        count = int((delta != 0).sum())
        if flipped and count < fewest:
            best, fewest = delta.detach().clone(), count
        loss = Target.margin(prediction, label).clamp(min=0).sum() + (delta**2 / (delta**2 + 1e-3)).mean()
        adam.zero_grad()
        loss.backward()
        delta.grad /= delta.grad.abs().max().clamp(min=1e-12)
        adam.step()
        anneal.step()
        tau = min(1, max(0, tau + (0.01 if flipped else -0.01) * anneal.get_last_lr()[0]))
        with torch.no_grad():
            delta.copy_((unit + delta).clamp(0, 1) - unit)
            delta[delta.abs() < tau] = 0
    return best, fewest


def test_sigma_zero_by_components_is_the_papers():
    model = Toy(IMAGE, seed=3)
    samples = samples_of(model, 6)
    found = SigmaZero(60, group="component").perturb(target_of(model, samples))
    low, high = span()
    for sample, perturbation in zip(samples, found, strict=True):
        best, fewest = reference_sigma_zero(model, sample, 60)
        assert best is not None
        delta = (perturbation.inputs["image"] - sample.inputs["image"]) / (high - low)
        assert int((delta != 0).sum()) == fewest
        torch.testing.assert_close(delta, best, rtol=0, atol=1e-8)


def test_sigma_zero_by_elements_changes_fewer_pixels():
    model = Toy(IMAGE, seed=3)
    samples = samples_of(model, 20)
    pixels = {
        group: np.mean([r.removed["image"] for r in attacked(model, SigmaZero(100, group=group), samples)])
        for group in ("element", "component")
    }
    assert pixels["element"] <= pixels["component"]


def test_the_first_step_of_fusion_embedding_is_adams():
    """Adam's first step is the sign of the gradient times its step."""
    model = Toy(IMAGE | TEXT)
    one, other = samples_of(model, 2)
    attack = FusionEmbedding(1, step=0.001)
    attack.anchors = lambda target: (torch.arange(1), answer(model, other.inputs).embedding)
    (found,) = attack.perturb(target_of(model, [one], budget=2))
    moved = found.inputs["image"] - one.inputs["image"]
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.001), rtol=1e-4, atol=1e-6)


def stacked(samples: list[Sample]) -> dict[str, torch.Tensor]:
    rows = {name: torch.stack([s.inputs[name] for s in samples]) for name in samples[0].inputs}
    return {name: x.double() if x.is_floating_point() else x for name, x in rows.items()}


def test_donors_of_the_same_class_are_passed_over_and_no_donor_is_a_flip():
    model = Toy(IMAGE | TEXT)
    samples = samples_of(model, 30)
    one = samples[0]
    same = [s for s in samples[1:] if s.label == one.label][:5]
    other = [s for s in samples[1:] if s.label != one.label][:1]
    target = target_of(model, [one], donors=stacked(same + other))
    rows, anchors = FusionEmbedding(donors=6).anchors(target)
    assert rows.tolist() == [0]
    torch.testing.assert_close(anchors[0], answer(model, other[0].inputs).embedding[0])
    assert 1 <= target.queries[0] <= 6
    assert target.first_flip[0] == 0
    target = target_of(model, [one], donors=stacked(same))
    assert len(FusionEmbedding().anchors(target)[0]) == 0
    assert target.queries[0] == 5


def test_an_anchor_is_looked_for_among_all_donors():
    model = Toy(IMAGE | TEXT)
    samples = samples_of(model, 60)
    one = samples[0]
    same = [s for s in samples[1:] if s.label == one.label][:15]
    (other,) = [s for s in samples[1:] if s.label != one.label][:1]
    last = int(np.random.default_rng(0).permutation(16)[-1])  # from the generator of the sample in `target_of`
    donors = [*same[:last], other, *same[last:]]

    def anchored(among: list[Sample], budget: float = float("inf"), **options: Any) -> tuple[Any, int, bool]:
        target = target_of(model, [one], budget, donors=stacked(among))
        rows, anchors = FusionEmbedding(**options).anchors(target)
        assert (len(rows) == 1) == bool(anchors.any())
        return target.samples[0].info["anchor"], int(target.queries[0]), bool(target.refused[0])

    assert anchored(donors) == (last, 16, False)
    assert anchored(same) == (None, 15, False)
    assert anchored(donors, donors=8) == (None, 8, False)
    assert anchored(donors, budget=15) == (None, 15, True)
    (record,) = attacked(model, FusionEmbedding(), [one], donors=same)
    assert (record.status, record.info["anchor"], record.queries) == ("held", None, 15)


def test_fusion_embedding_moves_the_embedding_towards_the_anchor():
    model = Stubborn(IMAGE | TEXT)
    samples = [replace(s, label=0) for s in samples_of(model, 6)]
    target = target_of(model, samples[:2])
    anchors = torch.stack([answer(model, s.inputs).embedding[0] for s in samples[2:4]])
    attack = FusionEmbedding(30, step=0.02)
    attack.anchors = lambda target: (torch.arange(2), anchors)
    seen = []
    run = target._run
    target._run = lambda inputs, rows: (seen.append(run(inputs, rows)), seen[-1])[1]
    assert attack.perturb(target) == [None, None]
    before, after = (F.cosine_similarity(seen[i].embedding, anchors).detach() for i in (0, -1))
    assert (after > before).all()


def test_co_attack_replaces_one_word_by_a_near_one():
    model = Toy(IMAGE | TEXT)
    samples = samples_of(model, 12)
    target = target_of(model, samples)
    attack = CoAttack(candidates=2)
    words, ids, said, flipped = attack.replace_words(target, "text")
    table = F.normalize(model.word.weight.detach()[5:], dim=1)
    for row, sample in enumerate(samples):
        old, new = sample.layouts["text"].words, words[row]
        ((at, before, after),) = [(i, a, b) for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
        # The word that masking moves furthest.
        shifts = []
        for i in range(len(old)):
            masked = sample.inputs["text"].clone()
            masked[1 + i] = 4
            z = answer(model, {**sample.inputs, "text": masked}).embedding
            shifts.append(float(divergence(target.clean.embedding[row : row + 1], z)))
        assert at == int(np.argmax(shifts))
        likeness = table @ table[WORDS.index(before)]
        nearest = [WORDS[j] for j in likeness.argsort(descending=True).tolist() if WORDS[j] != before][:2]
        assert after in nearest
        z, logits = answer(model, {**sample.inputs, "text": ids[row]})
        torch.testing.assert_close(said[row], z[0])
        assert bool(flipped[row]) == (int(logits.argmax()) != sample.label)


def test_words_that_move_as_far_up_to_rounding_go_by_position(monkeypatch):
    """Equal words of a text do, and which of them seems to move further depends on the batch."""
    model = Toy(IMAGE | TEXT)
    target = target_of(model, samples_of(model, 3))
    z = target.clean.embedding[0]
    monkeypatch.setattr(
        CoAttack,
        "_moved",
        lambda self, target, name, rows, texts, admissible: [(0.5 + 1e-7 * i, False, z) for i in range(len(rows))],
    )
    words, *_ = CoAttack(candidates=2).replace_words(target, "text")
    nearest = [CoAttack(candidates=2).nearest(target, "text", row, 0)[0] for row in range(3)]
    assert [own[0] for own in words] == nearest, "the first word, by the first candidate"
    assert [own[1:] for own in words] == [sample.layouts["text"].words[1:] for sample in target.samples]


def test_co_attack_stays_in_its_ball():
    model = Toy(IMAGE | TEXT | AUDIO)
    records = attacked(model, CoAttack(0.1, 10), samples_of(model, 20))
    flips = [r for r in records if r.flipped]
    assert flips
    for r in flips:
        assert r.removed.get("text", 0) <= 1
        assert r.distance.get("audio", {"linf": 0})["linf"] <= 0.1 * 2 + 1e-6
        assert r.distance.get("image", {"linf": 0})["linf"] <= 0.1 * 5 + 1e-6


# ---------------------------------------------------------------------------------------------------------
# Saliency


def test_attributions_of_a_linear_model_are_weight_times_input():
    model = Toy(IMAGE | TEXT | AUDIO, classes=2, linear=True)
    samples = samples_of(model, 5)
    target = target_of(model, samples)
    gradient, integrated = (SaliencyRemoval(m, 3).attribute(target) for m in ("gradient", "integrated_gradients"))
    for row, sample in enumerate(samples):
        regions = target.samples[row].atoms()
        slope = model.out[:, sample.label] - model.out[:, 1 - sample.label]
        for i, region in enumerate(regions):
            if region.modality == "text":
                at = 1 + region.start[0]
                values = model.word.weight[sample.inputs["text"][at]] * model.weights["text"][at] * slope
            else:
                where = (..., *(slice(a, b) for a, b in zip(region.start, region.stop, strict=True)))
                x = sample.inputs[region.modality].double()
                values = ((model.weights[region.modality] @ slope).reshape(x.shape) * x)[where]
            assert integrated[row][i] == pytest.approx(values.sum().item())
            assert gradient[row][i] == pytest.approx(values.abs().sum().item())


def test_gradients_by_words_need_one_call_of_the_table():
    class Calls(Toy):
        """Looks up the text, another token, or other ids of the same shape."""

        def __init__(self, *calls: str):
            super().__init__(IMAGE | TEXT, linear=True)
            self.order = calls

        def encode(self, modality, x):
            if modality == "image":
                return super().encode(modality, x)
            ids = {"text": x, "hint": x.new_tensor([[3]]), "shifted": x.roll(1, 1)}
            return sum((self.word(ids[call]) * self.weights["text"]).sum(1) for call in self.order)

    samples = samples_of(Calls("text"), 4)
    for model in (Calls("text"), Calls("hint", "text"), Calls("text", "hint")):
        _, found = target_of(model, samples).gradient(lambda p, y: p.logits[:, 0], of=["text"])
        expected = model.weights["text"] * model.out[:, 0]
        torch.testing.assert_close(found["text"], expected.detach().expand(4, -1, -1))
        assert "encode" not in vars(model)
    for model, count in ((Calls("text", "text"), "2"), (Calls("shifted", "hint"), "none")):
        message = rf"words of 'text' .*token ids .*, \(4, 8\), in one call .*{count} did: choose"
        with pytest.raises(MuroanError, match=message):
            target_of(model, samples).gradient(Target.margin, of=["text", "image"])
        assert "encode" not in vars(model)
        assert not model.word._forward_hooks
    smoothed = SmoothedModel(Toy(IMAGE | TEXT), {"image": 0.5, "text": 0.5}, votes=3)
    with pytest.raises(MuroanError, match=r"in one call of its nn\.Embedding; .*none did: choose an attack"):
        attacked(smoothed, SaliencyRemoval(), samples_of(smoothed, 4))


def test_integrated_gradients_sum_to_what_the_input_adds():
    """Completeness: all attributions, with those of special tokens and padding, are the margin less that of zeros."""
    model = Toy(IMAGE, seed=1, classes=2)
    for sample in samples_of(model, 5):
        target = target_of(model, [sample])
        (found,) = SaliencyRemoval("integrated_gradients", 400).attribute(target)
        zeros = answer(model, {"image": torch.zeros_like(sample.inputs["image"])})
        margins = [float(Target.margin(p, torch.tensor([sample.label]))) for p in (target.clean, zeros)]
        assert sum(found) == pytest.approx(margins[0] - margins[1], rel=1e-3, abs=1e-4)


def test_the_most_salient_parts_go_and_what_is_not_needed_comes_back():
    class Needs(Toy):
        """Class 1 as soon as pixels 2 and 5 are dark; the largest weight lies on pixel 0, which does not matter."""

        def encode(self, modality, x):
            return x.flatten(2).sum(1)

        def fuse(self, features):
            return features["image"]

        def head(self, z):
            matters = torch.minimum(z[:, 0] * 100, torch.zeros(())) + z[:, 2].clamp(max=1) + z[:, 5].clamp(max=1)
            return torch.stack([matters + 1e-3 * z[:, 0], torch.full_like(matters, 0.1)], 1)

    model = Needs(IMAGE)
    white = PreparedDataset([Example("w", {"image": np.full((4, 3, 3), 255, np.uint8)}, 0)], IMAGE, 2)[0]
    (record,) = attacked(model, SaliencyRemoval("integrated_gradients", 40), [white])
    assert record.flipped
    assert sorted(start for _, start, _ in record.regions) == [(0, 2), (1, 2)]
    assert record.one_minimal
    assert set(record.ledger) == {"clean", "attribute", "remove", "prune", "verify", "audit"}
    assert record.ledger["attribute"] == Count(80, 40, 0, 40)


def test_occlusion_without_captum_is_told(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "captum"] + ["captum"]:
        monkeypatch.setitem(sys.modules, name, None)
    model = Toy(IMAGE | TEXT)
    with pytest.raises(MuroanError, match=r"pip install -e '\.\[captum\]'"):
        attacked(model, SaliencyRemoval("occlusion"), samples_of(model, 1))


# ---------------------------------------------------------------------------------------------------------
# Projections

MIXED = Toy(IMAGE | TEXT | AUDIO)
FEW = samples_of(MIXED, 3)
moves = st.integers(0, 2**32 - 1).map(
    lambda seed: torch.from_numpy(np.random.default_rng(seed).standard_normal((3, 56)))
)


@given(moves, st.floats(1e-3, 10), st.floats(0, 20), st.sampled_from([PgdLinf, PgdL2]))
@settings(max_examples=40, deadline=None)
def test_projections_to_a_ball(move, epsilon, size, kind):
    values, rows = Values(target_of(MIXED, FEW), None), torch.arange(3)
    attack = kind(epsilon)
    delta = values.clip(attack.project(move * size), rows)
    norm = delta.abs().amax(1) if kind is PgdLinf else delta.norm(dim=1)
    assert (norm <= epsilon * (1 + 1e-12)).all()
    inside(values, delta)
    again = values.clip(attack.project(delta), rows)
    torch.testing.assert_close(again, delta, rtol=1e-12, atol=1e-12)


@given(moves, st.floats(0, 3), st.lists(st.integers(0, 40), min_size=3, max_size=3))
@settings(max_examples=40, deadline=None)
def test_projection_to_few_elements(move, size, most):
    values, rows = Values(target_of(MIXED, FEW), None), torch.arange(3)
    delta = values.sparse(move * size, torch.tensor(most), rows)
    assert (values.changed(delta) <= torch.tensor(most)).all()
    inside(values, delta)
    clipped = values.clip(move * size, rows)
    kept = delta != 0
    assert torch.equal(delta[kept], clipped[kept])
    # No other choice of as many elements lies nearer: what each gains is known by itself.
    gain = values.by_element((move * size).square() - (move * size - clipped).square())
    got = values.by_element((move * size).square() - (move * size - delta).square()).sum(1)
    for row, k in enumerate(most):
        best = gain[row].sort(descending=True).values[:k].clamp(min=0).sum()
        assert float(got[row]) == pytest.approx(float(best), abs=1e-9)


def inside(values: Values, delta: torch.Tensor) -> None:
    """The changed inputs lie in the span, padding is as it was, and what does not move keeps its bits."""
    target = values.target
    for name, x in values.inputs(delta, torch.arange(len(delta))).items():
        low, high = target.span(name)
        assert (x >= low - 1e-6).all()
        assert (x <= high + 1e-6).all()
        for row, sample in enumerate(target.samples):
            if name == "audio":
                real = sample.layouts[name].count
                assert torch.equal(x[row, real:], target.inputs[name][row, real:])
    still = values.inputs(torch.zeros_like(delta), torch.arange(len(delta)))
    assert all(torch.equal(still[name], target.inputs[name]) for name in still)


# ---------------------------------------------------------------------------------------------------------
# What passes cost


def test_passes_of_an_attack_that_never_flips():
    model = Stubborn(IMAGE | TEXT | AUDIO)
    samples = [replace(s, label=0) for s in samples_of(model, 5)]
    expected = {
        PgdLinf(0.1, 0.02, 7): (15, 8, 7),
        PgdL2(0.5, None, 4, random_start=False): (9, 5, 4),
        PgdL0(3, steps=5): (33, 18, 15),  # k = 1, 2, 3, each with five steps and a look
        SigmaZero(9): (17, 9, 8),
    }
    for attack, count in expected.items():
        before = len(model.calls)
        records = attacked(model, attack, samples, batch_size=5)
        assert [r.status for r in records] == ["held"] * 5
        assert [passes(r) for r in records] == [count] * 5
        # A pass of the batch is one call of the model; two more are clean predictions, the second a check.
        assert len(model.calls) - before == count[1] + 2
    records = attacked(model, CoAttack(0.1, 4, candidates=3), samples)
    for r, s in zip(records, samples, strict=True):
        words = s.layouts["text"].count
        assert passes(r) == (words + 3 + 9, words + 3 + 5, 4)


def test_a_sample_that_flipped_costs_no_more():
    model = Toy(IMAGE)
    samples = samples_of(model, 12)
    records = attacked(model, PgdLinf(0.5, 0.02, 25, random_start=False), samples)
    counts = {passes(r) for r in records if r.flipped}
    assert len(counts) > 3
    assert all(queries == forwards + backwards for queries, forwards, backwards in counts)
    assert all(forwards - backwards in (0, 1) for _, forwards, backwards in counts)
    for r in records:
        if r.flipped:
            assert r.trajectory[0][0] == r.queries


@BOTH
@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5, 8, 13, 31])
def test_a_budget_is_never_exceeded(make, budget):
    for model in (Toy(IMAGE | TEXT | AUDIO), Stubborn(IMAGE | TEXT | AUDIO)):
        samples, donors = samples_of(model, 8), samples_of(model, 8, seed=1)
        if isinstance(make(), SaliencyRemoval) and budget < 3:
            with pytest.raises(MuroanError, match=r"too small .* asks a gradient and a removal .* allow at least 3"):
                attacked(model, make(), samples, max_queries=budget, donors=donors)
            continue
        records = attacked(model, make(), samples, max_queries=budget, donors=donors)
        assert all(r.queries <= budget for r in records)
        assert {r.status for r in records} <= {"flipped", "held", "budget_exhausted"}
        if isinstance(model, Stubborn):
            free = attacked(model, make(), samples, donors=samples_of(model, 8, seed=1))
            assert {r.status for r in free} == {"held"}
            enough = [r.queries <= budget for r in free]
            assert [r.status for r in records] == ["held" if fits else "budget_exhausted" for fits in enough]


@BOTH
def test_a_budget_that_is_just_enough_is_not_exhausted(make):
    model = Stubborn(IMAGE | TEXT | AUDIO)
    (sample,), donors = samples_of(model, 1), samples_of(model, 8, seed=1)
    (free,) = attacked(model, make(), [sample], donors=donors)
    for budget, status in ((free.queries, "held"), (free.queries - 1, "budget_exhausted")):
        (record,) = attacked(model, make(), [sample], donors=donors, max_queries=budget)
        assert (record.status, record.queries <= budget) == (status, True)
    assert record.to_json() != free.to_json()


@pytest.mark.parametrize("kind", [PgdLinf, PgdL2])
def test_a_look_that_is_not_made_needs_no_budget(kind):
    model = Stubborn(IMAGE)
    for budget, status in ((7, "budget_exhausted"), (8, "held"), (9, "held")):
        (record,) = attacked(model, kind(0.1, 0.02, 4, stop_early=False), samples_of(model, 1), max_queries=budget)
        assert (record.status, record.queries) == (status, min(budget, 8) // 2 * 2)


class Uneven(BatchAttack):
    """Sample n asks n % 5 + 1 times, then claims that the opposite of its image flips it."""

    def __init__(self, careful: bool):
        self.careful = careful

    def perturb(self, target):
        found: list[Perturbation | None] = [None] * len(target)
        for asked in range(5):
            wanted = [row for row, s in enumerate(target.samples) if int(s.id[1:]) % 5 >= asked]
            rows = torch.tensor(wanted, dtype=torch.long)
            if self.careful:
                rows = target.able(rows, 1)
            if len(rows):
                target.predict({}, rows)
            for row in rows.tolist():
                last = int(target.samples[row].id[1:]) % 5 == asked
                found[row] = Perturbation({"image": -target.inputs["image"][row]}) if last else None
        return found


@pytest.mark.parametrize("batch_size", [1, 7, 64])
class TestRowsRunOutOneByOne:
    def test_the_others_go_on(self, batch_size):
        for model, found in ((Stubborn(IMAGE), "held"), (Toy(IMAGE, linear=True), "flipped")):
            samples = samples_of(model, 20)
            records = attacked(model, Uneven(careful=True), samples, batch_size=batch_size, max_queries=3)
            assert [r.queries for r in records] == [1, 2, 3, 3, 3] * 4
            assert [r.status for r in records] == [*[found] * 3, *["budget_exhausted"] * 2] * 4

    def test_an_attack_that_does_not_care_is_told(self, batch_size):
        model = Stubborn(IMAGE)
        careless = Uneven(careful=False)
        assert len(attacked(model, careless, samples_of(model, 3), batch_size=batch_size, max_queries=3)) == 3
        with pytest.raises(
            MuroanError, match=r"uneven asked for a pass .* max_queries=3: .*target\.able\(rows, cost\)"
        ):
            attacked(model, careless, samples_of(model, 20), batch_size=batch_size, max_queries=3)


@pytest.mark.parametrize("make", [lambda: PgdLinf(0.5, 0.1, 50, random_start=False), lambda: FusionEmbedding(50)])
def test_a_last_step_without_a_look_is_judged_by_the_engine(make):
    """With an even budget all of it goes to steps; one of them flips and nobody has looked."""
    model = Toy(IMAGE | TEXT)
    samples = samples_of(model, 12)
    donors = samples_of(model, 12, seed=1)
    unseen = 0
    for budget in range(2, 12):
        for r in attacked(model, make(), samples, max_queries=budget, donors=donors):
            unseen += r.flipped and not r.trajectory
    if isinstance(make(), PgdLinf):
        assert unseen


@BOTH
def test_results_do_not_depend_on_the_batch(make):
    model = Toy(IMAGE | TEXT | AUDIO, seed=2)
    samples, donors = samples_of(model, 16), samples_of(model, 8, seed=1)
    assert len({s.label for s in samples}) == 3

    def run(order: Sequence[Sample], batch_size: int, **options: Any) -> list[Any]:
        records = attacked(model, make(), order, batch_size=batch_size, donors=donors, **options)
        for r in records:
            r.distance = {n: {k: round(v, 9) for k, v in d.items()} for n, d in r.distance.items()}
        return [r.to_json() for r in records]

    for options in ({}, {"max_queries": 12}):
        expected = run(samples, 1, **options)
        for batch_size in (3, 16):
            assert run(samples, batch_size, **options) == expected
        assert run(samples[::-1], 5, **options) == expected


@BOTH
def test_an_easy_model_is_flipped(make):
    model = Toy(IMAGE | TEXT | AUDIO, seed=2)
    records = attacked(model, make(), samples_of(model, 16), donors=samples_of(model, 16, seed=1))
    flipped = [r for r in records if r.flipped]
    assert len(flipped) >= 5
    for r in flipped:
        assert r.adversarial_label != r.label
        assert r.attack == make().name
        assert r.decoupled_fraction > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["pgd_linf", "pgd_l2", "pgd_l0", "sigma_zero", "fusion_embedding", "co_attack"])
def test_models_of_every_precision(name, dtype, monkeypatch):
    """Padding has no gradient, and the gradient of a confident answer is 0 in half precision: neither becomes NaN."""
    given, moved = [], []
    inputs = Values.inputs

    def spy(values: Values, delta: torch.Tensor, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        moved.append(delta)
        given.append(inputs(values, delta, rows))
        return given[-1]

    monkeypatch.setattr(Values, "inputs", spy)
    for bias in (0, 20):
        model = Toy(IMAGE | TEXT | AUDIO, seed=2, bias=bias)
        samples, donors = samples_of(model, 8), samples_of(model, 8, seed=1)
        attacked(model.to(dtype), ATTACKS[name](), samples, donors=donors)
    assert given
    assert all(x.dtype == dtype and x.isfinite().all() for changed in given for x in changed.values())
    assert {delta.dtype for delta in moved} == {torch.promote_types(dtype, torch.float32)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_features_of_every_precision(dtype):
    """The gradient of a confident answer is 0 in half precision, and is not divided by."""
    for bias in (0, 20):
        model = Toy(IMAGE | TEXT | AUDIO, seed=2, bias=bias)
        samples = samples_of(model, 8)
        records = attacked(model.to(dtype), FeaturePgd(0.5, 0.2, 6), samples)
        shares = [share for r in records for share in r.info.get("feature_shift", {}).values()]
        assert all(0 < share < 0.51 for share in shares)
        assert bias or shares


@BOTH
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_what_the_cpu_finds(make):
    model = Toy(IMAGE | TEXT | AUDIO, seed=2)
    samples, donors = samples_of(model, 16), samples_of(model, 8, seed=1)
    for budget in (None, 13):
        found = [
            [
                (r.status, r.removed, passes(r))
                for r in attacked(model, make(), samples, donors=donors, device=device, max_queries=budget)
            ]
            for device in ("cpu", "cuda")
        ]
        assert found[0] == found[1]


class ToyData(MultimodalData):
    name, classes = "toy", ["a", "b", "c"]

    def load(self, split):
        model = Toy(IMAGE | TEXT | AUDIO)
        labels = {s.id: s.label for s in samples_of(model, 12)}
        return [replace(e, label=labels[e.id]) for e in examples(12)]

    def natural_modalities(self):
        return IMAGE | TEXT | AUDIO


@BOTH
@pytest.mark.filterwarnings("ignore")
def test_inside_lightnings_test_loop(make, tmp_path):
    """Which runs in inference mode; the records are those of `evaluate`."""
    model = Toy(IMAGE | TEXT | AUDIO)
    data = ToyData(test_batch_size=5)
    callback = AttackCallback(
        make(), tmp_path / "run", {"identity": {}}, ThreatModel(min_side=FINE), batch_size=4, progress=False
    )
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", devices=1, callbacks=[callback], **options)
    trainer.test(MultimodalModule(model), data, verbose=False)
    samples = list(data.prepared("test"))
    expected = attacked(model, make(), samples, donors=list(data.prepared("val")))
    shown = [(r.id, r.status, r.removed, passes(r)) for r in callback.records]
    assert shown == [(r.id, r.status, r.removed, passes(r)) for r in expected]
    assert RunFolder(tmp_path / "run").run["guided"] is True


# ---------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("number", [0, -1, float("nan"), float("inf")])
def test_numbers_are_checked(number):
    for kind in (PgdLinf, PgdL2, CoAttack):
        with pytest.raises(MuroanError, match=rf"attack.epsilon must be a number above 0, got {number}"):
            kind(epsilon=number)
    for kind in (PgdLinf, PgdL2, PgdL0, SigmaZero, FusionEmbedding, CoAttack):
        for option in ("steps", "step"):
            with pytest.raises(MuroanError, match=f"attack.{option} must be a "):
                kind(**{option: number})
    with pytest.raises(MuroanError, match=r"attack\.most"):
        PgdL0(most=number)


def test_choices_are_checked():
    for make in (
        lambda: PgdLinf(loss="hinge"),
        lambda: PgdL0(loss="hinge"),
        lambda: SigmaZero(group="region"),
        lambda: SaliencyRemoval("lime"),
    ):
        with pytest.raises(MuroanError, match="must be one of"):
            make()


@pytest.mark.parametrize("kind", [PgdLinf, PgdL2, PgdL0, SigmaZero, FusionEmbedding, CoAttack])
def test_a_modality_without_values_is_told(kind):
    model = Toy(IMAGE | TEXT)
    samples = samples_of(model, 2)
    for name in ("text", "video"):
        with pytest.raises(MuroanError, match=rf"attack.modalities names \['{name}'\]"):
            attacked(model, kind(modalities=[name]), samples, donors=samples)
    with pytest.raises(MuroanError, match="continuous values"):
        attacked(Toy(TEXT), kind(), samples_of(Toy(TEXT), 1), donors=samples)


def test_what_else_an_attack_needs_is_told():
    model = Toy(IMAGE | TEXT)
    with pytest.raises(MuroanError, match=r"donors=\.\.\."):
        attacked(model, FusionEmbedding(), samples_of(model, 1))
    image = Toy(IMAGE)
    with pytest.raises(MuroanError, match="a word of a text"):
        attacked(image, CoAttack(), samples_of(image, 1))

    class Quiet(WordTokenizer):
        """Keeps its vocabulary to itself."""

        def __init__(self):
            super().__init__(WORDS)
            del self.vocabulary

    quiet = Toy(IMAGE | {"text": Text(Quiet(), 8)})
    with pytest.raises(MuroanError, match="Quiet does not"):
        attacked(quiet, CoAttack(), samples_of(quiet, 1))


def test_perturbations_are_what_batch_attacks_return():
    model = Toy(IMAGE)
    found = PgdLinf(0.5).perturb(target_of(model, samples_of(model, 3)))
    assert all(isinstance(p, Perturbation) for p in found)
    assert Region("image", (0, 0), (1, 1)) in target_of(model, samples_of(model, 1)).samples[0].atoms()
