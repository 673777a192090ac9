"""The gradient attacks beside other libraries: `make test-peers` installs those into .venv-peers and runs this."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
foolbox = pytest.importorskip("foolbox", reason="make test-peers installs it")
captum = pytest.importorskip("captum.attr", reason="make test-peers installs it")
pytest.importorskip("art", reason="make test-peers installs it")
from art.attacks.evasion import PixelAttack, ProjectedGradientDescentPyTorch  # noqa: E402
from art.estimators.classification import PyTorchClassifier  # noqa: E402

import muroan  # noqa: E402
from muroan.attacks.base import AttackedSample, Response, ThreatModel  # noqa: E402
from muroan.attacks.one_pixel import OnePixel  # noqa: E402
from muroan.attacks.pgd import Pgd, PgdL2, PgdLinf  # noqa: E402
from muroan.attacks.saliency_removal import SaliencyRemoval  # noqa: E402
from muroan.attacks.sigma_zero import SigmaZero  # noqa: E402
from muroan.attacks.target import Target  # noqa: E402
from muroan.data.samples import Example, PreparedDataset, Sample  # noqa: E402
from muroan.modalities import Image, Text, WordTokenizer  # noqa: E402
from muroan.models.base import MultimodalModel  # noqa: E402

SIDE, WORDS = 12, ["red", "blue", "cat", "dog"]


class Net(MultimodalModel):
    """A small CNN of an image, and where there is a text, word embeddings and a layer over both. Random weights."""

    def __init__(self, text: bool = False, mean: float = 0.5, std: float = 0.25):
        modalities = {"image": Image((SIDE, SIDE), (mean,) * 3, (std,) * 3)}
        if text:
            modalities["text"] = Text(WordTokenizer(WORDS), 7)
        super().__init__(modalities, 4)
        torch.manual_seed(0)
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.Tanh(), nn.Flatten())
        self.features = nn.Linear(8 * 4 * 4, 16)
        self.word = nn.Embedding(9, 16) if text else None
        self.classes = nn.Sequential(nn.Tanh(), nn.Linear(16, 4))
        self.double().eval()

    def encode(self, modality, x):
        return self.features(self.conv(x)) if modality == "image" else self.word(x).tanh().mean(1)

    def fuse(self, features):
        return torch.stack(list(features.values())).sum(0)

    def head(self, embedding):
        return self.classes(embedding)


class OfPixels(nn.Module):
    """The model as other libraries take one: pixels (B, 3, H, W) in 0 to 1 in, logits out."""

    def __init__(self, model: Net):
        super().__init__()
        self.model = model
        low, high = model.modalities["image"].span()
        self.low, self.scale = low.double()[:, None, None], (high - low).double()[:, None, None]

    def forward(self, pixels):
        return self.model({"image": pixels * self.scale + self.low}).logits

    def pixels(self, x):
        return (x - self.low) / self.scale


def samples_of(model: Net, count: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    # At least a dozen grey levels from black and white, as rounding would decide what lies in the range.
    raw = [{"image": rng.integers(12, 244, (SIDE, SIDE, 3), dtype=np.uint8)} for _ in range(count)]
    for inputs in raw:
        if "text" in model.modalities:
            inputs["text"] = " ".join(rng.choice(WORDS, rng.integers(1, 6)))
    prepared = PreparedDataset([Example(f"s{i}", x, 0) for i, x in enumerate(raw)], model.modalities, 4)
    found = []
    for sample in prepared:
        inputs = {n: x[None].double() if x.is_floating_point() else x[None] for n, x in sample.inputs.items()}
        with torch.no_grad():
            label = int(model(inputs).logits.argmax())
        found.append(Sample(sample.id, sample.index, sample.inputs, sample.layouts, label))
    return found


def target_of(model: Net, samples: list[Sample], budget: float = float("inf")) -> Target:
    inputs = {n: torch.stack([s.inputs[n] for s in samples]) for n in model.modalities}
    inputs = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    with torch.no_grad():
        clean, features = model(inputs), {n: model.encode(n, x) for n, x in inputs.items()}
    threat_model = ThreatModel(min_side={"image": 1}).complete(model.modalities)
    views = [
        AttackedSample(
            s.id,
            s.label,
            Response(s.label, 0, 0, 0, clean.logits[i].numpy()),
            model.modalities,
            s.layouts,
            threat_model,
            np.random.default_rng(i),
        )
        for i, s in enumerate(samples)
    ]
    labels = torch.tensor([s.label for s in samples])
    return Target(model, views, inputs, labels, [budget] * len(samples), features, clean, {})


def ours(model: Net, samples: list[Sample], attack: Pgd) -> torch.Tensor:
    """Where the attack ends, in pixels: the budget has no room for a look, so that it returns its last step."""
    target = target_of(model, samples, 2 * attack.steps)
    return OfPixels(model).pixels(torch.stack([p.inputs["image"] for p in attack.perturb(target)]))


@pytest.mark.parametrize("epsilon", [8 / 255, 0.3])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_ends_where_foolbox_and_art_end(norm, epsilon):
    model = Net()
    samples = samples_of(model, 16)
    steps, step = 10, epsilon / 4
    kind, theirs = (PgdLinf, foolbox.attacks.LinfPGD) if norm == "linf" else (PgdL2, foolbox.attacks.L2PGD)
    found = ours(model, samples, kind(epsilon, step, steps, random_start=False, stop_early=False))

    pixels = OfPixels(model)
    clean = pixels.pixels(torch.stack([s.inputs["image"] for s in samples]).double())
    labels = torch.tensor([s.label for s in samples])
    wrapped = foolbox.PyTorchModel(pixels.eval(), bounds=(0, 1), device="cpu")
    attack = theirs(abs_stepsize=step, steps=steps, random_start=False)
    expected, _, _ = attack(wrapped, clean, foolbox.criteria.Misclassification(labels), epsilons=epsilon)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    classifier = PyTorchClassifier(
        pixels.float(), nn.CrossEntropyLoss(), (3, SIDE, SIDE), 4, clip_values=(0, 1), device_type="cpu"
    )
    model.float()
    pixels.low, pixels.scale = pixels.low.float(), pixels.scale.float()
    art = ProjectedGradientDescentPyTorch(
        classifier, np.inf if norm == "linf" else 2, epsilon, step, max_iter=steps, batch_size=16, verbose=False
    )
    single = torch.from_numpy(art.generate(clean.float().numpy(), labels.numpy())).double()
    # ART computes in single precision, where a sample at a kink of the model may go another way.
    assert int(((found - single).flatten(1).norm(dim=1) < 1e-5).sum()) >= len(samples) - 1
    model.double()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_flips_as_many_as_foolbox(norm):
    model = Net()
    samples = samples_of(model, 60)
    epsilon, steps = (0.02, 20) if norm == "linf" else (0.4, 20)
    step = epsilon / 8
    kind, theirs = (PgdLinf, foolbox.attacks.LinfPGD) if norm == "linf" else (PgdL2, foolbox.attacks.L2PGD)
    for random_start in (False, True):
        records = muroan.evaluate(model, samples, kind(epsilon, step, steps, random_start=random_start))
        pixels = OfPixels(model)
        clean = pixels.pixels(torch.stack([s.inputs["image"] for s in samples]).double())
        labels = torch.tensor([s.label for s in samples])
        wrapped = foolbox.PyTorchModel(pixels.eval(), bounds=(0, 1), device="cpu")
        attack = theirs(abs_stepsize=step, steps=steps, random_start=random_start)
        torch.manual_seed(0)
        _, _, flipped = attack(wrapped, clean, foolbox.criteria.Misclassification(labels), epsilons=epsilon)
        mine, other = sum(r.flipped for r in records), int(flipped.sum())
        print(f"{norm}, random start {random_start}: {mine} of 60 flipped, Foolbox {other}")
        assert 0 < other < 60, "a test of strength needs something to flip and something that resists"
        assert mine >= other - random_start  # a random start may cost a sample


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("steps", [2, 7])
def test_integrated_gradients_are_captums(text, steps):
    model = Net(text)
    samples = samples_of(model, 5)
    target = target_of(model, samples)
    found = SaliencyRemoval("integrated_gradients", steps).attribute(target)
    labels = target.labels

    def margins(image, *words):
        features = {"image": model.encode("image", image)}
        if words:
            features["text"] = words[0].tanh().mean(1)
        z = model.fuse(features)
        return target.margin(type(target.clean)(z, model.head(z)), labels.repeat(len(z) // len(labels)))

    inputs = [target.inputs["image"], *([target.embedded("text")] if text else [])]
    theirs = captum.IntegratedGradients(margins).attribute(tuple(inputs), n_steps=steps, method="riemann_middle")
    compare(target, found, [theirs[0], *(x.sum(2) for x in theirs[1:])])


@pytest.mark.parametrize("text", [False, True])
def test_gradient_times_input_is_captums(text):
    model = Net(text)
    target = target_of(model, samples_of(model, 5))

    def margins(image, *words):
        features = {"image": model.encode("image", image)}
        if words:
            features["text"] = words[0].tanh().mean(1)
        z = model.fuse(features)
        return target.margin(type(target.clean)(z, model.head(z)), target.labels)

    inputs = [target.inputs["image"], *([target.embedded("text")] if text else [])]
    theirs = captum.InputXGradient(margins).attribute(tuple(x.clone().requires_grad_() for x in inputs))
    found = SaliencyRemoval("gradient").attribute(target)
    compare(target, found, [theirs[0].abs(), *(x.abs().sum(2) for x in theirs[1:])])


def compare(target: Target, found: list, theirs: list[torch.Tensor]) -> None:
    """Scores of regions and words with theirs: (B, 3, H, W) of the image, (B, T) of the text."""
    for row, sample in enumerate(target.samples):
        for score, region in zip(found[row], sample.atoms(), strict=True):
            if region.modality == "image":
                (y, x), (y2, x2) = region.start, region.stop
                expected = theirs[0][row, :, y:y2, x:x2].sum()
            else:
                expected = theirs[1][row, 1 + region.start[0]]
            assert score == pytest.approx(expected.item(), rel=1e-6, abs=1e-9)


def test_occlusion_is_captums_and_by_hand():
    """Every region of the threat model's finest, by Captum's regular windows, and each counted."""
    model = Net(text=True)
    samples = samples_of(model, 3)
    target = target_of(model, samples)
    for view in target.samples:
        view.threat_model = ThreatModel(min_side={"image": 3}).complete(model.modalities)
    found = SaliencyRemoval("occlusion").attribute(target)
    for row, sample in enumerate(samples):
        regions = target.samples[row].atoms()
        assert len(regions) == 16 + sample.layouts["text"].count
        assert target.forwards[row] == target.queries[row] == len(regions) + 1
        words = target.inputs["text"][row : row + 1]

        def margins(image, words=words, row=row):
            p = model({"image": image, "text": words.expand(len(image), -1)})
            return target.margin(p, target.labels[row].expand(len(image)))

        image = target.inputs["image"][row : row + 1]
        windows = captum.Occlusion(margins).attribute(image, (3, 3, 3), strides=(3, 3, 3), baselines=0)
        whole = margins(image)
        for score, region in zip(found[row], regions, strict=True):
            if region.modality == "image":
                assert score == pytest.approx(windows[0, 0, region.start[0], region.start[1]].item(), abs=1e-7)
            else:
                masked = words.clone()
                masked[0, 1 + region.start[0]] = 4
                assert score == pytest.approx((whole - margins(image, masked)).item(), abs=1e-7)


def test_occlusion_flips_and_is_counted():
    model = Net(text=True)
    samples = samples_of(model, 12)
    options = {"threat_model": ThreatModel(min_side={"image": 3})}
    records = muroan.evaluate(model, samples, SaliencyRemoval("occlusion"), **options)
    assert any(r.flipped for r in records)
    for r, sample in zip(records, samples, strict=True):
        assert r.ledger["attribute"].queries == r.ledger["attribute"].forwards == 17 + sample.layouts["text"].count
    for budget in (5, 20, 23):
        short = muroan.evaluate(
            model,
            samples,
            SaliencyRemoval("occlusion"),
            threat_model=ThreatModel(min_side={"image": 3}, max_queries=budget),
        )
        assert all(r.queries <= budget for r in short)
        assert budget > 5 or {r.status for r in short} == {"budget_exhausted"}


def test_sigma_zero_is_as_sparse_as_adversarial_librarys():
    """adv-lib needs torchvision, which MUROAN's environments do without: its one file is loaded by itself."""
    adv_lib = pytest.importorskip("adv_lib", reason="make test-peers installs it")
    file = Path(adv_lib.__file__).parent / "attacks" / "sigma_zero.py"
    spec = importlib.util.spec_from_file_location("adv_lib_sigma_zero", file)
    theirs = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = theirs
    spec.loader.exec_module(theirs)

    model = Net()
    samples = samples_of(model, 40)
    pixels = OfPixels(model)
    clean = pixels.pixels(torch.stack([s.inputs["image"] for s in samples]).double())
    labels = torch.tensor([s.label for s in samples])
    for steps in (50, 200):
        found = theirs.sigma_zero(pixels, clean, labels, num_steps=steps)
        found = torch.where(pixels(found).argmax(1)[:, None, None, None] != labels[:, None, None, None], found, clean)
        other = (found != clean).flatten(1).sum(1)
        target = target_of(model, samples)
        moved = SigmaZero(steps, group="component").perturb(target)
        assert all(p is not None for p in moved)
        assert (other > 0).all()
        mine = torch.stack([(p.inputs["image"] != target.inputs["image"][i]).sum() for i, p in enumerate(moved)])
        print(f"{steps} steps: {mine.double().mean():.3f} components on average, adv-lib {other.double().mean():.3f}")
        # The same algorithm but for when the step length anneals (theirs a step later).
        assert mine.double().mean() <= other.double().mean() * 1.05 + 0.1


@pytest.mark.parametrize("pixels", [1, 3])
def test_one_pixel_flips_as_many_as_art(pixels):
    """With as many questions of each sample: ART's first generations are of 400, whatever its budget."""
    model = Net()
    samples = samples_of(model, 40)
    shown = OfPixels(model).float()
    shown.low, shown.scale = shown.low.float(), shown.scale.float()
    classifier = PyTorchClassifier(
        shown, nn.CrossEntropyLoss(), (3, SIDE, SIDE), 4, clip_values=(0, 1), device_type="cpu"
    )
    asked = 0
    predict = classifier.predict

    def counted(x, *args, **kwargs):
        nonlocal asked
        asked += len(x)
        return predict(x, *args, **kwargs)

    classifier.predict = counted
    attack = PixelAttack(classifier, th=pixels, es=1, max_iter=4)
    np.random.seed(0)
    other, most = 0, 0
    for sample in samples:
        asked = 0
        clean = shown.pixels(sample.inputs["image"].float())[None].numpy()
        found = attack.generate(clean, np.array([sample.label]))
        most = max(most, asked)
        changed = (np.abs(found - clean) > 1e-4).any(1).sum()
        assert changed <= pixels
        other += int(predict(found).argmax() != sample.label)
    model.double()
    records = muroan.evaluate(model, samples, OnePixel(pixels, queries=most))
    mine = sum(r.flipped for r in records)
    print(f"{pixels} pixels, {most} questions: {mine} of 40 flipped, ART {other}")
    assert all(r.queries <= most for r in records)
    assert 0 < other < 40, "a test of strength needs something to flip and something that resists"
    assert mine >= other - 1  # both draw at random
