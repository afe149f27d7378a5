"""Near-duplicates of a source: found by MinHash, verified by their true Jaccard similarity.

Documents are compared as sets of runs of words in which numbers count (`data_prep.words`). A
document is dropped only when it has a Jaccard similarity of at least `threshold` with a longer one
that stays, and no value that this one lacks: two notes that differ in a value are two notes, but a
note and its slightly shortened copy are one. A value is a word with a digit, together with the word
before it.

The steps, each a stage: keys of every document (`write_signatures`), pairs that share a key, band
by band (`write_pairs`), runs of the documents that are in a pair (`write_wanted`, `write_runs`),
the similarity of every pair (`verify`), and what is dropped (`data_prep.clusters`). A document's
position is its number over all files of its source.

Memory: a few megabytes, and at most 60 bytes for each of 524,288 keys in `write_pairs`, 1 byte a
document of the source in `write_wanted`, 24 bytes a document in a pair and 100 for each of some
65,536 pairs in `verify`.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.files import whole_file
from data_prep.arrays import map_array, raw_files, save_array
from data_prep.document import read_documents
from data_prep.minhash import Band, Banding, batches, candidate_pairs, distinct_pairs, signatures
from data_prep.stages import Counts
from data_prep.words import Hashes, Words, hash_runs, hash_words, mix

# Pairs that one task verifies.
PART_PAIRS = 1 << 16
_PAIR_BYTES = 16
_KEY_BLOCK = 1 << 14


@dataclass(frozen=True)
class SourceFiles:
    """The files of a source, the positions of their first documents, and how many there are."""

    stems: tuple[str, ...]
    starts: tuple[int, ...]
    documents: int

    def of(self, folder: Path, ending: str) -> list[Path]:
        """The paths of all files below the folder of a stage."""
        return [folder / f"{stem}{ending}" for stem in self.stems]


def source_files(checks: Path, stems: Sequence[str]) -> SourceFiles:
    """The files of a source; how many documents each has is known from its array in `checks`."""
    sizes = [len(map_array(checks / f"{stem}.npy")) for stem in stems]
    starts = (0, *accumulate(sizes))
    return SourceFiles(tuple(stems), starts[:-1], starts[-1])


def write_signatures(
    documents: Path, first_of: NDArray[np.int64], begin: int, banding: Banding, out: Path
) -> Counts:
    """Write `out`.numbers, .words and .keys (raw) of the documents that say something first.

    begin: the position of the file's first document. The keys lie in blocks of (bands, documents),
    _KEY_BLOCK documents in all but the last, so that a band can be read without the others.
    """
    texts = (
        (number, document.text)
        for number, document in enumerate(read_documents(documents))
        if first_of[number] == begin + number
    )
    written = 0
    paths = [out.with_name(f"{out.name}.{part}") for part in ("numbers", "words", "keys")]
    waiting = np.zeros((0, banding.bands), np.uint64)
    nothing: tuple[NDArray[np.int64], NDArray[np.uint32]]
    nothing = np.zeros(0, np.int64), np.zeros(0, np.uint32)
    with raw_files(*paths) as writer:
        for numbers, lengths, keys in signatures(texts, banding):
            waiting = np.concatenate([waiting, keys])
            writer.append(numbers, lengths, waiting[:0])
            while len(waiting) >= _KEY_BLOCK:
                writer.append(*nothing, waiting[:_KEY_BLOCK].T)
                waiting = waiting[_KEY_BLOCK:]
            written += len(numbers)
        writer.append(*nothing, waiting.T)
    return {"documents": written}


def read_band(path: Path, banding: Banding, band: int, documents: int) -> Hashes:
    """The keys of a band in a file that `write_signatures` wrote for so many documents."""
    parts = [np.zeros(0, np.uint64)]
    for begin in range(0, documents, _KEY_BLOCK):
        block = min(_KEY_BLOCK, documents - begin)
        place = begin * banding.bands + band * block
        parts.append(np.fromfile(path, np.uint64, block, offset=8 * place))
    return np.concatenate(parts)


def write_pairs(
    files: SourceFiles, signature_folder: Path, banding: Banding, band: int, out: Path
) -> Counts:
    """Write (raw) the pairs of documents that share the key of a band, (pairs, 2) int64."""
    paths = [signature_folder / stem for stem in files.stems]
    sizes = [path.with_name(f"{path.name}.numbers").stat().st_size // 8 for path in paths]

    def of_band() -> Iterator[Band]:
        for path, begin, size in zip(paths, files.starts, sizes, strict=True):
            yield (
                read_band(path.with_name(f"{path.name}.keys"), banding, band, size),
                np.fromfile(path.with_name(f"{path.name}.numbers"), np.int64) + begin,
                np.fromfile(path.with_name(f"{path.name}.words"), np.uint32),
            )

    found = 0
    with raw_files(out) as writer:
        for pairs in candidate_pairs(of_band, sum(sizes)):
            writer.append(pairs)
            found += len(pairs)
    return {"pairs": found}


def number_of_pairs(paths: Sequence[Path]) -> int:
    """How many pairs `write_pairs` wrote to `paths`, each band's counted."""
    return sum(path.stat().st_size for path in paths) // _PAIR_BYTES


def _pair_blocks(paths: Sequence[Path]) -> Iterator[NDArray[np.int64]]:
    for path in paths:
        for begin in range(0, path.stat().st_size, PART_PAIRS * _PAIR_BYTES):
            yield np.fromfile(path, np.int64, 2 * PART_PAIRS, offset=begin).reshape(-1, 2)


def write_wanted(files: SourceFiles, pairs: Sequence[Path], out: Path) -> Counts:
    """Write, for every file, which documents are in a pair: (documents,) bool."""
    wanted = np.zeros(files.documents, np.bool_)
    for block in _pair_blocks(pairs):
        wanted[block.ravel()] = True
    for path, of_file in zip(
        files.of(out, ".npy"), np.split(wanted, files.starts[1:]), strict=True
    ):
        save_array(path, of_file)
    return {"documents": len(wanted), "candidates": int(wanted.sum())}


def write_runs(documents: Path, wanted: NDArray[np.bool_], words: int, out: Path) -> Counts:
    """Write `out`.values (raw: runs, then values of every wanted document) and `out`.starts."""
    texts = (
        (number, document.text)
        for number, document in enumerate(read_documents(documents))
        if wanted[number]
    )
    sizes: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
    with raw_files(out.with_name(f"{out.name}.values")) as writer:
        for batch in batches(texts):
            for runs, values in run_sets([text for _, text in batch], words):
                writer.append(np.concatenate([runs, values]))
                sizes.append(np.array([len(runs), len(values)]))
    starts = np.cumsum(np.concatenate(sizes))
    save_array(out.with_name(f"{out.name}.starts.npy"), starts)
    return {"documents": len(starts) // 2}


def run_sets(texts: Sequence[str], words: int) -> Iterator[tuple[Hashes, Hashes]]:
    """For each text its runs and its values, each a sorted array of distinct hashes."""
    found = hash_words(texts, whole_values=True)
    runs, run_starts = hash_runs(found, words)
    values, value_starts = _values(found)
    for text in range(len(texts)):
        of_text = runs[run_starts[text] : run_starts[text + 1]]
        yield np.unique(of_text), np.unique(values[value_starts[text] : value_starts[text + 1]])


def jaccard(first: Hashes, second: Hashes) -> float:
    """The Jaccard similarity of two sorted arrays of distinct hashes, 0 for two empty ones."""
    common = _common(first, second)
    return common / max(len(first) + len(second) - common, 1)


def verify(
    files: SourceFiles,
    pairs: Sequence[Path],
    part: tuple[int, int],
    wanted: Path,
    runs: Path,
    threshold: float,
    out: Path,
) -> Counts:
    """Write the pairs of a part (number, parts) that reach `threshold`, and what they are.

    `out` (.npz): pairs (n, 2) int64, the longer one first; jaccard (n,) float32; is_duplicate (n,)
    bool, whether the second has no value that the first one lacks.
    """
    chosen = _pairs_of_part(pairs, *part)
    reader = _RunReader(files, wanted, runs)
    keep, similarity, is_duplicate = [], [], []
    previous = -1
    for row, (first, second) in enumerate(chosen.tolist()):
        if first != previous:
            first_runs, first_values = reader.read(first)
            previous = first
        second_size = reader.number_of_runs(second)
        small, large = sorted((len(first_runs), second_size))
        if small < threshold * large:
            continue
        second_runs, second_values = reader.read(second)
        found = jaccard(first_runs, second_runs)
        if found >= threshold:
            keep.append(row)
            similarity.append(found)
            is_duplicate.append(_common(first_values, second_values) == len(second_values))
    np_keep = np.array(keep, np.int64)
    with whole_file(out) as file:
        np.savez(
            file,
            pairs=chosen[np_keep],
            jaccard=np.array(similarity, np.float32),
            is_duplicate=np.array(is_duplicate, np.bool_),
        )
    duplicates = sum(is_duplicate)
    return {
        "pairs": len(chosen),
        "similar": len(keep),
        "duplicates": duplicates,
        "other_values": len(keep) - duplicates,
    }


class _RunReader:
    """The runs and values of documents, read from `write_runs`'s files by position."""

    def __init__(self, files: SourceFiles, wanted: Path, runs: Path) -> None:
        self.starts = files.starts
        self.wanted = files.of(wanted, ".npy")
        self.values = files.of(runs, ".values")
        self.run_starts = files.of(runs, ".starts.npy")
        self._loaded: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def read(self, position: int) -> tuple[Hashes, Hashes]:
        file, begin, middle, end = self._place(position)
        values = np.fromfile(self.values[file], np.uint64, end - begin, offset=8 * begin)
        return values[: middle - begin], values[middle - begin :]

    def number_of_runs(self, position: int) -> int:
        _, begin, middle, _ = self._place(position)
        return middle - begin

    def _place(self, position: int) -> tuple[int, int, int, int]:
        file = bisect_right(self.starts, position) - 1
        if file not in self._loaded:
            numbers = np.flatnonzero(map_array(self.wanted[file]))
            self._loaded[file] = numbers, np.load(self.run_starts[file])
        numbers, starts = self._loaded[file]
        row = 2 * int(np.searchsorted(numbers, position - self.starts[file]))
        begin, middle, end = starts[row : row + 3].tolist()
        return file, begin, middle, end


def _pairs_of_part(paths: Sequence[Path], part: int, parts: int) -> NDArray[np.int64]:
    """The distinct pairs that fall into a part by their hash, in ascending order."""
    found = [np.zeros((0, 2), np.int64)]
    for block in _pair_blocks(paths):
        hashes = mix(mix(block[:, 0].astype(np.uint64)) + block[:, 1].astype(np.uint64))
        found.append(block[hashes % np.uint64(parts) == np.uint64(part)])
    return distinct_pairs(np.concatenate(found))


def _values(words: Words) -> tuple[Hashes, NDArray[np.int64]]:
    """Every word with a digit and the word before it as one hash, and where each text's begin."""
    before = np.zeros(len(words.hashes), np.uint64)
    before[1:] = words.hashes[:-1]
    # The first word of a text has none before it.
    before[words.starts[:-1][words.starts[:-1] < len(before)]] = 0
    hashes = mix(mix(before) + words.hashes)
    found = np.flatnonzero(words.numbers)
    return hashes[found], np.searchsorted(found, words.starts)


def _common(first: Hashes, second: Hashes) -> int:
    """The number of hashes that two sorted arrays of distinct ones share."""
    if len(first) < len(second):
        first, second = second, first
    if not len(second):
        return 0
    places = np.searchsorted(first, second)
    places[places == len(first)] = 0
    return int((first[places] == second).sum())
