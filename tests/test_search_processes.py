"""Searches in processes of their own: the same records, and what goes wrong there is told here."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import pytorch_lightning as pl
from test_engine import RandomToy, varied
from toys import threat

import muroan
from muroan import search_processes
from muroan.attacks.base import Ask, Attack, BudgetExhausted, Response, Together
from muroan.attacks.decoupling import Decoupling
from muroan.attacks.random_removal import RandomRemoval
from muroan.data.easy_vqa import EasyVQA
from muroan.engine import QueryEngine
from muroan.errors import MuroanError
from muroan.modalities import Region, Removal


def right_without_words(sample, removal: Removal) -> bool:
    """An oracle that needs the sample: the label stays right as long as every word of it is there."""
    return sample.inputs["text"].numel() > 0 and "text" not in removal.modalities


def children() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.pid]


def records(attack: Attack, processes: int, queries: int | None = 60, count: int = 24, **options) -> list[str]:
    model = RandomToy()
    options = {"threat_model": threat(queries, image=1), "batch_size": 8, "seed": 3, **options}
    found = muroan.evaluate(model, varied(model, count), attack, search_processes=processes, **options)
    return [record.to_json() for record in found]


@pytest.mark.parametrize("queries", [9, 60])
@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"objective": "parts"}, {"embedding": "argmax"}, {"first": True}, {"modalities": ["image"]}],
    ids=str,
)
def test_records_are_those_of_searches_beside_the_model(options, processes, queries):
    expected = records(Decoupling(**options), 0, queries)
    assert records(Decoupling(**options), processes, queries) == expected
    assert any('"flipped"' in record for record in expected)
    if not options and queries == 60:
        assert any('"proven":true' in record.replace(" ", "") for record in expected), "or no proof came back"


class Asker(Attack):
    """Asks all atoms at once and takes the first that flips of those it gets answers to."""

    def __init__(self, apart: bool):
        self.apart = apart

    def search(self, sample):
        removals = [Removal.of(atom) for atom in sample.atoms()]
        try:
            responses = yield removals
        except BudgetExhausted as refusal:
            responses = refusal.responses
            sample.info["answered"] = len(responses)
        return next((r for r, said in zip(removals, responses, strict=False) if sample.flipped(said)), None)


def test_a_refusal_comes_with_the_answers_that_the_budget_allowed():
    expected = records(Asker(False), 0, 5)
    assert records(Asker(True), 2, 5) == expected
    assert any('"answered":5' in record.replace(" ", "") for record in expected)
    assert any('"budget_exhausted"' in record for record in expected)


@pytest.mark.parametrize("ahead", [0, 1])
def test_batches_go_ahead_beside_other_processes(ahead):
    expected = records(Decoupling(), 0)
    model = RandomToy()
    engine = QueryEngine(model, Decoupling(), threat(60, image=1), 8, seed=3, ahead=ahead, search_processes=2)
    pushed = [record for sample in varied(model, 24) for record in engine.push([sample])]
    assert 0 < len(children()) <= 2
    found = sorted([*pushed, *engine.drain()], key=lambda record: record.index)
    assert [record.to_json() for record in found] == expected
    assert not children(), "the processes end with the last search"


def test_a_dataset_tells_there_whether_labels_are_right():
    attack = Decoupling(valid_only=True)
    expected = records(attack, 0, still_valid=right_without_words)
    assert records(attack, 2, still_valid=right_without_words) == expected
    assert any('"still_valid":true' in record.replace(" ", "") for record in expected)


def test_a_dataset_that_has_a_trainer_can_be_sent():
    data = EasyVQA(test_limit=8)
    data.trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    data.trainer.test_loop = (i for i in range(3))  # of what trainers have, some cannot be sent
    judge = data.judge("test")
    assert judge is not None
    (sample, *_) = data.prepared("test")
    removal = Removal.of(Region("text", (0,), (2,)))
    assert pickle.loads(pickle.dumps(judge))(sample, removal) == data.still_valid(sample, removal)


def test_processes_that_are_started_afresh(monkeypatch):
    """As on a Mac: nothing is inherited, so that all that is needed must be sent."""
    context = multiprocessing.get_context("spawn")
    monkeypatch.setattr(search_processes.multiprocessing, "get_context", lambda method: context)
    attack = Decoupling()
    expected = records(attack, 0, count=4)
    assert attack._universes, "which are left behind"
    assert records(attack, 1, count=4) == expected


def test_other_attacks_start_no_process(monkeypatch):
    monkeypatch.setattr("muroan.engine.SearchProcesses", None)
    assert records(RandomRemoval(), 2) == records(RandomRemoval(), 0)


def test_a_budget_that_is_too_small_is_told_here():
    with pytest.raises(MuroanError, match=r"max_queries=2 is too small.*its first phase asks"):
        records(Decoupling(), 2, queries=2)


class Apart(Attack):
    """A search that fails in one of several ways."""

    apart = True

    def __init__(self, how: str):
        self.how = how

    def search(self, sample):
        if self.how == "list":
            return [Removal()]
        return self.asking(sample)

    def asking(self, sample):
        yield Ask([Removal.of(sample.atoms()[0])])
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "together":
            yield Together(len)
        if self.how == "text":
            yield "text"
        if self.how == "until":
            yield Ask([Removal.of(sample.atoms()[1])], until=lambda response: True)
        raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("list", "search must be a generator"),
        ("together", "works on whole batches, which a search process cannot"),
        ("killed", "a search process has ended before its searches did.*engine.search_processes=0"),
        ("text", "must yield a list of removals or an Ask, got 'text'"),
    ],
)
def test_what_goes_wrong_there_is_told_here(how, expected):
    with pytest.raises(MuroanError, match=expected):
        records(Apart(how), 2)


@pytest.mark.parametrize(
    ("how", "expected"),
    [("error", "in asking(.|\n)*KeyError: 'no such thing'"), ("until", "pickle")],
)
def test_an_error_comes_with_where_it_was_raised(how, expected):
    with pytest.raises(RuntimeError, match=expected):
        records(Apart(how), 1)


def test_no_process_outlives_its_engine():
    model = RandomToy()
    engine = QueryEngine(model, Decoupling(), threat(60, image=1), 8, search_processes=2)
    next(engine.run(varied(model, 24)))
    alive = children()
    assert len(alive) == 2
    del engine
    gc.collect()
    assert not children()


def orphan(pipe) -> None:
    """Starts an engine's processes, tells which, and is gone before it can end them."""
    model = RandomToy()
    engine = QueryEngine(model, Decoupling(), threat(60, image=1), 8, search_processes=2)
    next(engine.run(varied(model, 24)))
    pipe.send(children())
    time.sleep(60)


def test_no_process_outlives_an_engine_that_is_killed(monkeypatch):
    monkeypatch.setattr(search_processes, "ORPHANED", 0.2)
    context = multiprocessing.get_context("fork")  # the shorter wait is inherited
    ours, theirs = context.Pipe()
    parent = context.Process(target=orphan, args=(theirs,))
    parent.start()
    left = ours.recv()
    assert len(left) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    until = time.monotonic() + 20
    while any(running(pid) for pid in left):
        assert time.monotonic() < until, "a search process is still there"
        time.sleep(0.1)


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:  # one that nobody has asked after is still listed
        return stat.read().rpartition(")")[2].split()[0] != "Z"


def test_a_number_of_processes_must_be_one():
    with pytest.raises(MuroanError, match=r"search_processes.*-1"):
        records(Decoupling(), -1)


def test_answers_and_removals_are_the_same_when_they_arrive():
    removal = Removal.of(Region("image", (0, 1), (2, 3)), Region("text", (0,), (1,)))
    assert pickle.loads(pickle.dumps(removal)) == removal
    response = Response(1, -0.5, 3, 0.25, np.arange(3.0), 0.125)
    found = pickle.loads(pickle.dumps(response))
    assert replace(found, logits=None) == replace(response, logits=None)
    assert np.array_equal(found.logits, response.logits)
