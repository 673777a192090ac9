"""The certificate of MMCert (Wang et al., CVPR 2024, arXiv 2403.19080): pure functions, numbers in and numbers out.

The smoothed model keeps k_m of the n_m elements of each modality m, drawn at random and independently, asks the base
model about what is left, and answers with the class that wins most often. Let p_c be the chance of class c. An
attacker may alter r_m elements a modality; e_m = n_m - r_m stay as they are, and

    Q = prod C(e_m, k_m) / C(n_m, k_m),    delta = 1 - Q

is the chance that none of the altered elements is kept, and that at least one is.

*Changed elements.* Given that none of them is kept, the base model sees the same before and after, with class c at
the same chance u_c. So Q u_c <= p_c <= Q u_c + delta, and likewise for p'_c after the attack. Then |p'_c - p_c| is at
most delta, and class A still wins if p_A - delta > p_B + delta for every other class B.

*Deleted elements.* Where the attacker takes elements out of the input, as words are, n'_m <= n_m are left, e_m of them
untouched. A set of untouched elements, drawn with chance 1 / prod C(n_m, k_m) before, is drawn with chance
1 / prod C(n'_m, k_m) after, which is no less. So the two draws still have Q u_c in common: p'_c >= Q u_c >=
p_c - delta, and 1 - p'_c >= Q (1 - u_c), so that p'_c <= Q u_c + delta <= p_c + delta. The same certificate holds. It
holds while the same k_m is kept of n'_m: where k_m depends on the number of elements, `steady` says how far that is.
An input that grew is not covered.

*Deleted only.* More is true of a modality whose elements the attacker can only delete. Write Q_d for the product over
those modalities and Q_c for the others, Q = Q_d Q_c. Before the attack p_A - p_B <= Q (u_A - u_B) + 1 - Q; after it
p'_A - p'_B >= Q_c (u_A - u_B) - (1 - Q_c). So A still wins if p_A - p_B > 1 + Q_d - 2 Q, which is 2 delta where
nothing can be deleted, and only delta where everything can.

All lists run over the modalities in one order; r = 0 for one that the attacker leaves alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta

from muroan.errors import MuroanError

# `is_certified` of given r.
Certified = Callable[[Sequence[int]], bool]


def untouched(n: int, k: int, r: int) -> float:
    """The chance C(n-r, k) / C(n, k) that none of r elements is among k of n drawn at random.

    As a product of min(r, k) quotients it is right to the last digits also for n = 50,000.

    Raises:
        MuroanError: k or r does not lie between 0 and n.

    >>> untouched(10, 3, 1)
    0.7
    """
    if not (0 <= k <= n and 0 <= r <= n):
        raise MuroanError(f"of n elements k are kept and r altered, both between 0 and n: got n={n}, k={k}, r={r}")
    fewer, more = sorted((r, k))
    return math.prod((n - more - i) / (n - i) for i in range(fewer))


def delta(n: Sequence[int], k: Sequence[int], r: Sequence[int]) -> float:
    """The chance that at least one altered element is kept: how far the attacker can move the chance of any class.

    >>> round(delta((10, 8), (3, 2), (1, 1)), 12)
    0.475
    """
    return 1 - math.prod(untouched(*one) for one in zip(n, k, r, strict=True))


def joint_delta(n: Sequence[int], k: Sequence[int], r: Sequence[int]) -> float:
    """The same for randomized ablation (Levine and Feizi, arXiv 1911.09272): sum(k) of all sum(n) elements at once.

    >>> round(joint_delta((10, 8), (3, 2), (1, 1)), 3)
    0.49
    """
    return 1 - untouched(sum(n), sum(k), sum(r))


def clopper_pearson(successes: int, trials: int, alpha: float) -> tuple[float, float]:
    """One-sided exact bounds of a binomial chance (Clopper and Pearson 1934), each right with probability 1 - alpha.

    Raises:
        MuroanError: there are more successes than trials, no trials, or alpha does not lie between 0 and 1.
    """
    if not (0 <= successes <= trials and trials > 0 and 0 < alpha < 1):
        raise MuroanError(
            f"bounds need 0 <= successes <= trials, at least one trial and 0 < alpha < 1, "
            f"got {successes} of {trials}, alpha={alpha}"
        )
    low = beta.ppf(alpha, successes, trials - successes + 1) if successes else 0.0
    high = beta.ppf(1 - alpha, successes + 1, trials - successes) if successes < trials else 1.0
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What votes say about the chances of the classes.

    Attributes:
        predicted: the class that wins most often; None where the votes cannot tell (the model abstains).
        lower: bound of its chance from below.
        upper: bound of every other class's chance from above.
    """

    predicted: int | None
    lower: float
    upper: float


def bounds(selection: Sequence[int], estimation: Sequence[int], alpha: float) -> Bounds:
    """Bounds from two samples of votes, drawn apart: one chooses the class, the other estimates it.

    Args:
        selection, estimation: (C,) votes for each class.
        alpha: chance that any of the bounds is wrong, shared equally by the C of them, one a class.
    """
    each = alpha / len(estimation)
    trials = int(np.sum(estimation))
    chosen = int(np.argmax(selection))
    lower, _ = clopper_pearson(int(estimation[chosen]), trials, each)
    # The chances sum to 1, which costs no further bound.
    others = [clopper_pearson(int(v), trials, each)[1] for c, v in enumerate(estimation) if c != chosen]
    upper = min(max(others, default=0.0), 1 - lower)
    return Bounds(chosen if lower > upper else None, lower, upper)


def is_certified(
    found: Bounds,
    n: Sequence[int],
    k: Sequence[int],
    r: Sequence[int],
    deleted: Sequence[bool] | None = None,
    steady: Sequence[int] | None = None,
) -> bool:
    """Whether no attacker who alters r elements of each modality can change the prediction.

    Args:
        deleted: for each modality, whether its elements can only be deleted; without it, none: any change is covered.
        steady: for each modality, how many elements can be deleted before another k is kept; without it, all.
    """
    if found.predicted is None or any(a > b for a, b in zip(r, n if steady is None else steady, strict=True)):
        return False
    parts = [untouched(*one) for one in zip(n, k, r, strict=True)]
    whole = math.prod(parts)
    only_deleted = math.prod(q for q, flag in zip(parts, deleted or [False] * len(parts), strict=True) if flag)
    return found.lower - found.upper > 1 + only_deleted - 2 * whole


def largest(sizes: Callable[[int], Sequence[int]], steps: int, certified: Certified) -> int | None:
    """The last step of growing sizes that is certified, found by halving.

    Args:
        sizes: the r of a step; larger steps have no smaller r.
        steps: the last step there is.

    Returns:
        The step, from 0 to `steps`; None where not even step 0 is certified.
    """
    if not certified(sizes(0)):
        return None
    low, high = 0, steps + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if certified(sizes(middle)) else (low, middle)
    return low


def alone(place: int, n: Sequence[int], certified: Certified) -> int | None:
    """The largest certified r of one modality, when the attacker leaves the others alone."""
    return largest(lambda r: [r if m == place else 0 for m in range(len(n))], n[place], certified)


def diagonal(share: float, n: Sequence[int]) -> list[int]:
    """The r of an attacker who may alter this share of the elements of every modality.

    >>> diagonal(0.25, (10, 8))
    [2, 2]
    """
    return [math.floor(share * count + 1e-9) for count in n]  # 0.29 of 100 is 29


def along_diagonal(n: Sequence[int], certified: Certified) -> list[int] | None:
    """The largest certified r on the diagonal, where the share grows from one next whole element to the next."""
    shares = sorted({i / count for count in n if count for i in range(count + 1)}) or [0.0]
    step = largest(lambda i: diagonal(shares[i], n), len(shares) - 1, certified)
    return None if step is None else diagonal(shares[step], n)
