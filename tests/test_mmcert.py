"""MMCert's ablations against what was asked of them, its training, and the vote as a model like any other."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from test_conf import job
from torch.utils.data import DataLoader
from toys import Blocks, flips_when, stretch, word

from muroan.attacks.random_removal import RandomRemoval
from muroan.data.samples import Batch
from muroan.defenses.mmcert import Ablation, MMCert, SmoothedModel, choose, random_bits
from muroan.engine import QueryEngine
from muroan.errors import MuroanError
from muroan.modalities import Audio, Image, Text, WordTokenizer
from muroan.training.module import load_weights

CPU = torch.device("cpu")
IMAGE, SOUND = Image((6, 5), mean=(0.5,), std=(0.5,)), Audio(20, rate=100)
WORDS = Text(WordTokenizer(["is", "it", "red", "?", "a", "b"]), 9)


def ones(ablation: Ablation, name: str, batch: int) -> torch.Tensor:
    return torch.ones(batch, *ablation.modalities[name].shape)


class TestRandom:
    def test_splitmix64_as_published(self):
        """The first outputs for seed 1234567, from the reference implementation."""
        expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
        drawn = random_bits(torch.tensor([1234567]), 0, 4)[0].tolist()
        assert [value % 2**64 for value in drawn] == expected

    def test_any_stretch_is_part_of_the_same_stream(self):
        seeds = torch.tensor([3, -9])
        whole = random_bits(seeds, 0, 50)
        assert torch.equal(torch.cat([random_bits(seeds, 0, 7), random_bits(seeds, 7, 50)], 1), whole)

    @given(st.integers(1, 12), st.data())
    def test_k_of_the_real_ones(self, positions, data):
        real = torch.tensor(data.draw(st.lists(st.booleans(), min_size=positions, max_size=positions)))
        k = data.draw(st.integers(0, int(real.sum())))
        scores = random_bits(torch.tensor([data.draw(st.integers(0, 2**40))]), 0, positions)[0]
        chosen = choose(scores, real, torch.tensor(k))
        assert int(chosen.sum()) == k
        assert not (chosen & ~real).any()
        if 0 < k < int(real.sum()):
            assert scores[chosen].max() < scores[real & ~chosen].min()

    def test_every_subset_is_equally_likely(self):
        ablation = Ablation({"text": WORDS}, {"text": 2})
        x, _ = WORDS.prepare("is it red a")
        draws = 6000
        scores = ablation.scores("text", ablation.seeds("text", ["s"], CPU), 0, draws)
        kept = Counter(tuple(row) for row in ablation.ablate("text", x[None], scores)[:, 1:3].tolist())
        pairs = set(itertools.combinations(x[1:5].tolist(), 2))
        assert set(kept) == pairs
        assert chisquare([kept[pair] for pair in pairs]).pvalue > 0.001


class TestAblation:
    @pytest.mark.parametrize(("keep", "k"), [(0.1, 3), (0.05, 2), (0.001, 1), (7, 7), (1.0, 30), (None, 30)])
    def test_pixels(self, keep, k):
        ablation = Ablation({"image": IMAGE}, {"image": keep})
        x = torch.rand(4, 1, 6, 5) + 1
        scores = ablation.scores("image", ablation.seeds("image", [1], CPU), 0, 3)
        out = ablation.ablate("image", x, scores).view(4, 3, 1, 6, 5)
        assert ((out != 0).sum((2, 3, 4)) == k).all()
        assert ((out == x[:, None]) | (out == 0)).all()
        assert ((out != 0) == (out[:1] != 0)).all(), "the masks of a vote are the same for all inputs"

    def test_all_channels_of_a_pixel(self):
        ablation = Ablation({"image": Image((4, 4))}, {"image": 5})
        out = ablation.ablate("image", torch.ones(1, 3, 4, 4), torch.rand(1, 2, 16).mul(1e9).long())
        assert (out.sum(1) % 3 == 0).all()
        assert out.sum() == 2 * 5 * 3

    def test_patches_also_where_they_are_cut(self):
        ablation = Ablation({"image": IMAGE}, {"image": 2}, {"image": 4})
        assert ablation.grid("image") == (2, 2)
        scores = torch.tensor([[[0, 3, 1, 2]]])  # the patches at the left
        out = ablation.ablate("image", ones(ablation, "image", 1), scores)[0, 0]
        assert out.tolist() == [[1, 1, 1, 1, 0]] * 6

    def test_frames_of_sound(self):
        ablation = Ablation({"audio": SOUND}, {"audio": 0.5}, {"audio": 6})
        scores = torch.tensor([[[3, 0, 2, 1]]])
        out = ablation.ablate("audio", ones(ablation, "audio", 1), scores)[0]
        assert out.tolist() == [0] * 6 + [1] * 6 + [0] * 6 + [1] * 2

    def test_kept_words_close_ranks_between_the_special_tokens(self):
        ablation = Ablation({"text": WORDS}, {"text": 0.5})
        x = torch.stack([WORDS.prepare(text)[0] for text in ("is it red?", "a", "is it a red b?")])
        assert ablation.elements("text", x).sum(1).tolist() == [4, 1, 6]
        scores = torch.arange(9)[None, None].flip(-1)  # the last ones win
        out = ablation.ablate("text", x, scores)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.tokenizer.vocabulary]
        assert [" ".join(words[i] for i in row if i) for row in out.tolist()] == [
            "[CLS] red ? [SEP]",
            "[CLS] a [SEP]",
            "[CLS] red b ? [SEP]",
        ]

    def test_a_text_that_an_attacker_emptied_is_left_as_it_is(self):
        ablation = Ablation({"text": WORDS}, {"text": 3})
        x = torch.tensor([[2, 3, 0, 0, 0, 0, 0, 0, 0], [2, 5, 3, 0, 0, 0, 0, 0, 0]])
        assert torch.equal(ablation.ablate("text", x, torch.rand(1, 1, 9).mul(1e9).long()), x)

    def test_a_padding_token_that_ends_texts(self):
        class Clip(WordTokenizer):
            prefix, suffix = [2], [3]

            def __init__(self):
                super().__init__(["a", "b"])
                self.prefix, self.suffix, self.pad_id = [2], [3], 3

        ablation = Ablation({"text": Text(Clip(), 6)}, {"text": 0.5})
        x, _ = ablation.modalities["text"].prepare("a b")
        assert ablation.elements("text", x[None])[0].tolist() == [False, True, True, False, False, False]

    def test_steady(self):
        ablation = Ablation({"text": WORDS, "image": IMAGE}, {"text": 0.5, "image": 0.5})
        assert [ablation.kept("text", n) for n in (8, 7, 6, 1)] == [4, 4, 3, 1]
        assert ablation.steady("text", 8) == 1
        assert ablation.steady("text", 7) == 0
        assert ablation.steady("image", 30) == 30
        assert Ablation({"text": WORDS}, {"text": 2}).steady("text", 5) == 3

    @pytest.mark.parametrize(
        ("keep", "element", "said"),
        [
            ({"image": 31}, {}, "keeps k=31 elements of image, but there are n=30: set defense.keep.image to 30"),
            ({"image": 5}, {"image": 4}, "k=5 elements of image, but there are n=4"),
            ({"text": 1}, {}, "no entry for 'image'"),
            ({"image": 1.5}, {}, "defense.keep.image must be a share above 0 and at most 1.0"),
            ({"image": 0}, {}, "defense.keep.image must be a share"),
            ({"image": 1, "pictures": 3}, {}, r"name \['pictures'\], the model takes \['image'\]"),
            ({"image": 1}, {"image": 7}, "defense.element.image must be 1 to 6, got 7"),
        ],
    )
    def test_refused(self, keep, element, said):
        with pytest.raises(MuroanError, match=said):
            Ablation({"image": IMAGE}, keep, element)

    def test_a_modality_without_elements(self):
        class Smell(Audio):
            pass

        Ablation({"smell": Smell(4, 4)}, {"smell": 1})
        with pytest.raises(MuroanError, match="knows no elements of 'smell'"):
            Ablation({"smell": object()}, {"smell": 1})  # type: ignore[dict-item]


def half_a_square() -> Blocks:
    """A toy that turns when less than half of what it sees of the sound, or none of the words, is there."""
    return flips_when(
        lambda seen: (seen.share(stretch(8, 0))[:, 0] < 0.2) | seen.gone(word(0), word(1), word(2)),
        image=None,
        audio=8,
        words=3,
    )


class TestSmoothedModel:
    def test_votes_by_hand(self):
        """Each vote asked on its own, by masks that are written out here."""
        base = half_a_square()
        model = SmoothedModel(base, {"audio": 2, "text": 1}, votes=25, seed=4, rows=6).eval()
        sample = base.sample()
        sample.inputs["audio"][5:] = 0
        inputs = {name: x[None] for name, x in sample.inputs.items()}
        votes = []
        for vote in range(25):
            seen = {}
            for name, x in sample.inputs.items():
                scores = model.ablation.scores(name, model.ablation.seeds(name, [4], CPU), vote, vote + 1)[0, 0]
                if name == "audio":
                    seen[name] = torch.where(scores.argsort().argsort() < 2, x, 0)
                else:
                    kept = 1 + int(scores[1:4].argmin())
                    seen[name] = torch.tensor([2, int(x[kept]), 3, 0, 0])
            votes.append(base({name: x[None] for name, x in seen.items()}))
        embedding, logits = model(inputs)
        labels = [int(v.logits.argmax()) for v in votes]
        assert 0 < sum(labels) < 25
        shares = torch.tensor([labels.count(0), labels.count(1)]) / 25
        assert torch.allclose(embedding[0, :-2], torch.cat([v.embedding for v in votes]).mean(0))
        chances = torch.cat([v.logits.softmax(1) for v in votes]).mean(0)
        assert torch.allclose(logits[0], shares + chances / 50)

    def test_a_tie_goes_to_the_higher_probability_and_never_outweighs_a_vote(self):
        class Split(Blocks):
            """Says 0 narrowly to even sounds, and 1 with certainty to odd ones."""

            def fuse(self, features):
                return features["audio"]

            def head(self, embedding):
                odd = embedding[:, :1]
                return torch.cat([0.1 - 30 * odd, 30 * odd], 1)

        base = Split(lambda p: p, image=None, audio=2, words=0)
        for votes in range(1, 40):
            model = SmoothedModel(base, {"audio": 1}, votes=votes)
            embedding, logits = model({"audio": torch.ones(1, 2)})
            odd = round(float(embedding[0, 0]) * votes)
            assert int(logits.argmax()) == (odd * 2 >= votes)
            assert not torch.isclose(logits[0, 0], logits[0, 1], atol=1e-6)

    def test_the_same_answer_wherever_the_question_stands(self):
        base = half_a_square()
        model = SmoothedModel(base, {"audio": 3, "text": 2}, votes=17, rows=5)
        generator = torch.Generator().manual_seed(0)
        sounds = (torch.rand(6, 8, generator=generator) > 0.5).float()
        texts = torch.stack([base.modalities["text"].prepare(t)[0] for t in ("w0", "w1 w2", "w0 w1 w2") * 2])
        together = model({"audio": sounds, "text": texts}).logits
        for i in range(6):
            alone = model({"audio": sounds[i : i + 1], "text": texts[i : i + 1]}).logits
            assert torch.allclose(alone[0], together[i], atol=1e-12)
        other = SmoothedModel(base, {"audio": 3, "text": 2}, votes=17, seed=1)({"audio": sounds, "text": texts})
        assert not torch.equal(other.logits, together)

    def test_inside_the_engine_like_any_other_model(self):
        base = half_a_square()
        model = SmoothedModel(base, {"audio": 4, "text": 2}, votes=31).eval()
        samples = [base.sample(f"s{i}", i, i % 2) for i in range(4)]
        results = {size: list(QueryEngine(model, RandomRemoval(), batch_size=size).run(samples)) for size in (1, 3, 64)}
        for size in (1, 3):
            assert sorted(r.to_json() for r in results[size]) == sorted(r.to_json() for r in results[64])
        flipped = [r for r in results[64] if r.flipped]
        assert flipped
        assert {r.status for r in results[64] if r.label == 1} == {"skipped"}

    def test_refused(self):
        with pytest.raises(MuroanError, match=r"certification\.votes must be a whole number, at least 1, got 0"):
            SmoothedModel(half_a_square(), {"audio": 1, "text": 1}, votes=0)


class Sums(Blocks):
    """Learns one weight an element: enough to see whether a training step does something."""

    def __init__(self, **options):
        super().__init__(lambda p: p, image=None, audio=20, words=4, **options)
        self.weight = torch.nn.Linear(24, 2)
        self.train()

    def fuse(self, features):
        return torch.cat([features["audio"], features["text"]], 1).float()

    def head(self, embedding):
        return self.weight(embedding)


def batches(model: Blocks, samples: int = 40) -> list[Batch]:
    """Half of the sounds are silent in their first half, and these are of class 1."""
    made = []
    for i in range(samples):
        sample = model.sample(f"s{i}", i, i % 2)
        sample.inputs["audio"][: 10 * (i % 2)] = 0
        made.append(sample)
    return [Batch.of(made[i : i + 10]) for i in range(0, samples, 10)]


class TestTraining:
    def test_the_loss_on_ablated_inputs_falls(self, tmp_path):
        pl.seed_everything(0)
        module = MMCert(Sums(), {"audio": 0.5, "text": 0.5}, lr=0.1)
        loader = DataLoader(batches(module.model), batch_size=None)
        trainer = pl.Trainer(
            max_epochs=6, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, enable_checkpointing=False,
        )  # fmt: skip
        before = trainer.validate(module, loader, verbose=False)[0]
        trainer.fit(module, loader)
        after = trainer.validate(module, loader, verbose=False)[0]
        assert after["val/loss"] < 0.6 * before["val/loss"]
        assert after["val/accuracy"] > 90
        assert trainer.validate(module, loader, verbose=False)[0] == after, "judged on the same ablations"
        trainer.save_checkpoint(tmp_path / "best.ckpt")
        fresh = Sums()
        load_weights(fresh, tmp_path / "best.ckpt")
        assert torch.equal(fresh.weight.weight, module.model.weight.weight)

    def test_each_sample_and_step_has_an_ablation_of_its_own(self):
        module = MMCert(Sums(), {"audio": 5, "text": 2})
        batch = batches(module.model)[0]
        seen = module.ablated(batch, range(10))
        assert (seen["audio"] != 0).sum(1).tolist()[::2] == [5] * 5
        assert len({tuple(row) for row in (seen["audio"][::2] != 0).tolist()}) == 5
        assert torch.equal(module.ablated(batch, range(10))["text"], seen["text"])
        assert not torch.equal(module.ablated(batch, range(10, 20))["audio"], seen["audio"])

    def test_every_epoch_has_other_ablations(self, monkeypatch):
        module = MMCert(Sums(), {"audio": 5, "text": 2})
        batch = batches(module.model)[0]
        losses = []
        for epoch in (0, 1, 0):
            monkeypatch.setattr(MMCert, "current_epoch", epoch)
            monkeypatch.setattr(module, "log", lambda *_, **__: None)
            losses.append(module.training_step(batch, 0).item())
        assert losses[0] == losses[2] != losses[1]

    def test_everything_kept_is_the_input(self):
        module = MMCert(Sums(), {"audio": None, "text": 1.0})
        batch = batches(module.model)[0]
        for name, x in module.ablated(batch, range(10)).items():
            assert torch.equal(x, batch.inputs[name][batch.rows[name]])

    def test_a_text_shorter_than_k(self):
        module = MMCert(Sums(), {"audio": 1, "text": 5})
        with pytest.raises(MuroanError, match=r"keeps k=5 elements of text, but there are n=4 in sample 's0': set"):
            module.training_step(batches(module.model)[0], 0)

    def test_an_empty_batch(self):
        assert MMCert(Sums(), {"audio": 1, "text": 1}).training_step(Batch.of([]), 0) is None


def test_the_file_under_conf():
    module = instantiate(job("defense=mmcert").defense)(model=Sums(), lr=0.5, weight_decay=0.0, warmup=0.1)
    assert isinstance(module, MMCert)
    assert module.lr == 0.5
    assert module.ablation.kept("audio", 20) == 4
