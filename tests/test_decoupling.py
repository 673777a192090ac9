"""Our own attack, from its description alone: on toys whose smallest flip is known, by hand or by brute force."""

from __future__ import annotations

import itertools
import re
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import log_ndtr
from test_engine import SINGLE, RandomToy, varied
from torch import Tensor
from toys import Blocks, Present, block, flips_when, leaves, logits, margins, stretch, subsets, threat, word

import muroan
from muroan.attacks.base import Ask, Attack, BudgetExhausted
from muroan.attacks.decoupling import SHORT, Decoupling, Hunt
from muroan.attacks.greedy_occlusion import GreedyOcclusion
from muroan.attacks.universe import Universe, ascending, cheaper
from muroan.callbacks import AttackCallback
from muroan.errors import MuroanError
from muroan.modalities import Region, Removal
from muroan.results import AttackResult

# The large toy: 64 blocks of 16 pixels (4 x 4) and six words, 1,030 elements; some have a sound of 16 stretches of 50
# samples as well.
SIDES = {"image": 4, "audio": 50}
TEXT = Region("text", (0,), (6,))


def pixels(y: int, x: int) -> Region:
    return block(4, y, x)


def sound(i: int) -> Region:
    return stretch(50, i)


def one(model: Blocks, attack: Attack | None = None, queries: int | None = 500, **options) -> AttackResult:
    options = {"threat_model": threat(queries, **SIDES), **options}
    (record,) = muroan.evaluate(model, [model.sample()], attack or Decoupling(), **options)
    return record


def size(record: AttackResult) -> int:
    return sum(record.removed.values())


def label_without(model: Blocks, *removals: Removal) -> list[int]:
    return logits(model, removals)[1].argmax(1).tolist()


def assert_flips_and_is_one_minimal(model: Blocks, record: AttackResult) -> None:
    """By forward passes of our own: it flips, and with any part put back it does not."""
    assert record.status == "flipped"
    one_less = [record.removal.without(part) for part in record.removal.regions]
    without, *restored = label_without(model, record.removal, *one_less)
    assert without == record.adversarial_label != 0
    assert restored == [0] * len(one_less)
    assert record.one_minimal is True


# ---------------------------------------------------------------------------------------------------------
# Toys against greedy search


def decoys(flip: Tensor, decoys: Tensor) -> Tensor:
    """Removing decoys takes the margin from 1 to 0.1 and never further; the flip shows in no single effect."""
    return torch.where(flip, -1.0, 0.1 + 0.9 * decoys.mean(1))


def embedding_tells(*parts: Region) -> Blocks:
    """Flips when these are gone and at most six blocks in all are; the embedding holds how much is left of each."""
    cells = [pixels(y, x) for y, x in itertools.product(range(8), range(8))]

    def fusion(p: Present) -> Tensor:
        flip = p.gone(*parts) & ((p.share(*cells) > 0).sum(1) >= 58)
        return torch.cat([p.share(*parts), torch.ones(len(flip), 1), flip[:, None].double()], 1)

    return Blocks(lambda e: torch.stack([1 - e[:, -1], torch.full_like(e[:, 0], 0.5)], 1), fusion=fusion)


DECOYS = pixels(0, 0), pixels(0, 7), pixels(7, 0), word(0), word(1)
SOUND = {"audio": 800}
SILENT_IMAGE = {"audio": 800, "words": 0}

# Name: the toy, and its smallest flip in elements.
TOYS: dict[str, tuple[Callable[[], Blocks], int]] = {
    "block and word": (lambda: flips_when(lambda p: p.gone(pixels(5, 2), word(3))), 16 + 1),
    "two words": (lambda: flips_when(lambda p: p.gone(word(1), word(5))), 2),
    "all words": (lambda: flips_when(lambda p: p.gone(TEXT)), 6),
    "two neighbours": (lambda: flips_when(lambda p: p.gone(pixels(0, 0), pixels(0, 1))), 32),
    "two across the middle": (lambda: flips_when(lambda p: p.gone(pixels(3, 3), pixels(4, 4))), 32),
    "two distant": (lambda: flips_when(lambda p: p.gone(pixels(0, 0), pixels(7, 6))), 32),
    "three": (lambda: flips_when(lambda p: p.gone(pixels(1, 2), pixels(6, 5), pixels(2, 7))), 48),
    "two and two words": (lambda: flips_when(lambda p: p.gone(pixels(1, 2), pixels(6, 5), word(0), word(5))), 34),
    "three and a word": (lambda: flips_when(lambda p: p.gone(pixels(1, 2), pixels(6, 5), pixels(2, 7), word(2))), 49),
    "four": (lambda: flips_when(lambda p: p.gone(*(pixels(y, x) for y, x in [(1, 2), (6, 5), (2, 7), (7, 0)]))), 64),
    # One of the two, not both: the word alone.
    "xor of block and word": (lambda: flips_when(lambda p: p.gone(pixels(1, 2)) ^ p.gone(word(0))), 1),
    # A word, and of two blocks just one.
    "xor of blocks, and a word": (
        lambda: flips_when(lambda p: (p.gone(pixels(1, 2)) ^ p.gone(pixels(6, 6))) & p.gone(word(2))),
        17,
    ),
    "restored by a word": (
        lambda: flips_when(lambda p: p.gone(pixels(1, 2), pixels(5, 5)) & ~p.gone(word(1))),
        32,
    ),
    "restored by a distant block": (
        lambda: flips_when(lambda p: p.gone(pixels(1, 2), word(1)) & ~p.gone(pixels(6, 6))),
        17,
    ),
    "restored by a third block": (
        lambda: flips_when(lambda p: p.gone(pixels(1, 2), pixels(6, 5)) & ~p.gone(pixels(2, 7))),
        32,
    ),
    "xor of block and word, and a block": (
        lambda: flips_when(lambda p: (p.gone(pixels(1, 2)) ^ p.gone(word(0))) & p.gone(pixels(6, 5))),
        17,
    ),
    # The margin says nothing, and all at once does nothing: the embedding tells where to look.
    "three, and most of the others there": (lambda: embedding_tells(pixels(1, 2), pixels(6, 5), pixels(2, 7)), 48),
    # 16 blocks and four words: within what single regions and pairs can reach.
    "restored by a neighbour": (
        lambda: flips_when(lambda p: p.gone(pixels(1, 2), word(1)) & ~p.gone(pixels(1, 3)), image=(16, 16), words=4),
        17,
    ),
    "decoys, block and word": (
        lambda: margins(lambda p: decoys(p.gone(pixels(5, 2), word(3)), p.share(*DECOYS))),
        17,
    ),
    "decoys, two blocks": (
        lambda: margins(lambda p: decoys(p.gone(pixels(5, 2), pixels(2, 6)), p.share(*DECOYS))),
        32,
    ),
    # Each of the two alone raises the margin from 1 to 2.
    "the wrong way": (
        lambda: margins(
            lambda p: torch.where(
                p.gone(pixels(5, 2), pixels(2, 6)), -1.0, 3 - p.share(pixels(5, 2), pixels(2, 6)).sum(1)
            )
        ),
        32,
    ),
    "block and sound": (lambda: flips_when(lambda p: p.gone(pixels(1, 2), sound(7)), **SILENT_IMAGE), 66),
    "block, sound and word": (lambda: flips_when(lambda p: p.gone(pixels(1, 2), sound(7), word(4)), **SOUND), 67),
    "two distant sounds": (lambda: flips_when(lambda p: p.gone(sound(1), sound(14)), **SOUND), 100),
    "sound and word": (lambda: flips_when(lambda p: p.gone(sound(12), word(0)), **SOUND), 51),
}


@pytest.mark.parametrize("name", TOYS)
def test_the_smallest_flip_is_found(name):
    make, smallest = TOYS[name]
    model = make()
    record = one(model)
    assert record.queries <= 500
    assert_flips_and_is_one_minimal(model, record)
    assert size(record) == smallest


GREEDY_FAILS = ["xor of blocks, and a word", "xor of block and word, and a block", "restored by a distant block"]
GREEDY_FAILS += ["restored by a third block", "three, and most of the others there"]


@pytest.mark.parametrize("name", GREEDY_FAILS)
@pytest.mark.parametrize("rerank", [False, True])
def test_greedy_search_fails_there(name, rerank):
    """At the same budget, `greedy_occlusion` and its re-ranking form find no flip, or a larger one."""
    make, smallest = TOYS[name]
    record = one(make(), GreedyOcclusion(rerank=rerank))
    assert not record.flipped or size(record) > smallest


def test_without_the_embedding_that_flip_is_not_found(monkeypatch):
    """Three of 64 blocks are one set of 41,664."""
    monkeypatch.setattr(Hunt, "look_at_embedding", lambda hunt: None)
    assert not one(TOYS["three, and most of the others there"][0]()).flipped


@pytest.mark.parametrize("name", ["block and word", "two distant", "decoys, block and word", "sound and word"])
@pytest.mark.parametrize("seed", [1, 2])
def test_where_the_parts_lie_does_not_matter(name, seed):
    """The toys again, with other blocks, stretches and words."""
    rng = np.random.default_rng(seed)
    (y, x), (v, u) = rng.integers(0, 8, (2, 2)).tolist()
    i, j = int(rng.integers(2, 6)), int(rng.integers(16))
    model = {
        "block and word": lambda: flips_when(lambda p: p.gone(pixels(y, x), word(i))),
        "two distant": lambda: flips_when(lambda p: p.gone(pixels(y, x), pixels(v, u))),
        "decoys, block and word": lambda: margins(
            lambda p: decoys(p.gone(pixels(y, x), word(i)), p.share(*set(DECOYS) - {pixels(y, x)}))
        ),
        "sound and word": lambda: flips_when(lambda p: p.gone(sound(j), word(i)), **SOUND),
    }[name]()
    record = one(model)
    assert_flips_and_is_one_minimal(model, record)
    assert size(record) == TOYS[name][1]


@pytest.mark.parametrize(("kept", "queries"), [(3, 400), (3, 500), (1, 400)])
def test_of_a_large_flip_all_that_can_be_is_put_back(kept, queries):
    """Flips when no row of blocks has more than so many left. They are put back in rounds, one or a few at a time."""
    rows = [[pixels(y, x) for x in range(8)] for y in range(8)]

    def condition(p: Present) -> Tensor:
        return torch.stack([(p.share(*row) > 0).sum(1) <= kept for row in rows]).all(0)

    model = flips_when(condition)
    record = one(model, queries=queries)
    assert_flips_and_is_one_minimal(model, record)
    if kept == 3:
        assert size(record) == 8 * 5 * 16


def saturated() -> Blocks:
    """Flips when a fifth of what all blocks weigh is left, or less; far from there the margin says little."""
    cells = [pixels(y, x) for y, x in itertools.product(range(8), range(8))]
    weights = torch.from_numpy(np.random.default_rng(0).uniform(0.5, 1.5, 64))
    return margins(lambda p: torch.tanh((p.share(*cells) @ weights - 0.2 * weights.sum()) / 2))


@pytest.mark.parametrize("patience", [1, 20, 60])
def test_with_queries_to_spare_every_flip_is_one_minimal(patience):
    """Even where the search gives up at once."""
    model = saturated()
    record = one(model, Decoupling(patience=patience), queries=None)
    assert len(record.regions) > 10
    assert_flips_and_is_one_minimal(model, record)


@pytest.mark.parametrize("queries", [12, 30, 100, 500])
def test_a_label_that_depends_on_nothing_holds(queries):
    record = one(flips_when(lambda p: p.gone(word(0)) & ~p.gone(word(0))), queries=queries)
    assert record.status in ("held", "budget_exhausted")
    assert (record.regions, record.trajectory, record.proven) == ([], [], None)
    assert record.queries <= queries


def test_a_universe_of_one_modality_and_one_word():
    """Where nothing lies below the root, the root is the universe."""

    def flips(p: Present) -> Tensor:
        return p.gone(word(0)).double()

    def fusion(p: Present) -> Tensor:  # an embedding of more than the one number that is present
        return torch.stack([flips(p), 1 - flips(p)], 1)

    model = Blocks(lambda embedding: embedding.flip(1), fusion=fusion, image=None, words=1)
    record = one(model, queries=1)
    assert (size(record), record.queries, record.one_minimal) == (1, 1, True)
    assert one(model, queries=10).proven
    record = one(flips_when(lambda p: p.gone(pixels(0, 0), word(0)), image=(4, 4), words=1), queries=10)
    assert (record.removed, record.one_minimal) == ({"image": 16, "text": 1}, True)
    model = Blocks(lambda embedding: torch.ones_like(embedding), fusion=fusion, image=None, words=1)
    assert one(model, queries=1).status == "held"


def test_linear_models_by_hand():
    """Blocks cost alike, so the heaviest go first: 9 + 8 + 7 is the first sum above 23.5."""
    weights = torch.zeros(8, 8, dtype=torch.float64)
    heavy = [(0, 3, 9.0), (6, 1, 8.0), (4, 4, 7.0), (4, 5, 6.0), (2, 2, 5.0), (7, 7, 4.0), (1, 6, 3.0)]
    for y, x, weight in heavy:
        weights[y, x] = weight
    cells = [pixels(y, x) for y, x in itertools.product(range(8), range(8))]
    model = margins(lambda p: p.share(*cells) @ weights.flatten() - 42 + 23.5)  # 42 in all
    record = one(model)
    assert set(record.removal.regions) == {pixels(0, 3), pixels(6, 1), pixels(4, 4)}
    # Words of 2 and 1.8 take the place of a block: 9 + 8 + 2 + 1.8 is above 20.5, and so is no set with fewer blocks.
    rest = torch.tensor([2.0, 1.8, 0.1, 0.1, -1.0, 0.0], dtype=torch.float64)
    words = [word(i) for i in range(6)]
    model = margins(lambda p: p.share(*cells) @ weights.flatten() + p.share(*words) @ rest - 45 + 20.5)  # 45 in all
    record = one(model)
    assert set(record.removal.regions) == {pixels(0, 3), pixels(6, 1), word(0), word(1)}
    assert_flips_and_is_one_minimal(model, record)


# ---------------------------------------------------------------------------------------------------------
# Brute force over small universes


class Small:
    """A toy of 8 to 12 atoms, and the truth about all their sets.

    Attributes:
        smallest: elements of the smallest flip, None where nothing flips.
    """

    def __init__(self, margin: Callable[[Tensor], Tensor], long: bool = False, words: int = 4):
        """
        Args:
            margin: (B,) of which atoms (B, A) are present.
            long: eight blocks instead of four.
        """
        image, side = ((2, 128), 32) if long else ((1, 128), 32)  # blocks of 32 pixels
        self.threat_model = lambda queries: threat(queries, image=side)
        probe = Blocks(lambda p: p.elements, image=image, words=words)
        self.atoms = leaves(probe, {"image": side})
        assert len(self.atoms) == (8 if long else 4) + words
        members = probe.members(self.atoms)
        self.model = margins(lambda p: margin(p.elements @ members), image=image, words=words)
        present = torch.tensor(list(itertools.product([1.0, 0.0], repeat=len(self.atoms))), dtype=torch.float64)
        with torch.no_grad():
            flips = margin(present) < 0
        self.right = not bool(flips[0])
        self.areas = torch.tensor([float(atom.area) for atom in self.atoms], dtype=torch.float64)
        sizes = ((1 - present) @ self.areas)[flips]
        self.smallest = int(sizes.min()) if len(sizes) else None

    def attack(self, queries: int | None, attack: Decoupling | None = None, **options) -> AttackResult:
        return one(self.model, attack, threat_model=self.threat_model(queries), **options)


def polynomial(weights: list[float], pairs: list[tuple[int, int, float]], share: float) -> Callable[[Tensor], Tensor]:
    """Linear and pairwise in what is present; `share` of the sum may go until it flips."""
    total = sum(weights) + sum(w for _, _, w in pairs)
    # The small numbers make sums differ, so that no margin is exactly 0.
    threshold = total - share * abs(total) - 0.1234567

    def margin(present: Tensor) -> Tensor:
        linear = present @ torch.tensor(weights, dtype=torch.float64)
        return linear + sum(w * present[:, i] * present[:, j] for i, j, w in pairs) - threshold

    return margin


def test_the_truth_about_small_universes():
    """Brute force by presence says what forward passes over raw tensors say.

    14 in all, and 8.52 must go: block 3 with words 0 (0.5, and 3 with it), 1 and 2, or 3, is 9; no block alone does.
    """
    small = Small(polynomial([1, 2, 3, 4, 0.5, 0.5, 1, 1], [(0, 4, 3.0), (1, 2, -2.0)], 0.6))
    sets = subsets(small.atoms)
    labels = label_without(small.model, *sets)
    flips = [sum(part.area for part in s.regions) for s, label in zip(sets, labels, strict=True) if label]
    assert min(flips) == small.smallest == 32 + 3


WEIGHTS = st.lists(st.floats(-2, 4, width=16), min_size=12, max_size=12)
PAIRS = st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11), st.floats(-3, 3, width=16)), max_size=6)


@given(WEIGHTS, PAIRS, st.floats(0.1, 0.9), st.sampled_from([12, 20, 40, 80, 150, 500]))
@settings(deadline=None, max_examples=60)
def test_what_is_claimed_is_true(weights, pairs, share, queries):
    """Whatever the budget: no claim of a proof, of 1-minimality or of a flip that brute force does not bear out."""
    small = Small(polynomial(weights, pairs, share), long=True)
    if not small.right:
        return
    record = small.attack(queries)
    assert record.queries <= queries
    if record.flipped:
        assert size(record) >= small.smallest
        if record.proven:
            assert size(record) == small.smallest
        if record.one_minimal:
            assert_flips_and_is_one_minimal(small.model, record)
        if queries == 500:
            assert size(record) == small.smallest
            assert record.one_minimal
    else:
        assert record.status in ("held", "budget_exhausted")
        assert not record.proven or small.smallest is None
        assert queries < 500 or small.smallest is None


@given(st.lists(st.integers(1, 255), min_size=1, max_size=4), st.booleans())
@example([0b01010011], False)
@settings(deadline=None, max_examples=40)
def test_any_rule_of_eight_parts_is_seen_through(sets, more):
    """255 removals are fewer than 500 queries: the smallest flip must be found, whatever the rule.

    Flips when one of some sets of atoms is removed: exactly that, or with `more`, at least that. Margins are flat.
    """
    wanted = torch.tensor([[(s >> i) & 1 for i in range(8)] for s in sets], dtype=torch.float64)  # (S, 8)

    def margin(present: Tensor) -> Tensor:
        gone = (1 - present)[:, None]  # (B, 1, 8)
        hit = (gone >= wanted).all(2) if more else (gone == wanted).all(2)
        return 0.5 - hit.any(1).double()

    small = Small(margin)
    record = small.attack(500)
    assert record.flipped
    assert size(record) == small.smallest
    assert record.one_minimal or not more


@pytest.mark.slow
def test_how_often_the_minimum_is_reached(capsys):
    """A statistic, printed: at small budgets, on random models of 12 atoms."""
    lines = []
    for queries in (15, 30, 60, 120, 250, 500):
        reached = proven = minimal = flippable = 0
        for seed in range(60):
            rng = np.random.default_rng(seed)
            pairs = [(*rng.integers(0, 12, 2).tolist(), float(rng.normal())) for _ in range(8)]
            small = Small(polynomial(rng.normal(0.7, 1, 12).tolist(), pairs, rng.uniform(0.2, 0.8)), long=True)
            if not small.right or small.smallest is None:
                continue
            record = small.attack(queries)
            flippable += 1
            reached += record.flipped and size(record) == small.smallest
            proven += bool(record.proven)
            minimal += record.one_minimal is True
        lines.append(f"{queries} queries: {reached} of {flippable} minima, {proven} proven, {minimal} 1-minimal")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    assert reached == flippable


@pytest.mark.slow
def test_how_often_a_larger_budget_finds_a_larger_flip(capsys):
    """A statistic, printed: nothing promises that it never does. A larger budget screens more before it improves."""
    budgets, worse, pairs = (60, 100, 200, 300, 500), [], 0
    for name, (make, smallest) in TOYS.items():
        model = make()
        sizes = [size(r) if (r := one(model, queries=queries)).flipped else 10**6 for queries in budgets]
        pairs += len(budgets) - 1
        worse += [
            (name, *step) for step in itertools.pairwise(zip(budgets, sizes, strict=True)) if step[1][1] > step[0][1]
        ]
        assert min(sizes) >= smallest
    with capsys.disabled():
        print(f"\n{len(worse)} of {pairs} larger budgets found a larger flip: {worse}")


# ---------------------------------------------------------------------------------------------------------
# The budget


def demanded(model: Blocks, attack: Decoupling | None = None) -> int:
    """The least budget, as the error names it."""
    with pytest.raises(MuroanError, match=r"threat_model\.max_queries=1 is too small .* allow at least \d+") as error:
        one(model, attack, queries=1)
    return int(re.search(r"allow at least (\d+)", str(error.value))[1])  # type: ignore[index]


BUDGETS = [0, 1, 2, 3, 5, 7, 8, 9, 12, 17, 25, 31, 50, 63, 64, 65, 90, 133, 200, 290]


@pytest.mark.parametrize("name", ["block and word", "decoys, two blocks", "block, sound and word"])
def test_never_a_query_more_than_allowed(name):
    model = TOYS[name][0]()
    least = demanded(model)
    for queries in range(1, least):
        with pytest.raises(MuroanError, match=f"max_queries={queries} is too small .* allow at least {least}"):
            one(model, queries=queries)
    for queries in (least + more for more in BUDGETS):
        record = one(model, queries=queries)
        assert record.queries <= queries
        assert record.queries == sum(count.queries for count in record.ledger.values())
        assert record.flipped == bool(record.trajectory)  # what has flipped once is handed over
        if record.flipped:
            assert label_without(model, record.removal) == [record.adversarial_label]
        else:
            assert record.status == "budget_exhausted"
            assert record.queries == queries


def test_held_and_budget_exhausted():
    """Without a flip the whole budget is asked, whatever the patience; without a budget, patience ends the search."""
    never = flips_when(lambda p: p.gone(word(0)) & ~p.gone(word(0)))
    for queries in (20, 70, 150, 500, 1000):
        assert (record := one(never, queries=queries)).status == "budget_exhausted"
        assert record.queries == queries
    for patience, most in ((300, 500), (50, 200)):
        assert (record := one(never, Decoupling(patience=patience), queries=None)).status == "held"
        assert patience <= record.queries < most
    small = Small(lambda present: present.sum(1) + 1)  # all 255 removals asked: no patience, no budget
    assert small.attack(300).status == "held"


def test_patience_ends_the_search():
    """From the first flip on, so many queries without a smaller one are the end."""
    model = TOYS["two neighbours"][0]()
    short, long = (one(model, Decoupling(patience=patience), queries=None) for patience in (20, 300))
    assert short.flipped
    assert long.flipped
    assert short.queries < long.queries
    for record, patience in ((short, 20), (long, 300)):
        last, _ = record.trajectory[-1]
        assert record.queries - last <= patience + 8 + 70  # a round, and the first screening, are finished


@pytest.mark.parametrize("name", ["block and word", "two distant", "three", "decoys, block and word"])
def test_the_first_flip_will_do(name):
    """It is the first that the same search meets; without one, the whole budget is asked, whatever the patience."""
    model = TOYS[name][0]()
    first = one(model, Decoupling(first=True, patience=None), queries=2000)
    assert first.attack == "decoupling_first"
    assert first.flipped
    asked, _ = first.trajectory[0]
    assert first.queries - asked < 100  # the round that it was met in
    assert first.queries < one(model, queries=2000).queries
    never = flips_when(lambda p: p.gone(word(0)) & ~p.gone(word(0)))
    held = one(never, Decoupling(first=True, patience=None), queries=2000)
    assert (held.status, held.queries) == ("budget_exhausted", 2000)
    with pytest.raises(MuroanError, match=r"attack\.patience=null never ends without a budget"):
        one(model, Decoupling(first=True, patience=None), queries=None)


@pytest.mark.parametrize("name", ["block and word", "two distant", "three", "decoys, block and word"])
@pytest.mark.parametrize("queries", [40, 120, 500])
def test_the_trajectory_leads_to_the_result(name, queries):
    record = one(TOYS[name][0](), queries=queries)
    asked, fractions = zip(*record.trajectory, strict=True)
    assert list(fractions) == sorted(set(fractions), reverse=True)
    assert list(asked) == sorted(asked)
    assert 1 <= asked[0] <= asked[-1] <= record.queries
    assert record.decoupled_fraction == pytest.approx(fractions[-1])


def test_what_another_goal_is_called(tmp_path):
    goals = {
        "": Decoupling(),
        "class number 2": Decoupling(target=2),
        "another fusion embedding": Decoupling(embedding="argmax"),
        "another fusion embedding at a distance of 0.5": Decoupling(embedding=0.5),
        "another label with the old label still right": Decoupling(valid_only=True),
    }
    for goal, attack in goals.items():
        assert AttackCallback(attack, tmp_path, {}).run["goal"] == attack.goal == goal


def test_the_trajectory_goes_by_the_objective():
    """A word is a sixth of the text and a thousandth of all, a block a 64th of the picture and of nearly all: by
    `normalised` the block is the smaller flip, and the word was in hand before.
    """
    model = flips_when(lambda p: p.gone(word(0)) | p.gone(pixels(5, 2)))
    record = one(model, Decoupling("normalised"))
    assert record.removal.regions == (pixels(5, 2),)
    fractions = [fraction for _, fraction in record.trajectory]
    quarter, sixteenth = 25600 / 1030, 6400 / 1030
    assert fractions == pytest.approx([quarter, 100 / 1030, sixteenth, 1600 / 1030])
    assert [fraction for _, fraction in one(model).trajectory] == pytest.approx([100 / 1030])


def test_what_is_recorded():
    record = one(TOYS["block and word"][0]())
    assert (record.attack, record.kind, record.info["atoms"]) == ("decoupling", "removal", 64 + 6)
    assert record.interaction is True
    steps = {"cheap", "screen", "grow", "improve", "shrink", "tidy", "prove"}
    assert {phase for phase, count in record.ledger.items() if count.queries} <= steps
    assert AttackResult.from_json(record.to_json()) == record


# ---------------------------------------------------------------------------------------------------------
# The same records, however they are run


@pytest.mark.parametrize("queries", [20, 60, 300])
def test_records_do_not_depend_on_the_batch_or_the_order(queries):
    samples = varied(RandomToy(), 14)

    def run(some=samples, **options) -> list[str]:
        model = threat(queries, **SINGLE.min_side)
        return [r.to_json() for r in muroan.evaluate(RandomToy(), some, Decoupling(), threat_model=model, **options)]

    expected = run(batch_size=64)
    assert any('"status":"flipped"' in line for line in expected)
    assert run(batch_size=1) == expected
    assert run(batch_size=7) == expected
    shuffled = [samples[i] for i in np.random.default_rng(0).permutation(len(samples))]
    assert run(shuffled, batch_size=7) == expected


@pytest.mark.parametrize("name", ["decoys, two blocks", "block, sound and word"])
def test_toys_do_not_depend_on_the_batch(name):
    model = TOYS[name][0]()
    samples = [model.sample(f"s{i}", i) for i in range(2)]

    def run(batch_size: int, order: int = 1) -> list[str]:
        found = muroan.evaluate(model, samples[::order], Decoupling(), threat_model=threat(150, **SIDES),
                                batch_size=batch_size)  # fmt: skip
        return [record.to_json() for record in found]

    assert run(1) == run(7) == run(64) == run(64, order=-1)


# ---------------------------------------------------------------------------------------------------------
# Objectives

QUADRANT = block(16, 0, 0)
CORNERS = pixels(7, 7), pixels(4, 0)


def three_ways() -> Blocks:
    """Three words flip, two blocks do, a quadrant does; each shows in the margin how far it has come.

    |           | fraction of 1,030 | normalised           | parts |
    | 3 words   |               3   | (3/6) / 2 = 25 %     | 3     |
    | 2 blocks  |              32   | (32/1024) / 2 = 1.6 %| 2     |
    | quadrant  |             256   | 12.5 %               | 1     |
    """

    def margin(p: Present) -> Tensor:
        words, blocks = p.share(word(0), word(1), word(2)), p.share(*CORNERS)
        left = torch.stack([words.mean(1), blocks.mean(1), p.share(QUADRANT)[:, 0]], 1)
        return left.amin(1) - 0.01

    return margins(margin)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [("fraction", {word(0), word(1), word(2)}), ("normalised", set(CORNERS)), ("parts", {QUADRANT})],
)
def test_each_objective_finds_its_own(objective, expected):
    model = three_ways()
    record = one(model, Decoupling(objective=objective))
    assert set(record.removal.regions) == expected
    assert_flips_and_is_one_minimal(model, record)
    fractions = [fraction for _, fraction in record.trajectory]
    assert fractions == sorted(set(fractions), reverse=True)
    assert fractions[-1] == pytest.approx(record.decoupled_fraction), "not a smaller flip that was not returned"


def test_parts_of_a_flip_across_quadrants():
    """Two blocks of one quadrant are two parts, and so is the quadrant with a block elsewhere, but not the quadrant."""
    model = margins(lambda p: p.share(pixels(0, 0), pixels(3, 3)).mean(1) - 0.01)
    assert set(one(model, Decoupling(objective="parts")).removal.regions) == {QUADRANT}
    assert size(one(model)) == 32
    model = margins(lambda p: p.share(pixels(0, 0), pixels(3, 3), pixels(7, 7)).mean(1) - 0.01)
    record = one(model, Decoupling(objective="parts"))
    assert len(record.regions) == 2
    assert_flips_and_is_one_minimal(model, record)


def test_more_parts_than_there_are_quadrants():
    """Every other one of 16 blocks must go, and the others stay: eight parts, where everything is four."""
    cells = [block(4, y, x) for y in range(4) for x in range(4)]
    gone, kept = ([cell for i, cell in enumerate(cells) if (i + i // 4) % 2 == which] for which in (0, 1))
    model = margins(lambda p: p.share(*gone).mean(1) - p.share(*kept).mean(1) + 0.9, image=(16, 16), words=0)
    for objective in ("fraction", "parts"):
        record = one(model, Decoupling(objective=objective))
        assert set(record.removal.regions) == set(gone)
        assert_flips_and_is_one_minimal(model, record)


def test_cheap_atoms_of_different_prices_prove_nothing_by_number():
    """Stretches of three samples and words together cost less than a block; two words are less than one stretch."""
    model = flips_when(lambda p: p.gone(stretch(3, 0)) | p.gone(word(0), word(1)), image=(16, 16), audio=12, words=4)
    record = one(model, threat_model=threat(500, image=8, audio=3))
    assert record.removed == {"text": 2}
    assert record.proven


@given(WEIGHTS, PAIRS, st.floats(0.1, 0.9))
@settings(deadline=None, max_examples=30)
def test_what_is_claimed_of_parts_is_true(weights, pairs, share):
    """By brute force over the unions of ten regions: two halves, four blocks and four words."""
    small = Small(polynomial(weights[:8], [p for p in pairs if max(p[:2]) < 8], share))
    if not small.right:
        return
    halves = [Region("image", (0, 0), (1, 64)), Region("image", (0, 64), (1, 128))]
    sets = subsets([*halves, *small.atoms])[1:]  # those of fewer regions first
    flips = label_without(small.model, *sets)
    fewest = next((len(s.regions) for s, flip in zip(sets, flips, strict=True) if flip), None)
    record = small.attack(500, Decoupling(objective="parts"))
    assert record.flipped == (fewest is not None)
    if fewest is not None:
        assert (len(record.regions), record.proven) == (fewest, True)


@pytest.mark.parametrize("objective", ["fraction", "parts"])
@pytest.mark.parametrize("queries", [10, 11, 13, 50, 500])
def test_a_proof_needs_no_budget_where_nothing_smaller_is_left(objective, queries):
    """A word is the smallest region, and one part the fewest: ten questions, the least there are, can show that."""
    record = one(flips_when(lambda p: p.gone(word(0))), Decoupling(objective=objective), queries)
    assert record.removed == {"text": 1}
    assert record.proven


def test_any_flip_that_will_do_is_not_proven():
    assert not one(flips_when(lambda p: p.gone(word(0))), Decoupling(first=True)).proven


def test_no_part_is_added_to_a_single_one():
    record = one(flips_when(lambda p: p.gone(QUADRANT)), Decoupling(objective="parts"))
    assert record.removal.regions == (QUADRANT,)
    assert record.proven
    assert {"screen", "clean", "verify", "audit"} >= set(record.ledger)


def test_two_parts_are_the_fewest_when_every_region_was_asked():
    record = one(TOYS["two words"][0](), Decoupling(objective="parts"))
    assert (len(record.regions), record.proven) == (2, True)
    three = one(TOYS["three"][0](), Decoupling(objective="parts"))
    assert (len(three.regions), three.proven) == (3, False), "pairs of 90 regions are more than the budget"


def test_a_proof_of_another_objective():
    """By the normalised measure, brute force is over other costs."""
    weights = [1.0, 2, 3, 4, 3, 3, 3, 3]
    small = Small(polynomial(weights, [], 0.5))
    prices = {"image": 0.5 / 128, "text": 0.5 / 4}
    sets = subsets(small.atoms)[1:]
    costs = [sum(region.area * prices[region.modality] for region in removal.regions) for removal in sets]
    flips = label_without(small.model, *sets)
    smallest = min(cost for cost, flip in zip(costs, flips, strict=True) if flip)
    record = small.attack(500, Decoupling(objective="normalised"))
    assert record.proven
    assert sum(n * prices[name] for name, n in record.removed.items()) == pytest.approx(smallest)


# ---------------------------------------------------------------------------------------------------------
# Modalities, target, embedding


def test_some_modalities_alone():
    """Word 0 flips, block (2, 5) does, and two stretches of sound together."""

    def condition(p: Present) -> Tensor:
        return p.gone(word(0)) | p.gone(pixels(2, 5)) | p.gone(sound(3), sound(9))

    model = flips_when(condition, **SOUND)
    names = [None, ["text"], ["image"], ["audio"], ["image", "audio"]]
    records = [one(model, Decoupling(modalities=some)) for some in names]
    assert [record.removed for record in records] == [
        {"text": 1}, {"text": 1}, {"image": 16}, {"audio": 100}, {"image": 16},
    ]  # fmt: skip
    assert [record.attack for record in records] == [
        "decoupling", "decoupling_text", "decoupling_image", "decoupling_audio", "decoupling_image_audio",
    ]  # fmt: skip
    assert [record.info["atoms"] for record in records] == [64 + 16 + 6, 6, 64, 16, 80]
    asked = asked_by(attack := Decoupling(modalities=["audio"]))
    one(model, attack)
    assert {name for removal in asked for name in removal.modalities} == {"audio"}
    held = one(flips_when(lambda p: p.gone(word(0))), Decoupling(modalities=["image"]))
    assert (held.status, held.queries, held.regions) == ("budget_exhausted", 500, [])


def asked_by(attack: Decoupling) -> list[Removal]:
    """A list that fills with what the attack asks."""
    asked: list[Removal] = []
    search = attack.search

    def listening(sample):
        hunt, told = search(sample), None
        while True:
            try:
                ask = hunt.send(told)
            except StopIteration as stop:
                return stop.value
            assert isinstance(ask, Ask)
            removals = list(ask.removals)
            asked.extend(removals)
            told = yield Ask(removals, ask.phase, ask.until)

    attack.search = listening  # type: ignore[method-assign]
    return asked


def three_classes(clean: int = 0) -> Blocks:
    """Class 1 without word 0; class 2 without block (2, 5) and word 1, whatever else."""

    def rule(p: Present) -> Tensor:
        first, second = p.gone(word(0)).double(), p.gone(pixels(2, 5), word(1)).double()
        out = torch.stack([torch.ones_like(first), 2 * first, 3 * second], 1)
        return torch.roll(out, clean, 1)

    return Blocks(rule, classes=3)


def test_a_target_is_reached_exactly():
    model = three_classes()
    assert one(model).adversarial_label == 1
    record = one(model, Decoupling(target=2))
    assert (record.status, record.adversarial_label, record.attack) == ("flipped", 2, "decoupling_targeted")
    assert set(record.removal.regions) == {pixels(2, 5), word(1)}
    assert_flips_and_is_one_minimal_for(model, record, 2)
    record = one(model, Decoupling(target=1))
    assert (record.adversarial_label, record.removed, record.proven) == (1, {"text": 1}, True)
    # The trajectory knows the goal as well: class 1 was met on the way to class 2, and is no flip.
    assert one(model, Decoupling(target=2, modalities=["text"])).trajectory == []


def assert_flips_and_is_one_minimal_for(model: Blocks, record: AttackResult, target: int) -> None:
    one_less = [record.removal.without(part) for part in record.removal.regions]
    labels = label_without(model, record.removal, *one_less)
    assert labels[0] == target
    assert target not in labels[1:]
    assert record.one_minimal


def test_samples_of_the_target_are_skipped():
    model = three_classes(clean=2)  # answers 2, and 0 without word 0
    samples = [model.sample("right", 0, label=2), model.sample("wrong", 1, label=1)]
    for target, statuses in ((2, ["skipped", "skipped"]), (0, ["flipped", "skipped"])):
        records = muroan.evaluate(model, samples, Decoupling(target=target), threat_model=threat(500, **SIDES))
        assert [record.status for record in records] == statuses
        assert records[1].queries == 0
    for target in (3, -1):
        with pytest.raises(MuroanError, match=rf"attack\.target={target}, .*classes 0 to 2"):
            one(three_classes(), Decoupling(target=target))


def test_the_embedding_decides_not_the_label():
    """The largest entry moves without two blocks; the label flips without a word, and is of no interest."""

    def fusion(p: Present) -> Tensor:
        blocks, spoken = p.share(pixels(1, 1), pixels(6, 2)), p.share(word(0))
        return torch.cat([1.5 - blocks.sum(1, keepdim=True) / 4, 1.4 - blocks.prod(1, keepdim=True), spoken / 8], 1)

    def rule(embedding: Tensor) -> Tensor:
        spoken = embedding[:, 2]
        return torch.stack([spoken, 0.1 - spoken], 1)

    # Clean (1, 0.4, 1/8); one block out (1.25, 1.4, 1/8): moved already. So one block is enough, by hand.
    model = Blocks(rule, fusion=fusion)
    record = one(model, Decoupling(embedding="argmax"))
    assert (record.status, record.removed, record.attack) == ("flipped", {"image": 16}, "decoupling_embedding")
    assert record.adversarial_label == record.label == 0
    clean, changed = logits(model, [Removal(), record.removal])[0].argmax(1).tolist()
    assert (clean, changed) == (0, 1)
    assert one(model).removed == {"text": 1}
    # Words alone flip the label, and leave the largest entry where it is.
    assert one(model, Decoupling(embedding="argmax", modalities=["text"])).status == "held"


def test_two_equal_largest_entries_have_not_moved():
    """Word 3 changes nothing, and block (1, 1) makes the other of two equal entries the largest."""

    def fusion(p: Present) -> Tensor:
        gone = 1 - p.share(pixels(1, 1))
        return torch.cat([torch.ones_like(gone), 1 + gone, 0 * gone], 1)

    model = Blocks(lambda embedding: embedding[:, [0, 2]], fusion=fusion)
    record = one(model, Decoupling(embedding="argmax"))
    assert (record.status, record.removed, record.one_minimal) == ("flipped", {"image": 16}, True)
    assert one(model, Decoupling(embedding="argmax", modalities=["text"])).status == "held"


def test_the_embedding_turns_so_far():
    """The embedding is (1, t), t = 0.6 for each of four blocks that is gone: 1 - 1/sqrt(1 + t²) is 0.14, then 0.36."""
    cells = [pixels(y, x) for y, x in [(0, 1), (3, 6), (5, 5), (7, 0)]]

    def fusion(p: Present) -> Tensor:
        t = 0.6 * (1 - p.share(*cells)).sum(1)
        return torch.stack([torch.ones_like(t), t], 1)

    def rule(embedding: Tensor) -> Tensor:
        return torch.stack([embedding[:, 0], 0 * embedding[:, 0]], 1)  # always 0

    model = Blocks(rule, fusion=fusion)
    for distance, blocks in ((0.1, 1), (0.3, 2), (0.5, 3)):
        record = one(model, Decoupling(embedding=distance))
        assert (record.status, record.removed, record.one_minimal) == ("flipped", {"image": 16 * blocks}, True)
        embeddings = logits(model, [Removal(), record.removal])[0]
        assert 1 - torch.cosine_similarity(*embeddings, dim=0) >= distance
        assert set(record.removal.regions) < set(cells)
    assert one(model, Decoupling(embedding=1.5)).status == "budget_exhausted"  # 0.61 is the most


# ---------------------------------------------------------------------------------------------------------
# What must stay right


def test_only_valid_removals_are_asked():
    """Word 0 flips, and is what the question is about; without it, it takes a block and another word."""
    model = flips_when(lambda p: p.gone(word(0)) | p.gone(pixels(2, 5), word(4)))

    def still_valid(sample, removal) -> bool:
        return word(0) not in removal.regions and TEXT not in removal.regions and "text" in sample.inputs

    attack = Decoupling(valid_only=True)
    asked = asked_by(attack)
    record = one(model, attack, still_valid=still_valid)
    assert set(record.removal.regions) == {pixels(2, 5), word(4)}
    assert (record.still_valid, record.one_minimal) == (True, True)
    assert record.proven, "sets of the other words and single blocks are all that is smaller"
    words = [word(i) for i in range(1, 6)]
    smaller = [own for n in range(1, 6) for own in itertools.combinations(words, n)]
    smaller += [(pixels(y, x),) for y, x in itertools.product(range(8), range(8))]
    assert {frozenset(removal.regions) for removal in asked} >= set(map(frozenset, smaller))
    assert asked
    assert all(still_valid(model.sample(), removal) for removal in asked)
    free = one(model, still_valid=still_valid)
    assert (free.removed, free.still_valid) == ({"text": 1}, False)


@given(WEIGHTS, PAIRS, st.floats(0.1, 0.9), st.integers(0, 7), st.integers(0, 7))
@settings(deadline=None, max_examples=30)
def test_what_is_claimed_of_valid_flips_is_true(weights, pairs, share, never, unless):
    """By brute force over all sets of eight atoms, where one may never go, and another only in company."""
    small = Small(polynomial(weights[:8], [p for p in pairs if max(p[:2]) < 8], share))
    if not small.right:
        return

    def still_valid(sample, removal) -> bool:
        gone = [atom for atom in small.atoms if any(inside(atom, region) for region in removal.regions)]
        return small.atoms[never] not in gone and (small.atoms[unless] not in gone or len(gone) > 1)

    sets = [s for s in subsets(small.atoms)[1:] if still_valid(None, s)]
    labels = label_without(small.model, *sets)
    sizes = [sum(part.area for part in s.regions) for s, label in zip(sets, labels, strict=True) if label]
    record = small.attack(500, Decoupling(valid_only=True), still_valid=still_valid)
    assert record.flipped == bool(sizes)
    if record.flipped:
        assert (size(record), record.still_valid, record.proven) == (min(sizes), True, True)
        one_less = [record.removal.without(part) for part in record.removal.regions]
        back = zip(one_less, label_without(small.model, *one_less), strict=True)
        assert record.one_minimal == (not any(label and still_valid(None, s) for s, label in back))


class Returned(Attack):
    """Of any flip, this one."""

    def __init__(self, removal: Removal):
        self.removal = removal

    def search(self, sample):
        yield [self.removal]
        return self.removal


def inside(atom: Region, region: Region) -> bool:
    starts, stops = zip(atom.start, region.start, strict=True), zip(atom.stop, region.stop, strict=True)
    same = atom.modality == region.modality
    return same and all(a >= b for a, b in starts) and all(a <= b for a, b in stops)


def test_a_flip_that_would_be_invalid_with_a_part_put_back_is_one_minimal():
    """Word 0 flips alone, and only beside word 1 is the label still right."""
    model = flips_when(lambda p: p.gone(word(0)))

    def still_valid(sample, removal) -> bool:
        gone = {i for i in range(6) if any(inside(word(i), region) for region in removal.regions)}
        return 0 not in gone or 1 in gone

    record = one(model, Decoupling(valid_only=True), still_valid=still_valid)
    assert set(record.removal.regions) == {word(0), word(1)}
    assert (record.one_minimal, record.proven) == (True, True)
    free = one(model, Returned(record.removal), still_valid=still_valid)
    assert (free.still_valid, free.one_minimal) == (True, False), "of any flip, the second word can be put back"


@pytest.mark.parametrize("verdict", [False, None])
def test_where_nothing_is_known_to_be_valid_nothing_is_asked(verdict):
    model = flips_when(lambda p: p.gone(word(0)))
    record = one(model, Decoupling(valid_only=True), still_valid=lambda sample, removal: verdict)
    assert (record.status, record.queries) == ("held", 0)


def test_few_valid_removals_of_many():
    """64 blocks, of which only single regions may go: when all 84 and the six words are asked, nothing is left to do.

    The whole image is no region, as it has parts; neither is the text.
    """
    model = flips_when(lambda p: p.gone(word(0)) & ~p.gone(word(0)))
    attack = Decoupling(valid_only=True)
    record = one(model, attack, still_valid=lambda sample, removal: len(removal.regions) == 1)
    assert (record.status, record.queries) == ("held", 4 + 16 + 64 + 6)


def test_validity_needs_someone_who_can_tell():
    with pytest.raises(MuroanError, match=r"attack\.valid_only needs a dataset that can tell"):
        one(TOYS["two words"][0](), Decoupling(valid_only=True))


# ---------------------------------------------------------------------------------------------------------
# What does not fit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "pixels"}, r"attack\.objective must be fraction, normalised or parts, got 'pixels'"),
        ({"objective": None}, r"attack\.objective must be .*, got None"),
        ({"target": 1, "embedding": "argmax"}, r"attack\.target and attack\.embedding are two different goals"),
        ({"target": "dog"}, r"attack\.target must be the index of a class, got 'dog'"),
        ({"target": True}, r"attack\.target must be the index of a class, got True"),
        ({"target": 1.0}, r"attack\.target must be the index of a class, got 1\.0"),
        ({"embedding": "argmin"}, r"attack\.embedding must be argmax or a cosine distance in \(0, 2\], got 'argmin'"),
        ({"embedding": 0}, r"attack\.embedding must be .*, got 0"),
        ({"embedding": 2.5}, r"attack\.embedding must be .*, got 2\.5"),
        ({"embedding": float("nan")}, r"attack\.embedding must be .*, got nan"),
        ({"embedding": True}, r"attack\.embedding must be .*, got True"),
        ({"patience": 0}, r"attack\.patience must be a whole number, at least 1, got 0"),
        ({"patience": 1.5}, r"attack\.patience must be .*, got 1\.5"),
        ({"modalities": []}, r"attack\.modalities .*got \[\]"),
        ({"modalities": "image"}, r"attack\.modalities .*got 'image'"),
        ({"modalities": ["image", "image"]}, r"attack\.modalities .*got \['image', 'image'\]"),
    ],
    ids=str,
)
def test_options_are_checked(options, message):
    with pytest.raises(MuroanError, match=message):
        Decoupling(**options)


def test_absent_modalities_are_told():
    with pytest.raises(MuroanError, match=r"attack\.modalities names \['video'\], the model has \['image', 'text'\]"):
        one(TOYS["two words"][0](), Decoupling(modalities=["text", "video"]))


# ---------------------------------------------------------------------------------------------------------
# The universe


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8))
@settings(deadline=None, max_examples=60)
def test_sets_come_in_ascending_order_of_cost(prices):
    costs = [sum(c) for n in range(1, len(prices) + 1) for c in itertools.combinations(prices, n)]
    found = list(ascending(np.array(prices, float)))
    assert [sum(prices[place] for place in places) for places in found] == sorted(costs)
    assert len(set(found)) == len(found)


@given(st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.25]), max_size=8), st.integers(-1, 20), st.integers(0, 300))
@settings(deadline=None, max_examples=200)
def test_cheaper_sets_are_counted_as_far_as_asked(prices, bound, most):
    sets = [sum(c) for n in range(1, len(prices) + 1) for c in itertools.combinations(prices, n)]
    true, found = sum(cost < bound for cost in sets), cheaper(prices, bound, most)
    assert found == true if true <= most else found > most


def test_counting_many_sets_ends():
    assert cheaper(np.random.default_rng(0).uniform(1, 2, 500), 1000.0, 4001) > 4001


def test_the_universe_by_hand():
    """(3, 2) pixels: a top half of two by two and a bottom of one by two, cut by columns; then single pixels."""
    model = Blocks(lambda p: torch.stack([p.elements.sum(1) + 1, 0 * p.elements[:, 0]], 1), image=(3, 2), words=2)
    u = universe_of(model)
    assert u.elements.tolist() == [1] * 8
    assert [u.regions[row] for row in u.atoms] == leaves(model, {"image": 1})
    everything = np.ones(8, bool)
    # Four quadrants: two of two pixels and two of one; the root of many parts is not named, the words are.
    assert [region.area for region in u.removal(everything).regions] == [2, 1, 2, 1, 1, 1]
    for numbers in itertools.product([False, True], repeat=8):
        chosen = np.array(numbers)
        if chosen.any():
            removal = u.removal(chosen)
            assert (u.union([u.regions.index(region) for region in removal.regions]) == chosen).all()
            assert sum(region.area for region in removal.regions) == chosen.sum()


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_what_regions_hold_is_what_their_atoms_do(data):
    """The universe's sums over spans against sums over what each region covers."""
    image = (data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))
    rule = lambda p: torch.stack([p.elements.sum(1), 0 * p.elements[:, 0]], 1)  # noqa: E731
    u = universe_of(Blocks(rule, image=image, words=data.draw(st.integers(0, 4))))
    rows = np.arange(len(u.regions))
    covers = u.covers(rows)
    assert [[a for a, row in enumerate(u.atoms) if within(u.regions[row], r)] for r in u.regions] == [
        np.flatnonzero(place).tolist() for place in covers
    ]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    sets, weight = rng.random((5, len(u.atoms))) < 0.5, rng.random(len(u.atoms))
    np.testing.assert_allclose(u.sums(weight), covers @ weight, rtol=1e-12)
    np.testing.assert_allclose(u.inside(sets, rows), (sets * u.elements) @ covers.T / (covers @ u.elements), rtol=1e-12)


@given(st.integers(1, 48), st.integers(1, 48), st.integers(1, 48))
@settings(deadline=None, max_examples=60)
def test_coarseness_is_how_many_parts_there_would_be_by_default(height, width, finest):
    """Against the parts of a picture that is split down to 10 pixels, if that is not finer."""
    model, finest = margins(lambda p: p.elements[:, 0], image=(height, width)), min(finest, max(height, width))
    parts, by_default = (
        sum(region.modality == "image" for region in leaves(model, {"image": side}))
        for side in (finest, max(finest, model.modalities["image"].min_side))
    )
    image, text = universe_of(model, finest).coarseness
    assert image == by_default / parts
    assert text == 1


def test_a_search_of_finer_regions_goes_by_smaller_sizes():
    """Four times the parts: a quarter of the size makes a flip large, and of what saving less is worth."""
    hunts = []

    class Looking(Decoupling):
        def search(self, sample):
            hunts.append(Hunt(self, sample, self.universe(sample, ["image", "text"])))
            return
            yield

    model = margins(lambda p: p.elements[:, 0], image=(40, 40))
    for objective, finest in (("fraction", 20), ("fraction", 10), ("fraction", 5), ("parts", 10), ("parts", 5)):
        one(model, Looking(objective), threat_model=threat(None, image=finest))
    *hunts, parts, finer_parts = hunts
    by_default = hunts[1]
    assert (by_default.grown, by_default.fine) == pytest.approx((5, 1))
    assert [hunt.grown / by_default.grown for hunt in hunts] == [1, 1, 0.25]
    assert [hunt.fine / by_default.fine for hunt in hunts] == [1, 1, 0.25]
    for hunt in hunts:
        hunt.bound = 2.0
    assert [hunt.large for hunt in hunts] == [False, False, True]
    assert (parts.grown, parts.fine) == (finer_parts.grown, finer_parts.fine)


@pytest.mark.parametrize(
    ("finest", "objective", "of_image", "of_sound"),
    [
        (10, "fraction", 20, 126),  # by default: every region of both
        (5, "fraction", 84, 30),  # all of the picture, 4 times as fine; and of the sound for a quarter of what is left
        (3, "fraction", 195, 2),  # 16 times as fine: nothing is left
        (5, "parts", 71, 126),  # by number the parts of both are alike: what has the larger effects comes first
    ],
)
def test_the_finest_regions_are_screened_first(finest, objective, of_image, of_sound):
    """Of 200 queries 9 go to the coarsest parts, whole modalities and both together; the sound has larger effects."""
    attack = Decoupling(objective)
    asked = asked_by(attack)
    tells = lambda p: 1 + p.elements[:, :1600].mean(1) + 9 * p.elements[:, 1600:].mean(1)  # noqa: E731
    model = margins(tells, image=(40, 40), audio=128, words=0)
    screened = one(model, attack, threat_model=threat(500, image=finest, audio=2)).ledger["screen"].queries
    single = [removal.regions[0] for removal in asked[:screened] if len(removal.regions) == 1]
    assert [sum(r.modality == name for r in single) for name in ("image", "audio")] == [of_image, of_sound]


def picture_or_sound(needed: int) -> Blocks:
    """Two stretches of sound flip, and tell so. Of 24 blocks of the picture some are needed, and all look alike: grown
    to a flip they are larger than the two stretches."""
    blocks = [block(5, y, x) for y in (1, 3, 6) for x in range(8)]
    two = [stretch(200, 7), stretch(200, 40)]

    def margin(p):
        told = torch.where(p.gone(*blocks[:: 24 // needed]), -1.0, 0.1 + 0.9 * p.share(*blocks).mean(1))
        return torch.minimum(told, p.share(*two).sum(1) - 0.5)

    return margins(margin, image=(40, 40), audio=12800, words=0)


@pytest.mark.parametrize(("needed", "smallest"), [(6, 6 * 25), (24, 2 * 200)])
def test_a_larger_flip_in_the_finest_parts_is_shrunk(needed, smallest, monkeypatch):
    model, options = picture_or_sound(needed), {"threat_model": threat(500, image=5, audio=200)}
    record = one(model, **options)
    assert_flips_and_is_one_minimal(model, record)
    assert size(record) == smallest
    monkeypatch.setattr(Hunt, "again_in_finest", lambda self: iter(()))
    assert size(one(model, **options)) == 2 * 200


def test_a_budget_that_ends_among_larger_flips_loses_none(monkeypatch):
    calls, shrink = [], Hunt.shrink

    def ending(self):
        calls.append(self.bound)
        if len(calls) == 2:
            raise BudgetExhausted
        yield from shrink(self)

    monkeypatch.setattr(Hunt, "shrink", ending)
    record = one(picture_or_sound(24), threat_model=threat(500, image=5, audio=200))
    assert calls[1] > calls[0]
    assert size(record) == 2 * 200


def universe_of(model: Blocks, image: int = 1) -> Universe:
    seen = []

    class Looking(Decoupling):
        def search(self, sample):
            seen.append(Universe(sample, list(sample.modalities)))
            return
            yield

    one(model, Looking(), threat_model=threat(None, image=image))
    return seen[0]


def within(inner: Region, outer: Region) -> bool:
    sides = zip(outer.start, inner.start, inner.stop, outer.stop, strict=True)
    return inner.modality == outer.modality and all(a <= b and c <= d for a, b, c, d in sides)


@pytest.mark.parametrize("objective", ["fraction", "normalised", "parts"])
def test_the_next_sets_are_the_best_that_one_region_makes(objective, monkeypatch):
    """Against all moves of all known removals, weighed one by one, whether alike or not."""
    made_of, calls = Hunt.made_of, 0

    def checked(hunt, pool, effect, variance):
        nonlocal calls
        calls += 1
        best, before = weighed(hunt, pool, effect, variance), {row: set(moves) for row, moves in hunt.tried.items()}
        found = made_of(hunt, pool, effect, variance)
        taken = {(row, move) for _, row, move, _ in found}
        tried = {(r, m) for r, moves in hunt.tried.items() for m in moves - before.get(r, set())}
        scores = sorted((best[place] for place in taken | tried), reverse=True)
        assert len(scores) >= min(SHORT, len(best)) or not best
        np.testing.assert_allclose(scores, sorted(best.values(), reverse=True)[: len(scores)], atol=1e-9)
        for chosen, row, move, _ in found:
            region = hunt.universe.covers([move % len(hunt.effect)])[0]
            added = hunt.sets[row] | region if move < len(hunt.effect) else hunt.sets[row] & ~region
            assert (chosen == added).all()
            assert chosen.tobytes() not in hunt.rows
        assert len({chosen.tobytes() for chosen, *_ in found}) == len(found)
        return found

    monkeypatch.setattr(Hunt, "made_of", checked)
    weights = torch.rand(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for image, side, queries in ((32, 4, 120), (8, 2, 300)):  # room to spare, and all but exhausted
        cells = [Region("image", (side * y, side * x), (side * y + side, side * x + side)) for y, x in GRID]
        model = margins(
            lambda p, c=cells: p.share(*c) @ weights - 0.2 * p.gone(word(1)) - 1.5, image=(image, image), words=3
        )
        one(model, Decoupling(objective), queries, threat_model=threat(queries, image=side))
    assert calls > 20


GRID = list(itertools.product(range(4), repeat=2))


def weighed(hunt, pool, effect, variance) -> dict[tuple[int, int], float]:
    """(row, move) -> score of every move of these rows that is worth anything and was not tried."""
    u, found = hunt.universe, {}
    regions, price = len(u.regions), hunt.region_price if hunt.attack.objective != "parts" else np.ones(len(effect))
    covers = u.covers(range(regions))
    for row in pool:
        for move in set(range(2 * regions)) - hunt.tried.get(row, set()):
            region, sign = move % regions, 1 if move < regions else -1
            differ = covers[region] & (~hunt.sets[row] if sign > 0 else hunt.sets[row])
            share = u.elements[differ].sum() / u.elements[covers[region]].sum()
            cost = hunt.costs[row] + sign * price[region] * share
            if share and cost < hunt.bound:
                deviation = np.sqrt(variance[covers[region]].sum() * share)
                chance = log_ndtr(-(hunt.distances[row] - sign * effect[region] * share) / deviation)
                score = float(hunt.worth_of(np.array([cost]))[0] + chance)
                if score > -np.inf:
                    found[row, move] = score
    return found


def test_a_large_picture_takes_little_memory():
    """384 x 384 pixels have 4,096 atoms in 5,461 regions: nothing of one by the other, and no floats for each query."""
    model = margins(lambda p: p.elements[:, :4].mean(1) + 1, image=(384, 384), words=0)
    tracemalloc.start()
    try:
        (record,) = muroan.evaluate(
            model, [model.sample()], Decoupling(), threat_model=threat(80, image=10), batch_size=4
        )
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert record.queries == 80
    assert most < 60e6
