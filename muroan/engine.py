"""The query engine: keeps many searches alive and packs what they ask into full batches.

Every live sample has a slot on the device, which holds its inputs and the features of its untouched modalities. A
question is a removal; a batch of questions encodes only the parts that the removals touch, then fuses and classifies.
The engine, not the attack, counts, enforces the budget, and recomputes success and size of what comes back.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from muroan.attacks.base import Ask, Attack, AttackedSample, Below, Response, ThreatModel, Together
from muroan.attacks.target import BudgetExhausted, Perturbation, Target
from muroan.data.samples import Sample
from muroan.device_store import DeviceStore, take_rows
from muroan.errors import MuroanError, check_whole
from muroan.modalities import ElementSet, Layout, Region, Removal, removed_elements, stable_seed, word_edits
from muroan.models.base import Features, MultimodalModel, Prediction, map_features, without_mask
from muroan.results import AttackResult, Count, Status
from muroan.search_processes import Reply, SearchProcesses, StillValid, begun, resumed

# What is removed of a sample, however it is spelled: of each touched modality, in the model's order, the number that
# its search has given to the set of removed elements. The sets themselves are long numbers, slow to tell apart.
Key = tuple[tuple[str, int], ...]

# The engine's own phases: they cost forwards and are no queries of the attacker's.
CLEAN, VERIFY, AUDIT = OWN_PHASES = ("clean", "verify", "audit")

GLANCE = 5e-4  # seconds of waiting for searches in other processes before a look whether a GPU is done
LOOK_AHEAD = 32  # removals drawn at most to find a new question: an ask may repeat itself without end

REGIONS = frozenset([Region])

AUTOCAST = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}


@dataclass(eq=False, slots=True)
class _Question:
    """One row of a batch. A fresh one encodes every modality anew and bypasses the cache.

    With `work`, it is a row of what that function does with a whole batch, and no removal.
    """

    live: _Live
    key: Key = ()
    removal: Removal = field(default_factory=Removal)
    fresh: bool = False
    work: Callable[[list[_Live]], Sequence[Any]] | None = None


@dataclass(eq=False, slots=True)
class _Sent:
    """A batch that the model has been given.

    Attributes:
        packed: (B, C + 4) on the CPU, what `_numbers` makes of the model's answers; a GPU may still be at it.
        classes: C.
        done: tells when a GPU has filled `packed`; None where it is filled.
    """

    questions: list[_Question]
    packed: Tensor
    classes: int
    done: torch.cuda.Event | None

    @property
    def filled(self) -> bool:
        return self.done is None or self.done.query()

    def wait(self) -> np.ndarray:
        """`packed`, as soon as it is filled."""
        if self.done is not None:
            self.done.synchronize()
        return self.packed.numpy().copy()  # a GPU writes to memory of a kind that is scarce, and answers are kept


Conversation = Generator[list[_Question], None, AttackResult]


def _shrinking(flips: Iterable[tuple[int, float, float]], last: float) -> list[tuple[int, float]]:
    """Of (queries, cost, size) those that cost less than all before, down to the cost of what was returned.

    Returns:
        (queries, size)
    """
    kept: list[tuple[int, float]] = []
    least = math.inf
    for at, cost, size in flips:
        if cost >= last - 1e-9 and (not kept or cost < least):
            kept.append((at, size))
            least = cost
    return kept


def _is_removal(found: Any) -> bool:
    """Whether this is a removal of regions: `Removal(region)` is none, for a region is a tuple, too."""
    return isinstance(found, Removal) and REGIONS.issuperset(map(type, found.regions))


@dataclass(eq=False, slots=True)
class _Live:
    """A search under way.

    Attributes:
        number: unique among all samples of the engine; slot: where the sample's tensors lie in the store.
        budget: queries left; queries: asked so far.
        sets: of each modality the sets of removed elements so far, and their numbers, from 1.
        flips: (queries, the attack's cost, decoupled fraction in percent) of every one that was seen.
        answers: every answer so far. `asked` are the keys that the search has been given answers to: the engine may
            know more than that, having run ahead, and the ledger must not depend on it.
        refused: whether the budget kept a function of the attack's from a pass; see `Target.refused`.
        wanted: questions that wait for a batch; in_flight: how many are in one.
        reply: what its search said last, where that runs in a process of its own.
        window, upcoming: removals of an ask, drawn and not yet drawn; of an `until` ask, with each drawn one goes the
            state that the search's random generator was left in, as running ahead must not change what is drawn later.
        posed: the keys of the ask that the model was given one by one; stops: whether it is an `until` ask.
    """

    sample: Sample
    number: int
    slot: int
    budget: float
    queries: int = 0
    conversation: Conversation | None = None
    answers: dict[Key, Response] = field(default_factory=dict)
    asked: set[Key] = field(default_factory=set)
    refused: bool = False
    verified: Response | None = None
    told: Any = None
    reply: Reply | None = None
    view: AttackedSample | None = None
    sets: dict[str, dict[ElementSet, int]] = field(default_factory=dict)
    flips: list[tuple[int, float, float]] = field(default_factory=list)
    ledger: dict[str, Count] = field(default_factory=dict)
    wanted: deque[_Question] = field(default_factory=deque)
    in_flight: int = 0
    window: deque[tuple[Key, Removal, Any]] = field(default_factory=deque)
    upcoming: Iterator[Removal] = field(default_factory=lambda: iter(()))
    posed: set[Key] = field(default_factory=set)
    stops: bool = False
    rng: np.random.Generator | None = None

    def key(self, removal: Removal) -> Key:
        removed, key = removed_elements(removal, self.sample.layouts), []
        for name in self.sample.layouts:
            if name in removed:
                sets = self.sets.setdefault(name, {})
                key.append((name, sets.setdefault(removed[name], len(sets) + 1)))
        return tuple(key)

    def answered(self, key: Key, phase: str) -> Response:
        """Give out an answer and enter it into the ledger."""
        count = self.ledger.get(phase) or self.ledger.setdefault(phase, Count())
        if key in self.asked:
            count.cache_hits += 1
        else:
            self.asked.add(key)
            count.forwards += 1
            if phase not in OWN_PHASES:
                count.queries += 1
                self.budget -= 1
                self.queries += 1
        return self.answers[key]

    def note_flip(self, cost: float, fraction: float) -> None:
        """Enter a flip, as many queries after the start."""
        self.flips.append((self.queries, cost, fraction))

    def affordable(self, key: Key, phase: str) -> bool:
        return key in self.asked or phase in OWN_PHASES or self.budget >= 1

    def draw(self) -> bool:
        """Draw one more removal of an ask into the window; False when there is none."""
        removal = next(self.upcoming, None)
        if removal is not None:
            state = self.rng.bit_generator.state if self.stops and self.rng is not None else None
            self.window.append((self.key(removal), removal, state))
        return removal is not None

    def look_ahead(self) -> _Question | None:
        """A further question of an `until` ask that the search will probably come to; None when none is in sight."""
        for _ in range(LOOK_AHEAD):
            if len(self.window) >= self.budget or not self.draw():
                return None
            key, removal, _ = self.window[-1]
            if key not in self.answers and key not in self.posed:
                self.posed.add(key)
                return _Question(self, key, removal)
        return None

    def close_ask(self) -> None:
        """Forget what was drawn ahead."""
        self.window.clear()
        self.posed.clear()
        self.upcoming = iter(())


@dataclass(slots=True)
class EngineStatistics:
    """What the engine ran, over all samples.

    Attributes:
        batches, rows: model calls, and rows in them: every forward, those run ahead in vain included. Passes that a
            `BatchAttack` makes through its `Target` are in `rows` alone, backward ones in neither.
        repeated: rows that were only to show that the model answers the same twice.
        encoded: rows encoded, a modality; `rows` minus this many were reused.
        out_of_memory: times that the device ran out of memory, and the engine went on without remembered features or
            with batches of half the size.
        disagreements: samples whose verification contradicted what the search had been told.
    """

    batches: int = 0
    rows: int = 0
    repeated: int = 0
    encoded: dict[str, int] = field(default_factory=dict)
    out_of_memory: int = 0
    disagreements: int = 0


class QueryEngine:
    """Runs an attack over samples.

    Results do not depend on batch size, order of samples, number of processes or resumption (up to the rounding of
    the model's arithmetic, which may depend on the batch size).

    Args:
        model: in evaluation mode; it stays on its device, which is where the engine works.
        attack: any attack.
        threat_model: see `ThreatModel`.
        batch_size: rows of a model call; halved when the device runs out of memory.
        precision: `32` (the model's own type), or autocast to `bf16` or `16`.
        seed: of the attack's draws and of noise replacements.
        keep_media: records of the first so many samples hold what a report needs to draw them.
        reuse_features: False encodes every modality for every question; for measuring.
        donors: samples that are not attacked, from which an attack may take parts.
        still_valid: the dataset's; see `MultimodalData.still_valid`.
        on_found: is told what each search returned, whether it flips or not.
        search_processes: so many more, in which the searches of an attack that allows it (`Attack.apart`) run beside
            the model; 0 for none. Which questions share a batch then depends on which search is done first. Anywhere
            but on Linux a script of yours needs the usual `if __name__ == "__main__":`.
        audit: False leaves out whether parts of a flip can be put back: `one_minimal` and `interaction` stay None.
        ahead: full batches that the model is given before the answers to an earlier one are awaited, so that a GPU
            computes while searches think; None for 1 on a GPU and 0 elsewhere.

    Raises:
        MuroanError: the model is in training mode, or the threat model does not fit it.
    """

    def __init__(
        self,
        model: MultimodalModel,
        attack: Attack,
        threat_model: ThreatModel | None = None,
        batch_size: int = 64,
        precision: str = "32",
        seed: int = 0,
        keep_media: int = 48,
        reuse_features: bool = True,
        donors: Sequence[Sample] = (),
        still_valid: StillValid | None = None,
        on_found: Callable[[Sample, Removal | Perturbation], None] | None = None,
        audit: bool = True,
        ahead: int | None = None,
        search_processes: int = 0,
    ):
        if any(module.training for module in model.modules()):
            raise MuroanError("the model is in training mode, so that its answers are random: call model.eval() first")
        if precision not in AUTOCAST:
            raise MuroanError(f"precision must be one of {', '.join(AUTOCAST)}, got {precision!r}")
        check_whole("engine", batch_size=batch_size)
        self.model, self.attack = model, attack
        self.threat_model = (threat_model or ThreatModel()).complete(model.modalities)
        self.batch_size, self.precision, self.seed = batch_size, precision, seed
        self.keep_media, self.reuse_features = keep_media, reuse_features
        self.donors, self.still_valid = list(donors), still_valid
        self.on_found, self.audit = on_found, audit
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.statistics = EngineStatistics(encoded=dict.fromkeys(model.modalities, 0))
        self.ahead = int(self.device.type == "cuda") if ahead is None else ahead
        check_whole("engine", 0, ahead=self.ahead)
        check_whole("engine", 0, search_processes=search_processes, keep_media=keep_media)
        self.search_processes, self._apart = search_processes, search_processes > 0 and attack.apart
        slots = batch_size * (1 + self.ahead + self._apart)  # while some are answered, others think
        self._store = DeviceStore(model, self.threat_model, slots, self.device)
        self._free = list(range(slots))[::-1]
        self._waiting: deque[Iterator[Sample]] = deque()
        self._sent: deque[_Sent] = deque()  # what the model has been given and not been asked for
        self._finished: deque[AttackResult] = deque()  # what nobody has taken yet
        self._admitted = 0
        self._live: dict[int, _Live] = {}  # by slot, in order of admission
        self._thinking: dict[int, _Live] = {}  # by number, those that wait for a reply from another process
        self._processes: SearchProcesses | None = None
        self._checked = False
        self._works: dict[Any, Callable[[list[_Live]], Sequence[Any]]] = {}
        self._below: Below = {}
        # Threads of numpy's own would go on waiting for work on the cores that torch's need next: a guided search was
        # slower on two cores than on one.
        self._numpy = ThreadpoolController().select(internal_api="openblas").select(threading_layer="pthreads")

    # -- in and out -----------------------------------------------------------------------------------------

    def run(self, samples: Iterable[Sample]) -> Iterator[AttackResult]:
        """Attack samples; results come as they finish, not in order."""
        yield from self.push(samples)
        yield from self.drain()

    def push(self, samples: Iterable[Sample]) -> Iterator[AttackResult]:
        """Take samples in, as there is room for them, and work while full batches, those ahead too, can be packed; the
        rest waits for more or for `drain`. What searches in other processes are at counts as questions to come."""
        self._waiting.append(iter(samples))
        most = self.batch_size * (1 + self.ahead + self._apart)
        return self._work(lambda: self._wanted + self._under_way + len(self._thinking) >= most)

    def drain(self) -> Iterator[AttackResult]:
        """Finish all searches."""
        yield from self._work(lambda: bool(self._live))
        self.close()

    def close(self) -> None:
        """End the search processes, if there are any: at the end, `drain` does; an engine that is given up need not
        keep them until it is collected."""
        if self._processes is not None:
            self._processes.close()
            self._processes = None

    def _work(self, unfinished: Callable[[], bool]) -> Iterator[AttackResult]:
        while True:
            while self._finished:
                yield self._finished.popleft()
            self._hear()
            self._admit()
            if not unfinished():
                break
            if self._ready:
                questions = self._pack()
                work = questions[0].work
                if work is None:
                    self._sent.extend(self._send(questions))
                else:
                    self._take(questions, work([question.live for question in questions]))
            elif self._sent and (not self._thinking or len(self._sent) > self.ahead or self._sent[0].filled):
                sent = self._sent.popleft()
                self._take(sent.questions, self._receive(sent))
            else:  # more questions may come in time for a batch to go ahead
                self._hear(GLANCE if self._sent else None)
        while self._finished:
            yield self._finished.popleft()

    @property
    def _ready(self) -> bool:
        """Whether the model is to be given a batch before anything else: a full one, or all that there is."""
        full = self._removals_wanted >= self.batch_size
        if self._sent:
            return full and len(self._sent) <= self.ahead  # one that is not full would only be half of the next
        return full or 2 * len(self._thinking) <= len(self._live)  # one half is answered while the other thinks

    def _take(self, questions: Sequence[_Question], answers: Sequence[Any]) -> None:
        """Let searches go on with the answers to their questions."""
        touched: dict[int, _Live] = {}
        for question, answer in zip(questions, answers, strict=True):
            live = touched.setdefault(question.live.slot, question.live)
            live.in_flight -= 1
            if question.work is not None:
                live.told = answer
            elif question.fresh:
                live.verified = answer
            else:
                live.answers[question.key] = answer
        self._resume(touched.values())

    def _resume(self, lives: Iterable[_Live]) -> None:
        """Let conversations go on, and the slots of those that have ended go."""
        with self._numpy.limit(limits=1):
            for live in lives:
                result = self._advance(live)
                if result is not None:
                    del self._live[live.slot]
                    self._free.append(live.slot)
                    self._finished.append(result)

    @property
    def _wanted(self) -> int:
        """Questions that wait for a batch."""
        return sum(len(live.wanted) for live in self._live.values())

    @property
    def _removals_wanted(self) -> int:
        """Those of them that are not work on a whole batch, which a search asks alone."""
        return sum(len(live.wanted) for live in self._live.values() if live.wanted and live.wanted[0].work is None)

    @property
    def _under_way(self) -> int:
        """Questions that the model has been given."""
        return sum(len(sent.questions) for sent in self._sent)

    def _next(self) -> Sample | None:
        """The next sample that waits."""
        while self._waiting:
            sample = next(self._waiting[0], None)
            if sample is not None:
                return sample
            self._waiting.popleft()
        return None

    def _admit(self) -> None:
        admitted: list[_Live] = []
        try:
            while self._free and (sample := self._next()) is not None:
                self._check_fits(sample)
                self._admitted += 1
                budget = self.threat_model.max_queries or float("inf")
                live = _Live(sample, self._admitted, self._free.pop(), budget)
                live.conversation = self._converse(live)
                self._live[live.slot] = live
                admitted.append(live)
        finally:  # those before a sample that fails to come, or does not fit, go on if the engine does
            if admitted:
                seeds = [stable_seed(self.seed, "noise", live.sample.id) for live in admitted]
                self._store.admit([(live.slot, live.sample, seed) for live, seed in zip(admitted, seeds, strict=True)])
                self._resume(admitted)

    def _check_fits(self, sample: Sample) -> None:
        if list(sample.inputs) != list(self.model.modalities):
            raise MuroanError(
                f"the model takes {list(self.model.modalities)}, sample {sample.id!r} has {list(sample.inputs)}"
            )
        if not 0 <= sample.label < self.model.num_classes:
            raise MuroanError(
                f"sample {sample.id!r} has label {sample.label}, but the model has the classes 0 to "
                f"{self.model.num_classes - 1}: use a model of the dataset's classes, or correct the labels"
            )

    def _advance(self, live: _Live) -> AttackResult | None:
        """Let the conversation go on, if it has all its answers, to its next questions or its result."""
        if live.wanted or live.in_flight:
            return None
        assert live.conversation is not None
        try:
            live.wanted.extend(next(live.conversation))
        except StopIteration as stop:
            return stop.value
        return None

    def _pack(self) -> list[_Question]:
        """The next batch: questions in order of admission; room that is left goes to looking ahead.

        Work on a whole batch waits until nobody asks anything else, so that its batches are full.
        """
        questions: list[_Question] = []
        for live in self._live.values():
            while live.wanted and live.wanted[0].work is None and len(questions) < self.batch_size:
                questions.append(live.wanted.popleft())
        if not questions:
            work = next(live.wanted[0].work for live in self._live.values() if live.wanted)
            for live in self._live.values():
                if live.wanted and live.wanted[0].work == work and len(questions) < self.batch_size:
                    live.in_flight += 1
                    questions.append(live.wanted.popleft())
            return questions
        ahead = [live for live in self._live.values() if live.window]  # in the midst of an `until` ask
        while ahead and len(questions) < self.batch_size:
            live = ahead.pop(0)
            question = live.look_ahead()
            if question is not None:
                questions.append(question)
                ahead.append(live)
        for question in questions:
            question.live.in_flight += 1
        return questions

    # -- one sample, from clean prediction to record ---------------------------------------------------------

    def _converse(self, live: _Live) -> Conversation:
        """The whole life of a sample. Yields questions; resumes when all of them are answered."""
        sample = live.sample
        (clean,) = yield from self._answer(live, Ask([Removal()], CLEAN))
        if clean.label != sample.label or not self.attack.attackable(sample.label, len(clean.logits)):
            return self._result(live, clean, clean, "skipped")
        live.rng = np.random.default_rng(stable_seed(self.seed, self.attack.name, sample.id))
        valid = None if self.still_valid is None else partial(self.still_valid, sample)
        live.view = AttackedSample(
            sample.id,
            sample.label,
            clean,
            self.model.modalities,
            sample.layouts,
            self.threat_model,
            live.rng,
            valid,
            below=self._below,
        )
        found, exhausted = yield from self._search(live)
        failed: Status = "budget_exhausted" if exhausted or live.refused else "held"
        if found is None:
            return self._result(live, clean, clean, failed)
        wanted = Removal if self.attack.kind == "removal" else Perturbation
        if not isinstance(found, wanted) or (wanted is Removal and not _is_removal(found)):
            raise MuroanError(f"{self.attack.name}.search must return a {wanted.__name__} or None, got {found!r:.200}")
        if self.on_found is not None:
            self.on_found(sample, found)
        if isinstance(found, Perturbation):
            return (yield from self._judge_perturbation(live, clean, found, failed))

        key = live.key(found)
        yield [_Question(live, key, found, fresh=True)]
        live.ledger.setdefault(VERIFY, Count()).forwards += 1
        verified = live.verified
        assert verified is not None
        if key in live.answers and live.answers[key].label != verified.label:
            self.statistics.disagreements += 1
        if not self.attack.reached(sample.label, verified):
            live.view.proven = None  # what was claimed was about this removal
            return self._result(live, clean, clean, failed)

        result = self._result(live, clean, verified, "flipped", found)
        if self.audit:
            one_less = [found.without(part) for part in found.regions]
            alone = [found.only(name) for name in found.modalities] if len(found.modalities) > 1 else []
            responses = yield from self._answer(live, Ask(one_less + alone, AUDIT))
            restored = [not self.attack.reached(sample.label, response) for response in responses]
            result.one_minimal = all(
                back or (self.attack.valid_only and valid is not None and valid(removal) is not True)
                for back, removal in zip(restored[: len(one_less)], one_less, strict=True)
            )
            result.interaction = all(restored[len(one_less) :]) if alone else None
        if self.still_valid is not None:
            result.still_valid = self.still_valid(sample, found)
        return result

    def _judge_perturbation(
        self, live: _Live, clean: Response, found: Perturbation, failed: Status
    ) -> Generator[list[_Question], None, AttackResult]:
        """Whether a perturbation succeeds, and how far it goes, from the input that was returned."""
        live.told = found
        yield [_Question(live, work=self._verify)]
        live.ledger.setdefault(VERIFY, Count()).forwards += 1
        verified, inputs, layouts = live.told
        if not self.attack.reached(live.sample.label, verified):
            return self._result(live, clean, clean, failed)
        result = self._result(live, clean, verified, "flipped")
        for name, x in inputs.items():
            before, layout = live.sample.inputs[name], live.sample.layouts[name]
            after = x.cpu()
            if layout.words and name in found.inputs:  # by the tokens: the words are only for show
                changed = sum(not torch.equal(after[a:b], before[a:b]) for a, b in layout.spans)
            elif layout.words:
                changed = sum(a != b for a, b in word_edits(layout.words, layouts[name].words))
            else:
                before = before.to(after.dtype).to(before.dtype)  # what the model's type leaves of it
                moved = (after.to(before.dtype) != before).reshape(-1, *after.shape[-len(layout.grid) :]).any(0)
                changed = int(moved.sum())
                step = after.double() - before.double()
                result.distance[name] = {"l2": float(step.norm()), "linf": float(step.abs().max())}
            if changed:
                result.removed[name] = min(changed, layout.count)
        result.removed.update({name: live.sample.layouts[name].count for name in found.features})
        if live.sample.index < self.keep_media:
            result.perturbed_media = {
                name: modality.display(inputs[name].cpu(), layouts[name])
                if name in inputs
                else modality.display(live.sample.inputs[name], live.sample.layouts[name])
                for name, modality in self.model.modalities.items()
            }
        if seen := _shrinking(live.flips, result.decoupled_fraction):
            result.trajectory = [*seen[:-1], (seen[-1][0], result.decoupled_fraction)]  # as measured
        return result

    def _search(self, live: _Live) -> Generator[list[_Question], None, tuple[Any, bool]]:
        """Drive the attack's own generator; returns what it returned, and whether the budget cut it short."""
        assert live.view is not None
        search = None if self._apart else begun(self.attack, live.view)
        exhausted, message = False, None
        while True:
            reply = (yield from self._replied(live, message)) if search is None else resumed(search, message)
            if reply.ended:
                return reply.found, exhausted or reply.exhausted
            try:
                if isinstance(reply.asked, Together):
                    message = yield from self._answer_together(live, reply.asked)
                else:
                    message = yield from self._answer(live, self._checked_ask(reply.asked))
            except BudgetExhausted as refusal:
                exhausted, message = True, refusal

    def _replied(self, live: _Live, message: Any) -> Generator[list[_Question], None, Reply]:
        """What a search in another process says to a message. Has no questions until that is there."""
        assert live.view is not None
        if message is None:
            self._running_processes().start(live.number, live.view, live.sample)
        else:
            self._running_processes().tell(live.number, message)
        self._thinking[live.number] = live
        yield []
        reply = live.reply
        assert reply is not None
        if reply.ended:
            live.view.proven, live.view.info = reply.proven, reply.info
        return reply

    def _running_processes(self) -> SearchProcesses:
        """The search processes, which the first search starts.

        Raises:
            MuroanError: they have ended, and searches with them.
        """
        if self._processes is None:
            if self._thinking:
                raise MuroanError("this engine's search processes have ended before their searches: make a new engine")
            self._processes = SearchProcesses(
                self.search_processes, self.attack, self.model.modalities, self.threat_model, self.still_valid
            )
        return self._processes

    def _hear(self, seconds: float | None = 0) -> None:
        """Let those go on whose searches have replied; see `SearchProcesses.hear`."""
        if not self._thinking:
            return
        try:
            heard = self._running_processes().hear(seconds)
        except Exception:
            self.close()
            raise
        for number, reply in heard:
            self._thinking[number].reply = reply
        self._resume([self._thinking.pop(number) for number, _ in heard])

    def _checked_ask(self, asked: Any) -> Ask:
        """What a search yielded, as an ask.

        Raises:
            MuroanError: it is none, or goes under the name of one of the engine's own phases, which are free.
        """
        ask = asked if isinstance(asked, Ask) else Ask(asked)
        if isinstance(ask.removals, str) or not isinstance(ask.removals, Iterable):
            raise MuroanError(f"{self.attack.name}.search must yield a list of removals or an Ask, got {asked!r}")
        if ask.phase in OWN_PHASES:
            raise MuroanError(
                f"{self.attack.name}.search asks under the phase {ask.phase!r}, which is the engine's own: name another"
            )

        def checked() -> Iterator[Removal]:
            for removal in ask.removals:
                if not _is_removal(removal):
                    raise MuroanError(f"{self.attack.name}.search must ask removals (Removal.of), got {removal!r}")
                yield removal

        return Ask(checked(), ask.phase, ask.until, ask.admissible)

    def _answer(self, live: _Live, ask: Ask) -> Generator[list[_Question], None, list[Response]]:
        """Responses to an ask, in order; yields the questions that are not answered yet."""
        window, responses = live.window, list[Response]()
        live.close_ask()
        live.upcoming, live.stops = iter(ask.removals), ask.until is not None
        if ask.until is None:
            room = math.inf if ask.phase in OWN_PHASES else live.budget
            new: dict[Key, Removal] = {}
            while live.draw():
                key, removal, _ = window[-1]
                if key not in live.asked and key not in new:
                    if len(new) >= room:
                        break
                    new[key] = removal
            missing = [_Question(live, key, removal) for key, removal in new.items() if key not in live.answers]
            if missing:
                yield missing
        while window or live.draw():
            key, removal, state = window[0]
            if not live.affordable(key, ask.phase):
                live.close_ask()
                raise BudgetExhausted(responses)
            if key not in live.answers:
                live.posed.add(key)
                yield [_Question(live, key, removal)]
            window.popleft()
            response = live.answered(key, ask.phase)
            responses.append(response)
            if ask.admissible and ask.phase not in OWN_PHASES and self.attack.reached(live.sample.label, response):
                assert live.view is not None
                live.note_flip(self.attack.cost(live.view, removal), live.view.size(removal))
            if ask.until is not None and ask.until(response):
                if live.rng is not None:
                    live.rng.bit_generator.state = state
                break
        live.close_ask()
        return responses

    def _result(
        self,
        live: _Live,
        clean: Response,
        final: Response,
        status: Status,
        removal: Removal | None = None,
    ) -> AttackResult:
        sample, removal = live.sample, removal or Removal()
        removed = removed_elements(removal, sample.layouts)
        media = None
        if sample.index < self.keep_media:
            media = {
                name: modality.display(sample.inputs[name], sample.layouts[name])
                for name, modality in self.model.modalities.items()
            }
        result = AttackResult(
            id=sample.id,
            index=sample.index,
            attack=self.attack.name,
            label=sample.label,
            clean_label=clean.label,
            adversarial_label=final.label,
            status=status,
            regions=[(region.modality, region.start, region.stop) for region in removal.regions],
            removed={name: bits.bit_count() for name, bits in removed.items()},
            total={name: layout.count for name, layout in sample.layouts.items()},
            ledger=live.ledger,
            kind=self.attack.kind,
            proven=live.view.proven if live.view else None,
            info=live.view.info if live.view else {},
            media=media,
        )
        if result.flipped and self.attack.kind == "removal":
            assert live.view is not None
            result.trajectory = _shrinking(live.flips, self.attack.cost(live.view, removal))
        return result

    # -- work on whole batches -----------------------------------------------------------------------------

    def _answer_together(self, live: _Live, asked: Together) -> Generator[list[_Question], None, Any]:
        if asked.phase in OWN_PHASES:
            raise MuroanError(
                f"{self.attack.name} asks under the phase {asked.phase!r}, which is the engine's own: name another"
            )
        key = asked.function, asked.phase
        work = self._works.get(key)
        if work is None:
            work = self._works[key] = partial(self._together, asked)
        yield [_Question(live, work=work)]
        told, live.told = live.told, None
        return told

    def _together(self, asked: Together, lives: list[_Live]) -> list[Any]:
        """Run an attack's function over the samples of a batch and enter its passes into their ledgers.

        Out of memory, the batch is halved for good, and the function run anew on both halves, with the random
        generators as they were.
        """
        if len(lives) > (size := self.batch_size):  # which the first call may halve again
            return self._together(asked, lives[:size]) + self._together(asked, lives[size:])
        states = [live.rng.bit_generator.state for live in lives if live.rng is not None]
        # Lightning tests in inference mode, in which nothing can be differentiated.
        # What is found with one arithmetic is judged with the same: a flip by a hair may be none in the other.
        dtype = AUTOCAST[self.precision]
        autocast = torch.autocast(self.device.type, dtype) if dtype else nullcontext()
        target: Target | None = None
        told: list[Any] | None = None
        with torch.inference_mode(False), torch.no_grad(), autocast:
            try:
                target = self._target(lives)
                told = list(asked.function(target))
            except BudgetExhausted:
                # Not a sample's own affair: which others share its batch must not show in their records.
                raise MuroanError(
                    f"{self.attack.name} asked for a pass with a sample in it that has too few queries left of "
                    f"max_queries={self.threat_model.max_queries}: pass only rows=target.able(rows, cost), so that the "
                    f"others go on, and return None where nothing was found"
                ) from None
            except torch.OutOfMemoryError:
                target = None
        if told is None or target is None:  # not while the error is held, and with it all that the pass has filled
            self._make_room(len(lives))
            for live, state in zip(lives, states, strict=True):
                live.rng.bit_generator.state = state  # type: ignore[union-attr]
            return self._together(asked, lives)
        if len(told) != len(lives):
            raise MuroanError(f"{self.attack.name} was given {len(lives)} samples and returned {len(told)} answers")
        self.statistics.rows += int(target.forwards.sum())
        for row, live in enumerate(lives):
            count = live.ledger.setdefault(asked.phase, Count())
            queries, first = int(target.queries[row]), int(target.first_flip[row])
            count.queries += queries
            count.forwards += int(target.forwards[row])
            count.backwards += int(target.backwards[row])
            if self.attack.kind != "removal":
                total = sum(layout.count for layout in live.sample.layouts.values())
                noted = [(live.queries + at, 100 * elements / total) for at, elements in target.in_hand[row]]
                if not noted and first and not live.flips:
                    noted = [(live.queries + first, math.inf)]
                live.flips += [(at, size, size) for at, size in noted]
            live.budget -= queries
            live.queries += queries
            live.refused |= bool(target.refused[row])
        return told

    def _target(self, lives: list[_Live]) -> Target:
        store = self._store
        slots = self._store.tensor([live.slot for live in lives])

        def rows(room: Tensor) -> Tensor:
            # A tensor of its own, also where the store was filled in inference mode.
            return room[slots].clone(memory_format=torch.contiguous_format)

        dtype = store.dtype
        assert store.embedding is not None
        inputs = {name: rows(room) for name, room in store.inputs.items()}
        features = {
            name: map_features(lambda t: rows(t).to(dtype) if t.is_floating_point() else rows(t), found)
            for name, found in store.features.items()
        }
        logits = torch.as_tensor(np.stack([live.view.clean.logits for live in lives if live.view]))
        donors = {
            name: torch.stack([donor.inputs[name] for donor in self.donors]).to(self.device)
            for name in (self.model.modalities if self.donors else ())
        }
        return Target(
            self.model,
            [live.view for live in lives if live.view],
            inputs,
            store.labels[slots].clone(),
            [live.budget for live in lives],
            features,
            Prediction(rows(store.embedding), logits.to(self.device, dtype)),
            {name: x.to(dtype) if x.is_floating_point() else x for name, x in donors.items()},
            {name: [donor.layouts[name].words for donor in self.donors] for name in donors},
        )

    @torch.inference_mode()
    def _verify(self, lives: list[_Live]) -> list[tuple[Response, dict[str, Tensor], dict[str, Layout]]]:
        """What the model says to the perturbation of each sample, its inputs and layouts."""
        if len(lives) > (size := self.batch_size):  # which the first call may halve again
            return self._verify(lives[:size]) + self._verify(lives[size:])
        answers = []
        for live in lives:
            found: Perturbation = live.told
            changed = {name: x.detach().to("cpu") for name, x in found.inputs.items()}
            layouts: dict[str, Layout] = {}
            for name, words in found.words.items():
                if name in found.inputs:
                    layouts[name] = replace(live.sample.layouts[name], words=tuple(words))
                else:
                    changed[name], layouts[name] = self.model.modalities[name].prepare(" ".join(words))
            for name, x in changed.items():
                expected = live.sample.inputs.get(name)
                if expected is None or expected.shape != x.shape or not torch.isfinite(x).all():
                    shape = None if expected is None else tuple(expected.shape)
                    raise MuroanError(
                        f"{self.attack.name} returned {name!r} of shape {tuple(x.shape)}, expected finite values of "
                        f"shape {shape}"
                    )
            if wrong := [name for name in found.features if name not in live.sample.inputs or name in changed]:
                raise MuroanError(
                    f"{self.attack.name} returned features of {wrong}, expected some of the model's modalities whose "
                    f"inputs stay clean"
                )
            whole = {**live.sample.inputs, **changed}
            answers.append((whole, changed, {**live.sample.layouts, **layouts}))
        try:
            responses = self._verified([whole for whole, _, _ in answers], lives)
        except torch.OutOfMemoryError:
            responses = None
        if responses is None:
            self._make_room(len(lives))
            return self._verify(lives)
        return [(r, changed, layouts) for r, (_, changed, layouts) in zip(responses, answers, strict=True)]

    def _verified(self, inputs: Sequence[dict[str, Tensor]], lives: list[_Live]) -> list[Response]:
        """What the model says to whole inputs."""
        dtype, autocast = self._store.dtype, AUTOCAST[self.precision]
        batch = {}
        for name in self.model.modalities:
            stacked = torch.stack([whole[name] for whole in inputs]).to(self.device)
            batch[name] = stacked.to(dtype) if stacked.is_floating_point() else stacked
        with torch.autocast(self.device.type, autocast) if autocast else nullcontext():
            features = {name: self.model.encode(name, x) for name, x in batch.items()}
            for name in {name for live in lives for name in live.told.features}:
                features[name] = map_features(lambda t: t.clone(), features[name])
                for row, live in enumerate(lives):
                    if (x := live.told.features.get(name)) is not None:
                        self._check_features(name, x, without_mask(features[name])[row])
                        without_mask(features[name])[row] = x
            embedding = self.model.fuse(features)
            prediction = Prediction(embedding, self.model.head(embedding))
        packed = self._numbers(prediction, self._store.tensor([live.slot for live in lives])).cpu().numpy()
        self.statistics.batches += 1
        self.statistics.rows += len(lives)
        return self._responses(packed, prediction.logits.shape[1])

    def _check_features(self, name: str, given: Tensor, own: Tensor) -> None:
        """Raises MuroanError where what an attack returned cannot stand in for a sample's own features."""
        if given.shape != own.shape or not torch.isfinite(given).all():
            raise MuroanError(
                f"{self.attack.name} returned features of {name!r} of shape {tuple(given.shape)}, expected finite "
                f"values of shape {tuple(own.shape)}"
            )

    def _make_room(self, size: int) -> None:
        """Go on after the device ran out of memory: without remembered features, or else with batches of half the size.

        Raises:
            MuroanError: the batch had one row.
        """
        self.statistics.out_of_memory += 1
        if any(self._store.memories.values()):
            self._store.memories = dict.fromkeys(self.model.modalities)  # nothing is remembered any more
            warnings.warn("out of memory: going on without remembered features", stacklevel=3)
        elif size == 1:
            raise MuroanError("the device has too little memory for a batch of one question") from None
        else:
            self.batch_size = (size + 1) // 2
            warnings.warn(f"out of memory: going on with batches of {self.batch_size}", stacklevel=3)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # -- the model -----------------------------------------------------------------------------------------

    def _send(self, questions: list[_Question]) -> list[_Sent]:
        """Give the model a batch; on out-of-memory, the batch size is halved for good and the batch sent in two."""
        if len(questions) > (size := self.batch_size):  # which the first call may halve again
            return self._send(questions[:size]) + self._send(questions[size:])
        sent = None
        try:
            sent = self._forward(questions)
            if not self._checked:
                self._check_repeatable(sent)
                self._checked = True
        except torch.OutOfMemoryError:
            sent = None
        if sent is None:  # not while the error is held, and with it all that the pass has filled
            self._make_room(len(questions))
            return self._send(questions)
        return [sent]

    def _receive(self, sent: _Sent) -> list[Response]:
        """What the model said to a batch."""
        packed, questions = sent.wait(), sent.questions
        if not np.isfinite(packed).all():
            row = int(np.argmax(~np.isfinite(packed).all(1)))
            raise MuroanError(
                f"the model returned a value that is not finite for sample {questions[row].live.sample.id!r} "
                f"(removed: {questions[row].removal.regions or 'nothing'}): logits "
                f"{packed[row, : sent.classes].tolist()[:8]}; check its weights, or precision=32"
            )
        return self._responses(packed, sent.classes)

    @staticmethod
    def _responses(packed: np.ndarray, classes: int) -> list[Response]:
        logits, rest = packed[:, :classes], packed[:, classes:].tolist()
        return [
            Response(label, margin, int(argmax), shift, row, lead)
            for label, (margin, argmax, shift, lead), row in zip(logits.argmax(1).tolist(), rest, logits, strict=True)
        ]

    def _check_repeatable(self, sent: _Sent) -> None:
        questions, classes = sent.questions, sent.classes
        packed, again = sent.wait(), self._forward(questions).wait()
        self.statistics.repeated += len(questions)
        scale = 1e-3 if self.precision == "32" else 3e-2
        close = np.isclose(packed[:, :classes], again[:, :classes], rtol=scale, atol=scale, equal_nan=True)
        if not close.all():
            row = int(np.argmax(~close.all(1)))
            raise MuroanError(
                f"the model gives different answers to the same question (sample {questions[row].live.sample.id!r}: "
                f"logits {packed[row, :4].tolist()}, then {again[row, :4].tolist()}): "
                f"turn off what is random in it (dropout, sampling) before it is attacked"
            )

    @torch.inference_mode()
    def _forward(self, questions: list[_Question]) -> _Sent:
        """Run a batch."""
        store, model = self._store, self.model
        dtype = AUTOCAST[self.precision]
        slots = self._store.tensor([q.live.slot for q in questions])
        # A clean question is the first of its sample: it fills the slot's features.
        clean = [row for row, q in enumerate(questions) if not q.key and not q.fresh]
        with torch.autocast(self.device.type, dtype) if dtype else nullcontext():
            features = {name: self._encode(name, questions, slots, clean) for name in model.modalities}
            embedding = model.fuse(features)
            logits = model.head(embedding)
        if clean:
            rows = self._store.tensor(clean)
            store.keep_embedding(slots[rows], embedding[rows].float() if dtype else embedding[rows])
        self.statistics.batches += 1
        self.statistics.rows += len(questions)
        packed = self._numbers(Prediction(embedding, logits), slots)
        if self.device.type != "cuda":
            return _Sent(questions, packed.cpu(), logits.shape[1], None)
        packed, done = packed.to("cpu", non_blocking=True), torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))
        return _Sent(questions, packed, logits.shape[1], done)

    def _numbers(self, prediction: Prediction, slots: Tensor) -> Tensor:
        """(B, C + 4) logits, margin, embedding argmax, shift and margin of predictions about the slots' samples."""
        embedding, logits = prediction
        if AUTOCAST[self.precision]:
            embedding, logits = embedding.float(), logits.float()
        assert self._store.embedding is not None
        labels, clean = self._store.labels.index_select(0, slots), self._store.embedding.index_select(0, slots)
        margin = Target.margin(Prediction(embedding, logits), labels)
        shift = 1 - torch.cosine_similarity(embedding, clean, dim=1)
        # How far the largest entry of the clean embedding leads the others: a margin, as of a class. One alone leads.
        lead = Target.margin(Prediction(embedding, embedding), clean.argmax(1))
        lead = lead.nan_to_num(nan=float("nan"), posinf=1)
        numbers = [logits, margin[:, None], embedding.argmax(1, keepdim=True), shift[:, None], lead[:, None]]
        return torch.cat([n.double() for n in numbers], 1)

    def _encode(self, name: str, questions: list[_Question], slots: Tensor, clean: list[int]) -> Features:
        """Features (B, ...) of one modality: encoded where touched, else from the slots.

        What questions leave of a sample is encoded once, and remembered for later batches.
        """
        store = self._store
        parts: dict[Any, int] = {}  # what is left of which sample, and the first row that has it
        part_of: dict[int, Any] = {}  # rows that are touched
        for row, q in enumerate(questions):
            removed = dict(q.key).get(name, 0)
            if removed or q.fresh or not q.key or not self.reuse_features:
                part_of[row] = (q.live.number, removed) if self.reuse_features and not q.fresh else row
                parts.setdefault(part_of[row], row)
        if not parts:
            return map_features(take_rows(slots), store.features[name])
        recalled = {part: place for part in parts if (place := store.recall(name, part)) is not None}
        new = [part for part in parts if part not in recalled]
        found: list[Features] = []
        if recalled:
            found.append(store.recalled(name, self._store.tensor(list(recalled.values()))))
        if new:
            found.append(self._encode_new(name, [questions[parts[part]] for part in new]))
            # What is whole lies in the slots, and what is fresh is to be encoded anew each time.
            if kept := [i for i, part in enumerate(new) if isinstance(part, tuple) and part[1]]:
                features = found[-1]
                if len(kept) < len(new):
                    features = map_features(take_rows(self._store.tensor(kept)), features)
                store.remember(name, [new[i] for i in kept], features)
        encoded = found[0] if len(found) == 1 else map_features(lambda *t: torch.cat(t), *found)
        order = {part: i for i, part in enumerate([*recalled, *new])}
        source = [order[part] for part in part_of.values()]
        if source != list(range(len(order))):
            expand = self._store.tensor(source)
            encoded = map_features(take_rows(expand), encoded)
        if clean:
            at = self._store.tensor(
                [i for i, row in enumerate(part_of) if not questions[row].key and not questions[row].fresh]
            )
            store.keep_features(name, slots[self._store.tensor(clean)], map_features(take_rows(at), encoded))
        if len(part_of) == len(questions):
            return encoded
        at, rows = self._store.tensor(list(part_of)), take_rows(slots)
        return map_features(
            lambda room, new: rows(room).index_copy_(0, at, new.to(room.dtype)), store.features[name], encoded
        )

    def _encode_new(self, name: str, questions: list[_Question]) -> Features:
        """Features (Q, ...) of what each question leaves of one modality."""
        store, modality = self._store, self.model.modalities[name]
        regions = [[r for r in q.removal.regions if r.modality == name] for q in questions]
        boxes = modality.boxes(regions, [q.live.sample.layouts[name] for q in questions])
        slots = self._store.tensor([q.live.slot for q in questions])
        x, baseline = store.inputs_at(name, slots)
        if boxes.shape[1]:
            x = modality.occlude(x, store.moved(boxes), self.threat_model.replacement[name], baseline)
        self.statistics.encoded[name] += len(questions)
        return self.model.encode(name, x)


def evaluate(
    model: MultimodalModel,
    dataset: Iterable[Sample],
    attack: Attack,
    *,
    threat_model: ThreatModel | None = None,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    precision: str = "32",
    seed: int = 0,
    donors: Sequence[Sample] = (),
    still_valid: StillValid | None = None,
    progress: bool = False,
    search_processes: int = 0,
) -> list[AttackResult]:
    """Attack every sample of a dataset; the whole of MUROAN in one call, without Lightning or Hydra.

    Args:
        model: is put into evaluation mode and moved to `device`, if one is given.
        dataset: samples as the model takes them, such as `EasyVQA().prepared("test")`.
        threat_model, batch_size, precision, seed, donors, still_valid, search_processes: see `QueryEngine`.
        progress: show a progress bar.

    Returns:
        One record a sample, in the dataset's order.

    Raises:
        MuroanError: see `QueryEngine`; a sample that cannot be read.
    """
    from tqdm.auto import tqdm

    model = model.eval() if device is None else model.eval().to(device)
    options = {"donors": donors, "still_valid": still_valid, "search_processes": search_processes}
    engine = QueryEngine(model, attack, threat_model, batch_size, precision, seed, **options)  # type: ignore[arg-type]
    total = len(dataset) if hasattr(dataset, "__len__") else None  # type: ignore[arg-type]
    results, flipped, attacked = [], 0, 0
    with closing(engine), tqdm(total=total, desc=attack.name, unit="sample", disable=not progress) as bar:
        for result in engine.run(sample for sample in dataset if isinstance(sample, Sample)):
            results.append(result)
            flipped, attacked = flipped + result.flipped, attacked + result.attacked
            bar.set_postfix_str(f"success {100 * flipped / max(1, attacked):.1f} %", refresh=False)
            bar.update()
    return sorted(results, key=lambda r: r.index)
