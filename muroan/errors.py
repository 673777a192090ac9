"""The one kind of exception that MUROAN raises on purpose, and the checks of options that raise it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


class MuroanError(Exception):
    """Bad input: the message says what was expected, what came, and what to do.

    The command line prints the message alone; in Python it is an ordinary exception.
    """


def check_whole(group: str, least: int = 1, **numbers: object) -> None:
    """Check options that count something. A command line makes 1e3 a float, which no count is.

    Args:
        group: of the options, such as `attack`.

    Raises:
        MuroanError: one is no whole number, or below `least`.
    """
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, Integral) or number < least:
            raise MuroanError(f"{group}.{name} must be a whole number, at least {least}, got {number!r}")


def check_names(group: str, **lists: Any) -> None:
    """Check options that are a list of names, or None for all.

    Raises:
        MuroanError: one is something else, a single word for instance, or empty, or names something twice.
    """
    for option, names in lists.items():
        if names is None:
            continue
        listed = isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(n, str) for n in names)
        if not listed or not names or len(set(names)) < len(names):
            raise MuroanError(f"{group}.{option} must be a list of different names, or null, got {names!r}")


def check_number(group: str, low: float, high: float = math.inf, *, above: bool = False, **numbers: object) -> None:
    """Check options that measure something.

    Args:
        low, high: the range, both ends in it; with `above`, `low` is not.

    Raises:
        MuroanError: one is no finite number of the range.
    """
    for name, number in numbers.items():
        real = isinstance(number, Real) and not isinstance(number, bool) and math.isfinite(number)
        if not real or number > high or number < low or (above and number == low):  # type: ignore[operator]
            span = f"above {low:g}" if above else f"at least {low:g}"
            most = f" and at most {high:g}" if high < math.inf else ""
            raise MuroanError(f"{group}.{name} must be a number {span}{most}, got {number!r}")
