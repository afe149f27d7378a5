"""Copy-forward: paragraphs that a subject's note repeats from an earlier note of that subject.

A paragraph is what stands between blank lines. Of a paragraph of some length that several notes of
one subject and source hold, the earliest note keeps it and the others lose it, with the blank lines
after it; all other characters stay as they are. Notes are in the order of `charttime`, at one time
(discharge summaries bear a date only) of `note_seq`, then of the file; those without a time come
last. An admission does not matter, so notes without one count as well. Paragraphs are the same when
they are equal but for case and white space; a repetition within one note stays.

Memory: some 120 bytes for each of 524,288 paragraphs, whatever the number of notes.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.arrays import map_raw, raw_files
from data_prep.document import Document
from data_prep.split import group_key

RECORD = np.dtype([("key", "<u8"), ("order", "<i8"), ("note", "<i8"), ("paragraph", "<i8")])
# Paragraphs compared at a time, at some 120 bytes each.
PART_RECORDS = 1 << 19
# Above every time of 14 digits (year to second), and above every note_seq; together 63 bits.
_NO_TIME = 10**14
_SEQUENCES = 1 << 16
_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a text with the white space around them; together they are the text."""
    bounds = [0, *(match.end() for match in _BLANK_LINES.finditer(text)), len(text)]
    parts = [text[begin:end] for begin, end in pairwise(bounds)]
    return [part for part in parts if part]


def place_in_time(charttime: str | None, sequence: int | None) -> int:
    """A number that sorts a subject's notes: by time, then by `note_seq`; missing ones last."""
    time = _NO_TIME if charttime is None else int(re.sub(r"\D", "", charttime).ljust(14, "0"))
    return time * _SEQUENCES + (
        _SEQUENCES - 1 if sequence is None else min(sequence, _SEQUENCES - 2)
    )


def write_paragraphs(
    documents: Iterator[Document],
    stays: NDArray[np.bool_],
    begin: int,
    minimum_characters: int,
    out: Path,
) -> dict[str, int]:
    """Write a RECORD (raw) for each paragraph that may be copied.

    stays: which documents of the file count; begin: the position of its first document;
    minimum_characters: of a paragraph, white space not counted.
    """
    written = 0
    with raw_files(out) as writer:
        for number, document in enumerate(documents):
            if not stays[number]:
                continue
            order = place_in_time(document.meta["charttime"], document.meta["note_seq"])
            subject = group_key(document.group).to_bytes(8, "little")
            found = [
                (_key(subject, words), order, begin + number, place)
                for place, words in enumerate(map(_words, paragraphs(document.text)))
                if len(words) - words.count(b" ") >= minimum_characters
            ]
            writer.append(np.array(found, RECORD))
            written += len(found)
    return {"paragraphs": written}


def parts_of(files: Sequence[Path], part_records: int) -> int:
    """The number of parts, of so many paragraphs each, in which those of `files` are compared."""
    return -(-sum(len(map_raw(path, RECORD)) for path in files) // part_records) or 1


def copied(files: Sequence[Path], part: int, parts: int) -> NDArray[np.int64]:
    """The paragraphs to drop, (n, 2) int64: position of the note, number of the paragraph.

    files: what `write_paragraphs` wrote for the files of a source. Paragraphs are compared in
    parts, by their hash; this is number `part` of `parts`. In ascending order.
    """
    chosen = [np.zeros(0, RECORD)]
    for path in files:
        file = map_raw(path, RECORD)
        chosen.append(np.array(file[file["key"] % np.uint64(parts) == np.uint64(part)]))
    here = np.concatenate(chosen)
    here = here[np.lexsort((here["note"], here["order"], here["key"]))]
    is_new = np.ones(len(here), np.bool_)
    is_new[1:] = here["key"][1:] != here["key"][:-1]
    first = np.maximum.accumulate(np.where(is_new, np.arange(len(here)), 0))
    gone = here[here["note"] != here["note"][first]]
    drops = np.stack([gone["note"], gone["paragraph"]], axis=1)
    return drops[np.lexsort((drops[:, 1], drops[:, 0]))]


def without(text: str, dropped: Sequence[int]) -> str:
    """`text` without the paragraphs of these numbers; empty when nothing but space is left."""
    gone = set(dropped)
    kept = "".join(part for number, part in enumerate(paragraphs(text)) if number not in gone)
    return kept if kept.strip() else ""


def _words(paragraph: str) -> bytes:
    return " ".join(paragraph.casefold().split()).encode("utf-8", "replace")


def _key(subject: bytes, words: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(words, digest_size=8, key=subject).digest(), "little")
