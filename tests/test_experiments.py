"""The paper's tables: what they are made of, by hand; and their quick sizes, as commands of their own."""

from __future__ import annotations

import csv
import json
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, environment
from PIL import Image

from muroan.attacks.base import Kind
from muroan.certification import Certificate, CertificateFolder, summarise
from muroan.metrics import columns
from muroan.report.cells import METRICS, Cell, Entry, Known, Table, columns_within, read_cell, side_by_side
from muroan.results import AttackResult, Count, RunFolder, write_json

# (queries, percent of the input) at every flip seen of a sample, None for one that was wrong before the attack.
Seen = list[tuple[int, int]] | None
FIRST: list[Seen] = [[(3, 8), (20, 2)], [(50, 1)], [], None]
SECOND: list[Seen] = [[(1, 4)], [(2, 4)], [(9, 4)], [(10, 6)]]


def record(index: int, seen: Seen, queries: int = 60) -> AttackResult:
    status = "skipped" if seen is None else "flipped" if seen else "held"
    result = AttackResult(f"q{index}", index, "a", 0, int(seen is None), int(bool(seen)), status, total={"image": 100})
    result.removed = {"image": seen[-1][1]} if seen else {}
    result.trajectory = seen or []
    result.ledger = {"search": Count(queries, queries, 0)} if seen is not None else {}
    return result


def write_cell(
    path: Path,
    seen: list[Seen],
    attack: str = "a",
    seed: int = 0,
    finish: bool = True,
    kind: Kind = "removal",
    **more: int,
) -> Cell:
    """A cell as its folder has it, of a sweep that wants budget 500."""
    identity = {"budget": 500, "seed": seed}
    folder = RunFolder(path / f"{attack}-{seed}")
    about = {"identity": {**identity, "weights": "w", **more}, "attack": attack, "model": "m", "dataset": "d"}
    folder.start({**about, "classes": ["no", "yes"], "seed": seed})
    for index, one in enumerate(seen):
        folder.append(replace(record(index, one), kind=kind))
    folder.close()
    if finish:
        folder.finish()
    return read_cell("d", "m", attack, seed, folder.path, identity)


def both(path: Path, attack: str = "a") -> Entry:
    cells = (write_cell(path, FIRST, attack, 0), write_cell(path, SECOND, attack, 1))
    return Entry("d · m", attack, cells)


def test_a_cell_that_is_run_again_is_read_again(tmp_path):
    """A table reads what there is before it runs, and then what came of it."""
    before = write_cell(tmp_path, FIRST)
    assert before.run is not None
    RunFolder(before.folder).clear()
    after = write_cell(tmp_path, SECOND[:2])
    assert after.run is not None
    assert (len(before.run.records), len(after.run.records)) == (4, 2)


def absent(path: Path, attack: str, seed: int) -> Cell:
    return read_cell("d", "m", attack, seed, path / "nothing", {})


class TestCells:
    def test_a_finished_cell_of_this_identity_is_read(self, tmp_path):
        cell = write_cell(tmp_path, FIRST)
        assert cell.run is not None
        assert [r.id for r in cell.run.records] == ["q0", "q1", "q2", "q3"]

    def test_others_are_not_and_say_why(self, tmp_path):
        assert absent(tmp_path, "a", 0).lacks == "not run"
        assert write_cell(tmp_path / "half", FIRST, finish=False).lacks == "unfinished"
        other = write_cell(tmp_path / "other", FIRST, budget=100)
        assert (other.run, other.lacks) == (None, "of another configuration")
        folder = write_cell(tmp_path, FIRST).folder
        assert read_cell("d", "other model", "a", 0, folder, {"budget": 500, "seed": 0}).run is None

    def test_means_and_spread_over_seeds_by_hand(self, tmp_path):
        entry = both(tmp_path)
        # 2 of 3 attacked samples, and 4 of 4; 2 % and 1 %, and 4, 4, 4 and 6 %.
        success, mean = entry.summary["attack_success_rate"], entry.summary["decoupled_fraction_mean"]
        assert success["value"] == pytest.approx((200 / 3 + 100) / 2)
        assert entry.spread("attack_success_rate") == pytest.approx((200 / 3, 100))
        assert mean["value"] == pytest.approx((1.5 + 4.5) / 2)
        assert entry.spread("decoupled_fraction_mean") == (1.5, 4.5)
        assert entry.summary["clean_accuracy"]["value"] == pytest.approx((75 + 100) / 2)
        assert Entry("g", "a", entry.cells[:1]).spread("attack_success_rate") is None

    @pytest.mark.parametrize(
        ("most", "success", "fraction", "queries"),
        # Of the first seed's three attacked samples; the flip by 8 % comes first, by 2 % at 20, the other's at 50.
        [(2, 0, None, 2), (3, 100 / 3, 8, 3), (20, 100 / 3, 2, 20), (50, 200 / 3, 1.5, 50), (500, 200 / 3, 1.5, 60)],
    )
    def test_a_smaller_budget_from_the_trajectory(self, tmp_path, most, success, fraction, queries):
        entry = Entry("g", "a", (write_cell(tmp_path, FIRST),), within=most)
        assert entry.summary["attack_success_rate"]["value"] == pytest.approx(success)
        assert entry.summary["decoupled_fraction_mean"]["value"] == (fraction and pytest.approx(fraction))
        assert entry.summary["queries"]["value"] == queries

    def test_the_whole_budget_is_the_run_itself(self, tmp_path):
        run = write_cell(tmp_path, SECOND).run
        whole, within = columns(run.records), columns_within(run, 500)
        assert {name: how for name, (_, how) in within.items()} == {name: whole[name][1] for name in within}
        for name, (column, _) in within.items():
            np.testing.assert_array_equal(column, whole[name][0])

    def test_rows_side_by_side_have_the_same_seeds(self, tmp_path):
        one = Entry("d · m", "b", (write_cell(tmp_path, SECOND, "b", 0), absent(tmp_path, "b", 1)))
        rows, notes = side_by_side([both(tmp_path), one])
        assert [row.seeds for row in rows] == [[0], [0]]
        assert notes == [
            "missing in d · m, not run: seed 1 of b",
            "d · m: seed 1 is left out, since not all rows have it.",
        ]

    def test_seeds_are_shared_within_a_kind(self, tmp_path):
        first = write_cell(tmp_path, SECOND, "b", 0, kind="perturbation")
        values = Entry("d · m", "b", (first, absent(tmp_path, "b", 1)))
        less = Entry("d · m", "c", (write_cell(tmp_path, SECOND, "c", 1, kind="perturbation"),))
        assert [row.seeds for row in side_by_side([both(tmp_path), values])[0]] == [[0, 1], [0]]
        rows, notes = side_by_side([both(tmp_path), values, less])
        assert [row.seeds for row in rows] == [[0, 1], [0], [1]]
        (note,) = (note for note in notes if "missing" not in note)
        assert note.startswith("d · m, value-choosing attacks (stronger threat model): the rows have no seed in common")

    def test_a_row_without_any_cell_takes_no_seed_from_the_others(self, tmp_path):
        none = Entry("d · m", "b", (absent(tmp_path, "b", 0), absent(tmp_path, "b", 1)))
        other = Entry("another group", "b", (absent(tmp_path, "b", 0),))
        rows, notes = side_by_side([both(tmp_path), none, other])
        assert [(row.name, row.seeds) for row in rows] == [("a", [0, 1])]
        assert notes == [
            "missing in d · m, not run: seed 0, 1 of b",
            "missing in another group, not run: seed 0 of b",
        ]

    def test_rows_without_a_seed_in_common_keep_theirs(self, tmp_path):
        first = Entry("g", "a", (write_cell(tmp_path, FIRST, "a", 0),))
        rows, notes = side_by_side([first, Entry("g", "b", (write_cell(tmp_path, SECOND, "b", 1),))])
        assert [row.seeds for row in rows] == [[0], [1]]
        assert "no seed in common" in notes[0]

    def test_the_table(self, tmp_path):
        known = [Known("the paper's", {"attack_success_rate": 100}, "its page 1")]
        metrics = [METRICS[name] for name in ("attack_success_rate", "decoupled_fraction_mean", "proven")]
        missing = Entry("d · m", "b_c", (absent(tmp_path, "b_c", 0),))
        table = Table("t", "What it shows.", metrics, [both(tmp_path), missing], known=known)
        text = table.write(tmp_path / "out").read_text()
        well_formed(tmp_path / "out", "t")
        head, group, row, heading, last = rows_of(text)
        assert head == ["attack", "seeds", "success rate (%)", "decoupled fraction, mean (%)"]  # nothing was proven
        assert group[0] == "**d · m**"
        assert [row[0], row[1]] == ["a", "0, 1"]
        assert re.fullmatch(r"3\.00 \[.*\] \(1\.50–4\.50\)", row[3])
        assert re.fullmatch(r"83\.3 \[.*\] \(66\.7–100\.0\)", row[2])
        assert "other data and other weights" in heading[0]
        assert last == ["the paper's", "", "100.0", "–"]
        assert "Note: missing in d · m, not run: seed 0 of b_c" in text
        assert "Note: the paper's: its page 1." in text
        # Printed, the seeds' spread takes the place of the interval.
        assert r"\quad a & 0, 1 & 83.3 (66.7--100.0) & 3.00 (1.50--4.50) \\" in (tmp_path / "out/t.tex").read_text()
        seeds = list(csv.DictReader((tmp_path / "out/t_seeds.csv").open()))
        assert [(row["seeds"], row["decoupled_fraction_mean"]) for row in seeds] == [("0", "1.5"), ("1", "4.5")]

    def test_beside_brute_force_by_hand(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT / "experiments"))
        compared = runpy.run_path(str(ROOT / "experiments/minimum.py"))["compared"]
        ours = write_cell(
            tmp_path, [[(20, 2)], [(50, 1)], [], None, [(7, 5)], *[[(7, n)] for n in (6, 7, 8, 9)], []], "a"
        )
        brute = write_cell(tmp_path, [[(3, 1)], [(5, 1)], [(9, 4)], None, *[[] for _ in range(6)]], "b")
        more = [[(99, n)] for n in (3, 6, 6, 8, 7)]
        longer = write_cell(tmp_path, [[(9, 1)], [(9, 1)], [(9, 4)], None, *more, [(99, 90)]], "c")
        # Of three known minima one is reached, one missed, one not flipped at all. Brute force ran out on the last six:
        # five are flipped by both, one by the longer search alone, which is no part of the means.
        known = [9, 3, pytest.approx(100 / 3), 1.0, 1.5]
        assert compared([ours], [brute], [longer]) == [*known, 6, 5, 1, 7.0, 6.0]
        few = write_cell(tmp_path, [[(9, 1)], [(9, 1)], [(9, 4)], None, *more[:4], []], "d")
        assert compared([ours], [brute], [few]) == [*known, 6, 4, 0, None, None], "four samples have no mean"
        none = absent(tmp_path, "b", 1)
        assert compared([ours], [brute], [none]) == [*known, 6, 0, 0, None, None]
        assert compared([ours], [none], [longer]) == [0, 0, None, None, None, 0, 0, 0, None, None]

    def test_a_table_of_nothing_says_so(self, tmp_path):
        table = Table("t", "", [METRICS["queries"]], [Entry("g", "a", (absent(tmp_path, "a", 2),))])
        assert "missing in g, not run: seed 2 of a" in table.write(tmp_path).read_text()
        assert Image.open(tmp_path / "t.png").format == "PNG"


def rows_of(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without the rule below its head."""
    lines = [line for line in text.splitlines() if line[:1] == "|"]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in [lines[0], *lines[2:]]]


def well_formed(folder: Path, name: str) -> list[dict[str, str]]:
    """Check the files of a table; the rows of its CSV."""
    table = rows_of((folder / f"{name}.md").read_text())
    assert {len(row) for row in table} == {len(table[0])}
    with (folder / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    assert rows
    for row in rows:
        assert None not in row
        assert None not in row.values()
        figures = {key: float(value) for key, value in row.items() if value and key in METRICS}
        for metric, value in figures.items():
            assert float(row[f"{metric}_low"]) <= value + 1e-9
            assert value <= float(row[f"{metric}_high"]) + 1e-9
            assert 0 <= value <= (np.inf if METRICS[metric].unit == "count" else 100), metric
        assert "attack_success_rate" in figures
    shown = {row[0] for row in table}
    assert shown >= {row["name"] for row in rows}
    tex = (folder / f"{name}.tex").read_text()
    assert len(re.findall(r"(?<!\\)\{", tex)) == len(re.findall(r"(?<!\\)\}", tex))
    assert re.findall(r"\\begin\{(\w+)\}", tex) == re.findall(r"\\end\{(\w+)\}", tex)[::-1]
    body = [line for line in tex.splitlines() if line.startswith(r"\quad")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {len(table[0]) - 1}
    assert all(line.endswith(r" \\") for line in body)
    with Image.open(folder / f"{name}.png") as picture:
        picture.load()
        assert min(picture.size) > 300
    return rows


# ---------------------------------------------------------------------------------------------------------
# The commands. They share trained models and cells, so that they share a worker.

TABLES = {"vulnerability": 4, "finer": 2, "fusion": 2, "modality": 3, "baselines": 2, "threat_model": 8 + 5}  # rows
TABLES |= {"variants": 6}
OUT = Path("outputs/experiments")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experiments")


def command(name: str, *words: str) -> list[str]:
    return [sys.executable, str(ROOT / f"experiments/{name}.py"), *words]


def run(workplace: Path, name: str, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    own = environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(
        command(name, *words), cwd=workplace, env=own, capture_output=True, text=True, timeout=300, check=False
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def test_certificates_within_reach(monkeypatch):
    """By hand: 10 pixels and 4 tokens; what flips is smallest at 3 pixels and at 2 tokens."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    within_reach = runpy.run_path(str(ROOT / "experiments/certified.py"))["within_reach"]
    n = {"image": 10, "text": 4}

    def certificate(index: int, image: int, text: int, predicted: int = 1) -> Certificate:
        alone, joint = {"image": image, "text": text}, {"image": 0, "text": 0}
        return Certificate(str(index), index, 1, n, n, predicted, 0.9, 0.1, joint, alone, {}, {"text": [1, 1, 1, 2]})

    def flip(index: int, *regions: tuple[str, tuple[int, ...], tuple[int, ...]], after: int = 0) -> AttackResult:
        return AttackResult(str(index), index, "x", 1, 1, after, "flipped", list(regions))

    flips = [
        flip(0, ("image", (0,), (3,))),
        flip(1, ("image", (4,), (9,)), ("image", (2,), (4,))),  # seven
        flip(2, ("text", (3,), (4,))),  # a word of two tokens
        flip(3, ("image", (0,), (1,)), ("text", (0,), (1,))),  # both: says nothing of one alone
        flip(4, ("image", (0,), (1,)), after=1),  # moved the embedding, not the label
    ]
    run = SimpleNamespace(records=flips)
    known = [(2, 1), (3, 0), (0, 2), (5, 3)]
    certificates = [certificate(i, *sizes) for i, sizes in enumerate(known)] + [certificate(4, 0, 0)]
    assert within_reach([(certificates, run)]) == 3
    wrong = certificate(1, 9, 4, predicted=0)
    assert within_reach([([certificate(0, 2, 1), wrong, certificate(2, 0, 2)], run)]) == 1, "the vote is wrong there"
    held = SimpleNamespace(records=[replace(flip, status="held", adversarial_label=1) for flip in flips])
    assert within_reach([(certificates, held)]) == 0
    assert within_reach([(certificates, run), (certificates, held)]) == 6, "what flips one seed could flip another"
    both = replace(certificate(0, 1, 0), joint={"image": 1, "text": 1})
    assert within_reach([([both, certificate(3, 0, 0)], SimpleNamespace(records=[flips[3]]))]) == 1


@pytest.mark.xdist_group("experiments")
class TestCommands:
    def test_a_killed_table_goes_on(self, workplace):
        own = environment(PYTHONPATH=str(ROOT))
        process = subprocess.Popen(command("vulnerability", "quick"), cwd=workplace, env=own, stdout=-3, stderr=-3)
        deadline, lines = time.monotonic() + 200, []
        while not lines and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
            lines = [line for part in workplace.glob(f"{OUT}/attacks/*/*.jsonl") for line in part.open("rb")]
        process.kill()
        assert process.wait() < 0, "it ended before it could be killed"
        assert not (workplace / OUT / "vulnerability").exists()
        kept = [line for part in workplace.glob(f"{OUT}/attacks/*/*.jsonl") for line in part.open("rb")]
        (checkpoint,) = workplace.glob("outputs/train/*/best.ckpt")
        trained = checkpoint.stat().st_mtime_ns
        run(workplace, "vulnerability", "quick")
        (cell,) = workplace.glob(f"{OUT}/attacks/*-decoupling-*")
        records = (cell / "records.jsonl").read_bytes().splitlines(keepends=True)
        assert len(records) == 16
        assert {line for line in kept if line.endswith(b"\n")} <= set(records)
        assert checkpoint.stat().st_mtime_ns == trained

    @pytest.mark.parametrize("name", TABLES)
    def test_quick(self, workplace, monkeypatch, name):
        if not (workplace / OUT / name).exists():  # the table that was killed above is there
            here(monkeypatch, workplace, name, "quick")
        rows = well_formed(workplace / OUT / name, name)
        assert len(rows) == TABLES[name]
        assert {row["seeds"] for row in rows} == {"0"}
        assert {row["samples"] for row in rows} == {"16"}
        page = (workplace / OUT / name / f"{name}.md").read_text()
        assert "missing in " not in page  # a note on cells that there are not
        assert "paper, worst case (1.16 %)" in page
        assert any(float(row["attack_success_rate"]) > 0 for row in rows if row["attack"] == "decoupling")
        about = json.loads((workplace / OUT / name / "about.json").read_text())
        assert about["command"] == f"python experiments/{name}.py quick"
        assert about["weights"]
        assert all(where.startswith("easy_vqa-") for where in about["weights"])  # folders of trainings
        assert about["cells"][0] == about["cells"][1] > 0
        if name in ("finer", "baselines"):
            with (workplace / OUT / name / "compare/pairs.csv").open() as file:
                assert {row["attack"] for row in csv.DictReader(file)} == {"decoupling"}

    def test_variants_rank_by_what_they_say(self, workplace):
        """A gradient a sample, or as many as half of 100 queries have room for, up to 20 (2 queries each)."""
        if not (workplace / OUT / "variants").exists():
            pytest.skip("needs the table of the other test")
        with (workplace / OUT / "variants/variants.csv").open() as file:
            taken = {row["name"]: float(row["backwards"]) for row in csv.DictReader(file) if "," not in row["group"]}
        assert taken.pop("saliency_removal, gradient") == 1
        assert taken.pop("saliency_removal, integrated gradients") == 20
        assert set(taken.values()) == {0}
        refused = run(workplace, "variants", "quick", "attacks=decoupling", check=False)
        assert refused.returncode
        assert refused.stderr.strip().startswith("variants.py has attacks of its own")

    def test_what_holds_is_counted_by_class(self, workplace):
        if not (workplace / OUT / "vulnerability").exists():
            pytest.skip("needs the table of the other test")
        with (workplace / OUT / "vulnerability/vulnerability-held.csv").open() as file:
            counted = sum(int(row["held"]) for row in csv.DictReader(file) if row["attack"] == "random_removal")
        files = workplace.glob(f"{OUT}/attacks/*-random_removal-*/run.json")
        runs = {file: json.loads(file.read_text()) for file in files}
        (cell,) = (  # the others are of another table
            file.with_name("records.jsonl")
            for file, run in runs.items()
            if run["identity"]["threat_model"]["min_side"]["image"] is None
        )
        statuses = [json.loads(line)["status"] for line in cell.open()]
        assert counted == len(statuses) - statuses.count("flipped") - statuses.count("skipped") > 0

    def test_tables_share_their_models_and_cells(self, workplace):
        if not (workplace / OUT / "threat_model").exists():
            pytest.skip("needs the tables of the other tests")
        assert len(list(workplace.glob("outputs/train/*/best.ckpt"))) == 2
        # decoupling, first, reference, random; on concat; image, text; sparse_rs, two corruptions; four threat models,
        # of which one has finer regions; random there; without a modality, by two replacements; saliency, by two
        # rankings
        assert len(list(workplace.glob(f"{OUT}/attacks/*/records.jsonl"))) == 4 + 1 + 2 + 3 + 4 + 1 + 2 + 2

    def test_transfer(self, workplace, monkeypatch):
        here(monkeypatch, workplace, "transfer", "quick")
        with (workplace / OUT / "transfer/transfer.csv").open() as file:
            pairs = {(row["source"], row["target"]): row["rate"] for row in csv.DictReader(file)}
        assert set(pairs) == {(a, b) for a in ("late_fusion", "concat") for b in ("late_fusion", "concat")}
        assert pairs["concat", "concat"] == "100.0"
        assert "**easy_vqa · decoupling**" in (workplace / OUT / "transfer/transfer.md").read_text()

    def test_minimum(self, workplace, monkeypatch):
        """Nothing is smaller than what brute force finds; with twice the questions it finds what ours misses."""
        here(monkeypatch, workplace, "minimum", "quick")
        with (workplace / OUT / "minimum/minimum.csv").open() as file:
            (row,) = csv.DictReader(file)
        assert 0 < int(row["minimum known"]) <= int(row["attacked"]) <= 16
        assert 0 <= float(row["reached (%)"]) <= 100
        assert float(row["ours, mean (%)"]) >= float(row["smallest flip, mean (%)"]) - 1e-9
        here(monkeypatch, workplace, "minimum", "quick", "tabulate", "seeds=0,1", "models=late_fusion,mmbt")
        page = (workplace / OUT / "minimum/minimum.md").read_text()
        assert "- not run: easy_vqa · late_fusion, seed 1\n- not run: easy_vqa · mmbt, seed 0, 1\n" in page
        assert [row[1:3] for row in rows_of(page)[1:]] == [["late_fusion", "0"]]

    def test_unimodal(self, workplace, monkeypatch):
        here(monkeypatch, workplace, "unimodal", "quick", "dataset.train_limit=64")
        table = rows_of((workplace / OUT / "unimodal/unimodal.md").read_text())
        assert [row[:4] for row in table[1:]] == [["easy_vqa", "concat", n, "0"] for n in ("image", "text", "all")]
        assert all(0 <= float(row[4]) <= 100 for row in table[1:])

    def test_defense(self, workplace, monkeypatch):
        here(monkeypatch, workplace, "defense", "quick")
        page = (workplace / OUT / "defense/defense.md").read_text()
        with (workplace / OUT / "defense/defense.csv").open() as file:
            rows = [(row["defense"], row["attack"]) for row in csv.DictReader(file)]
        asked = {"plain_training": ["decoupling", "transferred"], "adversarial_training": ["decoupling", "transferred"]}
        asked = {"undefended": ["decoupling"], **asked}
        assert sorted(rows) == sorted((name, a) for name, found in asked.items() for a in [*found, "worst case"])
        assert re.search(r"- adversarial_training (helped|did)", page)
        assert "not run" not in page
        here(monkeypatch, workplace, "defense", "quick", "tabulate", "defenses=plain_training,modality_dropout")
        page = (workplace / OUT / "defense/defense.md").read_text()
        assert "- not run: easy_vqa · late_fusion, seed 0: modality_dropout under decoupling, transferred\n" in page
        with pytest.raises(SystemExit, match="no run is of a hardened model"):
            here(monkeypatch, workplace, "defense", "quick", "tabulate", "defenses=modality_dropout")

    def test_certified(self, workplace, monkeypatch):
        here(monkeypatch, workplace, "certified", "quick")
        (row,) = csv.DictReader((workplace / OUT / "certified/certified.csv").open())
        folder = next((workplace / "outputs/certify").iterdir())
        found = summarise(CertificateFolder(folder).records())
        assert float(row["right (%)"]) == found["accuracy"]
        assert float(row["image certified (%)"]) == (found["alone"]["image"]["any"] if found["alone"] else 0)
        assert row["broken"] == "0"
        attack = next(iter(json.loads((folder / "summary.json").read_text())["attacks"].values()))
        assert float(row["left (%)"]) == attack["robust_accuracy"]
        here(monkeypatch, workplace, "certified", "quick", "tabulate", "seeds=0,1")
        assert (workplace / OUT / "certified/certified.png").stat().st_size > 10_000
        page = (workplace / OUT / "certified/certified.md").read_text()
        assert "- not run: easy_vqa · late_fusion, larger, seed 1\n" in page
        assert [line[:4] for line in rows_of(page)[1:]] == [["easy_vqa", "late_fusion", "larger", "0"]]
        latex = (workplace / OUT / "certified/certified.tex").read_text()
        assert r"easy\_vqa & late\_fusion & larger & 0 & " in latex
        assert r"{\footnotesize not run: easy\_vqa $\cdot$ late\_fusion, larger, seed 1}" in latex

    def test_missing_cells_are_named(self, workplace, monkeypatch):
        here(monkeypatch, workplace, "vulnerability", "quick", "tabulate", "seeds=0,1", "models=late_fusion,mmbt")
        page = (workplace / OUT / "vulnerability/vulnerability.md").read_text()
        assert "missing in easy_vqa · mmbt, not run: seed 0, 1 of decoupling, decoupling_first, decoupling_ref" in page
        assert "missing in easy_vqa · late_fusion, not run: seed 1 of decoupling" in page

    def test_other_settings_are_never_mixed_in(self, workplace, monkeypatch):
        here(monkeypatch, workplace, "vulnerability", "quick", "tabulate", "threat_model.max_queries=99")
        page = (workplace / OUT / "vulnerability/vulnerability.md").read_text()
        assert "at most 99 queries" in page
        assert "not run: seed 0 of decoupling, decoupling_first, decoupling_reference, random_removal" in page

    def test_hardened_models_of_other_weights_do_not_either(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT / "experiments"))
        monkeypatch.setattr(sys, "argv", ["table.py"])
        monkeypatch.delitem(sys.modules, "sweep", raising=False)
        from sweep import Sweep

        def cell(attack: str, trained: str, weights: str) -> Cell:
            found = write_cell(tmp_path / weights, FIRST, attack)
            assert found.run is not None
            checkpoint = {"path": f"outputs/train/{trained}/best.ckpt", "sha256": weights}
            about = {
                **found.run.about,
                "defense": "mmcert",
                "checkpoint": checkpoint,
                "versions": {"torch": "2.9.1+cpu"},
            }
            return replace(found, run=replace(found.run, about=about))

        sweep = Sweep({}, {})
        sweep._noted({("m", "a"): (cell("a", "d-m-mmcert-1", "w1"),), ("m", "b"): (cell("b", "d-m-mmcert-2", "w2"),)})
        assert sweep.weights == {"d-m-mmcert-1": "w1", "d-m-mmcert-2": "w2"}
        assert (sweep.torch, sorted(sweep.done.values())) == ({"2.9.1"}, [True, True])
        with pytest.raises(
            SystemExit, match=r"c-0 is of other weights \(w3\) than the table's other runs of d-m-mmcert-1"
        ):
            sweep._noted({("m", "c"): (cell("c", "d-m-mmcert-1", "w3"),)})

        # What a model was hardened from is held against the undefended runs, be it there or about to be made.
        monkeypatch.chdir(tmp_path)
        for name, told in (("d-m-1", {"weights": "new"}), ("d-m-hard-1", {"weights": "w5", "start_weights": "new"})):
            folder = Path("outputs/train") / name
            folder.mkdir(parents=True)
            write_json(folder / "summary.json", {**told, "start": "outputs/train/d-m-1/best.ckpt"})
        sweep._noted({("m", "a"): (cell("a", "d-m-1", "w4"),)})
        with pytest.raises(SystemExit, match=r"hardened from other weights \(new\) than those .* runs of d-m-1 \(w4\)"):
            sweep._noted({("m", "a"): (cell("a", "d-m-hard-1", "w5"),)})
        monkeypatch.setattr("sweep.planned", lambda *_: [[(Path("outputs/train/d-m-1"), {})]])
        with pytest.raises(SystemExit, match=r"d-m-1 was trained again, to other weights \(new\) than .* on it \(w4\)"):
            sweep._check_starts([], [cell("a", "d-m-1", "w6")])

    def test_what_chooses_values_is_a_table_of_its_own(self, workplace, monkeypatch):
        if not (workplace / OUT / "values").exists():
            here(monkeypatch, workplace, "baselines", "quick")
        with (workplace / OUT / "values/values.csv").open() as file:
            rows = {row["attack"]: row["kind"] for row in csv.DictReader(file)}
        assert rows == {"sparse_rs": "perturbation", "gaussian_noise": "corruption", "word_masking": "corruption"}
        written = (workplace / OUT / "values/values.csv").stat().st_mtime_ns
        here(monkeypatch, workplace, "baselines", "quick", "tabulate", "attacks=decoupling")
        assert (workplace / OUT / "values/values.csv").stat().st_mtime_ns == written
        here(monkeypatch, workplace, "baselines", "quick", "tabulate")
        with pytest.raises(SystemExit, match=r"attacks must be among audio_noise, .* got decoupling_embedding"):
            here(monkeypatch, workplace, "baselines", "quick", "attacks=decoupling_embedding")
        with pytest.raises(SystemExit, match=r"attacks must be among decoupling, .* got sparse_rs"):  # of values
            here(monkeypatch, workplace, "finer", "quick", "attacks=decoupling,sparse_rs")

    def test_results(self, workplace, monkeypatch, capsys):
        published = workplace / "docs/tables/vulnerability"
        here(monkeypatch, workplace, "vulnerability", "quick", "tabulate", "models=late_fusion")
        here(monkeypatch, workplace, "results")  # the first one is published, whatever it is of
        capsys.readouterr()
        here(monkeypatch, workplace, "vulnerability", "quick", "tabulate")
        here(monkeypatch, workplace, "results")
        told = f"{OUT}/vulnerability is not published, it is of a part alone (quick): docs/tables/vulnerability stays"
        assert told in capsys.readouterr().out
        assert "models=late_fusion" in (published / "about.json").read_text()
        shutil.rmtree(published)
        here(monkeypatch, workplace, "results")
        assert "vulnerability is not published" not in capsys.readouterr().out
        page = (workplace / "docs/results.md").read_text()
        for name in TABLES:
            made = (workplace / OUT / name / f"{name}.md").exists()
            assert f"`python experiments/{name}.py{' quick' if made else ''}`" in page
            picture = f"tables/{name}/{name}.png"
            assert (f"![{name}]({picture})" in page) == made == (workplace / "docs" / picture).exists()
        if not (workplace / OUT / "defense").exists():
            assert "`python experiments/defense.py` has not been run yet." in page
        (row,) = (
            row
            for row in csv.DictReader((workplace / OUT / "vulnerability/vulnerability.csv").open())
            if row["attack"] == "decoupling_reference"
        )
        assert f"The attack as released reaches {float(row['attack_success_rate']):.1f} % on easy_vqa" in page
        assert not re.search(r"\bnan\b|\{\{|\{%|Undefined", page)

    @pytest.mark.parametrize(
        ("words", "cells", "date", "why"),
        [
            ("", [4, 4], "2026-02-02", ""),
            ("full device=cpu tracker=wandb", [4, 4], "2026-02-02", ""),
            ("", [3, 4], "2026-02-02", "1 of its 4 cells are missing"),
            ("", [0, 4], "2026-02-02", "nothing of it was run"),
            ("", [4, 4], "2026-01-31", "it is older"),
            ("samples=5", [4, 4], "2026-02-02", "it is of a part alone (samples=5)"),
            ("threat_model.max_queries=3", [4, 4], "2026-02-02", "it is of a part alone (threat_model.max_queries=3)"),
        ],
    )
    def test_what_takes_the_place_of_a_published_table(self, tmp_path, monkeypatch, capsys, words, cells, date, why):
        known = {
            "command": "python experiments/t.py",
            "date": "2026-02-01",
            "torch": "2",
            "cells": [4, 4],
            "weights": {},
        }
        made = {**known, "command": f"python experiments/t.py {words}".strip(), "cells": cells, "date": date}
        for folder, about, text in (("docs/tables/t", known, "old"), (f"{OUT}/t", made, "new")):
            (tmp_path / folder).mkdir(parents=True)
            (tmp_path / folder / "about.json").write_text(json.dumps(about))
            (tmp_path / folder / "t.md").write_text(text)
        here(monkeypatch, tmp_path, "results")
        assert (tmp_path / "docs/tables/t/t.md").read_text() == ("old" if why else "new")
        assert (f"{OUT}/t is not published, {why}: docs/tables/t stays" in capsys.readouterr().out) == bool(why)

    def test_a_model_has_one_part_of_each_published_table(self):
        for page in (ROOT / "docs/tables").glob("*/*.md"):
            heads = re.findall(r"^\| \*\*(.+?)\*\*", page.read_text(), re.MULTILINE)
            assert len(set(heads)) == len(heads), page

    def test_published_tables_stay_without_the_runs(self, tmp_path, monkeypatch):
        """The page in the repository is what the published tables make."""
        shutil.copytree(ROOT / "docs/tables", tmp_path / "docs/tables")
        here(monkeypatch, tmp_path, "results")
        assert (tmp_path / "docs/results.md").read_text() == (ROOT / "docs/results.md").read_text()

    def test_archived_records_make_the_same_table(self, workplace, tmp_path, monkeypatch):
        here(monkeypatch, workplace, "vulnerability", "quick", "tabulate")
        here(monkeypatch, workplace, "archive", "pack", str(tmp_path / "records"))
        (archive,) = tmp_path.glob("records/*late_fusion*")
        first = archive.read_bytes()
        here(monkeypatch, workplace, "archive", "pack", str(tmp_path / "records"))
        assert archive.read_bytes() == first
        here(monkeypatch, tmp_path, "archive", "unpack", str(tmp_path / "records"))
        here(monkeypatch, tmp_path, "vulnerability", "quick", "tabulate")
        for file in ("vulnerability.csv", "vulnerability.md", "vulnerability.png"):
            assert (tmp_path / OUT / "vulnerability" / file).read_bytes() == (
                workplace / OUT / "vulnerability" / file
            ).read_bytes()
        assert list(tmp_path.glob("outputs/train/*late_fusion*/summary.json"))
        assert not list(tmp_path.glob("outputs/.*"))
        assert not list(tmp_path.glob("outputs/train/*/*.ckpt"))
        # What is there stays as it is, and what is archived does not go when less is packed.
        (first, *others) = sorted(tmp_path.glob("outputs/experiments/attacks/*"))
        (first / "records.jsonl").unlink()
        for folder in others:
            shutil.rmtree(folder)
        here(monkeypatch, tmp_path, "archive", "unpack", str(tmp_path / "records"))
        assert not (first / "records.jsonl").exists()
        assert all((folder / "records.jsonl").exists() for folder in others)
        shutil.rmtree(first)
        here(monkeypatch, tmp_path, "archive", "pack", str(tmp_path / "records"))
        here(monkeypatch, tmp_path, "archive", "unpack", str(tmp_path / "records"))
        assert (first / "records.jsonl").exists()
        with pytest.raises(SystemExit, match="expected pack or unpack, and perhaps a folder, got nothing"):
            here(monkeypatch, tmp_path, "archive")
        with pytest.raises(SystemExit, match="nothing holds no archive of records"):
            here(monkeypatch, tmp_path, "archive", "unpack", "nothing")
        with tarfile.open(tmp_path / "records/bad.tar.xz", "w:xz") as tar:
            tar.addfile(tarfile.TarInfo("../run.json"))
        with pytest.raises(SystemExit, match=r"bad.tar.xz is no archive of records: it holds '\.\./run.json'"):
            here(monkeypatch, tmp_path, "archive", "unpack", str(tmp_path / "records"))

    def test_an_archive_does_not_tell_where_the_data_lay(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "argv", command("archive", "pack")[1:])
        slim = runpy.run_path(str(ROOT / "experiments/archive.py"))["slim"]
        run = {"identity": {"seed": 0}, "config": {"seed": 0, "dataset": {"root": "/home/somebody", "use": None}}}
        (tmp_path / "run.json").write_text(json.dumps(run))
        kept = {"identity": {"seed": 0}, "config": {"seed": 0, "dataset": {"use": None}}}
        assert json.loads(slim(tmp_path / "run.json")) == kept

    def test_a_model_that_was_trained_again_is_not_attacked_beside_the_old_one(self, tmp_path, monkeypatch):
        """Before the attack, not after hours of it."""
        monkeypatch.syspath_prepend(str(ROOT / "experiments"))
        monkeypatch.setattr(sys, "argv", ["table.py", "models=mmbt", "datasets=easy_vqa", "seeds=0"])
        monkeypatch.delitem(sys.modules, "sweep", raising=False)
        import sweep

        monkeypatch.chdir(tmp_path)
        done, trained = write_cell(tmp_path, FIRST), tmp_path / "outputs/train/d-m-1"
        assert done.run is not None
        about = {**done.run.about, "checkpoint": {"path": str(trained / "best.ckpt"), "sha256": "old"}}
        done = replace(done, run=replace(done.run, about=about))
        asked: list[str] = []

        def run(*words: str) -> None:
            asked.append(words[0])
            trained.mkdir(parents=True, exist_ok=True)
            (trained / "summary.json").write_text(json.dumps({"weights": weights}))

        monkeypatch.setattr(sweep, "muroan", run)
        monkeypatch.setattr(sweep.Sweep, "_read", lambda *_: {("m", "a"): (done, absent(tmp_path, "a", 1))})
        for weights, commands in (("old", ["train", "attack"]), ("new", ["train"])):
            asked.clear()
            told = pytest.raises(SystemExit, match=r"d-m-1 was trained again, to other weights \(new\) than those of")
            with told if weights == "new" else nullcontext():
                sweep.Sweep({}, {}).cells("easy_vqa", ["decoupling"])
            assert asked == commands

    def test_made_anew_each_is_made_once(self, tmp_path, monkeypatch):
        """With `rerun=true`: not again for each part of the table that needs it."""
        monkeypatch.syspath_prepend(str(ROOT / "experiments"))
        monkeypatch.setattr(sys, "argv", ["table.py", "models=mmbt", "datasets=easy_vqa", "seeds=0", "rerun=true"])
        monkeypatch.delitem(sys.modules, "sweep", raising=False)
        import sweep

        monkeypatch.chdir(tmp_path)
        done = {n: replace(write_cell(tmp_path / n, FIRST), attack="decoupling", model="mmbt") for n in "ab"}
        found: list[str] = []
        asked: list[str] = []
        monkeypatch.setattr(sweep, "muroan", lambda *words: asked.append(words[0]))
        monkeypatch.setattr(sweep.Sweep, "_read", lambda *_: {("m", name): (done[name],) for name in found})
        table = sweep.Sweep({}, {})
        for names, defense, commands in (
            ("a", "none", ["train", "attack"]),
            ("a", "none", []),
            ("ab", "none", ["attack"]),
            ("b", "modality_dropout", []),
        ):
            found[:], asked[:] = names, []
            table.only("mmbt", 0).cells("easy_vqa", ["decoupling"], defense=defense)
            assert asked == commands
        done["b"] = replace(done["b"], folder=tmp_path / "other")
        asked.clear()
        table.cells("easy_vqa", ["decoupling"], defense="modality_dropout")
        assert asked == ["harden", "attack"], "the model that it starts from is there already"

    def test_runs_of_other_weights_do_not_stand_side_by_side(self, workplace, tmp_path, monkeypatch):
        here(monkeypatch, workplace, "archive", "pack", str(tmp_path / "records"))
        here(monkeypatch, tmp_path, "archive", "unpack", str(tmp_path / "records"))
        for file in tmp_path.glob(f"{OUT}/attacks/*late_fusion-random_removal-*/run.json"):
            run = json.loads(file.read_text())
            run["checkpoint"]["sha256"] = "0" * 64
            file.write_text(json.dumps(run))
        with pytest.raises(SystemExit, match=r"late_fusion-random_removal-\w+ is of other weights \(0{12}\) than"):
            here(monkeypatch, tmp_path, "vulnerability", "quick", "tabulate")

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("quik", "expected quick, full, tabulate or key=value, got quik"),
            ("datasets=hateful_memes", "datasets must be among easy_vqa, digit_sum, got hateful_memes"),
            ("models=mmbtt", "model/mmbtt"),
            ("seeds=one", "seeds must be whole numbers, got one"),
        ],
    )
    def test_a_bad_word_is_one_line(self, workplace, monkeypatch, word, message):
        with pytest.raises(SystemExit, match=message):
            here(monkeypatch, workplace, "vulnerability", "quick", "tabulate", word)


def here(monkeypatch: pytest.MonkeyPatch, workplace: Path, name: str, *words: str) -> None:
    """A command in this process, which has imported torch."""
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    monkeypatch.setattr(sys, "argv", command(name, *words)[1:])
    monkeypatch.delitem(sys.modules, "sweep", raising=False)
    runpy.run_path(str(ROOT / f"experiments/{name}.py"), run_name="__main__")
