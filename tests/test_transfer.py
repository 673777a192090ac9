"""Whether what flips one model flips another: matrices worked out by hand, and the real command on two models."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, muroan
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from torch import nn

from muroan.data.base import MultimodalData
from muroan.data.samples import Example, PreparedDataset, Sample
from muroan.errors import MuroanError
from muroan.metrics import bootstrap
from muroan.modalities import Audio, Image, Layout, Modality, Region, Removal, Text, WordTokenizer
from muroan.models.base import MultimodalModel
from muroan.report.transfer import write as write_matrices
from muroan.results import AttackResult, Count, RunFolder
from muroan.training.module import load_weights, weights_hash
from muroan.transfer import Build, Cell, Source, ask, fitted, measure

WORDS = ["a", "b", "c", "d"]


class Toy(MultimodalModel):
    """The class of three that a rule gives for which pixels (B, side, side) and words (B, 4) are present."""

    def __init__(self, rule: Callable[..., torch.Tensor], side: int = 2, weight: float = 0.0, tokens: int = 6):
        text = Text(WordTokenizer(WORDS), tokens, truncate=True)
        super().__init__({"image": Image((side, side), mean=(0.5,), std=(0.5,)), "text": text}, num_classes=3)
        self.rule, self.side = rule, side
        self.unused = nn.Parameter(torch.tensor([float(weight)]))  # so that each toy has weights of its own
        self.rows = 0
        self.eval()

    def encode(self, modality, x):
        if modality == "image":
            return (x.flatten(1) != 0).float()
        return torch.stack([(x == 5 + i).any(1) for i in range(4)], 1).float()

    def fuse(self, features):
        self.rows += len(features["text"])
        return torch.cat([features["image"], features["text"]], 1)

    def head(self, embedding):
        image, words = embedding[:, :-4].bool(), embedding[:, -4:].bool()
        label = self.rule(image.view(-1, self.side, self.side), words)
        return nn.functional.one_hot(label, 3).float()


def corner(image: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """1 without the top left pixel, else 2 without the word a, else 0."""
    return torch.where(~image[:, 0, 0], 1, torch.where(~words[:, 0], 2, 0))


def top(image: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """2 without the word a or d, else 1 without the upper half, else 0."""
    half = image[:, : image.shape[1] // 2].flatten(1).any(1)
    return torch.where(~words[:, 0] | ~words[:, 3], 2, torch.where(~half, 1, 0))


TEXTS = ["a b c d", "a b c d", "a b c d", "a b c d", "a b c", "a b c d"]  # the model `top` gets the fifth wrong
EXAMPLES = [
    Example(f"s{i}", {"image": np.full((2, 2), 255, np.uint8), "text": text}, 0) for i, text in enumerate(TEXTS)
]

PIXEL, HALF = Region("image", (0, 0), (1, 1)), Region("image", (0, 0), (1, 2))
A, D = Region("text", (0,), (1,)), Region("text", (3,), (4,))

# What was found on each model, and the wrong class that it led to.
ON_CORNER = {0: ([PIXEL], 1), 1: ([A], 2), 2: ([HALF], 1), 3: ([PIXEL, A], 1), 4: ([PIXEL], 1), 5: None}
ON_TOP = {0: ([D], 2), 1: ([A], 2), 2: ([HALF], 1), 3: None, 5: None}
Found = Mapping[int, "tuple[list[Region], int] | None"]


def records(found: Found, attack: str = "guided", kind: Any = "removal") -> list[AttackResult]:
    made = []
    for index, flip in found.items():
        total = {"image": 4, "text": len(TEXTS[index].split())}
        record = AttackResult(f"s{index}", index, attack, 0, 0, 0, "held", total=total, kind=kind)
        if flip is not None:
            regions, record.adversarial_label = flip
            record.status = "flipped"
            record.regions = [(r.modality, r.start, r.stop) for r in regions]
            record.removed = {r.modality: r.area for r in regions}
        record.ledger = {"search": Count(1, 1, 0)}
        made.append(record)
    return made


def source(name: str, found: Found) -> Source:
    return Source(name, records(found), Toy(corner).modalities)


def samples(model: MultimodalModel) -> list[Sample]:
    return list(PreparedDataset(EXAMPLES, model.modalities, classes=3))


def asked(name: str, model: MultimodalModel, **options: Any) -> list[Cell]:
    sources = [source("corner", ON_CORNER), source("top", ON_TOP)]
    return ask(name, model, samples(model), sources, **options)


def figures(cell: Cell) -> list[float | None]:
    return [cell.flipped, cell.left_out, cell.n, cell.rate["value"], cell.same_class]


def write(folders: list[Path], out: Path, build: Build) -> Path:
    return write_matrices(*measure(folders, build), out)


class TestByHand:
    def test_matrix(self):
        by_itself, from_top = asked("corner", Toy(corner))
        assert figures(by_itself) == [5, 0, 5, 100.0, 100.0]
        # Without d it stays, without a it says 2 as `top` does, without the upper half 1, too.
        assert figures(from_top) == [3, 0, 3, pytest.approx(200 / 3), pytest.approx(200 / 3)]
        assert [by_itself.own, from_top.own] == [True, False]
        from_corner, by_itself = asked("top", Toy(top))
        # Four count: it gets the fifth wrong. The pixel alone holds; pixel and a together lead to another class.
        assert figures(from_corner) == [5, 0, 4, 75.0, 50.0]
        assert figures(by_itself) == [3, 0, 3, 100.0, 100.0]
        assert from_corner.rate == bootstrap(np.array([0.0, 100, 100, 100]))

    @pytest.mark.parametrize("batch_size", [1, 3, 64])
    def test_does_not_depend_on_the_batch_size(self, batch_size):
        assert asked("top", Toy(top), batch_size=batch_size) == asked("top", Toy(top))

    def test_one_pass_for_all_sources(self):
        model = Toy(top)
        asked("top", model)
        # Five clean questions; s0 two removals, s1 and s2 one that both found, s3 one. The first batch is run twice,
        # to check that the model repeats itself.
        assert model.rows == 5 + 5 + 5

    def test_a_larger_image_loses_the_same_part(self):
        from_corner, from_top = asked("large", Toy(top, side=6))
        assert figures(from_corner) == [5, 0, 4, 75.0, 50.0]
        assert figures(from_top) == [3, 0, 3, 100.0, 100.0]

    def test_the_replacement_is_the_sources(self):
        cells = asked("top", Toy(top), replacement={"image": "mean"})
        # The mean of a white picture is white: nothing is gone, and only words flip.
        assert figures(cells[0])[2:4] == [4, 50.0]
        with pytest.raises(MuroanError, match=r"image .*can be replaced by zero.*, got 'red'"):
            asked("top", Toy(top), replacement={"image": "red"})

    def test_texts_of_other_lengths_are_left_out_and_counted(self):
        from_corner, from_top = asked("short", Toy(corner, tokens=5))  # three words alone
        assert figures(from_corner) == [5, 2, 3, 100.0, 100.0]  # s1 and s3 took words away
        assert figures(from_top) == [3, 2, 1, 100.0, 100.0]

    def test_samples_that_are_not_there_are_left_out_and_counted(self):
        model = Toy(corner)
        (cell,) = ask("corner", model, samples(model)[1:3], [source("corner", ON_CORNER)])
        assert figures(cell) == [5, 3, 2, 100.0, 100.0]

    def test_nothing_was_found(self):
        (cell,) = ask("corner", Toy(corner), samples(Toy(corner)), [source("top", {0: None})])
        assert figures(cell) == [0, 0, 0, None, None]

    def test_another_label_is_another_dataset(self):
        model = Toy(top)
        found = source("corner", ON_CORNER)
        found.records[2].label = 2
        with pytest.raises(MuroanError, match=r"'s2' is of class 0 in the data of top, and of class 2 .* of corner"):
            ask("top", model, samples(model), [found])


class TestFitted:
    def fit(self, region: Region, before: Modality, total: int, after: Modality, grid: tuple[int, ...]) -> Any:
        record = records({0: ([region], 1)})[0]
        record.total[region.modality] = total
        name = region.modality
        return fitted(record, {name: before}, {name: after}, {name: Layout(grid)})

    def test_images_by_hand(self):
        removal = self.fit(PIXEL, Image((2, 2)), 4, Image((4, 6)), (4, 6))
        assert removal == Removal.of(Region("image", (0, 0), (2, 3)))
        middle = Region("image", (1, 1), (2, 2))
        # A third of each side, from 2/3 to 4/3 of two: outwards that is all.
        assert self.fit(middle, Image((3, 3)), 9, Image((2, 2)), (2, 2)) == Removal.of(Region("image", (0, 0), (2, 2)))

    @given(st.integers(1, 300), st.integers(1, 300), st.data())
    def test_outwards_and_by_less_than_an_element(self, old, new, data):
        a = data.draw(st.integers(0, old - 1))
        b = data.draw(st.integers(a + 1, old))
        before, after = Image((old, old)), Image((new, new))
        (region,) = self.fit(Region("image", (a, 0), (b, old)), before, old**2, after, (new, new)).regions
        assert 0 <= region.start[0] <= a * new / old < region.start[0] + 1
        assert region.stop[0] - 1 < b * new / old <= region.stop[0] <= new
        assert (region.start[1], region.stop[1]) == (0, new)
        if old == new:
            assert (region.start[0], region.stop[0]) == (a, b)

    def test_sounds(self):
        second = Region("audio", (1000,), (2000,))
        kilo, double = Audio(8000, 1000), Audio(16000, 2000)
        assert self.fit(second, kilo, 4000, kilo, (4000,)) == Removal.of(second)
        assert self.fit(second, kilo, 4000, double, (8000,)) == Removal.of(Region("audio", (2000,), (4000,)))
        assert self.fit(second, kilo, 4000, double, (8001,)) is not None  # resampling rounds
        assert self.fit(second, kilo, 4000, Audio(3000, 1000), (3000,)) is None  # its end was cut off

    def test_a_record_of_another_model_is_refused(self):
        with pytest.raises(MuroanError, match=r"'s0' has 4 elements of image, its model takes \(3, 3\)"):
            self.fit(PIXEL, Image((3, 3)), 4, Image((2, 2)), (2, 2))


# ---------------------------------------------------------------------------------------------------------
# Run folders with toys in them


class Six(MultimodalData):
    name, classes = "six", ["no", "yes", "what"]

    def load(self, split):
        return EXAMPLES

    def natural_modalities(self):
        return Toy(corner).modalities


def toys() -> dict[str, Toy]:
    return {"corner": Toy(corner, weight=1), "top": Toy(top, weight=2), "large": Toy(top, side=6, weight=3)}


def build(about: Mapping[str, Any]) -> tuple[MultimodalData, MultimodalModel]:
    model = toys()[about["config"]["toy"]]
    data = Six(test_limit=2)
    data.prepare_for(model.modalities)
    return data, model


def write_run(
    path: Path,
    toy: str,
    found: Found,
    attack: str = "guided",
    model: str | None = None,
    seed: int = 0,
    replacement: str | None = None,
    setting: int = 0,
    finish: bool = True,
    kind: str = "removal",
    **more: Any,
) -> Path:
    model = model or toy
    threat_model = {"replacement": {"image": replacement, "text": None, "audio": None}, "max_queries": 9}
    own = {"attack": {"setting": setting}, "threat_model": threat_model}
    folder = RunFolder(path)
    about = {
        "identity": {**own, "model": {"toy": toy}, "seed": seed},
        "attack": attack,
        "model": model,
        "dataset": "six",
        "modalities": ["image", "text"],
        "classes": Six.classes,
        "seed": seed,
        "checkpoint": {"path": None, "sha256": weights_hash(toys()[toy])},
        "config": {"toy": toy, "training": {"epochs": 1}},
    }
    folder.start({**about, **more})
    for record in records(found, attack, kind):
        folder.append(record)
    folder.close()
    if finish:
        folder.finish()
    return path


def two(path: Path, **options: Any) -> Path:
    write_run(path / f"corner-{len(options)}", "corner", ON_CORNER, **options)
    write_run(path / f"top-{len(options)}", "top", ON_TOP, **options)
    return path


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def rates(path: Path) -> dict[tuple[str, str], float]:
    return {(line["source"], line["target"]): float(line["rate"]) for line in read_csv(path)}


BY_HAND = {
    ("corner", "corner"): 100.0,
    ("corner", "top"): 75.0,
    ("top", "corner"): pytest.approx(200 / 3),
    ("top", "top"): 100.0,
}


class TestRuns:
    def test_files_hold_the_matrix(self, tmp_path):
        page = write([two(tmp_path / "runs")], tmp_path / "out", build)
        out = page.parent
        assert rates(out / "transfer.csv") == BY_HAND
        (line,) = (x for x in read_csv(out / "transfer.csv") if (x["source"], x["target"]) == ("corner", "top"))
        assert [line[name] for name in ("attack", "dataset", "n", "same_class", "flipped", "left_out")] == [
            *("guided", "six", "4", "50.0", "5", "0"),
        ]
        spread = bootstrap(np.array([0.0, 100, 100, 100]))
        assert [float(line["low"]), float(line["high"])] == [spread["low"], spread["high"]]
        text = page.read_text()
        assert "**six · guided**" in text
        assert re.search(r"\| corner +\| +100\.0, n 5 \| +75\.0 \[25\.0, 100\.0\], n 4 \|", text)
        assert re.search(r"\| corner +\| +100\.0 \| +50\.0 \|", text)
        assert len({len(line) for line in text.splitlines() if line[:1] == "|"}) == 2
        assert "Warning" not in text

    def test_the_same_records_give_the_same_bytes(self, tmp_path):
        two(tmp_path / "runs")
        one, other = (write([tmp_path / "runs"], tmp_path / name, build).parent for name in ("one", "other"))
        names = sorted(file.name for file in one.iterdir())
        assert names == ["transfer.csv", "transfer.md", "transfer.png", "transfer.tex"]
        for name in names:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
        with PILImage.open(one / "transfer.png") as picture:
            assert min(picture.size) > 300

    def test_other_threat_models_and_settings_are_other_groups(self, tmp_path):
        two(tmp_path / "runs")
        two(tmp_path / "runs", replacement="mean")
        two(tmp_path / "runs", setting=3, attack="other")
        two(tmp_path / "runs", setting=4, attack="other", kind="removal")
        out = write([tmp_path / "runs"], tmp_path / "out", build).parent
        lines = read_csv(out / "transfer.csv")
        assert list(dict.fromkeys(line["attack"] for line in lines)) == [
            "guided (threat_model.replacement.image=None)",
            "guided (threat_model.replacement.image=mean)",
            "other (attack.setting=3)",
            "other (attack.setting=4)",
        ]
        found = {
            line["attack"]: line["rate"] for line in lines if (line["source"], line["target"]) == ("corner", "top")
        }
        assert list(found.values()) == ["75.0", "50.0", "75.0", "75.0"]

    def test_a_group_of_one_model_is_left_out_and_said(self, tmp_path):
        two(tmp_path / "runs")
        write_run(tmp_path / "runs/x", "corner", ON_CORNER, attack="lonely")
        write_run(tmp_path / "runs/y", "top", ON_TOP, finish=False)
        write_run(tmp_path / "runs/z", "top", ON_TOP, kind="corruption", attack="noise")
        write_run(tmp_path / "runs/w", "large", ON_TOP, smoothed=True)
        page = write([tmp_path / "runs"], tmp_path / "out", build)
        assert rates(page.with_suffix(".csv")) == BY_HAND
        assert "six · lonely: left out, as corner is the only model." in page.read_text()
        assert (
            "3 of 6 runs have no part in this: 1 corruption, 1 of a vote over ablations, 1 unfinished."
            in page.read_text()
        )

    def test_checkpoints_of_one_model_are_models_with_a_seed(self, tmp_path):
        write_run(tmp_path / "runs/a", "corner", ON_CORNER, model="m", seed=0)
        write_run(tmp_path / "runs/b", "top", ON_TOP, model="m", seed=10)
        write_run(tmp_path / "runs/c", "large", {0: None}, model="m", seed=9)
        lines = read_csv(write([tmp_path / "runs"], tmp_path / "out", build).with_suffix(".csv"))
        names = [f"m (model.toy={toy}, seed={seed})" for toy, seed in (("corner", 0), ("large", 9), ("top", 10))]
        assert list(dict.fromkeys(line["source"] for line in lines)) == names
        assert [line["rate"] for line in lines if line["source"] == names[1]] == ["", "", ""]

    def test_two_runs_on_one_model_are_two_rows(self, tmp_path):
        two(tmp_path / "runs")
        write_run(tmp_path / "runs/again", "top", {0: ([A], 2)}, seed=1)
        lines = rates(write([tmp_path / "runs"], tmp_path / "out", build).with_suffix(".csv"))
        assert {source for source, _ in lines} == {"corner", "top, top-0", "top, again"}
        assert {target for _, target in lines} == {"corner", "top"}
        assert lines["top, again", "corner"] == lines["top, again", "top"] == 100

    def test_noise_is_that_of_the_source(self, tmp_path):
        two(tmp_path / "runs", replacement="noise")
        write_run(tmp_path / "runs/again", "top", ON_TOP, seed=1, replacement="noise")
        page = write([tmp_path / "runs"], tmp_path / "out", build)
        assert len(rates(page.with_suffix(".csv"))) == 6

    def test_what_flips_no_label_is_not_transferred(self):
        found = source("x", {0: ([PIXEL], 1), 1: ([A], 2)})
        turned = replace(found.records[0], adversarial_label=found.records[0].label)
        assert replace(found, records=[turned, *found.records[1:]]).flipped == [found.records[1]]

    def test_a_diagonal_below_all_is_warned_of(self, tmp_path):
        two(tmp_path / "runs")
        write_run(tmp_path / "runs/large", "large", ON_TOP | {3: ([PIXEL], 1)})  # in pixels of another image
        with pytest.raises(MuroanError, match=r"six · guided, asking .*: the record of sample 's2' has 4 elements"):
            write([tmp_path / "runs"], tmp_path / "out", build)
        shutil.rmtree(tmp_path / "runs/large")
        write_run(tmp_path / "runs/wrong", "top", {0: ([PIXEL], 1), 1: ([A], 2)}, attack="wrong")
        write_run(tmp_path / "runs/right", "corner", ON_CORNER, attack="wrong")
        page = write([tmp_path / "runs"], tmp_path / "out", build)
        assert "Warning: six · wrong: top is flipped again by 1 of its own 2 removals, not by all" in page.read_text()
        assert page.read_text().count("Warning") == 1
        assert "Warning: six" in page.with_suffix(".tex").read_text()

    @pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
    def test_latex_compiles(self, tmp_path):
        two(tmp_path / "runs", attack="50%_of #1")
        write([tmp_path / "runs"], tmp_path, build)
        body = r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{transfer}\end{document}"
        (tmp_path / "page.tex").write_text(body)
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout[-2000:]

    def test_latex_has_all_cells(self, tmp_path):
        two(tmp_path / "runs", attack="50%_of #1")
        text = write([tmp_path / "runs"], tmp_path / "out", build).with_suffix(".tex").read_text()
        assert r"six $\cdot$ 50\%\_of \#1" in text
        assert r"corner & 100.0 & 75.0 \\" in text
        assert r" & {\tiny n 5} & {\tiny {[}25.0, 100.0], n 4} \\[2pt]" in text
        rows = [line for line in text.splitlines() if line.count("&") and "multicolumn" not in line]
        assert {line.count("&") for line in rows} == {2}


class TestRefuses:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"finish": False}, r"none of these 2 run\(s\) is a finished removal attack \(2 unfinished\)"),
            ({"kind": "perturbation"}, r"is a finished removal attack \(2 value-choosing\)"),
            ({"checkpoint": {"path": "gone/best.ckpt", "sha256": "x"}}, r"corner-1: checkpoint gone/best.ckpt is not"),
            ({"checkpoint": {"path": None, "sha256": "x"}}, "corner-1: the model has changed since it was attacked"),
            ({"config": None}, r"corner-1: its run.json does not say what was attacked"),
            ({"replacement": "red"}, r"six · guided, asking corner: image .* got 'red'"),
        ],
    )
    def test_bad_runs(self, options, expected, tmp_path):
        # Hand-made weights are the same for both: the models' names tell them apart.
        with pytest.raises(MuroanError, match=expected) as refused:
            write([two(tmp_path / "runs", **options)], tmp_path / "out", build)
        assert "\n" not in str(refused.value)
        assert not (tmp_path / "out").exists()

    def test_one_model(self, tmp_path):
        write_run(tmp_path / "a", "corner", ON_CORNER)
        write_run(tmp_path / "b", "top", ON_TOP, attack="other")
        expected = r"at least two models are needed.*: six · guided has corner; six · other has top"
        with pytest.raises(MuroanError, match=expected):
            write([tmp_path], tmp_path / "out", build)

    def test_dataset_that_is_gone(self, tmp_path):
        class Gone(Six):
            def load(self, split):
                raise MuroanError("dataset.root=data is not a folder")

        with pytest.raises(MuroanError, match=r"corner-0: dataset.root=data is not a folder"):
            write([two(tmp_path / "runs")], tmp_path / "out", lambda about: (Gone(), build(about)[1]))


# ---------------------------------------------------------------------------------------------------------
# The real command on two trained models


@pytest.fixture(scope="module")
def attacked(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an attack on each of two models, the second trained and attacked here, on other samples."""
    folder = tmp_path_factory.mktemp("transfer")
    common = ("attack=random_removal", "attack.draws=30", "engine.keep_media=0", "tracker=none")
    second = (*SMALL, "dataset.train_limit=1200", "model=concat", "seed=1", f"folders.train={folder / 'second'}")
    muroan("train", *second, "dataset.test_limit=8", "tracker=none", cwd=folder)
    first = (*SMALL, f"folders.train={trained}")
    muroan("attack", *first, *common, "dataset.test_limit=60", f"out={folder / 'runs/first'}", cwd=folder)
    muroan("attack", *second, *common, "dataset.test_limit=80", f"out={folder / 'runs/second'}", cwd=folder)
    return folder


def by_plain_forwards(run: Path, found: list[AttackResult]) -> list[tuple[int, int]]:
    """The model's class before and after each removal, one sample at a time, without engine or batches."""
    about = json.loads((run / "run.json").read_text())
    config = about["config"]
    config["dataset"]["test_limit"] = None
    data = instantiate(config["dataset"])
    model = instantiate(config["model"])(modalities=data.modalities(), num_classes=len(data.classes))
    load_weights(model.eval(), Path(about["checkpoint"]["path"]))
    data.prepare_for(model.modalities)
    place = {example.id: i for i, example in enumerate(data.examples("test"))}
    labels = []
    for record in found:
        sample = data.prepared("test")[place[record.id]]
        inputs = {name: x[None] for name, x in sample.inputs.items()}
        after = dict(inputs)
        for name, modality in model.modalities.items():
            boxes = [modality.box(r, sample.layouts[name]) for r in record.removal.only(name).regions]
            if boxes:
                after[name] = modality.occlude(inputs[name], torch.tensor([boxes]), modality.replacements[0], None)
        with torch.inference_mode():
            labels.append(tuple(int(model(x).logits.argmax()) for x in (inputs, after)))
    return labels


class TestCommand:
    def test_agrees_with_plain_forwards(self, attacked):
        done = muroan("transfer", "runs=[runs]", "device=cpu", "engine.batch_size=16", cwd=attacked)
        out = attacked / "outputs/transfer"
        assert (out / "transfer.md").read_text() in done.stdout
        assert "Warning" not in done.stdout
        names = {"mmbt": "first", "concat": "second"}
        lines = {(line["source"], line["target"]): line for line in read_csv(out / "transfer.csv")}
        assert set(lines) == {(a, b) for a in names for b in names}
        for (a, b), line in lines.items():
            found = [r for r in RunFolder(attacked / "runs" / names[a]).records() if r.flipped]
            answers = by_plain_forwards(attacked / "runs" / names[b], found)
            told = [(r, after) for r, (before, after) in zip(found, answers, strict=True) if before == r.label]
            assert [int(line["flipped"]), int(line["n"]), int(line["left_out"])] == [len(found), len(told), 0]
            assert len(told) >= 5
            assert float(line["rate"]) == pytest.approx(100 * np.mean([after != r.label for r, after in told]))
            same = 100 * np.mean([after == r.adversarial_label for r, after in told])
            assert float(line["same_class"]) == pytest.approx(same)
            if a == b:
                assert [line["rate"], line["same_class"], line["n"]] == ["100.0", "100.0", line["flipped"]]
        assert all((out / f"transfer.{kind}").stat().st_size for kind in ("tex", "png"))

    def test_refusals_are_one_line(self, attacked, tmp_path):
        def refused() -> str:
            done = muroan("transfer", "runs=[runs]", "device=cpu", cwd=tmp_path, check=False)
            assert done.returncode == 1
            assert "Traceback" not in done.stderr
            return done.stderr.splitlines()[-1]

        shutil.copytree(attacked / "runs", tmp_path / "runs")
        path = tmp_path / "runs/second/run.json"
        about = json.loads(path.read_text())
        checkpoint = tmp_path / "best.ckpt"
        content = torch.load(about["checkpoint"]["path"], weights_only=True)
        next(iter(content["state_dict"].values())).add_(1)
        torch.save(content, checkpoint)
        path.write_text(json.dumps({**about, "checkpoint": {**about["checkpoint"], "path": str(checkpoint)}}))
        assert re.match(rf"muroan transfer: second: {checkpoint} has changed since it was attacked", refused())
        dataset = {**about["config"]["dataset"], "_target_": "muroan.data.digit_sum.DigitSum", "root": "nowhere"}
        del dataset["val_pictures"]
        path.write_text(json.dumps({**about, "config": {**about["config"], "dataset": dataset}}))
        assert "second: dataset.root=nowhere is not a folder" in refused()
