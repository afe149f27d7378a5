"""Exact deduplication: of the documents of a source that say the same, the first one stays.

Two notes or abstracts say the same when they are equal but for case and white space; numbers and
punctuation count. Code descriptions are compared as they are, their code included, because two
codes with one title are two codes. Of every document 16 bytes of hash are kept, never the text.
"""

import hashlib
import unicodedata
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from data_prep.document import Document

# Texts in sentences; all other sources describe codes, and their texts hold the code.
PROSE = ("pubmed", "discharge", "radiology")
# What stands for a document that is left out already.
LEFT_OUT = -1
# Digests compared at a time: what bounds the memory, at some 60 bytes a digest.
PART_DIGESTS = 1 << 19


def digests(documents: Iterable[Document]) -> NDArray[np.uint64]:
    """What documents say, as hashes, (documents, 2) uint64."""
    content = b"".join(_digest(document) for document in documents)
    return np.frombuffer(content, "<u8").reshape(-1, 2)


def parts_of(documents: int, part_digests: int) -> int:
    """The number of parts, of so many digests each, in which `documents` are compared."""
    return -(-documents // part_digests) or 1


def copies_in_part(
    files: Iterable[NDArray[np.uint64]],
    considered: Iterable[NDArray[np.bool_]],
    part: int,
    parts: int,
) -> tuple[NDArray[np.int64], int]:
    """The documents that repeat an earlier one, and how many were compared.

    files: digests (n, 2), which may be mapped from disk; a position counts over all files in their
    order. considered: which documents count, (n,) bool. Digests are compared in parts, by their
    value; this is number `part` of `parts`.
    Copies: (copies, 2) int64, the position of the document and that of the first one that says the
    same, in ascending order. Memory: 60 bytes for each digest of the part.
    """
    positions, values = _part_of(files, considered, np.uint64(part), np.uint64(parts))
    # Stable: equal digests stay in the order of the documents.
    order = np.lexsort((values[:, 1], values[:, 0]))
    values, positions = values[order], positions[order]
    is_new = np.ones(len(values), np.bool_)
    is_new[1:] = (values[1:] != values[:-1]).any(axis=1)
    of_kind = np.maximum.accumulate(np.where(is_new, np.arange(len(values)), 0))
    copies = np.stack([positions, positions[of_kind]], axis=1)[~is_new]
    return copies[np.argsort(copies[:, 0])], len(positions)


def first_of_file(
    considered: NDArray[np.bool_], begin: int, copies: Iterable[NDArray[np.int64]]
) -> NDArray[np.int64]:
    """For each document of a file the position of the first that says the same, (n,) int64.

    considered: (n,) bool; the others get LEFT_OUT. begin: the position of the file's first
    document; copies: those of every part.
    """
    first = np.where(considered, np.arange(begin, begin + len(considered)), LEFT_OUT)
    for part in copies:
        here = np.array(part[slice(*np.searchsorted(part[:, 0], [begin, begin + len(first)]))])
        first[here[:, 0] - begin] = here[:, 1]
    return first


def _part_of(
    files: Iterable[NDArray[np.uint64]],
    considered: Iterable[NDArray[np.bool_]],
    part: np.uint64,
    parts: np.uint64,
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """The digests that fall into a part, with their positions over all files.

    Files are asked for one after another, so that those before need not stay mapped.
    """
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
