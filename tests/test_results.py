"""Records on disk: nothing is lost, nothing is counted twice, and a damaged file says what is wrong."""

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muroan.errors import MuroanError
from muroan.modalities import Region
from muroan.results import AttackResult, Count, RunFolder, fingerprint, read_records, what_differs, write_records

IDENTITY = {"model": {"name": "mmbt", "width": 64}, "attack": "x", "seed": 0}


def record(index: int, attack: str = "x", **fields) -> AttackResult:
    return AttackResult(f"s{index}", index, attack, 0, 0, 0, **{"status": "held", **fields})


names = st.text(min_size=1, max_size=8)
sizes = st.integers(0, 2**40)
corners = st.lists(st.integers(0, 10**6), min_size=1, max_size=3).map(tuple)
results = st.builds(
    AttackResult,
    id=st.text(),
    index=sizes,
    attack=st.text(),
    label=sizes,
    clean_label=sizes,
    adversarial_label=sizes,
    status=st.sampled_from(["flipped", "held", "budget_exhausted", "skipped"]),
    regions=st.lists(st.tuples(names, corners, corners), max_size=4),
    removed=st.dictionaries(names, sizes, max_size=3),
    total=st.dictionaries(names, sizes, max_size=3),
    ledger=st.dictionaries(names, st.builds(Count, sizes, sizes, sizes, sizes), max_size=3),
    one_minimal=st.none() | st.booleans(),
    interaction=st.none() | st.booleans(),
    kind=st.sampled_from(["removal", "perturbation", "corruption"]),
    distance=st.dictionaries(names, st.dictionaries(names, st.floats(allow_nan=False), max_size=2), max_size=2),
    proven=st.none() | st.booleans(),
    still_valid=st.none() | st.booleans(),
    trajectory=st.lists(st.tuples(sizes, st.floats(allow_nan=False)), max_size=3),
    info=st.dictionaries(names, st.none() | st.booleans() | sizes | st.floats(allow_nan=False) | names, max_size=3),
    media=st.none() | st.dictionaries(names, st.dictionaries(names, st.lists(sizes))),
)


class TestRecord:
    @given(results)
    def test_round_trip(self, result):
        line = result.to_json()
        assert "\n" not in line
        assert AttackResult.from_json(line) == result

    def test_derived_figures(self):
        ledger = {"clean": Count(0, 1, 0), "salient": Count(10, 8, 2), "combine": Count(5, 5, 1)}
        total = {"image": 4000, "text": 1000}
        r = record(0, status="flipped", removed={"image": 40, "text": 10}, total=total, ledger=ledger)
        assert r.decoupled_fraction == 1.0
        assert (r.modality_fraction("image"), r.modality_fraction("text")) == (1.0, 1.0)
        assert (r.queries, r.forwards, r.cache_hits) == (15, 14, 3)
        assert r.attacked
        assert r.flipped
        assert not record(0, status="skipped").attacked
        assert record(0).decoupled_fraction == 0.0

    def test_removal(self):
        r = record(0, regions=[("text", (1,), (2,)), ("image", (0, 0), (4, 8)), ("text", (1,), (2,))])
        assert r.removal.regions == (Region("text", (1,), (2,)), Region("image", (0, 0), (4, 8)))
        assert r.removal.modalities == ("image", "text")

    def test_keys_that_are_no_fields_are_left_out(self):
        line = json.dumps({"run": "a", "model": "mmbt", **asdict(record(3))})
        assert AttackResult.from_json(line) == record(3)


class TestReading:
    def test_files(self, tmp_path):
        records = [record(i) for i in range(3)]
        write_records(tmp_path / "r.jsonl", records)
        assert read_records(tmp_path / "r.jsonl") == records
        assert [file.name for file in tmp_path.iterdir()] == ["r.jsonl"]

    @given(st.integers(0, 10**6))
    def test_a_kill_at_any_byte_costs_no_whole_line(self, tmp_path_factory, cut):
        records = [record(i, info={"word": "naïve ☂"}) for i in range(3)]
        content = "".join(r.to_json() + "\n" for r in records).encode()
        cut %= len(content) + 1
        path = tmp_path_factory.mktemp("torn") / "records.part-0.jsonl"
        path.write_bytes(content[:cut])
        whole = content[:cut].count(b"\n")
        assert read_records(path) == records[:whole]
        # What is appended after the kill is read back whole.
        folder = RunFolder(path.parent)
        for r in records[whole:]:
            folder.append(r)
        folder.close()
        assert read_records(path) == records

    @pytest.mark.parametrize("line", ["{", "[]", "3", "{}", '{"id": "a"}', "", "\xff", "null"])
    def test_an_edited_line_is_named(self, tmp_path, line):
        path = tmp_path / "records.jsonl"
        path.write_bytes((record(0).to_json() + "\n" + line + "\n" + record(2).to_json() + "\n").encode("latin1"))
        with pytest.raises(MuroanError, match=r"records.jsonl line 2 is not an attack record") as caught:
            read_records(path)
        assert "remove the file" in str(caught.value)

    def test_a_misspelt_required_field_is_an_error(self, tmp_path):
        path = tmp_path / "records.jsonl"
        path.write_text(record(0).to_json().replace('"status"', '"state"') + "\n")
        with pytest.raises(MuroanError, match=r"line 1.*status"):
            read_records(path)


class TestRunFolder:
    def test_a_run_from_start_to_finish(self, tmp_path):
        folder = RunFolder(tmp_path / "deep" / "run")
        folder.start({"identity": IDENTITY, "attack": "x"})
        assert folder.run == {"identity": IDENTITY, "attack": "x", "fingerprint": fingerprint(IDENTITY)}
        assert folder.records() == []
        for i in (2, 0, 1):
            folder.append(record(i))
        assert [r.index for r in folder.records()] == [0, 1, 2]
        assert not folder.finished
        assert folder.finish() == [record(0), record(1), record(2)]
        assert folder.finished
        assert sorted(file.name for file in folder.path.iterdir()) == ["records.jsonl", "run.json"]
        assert RunFolder(folder.path).records() == folder.records()

    def test_records_are_on_disk_at_once(self, tmp_path):
        folder = RunFolder(tmp_path)
        folder.append(record(0))
        assert RunFolder(tmp_path).records() == [record(0)]
        folder.close()

    def test_resumed_run_goes_on(self, tmp_path):
        first = RunFolder(tmp_path)
        first.start({"identity": IDENTITY})
        first.append(record(0))
        first.append(record(1))
        first.close()
        part = tmp_path / "records.part-0.jsonl"
        part.write_bytes(part.read_bytes()[:-7])  # the kill
        second = RunFolder(tmp_path)
        second.start({"identity": IDENTITY})
        assert second.records() == [record(0)]
        second.append(record(1))
        second.append(record(2))
        assert second.finish() == [record(0), record(1), record(2)]

    def test_parts_of_all_ranks_merge_and_none_counts_twice(self, tmp_path):
        for rank, indices in ((0, (0, 2, 4)), (1, (1, 3, 4)), (10, (5,))):  # padding gave sample 4 to both
            folder = RunFolder(tmp_path, rank)
            for i in indices:
                folder.append(record(i))
            folder.close()
        assert [r.index for r in RunFolder(tmp_path).finish()] == [0, 1, 2, 3, 4, 5]
        assert not list(tmp_path.glob("records.part-*"))

    def test_killed_between_writing_and_clearing_up(self, tmp_path):
        folder = RunFolder(tmp_path)
        folder.append(record(0))
        folder.close()
        write_records(folder.records_file, [record(0)])
        assert folder.finish() == [record(0)]

    def test_unreadable_samples_are_counted_once(self, tmp_path):
        folders = [RunFolder(tmp_path, rank) for rank in (0, 1)]
        folders[0].start({"identity": IDENTITY})
        folders[0].append_unreadable([("s1", "no such file"), ("s9", "truncated")])
        part = tmp_path / "unreadable.part-0.jsonl"
        part.write_bytes(part.read_bytes()[:-5])  # the kill
        folders[0].append_unreadable([("s9", "truncated")])
        folders[1].append_unreadable([("s1", "no such file")])
        folders[1].append_unreadable([])
        with part.open("a") as file:
            file.write('["s8", "cut sh')
        folders[0].finish()
        assert folders[0].run["unreadable"] == [["s1", "no such file"], ["s9", "truncated"]]
        assert not list(tmp_path.glob("*.part-*"))

    def test_started_anew(self, tmp_path):
        folder = RunFolder(tmp_path)
        folder.start({"identity": IDENTITY})
        folder.append(record(0))
        folder.finish()
        assert folder.matches({"identity": IDENTITY})
        assert not folder.matches({"identity": {}})
        (tmp_path / "summary.json").write_text("{}")
        folder.clear()
        assert not folder.finished
        assert not (tmp_path / "summary.json").exists(), "figures of what is run again"
        folder.start({"identity": {}})
        assert folder.records() == []

    def test_order_is_by_the_samples_place_not_by_name(self, tmp_path):
        folder = RunFolder(tmp_path)
        for i in (10, 9, 100):
            folder.append(record(i))
        assert [r.index for r in folder.finish()] == [9, 10, 100]

    def test_attacks_in_one_folder_are_kept_apart(self, tmp_path):
        folder = RunFolder(tmp_path)
        for attack in ("y", "x"):
            folder.append(record(0, attack))
        assert [r.attack for r in folder.finish()] == ["x", "y"]

    def test_another_configuration_is_refused(self, tmp_path):
        folder = RunFolder(tmp_path)
        folder.start({"identity": IDENTITY})
        other = {**IDENTITY, "model": {"name": "mmbt", "width": 128}, "limit": 5}
        with pytest.raises(MuroanError) as caught:
            folder.start({"identity": other})
        said = str(caught.value)
        assert "model.width: 64 there, 128 asked for" in said
        assert "limit: None there, 5 asked for" in said
        assert "seed" not in said
        assert folder.run["identity"] == IDENTITY

    def test_the_same_configuration_in_other_spelling_is_the_same(self, tmp_path):
        folder = RunFolder(tmp_path)
        folder.start({"identity": {"a": [1, 2], "b": 1}})
        folder.start({"identity": {"b": 1, "a": (1, 2)}})
        assert fingerprint({"a": [1, 2], "b": 1}) == fingerprint({"b": 1, "a": (1, 2)})

    def test_not_a_run(self, tmp_path):
        with pytest.raises(MuroanError, match="holds no attack run"):
            _ = RunFolder(tmp_path).run
        (tmp_path / "run.json").write_text('{"identity": ')
        with pytest.raises(MuroanError, match="is not JSON"):
            _ = RunFolder(tmp_path).run


def test_differences_are_few_and_named():
    old = {"a": 1, "b": {"c": [1], "d": 2}}
    assert what_differs(old, old) == ""
    assert what_differs(old, {"a": 1, "b": {"c": [2], "d": 2}}) == "b.c: [1] there, [2] asked for"
    many = what_differs(dict.fromkeys("abcdef", 0), dict.fromkeys("abcdef", 1))
    assert many.count("asked for") == 4
    assert many.endswith("…")
