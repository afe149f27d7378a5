"""Packing: which documents share a row. It works on lengths alone and never sees a token.

Documents longer than `max_length` are cut into evenly sized pieces first. The pieces then come in a
random order and fill one row after another. A row begins with the pieces that have waited longest,
whatever their lengths, so that a row is a fair mixture; only its last places are chosen: the pair,
or the one piece, that fills best what is left. The choice is among the next `LOOK_AHEAD` pieces,
so time grows with the number of pieces and the memory beside the result does not grow.
"""

from collections import deque
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from common.counter_random import derive_key, permutation

# [CLS] before and [SEP] behind every piece.
SPECIAL_TOKENS = 2
LOOK_AHEAD = 1 << 14
# A row's last places are chosen once what is left is at most so many pieces of mean length.
_CLOSING_MEANS = 2
# First members of the pair that closes a row are sought among so many differing lengths.
_PAIR_TRIES = 48
_PAIR_SCAN = 256


@dataclass(frozen=True)
class Pieces:
    """The pieces of many documents, in the documents' order; four arrays of one length.

    document: (n,) int64, the number of the document each is from.
    number: (n,) int32, which piece of its document, from 0.
    begin, end: (n,) int64, its tokens within the document, without [CLS] and [SEP].
    cut: (n,) bool, whether its document has more than one piece.
    """

    document: NDArray[np.int64]
    number: NDArray[np.int32]
    begin: NDArray[np.int64]
    end: NDArray[np.int64]
    cut: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.document)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each piece in a row, (n,) int64, with [CLS] and [SEP]."""
        return self.end - self.begin + SPECIAL_TOKENS


@dataclass(frozen=True)
class Plan:
    """Rows of pieces: row i holds `order[bounds[i]:bounds[i + 1]]`, numbers of pieces.

    order: (pieces,) int64; bounds: (rows + 1,) int64.
    """

    order: NDArray[np.int64]
    bounds: NDArray[np.int64]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.bounds) - 1


def cut_documents(lengths: NDArray[np.integer], max_length: int) -> Pieces:
    """Cut documents of `lengths` tokens (n,) into as few pieces as `max_length` allows.

    The pieces of a document differ by at most one token and cover it without gap or overlap;
    `max_length` counts [CLS] and [SEP].
    """
    lengths = np.asarray(lengths, np.int64)
    room = max_length - SPECIAL_TOKENS
    counts = np.maximum(-(-lengths // room), 1)
    document = np.repeat(np.arange(len(lengths)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    number = np.arange(len(document)) - first
    length, count = lengths[document], counts[document]
    return Pieces(
        document=document,
        number=number.astype(np.int32),
        begin=number * length // count,
        end=(number + 1) * length // count,
        cut=count > 1,
    )


def pack(lengths: NDArray[np.integer], row_tokens: int, max_documents: int, key: int) -> Plan:
    """Rows of at most `row_tokens` tokens and `max_documents` pieces that hold every piece once.

    `lengths` (n,) counts [CLS] and [SEP]; `key` decides the order in which pieces are taken and the
    order of the rows. The result is a pure function of the arguments.
    Raises ValueError for a piece that no row can hold.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and int(lengths.max()) > row_tokens:
        raise ValueError(f"a piece of {int(lengths.max())} tokens, rows of {row_tokens}")
    arrival = permutation(derive_key("pieces", key), len(lengths))
    window = _Window(arrival, lengths[arrival])
    order = np.empty(len(lengths), np.int64)
    bounds = [0]
    filled = 0
    while window.count:
        row = _fill_row(window, row_tokens, max_documents)
        order[filled : filled + len(row)] = row
        filled += len(row)
        bounds.append(filled)
    return _shuffle_rows(Plan(order, np.array(bounds, np.int64)), derive_key("rows", key))


def _fill_row(window: "_Window", row_tokens: int, max_documents: int) -> list[int]:
    row: list[int] = []
    left = row_tokens
    while window.count and len(row) < max_documents:
        places = max_documents - len(row)
        if row and (places == 1 or left <= window.closing):
            length = window.best_for(left, places)
        else:
            length = window.oldest_length()
            if length > left:
                length = window.largest_within(left)
        if not length:
            break
        row.append(window.take(length))
        left -= length
    return row


class _Window:
    """The next pieces in order of arrival, found by age and by length.

    `_present` is a number whose bit L is set while a piece of length L waits, so that the largest
    length within a bound is a matter of two operations.
    """

    def __init__(self, arrival: NDArray[np.int64], lengths: NDArray[np.integer]) -> None:
        self.count = 0
        self.closing = int(_CLOSING_MEANS * lengths.mean()) if len(lengths) else 0
        self._arrival, self._lengths = arrival, lengths
        self._next = 0
        self._oldest: deque[tuple[int, int]] = deque()
        self._taken: set[int] = set()
        self._waiting: dict[int, deque[int]] = {}
        self._present = 0
        self._refill()

    def oldest_length(self) -> int:
        """The length of the piece that has waited longest."""
        while self._oldest[0][0] in self._taken:
            self._taken.remove(self._oldest.popleft()[0])
        return self._oldest[0][1]

    def largest_within(self, bound: int) -> int:
        """The largest length within `bound` among the waiting pieces, 0 if there is none."""
        return max((self._present & ((2 << bound) - 1)).bit_length() - 1, 0)

    def best_for(self, left: int, places: int) -> int:
        """The length to take next so that `left` tokens are filled best by one piece or two."""
        best_first = single = self.largest_within(left)
        if single == left or places == 1:
            return single
        best = single
        tried: set[int] = set()
        for number, first in islice(self._oldest, _PAIR_SCAN):
            if first in tried or first >= left or number in self._taken:
                continue
            tried.add(first)
            second = self.largest_within(left - first)
            if second == first and len(self._waiting[first]) == 1:
                second = self.largest_within(first - 1)
            if first + second > best:
                best, best_first = first + second, first
            if best == left or len(tried) == _PAIR_TRIES:
                break
        return best_first

    def take(self, length: int) -> int:
        """Take the piece of `length` that has waited longest; returns its number."""
        waiting = self._waiting[length]
        number = waiting.popleft()
        if not waiting:
            self._present ^= 1 << length
        self._taken.add(number)
        self.count -= 1
        if self.count < LOOK_AHEAD // 2:
            self._refill()
        return number

    def _refill(self) -> None:
        """Let the window grow to its full size, or to what is left."""
        begin, end = self._next, min(self._next + LOOK_AHEAD - self.count, len(self._arrival))
        numbers, lengths = self._arrival[begin:end].tolist(), self._lengths[begin:end].tolist()
        for number, length in zip(numbers, lengths, strict=True):
            self._waiting.setdefault(length, deque()).append(number)
            self._present |= 1 << length
        self._oldest.extend(zip(numbers, lengths, strict=True))
        self._next = end
        self.count += end - begin


def _shuffle_rows(plan: Plan, key: int) -> Plan:
    shuffled = permutation(key, plan.rows)
    sizes = np.diff(plan.bounds)[shuffled]
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    # The position in the old order of every place of the new one.
    source = np.repeat(plan.bounds[shuffled] - bounds[:-1], sizes) + np.arange(len(plan.order))
    return Plan(plan.order[source], bounds)
