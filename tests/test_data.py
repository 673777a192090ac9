"""Datasets: what is read, how it is batched and sharded, and what is said about data that is not as it should be."""

from __future__ import annotations

import contextlib
import csv
import json
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from scipy.io import wavfile

from muroan.callbacks import donors
from muroan.data.base import GroupShuffle, MultimodalData, groups, scratch_text, shard
from muroan.data.digit_sum import RECORDING, DigitSum
from muroan.data.easy_vqa import EasyVQA
from muroan.data.manifest import Manifest
from muroan.data.samples import BadSample, Batch, Example, PreparedDataset
from muroan.errors import MuroanError
from muroan.files import read_audio, read_image
from muroan.modalities import Audio, Image

FSDD = Path(__file__).parents[1].parent / "shared/data/fsdd"
needs_fsdd = pytest.mark.skipif(not FSDD.is_dir(), reason="the Free Spoken Digit Dataset is not there")


class Toy(MultimodalData):
    """Pictures of one grey value with some questions each."""

    name = "toy"
    classes = ["no", "yes"]

    def __init__(self, questions=(3, 2, 4, 1, 3), augment=False, **options):
        super().__init__(**options)
        self.questions, self.augmented = questions, augment

    def load(self, split):
        pictures = [np.full((4, 4, 3), 50 * p, np.uint8) for p in range(len(self.questions))]
        asked = [(p, q) for p, number in enumerate(self.questions) for q in range(number)]
        return [Example(f"{p}-{q}", {"image": pictures[p], "text": f"is it {q}"}, q % 2, f"p{p}") for p, q in asked]

    def natural_modalities(self):
        return {"image": Image((4, 4)), "text": scratch_text(["is it 0 1 2 3"], max_length=8)}

    def augment(self, modality, raw, rng):
        return f"{raw} {rng.integers(10**9)}" if modality == "text" else raw


class Numbered(Toy):
    """The same, with every picture's questions numbered from 0 again: an easy mistake."""

    def load(self, split):
        return [replace(example, id=example.id.split("-")[1]) for example in super().load(split)]


@pytest.fixture(scope="module")
def easy_vqa() -> EasyVQA:
    return EasyVQA()


def ids(loader) -> list[list[str]]:
    return [[sample.id for sample in batch.samples] for batch in loader]


def flat(lists):
    return [x for items in lists for x in items]


def message(call) -> str:
    """The message of the MuroanError that the call raises, which has to be one line."""
    with pytest.raises(MuroanError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------
# Groups, order and shards


grouped = st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=1, max_size=40)


def examples_of(keys) -> list[Example]:
    return [Example(str(i), {}, 0, None if key is None else f"g{key}") for i, key in enumerate(keys)]


@settings(max_examples=50)
@given(grouped, st.integers(1, 5))
def test_shards_partition_the_examples_and_keep_groups_whole(keys, world_size):
    examples = examples_of(keys)
    shards = [shard(examples, rank, world_size) for rank in range(world_size)]
    assert sorted(flat(shards)) == list(range(len(examples)))
    assert all(part == sorted(part) for part in shards)
    for members in groups(examples):
        assert sum(members[0] in part for part in shards) == 1
        assert any(set(members) <= set(part) for part in shards)


@settings(max_examples=50)
@given(grouped, st.integers(1, 5), st.integers(0, 3))
def test_training_order_is_equal_in_length_and_complete_over_the_processes(keys, world_size, epoch):
    dataset = PreparedDataset(examples_of(keys), {}, 1)
    dataset.epoch = epoch
    parts = [list(GroupShuffle(dataset, 0, rank, world_size)) for rank in range(world_size)]
    assert {len(part) for part in parts} == {-(-len(keys) // world_size)}
    assert set(flat(parts)) == set(range(len(keys)))
    assert len(flat(parts)) - len(keys) < world_size


@settings(max_examples=50)
@given(grouped, st.integers(0, 5))
def test_training_order_keeps_groups_together(keys, seed):
    examples = examples_of(keys)
    order = list(GroupShuffle(PreparedDataset(examples, {}, 1), seed))
    assert sorted(order) == list(range(len(keys)))
    for members in groups(examples):
        first = order.index(members[0])
        assert order[first : first + len(members)] == members


def test_training_order_changes_with_the_epoch_and_is_the_same_again():
    data = Toy(batch_size=4)

    def epochs(seed):
        loader = Toy(batch_size=4, seed=seed).train_dataloader()
        out = []
        for epoch in range(3):
            loader.sampler.set_epoch(epoch)
            out.append(ids(loader))
        return out

    first = epochs(0)
    assert first == epochs(0) != epochs(1)
    assert first[0] != first[1] != first[2]
    assert [len(batch) for batch in first[0]] == [4, 4, 4, 1]
    assert len(data.train_dataloader()) == 4
    assert all(sorted(flat(epoch)) == [e.id for e in data.examples("train")] for epoch in first)


def test_validation_and_test_keep_the_order_of_the_dataset():
    data = Toy(batch_size=4, test_batch_size=5)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert flat(ids(loader)) == [e.id for e in data.examples("test")]
        assert [len(batch) for batch in loader] == [5, 5, 3]


class Recorder(pl.LightningModule):
    """A model that learns nothing and remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), {}

    def training_step(self, batch, batch_idx):
        self.seen.setdefault(self.current_epoch, []).extend(sample.id for sample in batch.samples)
        return self.weight * 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_lightning_gives_every_epoch_an_order_of_its_own():
    def run():
        model = Recorder()
        pl.Trainer(
            max_epochs=3, accelerator="cpu", devices=1, logger=False, barebones=True, use_distributed_sampler=False
        ).fit(model, Toy(batch_size=4))
        return model.seen

    seen = run()
    assert len({tuple(order) for order in seen.values()}) == 3
    assert all(len(set(order)) == 13 for order in seen.values())
    assert seen == run()


def test_each_process_of_a_trainer_gets_its_shard():
    class FakeTrainer:
        world_size = 2

        def __init__(self, rank):
            self.global_rank = rank

    shards, trained = [], []
    for rank in range(2):
        data = Toy(batch_size=4)
        data.trainer = FakeTrainer(rank)
        shards += flat(ids(data.test_dataloader()))
        trained.append(ids(data.train_dataloader()))
    assert sorted(shards) == [e.id for e in Toy().examples("test")]
    assert len(trained[0]) == len(trained[1])
    assert set(flat(flat(trained))) == set(shards)


# ---------------------------------------------------------------------------------------------------------
# Samples and batches


def test_a_batch_stacks_a_shared_input_once(easy_vqa):
    samples = easy_vqa.prepared("test")
    batch = Batch.of([samples[i] for i in range(30)])
    pictures = [example.inputs["image"] for example in easy_vqa.examples("test")[:30]]
    texts = [example.inputs["text"] for example in easy_vqa.examples("test")[:30]]
    assert batch.inputs["image"].shape == (len(set(pictures)), 3, 64, 64)
    assert batch.inputs["text"].shape[0] == len(set(texts)) < 30
    for i, sample in enumerate(batch.samples):
        for name in ("image", "text"):
            assert torch.equal(batch.inputs[name][batch.rows[name][i]], sample.inputs[name])


def test_a_batch_survives_the_way_between_processes():
    batch = Batch.of(list(Toy().prepared("test")))
    again = pickle.loads(pickle.dumps(batch))
    assert [s.id for s in again.samples] == [s.id for s in batch.samples]
    for ours, theirs in zip(batch.samples, again.samples, strict=True):
        assert ours.layouts == theirs.layouts
        assert all(torch.equal(ours.inputs[name], theirs.inputs[name]) for name in ours.inputs)
    assert torch.equal(Batch.of(again.samples).rows["text"], batch.rows["text"])


def test_loader_processes_give_the_same_batches():
    alone, helped = Toy(batch_size=4, augment=True), Toy(batch_size=4, augment=True, num_workers=2)
    for ours, theirs in zip(alone.train_dataloader(), helped.train_dataloader(), strict=True):
        assert torch.equal(ours.labels, theirs.labels)
        assert [s.id for s in ours.samples] == [s.id for s in theirs.samples]
        assert all(torch.equal(ours.inputs[name], theirs.inputs[name]) for name in ours.inputs)


def test_only_training_batches_are_augmented():
    data = Toy(batch_size=13, augment=True)

    def words(loader):
        return {s.id: s.layouts["text"].words for batch in loader for s in batch.samples}

    plain = words(Toy(batch_size=13).test_dataloader())
    loader = data.train_dataloader()
    first, again = words(loader), words(loader)
    loader.sampler.set_epoch(1)
    assert plain == words(data.test_dataloader()) == words(data.val_dataloader())
    assert plain == {s.id: s.layouts["text"].words for s in data.prepared("train")}
    assert all(len(first[id]) == len(plain[id]) + 1 for id in plain)
    assert first == again != words(loader)


# ---------------------------------------------------------------------------------------------------------
# Options of the base


def test_a_limit_is_a_random_part_in_order_and_a_larger_one_holds_it():
    everything = [e.id for e in Toy().examples("test")]
    small, large = ([e.id for e in Toy(test_limit=n).examples("test")] for n in (4, 8))
    assert [i for i in everything if i in small] == small != everything[:4]
    assert set(small) < set(large)
    assert [e.id for e in Toy(test_limit=100).examples("test")] == everything
    assert [e.id for e in Toy(test_limit=4, seed=1).examples("test")] != small
    assert len(Toy(test_limit=4).examples("train")) == len(everything)


def test_use_leaves_modalities_out():
    data = Toy(use=["text"])
    assert list(data.modalities()) == ["text"]
    assert list(next(iter(data.test_dataloader())).inputs) == ["text"]
    assert message(lambda: data.prepare_for({"image": Image((4, 4))})) == (
        "the model takes image, but dataset toy with dataset.use=['text'] has text: image is missing"
    )


def test_the_model_says_how_inputs_are_prepared():
    data = Toy()
    data.prepare_for({"image": Image((8, 6))})
    assert data.prepared("val")[0].inputs["image"].shape == (3, 8, 6)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: Toy().examples("dev"), "a split is one of train, val, test, got 'dev'"),
        (lambda: Toy(use=["text", "sound"]).modalities(), "dataset.use must name some of image, text, got"),
        (lambda: Toy(use=[]).modalities(), "dataset.use must name some of image, text, got []"),
        (lambda: Toy(batch_size=0), "dataset.batch_size must be a positive whole number, got 0"),
        (lambda: Toy(test_limit=0), "dataset.test_limit must be a positive whole number, got 0"),
        (lambda: Toy(questions=()).prepared("test"), "the test split of toy has no examples"),
        (
            lambda: Numbered(questions=(2, 2)).prepared("test"),
            "the test split of toy has 2 ids of more than one sample, such as '0' (2 samples): records go by ids",
        ),
        (lambda: Toy().prepare_for({"audio": Audio(8, 8)}), "the model takes audio, but dataset toy has image, text"),
    ],
)
def test_bad_options_are_named(call, expected):
    assert expected in message(call)


# ---------------------------------------------------------------------------------------------------------
# Files


SOUND = 0.5 * np.sin(np.arange(800) * 2 * np.pi * 100 / 8000)


@pytest.mark.parametrize(
    ("rate", "wave"),
    [
        (8000, (SOUND * 32767).astype(np.int16)),
        (8000, (SOUND * 127 + 128).round().astype(np.uint8)),
        (8000, (SOUND * 2147483000).astype(np.int32)),
        (8000, SOUND.astype(np.float32)),
        (8000, np.stack([(SOUND * 65534).clip(-32768, 32767), 0 * SOUND], 1).astype(np.int16)),
        (16000, (0.5 * np.sin(np.arange(1600) * 2 * np.pi * 100 / 16000) * 32767).astype(np.int16)),
        (11025, (0.5 * np.sin(np.arange(1103) * 2 * np.pi * 100 / 11025) * 32767).astype(np.int16)),
    ],
    ids=["16 bit", "8 bit", "32 bit", "float", "stereo", "16 kHz", "11 kHz"],
)
def test_sounds_of_every_kind_come_out_equal(tmp_path, rate, wave):
    wavfile.write(tmp_path / "a.wav", rate, wave)
    read = read_audio(tmp_path / "a.wav", 8000)
    assert read.dtype == np.float32
    assert abs(len(read) - 800) <= 1
    # Resampling rings at both ends.
    np.testing.assert_allclose(read[50:750], SOUND[50:750], atol=0.01)


def test_a_sixteen_bit_picture_is_scaled_and_not_clipped(tmp_path):
    for ramp, name in (((0, 32768, 65535), "wide.tif"), ((0.0, 0.5, 1.0), "share.tif")):
        kind = np.int32 if name == "wide.tif" else np.float32
        PILImage.fromarray(np.array([ramp], kind)).save(tmp_path / name)
        assert np.asarray(read_image(tmp_path / name)).tolist() == [[0, 128, 255]]
    PILImage.fromarray(np.array([[0, 1 << 20]], np.int32)).save(tmp_path / "beyond.tif")
    assert "greys from 0 to 1.04858e+06, expected 0 to 65535" in message(lambda: read_image(tmp_path / "beyond.tif"))
    PILImage.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(read_image(tmp_path / "deep.png")).tolist() == [[0, 128, 255]]


def wav_bytes(folder: Path) -> bytes:
    wavfile.write(folder / "good.wav", 8000, (SOUND * 32767).astype(np.int16))
    return (folder / "good.wav").read_bytes()


def png_bytes(folder: Path) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    PILImage.fromarray(noise).save(folder / "good.png")
    return (folder / "good.png").read_bytes()


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_broken_files_never_raise_anything_else(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    sound = data.draw(st.booleans())
    content = bytearray((wav_bytes if sound else png_bytes)(folder))
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, 60))] = data.draw(st.integers(0, 255))
    # The rates stay: a forged one may ask for a filter of gigabytes.
    content[24:28] = wav_bytes(folder)[24:28] if sound else content[24:28]
    broken = folder / "broken"
    broken.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(MuroanError):
        read_audio(broken, 8000) if sound else read_image(broken)


# ---------------------------------------------------------------------------------------------------------
# easy-VQA


def test_easy_vqa_splits_are_whole_and_disjoint(easy_vqa):
    parts = {split: easy_vqa.examples(split) for split in ("train", "val", "test")}
    pictures = {split: {e.group for e in examples} for split, examples in parts.items()}
    assert len(parts["train"]) + len(parts["val"]) == 38575
    assert len(parts["test"]) == 9673
    assert {split: len(p) for split, p in pictures.items()} == {"train": 3600, "val": 400, "test": 1000}
    assert not pictures["train"] & pictures["val"]
    assert all(len({e.id for e in examples}) == len(examples) for examples in parts.values())
    assert all(len(groups(parts[split])) == len(pictures[split]) for split in parts)
    assert {e.label for e in parts["test"]} == set(range(13))
    assert [e.id for e in EasyVQA(seed=5).examples("val")] == [e.id for e in parts["val"]]


def test_easy_vqa_samples(easy_vqa):
    sample, example = easy_vqa.prepared("test")[3], easy_vqa.examples("test")[3]
    part, picture, question = example.id.split("-")
    assert (part, sample.id, sample.index) == ("test", example.id, 3)
    assert example.inputs["image"].name == f"{picture}.png"
    assert int(question) >= 0
    assert sample.inputs["image"].shape == (3, 64, 64)
    assert sample.layouts["text"].words == tuple(example.inputs["text"].split())
    text = easy_vqa.modalities()["text"]
    assert text.max_length == 12  # the longest question has 10 words and marks
    assert text.tokenizer.vocabulary == EasyVQA(val_pictures=9).modalities()["text"].tokenizer.vocabulary
    assert all(text.prepare(question) for question in {e.inputs["text"] for e in easy_vqa.examples("test")})


def test_easy_vqa_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "easy_vqa", None)
    assert message(EasyVQA).endswith("pip install easy-vqa")


def test_easy_vqa_needs_pictures_to_train_on():
    assert message(lambda: EasyVQA(val_pictures=4000).examples("val")) == (
        "dataset.val_pictures must lie between 1 and 3999, got 4000"
    )


# ---------------------------------------------------------------------------------------------------------
# The sum of two digits


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    """Every digit and number by three speakers, as a tone that tells the digit."""
    folder = tmp_path_factory.mktemp("fsdd") / "recordings"
    folder.mkdir()
    for speaker in ("lucas", "theo", "yweweler"):
        for digit in range(10):
            for number in range(0, 15, 5):
                tone = np.sin(np.arange(400 + 10 * digit) * (digit + 1) / 10)
                wavfile.write(folder / f"{digit}_{speaker}_{number}.wav", 8000, (9000 * tone).astype(np.int16))
    return folder.parent


def small(root, **options) -> DigitSum:
    return DigitSum(str(root), train_size=300, val_size=100, test_size=200, **options)


@pytest.mark.parametrize("split_by", ["recording", "speaker"])
def test_digit_sum_labels_and_splits(recordings, split_by):
    from sklearn.datasets import load_digits

    target = load_digits().target
    data = small(recordings, split_by=split_by)
    pictures, sounds = {}, {}
    for split, size in (("train", 300), ("val", 100), ("test", 200)):
        examples = data.examples(split)
        assert len({e.id for e in examples}) == size
        parts = [e.id.split("-") for e in examples]
        pictures[split], sounds[split] = {p[2] for p in parts}, {p[3] for p in parts}
        assert [e.label for e in examples] == [int(target[int(p[2][5:])]) + int(p[3][0]) for p in parts]
    assert not pictures["train"] & pictures["val"]
    assert not pictures["train"] & pictures["test"]
    assert not pictures["val"] & pictures["test"]
    parts = {split: [RECORDING.fullmatch(f"{s}.wav") for s in found] for split, found in sounds.items()}
    if split_by == "speaker":
        assert {split: {p["speaker"] for p in found} for split, found in parts.items()} == {
            "train": {"yweweler"}, "val": {"lucas"}, "test": {"theo"}
        }  # fmt: skip
    else:
        assert {split: {p["number"] for p in found} for split, found in parts.items()} == {
            "train": {"10"}, "val": {"5"}, "test": {"0"}
        }  # fmt: skip


def test_digit_sum_is_the_same_from_either_folder_and_grows_at_its_end(recordings):
    first = small(recordings).examples("test")
    assert [e.id for e in small(recordings / "recordings", seed=3).examples("test")] == [e.id for e in first]
    larger = DigitSum(str(recordings), test_size=250).examples("test")
    assert [e.id for e in larger[:200]] == [e.id for e in first]


def test_digit_sum_augments_the_sound_of_training_examples(recordings):
    data = small(recordings, batch_size=300, test_batch_size=300)
    plain = {s.id: s for s in data.prepared("train")}
    (batch,) = data.train_dataloader()
    for sample in batch.samples:
        assert torch.equal(sample.inputs["image"], plain[sample.id].inputs["image"])
        assert not torch.equal(sample.inputs["audio"], plain[sample.id].inputs["audio"])
        length = sample.layouts["audio"].count
        assert torch.all(sample.inputs["audio"][length:] == 0)
        assert sample.inputs["audio"].abs().max() <= 1
    (still,) = small(recordings, batch_size=300, augment=False).train_dataloader()
    assert all(torch.equal(s.inputs["audio"], plain[s.id].inputs["audio"]) for s in still.samples)


@pytest.mark.parametrize("wave", [[0.5], [0.1, 0.2], np.zeros(50), np.ones(20000)])
def test_digit_sum_augments_sounds_of_any_length(recordings, wave):
    data = small(recordings)
    for seed in range(20):
        varied = data.augment("audio", np.array(wave, np.float32), np.random.default_rng(seed))
        data.modalities()["audio"].prepare(varied)


def test_digit_sum_says_what_it_wants(tmp_path, recordings):
    text = message(lambda: DigitSum(str(tmp_path / "nowhere")).examples("train"))
    assert "nowhere is not a folder" in text
    assert "git clone https://github.com/Jakobovski/free-spoken-digit-dataset" in text
    assert "FSDD_ROOT" in text
    assert "has 0 recordings, none for train" in message(lambda: DigitSum(str(tmp_path)).examples("train"))
    assert message(lambda: small(recordings, split_by="digit")) == (
        "dataset.split_by must be recording or speaker, got 'digit'"
    )


@needs_fsdd
def test_digit_sum_of_the_real_recordings():
    data = DigitSum(str(FSDD), test_limit=20, train_size=2000)
    (batch,) = data.test_dataloader()
    assert batch.inputs["image"].shape[1:] == (1, 32, 32)
    assert batch.inputs["audio"].shape[1:] == (6400,)
    assert {e.label for e in data.examples("train")} == set(range(19))
    assert len({e.inputs["audio"] for e in data.examples("train")}) > 1000


# ---------------------------------------------------------------------------------------------------------
# Manifests


@pytest.fixture
def memes(tmp_path) -> Path:
    """A folder laid out as Hateful Memes is, with four memes a split."""
    (tmp_path / "img").mkdir()
    for split, start in (("train", 0), ("dev_seen", 10), ("dev_unseen", 20), ("test_seen", 30)):
        rows = []
        for i in range(start, start + 4):
            PILImage.new("RGB", (40, 30), (i, 0, 0)).save(tmp_path / f"img/{i:05d}.png")
            rows.append({"id": i, "img": f"img/{i:05d}.png", "label": i % 2, "text": f"meme number {i}"})
            if split == "test_seen":
                del rows[-1]["label"]
        write(tmp_path / f"{split}.jsonl", rows)
    return tmp_path


def write(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def hateful(root: Path, **options) -> Manifest:
    columns = {"image": "img", "text": "text", "id": "id"}
    files = {"train": "train.jsonl", "val": "dev_seen.jsonl", "test": "dev_unseen.jsonl"}
    return Manifest(**{"root": str(root), "classes": ["no", "yes"], **columns, **files, **options})


def test_hateful_memes_are_read(memes):
    data = hateful(memes, image_size=(8, 12))
    assert [e.id for e in data.examples("test")] == ["20", "21", "22", "23"]
    assert [e.label for e in data.examples("val")] == [0, 1, 0, 1]
    sample = data.prepared("train")[1]
    assert sample.inputs["image"].shape == (3, 8, 12)
    assert sample.layouts["text"].words == ("meme", "number", "1")
    assert data.modalities()["text"].max_length == 5
    assert "number" in data.modalities()["text"].tokenizer.vocabulary


def test_the_hateful_memes_config_fits_the_official_layout(memes, monkeypatch):
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    monkeypatch.setenv("HATEFUL_MEMES_ROOT", str(memes))
    with initialize_config_dir(str(Path(__file__).parents[1] / "conf/dataset"), version_base=None):
        data = instantiate(compose("hateful_memes"))
        other = instantiate(compose("hateful_memes", overrides=["test=test_seen.jsonl", "root=/nowhere"]))
    assert (data.name, data.classes) == ("hateful_memes", ["not-hateful", "hateful"])
    assert len(next(iter(data.test_dataloader()))) == 4
    assert data.prepared("train")[0].inputs["image"].shape == (3, 224, 224)
    text = message(lambda: other.examples("test"))
    assert text.startswith("test manifest /nowhere/test_seen.jsonl is missing. Hateful Memes is handed out by Meta AI")


def test_unlabelled_memes_cannot_be_scored(memes):
    assert message(lambda: hateful(memes, test="test_seen.jsonl").examples("test")) == (
        f"{memes / 'test_seen.jsonl'}, line 1 has no column 'label', it has id, img, text: "
        "samples without a label cannot be scored"
    )


def row(**changes):
    return {"id": 1, "img": "img/00020.png", "label": 1, "text": "some words", **changes}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"id": 1, "img": "a.png", "label": 0}], "line 1 has no column 'text', it has id, img, label"),
        ([row(), row(id=2, label=2)], "line 2: label 2 is none of the 2 classes: no, yes"),
        ([row(label="maybe")], "line 1: label 'maybe' is none of the 2 classes: no, yes"),
        ([row(label=-1)], "line 1: label -1 is none of the 2 classes"),
        ([row(label=None)], "line 1: label None is none of the 2 classes"),
        ([row(), row(id=2), row()], "line 3: id '1' is already that of line 1"),
        ([row(img=None)], "line 1: column 'img' must name a file, got None"),
        ([["not", "an", "object"]], 'line 1 must be a JSON object with named columns, got \'["not"'),
        ([], "the test split of manifest has no examples"),
    ],
)
def test_bad_rows_are_named(memes, rows, expected):
    write(memes / "dev_unseen.jsonl", rows)
    assert expected in message(lambda: hateful(memes).examples("test"))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            [row(img="img/lost.png")],
            "sample '1', image: image file {root}/img/lost.png is missing: fix the file, or set",
        ),
        ([row(img="img/torn.png")], "sample '1', image: image file {root}/img/torn.png cannot be decoded"),
        ([row(text=" ")], "sample '1', text: a text needs at least one word"),
        ([row(text=7)], "sample '1', text: a text must be a string, got int"),
        ([row(text="many " * 20)], "sample '1', text: a text of 20 words is 22 tokens with the special ones"),
    ],
)
def test_bad_samples_are_named_or_counted(memes, rows, expected):
    (memes / "img/torn.png").write_bytes((memes / "img/00020.png").read_bytes()[:50])
    write(memes / "dev_unseen.jsonl", [*rows, row(id=2)])
    strict, lenient = hateful(memes), hateful(memes, skip_bad=True)
    expected = expected.replace("{root}", str(memes))
    assert expected in message(lambda: list(strict.test_dataloader()))
    bad, good = lenient.prepared("test")
    assert isinstance(bad, BadSample)
    assert good.id == "2"
    (batch,) = lenient.test_dataloader()
    assert [s.id for s in batch.samples] == ["2"]
    assert batch.bad[0][0] == "1"
    assert expected in batch.bad[0][1]


def test_long_texts_are_cut_when_asked(memes):
    write(memes / "dev_unseen.jsonl", [row(text="many " * 20)])
    data = hateful(memes, truncate=True)
    assert data.prepared("test")[0].layouts["text"].count == 3
    assert hateful(memes, max_length=30).prepared("test")[0].layouts["text"].count == 20


def test_a_batch_of_bad_samples_is_empty(memes):
    write(memes / "dev_unseen.jsonl", [row(text="")])
    (batch,) = hateful(memes, skip_bad=True).test_dataloader()
    assert (len(batch), len(batch.bad), batch.labels.shape) == (0, 1, (0,))


def test_a_line_that_is_not_json(memes):
    (memes / "dev_unseen.jsonl").write_text(json.dumps(row()) + "\n\n{'id': 2}\n")
    assert f"{memes / 'dev_unseen.jsonl'}, line 3 is not JSON (" in message(lambda: hateful(memes).examples("test"))
    (memes / "dev_unseen.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "dev_unseen.jsonl is not UTF-8 text" in message(lambda: hateful(memes).examples("test"))


def test_missing_manifests(memes):
    assert message(lambda: hateful(memes, test="gone.jsonl", obtain="Ask Meta.").examples("test")) == (
        f"test manifest {memes / 'gone.jsonl'} is missing. Ask Meta."
    )
    assert message(lambda: hateful(memes, test=None).examples("test")) == (
        "the test split is needed, but dataset.test does not name a manifest"
    )
    # A pretrained model is evaluated without a manifest to train on.
    assert list(hateful(memes, train=None, val=None).modalities()) == ["image", "text"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"image": None, "text": None}, "a manifest needs the column of a modality"),
        ({"classes": ["one"]}, "dataset.classes must name two or more different classes, got ['one']"),
        ({"classes": ["a", "b", "a"]}, "dataset.classes must name two or more different classes"),
        ({"classes": [False, True]}, "dataset.classes is a list of names, got [False, True]; in YAML, quote yes, no"),
        ({"classes": "no"}, "dataset.classes is a list of names, got 'no'"),
        ({"num_workers": -1}, "dataset.num_workers must be a whole number, 0 or more, got -1"),
        ({"batch_size": "8"}, "dataset.batch_size must be a positive whole number, got '8'"),
    ],
)
def test_bad_manifest_options_are_named(memes, options, expected):
    assert expected in message(lambda: hateful(memes, **options))


@pytest.mark.parametrize("option", ["train_size", "val_size", "test_size", "audio_length"])
@pytest.mark.parametrize("value", [1e3, 0, -1])
def test_sizes_of_digit_sum_are_counts(option, value):
    expected = f"dataset.{option} must be a whole number, at least 1, got {value!r}"
    assert expected in message(lambda: DigitSum(root="anywhere", **{option: value}))


def test_a_number_is_a_square_and_a_grey(memes):
    image = hateful(memes, image_size=32, image_mean=0.5, image_std=0.5).modalities()["image"]
    assert image.shape == (1, 32, 32)


def test_one_modality_may_be_named_without_a_list(memes):
    assert list(hateful(memes, use="image").modalities()) == ["image"]


def test_donors_do_not_depend_on_a_limit(memes):
    """Which samples an attack may take parts from would else depend on an option that decides nothing else."""
    found = [[sample.id for sample in donors(hateful(memes, val_limit=limit))] for limit in (None, 2)]
    assert found == [["10", "11", "12", "13"]] * 2


def test_fewer_groups_than_processes_is_told(memes):
    data = hateful(memes)
    data.trainer = SimpleNamespace(global_rank=1, world_size=64)
    assert message(data.test_dataloader).startswith("the test split of manifest has 4 groups")
    assert "fewer than the 64 processes" in message(data.val_dataloader)


def test_labels_are_names_or_places(memes):
    write(memes / "dev_unseen.jsonl", [row(id=i, label=x) for i, x in enumerate(["yes", 0, "1", "no"])])
    assert [e.label for e in hateful(memes).examples("test")] == [1, 0, 1, 0]
    write(memes / "dev_unseen.jsonl", [row(id=i, label=x) for i, x in enumerate([1, "2"])])
    assert [e.label for e in hateful(memes, classes=["1", "2"]).examples("test")] == [0, 1]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\x00"), min_size=1).filter(str.split),
        min_size=1,
        max_size=5,
    )
)
def test_texts_of_any_script_are_read_as_they_are(tmp_path_factory, texts):
    root = tmp_path_factory.mktemp("texts")
    write(root / "a.jsonl", [{"text": text, "label": 0} for text in texts])
    (root / "b.jsonl").write_text(
        "".join(json.dumps({"text": text, "label": 0}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8"
    )
    with (root / "c.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([["text", "label"], *([text, "0"] for text in texts)])
    data = Manifest(str(root), ["no", "yes"], train="a.jsonl", val="b.jsonl", test="c.csv", text="text")
    for split in ("train", "val", "test"):
        assert [e.inputs["text"] for e in data.examples(split)] == texts
    assert [e.id for e in data.examples("test")] == [f"test-{i}" for i in range(len(texts))]


def test_sounds_in_a_csv_manifest(tmp_path):
    wavfile.write(tmp_path / "a.wav", 16000, np.zeros(1000, np.int16))
    (tmp_path / "broken.wav").write_bytes(b"RIFF....WAVE")
    (tmp_path / "test.csv").write_text('file,said,label\na.wav,"one, two",yes\na.wav,three,no\nbroken.wav,four,no\n')
    data = Manifest(
        str(tmp_path), ["no", "yes"], test="test.csv", audio="file", text="said", audio_length=700, audio_rate=8000
    )
    assert [e.label for e in data.examples("test")] == [1, 0, 0]
    samples = data.prepared("test")
    assert samples[0].layouts["audio"].count == 500
    assert samples[0].layouts["text"].words == ("one,", "two")
    assert Batch.of([samples[0], samples[1]]).inputs["audio"].shape == (1, 700)
    assert f"audio file {tmp_path / 'broken.wav'} cannot be decoded as WAV" in message(lambda: samples[2])
    named = PreparedDataset([Example("0", {"text": tmp_path / "said.txt"}, 0)], {"text": scratch_text(["one"])}, 2)
    assert f"Text takes its input itself, not the file {tmp_path / 'said.txt'} that it" in message(lambda: named[0])
    (tmp_path / "test.csv").write_text("file,said,label\na.wav,one\n")
    assert "line 2 has no column 'label', it has file, said" in message(
        lambda: Manifest(str(tmp_path), ["a", "b"], test="test.csv", audio="file").examples("test")
    )


@pytest.mark.parametrize("name", ["easy_vqa", "digit_sum", "manifest", "hateful_memes"])
def test_every_config_builds_its_dataset(name):
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    with initialize_config_dir(str(Path(__file__).parents[1] / "conf/dataset"), version_base=None):
        data = instantiate(compose(name, overrides=["root=x", "classes=[a,b]", "text=t"] if name == "manifest" else []))
    assert isinstance(data, MultimodalData)
    assert len(data.classes) >= 2
