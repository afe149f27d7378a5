"""Words of texts and runs of words as 64-bit hashes, made for many texts at once in NumPy.

A word's hash is a polynomial in its UTF-8 bytes, taken from prefix sums over a whole batch of
texts, and mixed; a run's hash is a weighted sum of its words' hashes, mixed. Both are the same on
every machine. Case does not count.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from common.counter_random import derive_key, random_bits

Hashes = NDArray[np.uint64]

_DIGITS = b"0123456789"
_LETTERS = b"abcdefghijklmnopqrstuvwxyz"
# Parts of a value: a word of their own ("<5" is two words, as "< 5" is), a part of a word wherever
# they stand ("2+"), and a part of a word before a digit ("1.2", "-3", "120/80").
_VALUE_WORDS = b"<>"
_VALUE_SIGNS = b"+"
_VALUE_JOINERS = b".,:/-"
_MARKS_BEYOND_ASCII = re.compile(r"[^\w\x00-\x7f]")
# Odd, so that it has an inverse modulo 2**64.
_BASE = derive_key("words: base of the polynomial") | 1
_BYTE_VALUES = random_bits(derive_key("words: value of a byte"), np.arange(256, dtype=np.uint64))
_RUN_WEIGHTS = random_bits(derive_key("words: place in a run"), np.arange(64, dtype=np.uint64)) | 1


@dataclass(frozen=True)
class Words:
    """The words of some texts, one text after another.

    hashes: (words,) uint64; starts: (texts + 1,) int64, where each text's words begin, and the end;
    numbers: (words,) bool, whether a word has a digit.
    """

    hashes: Hashes
    starts: NDArray[np.int64]
    numbers: NDArray[np.bool_]


def hash_words(texts: Sequence[str], *, whole_values: bool) -> Words:
    """The words of every text.

    whole_values: a value is one word with its signs and separators (`1.2`, `-3`, `120/80`, `2+`),
    and `<` and `>` are words, so that texts with other values have other words. Otherwise words are
    runs of letters and digits alone, so that a text and its tokenised form (`1 . 2`) have the same
    words.

    Memory is some 40 bytes a byte of text.
    """
    lowered = [text.lower() for text in texts]
    if not whole_values:
        lowered = [t if t.isascii() else _MARKS_BEYOND_ASCII.sub(" ", t) for t in lowered]
    encoded = [text.encode("utf-8", "replace") for text in lowered]
    content = np.frombuffer(b" " + b" ".join(encoded) + b" ", np.uint8)
    text_starts = np.cumsum([1, *(len(text) + 1 for text in encoded)])

    is_digit = _table(_DIGITS)[content]
    # 0 between words, 1 in a word, 2 in a word of marks.
    kind = _kinds(whole_values)[content]
    if whole_values:
        kind[:-1] |= _table(_VALUE_JOINERS)[content[:-1]] & is_digit[1:]
    is_edge = kind[1:] != kind[:-1]
    begins = np.flatnonzero(is_edge & (kind[1:] > 0)) + 1
    ends = np.flatnonzero(is_edge & (kind[:-1] > 0)) + 1

    powers, inverses = _powers(len(content))
    sums = np.zeros(len(content) + 1, np.uint64)
    np.cumsum(_BYTE_VALUES[content] * powers, out=sums[1:])
    hashes = mix((sums[ends] - sums[begins]) * inverses[begins])
    digits = np.zeros(len(content) + 1, np.int32)
    np.cumsum(is_digit, out=digits[1:])
    return Words(hashes, np.searchsorted(begins, text_starts), digits[ends] > digits[begins])


def hash_runs(words: Words, length: int) -> tuple[Hashes, NDArray[np.int64]]:
    """The runs of `length` words of every text, and where each text's runs begin, and the end.

    A text has words - length + 1 runs; one with fewer words than `length` has one run of all of
    them, and one without words has none.
    """
    counts = np.diff(words.starts)
    all_runs = _runs(words.hashes, length)
    runs_of = np.where(counts >= length, counts - length + 1, np.minimum(counts, 1))
    starts = np.concatenate([[0], np.cumsum(runs_of)])
    # The place of a run's first word: runs follow each other within a text.
    first_words = np.arange(starts[-1]) + np.repeat(words.starts[:-1] - starts[:-1], runs_of)
    hashes = all_runs[np.minimum(first_words, max(len(all_runs) - 1, 0))]
    for count in range(1, length):
        short = np.flatnonzero(counts == count)
        if len(short):
            places = words.starts[short, None] + np.arange(count)
            hashes[starts[short]] = _runs(words.hashes[places].T, count)[0]
    return hashes, starts


def mix(values: Hashes) -> Hashes:
    """SplitMix64's finaliser: spreads what differs in `values` over all 64 bits."""
    return random_bits(0, values)


def _runs(hashes: Hashes, length: int) -> Hashes:
    """The hashes of all runs of `length` words, (words - length + 1, …) for (words, …)."""
    number = len(hashes) - length + 1
    if number <= 0:
        return np.zeros(1, np.uint64)
    total = np.full((number, *hashes.shape[1:]), length, np.uint64)
    for place in range(length):
        total += hashes[place : place + number] * _RUN_WEIGHTS[place]
    return mix(total)


@cache
def _table(of: bytes) -> NDArray[np.bool_]:
    """Whether a byte is one of `of`, (256,) bool."""
    table = np.zeros(256, np.bool_)
    table[list(of)] = True
    return table


@cache
def _kinds(whole_values: bool) -> NDArray[np.uint8]:
    """0, 1 or 2 for every byte; those above 127 are parts of letters beyond ASCII."""
    letters = _DIGITS + _LETTERS + bytes(range(128, 256)) + _VALUE_SIGNS * whole_values
    kinds = _table(letters).astype(np.uint8)
    if whole_values:
        kinds[list(_VALUE_WORDS)] = 2
    return kinds


_kept_powers: list[Hashes] = [np.zeros(0, np.uint64), np.zeros(0, np.uint64)]


def _powers(size: int) -> tuple[Hashes, Hashes]:
    """The first `size` powers of the base and of its inverse, modulo 2**64."""
    if len(_kept_powers[0]) < size:
        grown = 1 << (size - 1).bit_length()
        for number, base in enumerate((_BASE, pow(_BASE, -1, 2**64))):
            factors = np.full(grown, base, np.uint64)
            factors[0] = 1
            _kept_powers[number] = np.multiply.accumulate(factors)
    return _kept_powers[0][:size], _kept_powers[1][:size]
