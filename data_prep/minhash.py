"""MinHash with banding: which documents of a source may be near-duplicates of each other.

A document is the set of its runs of `words` words (values kept whole). For each of bands x rows
hash functions its smallest hash is taken; two sets agree in one with the probability of their
Jaccard similarity s. The `rows` minima of a band are one key; documents that share a key are
candidates, which two are with probability 1 - (1 - s^rows)^bands: 0.92 for s = 0.8 with 14 x 8
(Broder, "On the resemblance and containment of documents", 1997; Leskovec, Rajaraman and Ullman,
"Mining of massive datasets", section 3.4).

The functions are a·x + b modulo 2**32, a odd, of the upper half x of a run's 64-bit hash, which is
random already.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.counter_random import derive_key, random_bits
from data_prep.words import Hashes, hash_runs, hash_words, mix

# What is hashed at a time: enough for NumPy to be busy, few enough for the cache.
_BATCH_CHARACTERS = 1 << 18
_BLOCK_RUNS = 512
# Keys compared at a time: what bounds the memory of `candidate_pairs`, at some 60 bytes a key.
_PART_KEYS = 1 << 19


@dataclass(frozen=True)
class Banding:
    """How documents are compared: runs of `words` words, `bands` keys of `rows` minima each."""

    words: int
    bands: int
    rows: int


def signatures(
    texts: Iterable[tuple[int, str]], banding: Banding
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint32], Hashes]]:
    """For batches of (number, text): numbers (n,), words (n,) and keys (n, bands) uint64.

    Texts without a word are left out. Memory is a few megabytes and some 60 bytes for each
    character of the longest text.
    """
    draws = random_bits(
        derive_key("minhash"), np.arange(2 * banding.bands * banding.rows, dtype=np.uint64)
    )
    factors, offsets = (draws >> np.uint64(32)).astype(np.uint32).reshape(2, -1)
    factors |= np.uint32(1)
    for batch in batches(texts):
        words = hash_words([text for _, text in batch], whole_values=True)
        runs, starts = hash_runs(words, banding.words)
        values = (runs >> np.uint64(32)).astype(np.uint32)
        present = np.flatnonzero(np.diff(starts))
        minima = np.empty((len(present), len(factors)), np.uint32)
        for row, (begin, end) in enumerate(zip(starts[present], starts[present + 1], strict=True)):
            minima[row] = _minima(values[begin:end], factors, offsets)
        numbers = np.array([number for number, _ in batch], np.int64)[present]
        lengths = np.diff(words.starts)[present].astype(np.uint32)
        yield numbers, lengths, _keys(minima, banding)


def batches(texts: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Lists of texts that have some 262,144 characters together, or of one that has more."""
    batch: list[tuple[int, str]] = []
    characters = 0
    for number, text in texts:
        if batch and characters + len(text) > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
        batch.append((number, text))
        characters += len(text)
    if batch:
        yield batch


Band = tuple[Hashes, NDArray[np.int64], NDArray[np.uint32]]


def candidate_pairs(
    files: Callable[[], Iterable[Band]], number: int, part_keys: int = _PART_KEYS
) -> Iterator[NDArray[np.int64]]:
    """Pairs of documents that share a key of one band, in blocks of (pairs, 2) int64, each once.

    files: gives for each file of the source its documents' keys of this band, their positions in
    the source and their numbers of words, (n,) each; it is asked once for each part of the keys, so
    that none of it has to stay in memory. number: of all keys.
    Of the documents that share a key the longest (of equals the first) is paired with every other
    one, and each with the next in that order, so n documents give fewer than 2 n pairs. The one
    that comes first in the order is first in its pair; the pairs of a block are in ascending order.

    Memory is 60 bytes for each of `part_keys` keys, and the same for the longest run of equal keys.
    """
    parts = np.uint64(-(-number // part_keys) or 1)
    for part in range(int(parts)):
        chosen: list[Band] = []
        for keys, positions, words in files():
            rows = np.flatnonzero(keys % parts == np.uint64(part))
            chosen.append((keys[rows], positions[rows], words[rows]))
        if not chosen:
            return
        key, position, length = map(np.concatenate, zip(*chosen, strict=True))
        order = np.lexsort((position, -length.astype(np.int64), key))
        key, position = key[order], position[order]
        is_first = np.ones(len(key), np.bool_)
        is_first[1:] = key[1:] != key[:-1]
        first_of = np.maximum.accumulate(np.where(is_first, np.arange(len(key)), 0))
        others = np.flatnonzero(~is_first)
        before = others[others - 1 != first_of[others]]
        found = [
            np.stack([position[first_of[others]], position[others]], axis=1),
            np.stack([position[before - 1], position[before]], axis=1),
        ]
        yield distinct_pairs(np.concatenate(found))


def distinct_pairs(pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """`pairs` (n, 2) in ascending order, each once."""
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    pairs = pairs[order]
    is_new = np.ones(len(pairs), np.bool_)
    is_new[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    return pairs[is_new]


def _minima(
    values: NDArray[np.uint32], factors: NDArray[np.uint32], offsets: NDArray[np.uint32]
) -> NDArray[np.uint32]:
    """The smallest value of each hash function over a document's runs, (functions,) uint32."""
    smallest = np.full(len(factors), 2**32 - 1, np.uint32)
    for begin in range(0, len(values), _BLOCK_RUNS):
        block = values[begin : begin + _BLOCK_RUNS, None] * factors
        block += offsets
        np.minimum(smallest, block.min(axis=0), out=smallest)
    return smallest


def _keys(minima: NDArray[np.uint32], banding: Banding) -> Hashes:
    """One key for each band, (documents, bands) uint64."""
    grouped = minima.reshape(len(minima), banding.bands, banding.rows).astype(np.uint64)
    weights = random_bits(derive_key("band"), np.arange(banding.rows, dtype=np.uint64)) | 1
    return mix((mix(grouped) * weights).sum(axis=2, dtype=np.uint64))
