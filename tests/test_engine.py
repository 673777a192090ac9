"""The query engine on toy models whose answers can be worked out by hand."""

from __future__ import annotations

import itertools
import math
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn

import muroan
from muroan.attacks.base import Ask, Attack, BatchAttack, BudgetExhausted, ThreatModel, Together
from muroan.attacks.decoupling_reference import DecouplingReference
from muroan.attacks.random_removal import RandomRemoval
from muroan.data.samples import BadSample, Example, PreparedDataset, Sample
from muroan.device_store import DeviceStore
from muroan.engine import QueryEngine
from muroan.errors import MuroanError
from muroan.modalities import Image, Region, Removal, Text, WordTokenizer, stable_seed
from muroan.models.base import MultimodalModel
from muroan.results import AttackResult, Count

# Six pixels and four words: ten elements.
SIZE, WORDS = (2, 3), ["a", "b", "c", "d"]
SINGLE = ThreatModel(min_side={"image": 1})


def pixel(i: int) -> Region:
    y, x = divmod(i, SIZE[1])
    return Region("image", (y, x), (y + 1, x + 1))


def word(i: int) -> Region:
    return Region("text", (i,), (i + 1,))


IMAGE = Region("image", (0, 0), SIZE)
TEXT = Region("text", (0,), (4,))


class Toy(MultimodalModel):
    """Logits that a rule computes from which pixels (B, 6) and words (B, 4) are present, as 0 and 1.

    Attributes:
        calls: (what, rows) of every call of `encode` (by modality name) and `fuse`, in order.
    """

    def __init__(self, rule: Callable[..., list] | None = None):
        super().__init__(
            {"image": Image(SIZE, mean=(0.5,), std=(0.5,)), "text": Text(WordTokenizer(WORDS), 6)}, num_classes=2
        )
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.rule = rule
        self.calls: list[tuple[str, int]] = []
        self.eval()

    def encode(self, modality, x):
        self.calls.append((modality, len(x)))
        if modality == "image":
            return (x.flatten(1) != 0).double()
        return torch.stack([(x == 5 + i).any(1) for i in range(4)], 1).double()

    def fuse(self, features):
        self.calls.append(("fuse", len(features["image"])))
        return torch.cat([features["image"], features["text"]], 1)

    def head(self, embedding):
        return torch.stack([v.expand(len(embedding)) for v in self.rule(*embedding.split([6, 4], 1))], 1)


HALF = torch.tensor(0.5, dtype=torch.float64)


def flips_when(gone: Callable[..., torch.Tensor]) -> Toy:
    """A toy that answers 0, and 1 where the condition on presence holds."""
    return Toy(lambda image, text: [1 - gone(image, text).double(), HALF])


def never() -> Toy:
    return flips_when(lambda image, text: image[:, 0] > 2)


class RandomToy(Toy):
    """A random smooth net of pixel values and of words and their places; three classes, all of them reachable."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.num_classes = 3
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.pixels, self.ids, self.mix, self.out = random(6, 5), random(9, 6, 5), random(5, 8), random(8, 3)

    def encode(self, modality, x):
        self.calls.append((modality, len(x)))
        if modality == "image":
            return x.flatten(1) @ self.pixels / 2
        return self.ids[x, torch.arange(6)].sum(1) / 2  # padding counts too, at its place

    def fuse(self, features):
        self.calls.append(("fuse", len(features["image"])))
        return torch.sin((features["image"] + features["text"]) @ self.mix)

    def head(self, embedding):
        return embedding @ self.out


class Scripted(Attack):
    """An attack from a generator function; what it sees by sample is the script's own business."""

    name = "scripted"

    def __init__(self, script: Callable):
        self.script = script

    def search(self, sample):
        return self.script(sample)


def white(label: int = 0) -> Sample:
    """One sample with all elements present."""
    return make_samples([(np.full(SIZE, 255, np.uint8), "a b c d", label)])[0]


def make_samples(rows: list[tuple[np.ndarray, str, int]]) -> list[Sample]:
    examples = [Example(f"s{i}", {"image": im, "text": t}, label) for i, (im, t, label) in enumerate(rows)]
    return list(PreparedDataset(examples, never().modalities, classes=3))


def varied(model: MultimodalModel, count: int = 40, wrong: int = 7) -> list[Sample]:
    """Random samples labelled with the model's answer, but every `wrong`-th."""
    rng = np.random.default_rng(5)
    rows = [
        (rng.integers(0, 256, SIZE, dtype=np.uint8), " ".join(rng.choice([*WORDS, "e"], rng.integers(1, 5))), 0)
        for _ in range(count)
    ]
    samples = make_samples(rows)
    with torch.no_grad():
        answers = [int(model({k: v[None].to(as_type(v)) for k, v in s.inputs.items()})[1].argmax()) for s in samples]
    model.calls.clear()
    return [
        Sample(s.id, s.index, s.inputs, s.layouts, (label + (s.index % wrong == wrong - 1)) % 3)
        for s, label in zip(samples, answers, strict=True)
    ]


def as_type(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.is_floating_point() else x.dtype


def attack(model: MultimodalModel, script: Callable, samples=None, **options) -> list[AttackResult]:
    samples = [white()] if samples is None else samples
    return muroan.evaluate(model, samples, Scripted(script), **{"threat_model": SINGLE, **options})


def ledger(record: AttackResult) -> dict[str, tuple[int, int, int]]:
    return {phase: (c.queries, c.forwards, c.cache_hits) for phase, c in record.ledger.items()}


def spent(record: AttackResult) -> int:
    """Queries of the record; those of the engine's own phases must be none."""
    assert all(record.ledger.get(phase, Count()).queries == 0 for phase in ("clean", "verify", "audit"))
    return record.queries


# ---------------------------------------------------------------------------------------------------------
# Answers


def subsets(elements: list[Region]) -> list[Removal]:
    return [Removal(c) for size in range(len(elements) + 1) for c in itertools.combinations(elements, size)]


def direct(model: MultimodalModel, sample: Sample, removal: Removal) -> tuple[torch.Tensor, torch.Tensor]:
    """The embedding and logits of a sample without some single elements, from raw tensors."""
    image, ids = sample.inputs["image"].clone().double(), sample.inputs["text"].tolist()
    for region in removal.regions:
        if region.modality == "image":
            image[0, region.start[0], region.start[1]] = 0
    gone = {region.start[0] for region in removal.regions if region.modality == "text"}
    words = len(sample.layouts["text"].words)  # every word is one token here, after [CLS]
    ids = [token for i, token in enumerate(ids) if not (1 <= i <= words and i - 1 in gone)]
    with torch.no_grad():
        embedding, logits = model({"image": image[None], "text": torch.tensor([ids + [0] * (6 - len(ids))])})
    return embedding[0], logits[0]


@pytest.fixture(scope="module")
def truth() -> tuple[RandomToy, list[Sample], dict[str, dict[Removal, tuple[torch.Tensor, torch.Tensor]]]]:
    """Four samples, of two to four words, and what direct forwards say about all their subsets."""
    model = RandomToy()
    every = varied(model, 40, wrong=100)
    samples = [next(s for s in every if s.layouts["text"].count == count) for count in (4, 2, 3)]
    samples.append(next(s for s in every[::-1] if s.layouts["text"].count == 2))
    expected = {}
    for sample in samples:
        elements = [pixel(i) for i in range(6)] + [word(i) for i in range(sample.layouts["text"].count)]
        expected[sample.id] = {removal: direct(model, sample, removal) for removal in subsets(elements)}
    return model, samples, expected


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("reuse", [True, False, "a little"])
def test_every_subset_is_answered_as_by_a_direct_forward(truth, batch_size, reuse, monkeypatch):
    """All 1,024 subsets of ten elements (fewer for a shorter text), in random order and random asks."""
    model, samples, expected = truth
    if reuse == "a little":
        monkeypatch.setattr("muroan.device_store.BATCHES", 4)  # so that what is remembered has to go soon
    heard = {s.id: {} for s in samples}

    def script(sample):
        removals = list(expected[sample.id])
        order = sample.rng.permutation(len(removals))
        while len(order):
            size = int(sample.rng.integers(1, 200))
            some, order = [removals[i] for i in order[:size]], order[size:]
            responses = yield some
            heard[sample.id].update(zip(some, responses, strict=True))

    engine = QueryEngine(model, Scripted(script), SINGLE, batch_size, reuse_features=bool(reuse))
    records = {record.id: record for record in engine.run(samples)}
    labels = set()
    for sample in samples:
        truths, heards = expected[sample.id], heard[sample.id]
        total = 2 ** (6 + sample.layouts["text"].count)
        assert len(truths) == len(heards) == total
        assert ledger(records[sample.id]) == {"clean": (0, 1, 0), "search": (total - 1, total - 1, 1)}
        embeddings = torch.stack([truths[removal][0] for removal in heards])
        logits = torch.stack([truths[removal][1] for removal in heards])
        others = logits.clone()
        others[:, sample.label] = -torch.inf
        margins = logits[:, sample.label] - others.amax(1)
        shifts = 1 - embeddings @ truths[Removal()][0] / embeddings.norm(dim=1) / truths[Removal()][0].norm()
        responses = list(heards.values())
        np.testing.assert_allclose(np.stack([r.logits for r in responses]), logits, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose([r.margin for r in responses], margins, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose([r.embedding_shift for r in responses], shifts, atol=1e-9)
        assert [r.label for r in responses] == logits.argmax(1).tolist()
        assert [r.embedding_argmax for r in responses] == embeddings.argmax(1).tolist()
        labels.update(r.label for r in responses)
    assert labels == {0, 1, 2}


def test_a_removal_may_be_spelled_in_any_way():
    model = RandomToy()
    spellings = [
        Removal.of(IMAGE),
        Removal.of(*map(pixel, range(6))),
        Removal.of(*IMAGE.halves()),
        Removal.of(pixel(3), IMAGE),
        Removal((pixel(0), pixel(0), Region("image", (0, 0), (2, 2)), Region("image", (0, 1), (2, 3)))),
    ]
    texts = [Removal.of(TEXT), Removal.of(*map(word, [3, 1, 0, 2])), Removal.of(word(2), TEXT)]

    def script(sample):
        for many in (
            spellings,
            texts,
            [a | b for a in spellings for b in texts],
            [b | a for a in texts for b in texts],
        ):
            responses = yield many
            assert all((r.logits == responses[0].logits).all() for r in responses)
            answers.append(responses[0].logits.tolist())

    answers = []
    samples = [s for s in varied(model, wrong=100) if s.layouts["text"].count == 4][:1]
    (record,) = attack(model, script, samples)
    assert len({tuple(a) for a in answers}) == 3  # the last ask is about the text alone, as the second
    assert ledger(record)["search"] == (3, 3, 5 + 3 + 15 + 9 - 3)
    # What a single forward of the whole region says is what the spelling in elements says.
    _, logits = direct(model, samples[0], Removal.of(*map(pixel, range(6))))
    assert answers[0] == pytest.approx(logits.tolist())


# ---------------------------------------------------------------------------------------------------------
# The ledger


def test_the_ledger_by_hand():
    row, left = Region("image", (0, 0), (1, 2)), Removal.of(pixel(0), pixel(1))

    def script(sample):
        yield Ask([Removal.of(pixel(0)), Removal.of(word(2)), Removal.of(pixel(0))], "first")  # 2 new, 1 repeated
        yield Ask([left, Removal.of(row), Removal.of(row, pixel(1))], "second")  # one set, spelled in three ways
        yield Ask([Removal(), Removal.of(word(2)), left | Removal.of(word(2))], "second")  # known, known, new
        yield Ask([], "third")
        yield [Removal.of(IMAGE, TEXT), Removal.of(TEXT, IMAGE)]  # the default phase
        yield Ask([Removal.of(word(2))], "first")

    (record,) = attack(never(), script)
    assert ledger(record) == {
        "clean": (0, 1, 0),
        "first": (2, 2, 2),
        "second": (2, 2, 4),
        "search": (1, 1, 1),
    }
    assert (record.status, record.queries, record.forwards, record.cache_hits) == ("held", 5, 6, 7)
    assert (record.regions, record.removed, record.total) == ([], {}, {"image": 6, "text": 4})
    assert (record.one_minimal, record.interaction) == (None, None)


def test_the_ledger_of_a_flip_by_hand():
    """Verification costs one forward; the audit asks for the removal less each part, and by modality."""
    both = Removal.of(pixel(0), word(1), word(2))

    def script(sample):
        yield [Removal.of(pixel(0)), Removal.of(word(1), word(2))]
        yield [both]
        return both

    model = flips_when(lambda image, text: image[:, 0] + text[:, 1] == 0)
    (record,) = attack(model, script)
    assert record.status == "flipped"
    assert (record.label, record.clean_label, record.adversarial_label) == (0, 0, 1)
    assert record.regions == [("image", (0, 0), (1, 1)), ("text", (1,), (2,)), ("text", (2,), (3,))]
    assert (record.removed, record.decoupled_fraction) == ({"image": 1, "text": 2}, 30.0)
    # One less: {w1, w2} known, {p0, w2} new, {p0, w1} new. Alone: {p0} known, {w1, w2} known.
    assert ledger(record) == {"clean": (0, 1, 0), "search": (3, 3, 0), "verify": (0, 1, 0), "audit": (0, 2, 3)}
    assert (spent(record), record.forwards) == (3, 7)


def test_until_stops_as_if_asked_one_by_one():
    """The response that ends an ask is the last one given and counted, however far the engine ran ahead."""

    def script(sample):
        removals = [Removal.of(word(3)), Removal.of(pixel(0)), Removal.of(word(3)), Removal.of(pixel(1)), *many]
        responses = yield Ask(removals, "hunt", until=sample.flipped)
        assert [r.label for r in responses] == [0, 0, 0, 1]
        # The engine may know this one already; the search has never been told.
        yield Ask([Removal.of(pixel(2))], "later")
        responses = yield Ask(iter([Removal.of(pixel(3)), Removal.of(pixel(4))]), "end", until=sample.flipped)
        assert len(responses) == 2

    many = [Removal.of(pixel(i)) for i in range(2, 6)] + [Removal.of(word(i)) for i in range(4)]
    for batch_size in (1, 2, 3, 64):
        (record,) = attack(flips_when(lambda i, t: i[:, 1] == 0), script, batch_size=batch_size)
        assert ledger(record) == {
            "clean": (0, 1, 0),
            "hunt": (3, 3, 1),
            "later": (1, 1, 0),
            "end": (2, 2, 0),
        }


def test_until_runs_ahead_to_fill_the_batch():
    model = flips_when(lambda image, text: image[:, 5] == 0)

    def script(sample):
        before = len(model.calls)
        yield Ask((Removal.of(pixel(i)) for i in range(6)), until=sample.flipped)
        batches.append([rows for what, rows in model.calls[before:] if what == "fuse"])

    batches = []
    for batch_size in (1, 3, 64):
        attack(model, script, batch_size=batch_size)
    assert batches == [[1] * 6, [3, 3], [6]]


def endless(removals: list[Removal], most: int):
    """The removals over and over; an engine that draws more than `most` of them would never stop."""
    for drawn, removal in enumerate(itertools.cycle(removals)):
        assert drawn < most, "the engine keeps drawing from an endless ask"
        yield removal


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("max_queries", [None, 8])
def test_until_takes_an_endless_iterator(batch_size, max_queries):
    """Asked one by one it ends at the third removal; the engine must not look for new ones among repeats for ever."""

    def script(sample):
        removals = endless([Removal.of(pixel(i)) for i in (0, 1, 2, 3, 4)], 5000)
        responses = yield Ask(removals, until=sample.flipped)
        return Removal.of(pixel(2)) if sample.flipped(responses[-1]) else None

    model = flips_when(lambda image, text: image[:, 2] == 0)
    threat_model = ThreatModel(max_queries=max_queries)
    (record,) = attack(model, script, batch_size=batch_size, threat_model=threat_model)
    assert (record.status, record.queries) == ("flipped", 3)


def test_a_wrong_sample_is_skipped_and_never_searched():
    def script(sample):
        raise AssertionError("searched")
        yield

    (record,) = attack(never(), script, [white(label=1)])
    assert (record.status, record.label, record.clean_label, record.attacked) == ("skipped", 1, 0, False)
    assert ledger(record) == {"clean": (0, 1, 0)}
    assert record.queries == 0


# ---------------------------------------------------------------------------------------------------------
# Budgets

SEVEN = [Removal.of(pixel(i)) for i in range(3)] + [Removal.of(word(i)) for i in range(4)]


@pytest.mark.parametrize("until", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("budget", range(1, 11))
def test_a_budget_is_never_exceeded(budget, batch_size, until):
    """Nine distinct questions, some of them repeated: what comes back is what the budget allows, to the query."""
    first = [*SEVEN[:2], SEVEN[0], Removal(), *SEVEN[2:5], SEVEN[1]]
    second = [SEVEN[4], *SEVEN[5:], Removal.of(*map(pixel, range(3))), Removal.of(TEXT)]
    heard: list[Removal] = []

    def script(sample):
        for removals in (first, second):
            stop = (lambda response: False) if until else None
            try:
                responses = yield Ask(iter(removals) if until else removals, until=stop)
            except BudgetExhausted as refusal:
                responses = refusal.responses
                refused.append(True)
            heard.extend(removals[: len(responses)])

    refused: list[bool] = []
    model = never()
    threat_model = ThreatModel(min_side={"image": 1}, max_queries=budget)
    (record,) = attack(model, script, threat_model=threat_model, batch_size=batch_size)
    assert spent(record) == min(budget, 9)
    assert len(set(heard) - {Removal()}) == min(budget, 9)
    assert record.status == ("held" if budget >= 9 else "budget_exhausted")
    # Refused at the first question that is new and one too many, and again in the second ask.
    distinct, answered = set(), 0
    for removal in first:
        if removal != Removal():
            distinct.add(removal)
        if len(distinct) > budget:
            break
        answered += 1
    assert heard[:answered] == first[:answered]
    assert len(refused) == (budget < 5) + (budget < 9)
    # Forwards stay within the budget too: clean twice (the model is checked once), then the questions.
    assert sum(rows for what, rows in model.calls if what == "fuse") <= 2 + budget


@pytest.mark.parametrize("batch_size", [1, 64])
def test_an_attack_may_return_its_best_when_refused(batch_size):
    def script(sample):
        best = None
        try:
            for removal in SEVEN:
                (response,) = yield [removal]
                if sample.flipped(response):
                    best = removal
        except BudgetExhausted as refusal:
            refused.append(refusal.responses)
            return best

    refused = []
    model = flips_when(lambda image, text: image[:, 2] == 0)
    for budget, status in ((2, "budget_exhausted"), (3, "flipped"), (6, "flipped"), (7, "held")):
        threat_model = ThreatModel(min_side={"image": 1}, max_queries=budget)
        (record,) = attack(model, script, threat_model=threat_model, batch_size=batch_size)
        assert (record.status, spent(record)) == (status, budget)
    assert refused == [[], [], []]


def test_an_attack_that_does_not_catch_is_ended():
    def script(sample):
        yield SEVEN
        raise AssertionError("went on")

    (record,) = attack(never(), script, threat_model=ThreatModel(max_queries=3))
    assert (record.status, spent(record)) == ("budget_exhausted", 3)


def test_what_is_asked_after_a_refusal_is_refused_again_but_for_known_answers():
    def script(sample):
        with pytest.raises(BudgetExhausted):
            yield SEVEN
        (known,) = yield [SEVEN[1]]
        assert known.label == 0
        for _ in range(2):
            with pytest.raises(BudgetExhausted) as caught:
                yield [SEVEN[1], SEVEN[6]]
            assert len(caught.value.responses) == 1

    (record,) = attack(never(), script, threat_model=ThreatModel(max_queries=3))
    assert ledger(record)["search"] == (3, 3, 3)
    assert record.status == "budget_exhausted"


@pytest.mark.parametrize("phase", ["clean", "verify", "audit"])
def test_a_budget_cannot_be_dodged_by_the_name_of_a_phase(phase):
    """The engine's own phases are free; an attack must not ask under their names, or must pay for it."""

    def script(sample):
        answers.extend((yield Ask(SEVEN, phase)))

    answers = []
    try:
        attack(never(), script, threat_model=ThreatModel(max_queries=3))
    except MuroanError:
        return
    assert len(answers) <= 3


# ---------------------------------------------------------------------------------------------------------
# Feature reuse


def test_a_question_about_one_modality_encodes_that_one_alone():
    model = RandomToy()

    def since(calls: int) -> list[tuple[str, int]]:
        return [call for call in model.calls[calls:] if call[0] != "fuse"]

    def script(sample):
        start = len(model.calls)
        yield [Removal.of(word(0)), Removal.of(word(1)), Removal.of(word(0), word(1))]
        assert since(start) == [("text", 3)]
        start = len(model.calls)
        yield [Removal.of(pixel(4)), Removal.of(pixel(2))]
        assert since(start) == [("image", 2)]
        start = len(model.calls)
        # Two image parts and two text parts in four questions, and one image part alone.
        pairs = [Removal.of(p, w) for p in (pixel(0), pixel(1)) for w in (word(0), word(1))]
        yield [*pairs, Removal.of(pixel(1))]
        # What two of them leave of the text was encoded before, alone.
        assert since(start) == [("image", 2)]
        assert model.calls[-1] == ("fuse", 5)
        start = len(model.calls)
        yield [Removal.of(pixel(0), pixel(1), word(0)), Removal.of(pixel(0), word(0), word(1))]
        assert since(start) == [("image", 1)]
        finished.append(True)

    finished = []
    samples = [s for s in varied(model, wrong=100) if s.layouts["text"].count >= 2][:1]
    attack(model, script, samples)
    assert finished == [True]


def test_the_statistics_say_what_was_encoded():
    def script(sample):
        yield [Removal.of(word(0)), Removal.of(word(1)), Removal.of(pixel(0))]

    for reuse, encoded in ((True, {"image": 3, "text": 4}), (False, {"image": 5, "text": 5})):
        model = RandomToy()
        samples = [s for s in varied(model, wrong=100) if s.layouts["text"].count >= 2][:1]
        engine = QueryEngine(model, Scripted(script), SINGLE, reuse_features=reuse)
        list(engine.run(samples))
        # The clean question is asked twice, to check that the model repeats itself.
        assert (engine.statistics.batches, engine.statistics.rows, engine.statistics.repeated) == (3, 5, 1)
        assert engine.statistics.encoded == encoded
        assert sum(rows for what, rows in model.calls if what == "image") == encoded["image"]


def test_where_features_are_large_only_whole_inputs_are_remembered(monkeypatch):
    monkeypatch.setattr("muroan.device_store.BYTES", 100)
    model = RandomToy()

    def script(sample):
        yield [Removal.of(word(0)), Removal.of(pixel(0))]
        yield [Removal.of(word(0), pixel(0))]

    samples = [s for s in varied(model, wrong=100) if s.layouts["text"].count >= 2][:1]
    engine = QueryEngine(model, Scripted(script), SINGLE)
    list(engine.run(samples))
    assert engine.statistics.encoded == {"image": 4, "text": 4}  # twice whole, to check that the model repeats itself


def test_what_is_remembered_is_not_believed_in_the_end(monkeypatch):
    """A flip is verified by encoding everything anew."""
    model = RandomToy()
    monkeypatch.setattr(
        DeviceStore, "recalled", lambda store, name, places: store.memories[name].features[places] + 1e3
    )

    def script(sample):
        yield [Removal.of(word(0)), Removal.of(pixel(0))]
        (response,) = yield [Removal.of(word(0), pixel(0))]
        return Removal.of(word(0), pixel(0)) if sample.flipped(response) else None

    engine = QueryEngine(model, Scripted(script), SINGLE)
    records = list(engine.run(varied(model, 30, wrong=100)))
    _, logits = zip(
        *(direct(model, s, Removal.of(word(0), pixel(0))) for s in varied(model, 30, wrong=100)), strict=True
    )
    truly = sum(int(found.argmax()) != s.label for found, s in zip(logits, varied(model, 30, wrong=100), strict=True))
    assert sum(record.flipped for record in records) <= truly
    assert engine.statistics.disagreements > 0


def test_a_shared_slot_is_not_a_shared_sample():
    """Slots are given to later samples: what was encoded for the earlier one must not be heard again."""
    model = RandomToy()
    samples = varied(model, 30, wrong=100)

    def script(sample):
        for removal in (Removal.of(pixel(0)), Removal.of(word(0)), Removal.of(pixel(0), word(0))):
            (response,) = yield [removal]
            _, logits = direct(model, samples[int(sample.id[1:])], removal)
            assert response.logits == pytest.approx(logits.numpy())
            checked.append(sample.id)

    checked = []
    for batch_size in (1, 3):
        attack(model, script, samples, batch_size=batch_size)
    assert len(checked) == 2 * 3 * 30


# ---------------------------------------------------------------------------------------------------------
# Order and batch size


def greedy(sample):
    """Words and pixels in random order, taken away one after the other until the label flips; mixed kinds of asks."""
    universe = sample.universe()
    order = [universe[i] for i in sample.rng.permutation(len(universe))]
    singles = yield Ask([Removal.of(region) for region in order], "rank")
    # Rounded, because either of two equal words leaves the same text, and the batch must not decide between them.
    margins = {region: round(r.margin, 9) for region, r in zip(order, singles, strict=True)}
    order.sort(key=margins.__getitem__)
    growing = [Removal.of(*order[: i + 1]) for i in range(len(order))]
    responses = yield Ask(iter(growing), "grow", until=sample.flipped)
    if not sample.flipped(responses[-1]):
        return None
    removal = growing[len(responses) - 1]
    for region in removal.regions[:-1]:
        (response,) = yield Ask([removal.without(region)], "shrink")
        if sample.flipped(response):
            removal = removal.without(region)
    extra = [sample.draw(2) for _ in range(4)]
    sample.info["drawn"] = [[list(map(str, r.regions)), a.label] for r, a in zip(extra, (yield extra), strict=True)]
    return removal


class Greedy(Attack):
    def search(self, sample):
        return greedy(sample)


ATTACKS = [RandomRemoval(12, 3), DecouplingReference(40), DecouplingReference(40, "pairs"), Greedy()]


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("which", ATTACKS, ids=lambda a: a.name + getattr(a, "coupling", ""))
def test_records_do_not_depend_on_batch_size_or_order(which, limited):
    model = RandomToy()
    samples = varied(model, 35)
    max_queries = None if not limited else 15 if which.name == "greedy" else 9
    threat_model = ThreatModel(min_side={"image": 1}, max_queries=max_queries)

    def run(samples: list[Sample], batch_size: int) -> list[str]:
        records = muroan.evaluate(model, samples, which, threat_model=threat_model, batch_size=batch_size, seed=3)
        return [record.to_json() for record in records]

    expected = run(samples, 1)
    shuffled = [samples[i] for i in np.random.default_rng(0).permutation(len(samples))]
    for batch_size in (2, 7, 64):
        assert run(samples, batch_size) == expected
        assert run(shuffled, batch_size) == expected
    assert [line for s in samples[10:16] for line in run([s], 64)] == expected[10:16]
    # The test would be empty if all samples ended alike.
    records = [AttackResult.from_json(line) for line in expected]
    assert sum(r.status == "skipped" for r in records) == 5
    assert sum(r.status == "flipped" for r in records) >= 2
    assert sum(r.status in ("held", "budget_exhausted") for r in records) >= 2
    if max_queries is not None:
        assert all(spent(r) <= max_queries for r in records)


class Recording(QueryEngine):
    """Remembers, of each batch, how many the model had been given and not yet answered to, and its size."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.sent: list[tuple[int, int]] = []
        self.open = 0

    def _send(self, questions):
        self.sent.append((self.open, len(questions)))
        self.open += 1
        return super()._send(questions)

    def _receive(self, sent):
        self.open -= 1
        return super()._receive(sent)


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("which", ATTACKS, ids=lambda a: a.name + getattr(a, "coupling", ""))
def test_batches_given_to_the_model_ahead_change_no_record(which, limited):
    model = RandomToy()
    samples = varied(model, 60)
    threat_model = ThreatModel(min_side={"image": 1}, max_queries=9 if limited else None)
    if which.name == "greedy" and limited:
        threat_model = replace(threat_model, max_queries=15)
    expected = muroan.evaluate(model, samples, which, threat_model=threat_model, batch_size=1, seed=3)
    for batch_size, ahead in itertools.product((1, 4, 7), (0, 1, 2)):
        engine = Recording(model, which, threat_model, batch_size, seed=3, ahead=ahead)
        records = sorted(engine.run(samples), key=lambda record: record.index)
        assert [record.to_json() for record in records] == [record.to_json() for record in expected]
        assert max(waiting for waiting, _ in engine.sent) == ahead
        assert all(size == batch_size for waiting, size in engine.sent if waiting), "only full batches go ahead"
        if ahead:
            assert sum(waiting > 0 for waiting, _ in engine.sent) > 0.8 * len(engine.sent), "nearly always"
    engine = QueryEngine(Poisoned(after=5), which, threat_model, 4, seed=3, ahead=1)
    with pytest.raises(MuroanError, match="nan"):
        list(engine.run(samples))


@pytest.mark.parametrize("ahead", [0, 1])
def test_whole_batches_wait_for_questions_that_are_under_way(ahead):
    """Work that searches ask for does not go out in halves, and lets no batch of removals go ahead that is not full."""
    model = RandomToy()
    samples = varied(model, 40, wrong=100)
    worked: list[int] = []

    class Mixed(BatchAttack):
        name = "mixed"

        def perturb(self, target):
            worked.append(len(target))
            return target.perturbations({"image": target.inputs["image"] * 0})

        def search(self, sample):
            yield [sample.draw(2) for _ in range(int(sample.rng.integers(1, 4)))]
            return (yield Together(self.perturb))

    engine = Recording(model, Mixed(), SINGLE, 8, ahead=ahead)
    records = sorted(engine.run(samples), key=lambda record: record.index)
    assert worked == [8] * 5
    expected = muroan.evaluate(model, samples, Mixed(), threat_model=SINGLE, batch_size=1)
    assert [record.to_json() for record in records] == [record.to_json() for record in expected]
    assert all(size == 8 for waiting, size in engine.sent if waiting)


@pytest.mark.parametrize("ahead", [0, 1])
def test_what_was_not_taken_is_there_the_next_time(ahead):
    """Whoever stops taking results loses none of them."""
    model = RandomToy()
    samples = varied(model, 30)
    expected = muroan.evaluate(model, samples, Greedy(), threat_model=SINGLE, batch_size=4)
    engine, found = QueryEngine(model, Greedy(), SINGLE, 4, ahead=ahead), []
    for start in range(0, 30, 10):
        pushed = engine.push(samples[start : start + 10])
        found += list(itertools.islice(pushed, 2))
        pushed.close()
    found += list(itertools.islice(engine.drain(), 3))
    found += engine.drain()
    found.sort(key=lambda record: record.index)
    assert [record.to_json() for record in found] == [record.to_json() for record in expected]


class Poisoned(RandomToy):
    """Answers with nan after so many batches."""

    def __init__(self, after: int):
        super().__init__()
        self.left = after

    def head(self, embedding):
        self.left -= 1
        return super().head(embedding) * (1 if self.left > 0 else math.nan)


@pytest.mark.parametrize("batch_size", [2, 64])
def test_looking_ahead_does_not_spend_the_random_numbers(batch_size):
    """An `until` ask is drawn from lazily: what the engine draws ahead must not show in later draws."""

    def script(sample):
        draws = (sample.draw(2) for _ in range(50))
        responses = yield Ask(draws, until=lambda response: True)
        assert len(responses) == 1
        sample.info["next"] = [str(region) for region in sample.draw(2).regions]

    (record,) = attack(never(), script, batch_size=batch_size)
    (alone,) = attack(never(), script, batch_size=1)
    assert record.info == alone.info


def test_the_seed_and_the_sample_decide_the_draws():
    model = RandomToy()
    samples = varied(model, 12, wrong=100)

    def script(sample):
        sample.info["draws"] = [str(sample.draw(2).regions) for _ in range(5)]
        yield []

    def draws(**options) -> list[list[str]]:
        return [record.info["draws"] for record in attack(model, script, samples, **options)]

    assert draws(seed=1) == draws(seed=1)
    assert all(a != b for a, b in zip(draws(seed=1), draws(seed=2), strict=True))
    assert len({tuple(d) for d in draws()}) == 12


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_the_number_of_live_samples_is_bounded(batch_size):
    live, most, pulled, finished = 0, 0, 0, 0

    def script(sample):
        nonlocal live, most
        live += 1
        most = max(most, live)
        try:
            for _ in range(int(sample.rng.integers(0, 6))):
                yield [sample.draw(2) for _ in range(int(sample.rng.integers(1, 4)))]
        finally:
            live -= 1

    def stream():
        nonlocal pulled
        for sample in varied(RandomToy(), 100, wrong=9):
            pulled += 1
            assert pulled - finished <= batch_size + 2  # taken from the loader as room is made, not before
            yield sample

    engine = QueryEngine(RandomToy(), Scripted(script), SINGLE, batch_size)
    for _ in engine.run(stream()):
        finished += 1
    assert (pulled, finished, live) == (100, 100, 0)
    assert most <= batch_size


def test_batches_are_full():
    """Forty searches that ask one question at a time still fill batches of eight."""
    model = RandomToy()

    def script(sample):
        for _ in range(8):
            yield [sample.draw(2)]

    engine = QueryEngine(model, Scripted(script), SINGLE, 8)
    list(engine.run(varied(model, wrong=100)))
    sizes = [rows for what, rows in model.calls if what == "fuse"]
    assert max(sizes) == 8
    assert sum(size == 8 for size in sizes[:-8]) >= 0.9 * len(sizes[:-8])


class Dense(MultimodalModel):
    """Two layers on six pixels, in single precision."""

    def __init__(self) -> None:
        super().__init__({"image": Image(SIZE, mean=(0.5,), std=(0.5,))}, num_classes=2)
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 32), nn.Linear(32, 2)
        self.eval()

    def encode(self, modality, x):
        return x.flatten(1)

    def fuse(self, features):
        return self.first(features["image"])

    def head(self, embedding):
        return self.last(embedding.relu())


class Looks(BatchAttack):
    """Notes what the model says to the clean input, and flips nothing."""

    def __init__(self) -> None:
        self.told: list[torch.Tensor] = []

    def perturb(self, target):
        prediction = target.predict({"image": target.inputs["image"]})
        loss, _ = target.gradient(lambda p, labels: F.cross_entropy(p.logits, labels, reduction="none"), of=["image"])
        self.told += [prediction.logits, loss.logits, target.clean.logits]
        return [None] * len(target)


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_an_attack_searches_in_the_arithmetic_that_it_is_judged_in(precision):
    model, attack = Dense(), Looks()
    values = np.arange(6, dtype=np.uint8).reshape(SIZE) * 40
    sample = PreparedDataset([Example("s", {"image": values}, 0)], model.modalities, 2)[0]
    sample = replace(sample, label=int(model({"image": sample.inputs["image"][None]}).logits.argmax()))
    list(QueryEngine(model, attack, None, 4, precision).run([sample]))
    predicted, differentiated, clean = attack.told
    assert predicted.dtype == torch.float32
    assert torch.equal(predicted, clean)
    assert torch.equal(differentiated, clean)
    assert torch.equal(clean, model({"image": sample.inputs["image"][None]}).logits) == (precision == "32")


def test_a_label_that_the_model_has_no_class_for_is_told():
    with pytest.raises(MuroanError, match=r"'s0' has label 5, but the model has the classes 0 to 2"):
        list(QueryEngine(RandomToy(), Scripted(lambda sample: iter(())), SINGLE, 4).run([replace(white(), label=5)]))


def test_searches_leave_the_cores_to_the_model():
    """Numpy's own threads are switched off while a search thinks, and on again when it does not."""
    seen: list[list[int]] = []

    def threads() -> list[int]:
        # Those that do not belong to torch, if numpy was built with any.
        return [pool["num_threads"] for pool in threadpool_info() if pool.get("threading_layer") == "pthreads"]

    def script(sample):
        seen.append(threads())
        yield [sample.draw(1)]
        seen.append(threads())

    with threadpool_limits(2, user_api="blas"):
        before = threads()
        for _ in QueryEngine(RandomToy(), Scripted(script), SINGLE, 4).run(varied(RandomToy(), 8, wrong=100)):
            assert threads() == before
    assert len(seen) == 16
    assert all(numbers == [1] * len(before) for numbers in seen)


# ---------------------------------------------------------------------------------------------------------
# Things that go wrong with the model


class Cramped(RandomToy):
    """Runs out of memory above some number of rows, in the encoder or in the fusion."""

    def __init__(self, most: int, where: str):
        super().__init__()
        self.most, self.where = most, where

    def encode(self, modality, x):
        if modality == self.where and len(x) > self.most:
            raise torch.OutOfMemoryError("toy")
        return super().encode(modality, x)

    def fuse(self, features):
        if self.where == "fuse" and len(features["image"]) > self.most:
            raise torch.OutOfMemoryError("toy")
        return super().fuse(features)


@pytest.mark.parametrize("where", ["image", "text", "fuse"])
@pytest.mark.parametrize("which", [RandomRemoval(12, 3), Greedy()], ids=lambda a: a.name)
@pytest.mark.parametrize("ahead", [0, 1])
def test_out_of_memory_halves_the_batch_and_changes_no_record(which, where, ahead):
    samples = varied(RandomToy())
    expected = muroan.evaluate(RandomToy(), samples, which, threat_model=SINGLE, batch_size=32)
    model = Cramped(5, where)
    engine = QueryEngine(model, which, SINGLE, batch_size=32, ahead=ahead)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = sorted(engine.run(samples), key=lambda r: r.index)
    assert [r.to_json() for r in records] == [r.to_json() for r in expected]
    assert engine.statistics.out_of_memory >= 3
    assert [str(w.message) for w in caught if "out of memory" in str(w.message)][-1].endswith(f"of {engine.batch_size}")
    assert max(rows for what, rows in model.calls if what == where) <= 5
    if where == "fuse":
        assert engine.batch_size == 4  # 32, 16, 8, 4


def test_what_is_remembered_goes_before_the_batch_is_halved(monkeypatch):
    samples = varied(RandomToy())
    expected = muroan.evaluate(RandomToy(), samples, Greedy(), threat_model=SINGLE, batch_size=8)
    engine = QueryEngine(RandomToy(), Greedy(), SINGLE, batch_size=8)

    def crowded(features, fuse=engine.model.fuse):
        if any(engine._store.memories.values()):
            raise torch.OutOfMemoryError("toy")
        return fuse(features)

    monkeypatch.setattr(engine.model, "fuse", crowded)
    with pytest.warns(UserWarning, match="going on without remembered features"):
        records = sorted(engine.run(samples), key=lambda r: r.index)
    assert [r.to_json() for r in records] == [r.to_json() for r in expected]
    assert (engine.batch_size, engine.statistics.out_of_memory) == (8, 1)


def test_without_room_to_remember_nothing_is(monkeypatch):
    def full(self, features, rows):
        raise torch.OutOfMemoryError("toy")

    samples = varied(RandomToy())
    expected = muroan.evaluate(RandomToy(), samples, Greedy(), threat_model=SINGLE, batch_size=1)
    monkeypatch.setattr("muroan.device_store.Memory.__init__", full)
    engine = QueryEngine(RandomToy(), Greedy(), SINGLE, batch_size=1)
    records = sorted(engine.run(samples), key=lambda r: r.index)
    assert [r.to_json() for r in records] == [r.to_json() for r in expected]
    assert engine.statistics.out_of_memory == 0


class Holding(RandomToy):
    """Has room for some rows, each of which takes its room for as long as the tensor of its pass lives."""

    def __init__(self, most: int):
        super().__init__()
        self.most, self.taken = most, 0

    def fuse(self, features):
        rows = min(len(features["image"]), self.most - self.taken)
        hidden = torch.zeros(rows)
        self.taken += rows
        weakref.finalize(hidden, self.free, rows)
        if rows < len(features["image"]):
            raise torch.OutOfMemoryError("toy")
        return super().fuse(features) + 0 * hidden.sum()

    def free(self, rows):
        self.taken -= rows


class Perturbing(BatchAttack):
    """Asks the clean inputs, and returns one."""

    name = "perturbing"

    def perturb(self, target):
        target.predict(target.inputs)
        return target.perturbations({"image": target.inputs["image"] * 0})


def test_what_a_failed_pass_held_is_free_when_it_is_tried_again():
    """An error that is still being handled keeps alive all that its pass has made."""
    samples = varied(RandomToy()) * 2
    samples = [replace(s, id=f"s{i}", index=i) for i, s in enumerate(samples)]
    expected = muroan.evaluate(RandomToy(), samples, RandomRemoval(12, 3), threat_model=SINGLE, batch_size=64)
    model = Holding(10)
    engine = QueryEngine(model, RandomRemoval(12, 3), SINGLE, batch_size=64)
    with pytest.warns(UserWarning, match="out of memory"):
        records = sorted(engine.run(samples), key=lambda r: r.index)
    assert [r.to_json() for r in records] == [r.to_json() for r in expected]
    assert 5 <= engine.batch_size <= 10
    assert model.taken == 0


@pytest.mark.parametrize("at", ["_target", "_verified"])
def test_work_on_whole_batches_is_halved_as_well(at, monkeypatch):
    """There is less room than for questions, from an attack's own passes on, or from the check of what it returned."""
    samples = varied(RandomToy())
    expected = muroan.evaluate(RandomToy(), samples, Perturbing(), threat_model=SINGLE, batch_size=32)
    model = Holding(32)
    engine = QueryEngine(model, Perturbing(), SINGLE, batch_size=32)
    before = getattr(engine, at)

    def narrow(*arguments):
        model.most = 7
        return before(*arguments)

    monkeypatch.setattr(engine, at, narrow)
    with pytest.warns(UserWarning, match="out of memory"):
        records = sorted(engine.run(samples), key=lambda r: r.index)
    assert [r.to_json() for r in records] == [r.to_json() for r in expected]
    assert (engine.batch_size <= 7, model.taken) == (True, 0)


def test_phases_of_whole_batches_are_told_apart():
    class Twice(Perturbing):
        def search(self, sample):
            yield Together(self.perturb, phase="one")
            yield Together(self.perturb, phase="two")
            return (yield Together(self.perturb, phase="two"))

    model = RandomToy()
    records = [r for r in QueryEngine(model, Twice(), SINGLE).run(varied(model)) if r.attacked]
    assert records
    for r in records:
        assert {phase: c.queries for phase, c in r.ledger.items() if c.queries} == {"one": 1, "two": 2}


def test_out_of_memory_for_one_question_is_the_end():
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(MuroanError, match="too little memory for a batch of one"),
    ):
        muroan.evaluate(Cramped(0, "fuse"), varied(RandomToy()), RandomRemoval(), batch_size=4)


def test_another_error_of_the_model_is_not_taken_for_out_of_memory():
    class Broken(RandomToy):
        def fuse(self, features):
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        muroan.evaluate(Broken(), varied(RandomToy()), RandomRemoval())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_names_the_sample_and_what_was_removed(value):
    def rule(image, text):
        broken = image.new_tensor(value)
        return [torch.where(image[:, 1] == 0, broken, image.new_tensor(1.0)), HALF]

    def script(sample):
        yield [Removal.of(pixel(0))]
        yield [Removal.of(pixel(1)), Removal.of(pixel(2))] if sample.id == "s2" else [Removal.of(pixel(2))]

    samples = make_samples([(np.full(SIZE, 255, np.uint8), "a b", 0)] * 4)
    with pytest.raises(MuroanError, match=r"not finite for sample 's2' \(removed: .*start=\(0, 1\)"):
        attack(Toy(rule), script, samples)


def test_training_mode_is_refused():
    model = never().train()
    with pytest.raises(MuroanError, match=r"training mode.*model\.eval\(\)"):
        QueryEngine(model, RandomRemoval())
    model = never()
    model.part = nn.Dropout()  # one part left in training mode is enough
    with pytest.raises(MuroanError, match="training mode"):
        QueryEngine(model, RandomRemoval())
    assert not never().training


def test_a_random_model_is_refused():
    class Random(RandomToy):
        def fuse(self, features):
            return F.dropout(super().fuse(features), 0.5, training=True)

    torch.manual_seed(0)
    with pytest.raises(MuroanError, match=r"different answers to the same question .*sample 's0'"):
        muroan.evaluate(Random(), varied(RandomToy())[:1], RandomRemoval())


def test_options_are_checked():
    with pytest.raises(MuroanError, match=r"engine\.batch_size must be a whole number, at least 1, got 0"):
        QueryEngine(never(), RandomRemoval(), batch_size=0)
    with pytest.raises(MuroanError, match=r"engine\.ahead must be a whole number, at least 0, got -1"):
        QueryEngine(never(), RandomRemoval(), ahead=-1)
    with pytest.raises(MuroanError, match="precision must be one of 32, bf16, 16, got 'half'"):
        QueryEngine(never(), RandomRemoval(), precision="half")
    with pytest.raises(MuroanError, match="max_queries must be a whole number, at least 1, or null, got 0"):
        QueryEngine(never(), RandomRemoval(), ThreatModel(max_queries=0))
    with pytest.raises(MuroanError, match="max_queries must be a whole number, at least 1, or null, got True"):
        QueryEngine(never(), RandomRemoval(), ThreatModel(max_queries=True))


@pytest.mark.parametrize("side", [0, -3])
def test_a_min_side_below_one_is_refused(side):
    with pytest.raises(MuroanError, match=rf"min_side.image must be a whole number, at least 1, got {side}"):
        QueryEngine(never(), RandomRemoval(), ThreatModel(min_side={"image": side}))


def test_a_min_side_larger_than_the_input_is_refused():
    with pytest.raises(MuroanError, match=r"min_side.image=99 is larger than the whole image \(3\)"):
        QueryEngine(never(), RandomRemoval(), ThreatModel(min_side={"image": 99}))


# ---------------------------------------------------------------------------------------------------------
# Attacks are not believed


def returning(removal):
    def script(sample):
        yield [Removal.of(word(0))]
        return removal

    return script


@pytest.mark.parametrize("removal", [Removal.of(pixel(3)), Removal.of(word(0)), Removal(), Removal.of(IMAGE, TEXT)])
def test_a_removal_that_does_not_flip_is_held(removal):
    (record,) = attack(never(), returning(removal))
    assert (record.status, record.adversarial_label, record.regions, record.removed) == ("held", 0, [], {})
    assert (record.one_minimal, record.interaction, record.flipped) == (None, None, False)
    assert ledger(record)["verify"] == (0, 1, 0)


def test_a_false_claim_after_a_refusal_is_budget_exhausted():
    def script(sample):
        try:
            yield SEVEN
        except BudgetExhausted:
            return SEVEN[0]

    (record,) = attack(never(), script, threat_model=ThreatModel(max_queries=2))
    assert (record.status, record.regions) == ("budget_exhausted", [])


def test_a_removal_that_was_never_asked_is_verified():
    (record,) = attack(flips_when(lambda image, text: image[:, 3] == 0), returning(Removal.of(pixel(3))))
    assert (record.status, record.adversarial_label) == ("flipped", 1)
    assert (record.removed, record.queries) == ({"image": 1}, 1)


def test_the_size_is_recomputed():
    removal = Removal((Region("image", (0, 0), (2, 2)), Region("image", (0, 1), (2, 3)), word(1)))
    (record,) = attack(flips_when(lambda image, text: image[:, 1] == 0), returning(removal))
    assert record.removed == {"image": 6, "text": 1}  # the overlap counts once
    assert record.decoupled_fraction == pytest.approx(70)
    assert record.modality_fraction("text") == pytest.approx(25)


FLAGS = [
    # condition of the flip, removal, one_minimal, interaction
    ("joint", lambda i, t: i[:, 0] + t[:, 0] == 0, [pixel(0), word(0)], True, True),
    ("joint with more", lambda i, t: i[:, 0] + t[:, 0] == 0, [pixel(0), word(0), word(1)], False, True),
    ("either", lambda i, t: i[:, 0] * t[:, 0] == 0, [pixel(0), word(0)], False, False),
    ("image alone", lambda i, t: i[:, 0] == 0, [pixel(0), word(0)], False, False),
    ("one part", lambda i, t: i[:, 0] == 0, [pixel(0)], True, None),
    ("two of one modality", lambda i, t: i[:, 0] + i[:, 1] == 0, [pixel(0), pixel(1)], True, None),
    # Removing exactly one part of two would flip, removing both would not: 3 parts of XOR flip, and so does each one.
    ("xor", lambda i, t: (i[:, 0] + i[:, 1] + t[:, 0]) % 2 == 0, [pixel(0), pixel(1), word(0)], True, False),
    ("xor of two", lambda i, t: (i[:, 0] + t[:, 0]) % 2 == 1, [pixel(0), word(0), word(1)], None, None),
    ("nested", lambda i, t: i[:, 0] + t[:, 0] == 0, [IMAGE, pixel(0), word(0)], False, True),
    # Needs both pixels and the word: no modality does it alone, nothing can be put back.
    ("three", lambda i, t: i[:, 0] + i[:, 1] + t[:, 0] == 0, [pixel(0), word(0), pixel(1)], True, True),
]


@pytest.mark.parametrize(
    ("condition", "regions", "minimal", "interaction"), [f[1:] for f in FLAGS], ids=[f[0] for f in FLAGS]
)
@pytest.mark.parametrize("batch_size", [1, 64])
def test_minimality_and_interaction(condition, regions, minimal, interaction, batch_size):
    (record,) = attack(flips_when(condition), returning(Removal(tuple(regions))), batch_size=batch_size)
    assert record.status == ("held" if minimal is None else "flipped")
    assert (record.one_minimal, record.interaction) == (minimal, interaction)


@pytest.mark.parametrize("nonsense", ["all of it", 3, pixel(0), [pixel(0)], True, Removal(pixel(0))])
def test_a_search_that_returns_nonsense_is_told(nonsense):
    with pytest.raises(MuroanError, match=r"scripted\.search must return a Removal or None, got"):
        attack(never(), returning(nonsense))


@pytest.mark.parametrize(
    "nonsense", [3, None, pixel(0), [pixel(0)], [[pixel(0)]], "abc", [None], [Removal(pixel(0))]], ids=str
)
def test_a_search_that_asks_nonsense_is_told(nonsense):
    def script(sample):
        yield nonsense

    with pytest.raises(MuroanError, match="scripted"):
        attack(never(), script)


def test_a_search_that_is_no_generator_is_told():
    def script(sample):
        return Removal.of(pixel(0))

    with pytest.raises(MuroanError, match="scripted"):
        attack(never(), script)


@pytest.mark.parametrize(
    "region",
    [Region("image", (0, 0), (3, 3)), Region("image", (1, 1), (1, 2)), Region("text", (3,), (5,)), word(4), word(-1)],
)
@pytest.mark.parametrize("how", ["asked", "asked until", "returned"])
def test_a_removal_outside_the_grid_is_told(region, how):
    def script(sample):
        if how == "asked":
            yield [Removal.of(region)]
        elif how == "asked until":
            yield Ask(iter([Removal.of(region)]), until=sample.flipped)
        else:
            yield []
            return Removal.of(region)

    with pytest.raises(MuroanError, match=rf"a region of '{region.modality}' must lie inside its element grid"):
        attack(never(), script)


def test_a_removal_of_an_absent_modality_is_told():
    with pytest.raises(MuroanError, match=r"names modality 'audio', but the sample has \['image', 'text'\]"):
        attack(never(), returning(Removal.of(Region("audio", (0,), (1,)))))


def test_an_error_of_the_attack_is_its_own():
    def script(sample):
        yield [Removal.of(pixel(0))]
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        attack(never(), script)


# ---------------------------------------------------------------------------------------------------------
# Threat models and samples


def test_a_replacement_that_a_modality_cannot_take_is_told():
    for name, replacement in (("image", "delete"), ("text", "zero"), ("image", "grey")):
        with pytest.raises(MuroanError, match=rf"{name} .*got '{replacement}'.*threat_model.replacement.{name}"):
            attack(never(), returning(None), threat_model=ThreatModel({name: replacement}))


def test_a_sample_without_a_modality_is_told():
    whole = white()
    for names in (["image"], ["text"], []):
        part = Sample("part", 0, {n: whole.inputs[n] for n in names}, {n: whole.layouts[n] for n in names}, 0)
        with pytest.raises(MuroanError, match=r"the model takes \['image', 'text'\], sample 'part' has"):
            attack(never(), returning(None), [whole, part])


def test_unreadable_samples_are_left_out_and_order_is_kept():
    samples = varied(RandomToy(), 9, wrong=100)
    records = muroan.evaluate(RandomToy(), [samples[5], BadSample("x", "broken"), *samples[:3]], RandomRemoval())
    assert [r.id for r in records] == ["s0", "s1", "s2", "s5"]
    assert all(r.attack == "random_removal" for r in records)


def test_evaluate_puts_the_model_into_evaluation_mode():
    model = never().train()
    muroan.evaluate(model, [white()], RandomRemoval())
    assert not model.training


def test_media_is_kept_for_the_first_samples():
    samples = varied(RandomToy(), 6)
    records = QueryEngine(RandomToy(), RandomRemoval(2), keep_media=2).run(samples)
    assert {r.index: r.media is not None for r in records} == {i: i < 2 for i in range(6)}


@pytest.mark.parametrize("replacement", ["zero", "mean", "blur", "noise"])
def test_replacements_reach_the_model(replacement):
    """The image that the model sees is the one that the modality's own functions make of a batch of one."""
    model, sample = RandomToy(), varied(RandomToy(), wrong=100)[0]
    seen = []

    def script(view):
        start = len(images)
        yield [Removal.of(Region("image", (0, 1), (2, 3)))]
        seen.extend(images[start:])

    images = []
    encode = model.encode
    model.encode = lambda name, x: (images.append(x.clone()) if name == "image" else None, encode(name, x))[1]
    attack(model, script, [sample], threat_model=ThreatModel({"image": replacement}))
    x = sample.inputs["image"].double()
    assert torch.equal(seen[0][0, :, :, 0], x[:, :, 0])
    removed = seen[0][0, 0, :, 1:]
    if replacement == "zero":
        assert (removed == 0).all()
    elif replacement == "mean":
        torch.testing.assert_close(removed, x.mean().expand(2, 2), rtol=1e-6, atol=1e-7)
    else:
        assert not torch.equal(removed, x[0, :, 1:])
        noise_seed = stable_seed(0, "noise", sample.id)
        image, layout = sample.inputs["image"], sample.layouts["image"]
        own = model.modalities["image"].baseline(image, layout, replacement, noise_seed)
        torch.testing.assert_close(removed, own[0, :, 1:].double(), rtol=1e-6, atol=1e-7)


def test_masked_words_keep_their_place():
    def script(sample):
        (deleted,) = yield [Removal.of(word(0))]
        sample.info["logits"] = deleted.logits.tolist()

    model, sample = RandomToy(), next(s for s in varied(RandomToy(), wrong=100) if s.layouts["text"].count >= 2)
    (masked,) = attack(model, script, [sample], threat_model=ThreatModel({"text": "mask"}))
    ids = sample.inputs["text"].clone()
    ids[1] = 4
    with torch.no_grad():
        _, logits = model({"image": sample.inputs["image"][None].double(), "text": ids[None]})
    assert masked.info["logits"] == pytest.approx(logits[0].tolist())


def test_noise_is_the_same_for_a_sample_each_time_and_another_for_others():
    model = RandomToy()
    # The same picture and text under many ids: only the noise can differ.
    one = varied(model, 1, wrong=100)[0]
    samples = [Sample(f"n{i}", i, one.inputs, one.layouts, one.label) for i in range(9)]

    def script(sample):
        first, pair = yield [Removal.of(IMAGE), Removal.of(pixel(0), word(0))]
        (again,) = yield [Removal.of(IMAGE, pixel(0))]
        assert (again.logits == first.logits).all()
        sample.info["logits"] = (first.logits.round(9) + 0).tolist() + (pair.logits.round(9) + 0).tolist()

    def run(samples: list[Sample], **options) -> list[list[float]]:
        records = attack(model, script, samples, threat_model=ThreatModel({"image": "noise"}), **options)
        return [record.info["logits"] for record in records]

    expected = run(samples, seed=4)
    assert len({tuple(e) for e in expected}) == 9
    for batch_size in (1, 2, 64):
        assert run(samples[::-1], seed=4, batch_size=batch_size) == expected
    assert run(samples[3:4], seed=4) == expected[3:4]
    assert all(a != b for a, b in zip(run(samples, seed=5), expected, strict=True))
