"""Searches in processes of their own: the same records, and what goes wrong there is told here."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
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


class Unreadable:
    """Is sent, and cannot be put together again."""

    def __reduce__(self):
        return cannot, ()


def cannot():
    raise ValueError("cannot arrive")


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
    assert attack._universes
    assert pickle.loads(pickle.dumps(attack))._universes == {}, "they are large, and are not sent"
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
        if self.how == "exit":
            os._exit(3)
        if self.how == "lazy":
            yield Ask((Removal.of(sample.draw(1).regions[0]) for _ in range(3)), until=sample.flipped)
        if self.how == "together":
            yield Together(len)
        if self.how == "text":
            yield "text"
        if self.how == "number":
            yield 5
        if self.how == "until":
            yield Ask([Removal.of(sample.atoms()[1])], until=lambda response: True)
        raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("list", "search must be a generator"),
        ("together", "works on whole batches, which a search process cannot"),
        ("killed", r"ended before its searches did \(exit code -9, perhaps.*engine.search_processes=0"),
        ("exit", r"ended before its searches did \(exit code 3\)"),
        ("lazy", "asks lazily, which a search process cannot"),
        ("text", "must yield a list of removals or an Ask, got 'text'"),
        ("number", "must yield a list of removals or an Ask, got 5"),
    ],
)
def test_what_goes_wrong_there_is_told_here(how, expected):
    with pytest.raises(MuroanError, match=expected):
        records(Apart(how), 2)
    assert not children()


@pytest.mark.parametrize(
    ("how", "expected"),
    [("error", "in asking(.|\n)*KeyError: 'no such thing'"), ("until", "pickle")],
)
def test_an_error_comes_with_where_it_was_raised(how, expected):
    with pytest.raises(RuntimeError, match=expected):
        records(Apart(how), 1)
    assert not children()


def test_what_cannot_be_put_together_there_is_told_here(monkeypatch):
    def tell(self, number, message):
        self._send(self._where[number], (number, Unreadable()))

    monkeypatch.setattr(search_processes.SearchProcesses, "tell", tell)
    with pytest.raises(RuntimeError, match="cannot arrive"):
        records(Decoupling(), 1)


def test_an_engine_without_its_processes_is_done_for():
    engine = QueryEngine(RandomToy(), Apart("error"), threat(60, image=1), 8, search_processes=2)
    samples = varied(RandomToy(), 24)
    with pytest.raises(RuntimeError):
        list(engine.run(samples))
    for again in (engine.drain, lambda: engine.push(samples)):
        with pytest.raises(MuroanError, match="make a new engine"):
            list(again())


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("fits", [False, True])
def test_samples_that_fail_to_come_or_to_fit_end_no_search(fits, processes):
    """What was taken in before is finished, and no slot is lost."""
    model = RandomToy()

    def failing():
        *few, last = varied(model, 21)
        yield from few
        if fits:
            raise OSError("no more of them")
        yield replace(last, label=99)

    engine = QueryEngine(model, Decoupling(), threat(60, image=1), 32, search_processes=processes)
    found = []
    with pytest.raises(OSError if fits else MuroanError, match="no more" if fits else "has label 99"):
        found.extend(engine.push(failing()))
    slots = len(engine._free) + len(engine._live)
    assert slots == 32 * (2 if processes else 1)
    found.extend(engine.drain())
    assert len(found) == 20
    assert len(engine._free) == slots
    assert not children()


def test_results_are_given_out_before_an_error(monkeypatch):
    """What was finished when a process ended is not lost."""
    model = RandomToy()
    engine = QueryEngine(model, Decoupling(), threat(60, image=1), 8, search_processes=1)
    hear = search_processes.SearchProcesses.hear

    def heard(self, seconds=0):
        assert not engine._finished, "results are waiting while what is heard may be an error"
        return hear(self, seconds)

    monkeypatch.setattr(search_processes.SearchProcesses, "hear", heard)
    assert len(list(engine.run(varied(model, 24)))) == 24


def test_a_sample_is_sent_without_its_batch(monkeypatch):
    """One that came from a loader process is a view of all its batch."""
    model = RandomToy()
    (sample,) = varied(model, 1, wrong=100)
    batch = {name: torch.stack([x] * 1000) for name, x in sample.inputs.items()}
    sample = replace(sample, inputs={name: x[0] for name, x in batch.items()})
    sent: list[int] = []
    packed = search_processes._packed
    monkeypatch.setattr(
        search_processes, "_packed", lambda message: sent.append(len(packed(message))) or packed(message)
    )
    muroan.evaluate(
        model,
        [sample],
        Decoupling(),
        threat_model=threat(60, image=1),
        still_valid=right_without_words,
        search_processes=1,
    )
    assert sent
    assert max(sent) < min(x.nbytes for x in batch.values())


def test_an_engine_that_is_given_up_can_end_its_processes():
    model = RandomToy()
    engine = QueryEngine(model, Decoupling(), threat(60, image=1), 8, search_processes=2)
    next(engine.run(varied(model, 24)))
    assert len(children()) == 2
    engine.close()
    assert not children()


def test_no_process_outlives_its_engine():
    model = RandomToy()
    engine = QueryEngine(model, Decoupling(), threat(60, image=1), 8, search_processes=2)
    next(engine.run(varied(model, 24)))
    assert len(children()) == 2
    del engine
    gc.collect()
    assert not children()


def test_processes_end_that_have_hardly_begun():
    """A signal to end that comes before a process has its own way with signals is not lost."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        for _ in range(10):
            model = RandomToy()
            given = Decoupling(), model.modalities, threat(60, image=1), None
            search_processes.SearchProcesses(2, *given).close()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not children()


def test_signals_to_all_processes_are_the_engines(monkeypatch):
    model = RandomToy()
    expected = records(Decoupling(), 0)
    engine = QueryEngine(model, Decoupling(), threat(60, image=1), 8, seed=3, search_processes=2)
    running = engine.run(varied(model, 24))
    found = [next(running)]
    for pid in children():
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pid, number)
    found.extend(running)
    assert [record.to_json() for record in sorted(found, key=lambda record: record.index)] == expected


class Late:
    """An event of a GPU, which has filled a batch some time after it was given it."""

    def __init__(self, seconds: float):
        self.at = time.monotonic() + seconds

    def query(self) -> bool:
        return time.monotonic() >= self.at

    def synchronize(self) -> None:
        time.sleep(max(0.0, self.at - time.monotonic()))


class LateEngine(QueryEngine):
    """An engine whose model takes its time, as a GPU does, while the engine goes on."""

    def _forward(self, questions):
        sent = super()._forward(questions)
        sent.done = Late(0.02)
        return sent


@pytest.mark.parametrize("ahead", [1, 2])
def test_while_a_gpu_computes_searches_are_heard(ahead, monkeypatch):
    expected = records(Decoupling(), 0, count=8)
    hear = search_processes.SearchProcesses.hear
    meanwhile: list[int] = []

    def patient(self, seconds=0):
        """Hears nothing unless the engine waits for it: of how many it hears while a batch is computed."""
        if seconds == 0:
            return []
        heard = hear(self, seconds)
        if seconds is not None:
            meanwhile.append(len(heard))
        return heard

    monkeypatch.setattr(search_processes.SearchProcesses, "hear", patient)
    model = RandomToy()
    engine = LateEngine(model, Decoupling(), threat(60, image=1), 8, seed=3, ahead=ahead, search_processes=2)
    found = sorted(engine.run(varied(model, 8)), key=lambda record: record.index)
    assert [record.to_json() for record in found] == expected
    assert sum(meanwhile) > 0, "it waited for the model alone"


def in_a_pool(_: int) -> str:
    try:
        records(Decoupling(), 1)
    except MuroanError as error:
        return str(error)
    return ""


def test_a_process_that_may_have_none_says_so():
    with multiprocessing.get_context("fork").Pool(1) as pool:
        (said,) = pool.map(in_a_pool, [0])
    assert "engine.search_processes must be 0 in a process that may have none" in said


def orphan(pipe) -> None:
    """Starts an engine's processes, tells which, and is gone before it can end them."""
    model = RandomToy()
    engine = QueryEngine(model, Decoupling(), threat(60, image=1), 8, search_processes=2)
    next(engine.run(varied(model, 24)))
    pipe.send(children())
    time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
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


def test_a_process_whose_engine_was_gone_before_it_began_ends(monkeypatch):
    """It holds both ends of its pipe, as forks do, and would wait for ever."""
    monkeypatch.setattr(search_processes, "ORPHANED", 0.2)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    gone = context.Process(target=int)
    gone.start()
    gone.join()
    late = context.Process(target=search_processes._serve, args=(theirs, Decoupling(), {}, threat(9), None, gone.pid))
    late.start()
    late.join(20)
    assert late.exitcode == 1
    ours.close()


def running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"  # one that nobody has asked after is still listed


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
