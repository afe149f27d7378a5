"""Which row a phase reads when: a pure function of (seed, mixture, global row number).

Rows of a phase are numbered 0, 1, 2, … without end, and among the first n of them are n × its share
of each source, to a row or two: at any n, wherever a phase ends or is made to end. The sources are
joined in pairs, the two of least weight first, until one group holds all (Huffman's tree, so that
large sources have few splits above them); `Split` says which numbers of a group go to which of its
two parts. The i-th row a source contributes is row permutation(seed, source, epoch)[i mod rows] of
it, with epoch = i div rows. So a source is read once through before any of its rows comes again,
whatever the number of ranks. i goes on from one phase to the next that reads the same data set,
whatever mixture each of them has.

The micro-steps and ranks of a step share its rows like this: global row c + k·(ranks·micro_rows) +
rank·micro_rows + j is row j of micro-step k on `rank`, where c is the first row of the step.
"""

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from common.counter_random import derive_key, permutation, random_bits

RULE = 2
"""raised by whatever changes the order of the same seed and mixture; 1 was made of shuffled blocks,
each with the shares rounded to it"""

_DRAWN_AT_ONCE = 64

Group = Union[str, "Split"]
"""a source, or two groups together"""


@dataclass(frozen=True)
class RowAddress:
    """Where a global row is found: the `row`-th row of `source`, read for the `epoch`-th time."""

    source: str
    row: int
    epoch: int


def as_written(number: float | Fraction) -> Fraction:
    """A number of a configuration exactly: 0.1 is a tenth, not the nearest binary fraction."""
    return Fraction(str(number))


class Split:
    """Which rows of a group are of its lighter part and which of its heavier one.

    Numbers are of the group's rows, 0, 1, 2, …; light / whole, at most 1/2, is the lighter part's
    share of them. With n stretching from n to n + 1, the lighter part's k-th row is one of the
    numbers that lie, wholly or in part, in its span from k·whole/light to (k+1)·whole/light. So
    among the first n are less than a row more or less of it than n·light/whole, exactly as many
    where that is whole, and nothing before n has to be looked at to know. Which number of its span
    it is is random, such that *every* number is the lighter part's with probability light/whole:
    were it not so, some ranks would get more of a source than others.
    """

    def __init__(self, parts: tuple[Group, Group], light: int, whole: int, key: int) -> None:
        """`parts`: the lighter, the heavier; `key`: of the random numbers."""
        self.parts, self._light, self._whole, self._key = parts, light, whole, key
        # Rows are asked for one after another, and each asks for the places round it.
        self._place = lru_cache(maxsize=4)(self._make_place)
        self._draws = lru_cache(maxsize=2)(self._make_draws)

    def lighter_among(self, rows: int) -> int:
        """How many of the first `rows` numbers are the lighter part's."""
        over = rows * self._light // self._whole
        return over + (self._place(over) < rows)

    def descend(self, number: int) -> tuple[Group, int]:
        """The part that a number goes to, and its number there."""
        lighter = self.lighter_among(number)
        if self._place(lighter) == number:
            return self.parts[0], lighter
        return self.parts[1], number - lighter

    def _make_place(self, k: int) -> int:
        """The number of the lighter part's k-th row."""
        light, whole = self._light, self._whole
        # first: the number that the span begins in, `before` parts of `light` after its start.
        first, before = divmod(k * whole, light)
        last, after = divmod((k + 1) * whole, light)
        if self._is_last(k):
            return last
        # A number that the span shares with the one before goes to either's row, to whichever with
        # its part of light / whole: what is left of that, given that others were not chosen.
        if before and not self._is_last(k - 1):
            chance = (light - before) * whole, (whole - before) * (whole - after)
            if self._happens(k, 1, *chance):
                return first
        begin = first + (before > 0)
        return begin + (self._draw(k, 2) * (last - begin) >> 64)

    def _is_last(self, k: int) -> bool:
        """Whether the lighter part's k-th row is the number that the end of its span cuts."""
        return self._happens(k, 0, (k + 1) * self._whole % self._light, self._whole)

    def _happens(self, k: int, draw: int, part: int, whole: int) -> bool:
        """True with probability part / whole."""
        return self._draw(k, draw) * whole < part << 64

    def _draw(self, k: int, draw: int) -> int:
        """One of the three random numbers, of 64 bits, that decide where the k-th row comes."""
        many, one = divmod(k, _DRAWN_AT_ONCE)
        return self._draws(many)[3 * one + draw]

    def _make_draws(self, many: int) -> list[int]:
        size = 3 * _DRAWN_AT_ONCE
        counters = np.arange(many * size, (many + 1) * size, dtype=np.uint64)
        numbers: list[int] = random_bits(self._key, counters).tolist()
        return numbers


class RowOrder:
    """The endless order of a phase's rows over sources of known sizes."""

    def __init__(
        self,
        seed: int,
        rows: Mapping[str, int],
        weights: Mapping[str, float | Fraction],
        start: Mapping[str, int] | None = None,
    ) -> None:
        """`rows`: rows of each source; `weights`: the share of each source, any positive scale;
        `start`: how many rows of a source have been read before, none by default."""
        self.seed = seed
        self.weights = _in_whole_numbers(weights)
        """the shares, exactly, in the smallest whole numbers"""
        self.rows = {source: rows[source] for source in self.weights}
        self.start = {source: (start or {}).get(source, 0) for source in self.weights}
        self._all = _join(seed, self.weights)
        # Consecutive rows touch one or two epochs of each source.
        self._epoch = lru_cache(maxsize=2 * len(self.weights))(self._make_epoch)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the order beside the seed and the data, as a checkpoint keeps it."""
        return {"rule": RULE, "weights": self.weights, "start": self.start}

    def __getitem__(self, global_row: int) -> RowAddress:
        """The address of one global row (0, 1, 2, …)."""
        group, number = self._all, global_row
        while isinstance(group, Split):
            group, number = group.descend(number)
        epoch, index = divmod(self.start[group] + number, self.rows[group])
        return RowAddress(source=group, row=int(self._epoch(group, epoch)[index]), epoch=epoch)

    def rows_read(self, global_rows: int) -> dict[str, int]:
        """How many rows of each source are among the first `global_rows` ones."""
        read = dict.fromkeys(self.weights, 0)
        groups = [(self._all, global_rows)]
        while groups:
            group, rows = groups.pop()
            if isinstance(group, Split):
                lighter = group.lighter_among(rows)
                groups += zip(group.parts, (lighter, rows - lighter), strict=True)
            else:
                read[group] = rows
        return read

    def _make_epoch(self, source: str, epoch: int) -> NDArray[np.int64]:
        key = derive_key(self.seed, "row order", "source", source, epoch)
        return permutation(key, self.rows[source])


def _in_whole_numbers(weights: Mapping[str, float | Fraction]) -> dict[str, int]:
    """Weights above 0 by name, in proportion, in whole numbers without a common divisor."""
    exact = {name: as_written(weights[name]) for name in sorted(weights) if weights[name] > 0}
    scale = math.lcm(*(weight.denominator for weight in exact.values()))
    whole = {name: int(weight * scale) for name, weight in exact.items()}
    divisor = math.gcd(*whole.values())
    return {name: weight // divisor for name, weight in whole.items()}


def _join(seed: int, weights: Mapping[str, int]) -> Group:
    """All sources as one group; equal weights are taken by name."""
    # By weight; no two groups have a first name in common.
    groups: list[tuple[int, str, Group]] = []
    for name, weight in weights.items():
        heapq.heappush(groups, (weight, name, name))
    while len(groups) > 1:
        light, name, lighter = heapq.heappop(groups)
        heavy, other, heavier = heapq.heappop(groups)
        key = derive_key(seed, "row order", "split", len(groups))
        split = Split((lighter, heavier), light, light + heavy, key)
        heapq.heappush(groups, (light + heavy, min(name, other), split))
    return groups[0][2]
