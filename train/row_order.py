"""Which row a phase reads when: a pure function of (seed, mixture, global row number).

Rows of a phase are numbered 0, 1, 2, … without end. Every block of 16,384 consecutive numbers holds
exactly the quota of each source, in an order permuted by (seed, block); the i-th row a source
contributes is row permutation(seed, source, epoch)[i mod rows] of it, with epoch = i div rows. So a
source is read once through before any of its rows comes again, whatever the number of ranks. i goes
on from one phase to the next that reads the same data set, whatever mixture each of them has.

The micro-steps and ranks of a step share its rows like this: global row c + k·(ranks·micro_rows) +
rank·micro_rows + j is row j of micro-step k on `rank`, where c is the first row of the step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from common.counter_random import derive_key, permutation

BLOCK = 16_384


@dataclass(frozen=True)
class RowAddress:
    """Where a global row is found: the `row`-th row of `source`, read for the `epoch`-th time."""

    source: str
    row: int
    epoch: int


def quotas(weights: Mapping[str, float]) -> dict[str, int]:
    """How many rows of a block each source gets: weights in 1/16,384, summing to 16,384.

    Every source of positive weight gets at least one row a block, so that none vanishes; the rest
    follows the largest remainders (ties by name).
    """
    total = sum(weights.values())
    names = sorted(name for name, weight in weights.items() if weight > 0)
    shares = {name: BLOCK * weights[name] / total for name in names}
    result = {name: max(1, int(shares[name])) for name in names}
    by_remainder = sorted(names, key=lambda name: (result[name] - shares[name], name))
    for name in by_remainder[: max(0, BLOCK - sum(result.values()))]:
        result[name] += 1
    while sum(result.values()) > BLOCK:
        result[max(names, key=lambda name: (result[name], name))] -= 1
    return result


class RowOrder:
    """The endless order of a phase's rows over sources of known sizes."""

    def __init__(
        self,
        seed: int,
        rows: Mapping[str, int],
        weights: Mapping[str, float],
        start: Mapping[str, int] | None = None,
    ) -> None:
        """`rows`: rows of each source; `weights`: the share of each source, any positive scale;
        `start`: how many rows of a source have been read before, none by default."""
        self.seed = seed
        self.quotas = quotas(weights)
        self.rows = {source: rows[source] for source in self.quotas}
        self.start = {source: (start or {}).get(source, 0) for source in self.quotas}
        self._names = list(self.quotas)
        self._ends = np.cumsum([self.quotas[name] for name in self._names])
        # Consecutive rows touch one or two blocks, and one or two epochs of each source.
        self._block = lru_cache(maxsize=2)(self._make_block)
        self._epoch = lru_cache(maxsize=2 * len(self._names))(self._make_epoch)

    def __getitem__(self, global_row: int) -> RowAddress:
        """The address of one global row (0, 1, 2, …)."""
        block, position = divmod(global_row, BLOCK)
        sources, ranks = self._block(block)
        source = self._names[sources[position]]
        count = self.start[source] + block * self.quotas[source] + int(ranks[position])
        epoch, index = divmod(count, self.rows[source])
        return RowAddress(source=source, row=int(self._epoch(source, epoch)[index]), epoch=epoch)

    def rows_read(self, global_rows: int) -> dict[str, int]:
        """How many rows of each source are among the first `global_rows` ones."""
        blocks, rest = divmod(global_rows, BLOCK)
        begun = np.bincount(self._block(blocks)[0][:rest], minlength=len(self._names))
        return {
            name: blocks * self.quotas[name] + int(begun[number])
            for number, name in enumerate(self._names)
        }

    def _make_block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each position of a block, (16384,): its source's number, and its place among that
        source's rows of the block."""
        order = permutation(derive_key(self.seed, "row order", "block", block), BLOCK)
        sources = np.searchsorted(self._ends, order, side="right")
        ranks = np.empty(BLOCK, np.int64)
        for number, name in enumerate(self._names):
            ranks[sources == number] = np.arange(self.quotas[name])
        return sources, ranks

    def _make_epoch(self, source: str, epoch: int) -> NDArray[np.int64]:
        key = derive_key(self.seed, "row order", "source", source, epoch)
        return permutation(key, self.rows[source])
