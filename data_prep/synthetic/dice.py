"""Random draws and the small words of the grammar.

A text is a pure function of its dice, and dice of (seed, purpose): asking for more documents
changes none of the earlier ones.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from common.counter_random import derive_key, random_bits

T = TypeVar("T")

_DRAWS_AT_ONCE = 64


class Dice:
    """A sequence of random draws that depends on `purpose` alone."""

    def __init__(self, *purpose: int | str) -> None:
        self._key = derive_key("synthetic", *purpose)
        self._drawn = 0
        self._waiting: list[int] = []

    def whole(self, lowest: int, highest: int) -> int:
        """A whole number from lowest to highest, both possible."""
        if not self._waiting:
            counters = np.arange(self._drawn, self._drawn + _DRAWS_AT_ONCE, dtype=np.uint64)
            self._waiting = random_bits(self._key, counters).tolist()
            self._drawn += _DRAWS_AT_ONCE
        return lowest + self._waiting.pop() % (highest - lowest + 1)

    def number(self, lowest: float, highest: float, decimals: int) -> str:
        """A number between the two, written with so many decimals."""
        scale = 10**decimals
        return f"{self.whole(round(lowest * scale), round(highest * scale)) / scale:.{decimals}f}"

    def pick(self, choices: Sequence[T]) -> T:
        """One of the choices."""
        return choices[self.whole(0, len(choices) - 1)]

    def some(self, choices: Sequence[T], number: int) -> list[T]:
        """So many different ones of the choices, in random order."""
        left = list(choices)
        return [left.pop(self.whole(0, len(left) - 1)) for _ in range(min(number, len(left)))]

    def chance(self, percent: int) -> bool:
        """True in so many of a hundred cases."""
        return self.whole(1, 100) <= percent


def capital(text: str) -> str:
    """The text with its first letter as a capital."""
    return text[:1].upper() + text[1:]


def enumerated(words: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def percent(part: int, whole: int) -> str:
    """The share of a whole, `12.5%`."""
    return f"{100 * part / whole:.1f}%"
