"""The certificate's numbers: by hand, by enumeration, from the paper, and against every attack on toys."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from muroan.defenses.certificate import (
    Bounds,
    alone,
    along_diagonal,
    bounds,
    clopper_pearson,
    delta,
    diagonal,
    is_certified,
    joint_delta,
    untouched,
)
from muroan.errors import MuroanError
from muroan.modalities import stable_seed


class TestDelta:
    def test_by_enumerating_all_3360_subsets(self):
        draws = list(itertools.product(itertools.combinations(range(10), 3), itertools.combinations(range(8), 2)))
        assert len(draws) == 3360
        hit = sum(0 in image or 0 in text for image, text in draws)
        assert Fraction(hit, 3360) == Fraction(475, 1000)
        assert delta((10, 8), (3, 2), (1, 1)) == pytest.approx(0.475, abs=1e-15)

    def test_smaller_than_joint_ablation_on_kitti(self):
        """The settings of the authors' code (certify.ipynb): 375 x 1242 pixels of colour and as many of depth, of which
        0.0193 and 0.00214 are kept, or 0.0107 of all; r_2 = 2 r_1; fractions of pixels cut off."""
        pixels = 375 * 1242
        n, r = (pixels, pixels), (10, 20)
        kept = (math.floor(0.0193 * pixels), math.floor(0.00214 * pixels))
        assert kept == (8988, 996)
        assert round(delta(n, kept, r), 4) == 0.2115
        assert round(joint_delta(n, (math.floor(0.0107 * 2 * pixels), 0), r), 4) == 0.2758

    @pytest.mark.parametrize(("k", "r"), [(5000, 10), (10, 5000), (5000, 300), (1, 49999), (49990, 10), (49991, 10)])
    def test_right_for_fifty_thousand_pixels(self, k, r):
        n = 50_000
        exact = Fraction(math.comb(n - r, k), math.comb(n, k))
        assert untouched(n, k, r) == pytest.approx(float(exact), rel=1e-11, abs=1e-300)

    @given(st.integers(1, 60), st.data())
    def test_as_binomial_coefficients_say(self, n, data):
        k, r = data.draw(st.integers(0, n)), data.draw(st.integers(0, n))
        exact = Fraction(math.comb(n - r, k), math.comb(n, k))
        assert untouched(n, k, r) == pytest.approx(float(exact), rel=1e-12)
        assert joint_delta((n, n), (k, k), (r, r)) == pytest.approx(
            1 - math.comb(2 * n - 2 * r, 2 * k) / math.comb(2 * n, 2 * k), abs=1e-12
        )

    def test_more_kept_or_altered_than_there_are(self):
        with pytest.raises(MuroanError, match="n=4, k=5, r=1"):
            untouched(4, 5, 1)
        with pytest.raises(MuroanError, match="n=4, k=1, r=5"):
            untouched(4, 1, 5)


class TestBounds:
    @given(st.integers(1, 2000), st.data(), st.floats(1e-6, 0.3))
    def test_tails_are_alpha(self, trials, data, alpha):
        successes = data.draw(st.integers(0, trials))
        low, high = clopper_pearson(successes, trials, alpha)
        # By definition: that many or more at the lower chance, that few or fewer at the upper one, have chance alpha.
        assert binom.sf(successes - 1, trials, low) == pytest.approx(alpha, rel=1e-6) if successes else low == 0
        assert binom.cdf(successes, trials, high) == pytest.approx(alpha, rel=1e-6) if successes < trials else high == 1

    def test_by_hand(self):
        assert clopper_pearson(10, 10, 0.05)[0] == pytest.approx(0.05 ** (1 / 10))
        assert clopper_pearson(0, 10, 0.05) == (0.0, pytest.approx(1 - 0.05 ** (1 / 10)))

    @pytest.mark.parametrize("wrong", [(3, 2, 0.1), (-1, 2, 0.1), (0, 0, 0.1), (1, 2, 0.0), (1, 2, 1.0)])
    def test_refused(self, wrong):
        with pytest.raises(MuroanError, match="bounds need"):
            clopper_pearson(*wrong)

    def test_one_sample_chooses_and_another_estimates(self):
        found = bounds([6, 5, 0], [10, 90, 0], 0.03)
        assert found.lower == clopper_pearson(10, 100, 0.01)[0], "class 0 was chosen, whatever the second sample says"
        assert found.upper == clopper_pearson(90, 100, 0.01)[1]
        assert found.predicted is None

    def test_alpha_is_shared_and_the_others_have_what_is_left(self):
        found = bounds([9, 1], [990, 10], 0.001)
        assert found.predicted == 0
        assert found.lower == clopper_pearson(990, 1000, 0.0005)[0]
        assert found.upper == min(clopper_pearson(10, 1000, 0.0005)[1], 1 - found.lower)

    def test_a_bound_is_rarely_wrong(self):
        """The exact chance that the lower bound exceeds the truth is at most alpha, at chances on a grid."""
        trials, alpha = 40, 0.05
        lows = [clopper_pearson(s, trials, alpha)[0] for s in range(trials + 1)]
        for chance in (0.02, 0.3, 0.5, 0.77, 0.99):
            wrong = sum(binom.pmf(s, trials, chance) for s, low in enumerate(lows) if low > chance)
            assert wrong <= alpha + 1e-12


class TestSizes:
    def test_by_hand(self):
        found = Bounds(0, 1.0, 0.0)
        # Of 10, 3 kept: delta(1) = 0.3, delta(2) = 1 - 7/10 * 6/9 = 0.53: certified below 0.5.
        assert is_certified(found, [10], [3], [1])
        assert not is_certified(found, [10], [3], [2])
        # Only deleted: delta below 1, that is, as long as 3 of the others are left.
        assert is_certified(found, [10], [3], [7], deleted=[True])
        assert not is_certified(found, [10], [3], [8], deleted=[True])
        assert not is_certified(found, [10], [3], [7], deleted=[True], steady=[6])
        # Both: 1 + 0.7 - 2 * 0.7 * 0.75 = 0.65.
        assert is_certified(Bounds(0, 0.83, 0.17), [10, 8], [3, 2], [1, 1], deleted=[True, False])
        assert not is_certified(Bounds(0, 0.82, 0.18), [10, 8], [3, 2], [1, 1], deleted=[True, False])

    def test_an_abstaining_model_is_certified_for_nothing(self):
        assert not is_certified(Bounds(None, 0.4, 0.5), [10], [3], [0])

    @given(st.lists(st.integers(1, 30), min_size=1, max_size=3), st.data())
    @settings(deadline=None, max_examples=40)
    def test_the_largest_is_certified_and_the_next_is_not(self, n, data):
        k = [data.draw(st.integers(1, count)) for count in n]
        deleted = [data.draw(st.booleans()) for _ in n]
        lower = data.draw(st.floats(0.0, 1.0))
        found = Bounds(0, lower, data.draw(st.floats(0.0, 1 - lower)))

        def certified(r):
            return is_certified(found, n, k, r, deleted)

        for place in range(len(n)):
            size = alone(place, n, certified)
            sizes = [certified([r if m == place else 0 for m in range(len(n))]) for r in range(n[place] + 1)]
            assert size == (sizes.index(False) - 1 if False in sizes else n[place]) if sizes[0] else size is None
        steps = [diagonal(i / 1000, n) for i in range(1001)]
        fits = [r for r in steps if certified(r)]
        assert along_diagonal(n, certified) == (fits[-1] if fits else None)
        assert fits == steps[: len(fits)], "what is certified at a share is certified at all smaller ones"


class Toy:
    """A base model that is a random table of what it sees; a 2 that it sees makes it say 1.

    Args:
        k: kept elements a modality.
        closed: for each modality, whether kept elements close ranks, as words do, or stand where they were.
        often: how many of a thousand inputs have class 0.
    """

    def __init__(self, k, closed, often, seed):
        self.k, self.closed, self.often, self.seed = k, closed, often, seed

    def say(self, seen) -> int:
        if any(2 in part for part in seen):
            return 1
        draw = stable_seed(self.seed, seen)
        return 0 if draw % 1000 < self.often else 1 + draw // 1000 % 2

    def chances(self, inputs) -> list[Fraction]:
        """The exact chance of each class of the smoothed model."""
        kept = [itertools.combinations(range(len(x)), k) for x, k in zip(inputs, self.k, strict=True)]
        votes = Counter(
            self.say(
                tuple(
                    tuple(x[i] if i in places else None for i in range(len(x)) if i in places or not closed)
                    for x, places, closed in zip(inputs, draw, self.closed, strict=True)
                )
            )
            for draw in itertools.product(*kept)
        )
        return [Fraction(votes[c], votes.total()) for c in range(3)]


def altered(x, r, closed):
    """Every input within r elements: changed to any of the other values, or deleted from what closes ranks."""
    for places in itertools.combinations(range(len(x)), r):
        for values in itertools.product((0, 1, 2, "gone") if closed else (0, 1, 2), repeat=r):
            new = dict(zip(places, values, strict=True))
            yield tuple(new.get(i, v) for i, v in enumerate(x) if new.get(i, v) != "gone")


def deleted_only(x, r):
    return itertools.combinations(x, len(x) - r)


CLEAN = ((0, 1, 1, 0, 1, 0), (1, 0, 0, 1, 1))


@given(st.tuples(st.integers(1, 2), st.integers(1, 2)), st.integers(850, 1000), st.integers(0, 10**6), st.booleans())
@settings(deadline=None, max_examples=12)
def test_no_attack_whatever_breaks_a_certified_size(k, often, seed, only):
    """Exact chances, every attack: pixels may be changed, words changed or deleted (in half of it only deleted)."""
    toy = Toy(k, (False, True), often, seed)
    chances = toy.chances(CLEAN)
    label = chances.index(max(chances))
    found = Bounds(label, chances[label], max(p for c, p in enumerate(chances) if c != label))
    n = [len(x) for x in CLEAN]
    sizes = [
        r
        for r in itertools.product(range(3), range(3))
        if is_certified(found, n, k, r, deleted=[False, only], steady=[n[0], n[1] - k[1]])
    ]
    # A smaller size is part of a larger one: those that none exceeds are enough.
    for r in sizes:
        if any(other != r and all(a >= b for a, b in zip(other, r, strict=True)) for other in sizes):
            continue
        words = deleted_only(CLEAN[1], r[1]) if only else altered(CLEAN[1], r[1], True)
        for changed in itertools.product(set(altered(CLEAN[0], r[0], False)), set(words)):
            after = toy.chances(changed)
            assert all(after[label] > p for c, p in enumerate(after) if c != label), (r, changed)


def test_the_bound_cannot_be_better():
    """A base model that is always right until it sees what the attacker wrote: one element more breaks it."""
    toy = Toy((1, 1), (False, False), 1000, 0)
    found, n = Bounds(0, 1, 0), [6, 5]
    for place in range(2):
        size = alone(place, n, lambda r: is_certified(found, n, toy.k, r))
        assert size == 2
        for r, right in ((size, True), (size + 1, False)):
            inputs = list(CLEAN)
            inputs[place] = (2,) * r + CLEAN[place][r:]
            after = toy.chances(inputs)
            assert (after[0] > after[1]) is right


def test_another_k_is_not_covered():
    """Three of four words are kept, two of three: without `steady` the size would be a lie."""
    found = Bounds(0, 1.0, 0.0)
    assert is_certified(found, [4], [3], [1], deleted=[True])
    assert not is_certified(found, [4], [3], [1], deleted=[True], steady=[0])
