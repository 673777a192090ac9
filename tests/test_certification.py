"""Certificates: what they promise, by hand; votes against exact chances; the run that streams them; attacks."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import SMALL
from conftest import muroan as run
from test_conf import job
from torch.utils.data import DataLoader
from toys import Blocks, flips_when, stretch, threat, word

from muroan.attacks.exhaustive import Exhaustive
from muroan.certification import (
    Certificate,
    CertificateFolder,
    CertificationCallback,
    Certifier,
    broken,
    certified_accuracy,
    robust_accuracy,
    summarise,
)
from muroan.cli import parts
from muroan.data.samples import Batch
from muroan.defenses.mmcert import Ablation, SmoothedModel
from muroan.engine import evaluate
from muroan.errors import MuroanError
from muroan.report import build
from muroan.report.certificates import find_votes
from muroan.report.plots import certified_curves
from muroan.results import AttackResult, RunFolder
from muroan.runs import find_runs
from muroan.training.module import MultimodalModule, load_weights


def certificate(index: int = 0, joint=(3, 1), alone=(5, 2), predicted: int | None = 0, **more) -> Certificate:
    """Of 100 patches and 5 tokens in 3 words."""
    named = [{} if predicted is None else dict(zip(("image", "text"), r, strict=True)) for r in (joint, alone)]
    fields = {"side": {"image": 4}, "tokens": {"text": [1, 3, 1]}, **more}
    return Certificate(
        f"s{index}", index, 0, {"image": 100, "text": 5}, {"image": 9, "text": 2}, predicted, 0.9, 0.1, *named, **fields
    )


def attacked(index: int = 0, *regions, status="flipped", **more) -> AttackResult:
    return AttackResult(f"s{index}", index, "x", 0, 0, 1, status, regions=list(regions), **more)


class TestPromise:
    def test_altered_elements_of_a_removal(self):
        pixels = [("image", (3, 0), (5, 4)), ("image", (4, 3), (5, 4)), ("image", (8, 8), (16, 12))]
        words = [("text", (1,), (3,)), ("text", (2,), (3,))]
        # Rows 3 and 4 lie in two patches, the second region in one of these; the third covers two.
        assert certificate().altered(attacked(0, *pixels, *words)) == {"image": 4, "text": 4}
        assert certificate().altered(attacked(0, *words[1:])) == {"image": 0, "text": 1}

    def test_altered_elements_of_chosen_values(self):
        changed = attacked(removed={"image": 7}, kind="perturbation")
        assert certificate().altered(changed) == {"image": 7, "text": 0}
        assert certificate().altered(attacked(removed={"image": 7, "text": 1}, kind="perturbation")) is None

    def test_covers(self):
        """(3, 1) together, or 5 patches alone, or 2 tokens alone."""
        found = {
            (image, text)
            for image, text in itertools.product(range(8), range(4))
            if certificate().covers({"image": image, "text": text})
        }
        assert found == {*itertools.product(range(4), range(2)), (4, 0), (5, 0), (0, 2)}
        assert not certificate(predicted=None).covers({"image": 0, "text": 0})

    def test_certified_accuracy_by_hand(self):
        """The limits are (3 + 1)/100, 1/100 (wrong ones and abstentions have none), and 1/5 by its one token."""
        found = [
            certificate(0),
            certificate(1, joint=(0, 0)),
            certificate(2, predicted=1),
            certificate(3, predicted=None),
        ]
        found.append(certificate(4, joint=(60, 0)))
        assert [c.limit for c in found] == [0.04, 0.01, 0.0, 0.0, 0.2]
        shares = [0, 0.009, 0.01, 0.039, 0.04, 0.19, 0.2]
        assert certified_accuracy(found, shares).tolist() == [60, 60, 40, 40, 20, 20, 0]
        summary = summarise(found)
        assert (summary["samples"], summary["abstained"], summary["accuracy"]) == (5, 1, 60)
        assert np.allclose(summary["curve"], [[1, 60], [4, 40], [20, 20]])
        assert summary["alone"]["image"] == {"any": 60, "elements": 5.0, "percent": 5.0}

    def test_robust_accuracy_by_hand(self):
        found = [certificate(i) for i in range(4)]
        records = [
            attacked(0, ("image", (0, 0), (4, 8))),  # two patches: 2 %
            attacked(1, ("text", (0,), (1,))),  # a token: 20 %
            attacked(2, status="held"),
            attacked(3, status="skipped"),
            attacked(9),  # has no certificate
        ]
        assert robust_accuracy(found, records, [0, 0.019, 0.02, 0.19, 0.2, 1]).tolist() == [75, 75, 50, 50, 25, 25]
        turned = [replace(records[0], adversarial_label=records[0].label), *records[1:4]]
        assert robust_accuracy(found, turned, [1]).tolist() == [50], "another goal than another label was reached"
        with pytest.raises(MuroanError, match="none of the 1 attacked samples has a certificate"):
            robust_accuracy(found, records[4:], [0])

    def test_broken_by_hand(self):
        found = [certificate(0), certificate(1), certificate(2), certificate(3), certificate(4, predicted=None)]
        within, beyond = ("image", (0, 0), (4, 8)), ("image", (0, 0), (8, 16))
        records = [attacked(0, within), attacked(1, beyond), attacked(2, status="held"), attacked(4, within)]
        assert [(c.id, r.id) for c, r in broken(found, records)] == [("s0", "s0")]
        same = replace(records[0], adversarial_label=records[0].label)
        assert broken(found, [same, *records[1:]]) == [], "another goal than another label was reached"
        other = replace(records[0], clean_label=1, label=1)
        assert broken(found, [other, *records[1:]]) == [], (
            "the vote that was attacked said something else from the start"
        )

    def test_round_trip(self, tmp_path):
        folder = CertificateFolder(tmp_path)
        folder.start({"identity": {}})
        for c in (certificate(1), certificate(0, predicted=None)):
            folder.append(c)
        assert folder.finish() == [certificate(0, predicted=None), certificate(1)]
        (tmp_path / "certificates.jsonl").write_text("{}\n")
        with pytest.raises(MuroanError, match=r"certificates.jsonl line 1 is not a certificate .* to certify"):
            folder.records()

    def test_the_figure(self):
        records = [attacked(0, ("image", (0, 0), (4, 8))), attacked(1, status="held")]
        both = certified_curves({"": ([certificate(0), certificate(1)], [("$x$ · mmbt", records)])})
        assert both[:4] == b"\x89PNG"
        assert both == certified_curves({"": ([certificate(0), certificate(1)], [("$x$ · mmbt", records)])})
        assert both != certified_curves({"": ([certificate(0), certificate(1)], [])}, dark=True)


class TestReport:
    """`muroan report` puts certificates beside the attacks on the same vote."""

    VOTE = {"weights": "w", "defense": {"keep": 3}}

    def certify(self, path: Path, finish=True, **identity) -> None:
        folder = CertificateFolder(path)
        known = {**self.VOTE, "certification": {"samples": 9, "deleted": []}, **identity}
        folder.start({"identity": known, "model": "mmbt", "defense": "mmcert", "dataset": "d"})
        for found in (certificate(0), certificate(1, predicted=None), certificate(2, alone=(5, 0))):
            folder.append(found)
        folder.close()
        if finish:
            folder.finish()

    def attack(self, path: Path, *records: AttackResult, name="mine", **identity) -> None:
        folder = RunFolder(path)
        known = {**self.VOTE, "certification": {"votes": 3}, **identity}
        told = {"attack": name, "model": "mmbt", "defense": "mmcert", "dataset": "d", "classes": ["a", "b"]}
        folder.start({"identity": known, "smoothed": "certification" in known, **told})
        for record in records:
            record.total = {"image": 1600, "text": 3}
            record.removed = {"image": 32}
            folder.append(record)
        folder.close()
        folder.finish()

    def flips(self) -> list[AttackResult]:
        """The first within its certificate, by two of three patches; the second has no certificate."""
        regions = [("image", (0, 0), (4, 8))]
        return [attacked(0, *regions), attacked(1, *regions), attacked(2, status="held")]

    def test_a_row_a_vote_with_the_attacks_on_it(self, tmp_path):
        self.certify(tmp_path / "certify/a")
        self.certify(tmp_path / "certify/b", finish=False, defense={"keep": 5})
        self.attack(tmp_path / "attack/a", *self.flips())
        self.attack(tmp_path / "attack/b", attacked(0, status="held"), name="weak")
        self.attack(tmp_path / "attack/c", *self.flips(), weights="others")
        self.attack(tmp_path / "attack/d", *self.flips(), threat_model={"replacement": {"image": "delete"}})
        # Certificates may be named apart from the runs, too.
        page = build([tmp_path / "attack", tmp_path / "certify"], tmp_path / "out").read_text()
        first, second = json.loads((tmp_path / "out/summary.json").read_text())["certificates"]
        assert first["vote"] == "mmbt + mmcert · d (defense.keep=3)"
        assert (first["samples"], first["abstained"], round(first["accuracy"], 1)) == (3, 1, 66.7)
        assert [(a["run"].split()[0], a["broken"], round(a["robust_accuracy"], 1)) for a in first["attacks"]] == [
            ("mine", ["s0"], 33.3),
            ("weak", [], 100.0),
        ]
        assert (second["vote"], second["attacks"]) == ("mmbt + mmcert · d (defense.keep=5)", [])
        assert "33.3 mine; 100.0 weak" in page
        assert "broke 1 certificates of mmbt + mmcert · d, which says that something is wrong" in page
        assert "The certification of mmbt + mmcert · d is unfinished: 3 certificates so far" in page
        assert re.search("No certificate is held against mine .* replaces parts of image in a way", page)
        assert build([tmp_path / "attack", tmp_path / "certify"], tmp_path / "again").read_text() == page

    def test_what_it_is_without_one_of_the_two(self, tmp_path):
        self.attack(tmp_path / "attack/a", *self.flips())
        page = build([tmp_path / "attack"], tmp_path / "out").read_text()
        assert "What is certain" not in page
        assert "certificates" not in json.loads((tmp_path / "out/summary.json").read_text())
        self.certify(tmp_path / "certify/a")
        with pytest.raises(MuroanError, match="certify holds certificates alone"):
            build([tmp_path / "certify"], tmp_path / "out")
        with pytest.raises(MuroanError, match="gone is not a folder"):
            build([tmp_path / "attack", tmp_path / "gone"], tmp_path / "out")

    def test_votes_of_one_attack_and_settings_go_by_their_folders(self, tmp_path):
        for name in "ab":
            self.certify(tmp_path / "certify" / name, weights=name)
        self.attack(tmp_path / "attack/a", *self.flips(), weights="a")
        votes, said = find_votes([tmp_path / "certify/a", tmp_path / "certify/b"], find_runs([tmp_path / "attack"]))
        assert [vote.name for vote in votes] == ["mmbt + mmcert · d (a)", "mmbt + mmcert · d (b)"]
        assert [len(vote.attacks) for vote in votes] == [1, 0]
        assert len(said) == 1


KEEP = {"audio": 4, "text": 3}


def toy() -> Blocks:
    """Turns where it sees none of the first half of the sound, or not the first word."""
    return flips_when(lambda seen: seen.gone(stretch(8, 0)) | seen.gone(word(0)), image=None, audio=16, words=4)


def exact(model: Blocks) -> float:
    """The chance that an ablation of everything leaves the label: a kept sample in the first half, and word 0 kept."""
    sounds = list(itertools.combinations(range(16), KEEP["audio"]))
    words = list(itertools.combinations(range(4), KEEP["text"]))
    return sum(min(s) < 8 for s in sounds) / len(sounds) * sum(0 in w for w in words) / len(words)


class TestCertifier:
    def test_votes_are_as_frequent_as_they_should_be(self):
        model = toy()
        certifier = Certifier(model, Ablation(model.modalities, KEEP), samples=4000, selection=50, batch_size=512)
        sample = model.sample()
        first, second = certifier.votes(sample, sample.inputs)
        assert (first.sum(), second.sum()) == (50, 4000)
        chance = exact(model)
        assert abs(second[0] / 4000 - chance) < 4 * (chance * (1 - chance) / 4000) ** 0.5
        found = certifier.certify(sample)
        assert found.lower < chance < 1
        assert 1 - chance < found.upper < 1
        assert (found.n, found.k) == ({"audio": 16, "text": 4}, KEEP)
        assert found.tokens == {"text": [1, 1, 1, 1]}
        # Of 16 samples 4 are kept: delta(1) = 0.25; the gap of chances is about 0.47, and 2 delta is above it.
        assert found.joint == {"audio": 0, "text": 0}

    def test_deleted_words_are_certified_further(self):
        model = flips_when(lambda seen: seen.gone(*map(word, range(4))), image=None, audio=16, words=4)
        for deleted, certified in (((), 0), (("text",), 1)):
            certifier = Certifier(model, Ablation(model.modalities, KEEP), samples=300, deleted=deleted)
            assert certifier.certify(model.sample()).alone["text"] == certified

    def test_the_draws_are_the_samples_own_in_any_batch(self):
        model = toy()
        ablation = Ablation(model.modalities, KEEP)
        samples = [model.sample(f"s{i}") for i in range(2)]
        votes = {
            size: [Certifier(model, ablation, 90, 20, batch_size=size).votes(s, s.inputs).tolist() for s in samples]
            for size in (1, 7, 256)
        }
        assert votes[1] == votes[7] == votes[256]
        assert votes[1][0] != votes[1][1]
        other = Certifier(model, ablation, 90, 20, seed=1)
        assert other.votes(samples[0], samples[0].inputs).tolist() != votes[1][0]

    def test_a_short_text_and_bad_answers_are_refused(self):
        model = toy()
        with pytest.raises(MuroanError, match="k=5 elements of text, but there are n=4 in sample 's0'"):
            Certifier(model, Ablation(model.modalities, {"audio": 1, "text": 5})).certify(model.sample())
        model.head = lambda embedding: torch.full((len(embedding), 2), float("nan"))
        with pytest.raises(MuroanError, match="not finite for an ablation of sample 's0'"):
            Certifier(model, Ablation(model.modalities, KEEP)).certify(model.sample())

    @pytest.mark.parametrize(
        ("option", "said"),
        [
            ({"samples": 0}, "certification.samples must be a whole number, at least 1, got 0"),
            ({"samples": 100.0}, "certification.samples must be a whole number, at least 1, got 100.0"),
            ({"alpha": None}, "certification.alpha must be a number above 0 and at most 1, got None"),
            ({"deleted": "audio"}, r"deleted names 'audio': only of texts"),
            ({"alpha": 1.0}, "certification.alpha must lie between 0 and 1"),
            ({"deleted": ["audio"]}, r"deleted names 'audio': only of texts .* here of \['text'\]"),
        ],
    )
    def test_options_are_checked(self, option, said):
        model = toy()
        with pytest.raises(MuroanError, match=said):
            Certifier(model, Ablation(model.modalities, KEEP), **option)

    def test_no_removal_at_all_breaks_a_certificate(self):
        """Every removal of a small universe, asked of the vote; a certificate that lies is found out."""
        model = flips_when(
            lambda seen: seen.share(stretch(16, 0))[:, 0] < 0.12, image=None, audio=16, words=3, classes=2
        )
        keep = {"audio": 3, "text": 2}
        sample = model.sample()
        found = Certifier(model, Ablation(model.modalities, keep), samples=500, deleted=["text"]).certify(sample)
        assert found.alone["audio"] >= 1
        assert found.alone["text"] == 1
        smoothed = SmoothedModel(model, keep, votes=60).eval()
        records = evaluate(smoothed, [sample], Exhaustive(), threat_model=threat(None, audio=2))
        assert records[0].flipped
        assert broken([found], records) == []
        liar = replace(found, joint=found.n)
        assert len(broken([liar], records)) == 1


class Interrupted(Exception):
    pass


def run_certification(folder: Path, stop_after: int | None = None, **more) -> list[Certificate]:
    model = toy()

    class Loader(pl.LightningDataModule):
        def test_dataloader(self):
            samples = [model.sample(f"s{i}", i) for i in range(6)]
            return DataLoader([Batch.of(samples[:4]), Batch.of(samples[4:])], batch_size=None)

    callback = CertificationCallback(
        Ablation(model.modalities, KEEP), folder, {"identity": {"seed": 0, **more}}, progress=False, samples=60, **more
    )
    if stop_after is not None:
        certify, left = Certifier.certify, iter(range(stop_after))

        def limited(self, *arguments):
            if next(left, None) is None:
                raise Interrupted
            return certify(self, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Certifier, "certify", limited)
            with pytest.raises(Interrupted):
                trainer(folder, callback).test(MultimodalModule(model), Loader(), verbose=False)
        return []
    trainer(folder, callback).test(MultimodalModule(model), Loader(), verbose=False)
    return callback.records


def trainer(folder: Path, callback: CertificationCallback) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", callbacks=[callback], default_root_dir=folder, **quiet)


class TestRun:
    def test_a_killed_run_goes_on(self, tmp_path):
        whole = run_certification(tmp_path / "whole")
        assert [c.id for c in whole] == [f"s{i}" for i in range(6)]
        run_certification(tmp_path / "killed", stop_after=5)
        part = tmp_path / "killed" / "certificates.part-0.jsonl"
        assert len(part.read_text().splitlines()) == 5
        part.write_bytes(part.read_bytes()[:-9])
        assert run_certification(tmp_path / "killed") == whole
        files = [(tmp_path / name / "certificates.jsonl").read_bytes() for name in ("whole", "killed")]
        assert files[0] == files[1]
        assert not part.exists()

    def test_another_configuration_is_refused(self, tmp_path):
        run_certification(tmp_path)
        with pytest.raises(MuroanError, match="seed: 0 there, 1 asked for"):
            run_certification(tmp_path, seed=1)

    def test_a_module_without_a_model(self, tmp_path):
        callback = CertificationCallback(Ablation({}, {}), tmp_path, {"identity": {}})
        with pytest.raises(MuroanError, match="needs a LightningModule with a MultimodalModel"):
            callback.on_test_start(None, pl.LightningModule())  # type: ignore[arg-type]


def test_a_vote_needs_a_defence_that_ablates():
    with pytest.raises(MuroanError, match="add defense=mmcert"):
        parts.ablation_options(job())
    assert parts.ablation_options(job("defense=mmcert", "defense.keep.image=7"))["keep"]["image"] == 7


def test_texts_shorter_than_what_is_kept_are_refused_before_anything_is_done():
    """By training, and by an attack on the vote, which itself keeps what an attacker leaves."""
    data, model = parts.build(job("dataset.test_limit=20", "dataset.train_limit=50"))
    ablation = Ablation(model.modalities, {"image": 0.5, "text": 3})
    parts.check_texts(data, model, ("train", "val", "test"), ablation)
    few = Ablation(model.modalities, {"image": 0.5, "text": 8})
    with pytest.raises(MuroanError, match=r"keeps k=8 elements of text, but there are n=\d in sample 'test-"):
        parts.check_texts(data, model, ("test",), few)


def test_the_folder_tells_the_vote_from_the_model():
    smoothed = ("defense=mmcert", "certification.smoothed=true")
    assert job("certification.votes=3").out == job().out
    found = [job(*smoothed), job(*smoothed, "certification.votes=3"), job(*smoothed, "defense.keep.image=0.5")]
    assert len({job().out, *(config.out for config in found)}) == 4
    one, other = (job("defense=mmcert", option, command="certify").out for option in ("seed=0", "seed=1"))
    assert one != other
    assert job("defense=mmcert", "certification.batch_size=3", command="certify").out == one


@pytest.mark.slow  # `experiments/certified.py quick` certifies in CI
def test_the_command(trained: Path, tmp_path: Path):
    """Certify a trained model in two processes, attack its vote, hold one against the other."""
    keep = ("defense=mmcert", "defense.keep.image=0.3", "defense.keep.text=null", "defense.element.image=8")
    options = (*SMALL, *keep, "dataset.test_limit=8", "certification.samples=40", "certification.selection=10")
    where = (f"checkpoint={trained / 'best.ckpt'}", "tracker=none")
    run("certify", *options, *where, f"out={tmp_path / 'run'}", "device=ddp_cpu", cwd=tmp_path)
    certificates = CertificateFolder(tmp_path / "run").records()
    assert [c.index for c in certificates] == list(range(8))
    data, model = parts.build(job(*options))
    load_weights(model.eval(), trained / "best.ckpt")
    ablation = Ablation(model.modalities, **parts.ablation_options(job(*options)))
    certifier = Certifier(model, ablation, samples=40, selection=10)
    for found in certificates[:3]:
        assert certifier.certify(data.prepared("test")[found.index]) == found

    votes = ("certification.smoothed=true", "certification.votes=8", "attack=random_removal", "attack.draws=5")
    run("attack", *options, *where, *votes, f"out={tmp_path / 'attack'}", cwd=tmp_path)
    held = (f"out={tmp_path / 'run'}", f"certification.attacked=[{tmp_path / 'attack'}]")
    told = run("certify", *options, *where, *held, cwd=tmp_path)
    assert "already certified" in told.stderr + told.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["samples"] == 8
    ((key, attack),) = summary["attacks"].items()
    assert re.fullmatch("random_removal-[0-9a-f]{6}", key)
    assert (attack["label"], attack["broken"]) == ("random_removal · mmbt + mmcert, smoothed", [])
    drawn = tmp_path / "run" / "certified.png"
    assert drawn.stat().st_size > 10_000
    before = drawn.read_bytes()
    run("certify", *options, *where, f"out={tmp_path / 'run'}", cwd=tmp_path)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary, "what it was held against stays"
    assert drawn.read_bytes() == before
