"""Searches in processes of their own, beside the one that holds the model.

A search such as that of `decoupling` computes longer between its questions than a GPU takes to answer them. What it
computes can be done elsewhere: the engine keeps the budget, the ledger and the batches, and these processes get answers
and give back the next questions.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import pickle
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from muroan.attacks.base import Ask, Attack, AttackedSample, BudgetExhausted, Search, ThreatModel, Together
from muroan.data.samples import Sample
from muroan.errors import MuroanError
from muroan.modalities import Modality, Removal

ORPHANED = 5.0  # seconds without a message until a look whether the engine's process is still there

# Signals that go to all processes of a command, and are the engine's to act on.
TO_ALL = [getattr(signal, name) for name in ("SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]

StillValid = Callable[[Sample, Removal], "bool | None"]


@dataclass(slots=True)
class Reply:
    """What a search says to the answers that it was given.

    Attributes:
        asked: what it yields; None when it has ended.
        found: what it returned; exhausted: whether the budget ended it.
        proven, info: what it has written about its sample, where it ended in another process.
        error: what it raised in another process; where it was no `MuroanError`, with where that was.
    """

    asked: Any = None
    ended: bool = False
    found: Any = None
    exhausted: bool = False
    proven: bool | None = None
    info: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None


def begun(attack: Attack, view: AttackedSample) -> Search:
    """The search of an attack for a sample.

    Raises:
        MuroanError: it is no generator.
    """
    search = attack.search(view)
    if not isinstance(search, Generator):
        raise MuroanError(f"{attack.name}.search must be a generator, which yields what it asks, got {search!r}")
    return search


def resumed(search: Search, message: Any) -> Reply:
    """Let a search go on.

    Args:
        message: None to start it; answers; or the refusal of what the budget does not allow.
    """
    try:
        if message is None:
            return Reply(next(search))
        return Reply(search.throw(message) if isinstance(message, BudgetExhausted) else search.send(message))
    except StopIteration as stop:
        return Reply(ended=True, found=stop.value)
    except BudgetExhausted:
        return Reply(ended=True, exhausted=True)


class SearchProcesses:
    """Processes that run the searches of one attack.

    Each search is known by a number and stays in the process that began it.

    Args:
        count: how many processes.
        attack: whose `apart` is set.
        modalities, threat_model, still_valid: what its searches may look at.

    Raises:
        MuroanError: this process may have none of its own.
    """

    def __init__(
        self,
        count: int,
        attack: Attack,
        modalities: Mapping[str, Modality],
        threat_model: ThreatModel,
        still_valid: StillValid | None,
    ):
        if multiprocessing.current_process().daemon:
            raise MuroanError(
                "engine.search_processes must be 0 in a process that may have none of its own, such as a worker of "
                "multiprocessing.Pool"
            )
        self.still_valid = still_valid
        self._where: dict[int, Connection] = {}  # the process of each search, by its end
        self._searching: dict[Connection, int] = {}  # how many searches each process has
        self._processes: dict[Connection, multiprocessing.process.BaseProcess] = {}
        self.close = weakref.finalize(self, _stop, self._processes, os.getpid())
        # A fork is the fastest, and all that Linux needs; elsewhere all is sent.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        for _ in range(count):
            ours, theirs = context.Pipe()
            given = theirs, attack, dict(modalities), threat_model, still_valid, os.getpid()
            process = context.Process(target=_serve, args=given, daemon=True)  # type: ignore[attr-defined]
            with _held_back():
                process.start()
            theirs.close()
            self._processes[ours], self._searching[ours] = process, 0

    def start(self, number: int, view: AttackedSample, sample: Sample) -> None:
        """Begin a search, in the process that has the fewest."""
        where = self._where[number] = min(self._searching, key=self._searching.__getitem__)
        self._searching[where] += 1
        seen = view.id, view.label, view.clean, view.layouts, view.rng
        if self.still_valid is None:
            self._send(where, (number, (*seen, None)))
        else:  # not as a view of a whole batch, which would be sent with it
            inputs = {name: x.clone() for name, x in sample.inputs.items()}
            self._send(where, (number, (*seen, replace(sample, inputs=inputs))))

    def tell(self, number: int, message: Sequence[Any] | BudgetExhausted) -> None:
        """Give a search its answers, or the refusal of what it asked."""
        self._send(self._where[number], (number, message))

    def hear(self, seconds: float | None = 0) -> list[tuple[int, Reply]]:
        """What searches have replied, by their numbers; waits so long for a first reply, with None without end.

        Raises:
            MuroanError: a process is gone, or a search raised it there.
            RuntimeError: a search raised anything else.
        """
        heard = []
        for where in multiprocessing.connection.wait(list(self._searching), seconds):
            assert isinstance(where, Connection)
            while where.poll():
                try:
                    number, reply = pickle.loads(where.recv_bytes())
                except (EOFError, OSError):
                    raise self._gone(where) from None
                if reply.error is not None:
                    raise reply.error
                if reply.ended:
                    self._searching[self._where.pop(number)] -= 1
                heard.append((number, reply))
        return heard

    def _send(self, where: Connection, message: Any) -> None:
        packed = _packed(message)
        try:
            where.send_bytes(packed)
        except OSError:
            raise self._gone(where) from None

    def _gone(self, where: Connection) -> MuroanError:
        process = self._processes[where]
        process.join(1)
        why = ", perhaps for want of memory" if process.exitcode == -9 else ""
        return MuroanError(
            f"a search process has ended before its searches did (exit code {process.exitcode}{why}): go on with "
            f"fewer, engine.search_processes=0 for none; finished samples are kept"
        )


def _packed(message: Any) -> bytes:
    """By pickle alone: torch would hand tensors over as files, of which a process may have only so many."""
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


def _stop(processes: Mapping[Connection, multiprocessing.process.BaseProcess], owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork of the engine's process ends, not that itself
    for process in processes.values():
        process.kill()  # they have nothing to save
    for end, process in processes.items():
        process.join()
        end.close()


@contextmanager
def _held_back() -> Iterator[None]:
    """Signals to all processes wait, here and in a process that starts, until it knows that they are not for it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TO_ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(
    connection: Connection,
    attack: Attack,
    modalities: Mapping[str, Modality],
    threat_model: ThreatModel,
    still_valid: StillValid | None,
    parent: int,
) -> None:
    """The life of a search process. It ends with that of its parent, even where that was over before."""
    for number in TO_ALL:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, TO_ALL)
    gc.freeze()  # what came with a fork, tensors of a GPU among it, is not to be touched
    torch.set_num_threads(1)
    messages = SimpleQueue[bytes]()

    def listen() -> None:
        # All the time: were nobody reading at either end while both write, both would wait for ever.
        while True:
            try:
                if connection.poll(ORPHANED):
                    messages.put(connection.recv_bytes())
                elif os.getppid() != parent:
                    os._exit(1)
            except (EOFError, OSError):
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    below: Any = {}
    searches: dict[int, tuple[AttackedSample, Search]] = {}

    def reply(number: int, message: Any) -> Reply:
        if number not in searches:
            name, label, clean, layouts, rng, sample = message
            valid = None if still_valid is None else partial(still_valid, sample)
            view = AttackedSample(name, label, clean, modalities, layouts, threat_model, rng, valid, below=below)
            searches[number], message = (view, begun(attack, view)), None
        view, search = searches[number]
        found = resumed(search, message)
        if found.ended:
            found.proven, found.info = view.proven, view.info
            del searches[number]
        else:
            found.asked = _listed(found.asked, attack)
        return found

    with threadpool_limits(1):
        while True:
            number = -1  # as long as it is not known
            try:
                number, message = pickle.loads(messages.get())
                packed = _packed((number, reply(number, message)))
            except MuroanError as error:
                packed = _packed((number, Reply(error=error)))
            except Exception:
                trace = RuntimeError(f"in a search process:\n{traceback.format_exc()}")
                packed = _packed((number, Reply(error=trace)))
            connection.send_bytes(packed)


def _listed(asked: Any, attack: Attack) -> Any:
    """What a search yields, as what can be sent."""
    if isinstance(asked, Together):
        raise MuroanError(f"{attack.name} works on whole batches, which a search process cannot: leave `apart` unset")
    if isinstance(asked.removals if isinstance(asked, Ask) else asked, Iterator):
        # All of them would be drawn, and what a search draws later would be another.
        raise MuroanError(
            f"{attack.name} asks lazily, which a search process cannot: ask lists, or leave `apart` unset"
        )
    return asked
