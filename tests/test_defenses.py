"""Defences on a toy that trains in a second: what each changes, what it leaves alone, and what interruptions cost."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toys import block, flips_when, threat, word

from muroan.attacks.base import Attack, BatchAttack, Perturbation, ThreatModel
from muroan.attacks.decoupling import Decoupling
from muroan.attacks.decoupling_fast import DecouplingFast
from muroan.attacks.pgd import PgdLinf
from muroan.attacks.random_removal import RandomRemoval
from muroan.attacks.transferred import Transferred
from muroan.callbacks import RobustValidation, StopEarly
from muroan.data.base import MultimodalData, scratch_text
from muroan.data.samples import Batch, Example, Sample
from muroan.defenses.adversarial_training import AdversarialTraining
from muroan.defenses.base import Cost, Defense, without
from muroan.defenses.embedding_adversarial_training import EmbeddingAdversarialTraining, divergence, norms, without_mask
from muroan.defenses.mmcert import MMCert
from muroan.defenses.modality_dropout import ModalityDropout
from muroan.defenses.noise_augmentation import NoiseAugmentation
from muroan.defenses.plain_training import PlainTraining
from muroan.defenses.random_removal_augmentation import RandomRemovalAugmentation
from muroan.engine import QueryEngine, evaluate
from muroan.errors import MuroanError
from muroan.modalities import Image, Removal
from muroan.models.base import MultimodalModel
from muroan.training.module import MultimodalModule, weights_hash

WORDS = ["the", "left", "right", "side", "is"]
THREAT = ThreatModel(min_side={"image": 2}, max_queries=40)


class Sides(MultimodalData):
    """Is that side of an 8 x 8 picture bright that the text names? Half of the label lies in each modality."""

    name = "sides"
    classes = ["dark", "bright"]

    def load(self, split: str) -> list[Example]:
        rng = np.random.default_rng({"train": 0, "val": 1, "test": 2}[split])
        examples = []
        for i in range({"train": 96, "val": 24, "test": 24}[split]):
            left, side = rng.integers(2), rng.integers(2)
            picture = rng.integers(0, 60, (8, 8, 3)).astype(np.uint8)
            picture[:, 4 * (1 - left) : 4 * (2 - left)] += 180
            text = f"the {WORDS[1 + side]} side"
            examples.append(Example(f"{split}{i}", {"image": picture, "text": text}, int(left == 1 - side)))
        return examples

    def natural_modalities(self) -> dict[str, Any]:
        return {"image": Image((8, 8)), "text": scratch_text([" ".join(WORDS)], max_length=6)}


class Bilinear(MultimodalModel):
    """A linear encoder a modality, and a fusion that multiplies."""

    def __init__(self, data: MultimodalData):
        super().__init__(data.modalities(), 2)
        torch.manual_seed(5)
        tokens = data.modalities()["text"].tokenizer.size  # type: ignore[attr-defined]
        self.image, self.words = nn.Linear(192, 16), nn.Embedding(tokens, 16)
        self.out = nn.Linear(16, 2)

    def encode(self, modality: str, x: torch.Tensor) -> torch.Tensor:
        return self.image(x.flatten(1)) if modality == "image" else self.words(x).sum(1)

    def fuse(self, features: Any) -> torch.Tensor:
        return torch.tanh(features["image"] * features["text"])

    def head(self, embedding: torch.Tensor) -> torch.Tensor:
        return self.out(embedding)


def fitted(
    module: MultimodalModule, epochs: int = 1, callbacks: Sequence[pl.Callback] = (), resume: Path | None = None
) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, Sides(batch_size=16), ckpt_path=resume)
    return trainer


def batch(count: int = 32) -> Batch:
    return Batch.of([sample for sample, _ in zip(Sides().prepared("train"), range(count), strict=False)])


@pytest.fixture(scope="module")
def learned() -> dict[str, torch.Tensor]:
    """Weights of the toy after a few epochs: it is right on nearly all samples."""
    module = MultimodalModule(Bilinear(Sides()), lr=0.02)
    fitted(module, 12)
    return module.model.state_dict()


def model(weights: dict[str, torch.Tensor] | None = None) -> Bilinear:
    made = Bilinear(Sides())
    if weights is not None:
        made.load_state_dict(weights)
    return made


# -- what changes nothing trains as if it were not there -----------------------------------------------------


@pytest.mark.parametrize(
    "defense",
    [
        PlainTraining,
        lambda m, **o: AdversarialTraining(m, None, **o),
        lambda m, **o: AdversarialTraining(m, DecouplingFast(), ratio=0.0, **o),
        lambda m, **o: RandomRemovalAugmentation(m, ratio=0.0, **o),
        lambda m, **o: ModalityDropout(m, ratio=0.0, **o),
        lambda m, **o: NoiseAugmentation(m, ratio=0.0, **o),
    ],
)
def test_with_the_attack_off_it_is_plain_training_bit_for_bit(defense: Any) -> None:
    plain, hardened = MultimodalModule(model(), lr=0.02), defense(model(), lr=0.02, threat_model=THREAT)
    fitted(plain, 2)
    fitted(hardened, 2)
    assert weights_hash(plain.model) == weights_hash(hardened.model)
    assert weights_hash(plain.model) != weights_hash(model())


@pytest.mark.parametrize(
    "defense",
    [
        lambda m, **o: AdversarialTraining(m, DecouplingFast(), **o),
        lambda m, **o: AdversarialTraining(m, PgdLinf(steps=2), ratio=1.0, **o),
        lambda m, **o: RandomRemovalAugmentation(m, **o),
        ModalityDropout,
        NoiseAugmentation,
        EmbeddingAdversarialTraining,
    ],
)
def test_with_it_on_it_is_not_and_the_same_seed_gives_the_same_model(defense: Any) -> None:
    def trained(seed: int) -> str:
        module = defense(model(), lr=0.02, threat_model=THREAT, seed=seed)
        torch.manual_seed(seed + 100)  # what a global generator holds must not matter
        fitted(module)
        assert module.cost.rows == 96
        return weights_hash(module.model)

    plain = PlainTraining(model(), lr=0.02)
    fitted(plain)
    assert trained(0) == trained(0) != weights_hash(plain.model)


# -- a step lowers what the attack raises --------------------------------------------------------------------


def harmed_loss(module: AdversarialTraining, samples: list[Sample]) -> torch.Tensor:
    harmed = Batch.of(module.harm(samples, seed=3))
    return F.cross_entropy(module(harmed).logits, harmed.labels)


@pytest.mark.parametrize(
    "attack", [DecouplingFast(rounds=3), PgdLinf(epsilon=0.5, step=0.1, steps=8, stop_early=False)]
)
def test_a_step_lowers_the_adversarial_loss(attack: Attack, learned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = AdversarialTraining(model(learned), attack, ratio=1.0, threat_model=THREAT)
    monkeypatch.setattr(AdversarialTraining, "data", None)
    monkeypatch.setattr(AdversarialTraining, "trainer", type("Trainer", (), {"precision": "32-true"}))
    samples = batch().samples
    clean = F.cross_entropy(module(batch()).logits, batch().labels)
    before = harmed_loss(module, samples)
    assert before > clean + 0.1, "the attack does harm"
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        harmed_loss(module, samples).backward()
        optimizer.step()
    assert harmed_loss(module, samples) < 0.8 * before
    assert module.cost.attack_forwards > 0
    assert bool(module.cost.attack_backwards) == isinstance(attack, PgdLinf)
    assert module.model.training, "an attack leaves the model in training mode"


def test_adversarial_training_makes_the_toy_harder_to_flip(learned: Any) -> None:
    hardened = AdversarialTraining(
        model(learned),
        PgdLinf(epsilon=0.5, step=0.1, steps=8, stop_early=False),
        lr=0.02,
        ratio=1.0,
        threat_model=THREAT,
    )
    fitted(hardened, 3)
    attack = PgdLinf(epsilon=0.5, step=0.1, steps=8)
    before = evaluate(model(learned), Sides().prepared("test"), attack)
    after = evaluate(hardened.model, Sides().prepared("test"), attack)
    assert sum(r.flipped for r in after) < sum(r.flipped for r in before)


# -- what is trained on ---------------------------------------------------------------------------------------


def test_what_a_removal_leaves_is_what_the_engine_asks(learned: Any) -> None:
    """By hand: zeros in a quadrant, words that close ranks; other samples and modalities keep their tensors."""
    samples = batch(3).samples
    removals = [Removal.of(block(4, 0, 1), word(0)), Removal(), Removal.of(word(2))]
    modalities = model().modalities
    first, second, third = without(modalities, samples, removals, THREAT.complete(modalities))
    picture = samples[0].inputs["image"].clone()
    picture[:, :4, 4:] = 0
    assert torch.equal(first["image"], picture)
    ids = samples[0].inputs["text"].tolist()
    assert first["text"].tolist() == [ids[0], ids[2], ids[3], *ids[4:], 0]
    assert second == {}
    ids = samples[2].inputs["text"].tolist()
    assert third["text"].tolist() == [*ids[:3], *ids[4:], 0]
    assert "image" not in third


def seen(defense: Defense, given: Batch, monkeypatch: pytest.MonkeyPatch) -> Batch:
    """The batch that a defence's training step really trains on."""
    caught: list[Batch] = []
    monkeypatch.setattr(MultimodalModule, "training_step", lambda self, b, i: caught.append(b))
    monkeypatch.setattr(Defense, "current_epoch", 0)
    monkeypatch.setattr(Defense, "global_rank", 0)
    defense.training_step(given, 0)
    return caught[0]


def differing(a: Batch, b: Batch, name: str) -> list[int]:
    return [
        i for i in range(len(a)) if not torch.equal(a.inputs[name][a.rows[name][i]], b.inputs[name][b.rows[name][i]])
    ]


def test_modality_dropout_takes_one_whole_modality_of_a_share_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = batch()
    made = seen(ModalityDropout(model(), ratio=0.25, threat_model=THREAT), clean, monkeypatch)
    pictures, texts = differing(clean, made, "image"), differing(clean, made, "text")
    assert len(pictures) + len(texts) == 8
    assert not set(pictures) & set(texts)
    assert pictures
    assert texts
    assert not made.inputs["image"][made.rows["image"][pictures]].any()
    assert (made.inputs["text"][made.rows["text"][texts]] != 0).sum(1).eq(2).all(), "the special tokens stay"
    assert torch.equal(made.labels, clean.labels)


def test_random_removal_takes_regions_of_both_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = batch()
    made = seen(RandomRemovalAugmentation(model(), ratio=1.0, threat_model=THREAT), clean, monkeypatch)
    pictures, texts = differing(clean, made, "image"), differing(clean, made, "text")
    assert set(pictures) | set(texts) == set(range(32)), "every sample has lost something"
    assert len(pictures) > 8
    assert len(texts) > 8
    for row in pictures:
        gone = (made.inputs["image"][made.rows["image"][row]] == 0).all(0)
        assert gone.sum() % 4 == 0, "whole blocks of 2 x 2"


def test_noise_stays_in_the_range_of_values_and_special_tokens_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = batch()
    made = seen(NoiseAugmentation(model(), 1.0, deviation=1.0, words=1.0, threat_model=THREAT), clean, monkeypatch)
    low, high = model().modalities["image"].span()
    assert (made.inputs["image"] >= low[:, None, None] - 1e-6).all()
    assert (made.inputs["image"] <= high[:, None, None] + 1e-6).all()
    assert len(differing(clean, made, "image")) == 32
    assert len(differing(clean, made, "text")) > 8
    before, after = clean.inputs["text"][clean.rows["text"]], made.inputs["text"][made.rows["text"]]
    assert torch.equal(before[:, 0], after[:, 0])
    assert torch.equal(before == 0, after == 0)


def test_a_word_without_tokens_gives_no_other_word(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = batch(4)
    first, *others = clean.samples[0].layouts["text"].spans
    spans = [first, *((start, start) for start, _ in others)]
    samples = [
        replace(s, layouts={**s.layouts, "text": replace(s.layouts["text"], spans=spans)}) for s in clean.samples
    ]
    made = seen(NoiseAugmentation(model(), 1.0, words=1.0, threat_model=THREAT), Batch.of(samples), monkeypatch)
    before, after = clean.inputs["text"][clean.rows["text"]], made.inputs["text"][made.rows["text"]]
    assert torch.equal(before[:, first[1] :], after[:, first[1] :])


def test_what_is_trained_on_has_the_noise_that_was_asked(learned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = ThreatModel(min_side={"image": 2}, max_queries=40, replacement={"image": "noise"})
    defense = AdversarialTraining(model(learned), RandomRemoval(), threat_model=noise)
    seeds = []

    def applied(*arguments: Any) -> Any:
        seeds.append((defense.engine.seed, arguments[-1]))  # type: ignore[union-attr]
        return without(*arguments)

    monkeypatch.setattr("muroan.defenses.adversarial_training.without", applied)
    fitted(defense, 1)
    assert len(set(seeds)) > 1
    assert all(asked == trained_on for asked, trained_on in seeds)


def test_what_is_unchanged_is_still_encoded_once() -> None:
    clean = batch(4)
    sample = clean.samples[0]
    shared = Batch.of([sample, sample, sample])
    made = PlainTraining(model()).changed(shared, {1: {"text": sample.inputs["text"].flip(0)}})
    assert len(made.inputs["image"]) == 1
    assert len(made.inputs["text"]) == 2
    assert made.rows["text"].tolist() == [0, 1, 0]


# -- the fast attack ------------------------------------------------------------------------------------------


@given(rounds=st.integers(1, 3), width=st.integers(1, 6), budget=st.integers(1, 12), seed=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_the_fast_attack_keeps_to_its_rounds_and_to_the_budget(rounds: int, width: int, budget: int, seed: int) -> None:
    toy = flips_when(lambda present: present.gone(block(16, 0, 1), word(2)))
    (record,) = evaluate(
        toy, [toy.sample()], DecouplingFast(rounds, width), threat_model=threat(budget, image=8), seed=seed
    )
    assert record.queries <= min(budget, rounds * width)
    assert len(record.regions) <= rounds


def test_the_fast_attack_finds_what_two_regions_do_only_together() -> None:
    def margin(present: Any) -> torch.Tensor:
        gone = 1 - present.share(block(16, 0, 1), word(2))
        return torch.stack([0.8 - gone.sum(1) * 0.5, torch.zeros(len(gone))], 1).double()

    toy = type(flips_when(lambda p: p))(margin)
    found = [
        evaluate(toy, [toy.sample()], DecouplingFast(3, 24), threat_model=threat(image=8), seed=seed)[0].flipped
        for seed in range(5)
    ]
    assert sum(found) >= 4


def test_the_fast_attack_takes_only_what_leaves_the_label_right() -> None:
    toy = flips_when(lambda present: present.gone(word(2)))
    told: list[Removal] = []

    def still_valid(sample: Sample, removal: Removal) -> bool:
        told.append(removal)
        return all(region.modality == "image" for region in removal.regions)

    attacks = DecouplingFast(2, 40), DecouplingFast(2, 40, valid_only=False)
    records = [evaluate(toy, [toy.sample()], a, threat_model=threat(), still_valid=still_valid)[0] for a in attacks]
    assert [record.flipped for record in records] == [False, True]
    assert told


@pytest.mark.parametrize("size", [1, 7])
def test_the_fast_attack_does_not_depend_on_the_batch(size: int, learned: Any) -> None:
    def run(batch_size: int) -> list[str]:
        found = evaluate(model(learned), Sides().prepared("test"), DecouplingFast(), batch_size=batch_size)
        return [record.to_json() for record in found]

    assert run(size) == run(64)


# -- in the space of the features -----------------------------------------------------------------------------


def test_feature_perturbations_stay_in_their_balls_and_do_harm(learned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    losses: list[float] = []
    made = model(learned)
    clean = {name: made.encode(name, batch().inputs[name])[batch().rows[name]].detach() for name in made.modalities}
    fuse = made.fuse

    def watched(features: Any) -> torch.Tensor:
        seen.extend(
            ((without_mask(features[n]).detach() - x).flatten(1).norm(dim=1) / norms(x)[:, 0]).max().item()
            for n, x in clean.items()
        )
        embedding = fuse(features)
        losses.append(F.cross_entropy(made.head(embedding), batch().labels).item())
        return embedding

    monkeypatch.setattr(made, "fuse", watched)
    monkeypatch.setattr(Defense, "current_epoch", 0)
    monkeypatch.setattr(Defense, "global_rank", 0)
    module = EmbeddingAdversarialTraining(made, epsilon=0.3, step=0.2, steps=4)
    monkeypatch.setattr(module, "log", lambda *a, **k: None)
    module.training_step(batch(), 0)
    assert max(seen) <= 0.3 + 1e-5
    assert max(seen) > 0.29, "it reaches the edge"
    assert losses[0] < losses[1] < losses[2] < losses[-1]


def test_features_that_are_integers_are_refused() -> None:
    class Trivial(Bilinear):
        def encode(self, modality: str, x: torch.Tensor) -> torch.Tensor:
            return x

        def fuse(self, features: Any) -> torch.Tensor:
            return features["image"].flatten(1)[:, :16] * self.words(features["text"]).sum(1)

    with pytest.raises(MuroanError, match=r"does not fit this model: its features of 'text' are torch\.int64"):
        fitted(EmbeddingAdversarialTraining(Trivial(Sides())))


def test_divergence_by_hand() -> None:
    a, b = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]])
    by_hand = 0.25 * math.log(0.5) + 0.75 * math.log(1.5) + 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert divergence(a, b).item() == pytest.approx(by_hand)


# -- offline --------------------------------------------------------------------------------------------------


def stopping(samples: int) -> Attack:
    """The usual attack, interrupted after so many samples."""
    attack, asked = DecouplingFast(), itertools.count()

    def search(sample: Any) -> Any:
        if next(asked) == samples:
            raise KeyboardInterrupt
        return DecouplingFast.search(attack, sample)

    attack.search = search  # type: ignore[method-assign]
    return attack


def offline(folder: Path, weights: Any, attack: Attack | None = None, **options: Any) -> AdversarialTraining:
    return AdversarialTraining(
        model(weights), attack or DecouplingFast(), "offline", folder=folder, threat_model=THREAT, lr=0.02, **options
    )


def test_an_interrupted_offline_set_goes_on(tmp_path: Path, learned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muroan.defenses.adversarial_training.CHUNK", 16)
    whole = offline(tmp_path / "whole", learned)
    fitted(whole)
    assert len(whole.adversarial) > 30
    again = offline(tmp_path / "cut", learned, stopping(40))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fitted(again)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "cut").glob("*.pt")}
    assert 0 < len(kept) < 6
    resumed = offline(tmp_path / "cut", learned)
    fitted(resumed)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert weights_hash(resumed.model) == weights_hash(whole.model)
    assert resumed.cost.attack_forwards == whole.cost.attack_forwards, "what the first start paid is in the account"


def test_another_or_a_broken_offline_set_is_refused(tmp_path: Path, learned: Any) -> None:
    fitted(offline(tmp_path, learned, samples=20))
    with pytest.raises(MuroanError, match=r"another configuration .*samples: 20 there, 30 asked for\)"):
        fitted(offline(tmp_path, learned, samples=30))
    with pytest.raises(MuroanError, match=r"another configuration \(options\.rounds: '2' there, '5' asked for\)"):
        fitted(offline(tmp_path, learned, DecouplingFast(rounds=5), samples=20))
    with pytest.raises(MuroanError, match="an adversarial set of another model"):
        fitted(offline(tmp_path, None, samples=20))
    steps = {name: PgdLinf(steps=3, stop_early=False, loss=name) for name in ("margin", "cross_entropy")}
    fitted(offline(tmp_path / "pgd", learned, steps["margin"], samples=20))
    with pytest.raises(MuroanError, match=r"options\.loss: 'lost_margin' there, 'cross_entropy' asked for"):
        fitted(offline(tmp_path / "pgd", learned, steps["cross_entropy"], samples=20))
    about = json.loads((tmp_path / "set.json").read_text())
    (tmp_path / "set.json").write_text(json.dumps({**about, "ids": "of other samples"}))
    with pytest.raises(MuroanError, match=r"another configuration \(ids: 'of other samples' there"):
        fitted(offline(tmp_path, learned, samples=20))
    (tmp_path / "set.json").write_text(json.dumps(about))
    (part,) = tmp_path.glob("*.pt")
    part.unlink()
    with pytest.raises(MuroanError, match="an adversarial set of another model"):
        fitted(offline(tmp_path, None, samples=20))
    part.write_bytes(b"PK")
    with pytest.raises(MuroanError, match=r"is not a part of an adversarial set .* remove it"):
        fitted(offline(tmp_path, learned, samples=20))


def test_no_part_of_an_offline_set_is_made_by_a_later_model(
    tmp_path: Path, learned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on from a checkpoint: its model is no longer the one that was to be attacked."""
    monkeypatch.setattr("muroan.defenses.adversarial_training.CHUNK", 16)
    trainer = fitted(offline(tmp_path / "set", learned))
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    def go_on() -> None:
        fitted(offline(tmp_path / "set", learned), epochs=2, resume=tmp_path / "last.ckpt")

    part = sorted((tmp_path / "set").glob("*.pt"))[1]
    content = part.read_bytes()
    part.write_bytes(b"x")
    with pytest.raises(MuroanError, match=r"is not a part of an .*: start from the beginning with rerun"):
        go_on()
    part.unlink()
    lacking = rf"lacks .*{part.name}, and the model is no longer the one .* rerun=true makes the set anew"
    with pytest.raises(MuroanError, match=lacking):
        go_on()
    part.write_bytes(content)
    (tmp_path / "set/set.json").unlink()
    with pytest.raises(MuroanError, match=r"lacks .*set\.json"):
        go_on()


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_valid_removals_alone_need_a_dataset_that_can_tell(tmp_path: Path, learned: Any, mode: Any) -> None:
    """Otherwise nothing would be asked, and the training would be a plain one under another name."""
    defense = AdversarialTraining(
        model(learned), Decoupling(valid_only=True), mode, folder=tmp_path, threat_model=THREAT
    )
    with pytest.raises(MuroanError, match=r"attack\.valid_only needs a dataset that can tell"):
        fitted(defense, 1)


def test_an_offline_attack_that_finds_nothing_says_so(tmp_path: Path, learned: Any) -> None:
    class Nothing(Attack):
        def search(self, sample: Any) -> Any:
            return None
            yield []

    with pytest.raises(MuroanError, match="found nothing: nothing changed none of 96 training samples"):
        fitted(offline(tmp_path, learned, Nothing()))


def test_values_of_an_attacks_choosing_are_kept_too(tmp_path: Path, learned: Any) -> None:
    first = offline(tmp_path, learned, PgdLinf(epsilon=0.2, step=0.1, steps=3, stop_early=False), samples=40)
    fitted(first)
    again = offline(tmp_path, learned, PgdLinf(epsilon=0.2, step=0.1, steps=3, stop_early=False), samples=40)
    fitted(again)
    assert again.cost.attack_forwards == first.cost.attack_forwards > 0, "the set has what it cost"
    assert again.cost.attack_backwards == first.cost.attack_backwards > 0
    spent = sum(torch.load(file, weights_only=True)["spent"]["seconds"] for file in tmp_path.glob("*.pt"))
    assert again.cost.seconds > spent > 0
    clean = {sample.id: sample for sample in Sides().prepared("train")}
    for sample in again.adversarial:
        moved = (sample.inputs["image"] - clean[sample.id].inputs["image"]).abs()
        assert 0 < moved.max() <= 0.2 / min(Image((8, 8)).std) + 1e-5


# -- interruptions, accounts, judgement -----------------------------------------------------------------------


def test_what_judges_an_epoch_is_no_part_of_its_cost(monkeypatch: pytest.MonkeyPatch, learned: Any) -> None:
    """By a clock that goes one second a batch, and a thousand while an epoch is judged."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("muroan.defenses.base.time", clock)

    class Hands(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            clock.now += 1

        def on_validation_epoch_end(self, *_: Any) -> None:
            clock.now += 1000

    module = PlainTraining(model(learned), lr=0.02)
    trainer = fitted(module, 2, [Hands()])
    assert module.cost.seconds == trainer.global_step == 12
    trainer.validate(module, Sides(batch_size=16), verbose=False)
    assert module.cost.seconds == 12


def test_a_killed_training_goes_on_to_the_same_model(tmp_path: Path, learned: Any) -> None:
    def module() -> AdversarialTraining:
        return AdversarialTraining(model(learned), DecouplingFast(), threat_model=THREAT, lr=0.02)

    def kept(folder: str) -> pl.Callback:
        return pl.callbacks.ModelCheckpoint(tmp_path / folder, save_last=True)

    whole, cut, resumed = module(), module(), module()
    fitted(whole, 3, [kept("whole")])
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fitted(cut, 3, [kept("cut"), StopAfter(1)])
    fitted(resumed, 3, [kept("resumed")], tmp_path / "cut/last.ckpt")
    assert weights_hash(resumed.model) == weights_hash(whole.model)
    assert resumed.cost.rows == whole.cost.rows == 3 * 96
    assert resumed.cost.attack_forwards == whole.cost.attack_forwards
    assert resumed.cost.seconds > 0


def test_a_training_that_gets_no_better_is_kept_at_every_epoch_and_stops_once(tmp_path: Path, learned: Any) -> None:
    """A last checkpoint of the best epoch alone would lose what came after, and a stop that is forgotten trains on."""

    class Worse(pl.Callback):
        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            pl_module.log("val/worse", -float(trainer.current_epoch))

    def callbacks() -> list[pl.Callback]:
        keep = pl.callbacks.ModelCheckpoint(tmp_path, "best", monitor="val/worse", mode="max")
        latest = pl.callbacks.ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
        return [Worse(), StopEarly("val/worse", mode="max", patience=2), keep, latest]

    fitted(PlainTraining(model(learned), lr=0.02), 9, callbacks())
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["epoch"] == 2
    again = PlainTraining(model(), lr=0.02)
    trainer = fitted(again, 9, callbacks(), tmp_path / "last.ckpt")
    assert trainer.global_step == content["global_step"], "nothing more is trained"
    first = fitted(PlainTraining(model(learned), lr=0.02), 3, [Worse(), StopEarly("val/worse", mode="max", patience=0)])
    assert first.global_step == 2 * 6, "without patience the first epoch is trained, and the second is no better"


def test_parts_train_and_stay_as_they_are_under_every_defense(learned: Any) -> None:
    """A pretrained model comes in evaluation mode; a part that its owner has frozen stays frozen through an attack."""
    seen: dict[str, list[tuple[bool, bool]]] = {}

    class Modes(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 0:
                module.model.frozen.eval()

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *rest: Any) -> None:
            seen.setdefault(type(module).__name__, []).append(
                (module.model.drop.training, module.model.frozen.training)
            )

    for make in (PlainTraining, lambda m, **o: AdversarialTraining(m, DecouplingFast(), **o), MultimodalModule):
        made = model(learned)
        made.drop, made.frozen = nn.Dropout(), nn.Dropout()
        made.eval()
        options = {} if make is MultimodalModule else {"threat_model": THREAT}
        fitted(make(made, lr=0.02, **options), 1, [Modes()])  # type: ignore[operator]
    assert set(seen) == {"PlainTraining", "AdversarialTraining", "MultimodalModule"}
    assert all(modes == [(True, False)] * 6 for modes in seen.values())


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize(
    "defense",
    [
        lambda m, **o: AdversarialTraining(m, DecouplingFast(), **o),
        lambda m, **o: AdversarialTraining(m, PgdLinf(epsilon=0.2, step=0.1, steps=2), **o),
        EmbeddingAdversarialTraining,
        lambda m, **o: MMCert(m, {"image": 0.5, "text": None}, **o),
        RandomRemovalAugmentation,
    ],
    ids=["online", "pgd", "embedding", "mmcert", "random removal"],
)
def test_every_defense_trains_in_every_precision(defense: Any, precision: Any, learned: Any) -> None:
    module = defense(model(learned), threat_model=THREAT, lr=1e-3)
    trainer = pl.Trainer(
        fast_dev_run=1, accelerator="cpu", precision=precision, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(module, Sides(batch_size=16))
    assert all(torch.isfinite(p).all() for p in module.model.parameters())


def test_feature_perturbations_of_confident_samples_are_no_nonsense_in_half_precision(learned: Any) -> None:
    """A gradient far below the smallest number of float16, of a mean over the batch: 0 / 0 without care."""
    made = model(learned)
    with torch.no_grad():
        made.out.weight *= 30
    module = EmbeddingAdversarialTraining(made, threat_model=THREAT, lr=1e-3)
    module.log = lambda *a, **k: None  # type: ignore[method-assign, assignment]
    module.rng = lambda batch_idx: np.random.default_rng(0)  # type: ignore[method-assign]
    with torch.autocast("cpu", torch.float16):
        loss = module.training_step(batch(), 0)
    assert loss is not None
    assert torch.isfinite(loss)


class Judging(Sides):
    """Sides that can tell: without a word the label may be another."""

    def still_valid(self, sample: Sample, removal: Removal) -> bool | None:
        return not any(region.modality == "text" for region in removal.regions)


def test_a_control_may_keep_to_what_leaves_the_label_right(learned: Any) -> None:
    data, samples = Judging(batch_size=16), list(Sides().prepared("train"))[:60]
    found = {}
    for valid_only in (False, True):
        module = RandomRemovalAugmentation(model(learned), valid_only=valid_only, threat_model=THREAT, lr=1e-3)
        trainer = pl.Trainer(fast_dev_run=1, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
        trainer.fit(module, data)
        rng = np.random.default_rng(0)
        removals = [module.draw(sample, rng) for sample in samples]
        found[valid_only] = [{region.modality for region in removal.regions} for removal in removals]
    assert any("text" in names for names in found[False])
    assert not any("text" in names for names in found[True])
    assert sum(names == {"image"} for names in found[True]) > 50, "drawn anew before it gives up"


class StopAfter(pl.Callback):
    """As if interrupted after so many epochs more."""

    def __init__(self, epoch: int):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch > self.epoch:
            raise KeyboardInterrupt


def test_robust_accuracy_after_an_epoch_is_what_evaluate_says(learned: Any) -> None:
    module = PlainTraining(model(learned), lr=1e-3)
    judge = RobustValidation(RandomRemoval(10), 20, THREAT, batch_size=8, seed=4)
    trainer = fitted(module, callbacks=[judge])
    found = evaluate(module.model, Sides().prepared("val"), RandomRemoval(10), threat_model=THREAT, seed=4)[:20]
    robust = 100 * sum(r.clean_label == r.adversarial_label == r.label for r in found) / 20
    assert trainer.callback_metrics["val/robust_accuracy"].item() == pytest.approx(robust)
    flipped = 100 * sum(r.flipped for r in found) / sum(r.attacked for r in found)
    assert 0 < flipped < 100
    assert trainer.callback_metrics["val/attack_success_rate"].item() == pytest.approx(flipped)


def test_cost_by_hand(learned: Any) -> None:
    """One question a sample that is right: clean, the question, the engine's verification where it is returned."""

    class Ask(Attack):
        def search(self, sample: Any) -> Any:
            removal = Removal.of(sample.root("image"))
            yield [removal]
            return removal

    module = AdversarialTraining(model(learned), Ask(), ratio=0.5, threat_model=THREAT, lr=1e-6)
    fitted(module)
    right = module.cost.attack_forwards - 48  # half of 96 samples are asked about when clean
    assert module.cost == Cost(96, module.cost.attack_forwards, 0, module.cost.seconds)
    assert right % 2 == 0
    assert 60 <= right <= 96, "two more for each of those that the toy gets right"


def test_an_engine_that_does_not_audit_asks_less_and_tells_what_was_found() -> None:
    toy = flips_when(lambda present: present.gone(block(16, 0, 1), word(2)))
    found: list[Any] = []

    class Answer(Attack):
        def search(self, sample: Any) -> Any:
            return Removal.of(block(16, 0, 1), word(2))
            yield []

    engine = QueryEngine(toy.eval(), Answer(), threat(), on_found=lambda s, f: found.append((s.id, f)), audit=False)
    (record,) = engine.run([toy.sample()])
    assert record.flipped
    assert record.one_minimal is None
    assert record.interaction is None
    assert record.forwards == 2
    assert found == [(toy.sample().id, Removal.of(block(16, 0, 1), word(2)))]


# -- removals of another model --------------------------------------------------------------------------------


def test_transferred_removals_are_asked_once(tmp_path: Path) -> None:
    first = flips_when(lambda present: present.gone(word(2)))
    records = evaluate(first, [first.sample()], RandomRemoval(60), threat_model=threat())
    assert records[0].flipped
    (tmp_path / "records.jsonl").write_text("".join(r.to_json() + "\n" for r in records))
    attack = Transferred(str(tmp_path))
    (same,) = evaluate(first, [first.sample()], attack, threat_model=threat())
    assert same.flipped
    assert same.removed == records[0].removed
    assert same.queries == 1
    other = flips_when(lambda present: present.gone(word(1), word(3)))
    (held,) = evaluate(other, [other.sample()], attack, threat_model=threat())
    assert held.status == "held"


def test_what_flips_no_label_is_not_transferred(tmp_path: Path) -> None:
    toy = flips_when(lambda present: present.gone(word(2)))
    (found,) = evaluate(toy, [toy.sample()], RandomRemoval(60), threat_model=threat())
    (tmp_path / "records.jsonl").write_text(replace(found, adversarial_label=found.label).to_json() + "\n")
    (record,) = evaluate(toy, [toy.sample()], Transferred(str(tmp_path)), threat_model=threat())
    assert (record.status, record.queries) == ("held", 0)


def test_removals_are_not_asked_of_inputs_of_another_size(tmp_path: Path) -> None:
    small, large = (flips_when(lambda p: p.gone(block(8, 1, 1)), image=(side, side)) for side in (32, 64))
    records = evaluate(small, [small.sample()], RandomRemoval(60), threat_model=threat())
    assert records[0].flipped
    (tmp_path / "records.jsonl").write_text("".join(r.to_json() + "\n" for r in records))
    with pytest.raises(MuroanError, match=r"of 1024 elements of image from sample 's0', which .* takes as \(64"):
        evaluate(large, [large.sample()], Transferred(str(tmp_path)), threat_model=threat())
    (tmp_path / "records.jsonl").write_text(records[0].to_json()[:-9] + "\n")
    with pytest.raises(MuroanError, match=r"records\.jsonl has a line that is no record"):
        Transferred(str(tmp_path))


def test_bad_runs_to_transfer_from_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MuroanError, match=r"attack\.run must name the folder"):
        Transferred()
    with pytest.raises(MuroanError, match=r"there is no records\.jsonl"):
        Transferred(str(tmp_path))
    toy = flips_when(lambda present: present.gone(word(2)))
    (tmp_path / "records.jsonl").write_text("")
    with pytest.raises(MuroanError, match="no record of sample"):
        evaluate(toy, [toy.sample()], Transferred(str(tmp_path)))

    class Shift(BatchAttack):
        def perturb(self, target: Any) -> Any:
            return [Perturbation({"image": x + 1}) for x in target.inputs["image"]]

    records = evaluate(toy, [toy.sample()], Shift())
    (tmp_path / "records.jsonl").write_text("".join(r.to_json() + "\n" for r in records))
    with pytest.raises(MuroanError, match="is no removal attack"):
        Transferred(str(tmp_path))


def test_a_warm_up_of_a_single_step_is_one() -> None:
    """6 steps, of which a sixth: the schedule that this is made of divides by 0 there."""
    seen: list[float] = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *rest: Any) -> None:
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    fitted(PlainTraining(model(), lr=0.1, warmup=1 / 6), callbacks=[Rates()])
    assert seen[0] == pytest.approx(0.1 / 25)
    assert 0.09 < seen[1] < 0.1
    assert sorted(seen[1:], reverse=True) == seen[1:]


def test_costs_are_summed_up_where_the_processes_talk() -> None:
    """After training the module is on the CPU again, of which NCCL sums nothing."""
    module = PlainTraining(model())
    trainer = fitted(module)

    class Strategy:
        root_device = torch.device("meta")

        def reduce(self, x: torch.Tensor, reduce_op: str) -> torch.Tensor:
            assert x.device == self.root_device
            return torch.tensor([96, 0, 0])

    trainer._accelerator_connector.strategy = Strategy()  # type: ignore[assignment]
    assert module.total_cost().rows == 96


# -- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ModalityDropout(model(), ratio=1.5),
            "defense.ratio must be a number at least 0 and at most 1, got 1.5",
        ),
        (lambda: AdversarialTraining(model(), mode="later"), "defense.mode must be online or offline, got 'later'"),  # type: ignore[arg-type]
        (lambda: AdversarialTraining(model(), samples=0), "defense.samples must be a whole number, at least 1, got 0"),
        (lambda: NoiseAugmentation(model(), words=2), "defense.words must be a number at least 0 and at most 1, got 2"),
        (
            lambda: RandomRemovalAugmentation(model(), max_parts=0),
            "defense.max_parts must be a whole number, at least 1, got 0",
        ),
        (lambda: EmbeddingAdversarialTraining(model(), epsilon=0), "defense.epsilon must be a number above 0, got 0"),
        (lambda: EmbeddingAdversarialTraining(model(), modalities=["audio"]), "must name some of .* got .'audio'"),
        (lambda: DecouplingFast(rounds=0), "attack.rounds must be a whole number, at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(make: Any, message: str) -> None:
    with pytest.raises(MuroanError, match=message):
        make()


def test_a_gradient_attack_on_a_model_without_gradients_says_so() -> None:
    class Counting(Bilinear):
        def fuse(self, features: Any) -> torch.Tensor:
            return super().fuse(features).detach()

    module = AdversarialTraining(Counting(Sides()), PgdLinf(steps=2), threat_model=THREAT)
    with pytest.raises(
        MuroanError, match=r"does not depend on \['image'\] in a way that can be differentiated: choose an attack"
    ):
        fitted(module)


def test_the_example_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs/defenses.md").read_text()
    (code,) = re.findall(r"```python\n# hide\.py\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) < 30
    (tmp_path / "hide.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    defense = importlib.import_module("hide").HideImages(model(), ratio=0.3, threat_model=THREAT, lr=0.02)
    made = seen(defense, batch(), monkeypatch)
    dark = [row for row in range(32) if not made.inputs["image"][made.rows["image"][row]].any()]
    assert len(dark) == 10
