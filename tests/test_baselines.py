"""Baseline attacks and corruptions on toy models whose answers can be worked out by hand."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import HALF, IMAGE, SINGLE, TEXT, RandomToy, Toy, flips_when, never, pixel, varied, white, word
from torch import nn

import muroan
from muroan.attacks.base import Attack, Perturbation, ThreatModel
from muroan.attacks.corruptions import AudioNoise, Corruption, GaussianNoise, SaltAndPepper, WordMasking
from muroan.attacks.decoupling import Decoupling
from muroan.attacks.decoupling_fast import DecouplingFast
from muroan.attacks.decoupling_reference import DecouplingReference
from muroan.attacks.exhaustive import Exhaustive, ascending
from muroan.attacks.greedy import lowest, ranked
from muroan.attacks.greedy_occlusion import GreedyOcclusion
from muroan.attacks.leave_one_out import LeaveOneOut
from muroan.attacks.missing_modality import MissingModality
from muroan.attacks.one_pixel import OnePixel, log_odds
from muroan.attacks.random_removal import RandomRemoval
from muroan.attacks.sparse_rs import SparseRS, _Patch, _Pixels, divisor
from muroan.attacks.swapped_modality import SwappedModality
from muroan.attacks.word_substitution import WordSubstitution
from muroan.data.samples import Example, PreparedDataset, Sample
from muroan.errors import MuroanError
from muroan.modalities import Audio, Image, Modality, Region, Text, WordTokenizer
from muroan.models.base import MultimodalModel, Prediction
from muroan.results import AttackResult

ATOMS = [*(pixel(i) for i in (0, 1, 3, 4, 2, 5)), *(word(i) for i in range(4))]  # in the universe's order


def one(model: MultimodalModel, attack: Attack, sample: Sample | None = None, **options) -> AttackResult:
    (record,) = muroan.evaluate(model, [sample or white()], attack, **{"threat_model": SINGLE, **options})
    return record


def regions(record: AttackResult) -> set[Region]:
    return set(record.removal.regions)


def spent(record: AttackResult) -> dict[str, int]:
    return {phase: count.queries for phase, count in record.ledger.items() if count.queries}


def linear(pixels: Sequence[float], words: Sequence[float], threshold: float) -> Toy:
    """A toy whose margin is the sum of the weights of what is present, less a threshold."""
    weights = torch.tensor([*pixels, *words], dtype=torch.float64)
    return Toy(lambda image, text: [torch.cat([image, text], 1) @ weights - threshold, 0 * HALF])


# ---------------------------------------------------------------------------------------------------------
# Greedy occlusion

PIXELS, WORDS = [1, 5, 2, 2, 0.5, 0.1], [3, 0.2, 4, 0.1]  # 17.9 in all


def test_margins_that_are_equal_up_to_rounding_go_by_position():
    assert ranked([0.5, 0.2 + 4e-6, 0.2, 0.1, 0.2 - 4e-6]).tolist() == [3, 1, 2, 4, 0]
    assert ranked([]).tolist() == []


@given(st.lists(st.sampled_from([-math.inf, 0.0, 4e-6, 1e-5, 1.2e-5, 2e-5, 0.3, math.inf]), min_size=1, max_size=8))
def test_the_lowest_is_the_first_of_the_ranked(values: list[float]) -> None:
    assert lowest(np.array(values)) == ranked(values)[0]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_greedy_occlusion_by_hand(batch_size):
    """5 + 4 + 3 is the first sum above 11.9; each part is needed."""
    record = one(linear(PIXELS, WORDS, 6), GreedyOcclusion(), batch_size=batch_size)
    assert regions(record) == {pixel(1), word(2), word(0)}
    # Ten alone, then two and three parts; of the three sets of two, one is known.
    assert spent(record) == {"rank": 10, "add": 2, "prune": 2}
    assert (record.attack, record.one_minimal) == ("greedy_occlusion", True)


@pytest.mark.parametrize("rerank", [False, True])
def test_ties_go_by_position(rerank):
    """12 + 2 is above 13.9: of the two pixels of weight 2, (1, 0) comes before (0, 2) in the universe."""
    record = one(linear(PIXELS, WORDS, 4), GreedyOcclusion(rerank))
    assert regions(record) == {pixel(1), word(2), word(0), pixel(3)}


def test_what_is_not_needed_is_dropped():
    """Pixel 5 lowers the margin most, but pixels 0 and 1 are what it takes."""

    def rule(image, text):
        both = torch.maximum(image[:, 0], image[:, 1])
        return [10 * both + image[:, 5] + 0.5 * image[:, 0] + 0.4 * image[:, 1] - 2, 0 * HALF]

    assert regions(one(Toy(rule), GreedyOcclusion(prune=False))) == {pixel(5), pixel(0), pixel(1)}
    assert regions(one(Toy(rule), GreedyOcclusion())) == {pixel(0), pixel(1)}


def test_a_part_that_was_needed_is_tried_again():
    """Added: p0, p1, p2, p3. Pixel 3 can be dropped once pixel 1 is, and not before."""
    flips = torch.tensor([0b1111, 0b1101, 0b0101])  # pixel 0 is the lowest bit

    def rule(image, text):
        out = (1 - image[:, :4]) @ torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
        rank = image @ torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0, 0.0], dtype=torch.float64)
        return [torch.where(torch.isin(out.long(), flips), -1.0, 1.0 + rank), 0 * HALF]

    record = one(Toy(rule), GreedyOcclusion())
    assert regions(record) == {pixel(0), pixel(2)}
    assert spent(record) == {"rank": 10, "add": 3, "prune": 4}


def test_ranking_anew_finds_what_ranking_once_does_not():
    """Once pixel 0 is gone, pixel 1 counts for nothing."""

    def rule(image, text):
        out = 1 - image
        return [2.5 - 2 * out[:, 0] - 1.5 * out[:, 1] * image[:, 0] - out[:, 2], 0 * HALF]

    once = one(Toy(rule), GreedyOcclusion(prune=False))
    anew = one(Toy(rule), GreedyOcclusion(rerank=True, prune=False))
    assert regions(once) == {pixel(0), pixel(1), pixel(2)}
    assert regions(anew) == {pixel(0), pixel(2)}
    assert (anew.attack, spent(anew)) == ("greedy_occlusion_rerank", {"rank": 10 + 9})


# ---------------------------------------------------------------------------------------------------------
# Leave one out, whole modalities


def test_leave_one_out_by_hand():
    model = flips_when(lambda image, text: text[:, 2] * image[:, 4] == 0)
    record = one(model, LeaveOneOut())
    assert (regions(record), spent(record)) == ({word(2)}, {"leave": 4})
    record = one(flips_when(lambda image, text: image[:, 4] == 0), LeaveOneOut())
    assert (record.status, record.queries) == ("held", 4)
    record = one(flips_when(lambda image, text: image[:, 4] == 0), LeaveOneOut(every=True))
    assert (regions(record), spent(record)) == ({pixel(4)}, {"leave": 10})


def test_missing_modality_by_hand():
    record = one(flips_when(lambda image, text: text.sum(1) * image.sum(1) == 0), MissingModality())
    assert (regions(record), spent(record)) == ({TEXT}, {"miss": 2})  # four words are fewer than six pixels
    assert record.info["flips_without"] == {"image": True, "text": True}
    record = one(flips_when(lambda image, text: image[:, 5] == 0), MissingModality())
    assert regions(record) == {IMAGE}
    assert record.info["flips_without"] == {"image": True, "text": False}
    assert one(never(), MissingModality()).status == "held"


def test_swapped_modality_by_hand():
    donor = samples_of(never().modalities, [{"image": np.zeros((2, 3), np.uint8), "text": "d c"}])
    donor[0].inputs["image"][0, 0, 0] = 0.0  # exactly what counts as absent
    record = one(flips_when(lambda image, text: image[:, 0] == 0), SwappedModality(), donors=donor)
    assert (record.status, record.kind, record.queries) == ("flipped", "perturbation", 1)
    assert (record.removed, record.info["swapped"]) == ({"image": 6}, ["image"])
    record = one(flips_when(lambda image, text: text[:, 0] == 0), SwappedModality(), donors=donor)
    assert (record.status, record.info["swapped"], record.queries) == ("flipped", ["text"], 2)
    assert record.removed == {"text": 3}  # "a b c d" became "d c": a and d gone, d for b
    shorter = samples_of(never().modalities, [{"image": np.zeros((2, 3), np.uint8), "text": "b c d"}])
    record = one(flips_when(lambda image, text: text[:, 0] == 0), SwappedModality(), donors=shorter)
    assert record.removed == {"text": 1}  # without a; by position all four words would be others
    assert one(never(), SwappedModality(), donors=donor).queries == 2


def test_swapping_needs_donors():
    with pytest.raises(MuroanError, match="swapped_modality takes modalities of other samples, and there are none"):
        one(never(), SwappedModality())


def samples_of(modalities: Mapping[str, Modality], rows: list[dict], labels: Sequence[int] = ()) -> list[Sample]:
    labels = labels or [0] * len(rows)
    examples = [Example(f"s{i}", row, label) for i, (row, label) in enumerate(zip(rows, labels, strict=True))]
    return list(PreparedDataset(examples, modalities, classes=3))


# ---------------------------------------------------------------------------------------------------------
# The exhaustive search


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8))
@settings(deadline=None, max_examples=60)
def test_sets_come_in_ascending_order(costs):
    everything = [c for n in range(1, len(costs) + 1) for c in itertools.combinations(range(len(costs)), n)]
    everything.sort(key=lambda chosen: (sum(costs[i] for i in chosen), len(chosen), chosen))
    assert list(ascending(costs)) == everything


def test_sets_are_made_as_they_are_taken():
    assert list(itertools.islice(ascending([1] * 200), 3)) == [(0,), (1,), (2,)]


@given(
    st.lists(st.integers(-3, 6), min_size=10, max_size=10),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(-6, 6)), max_size=4),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 5, 64]),
)
@settings(deadline=None, max_examples=30)
def test_exhaustive_agrees_with_brute_force(weights, pairs, min_side, batch_size):
    """On every toy: the smallest flip, the first of equals in the order of the atoms, and the proof."""

    def margin(present):
        total = sum(w * present[i] for i, w in enumerate(weights)) - 0.5 * sum(weights) - 0.25
        return total + sum(w * present[i] * present[j] for i, j, w in pairs)

    if margin([1] * 10) <= 0:
        return
    cells = {1: ATOMS, 2: [*IMAGE.halves(), *ATOMS[6:]], 3: [IMAGE, *ATOMS[6:]]}[min_side]

    def gone(removed):
        pixels = {y * 3 + x for r in removed if r.modality == "image" for y, x in box(r)}
        words = {6 + r.start[0] for r in removed if r.modality == "text"}
        return [0 if i in pixels | words else 1 for i in range(10)]

    everything = [c for n in range(1, len(cells) + 1) for c in itertools.combinations(range(len(cells)), n)]
    everything.sort(key=lambda chosen: (sum(cells[i].area for i in chosen), len(chosen), chosen))
    flips = [chosen for chosen in everything if margin(gone([cells[i] for i in chosen])) < 0]

    def rule(image, text):
        return [margin(torch.cat([image, text], 1).T), 0 * HALF]

    record = one(Toy(rule), Exhaustive(), threat_model=ThreatModel(min_side={"image": min_side}), batch_size=batch_size)
    assert record.proven is True
    if flips:
        assert regions(record) == {cells[i] for i in flips[0]}
        assert record.queries == everything.index(flips[0]) + 1
    else:
        assert (record.status, record.queries) == ("held", len(everything))


def box(region: Region) -> list[tuple[int, int]]:
    return list(itertools.product(*(range(a, b) for a, b in zip(region.start, region.stop, strict=True))))


def test_exhaustive_proves_nothing_when_cut_short():
    record = one(never(), Exhaustive(), threat_model=ThreatModel(min_side={"image": 1}, max_queries=100))
    assert (record.status, record.proven, record.queries) == ("budget_exhausted", None, 100)


def test_exhaustive_refuses_what_would_not_end():
    with pytest.raises(MuroanError, match=r"has 10 finest regions, which makes 1,023 removals; .* allows 9"):
        one(never(), Exhaustive(max_atoms=9))


# ---------------------------------------------------------------------------------------------------------
# What holds for all that remove

REMOVALS: list[Callable[[], Attack]] = [
    GreedyOcclusion,
    lambda: GreedyOcclusion(rerank=True),
    LeaveOneOut,
    lambda: LeaveOneOut(every=True),
    Exhaustive,
    MissingModality,
    RandomRemoval,
    DecouplingReference,
]


def test_random_removal_with_all_of_the_budget():
    """A draw that takes what another one took is made up for, until there seems to be nothing new."""

    def asked(queries: int) -> int:
        budget = ThreatModel(min_side=SINGLE.min_side, max_queries=queries)
        return one(linear(PIXELS, WORDS, 9), RandomRemoval(draws=None), threat_model=budget).queries

    assert (asked(40), asked(150)) == (40, 150)
    assert 175 < asked(500) < 500, "one to three of ten atoms make 175 sets, larger regions some more, but not 500"
    with pytest.raises(MuroanError, match=r"attack\.draws=null never ends without a budget"):
        one(linear(PIXELS, WORDS, 9), RandomRemoval(draws=None))


@pytest.mark.parametrize("draws", [20, None])
def test_random_removal_in_one_modality(draws):
    asked: list[Region] = []

    class Noting(RandomRemoval):
        def draw(self, sample, names):
            removal = super().draw(sample, names)
            asked.extend(removal.regions)
            return removal

    budget = ThreatModel(min_side=SINGLE.min_side, max_queries=40)
    for names in (["image"], ["text"], ["text", "image"]):
        attack = Noting(draws, modalities=names)
        assert attack.name == "_".join(["random_removal", *names, *([] if draws else ["budget"])])
        one(linear(PIXELS, WORDS, 9), attack, threat_model=budget)
        assert {region.modality for region in asked} == set(names)
        asked.clear()


def toy_samples() -> list[Sample]:
    return varied(RandomToy(), 12)


@pytest.mark.parametrize("make", REMOVALS, ids=lambda make: make().name)
def test_removals_do_not_depend_on_the_batch(make):
    def run(**options):
        return [
            r.to_json() for r in muroan.evaluate(RandomToy(), toy_samples(), make(), threat_model=SINGLE, **options)
        ]

    expected = run(batch_size=16)
    assert run(batch_size=1) == expected
    assert run(batch_size=3) == expected
    assert any('"status":"flipped"' in line for line in expected)


@pytest.mark.parametrize("make", REMOVALS, ids=lambda make: make().name)
@pytest.mark.parametrize("budget", [1, 2, 3, 5, 9, 10, 11, 12, 14, 20, 40])
def test_removals_within_a_budget_return_the_best_they_know(make, budget):
    """The engine notes every flip that a search was told of: what comes back is the smallest of them."""
    threat_model = ThreatModel(min_side={"image": 1}, max_queries=budget)
    free = {r.id: r for r in muroan.evaluate(RandomToy(), toy_samples(), make(), threat_model=SINGLE)}
    for record in muroan.evaluate(RandomToy(), toy_samples(), make(), threat_model=threat_model, batch_size=5):
        assert record.queries <= budget
        assert record.flipped == bool(record.trajectory)
        if record.flipped:
            assert record.decoupled_fraction == pytest.approx(record.trajectory[-1][1])
        if free[record.id].queries <= budget:
            assert record.to_json() == free[record.id].to_json()
        elif not record.flipped:
            assert record.status in ("budget_exhausted", "skipped")


@pytest.mark.parametrize("make", REMOVALS, ids=lambda make: make().name)
def test_a_trajectory_is_what_smaller_budgets_would_have_had(make):
    """These searches do not look at their budget, so that a smaller one cuts them short where it ends."""

    def run(budget: int | None = None) -> dict[str, AttackResult]:
        threat_model = ThreatModel(min_side={"image": 1}, max_queries=budget)
        return {r.id: r for r in muroan.evaluate(RandomToy(), toy_samples(), make(), threat_model=threat_model)}

    free = run()
    budgets = sorted({asked + less for r in free.values() for asked, _ in r.trajectory for less in (0, -1)} - {0})
    assert len(budgets) > 1
    for budget in budgets:
        for key, record in run(budget).items():
            had = [fraction for asked, fraction in free[key].trajectory if asked <= budget]
            assert record.flipped == bool(had), (key, budget, free[key].trajectory)
            if had:
                assert record.decoupled_fraction == pytest.approx(had[-1])


# ---------------------------------------------------------------------------------------------------------
# Values: a toy of an image, a sound and a text


class Scene(MultimodalModel):
    """A random smooth net of a colour image, a sound and the words; two classes."""

    def __init__(self, seed: int = 0, scale: float = 1.0, kinds: Sequence[str] = ("image", "audio", "text")):
        whole: dict[str, Modality] = {
            "image": Image((4, 5), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)),
            "audio": Audio(20, 100),
            "text": Text(WordTokenizer(["a", "b", "c", "d"]), 8),
        }
        super().__init__({name: whole[name] for name in kinds}, num_classes=2)
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.maps = nn.ParameterDict({"image": random(60, 6), "audio": random(20, 6)})
        self.words, self.out, self.scale = random(9, 6), random(6, 2), scale
        self.eval()

    def encode(self, modality, x):
        if modality == "text":
            return self.words[x].sum(1) / 4
        return x.flatten(1) @ self.maps[modality] / 12

    def fuse(self, features):
        return torch.tanh(self.scale * sum(features.values()))

    def head(self, embedding):
        return embedding @ self.out


def scenes(model: MultimodalModel, count: int = 6) -> list[Sample]:
    """Random samples with the model's answer as their label; sounds are shorter than the model takes."""
    rng = np.random.default_rng(3)
    rows = [
        {
            "image": rng.integers(1, 255, (4, 5, 3), dtype=np.uint8),
            "audio": rng.uniform(-0.9, 0.9, int(rng.integers(12, 18))),
            "text": " ".join(rng.choice(["a", "b", "c", "d"], 4)),
        }
        for _ in range(count)
    ]
    samples = samples_of(model.modalities, [{name: row[name] for name in model.modalities} for row in rows])
    labelled = []
    for s in samples:
        inputs = {n: x[None].double() if x.is_floating_point() else x[None] for n, x in s.inputs.items()}
        with torch.no_grad():
            label = int(model(inputs).logits.argmax())
        labelled.append(Sample(s.id, s.index, s.inputs, s.layouts, label))
    return labelled


def keeping(attack: Attack) -> dict[str, Perturbation | None]:
    """What the attack will return for each sample."""
    found: dict[str, Perturbation | None] = {}
    perturb = attack.perturb  # type: ignore[attr-defined]

    def kept(target):
        told = perturb(target)
        found.update(zip([s.id for s in target.samples], told, strict=True))
        return told

    attack.perturb = kept  # type: ignore[attr-defined]
    return found


VALUES: dict[str, Callable[[str], Attack]] = {
    "pixels": lambda table: SparseRS(k=4, queries=40),
    "pixels shrinking": lambda table: SparseRS(k=8, queries=60, shrink=True),
    "patch": lambda table: SparseRS("patch", k=9, queries=40, modalities=["image"]),
    "stretch shrinking": lambda table: SparseRS("patch", k=6, queries=40, modalities=["audio"], shrink=True),
    "one pixel": lambda table: OnePixel(queries=60),
    "three samples": lambda table: OnePixel(pixels=3, queries=60, modality="audio"),
    "words": lambda table: WordSubstitution(synonyms=table),
    "swapped": lambda table: SwappedModality(),
    "gaussian": lambda table: GaussianNoise(5),
    "salt": lambda table: SaltAndPepper(5),
    "audio": lambda table: AudioNoise(5),
    "masking": lambda table: WordMasking(5),
}


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> str:
    """A table of synonyms for the words a to d."""
    path = tmp_path_factory.mktemp("letters") / "synonyms.json"
    path.write_text(json.dumps({"a": ["b", "c"], "b": ["d"], "c": ["d", "a", "two words"], "d": ["a"]}))
    return str(path)


def run_values(attack: Attack, **options) -> list[AttackResult]:
    return muroan.evaluate(Scene(2), scenes(Scene(2)), attack, donors=scenes(Scene(2), 9)[6:], **options)


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
def test_values_do_not_depend_on_the_batch(make, letters):
    expected = [r.to_json() for r in run_values(make(letters), batch_size=16)]
    assert [r.to_json() for r in run_values(make(letters), batch_size=1)] == expected
    assert [r.to_json() for r in run_values(make(letters), batch_size=3)] == expected


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("budget", [1, 2, 3, 5, 9, 30])
def test_values_stay_within_a_budget(make, budget, letters):
    for record in run_values(make(letters), threat_model=ThreatModel(max_queries=budget), batch_size=4):
        assert record.queries <= budget
        assert record.status in ("flipped", "held", "budget_exhausted")
        if record.kind == "corruption":
            assert record.queries == 0


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
def test_values_that_stop_by_themselves_are_not_exhausted(make, letters):
    """On a model that never flips: held with as many queries as the attack wants, exhausted with one fewer."""
    model = Scene(2, scale=0)
    samples, donors = scenes(model, 2), scenes(model, 9)[6:]

    def run(budget: int | None) -> list[AttackResult]:
        return muroan.evaluate(
            model, samples, make(letters), donors=donors, threat_model=ThreatModel(max_queries=budget)
        )

    for i, free in enumerate(run(None)):
        assert free.status == "held"
        if free.kind != "corruption":
            assert [run(free.queries - less)[i].status for less in (0, 1)] == ["held", "budget_exhausted"]


@pytest.mark.parametrize("make", list(VALUES.values())[:8], ids=list(VALUES)[:8])
def test_what_is_returned_flips(make, letters):
    """Each attack finds some flips on this toy; all that it returns are, and the trajectory ends with them."""
    attack = make(letters)
    found = keeping(attack)
    records = run_values(attack)
    assert {r.id for r in records if r.flipped} == {id for id, p in found.items() if p is not None}
    assert any(r.flipped for r in records)
    for record in records:
        if record.flipped:
            asked, fractions = zip(*record.trajectory, strict=True)
            assert fractions[-1] == record.decoupled_fraction
            assert asked[-1] <= record.queries
            assert list(asked) == sorted(set(asked))
            assert list(fractions) == sorted(set(fractions), reverse=True)
        else:
            assert record.trajectory == []


# ---------------------------------------------------------------------------------------------------------
# Sparse-RS


@pytest.mark.parametrize("k", [1, 3, 7, 1000])
@pytest.mark.parametrize("shrink", [False, True])
@pytest.mark.parametrize("mode", ["pixels", "patch"])
@pytest.mark.parametrize("modality", ["image", "audio"])
def test_sparse_rs_changes_at_most_k_elements_to_the_ends_of_their_range(k, shrink, mode, modality):
    model = Scene(2, scale=3)
    samples = scenes(model, 4)
    attack = SparseRS(mode, k, queries=30, shrink=shrink, modalities=[modality])
    found = keeping(attack)
    records = muroan.evaluate(model, samples, attack)
    low, high = model.modalities[modality].span()
    for sample, record in zip(samples, records, strict=True):
        assert record.queries <= 30
        perturbation = found[sample.id]
        if perturbation is None:
            continue
        (x,) = perturbation.inputs.values()
        moved = x != sample.inputs[modality].double()
        count = sample.layouts[modality].count
        ends = [end.double().view(-1, *(1 for _ in x.shape[1:])) for end in (low, high)]
        at_ends = (x == ends[0]) | (x == ends[1])
        assert at_ends[moved].all()
        touched = moved.any(0) if modality == "image" else moved[:count]
        assert int(touched.sum()) <= min(k, count)
        assert modality == "image" or not moved[count:].any(), "padding is no part of the sound"
        if mode == "patch":
            places = touched.nonzero()
            sides = places.amax(0) - places.amin(0) + 1
            assert int(sides.prod()) <= k
        assert record.removed == {modality: int(touched.sum())}
    if k == 1000 and mode == "pixels":
        assert any(p is not None for p in found.values())


def test_shrinking_finds_a_smaller_flip():
    """Any one dark pixel flips: eight of them can become one."""
    model = Scene(0, kinds=("image", "text"))
    model.head = lambda z: torch.stack([HALF.expand(len(z)), z[:, 0]], 1)
    model.encode = lambda name, x: (x.flatten(1) <= -1.9).any(1, keepdim=True).double() if name == "image" else x * 0.0
    model.fuse = lambda features: features["image"]
    image = np.full((4, 5, 3), 200, np.uint8)
    sample = samples_of(model.modalities, [{"image": image, "text": "a"}])[0]
    first = one(model, SparseRS(k=8, queries=50), sample)
    small = one(model, SparseRS(k=8, queries=50, shrink=True), sample)
    assert first.removed["image"] > 4
    assert small.removed["image"] == 1
    assert small.queries <= 50
    (first_asked, size), *rest = small.trajectory
    assert (first_asked, size) == (first.queries, pytest.approx(100 * 8 / 21)), "the first flip is that of no shrinking"
    assert len(rest) >= 3, "8, 4, 2, 1"
    queries, fraction = rest[-1]
    assert fraction == small.decoupled_fraction
    assert 4 <= queries <= small.queries
    sizes = [size for _, size in small.trajectory]
    assert sizes == sorted(set(sizes), reverse=True)


def test_the_schedule_is_rescaled():
    divisors = [divisor(_Pixels.SCHEDULE, asked, 10_000) for asked in (0, 1, 50, 51, 500, 501, 2000, 8000, 8001)]
    assert divisors == [1, 2, 2, 4, 5, 6, 8, 15, 20]
    assert divisor(_Pixels.SCHEDULE, 450, 500) == 20
    assert divisor(_Patch.SCHEDULE, 10, 10_000) == 1
    assert divisor(_Patch.SCHEDULE, 9000, 10_000) == 128


@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 30))
@settings(deadline=None, max_examples=50)
def test_elements_of_a_candidate_stay_distinct(seed, count, k):
    rng = np.random.default_rng(seed)
    pixels = _Pixels.start(rng, count, k, 1)
    for asked in range(1, 30):
        before = set(pixels.paint.elements.tolist())
        pixels = pixels.changed(rng, 0.9, asked, 30)
        after = set(pixels.paint.elements.tolist())
        assert len(after) == min(k, count)
        assert after <= set(range(count))
        assert k >= count or after != before


# ---------------------------------------------------------------------------------------------------------
# One pixel


@pytest.mark.parametrize("pixels", [1, 3])
@pytest.mark.parametrize("modality", [None, "audio"])
def test_one_pixel_changes_no_more_than_it_may(pixels, modality):
    model = Scene(2, scale=3)
    samples = scenes(model)
    attack = OnePixel(pixels, queries=100, modality=modality)
    found = keeping(attack)
    records = muroan.evaluate(model, samples, attack)
    assert any(r.flipped for r in records)
    for sample, record in zip(samples, records, strict=True):
        assert record.queries <= 100
        if found[sample.id] is not None:
            ((name, x),) = found[sample.id].inputs.items()
            assert name == (modality or "image")
            assert 1 <= record.removed[name] <= pixels
            low, high = model.modalities[name].span()
            shape = (-1, *(1 for _ in x.shape[1:]))
            assert (x >= low.view(shape).double() - 1e-12).all()
            assert (x <= high.view(shape).double() + 1e-12).all()


@pytest.mark.parametrize("confidence", [1, 100])
def test_evolution_climbs(confidence):
    """The flip takes one pixel of twenty to be nearly white: chance alone would need some hundreds of draws. Where the
    model is confident, the probability of the label is 1 in any arithmetic almost until then."""
    model = Scene(0, kinds=("image", "text"))
    place = torch.zeros(20, dtype=torch.float64)
    place[13] = 1

    def encode(name, x):
        if name == "text":
            return x * 0.0
        light = x.double().mean(1).flatten(1)
        where = torch.arange(20) // 5, torch.arange(20) % 5
        near = torch.exp(-((where[0] - 2) ** 2 + (where[1] - 3) ** 2) / 4.0)
        return (light * near).amax(1, keepdim=True)

    model.encode = encode
    model.fuse = lambda features: features["image"]
    model.head = lambda z: confidence * torch.stack([torch.full_like(z[:, 0], 1.6), z[:, 0]], 1)
    image = np.full((4, 5, 3), 60, np.uint8)
    sample = samples_of(model.modalities, [{"image": image, "text": "a"}])[0]
    records = [one(model, OnePixel(queries=2000), sample, seed=seed) for seed in range(5)]
    assert all(r.flipped and r.queries < 1000 and r.removed == {"image": 1} for r in records)


def test_log_odds_are_in_the_order_of_the_likelihood():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(50) % 4
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(log_odds(Prediction(logits, logits), labels), torch.logit(p))
    sure = torch.tensor([[800.0, 0], [801, 0], [0, 800]])
    assert log_odds(Prediction(sure, sure), torch.tensor([0, 0, 0])).tolist() == [800, 801, -800]


def test_parents_differ():
    attack, rng = OnePixel(), np.random.default_rng(0)
    people = np.zeros((5, 1, 5))
    people[:, 0, :] = 10.0 ** np.arange(5)[:, None] / 1e5
    children = attack._children(rng, people)
    allowed = {
        round(float(np.clip(people[a, 0, 0] + 0.5 * (people[b, 0, 0] - people[c, 0, 0]), 0, 1)), 9)
        for a, b, c in itertools.permutations(range(5), 3)
    }
    assert {round(float(v), 9) for v in children.ravel()} <= allowed


# ---------------------------------------------------------------------------------------------------------
# Word substitution

TASTE = {"good": 2.0, "fine": 1.0, "bad": -3.0, "awful": -1.0, "film": 0.3, "a": 0.1, "nice": 1.9}


class Bag(MultimodalModel):
    """The sum of the words' weights, above zero or not; the image is looked at and forgotten."""

    def __init__(self, most: int = 8):
        tokenizer = WordTokenizer(list(TASTE))
        super().__init__({"image": Image((2, 2), (0.5,), (0.5,)), "text": Text(tokenizer, most)}, num_classes=2)
        self.table = nn.Embedding(tokenizer.size, 2, dtype=torch.float64)
        values = torch.zeros(tokenizer.size, 2, dtype=torch.float64)
        values[5:, 0] = torch.tensor(list(TASTE.values()))
        values[5:, 1] = torch.tensor([1.0, 1.0, -1.0, 1.0, 3.0, 30.0, 1.1])  # a direction for each word
        self.table.weight = nn.Parameter(values)
        self.eval()

    def encode(self, modality, x):
        return self.table(x)[..., :1].sum(1) if modality == "text" else x.flatten(1)[:, :1] * 0

    def fuse(self, features):
        return features["text"] + features["image"]

    def head(self, embedding):
        return torch.cat([embedding, -embedding], 1)


def review(text: str, model: MultimodalModel | None = None) -> Sample:
    modalities = (model or Bag()).modalities
    return samples_of(modalities, [{"image": np.zeros((2, 2), np.uint8), "text": text}])[0]


@pytest.fixture
def table(tmp_path: Path) -> str:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"Good": ["good", "fine", "bad", "awful", "very bad"], "film": ["fine"]}))
    return str(path)


def test_a_synonym_flips_by_hand(table):
    """Without "good" the margin falls by 4; "bad" lowers it most, and that is enough."""
    attack = WordSubstitution(synonyms=table)
    found = keeping(attack)
    record = one(Bag(), attack, review("a (Good) film"))
    assert found["s0"].words == {"text": ["a", "(Bad)", "film"]}
    assert (record.status, record.removed, record.adversarial_label) == ("flipped", {"text": 1}, 1)
    assert record.info["replaced"] == [["text", 1, "(Good)", "(Bad)"]]
    assert record.queries == 3 + 3  # each word deleted; three candidates are one word, and another
    assert record.trajectory == [(6, record.decoupled_fraction)]


def test_words_are_replaced_until_the_label_flips(tmp_path):
    path = tmp_path / "weak.json"
    path.write_text(json.dumps({"good": ["awful"], "nice": ["awful"], "film": ["a"], "a": ["awful"]}))
    record = one(Bag(), WordSubstitution(synonyms=str(path)), review("nice good film a"))
    # 4.3; good -> 1.3; nice -> -1.6.
    assert [r[1:] for r in record.info["replaced"]] == [[1, "good", "awful"], [0, "nice", "awful"]]
    assert (record.status, record.removed) == ("flipped", {"text": 2})
    short = one(Bag(), WordSubstitution(synonyms=str(path), max_words=1), review("nice good film a"))
    assert (short.status, len(short.info["replaced"]), short.queries) == ("held", 1, 5)


def test_a_candidate_that_raises_the_margin_is_left(table):
    record = one(Bag(), WordSubstitution(synonyms=table), review("film"))
    assert (record.status, record.info["replaced"], record.queries) == ("held", [], 1)  # fine, 1.0, is above film, 0.3


def test_neighbours_in_the_models_own_embedding():
    """By cosine, awful (-1, 1) is nearest to fine (1, 1) after good (2, 1), nice (1.9, 1.1), film and a."""
    attack = WordSubstitution(candidates=5)
    record = one(Bag(), attack, review("fine"))
    assert record.info["replaced"] == [["text", 0, "fine", "awful"]]
    assert (record.status, record.queries) == ("flipped", 5)
    assert one(Bag(), WordSubstitution(candidates=4), review("fine")).status == "held"
    assert one(Bag(), WordSubstitution(), review("unheard good")).queries == 2 + 6  # an unknown word has no neighbours


@pytest.mark.parametrize("fused", [False, True])
def test_neighbours_move_with_the_embedding(fused):
    """As in adversarial training: awful comes to be the nearest, and is then found with one candidate."""
    model, attack = Bag(), WordSubstitution(candidates=1)
    assert one(model, attack, review("fine")).info["replaced"] == []
    source = attack._source
    one(model, attack, review("fine"))
    assert attack._source is source
    moved = model.table.weight.detach().clone()
    moved[5 + list(TASTE).index("awful")] = torch.tensor([-1.0, 1000.0])
    moved[5 + list(TASTE).index("fine")] = torch.tensor([0.1, 1000.0])
    model.table.weight.grad = model.table.weight.detach() - moved
    torch.optim.SGD([model.table.weight], lr=1.0, fused=fused).step()
    torch.testing.assert_close(model.table.weight.detach(), moved)
    assert one(model, attack, review("fine")).info["replaced"] == [["text", 0, "fine", "awful"]]
    assert one(Bag(), attack, review("fine")).info["replaced"] == []


def test_a_text_that_would_be_too_long_is_not_asked(tmp_path):
    path = tmp_path / "long.json"
    path.write_text(json.dumps({"good": ["bad-bad-bad", "bad"]}))
    model = Bag(5)
    record = one(model, WordSubstitution(synonyms=str(path)), review("a good film", model))
    assert record.info["replaced"] == [["text", 1, "good", "bad"]]


def test_neighbours_need_words_and_one_table(table):
    model = Bag()
    model.more = nn.Embedding(model.table.num_embeddings, 3, dtype=torch.float64)
    with pytest.raises(MuroanError, match=r"no one embedding table .*set attack\.synonyms .*attack\.masked_lm"):
        one(model, WordSubstitution(), review("good"))
    model = Bag()
    model.modalities["text"].tokenizer.__class__ = type("Pieces", (), dict(WordTokenizer.__dict__))
    with pytest.raises(MuroanError, match=r"\(Pieces\) are no whole words.*set attack\.synonyms"):
        one(model, WordSubstitution(), review("good"))


def test_a_broken_table_is_told(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text("{")
    for content in ("{", '{"a": "b"}', "[]"):
        path.write_text(content)
        with pytest.raises(MuroanError, match=r"attack\.synonyms: .*broken\.json"):
            one(Bag(), WordSubstitution(synonyms=str(path)), review("good"))
    with pytest.raises(MuroanError, match="both set"):
        WordSubstitution(synonyms="x", masked_lm="y")


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory) -> str:
    """A tiny random BERT with a vocabulary of whole words and a word piece."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    folder = tmp_path_factory.mktemp("masked_lm")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TASTE, "##ed", "!", "other"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_masked_language_model_fills_in(masked_lm):
    texts = ["a good film!", "nice", "good fine film a", " ".join(["good", "a"] * 3)]
    samples = samples_of(Bag(20).modalities, [{"image": np.zeros((2, 2), np.uint8), "text": t} for t in texts])
    runs = []
    for batch_size in (1, 3):
        attack = WordSubstitution(masked_lm=masked_lm)
        records = muroan.evaluate(Bag(20), samples, attack, batch_size=batch_size)
        runs.append([r.to_json() for r in records])
        for record in records:
            for _, _, old, new in record.info["replaced"]:
                assert new.strip("!") in {*TASTE, "other"} - {old.strip("!")}
                assert new.endswith("!") == old.endswith("!")
    assert runs[0] == runs[1]
    assert any(r.flipped for r in records)
    # All seven other words may be tried for one: the model is random, so all of them are in sight.
    assert records[1].queries == 7


def test_a_masked_language_model_that_cannot_be_loaded_is_told(tmp_path):
    with pytest.raises(MuroanError, match=r"attack\.masked_lm: .*could not be loaded"):
        one(Bag(), WordSubstitution(masked_lm=str(tmp_path / "nothing")), review("good"))


# ---------------------------------------------------------------------------------------------------------
# Corruptions


class Wide(MultimodalModel):
    """Modalities large enough for statistics; it always answers 0."""

    def __init__(self):
        words = Text(WordTokenizer([f"w{i}" for i in range(20)]), 24)
        super().__init__({"image": Image((48, 48)), "audio": Audio(4000, 8000), "text": words}, num_classes=2)
        self.unused = nn.Parameter(torch.zeros(1))
        self.eval()

    def encode(self, modality, x):
        return x.flatten(1)[:, :1].float() * 0

    def fuse(self, features):
        return features["image"] + features["audio"]

    def head(self, embedding):
        return torch.cat([embedding + 1, embedding], 1)


def corrupted(corruption: Corruption, seed: int = 0) -> tuple[Sample, Perturbation]:
    rng = np.random.default_rng(1)
    row = {
        "image": np.full((48, 48, 3), 128, np.uint8),
        "audio": 0.2 * np.sin(np.arange(3000) / 7) + 0 * rng.random(3000),
        "text": " ".join(f"w{i}" for i in range(20)),
    }
    model = Wide()
    sample = samples_of(model.modalities, [row])[0]
    found = keeping(corruption)
    record = one(model, corruption, sample, seed=seed)
    assert (record.kind, record.status, record.queries, record.forwards) == ("corruption", "held", 0, 2)
    assert found["s0"] is not None
    return sample, found["s0"]


def strength(corruption: Corruption) -> float:
    """The corruption in its own unit, measured on what came out."""
    sample, perturbation = corrupted(corruption)
    (name,) = perturbation.inputs
    before, after = sample.inputs[name].double(), perturbation.inputs[name].double()
    if name == "text":
        words = perturbation.words["text"]
        masked = [i for i, w in enumerate(words) if w == "[MASK]"]
        assert [i - 1 for i in (after == 4).nonzero()[:, 0].tolist()] == masked  # after [CLS]
        assert [w for i, w in enumerate(words) if i not in masked] == [f"w{i}" for i in range(20) if i not in masked]
        return len(masked) / 20
    if name == "audio":
        assert torch.equal(before[3000:], after[3000:])
        assert after.abs().max() <= 1
        return float(10 * torch.log10(before.square().sum() / (after - before).square().sum()))
    assert after.abs().max() <= 1 + 1e-6
    if isinstance(corruption, SaltAndPepper):
        moved = after != before
        assert set(after[moved].tolist()) == {-1.0, 1.0}
        assert (after[moved] > 0).double().mean() == pytest.approx(0.5, abs=0.1)
        return float(moved.double().mean())
    return float((after - before).std() / 2)  # the range of -1 to 1 is twice that of an image


@pytest.mark.parametrize("kind", [GaussianNoise, SaltAndPepper, AudioNoise, WordMasking], ids=lambda kind: kind.name)
def test_a_corruption_is_as_strong_as_its_severity_says(kind):
    measured = [strength(kind(severity)) for severity in range(1, 6)]
    down = kind is AudioNoise  # a ratio of signal to noise
    assert measured == sorted(measured, reverse=down)
    assert len(set(measured)) == 5
    for value, level in zip(measured, kind.levels, strict=True):
        if kind is GaussianNoise and level > 0.2:
            assert value < level  # cut at the ends of the range
        else:
            assert value == pytest.approx(level, rel=0.1, abs=0.3 if down else 0.0)


def test_a_corruption_is_one_draw_a_sample():
    first, again, other = (corrupted(GaussianNoise(), seed)[1].inputs["image"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_masked_words_are_counted_by_their_tokens():
    model = flips_when(lambda image, text: text.sum(1) < 4)
    record = one(model, WordMasking(5))
    assert (record.status, record.removed, record.kind) == ("flipped", {"text": 2}, "corruption")
    assert record.perturbed_media["text"]["words"].count("[MASK]") == 2


# ---------------------------------------------------------------------------------------------------------
# What does not fit


@pytest.mark.parametrize(
    ("attack", "kinds", "message"),
    [
        (LeaveOneOut(), ("image", "audio"), r"removes words, the model takes image, audio and no text"),
        (MissingModality(), ("image",), r"missing_modality leaves at least one .*takes image alone"),
        (SparseRS(), ("text",), r"values of images and sounds.*takes, text \(Text\), it can change none"),
        (SparseRS(modalities=["text"]), ("image", "text"), r"it can change image, and attack\.modalities names"),
        (SparseRS("patch"), ("image", "audio"), r"a patch lies in one modality.*name one in attack\.modalities"),
        *(
            (attack, ("image", "text"), r"attack\.modalities must be a list of different names, or null, got")
            for wrong in (5, "image", [], ["image", "image"], ["image", 1])
            for attack in (SparseRS(modalities=wrong), DecouplingFast(modalities=wrong))
        ),
        (OnePixel(), ("audio", "text"), r"changes pixels: .*audio \(Audio\), text \(Text\), it can change none"),
        (WordSubstitution(), ("image", "audio"), r"changes words: .*image \(Image\), audio \(Audio\)"),
        (GaussianNoise(), ("audio", "text"), r"changes images: .*audio \(Audio\), text \(Text\)"),
        (SaltAndPepper(), ("audio",), r"changes images"),
        (AudioNoise(), ("image",), r"changes sounds"),
        (WordMasking(), ("image",), r"changes texts"),
    ],
    ids=lambda value: value.name if isinstance(value, Attack) else None,
)
def test_a_model_without_the_modality_is_told(attack, kinds, message):
    model = Scene(0, kinds=kinds)
    with pytest.raises(MuroanError, match=message):
        muroan.evaluate(model, scenes(model, 2), attack)


def test_a_tokenizer_without_a_mask_token_is_told():
    model = Scene(0)
    model.modalities["text"].tokenizer.mask_id = None
    with pytest.raises(MuroanError, match="text cannot be replaced by 'mask': this tokenizer has no mask token"):
        muroan.evaluate(model, scenes(model, 1), WordMasking())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Exhaustive(0),
        lambda: SparseRS("frame"),
        lambda: SparseRS(k=0),
        lambda: SparseRS(queries=0),
        lambda: SparseRS(alpha_init=0),
        lambda: SparseRS(alpha_init="abc"),
        lambda: RandomRemoval(modalities="image"),
        lambda: Decoupling(modalities=5),
        lambda: Decoupling(modalities=["image", "image"]),
        lambda: OnePixel(0),
        lambda: OnePixel(population=2),
        lambda: WordSubstitution(0),
        lambda: WordSubstitution(max_words=0),
        lambda: GaussianNoise(0),
        lambda: WordMasking(6),
    ],
)
def test_options_are_checked(make):
    with pytest.raises(MuroanError, match=r"attack\."):
        make()
