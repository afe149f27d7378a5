"""Decontamination: documents that hold a part of an evaluation set.

A document overlaps with a set when it shares a run of `words` words (13 in GPT-3's appendix C;
case and punctuation do not count, so tokenised texts match) or when it is an article whose PMID the
set names. Of the sets 64-bit hashes are kept, 17 bytes a word of theirs; of the corpus nothing is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.files import whole_file
from data_prep.document import Document, InputError
from data_prep.evaluation_texts import evaluation_texts
from data_prep.minhash import batches
from data_prep.stages import Counts
from data_prep.words import Hashes, Words, hash_runs, hash_words


@dataclass(frozen=True)
class EvaluationFile:
    """A file of an evaluation set: `number` of the set, its format and the fields to read."""

    number: int
    path: Path
    format: str
    fields: tuple[str, ...]


@dataclass(frozen=True)
class Index:
    """What evaluation sets hold: ascending hashes of runs of `words` words, ascending PMIDs.

    Beside each, as bits, the sets it is in: (n,) uint64.
    """

    words: int
    runs: Hashes
    run_sets: NDArray[np.uint64]
    pmids: NDArray[np.uint64]
    pmid_sets: NDArray[np.uint64]

    def sets_of(self, documents: Sequence[Document], words: Words) -> NDArray[np.uint64]:
        """The sets that each document overlaps with, as bits; `words` are the documents'."""
        found = np.zeros(len(documents), np.uint64)
        runs, starts = hash_runs(words, self.words)
        maybe = np.flatnonzero(self._filter[runs >> self._shift])
        texts = np.searchsorted(starts, maybe, side="right") - 1
        # A text of fewer words has a run too, but a shorter one.
        is_long = np.diff(words.starts)[texts] >= self.words
        maybe, texts = maybe[is_long], texts[is_long]
        np.bitwise_or.at(found, texts, _look_up(self.runs, self.run_sets, runs[maybe]))
        articles = [n for n, document in enumerate(documents) if document.source == "pubmed"]
        pmids = [int(documents[n].id.removeprefix("pubmed-")) for n in articles]
        found[articles] |= _look_up(self.pmids, self.pmid_sets, np.array(pmids, np.uint64))
        return found

    @cached_property
    def _bits(self) -> int:
        return max(16, (16 * len(self.runs)).bit_length())

    @property
    def _shift(self) -> np.uint64:
        return np.uint64(64 - self._bits)

    @cached_property
    def _filter(self) -> NDArray[np.bool_]:
        """Whether any run's hash begins with these bits: asks most runs in one step."""
        table = np.zeros(1 << self._bits, np.bool_)
        table[self.runs >> self._shift] = True
        return table


@dataclass
class _Parts:
    values: list[NDArray[np.uint64]] = field(default_factory=list)
    sets: list[NDArray[np.uint64]] = field(default_factory=list)

    def add(self, values: NDArray[np.uint64], number: int) -> None:
        self.values.append(values)
        self.sets.append(np.full(len(values), 1 << number, np.uint64))

    def merged(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """The distinct values in ascending order, and their sets."""
        if not self.values:
            return np.zeros(0, np.uint64), np.zeros(0, np.uint64)
        values, place = np.unique(np.concatenate(self.values), return_inverse=True)
        sets = np.zeros(len(values), np.uint64)
        np.bitwise_or.at(sets, place, np.concatenate(self.sets))
        return values, sets


def write_index(
    files: Sequence[EvaluationFile], names: Sequence[str], words: int, out: Path
) -> Counts:
    """Write the index of `files` to `out` (.npz); counts texts, PMIDs, words by set name.

    Texts of fewer than `words` words cannot be found by their words, and are counted as
    `too_short`. Raises InputError for a set that holds neither a text nor a PMID.
    """
    runs, pmids = _Parts(), _Parts()
    counts = {
        f"{name} {kind}": 0 for name in names for kind in ("texts", "too_short", "pmids", "runs")
    }
    for file in files:
        name = names[file.number]
        found = list(evaluation_texts(file.path, file.format, file.fields))
        known = {pmid for pmid, _ in found if pmid is not None}
        pmids.add(np.array(sorted(known), np.uint64), file.number)
        counts[f"{name} pmids"] += len(known)
        texts = [(number, text) for number, (_, text) in enumerate(found) if text.strip()]
        counts[f"{name} texts"] += len(texts)
        if not (texts or known):
            raise InputError(f"{file.path} holds neither a text nor a PMID; check its format")
        for batch in batches(texts):
            hashed = hash_words([text for _, text in batch], whole_values=False)
            long = np.diff(hashed.starts) >= words
            values, starts = hash_runs(hashed, words)
            values = np.unique(values[np.repeat(long, np.diff(starts))])
            runs.add(values, file.number)
            counts[f"{name} runs"] += len(values)
            counts[f"{name} too_short"] += int((~long).sum())
    found_runs, run_sets = runs.merged()
    found_pmids, pmid_sets = pmids.merged()
    with whole_file(out) as stream:
        np.savez(
            stream,
            words=np.int64(words),
            runs=found_runs,
            run_sets=run_sets,
            pmids=found_pmids,
            pmid_sets=pmid_sets,
        )
    return counts


def load_index(path: Path) -> Index:
    """The index that `write_index` wrote."""
    arrays = dict(np.load(path))
    return Index(words=int(arrays.pop("words")), **arrays)


def _look_up(
    known: NDArray[np.uint64], sets: NDArray[np.uint64], values: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """The sets of each of `values`, 0 for those that are not `known`."""
    if not len(known):
        return np.zeros(len(values), np.uint64)
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return np.where(known[places] == values, sets[places], np.uint64(0))
