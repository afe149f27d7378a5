"""Exact deduplication: of the documents of a source that say the same, the first one stays.

Two notes or abstracts say the same when they are equal but for case and white space; numbers and
punctuation count. Code descriptions are compared as they are, their code included, because two
codes with one title are two codes. Of every document 16 bytes of hash are kept, never the text.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.document import Document

# Texts in sentences; all other sources describe codes, and their texts hold the code.
PROSE = ("pubmed", "discharge", "radiology")
# What stands for a document that is left out already.
LEFT_OUT = -1
# Digests compared at a time: what bounds the memory, at some 60 bytes a digest.
_PART_DIGESTS = 1 << 23


def digests(documents: Iterable[Document]) -> NDArray[np.uint64]:
    """What documents say, as hashes, (documents, 2) uint64."""
    content = b"".join(_digest(document) for document in documents)
    return np.frombuffer(content, "<u8").reshape(-1, 2)


def first_occurrences(
    files: Sequence[NDArray[np.uint64]],
    considered: Sequence[NDArray[np.bool_]],
    part_digests: int = _PART_DIGESTS,
) -> list[NDArray[np.int64]]:
    """For each document of each file the position of the first one that says the same.

    files: digests (n, 2), which may be mapped from disk; a position counts over all files in their
    order. considered: which documents count, (n,) bool; the others get LEFT_OUT.

    Digests are compared in as many parts, by their value, as keep a part below `part_digests`.
    Memory is 60 bytes for each digest of a part, and 8 for each document.
    """
    sizes = [len(file) for file in files]
    first = np.full(sum(sizes), LEFT_OUT, np.int64)
    parts = np.uint64(-(-len(first) // part_digests) or 1)
    for part in range(int(parts)):
        positions, values = _part_of(files, considered, np.uint64(part), parts)
        # Stable: equal digests stay in the order of the documents.
        order = np.lexsort((values[:, 1], values[:, 0]))
        values, positions = values[order], positions[order]
        is_new = np.ones(len(values), np.bool_)
        is_new[1:] = (values[1:] != values[:-1]).any(axis=1)
        of_kind = np.maximum.accumulate(np.where(is_new, np.arange(len(values)), 0))
        first[positions] = positions[of_kind]
    return np.split(first, np.cumsum(sizes)[:-1]) if sizes else []


def _part_of(
    files: Sequence[NDArray[np.uint64]],
    considered: Sequence[NDArray[np.bool_]],
    part: np.uint64,
    parts: np.uint64,
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """The digests that fall into a part, with their positions over all files."""
    positions, values = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.uint64)]
    begin = 0
    for file, counts in zip(files, considered, strict=True):
        inside = np.flatnonzero((file[:, 0] % parts == part) & counts)
        positions.append(inside + begin)
        values.append(file[inside])
        begin += len(file)
    return np.concatenate(positions), np.concatenate(values)


def _digest(document: Document) -> bytes:
    text = document.text
    if document.source in PROSE:
        text = " ".join(unicodedata.normalize("NFC", text.casefold()).split())
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
