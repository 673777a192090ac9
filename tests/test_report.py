"""The report: synthetic runs of two attacks on two models, with real pictures, and what the page says of them."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import easy_vqa
import numpy as np
import pytest
from PIL import Image as PILImage

from muroan.errors import MuroanError
from muroan.metrics import summarise
from muroan.modalities import Audio, Image, Region, Removal, Text, WordTokenizer, removed_elements
from muroan.report import build, plots
from muroan.report.examples import choose, draw, draw_all
from muroan.report.html import _strongest, finding
from muroan.report.paired import against_controls
from muroan.report.tables import figure
from muroan.report.tracked import _cells
from muroan.results import AttackResult, Count, RunFolder, read_records
from muroan.runs import find_runs

CLASSES = easy_vqa.get_answers()
VOID = {"meta", "img", "source", "br", "link", "input", "hr"}


def pictured(seed: int, n: int):
    """The inputs of EasyVQA's first test questions about different pictures, prepared for display."""
    questions, answers, pictures = easy_vqa.get_test_questions()
    paths = easy_vqa.get_test_image_paths()
    image, text = Image((64, 64)), Text(WordTokenizer.from_texts(questions), 16)
    for index in range(n):
        i = (7 * index + seed) % len(questions)
        raw = {"image": PILImage.open(paths[pictures[i]]), "text": questions[i]}
        parts = {"image": image.prepare(raw["image"]), "text": text.prepare(raw["text"])}
        media = {"image": image.display(*parts["image"]), "text": text.display(*parts["text"])}
        yield {name: layout for name, (_, layout) in parts.items()}, media, CLASSES.index(answers[i])


def spoken(seed: int, n: int):
    """A picture and a sound: a few decaying tones a sample."""
    paths = easy_vqa.get_test_image_paths()
    image, audio = Image((64, 64)), Audio(16000, 16000)
    time = np.arange(14000) / 16000
    for index in range(n):
        wave = sum(
            np.sin(2 * np.pi * f * time) * np.exp(-((time - at) ** 2) / 0.004)
            for f, at in ((220, 0.2), (330, 0.45 + 0.01 * index), (440, 0.7))
        )
        parts = {"image": image.prepare(PILImage.open(paths[index + seed])), "audio": audio.prepare(0.3 * wave)}
        media = {"image": image.display(*parts["image"]), "audio": audio.display(*parts["audio"])}
        yield {name: layout for name, (_, layout) in parts.items()}, media, index % 2


def draw_region(rng, name, layout):
    """A box of random place and size, mostly small."""
    if name == "text":
        start = (int(rng.integers(0, layout.grid[0])),)
        return Region(name, start, (start[0] + 1,))
    share = 2.0 ** -float(rng.integers(1, 6))
    sides = [max(1, int(side * share)) for side in layout.grid]
    start = tuple(int(rng.integers(0, n - side + 1)) for n, side in zip(layout.grid, sides, strict=True))
    return Region(name, start, tuple(a + side for a, side in zip(start, sides, strict=True)))


def attack_records(attack, samples, seed, clean=0.85, success=0.75, effort=60.0, shown=24) -> list[AttackResult]:
    """Records as an engine would write them, with random outcomes."""
    records = []
    for index, (layouts, media, label) in enumerate(samples):
        rng = np.random.default_rng((seed, index))
        total = {name: layout.count for name, layout in layouts.items()}
        record = AttackResult(f"q{index:05d}", index, attack, label, label, label, "held", total=total)
        record.ledger = {"clean": Count(0, 1, 0)}
        if index < shown:
            record.media = media
        if rng.random() > clean:
            record.status = "skipped"
            record.clean_label = record.adversarial_label = (label + 1) % 2
        else:
            asked = int(rng.lognormal(np.log(effort), 0.9)) + 1
            record.ledger["salient"] = Count(asked // 3 + 1, asked // 4 + 1, asked // 12)
            record.ledger["combine"] = Count(asked - asked // 3, asked - asked // 2, asked // 7)
            record.ledger["verify"] = Count(0, 1, 0)
            draw = rng.random()
            if draw < success:
                names = [[min(layouts)], [max(layouts)], sorted(layouts)][int(rng.integers(0, 3))]
                removal = Removal.of(*(draw_region(rng, name, layouts[name]) for name in names))
                if rng.random() < 0.3:
                    removal |= Removal.of(draw_region(rng, "image", layouts["image"]))
                record.regions = [(r.modality, r.start, r.stop) for r in removal.regions]
                record.removed = {n: bits.bit_count() for n, bits in removed_elements(removal, layouts).items()}
                record.status, record.adversarial_label = "flipped", (label + 1) % 2
                record.one_minimal = bool(rng.random() < 0.6)
                record.interaction = bool(rng.random() < 0.5) if len(removal.modalities) > 1 else None
            elif draw > 0.92:
                record.status = "budget_exhausted"
        records.append(record)
    return records


def write_run(path: Path, attack, model, dataset, records, finish=True, **about) -> RunFolder:
    folder = RunFolder(path)
    run = {
        "identity": {"attack": attack, "model": model},
        "attack": attack,
        "model": model,
        "dataset": dataset,
        "classes": CLASSES,
        "modalities": ["image", "text"],
        "config": {"attack": {"_target_": f"muroan.attacks.{attack}", "max_queries": 500}},
        "versions": {"muroan": "0.1.0", "torch": "2.13.0"},
        "seed": 0,
        "checkpoint": {"path": f"outputs/{model}.ckpt", "sha256": model * 4},
        "unreadable": [["q00099", "cannot identify image file"]],
    }
    folder.start({**run, **about})
    for record in records:
        folder.append(record)
    folder.close()
    if finish:
        folder.finish()
    return folder


def write_runs(path: Path, n: int) -> Path:
    """Two attacks on two models of pictures and questions, and one on pictures and sounds."""
    for model, clean, success in (("mmbt", 0.9, 0.77), ("late_fusion", 0.8, 0.9)):
        for attack, chance, effort in (("decoupling_reference", success, 60.0), ("random_removal", 0.3, 200.0)):
            records = attack_records(attack, pictured(len(model), n), len(model + attack), clean, chance, effort)
            write_run(path / f"{attack}-{model}", attack, model, "easy_vqa", records)
    records = attack_records("decoupling_reference", spoken(3, n // 2), 3)
    write_run(path / "spoken", "decoupling_reference", "mult", "spoken_shapes", records)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return write_runs(tmp_path_factory.mktemp("runs"), 40)


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory) -> Path:
    return build([runs], tmp_path_factory.mktemp("report")).parent


@pytest.fixture
def no_curves(monkeypatch):
    """Leave out the drawing, which takes most of the time, where a test is about something else."""
    monkeypatch.setattr("muroan.report.plots.curve", lambda *_, **__: b"")


class Page(HTMLParser):
    """Checks that every tag is closed in its place, and collects tags, resources and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.resources: list[str] = []
        self.classes: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        assert self.open == []

    def note(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), f"{tag} has a handler"
            if name in {"src", "href", "srcset", "action", "data", "poster"}:
                self.resources.append(value)
            if name == "class":
                self.classes.extend(value.split())

    def handle_starttag(self, tag, attributes):
        self.note(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.note(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)


def read(report: Path) -> Page:
    return Page((report / "report.html").read_text(encoding="utf-8"))


class TestPage:
    def test_well_formed_and_self_contained(self, report):
        page = read(report)
        assert all(resource.startswith("data:image/png;base64,") for resource in page.resources)
        assert "script" not in page.tags
        css = "".join(page.text["style"])
        assert "http" not in css
        assert "@import" not in css
        assert not re.findall(r"url\(", css)

    def test_says_the_finding_and_its_figures(self, report, runs):
        folder = RunFolder(runs / "decoupling_reference-mmbt")
        rate = summarise(folder.records())["attack_success_rate"]["value"]
        text = "".join(read(report).text["p"])
        assert f"decoupling_reference flips {rate:.1f} % of the samples that mmbt gets right on easy_vqa" in text
        assert "random_removal flips" in text

    def test_examples(self, report):
        page = read(report)
        assert page.classes.count("example") >= 12
        assert {"picture", "wave", "words", "edge"} <= set(page.classes)
        assert "del" in page.tags

    def test_notes_unreadable_samples(self, report):
        assert "could not be read" in "".join(read(report).text["li"])

    def test_hostile_text_is_shown_and_not_run(self, tmp_path):
        (_, media, _), *_ = pictured(0, 1)
        evil = "<script>alert(1)</script>"
        media["text"]["words"] = [evil, '"><img', "src=x|$"]
        record = AttackResult(evil, 0, evil, 0, 0, 1, "flipped", [("text", (0,), (1,))], {"text": 1})
        record.total = {"image": 4096, "text": 3}
        record.media = media
        write_run(
            tmp_path / "a", f"{evil}$x$|", evil, evil, [record], classes=[evil, "</style>"], unreadable=[[evil, evil]]
        )
        page = read(build([tmp_path / "a"], tmp_path / "out").parent)
        assert "script" not in page.tags
        assert evil in "".join(page.text["del"])
        assert "<script" not in (tmp_path / "out" / "table.md").read_text()

    def test_struck_words_are_the_removed_ones(self, tmp_path, no_curves):
        (_, media, _), *_ = pictured(0, 1)
        media["text"]["words"] = ["what", "is", "the", "red", "shape?"]
        regions = [("text", (3,), (5,)), ("text", (0,), (1,))]
        record = AttackResult("a", 0, "x", 0, 0, 1, "flipped", regions, {"text": 3}, {"image": 4096, "text": 5})
        record.media = media
        write_run(tmp_path / "a", "x", "m", "d", [record])
        assert read(build([tmp_path / "a"], tmp_path / "out").parent).text["del"] == ["what", "red", "shape?"]

    def test_only_run_json_essentials_are_needed(self, tmp_path, no_curves):
        (tmp_path / "a").mkdir()
        about = {"attack": "x", "model": "m", "dataset": "d", "classes": ["no", "yes"]}
        (tmp_path / "a" / "run.json").write_text(json.dumps(about))
        record = AttackResult("a", 0, "x", 0, 0, 5, "flipped", media={"pose": {"kind": "joints"}})
        (tmp_path / "a" / "records.jsonl").write_text(record.to_json() + "\n")
        assert "class 5" in build([tmp_path / "a"], tmp_path / "out").read_text()


class TestFiles:
    def test_the_same_records_give_the_same_bytes(self, runs, report, tmp_path):
        build([runs], tmp_path)
        names = sorted(file.name for file in report.iterdir())
        assert names == ["curve.png", "records.jsonl", "report.html", "summary.json", "table.md"]
        for name in names:
            assert (tmp_path / name).read_bytes() == (report / name).read_bytes(), name

    def test_records_are_merged_and_stay_readable(self, runs, report):
        lines = (report / "records.jsonl").read_text().splitlines()
        every = {(r.attack, r.id): r for folder in find_runs([runs]) for r in folder.records}
        assert len(lines) == 4 * 40 + 20
        assert {json.loads(line)["model"] for line in lines} == {"mmbt", "late_fusion", "mult"}
        assert {(r.attack, r.id) for r in read_records(report / "records.jsonl")} == set(every)

    def test_a_report_over_its_own_folder_does_not_count_itself(self, tmp_path, no_curves):
        write_run(tmp_path / "a", "x", "m", "d", attack_records("x", pictured(0, 5), 0))
        first = build([tmp_path], tmp_path / "report").read_bytes()
        assert build([tmp_path, tmp_path / "a"], tmp_path / "report").read_bytes() == first

    def test_summary(self, runs, report):
        summary = json.loads((report / "summary.json").read_text())
        assert [run["folder"] for run in summary["runs"]] == [
            "decoupling_reference-late_fusion",
            "random_removal-late_fusion",
            "decoupling_reference-mmbt",
            "random_removal-mmbt",
            "spoken",
        ]
        run = summary["runs"][2]
        records = RunFolder(runs / "decoupling_reference-mmbt").records()
        assert run["metrics"] == summarise(records)
        assert sum(run["statuses"].values()) == run["records"] == 40
        assert run["versions"]["muroan"] == "0.1.0"
        assert run["checkpoint"]["sha256"] == "mmbt" * 4
        assert run["unreadable"] == [["q00099", "cannot identify image file"]]
        assert len(summary["against_random"]) == 2

    def test_table(self, report):
        lines = (report / "table.md").read_text().splitlines()
        rows = [line for line in lines if line.startswith("| ")]
        assert len(rows) == 3 * (1 + 1 + 5)
        for table in (rows[:7], rows[7:14], rows[14:]):
            assert len({line.count("|") for line in table}) == 1
        assert re.search(r"\d\.\d \[\d+\.\d, \d+\.\d\]", rows[2])
        assert "success rate" in lines[-1]

    def test_curve_is_a_picture(self, report):
        with PILImage.open(report / "curve.png") as picture:
            assert picture.width > 1000

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("width", [7.2, 4.4])
    def test_a_long_legend_leaves_the_axes_their_height(self, tmp_path, width, monkeypatch):
        """A sweep of the README's size, twice over."""
        for seed in range(36):
            write_run(tmp_path / str(seed), f"attack_{seed}", "m", "d", attack_records("x", pictured(0, 7), seed))
        heights = []
        png = plots._png
        monkeypatch.setattr(plots, "_png", lambda picture: (png(picture), heights.append(tall(picture)))[0])

        def tall(picture) -> float:
            return picture.axes[0].get_window_extent().height / picture.dpi

        for runs in (find_runs([tmp_path / "0"]), find_runs([tmp_path])):
            plots.curve(runs, width=width)
        alone, many = heights
        assert many > 0.8 * alone

    def test_many_runs_stay_readable(self, tmp_path, monkeypatch):
        for place in range(10):
            about = ("x" if place % 2 else "random_removal", f"m{place // 2}", "d")
            write_run(tmp_path / str(place), *about, attack_records(about[0], pictured(0, 7), place))
        drawn = []
        png = plots._png
        monkeypatch.setattr(plots, "_png", lambda picture: (drawn.append(picture), png(picture))[1])
        page = build([tmp_path], tmp_path / "out").read_text()
        Page(page)
        assert "<h1>Robustness of 5 models</h1>" in page
        assert page.count("<details><summary>All 10 runs</summary>") == 4
        # A panel a model, with a colour an attack.
        assert [[axes.get_visible() for axes in picture.axes].count(True) for picture in drawn] == [5] * 4
        assert {line.get_color() for axes in drawn[0].axes for line in axes.lines} == set(plots.COLOURS[0][:2])
        assert plots.colours(find_runs([tmp_path])) == {run.label: int(run.is_control) for run in find_runs([tmp_path])}
        few = build([tmp_path / "1", tmp_path / "2"], tmp_path / "few").read_text()
        assert "<h1>Robustness of m0 and m1</h1>" in few
        assert "<summary>All" not in few

    def test_half_an_emoji_costs_no_report(self, tmp_path, no_curves):
        """JSON can spell it, UTF-8 cannot."""
        (record,) = attack_records("x", pictured(0, 1), 0, clean=1.0)
        record.media["text"]["words"][0] = "\ud83d"
        write_run(tmp_path / "run", "x", "m", "d", [record])
        assert "?" in build([tmp_path / "run"], tmp_path / "out").read_text(encoding="utf-8")


class TestRuns:
    def test_unfinished_run_is_taken_and_noted(self, tmp_path, no_curves):
        records = attack_records("x", pictured(0, 7), 0)
        write_run(tmp_path / "a", "x", "m", "d", records, finish=False)
        page = read(build([tmp_path], tmp_path / "out").parent)
        assert "x · m is unfinished: 7 records so far." in page.text["li"]
        assert "unfinished" in (tmp_path / "out" / "table.md").read_text()

    def test_run_without_records_or_flips(self, tmp_path):
        write_run(tmp_path / "a", "x", "m", "d", [])
        skipped = attack_records("y", pictured(0, 4), 0, clean=0.0)
        write_run(tmp_path / "b", "y", "m", "d", skipped)
        held = attack_records("z", pictured(0, 4), 0, clean=1.0, success=0.0)
        write_run(tmp_path / "c", "z", "other", "d", held)
        text = build([tmp_path], tmp_path / "out").read_text()
        assert "z flips none of the samples that other gets right" in text
        assert "m got no sample of d right" in text
        assert json.loads((tmp_path / "out" / "summary.json").read_text())["runs"][0]["metrics"] == {}

    def test_runs_of_one_name_are_told_apart_by_what_differs(self, tmp_path, no_curves):
        for i, replacement in enumerate(("zero", "blur")):
            identity = {"seed": 0, "threat_model": {"replacement": {"image": replacement}}, "weights": str(i)}
            write_run(tmp_path / f"r{i}", "x", "m", "d", attack_records("x", pictured(0, 4), 0), identity=identity)
        write_run(tmp_path / "stopped", "x", "m", "d", [], finish=False)  # refused before its first record
        build([tmp_path], tmp_path / "out")
        table = (tmp_path / "out" / "table.md").read_text()
        assert "x · m (threat_model.replacement.image=zero)" in table
        assert "x · m (threat_model.replacement.image=blur)" in table
        assert "stopped" not in table

    def test_folder_without_runs(self, tmp_path):
        (tmp_path / "empty").mkdir()
        for folder in ("empty", "missing"):
            with pytest.raises(MuroanError, match=f"{folder} .*name a folder"):
                build([tmp_path / folder], tmp_path / "out")
        with pytest.raises(MuroanError, match="got none"):
            build([], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_run_json_of_something_else(self, tmp_path):
        (tmp_path / "run.json").write_text('{"model": "m"}')
        with pytest.raises(MuroanError, match="lacks attack, classes, dataset"):
            build([tmp_path], tmp_path / "out")
        (tmp_path / "run.json").write_text("{")
        with pytest.raises(MuroanError, match="is not JSON"):
            build([tmp_path], tmp_path / "out")

    def test_labels_are_unique(self, tmp_path):
        for name in ("one", "two"):
            write_run(tmp_path / name, "x", "m", "d", attack_records("x", pictured(0, 3), 0))
        assert [run.label for run in find_runs([tmp_path])] == ["x · m (one)", "x · m (two)"]

    def test_guided_attack_no_better_than_random_is_warned_of(self, tmp_path, no_curves):
        for attack in ("guided", "random_removal"):
            write_run(tmp_path / attack, attack, "m", "d", attack_records(attack, pictured(0, 20), 1, success=0.5))
        (comparison,) = against_controls(find_runs([tmp_path]))
        assert comparison.success == {"value": 0.0, "low": 0.0, "high": 0.0}
        text = "".join(read(build([tmp_path], tmp_path / "out").parent).text["li"])
        assert "guided · m is no better than the random control random_removal" in text

    def test_what_reaches_another_goal_does_not_lead(self, tmp_path, no_curves):
        turned = [replace(r, adversarial_label=r.label) for r in attack_records("e", pictured(0, 20), 1, success=1.0)]
        write_run(tmp_path / "e", "decoupling_embedding", "m", "d", turned)
        write_run(tmp_path / "o", "of_ones_own", "m", "d", turned)  # of which nothing but its records tells
        write_run(tmp_path / "g", "guided", "m", "d", attack_records("guided", pictured(0, 20), 1, success=0.5))
        assert _strongest(find_runs([tmp_path])).attack == "guided"

    def test_another_goal_is_said(self, tmp_path, no_curves):
        for name, success in (("decoupling_embedding", 1.0), ("decoupling_targeted", 0.0)):
            write_run(tmp_path / name, name, "m", "d", attack_records(name, pictured(0, 20), 1, success=success))
        said = finding(find_runs([tmp_path]))
        assert said.startswith("decoupling_embedding brings 100.0 % of the samples that m gets right on d to another")
        assert "decoupling_targeted brings 0.0 % to another class" in said

    def test_smaller_removals_are_better_too(self, tmp_path, no_curves):
        """Where all samples are flipped by both, the sizes decide; what chooses values is not held against removals."""
        total = {"image": 100}
        for attack, size, kind in (
            ("guided", 1, "removal"),
            ("random_removal", 4, "removal"),
            ("pgd", 99, "perturbation"),
        ):
            flips = [
                AttackResult(str(i), i, attack, 0, 0, 1, "flipped", removed={"image": size}, total=total, kind=kind)
                for i in range(20)
            ]
            write_run(tmp_path / attack, attack, "m", "d", flips)
        text = "".join(read(build([tmp_path], tmp_path / "out").parent).text["li"])
        assert "no better than the random control" not in text

    def test_comparison_is_paired_by_sample(self, tmp_path):
        def record(i, attack, status, removed):
            after = int(status == "flipped")
            before = int(status == "skipped")
            size = {"image": removed} if removed else {}
            return AttackResult(str(i), i, attack, 0, before, after, status, removed=size, total={"image": 100})

        outcomes = {
            "guided": [("flipped", 1), ("flipped", 5), ("held", 0), ("skipped", 0)],
            "random": [("held", 0), ("flipped", 10), ("held", 0), ("flipped", 1)],
        }
        for attack, rows in outcomes.items():
            records = [record(i, attack, *row) for i, row in enumerate(rows)]
            write_run(tmp_path / attack, attack, "m", "d", records)
        (comparison,) = against_controls(find_runs([tmp_path]))
        assert comparison.n == 3
        assert comparison.success["value"] == pytest.approx(100 / 3)
        assert comparison.area["value"] == pytest.approx((90 + 50) / 3)  # 1 % scores 90, 5 % scores 50, 10 % none
        assert not comparison.better

    def test_another_checkpoint_is_another_target(self, tmp_path):
        for attack in ("guided", "random"):
            records = attack_records(attack, pictured(0, 3), 0)
            write_run(tmp_path / attack, attack, "m", "d", records, checkpoint={"path": "x", "sha256": attack})
        assert against_controls(find_runs([tmp_path])) == []


class TestExamples:
    def test_choice_spreads_over_runs_modalities_and_outcomes(self, runs):
        found = find_runs([runs])
        chosen = choose(found)
        assert len(chosen) == 15
        assert {run.label for run, _ in chosen} == {run.label for run in found}
        assert {r.removal.modalities for _, r in chosen if r.flipped} >= {("image",), ("text",), ("image", "text")}
        assert 1 <= sum(not r.flipped for _, r in chosen) <= 4
        assert all(r.media and r.attacked for _, r in chosen)
        assert [r.id for _, r in choose(found)] == [r.id for _, r in chosen]

    def test_all_when_there_are_few(self, tmp_path):
        write_run(tmp_path, "x", "m", "d", attack_records("x", pictured(0, 9), 0, clean=1.0, shown=5))
        assert len(choose(find_runs([tmp_path]))) == 5

    def test_twelve_of_one_run(self, tmp_path):
        write_run(tmp_path, "x", "m", "d", attack_records("x", pictured(0, 20), 0, clean=1.0, success=1.0))
        assert len(choose(find_runs([tmp_path]))) == 12

    def changed(self) -> AttackResult:
        """A record of an attack that changed a word and put one in, made the sound louder and left the picture."""
        (_, media, _), *_ = spoken(0, 1)
        before = {**media, "text": {"kind": "text", "grid": [3], "words": ["is", "it", "<b>"]}}
        louder = {**media["audio"], "peaks": [[2 * low, 2 * high] for low, high in media["audio"]["peaks"]]}
        after = {**before, "audio": louder, "text": {"kind": "text", "grid": [4], "words": ["is", "not", "it", "<i>"]}}
        record = AttackResult("a", 0, "x", 0, 0, 1, "flipped", [], {"text": 2, "audio": 14000}, kind="perturbation")
        record.total = {"image": 4096, "audio": 14000, "text": 3}
        record.media, record.perturbed_media = before, after
        return record

    def test_what_a_perturbation_made_is_beside_what_was(self):
        shown = dict(draw_all(self.changed()))
        assert [len(shown[name]) for name in ("image", "audio", "text")] == [1, 2, 1]
        assert shown["text"][0].words == [("is", ""), ("not", "ins"), ("it", ""), ("<b>", "del"), ("<i>", "ins")]
        # One scale for both: the louder one fills the height, the other half of it.
        reach = [
            max(abs(50 - float(point.split()[1])) for point in re.split("[ML]", w.outline[:-2])[1:])
            for w in shown["audio"]
        ]
        assert reach == pytest.approx([23, 46], abs=0.1)
        removed = AttackResult("a", 0, "x", 0, 0, 1, "flipped", [("text", (2,), (3,))], media=self.changed().media)
        (drawing,) = dict(draw_all(removed))["text"]
        assert drawing.words == [("is", ""), ("it", ""), ("<b>", "del")]

    def test_the_tracker_shows_both_too(self):
        record = self.changed()
        light = PILImage.new("RGB", (64, 64), "white")
        buffer = io.BytesIO()
        light.save(buffer, "png")
        record.perturbed_media["image"] = {**record.media["image"], "png": base64.b64encode(buffer.getvalue()).decode()}
        image, audio, text = _cells(record, ["image", "audio", "text"])
        assert text == "is {not} it [<b>] {<i>}"
        assert audio.endswith("changed: its values")
        assert image.image.width == 2 * image.image.height + 8, "beside each other"
        removed = AttackResult("a", 0, "x", 0, 0, 1, "flipped", [("text", (2,), (3,))], media=self.changed().media)
        assert _cells(removed, ["audio", "text"])[1] == "is it [<b>]"

    def test_page_with_a_perturbation(self, tmp_path, no_curves):
        write_run(tmp_path / "run", "louder", "m", "d", [self.changed()])
        page = read(build([tmp_path / "run"], tmp_path / "out").parent)
        assert page.classes.count("pair") == 1
        assert page.classes.count("wave") == 2
        assert page.text["figcaption"] == ["clean", "attacked"]
        assert (page.text["del"], page.text["ins"]) == (["<b>"], ["not", "<i>"])
        assert "100.0\u202f% of the audio" in "".join(page.text["p"])

    def test_boxes_and_stretches(self):
        (layouts, media, _), *_ = spoken(0, 1)
        regions = [("image", (8, 16), (24, 64)), ("image", (0, 0), (2, 2)), ("audio", (7000,), (10500,))]
        record = AttackResult("a", 0, "x", 0, 0, 1, "flipped", regions, media=media)
        picture, wave = draw(record, "image"), draw(record, "audio")
        assert picture.boxes == [(16, 8, 48, 16), (0, 0, 2, 2)]
        assert [ring[:2] for ring in picture.rings] == [(1.0, 1.0)]
        assert layouts["audio"].grid == (14000,)
        assert wave.stretches == [(500.0, 250.0)]
        assert wave.times == ["0.438–0.656 s"]
        assert wave.seconds == 0.875


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (77.04, "rate", "77.0"),
        (0.0234, "fraction", "0.023"),
        (0.391, "fraction", "0.39"),
        (0.00061, "fraction", "0.00061"),
        (3.85, "fraction", "3.85"),
        (12.44, "fraction", "12.4"),
        (0.0, "fraction", "0.0"),
        (12.34, "count", "12.3"),
        (12345.6, "count", "12\u202f346"),
        (None, "rate", "–"),
    ],
)
def test_figures_have_the_decimals_they_deserve(value, unit, text):
    assert figure(value, unit) == text
