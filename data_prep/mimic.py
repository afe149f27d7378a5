"""MIMIC-IV-Note: `discharge.csv.gz` and `radiology.csv.gz` to one document a note.

The text of a note never reaches a log or an exception: errors name the file, the record's number
and lengths. They are raised outside the handlers of what caused them, because a decoding error
carries the bytes it failed on, and Python would keep it as the context of ours; and loops let go
of a row before they ask for the next, because some loggers print a failing step's local variables.
"""

import array
import csv
import gzip
import hashlib
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np

from data_prep.document import Document, InputError
from data_prep.text import normalise_note

SOURCES = ("discharge", "radiology")
_COLUMNS = ("note_id", "subject_id", "hadm_id", "note_type", "note_seq", "charttime", "text")
# The release's page says 331,794 discharge summaries, and the checks of the MIT-LCP code 331,793.
_PUBLISHED_NOTES = {"discharge": (331_793, 331_794), "radiology": (2_321_355,)}
_NOTES_OF_2_1 = {"discharge": 357_289, "radiology": 2_471_881}
_REDACTED = re.compile(r"(?<!_)___(?!_)")
_TIME = re.compile(r"\d{4}-[01]\d-[0-3]\d( [0-2]\d:[0-5]\d:[0-5]\d)?")
_COLUMN_NAME = re.compile(r"[a-z_]{1,30}")
# Python's own limit for a field is 128 KiB; a discharge summary may be longer.
_LONGEST_FIELD = min(sys.maxsize, 2**31 - 1)


def documents(
    path: Path,
    source: str,
    counts: Counter[str] | None = None,
    *,
    redaction: str | None = None,
) -> Iterator[Document]:
    """A document for each note of `path`, a CSV file (RFC 4180), plain or gzip.

    source: `discharge` or `radiology`. The text is unchanged but for CRLF, which becomes LF, and,
    with `redaction`, for MIMIC's mark of something removed: exactly three underscores, `___`, which
    become that text. Longer and shorter runs are lines to fill in or rules, and stay.
    id is `<source>-<hash of note_id>`, group `subject-<hash of subject_id>`, so that the notes of
    one subject share a group across both files; a hash is 16 hexadecimal digits of BLAKE2b. The
    hashes keep identifiers out of file names and reports; they are no protection against somebody
    who has MIMIC's identifiers.
    meta: `note_type`, `note_seq` (int or None), `charttime` (as MIMIC writes it, shifted by subject
    for all of their notes alike; None for anything that is no time),
    `admission` (hash of hadm_id, None where it is missing), `characters`.
    `counts` gets added: `records` = `documents` + `without_text` (white space only).
    Raises InputError for a missing column, a damaged or truncated file, a malformed record and,
    when the file has been read to its end, a note_id that occurs twice.
    """
    if source not in SOURCES:
        raise ValueError(f"source must be one of {SOURCES}, not {source!r}")
    counts = Counter() if counts is None else counts
    hashes = array.array("Q")  # 8 bytes a note; a set would take ten times that
    for record in _records(path):
        counts["records"] += 1
        hashes.append(int(_hash(record["note_id"]), 16))
        if record["text"].strip():
            counts["documents"] += 1
            yield _document(record, source, redaction)
        else:
            counts["without_text"] += 1
        del record
    _check_distinct(path, hashes)


def count_problem(source: str, notes: int) -> str | None:
    """What is odd about so many notes of `source`, or None for as many as MIMIC-IV-Note 2.2 has."""
    expected = _PUBLISHED_NOTES[source]
    if notes in expected:
        return None
    version = "2.1's" if notes == _NOTES_OF_2_1[source] else "a part or another version's"
    published = " or ".join(f"{count:,}" for count in expected)
    return f"{source} has {notes:,} notes where MIMIC-IV-Note 2.2 has {published}: {version}"


def _document(record: dict[str, str], source: str, redaction: str | None) -> Document:
    text = normalise_note(record["text"])
    if redaction is not None:
        text = _REDACTED.sub(lambda _: redaction, text)
    return Document(
        id=f"{source}-{_hash(record['note_id'])}",
        source=source,
        group=f"subject-{_hash(record['subject_id'])}",
        text=text,
        meta={
            "note_type": record["note_type"],
            "note_seq": int(record["note_seq"]) if record["note_seq"].isdecimal() else None,
            "charttime": record["charttime"] if _TIME.fullmatch(record["charttime"]) else None,
            "admission": _hash(record["hadm_id"]) if record["hadm_id"] else None,
            "characters": len(text),
        },
    )


def _records(path: Path) -> Iterator[dict[str, str]]:
    """Each record as {column: value}, values as they stand in the file."""
    rows = _rows(path)
    header = next(rows, [])
    _check_header(path, header)
    for number, row in enumerate(rows, start=1):
        if row:  # csv gives an empty line as no fields
            problem = _problem(header, row)
            if problem:
                row.clear()
                raise InputError(
                    f"{path}: record {number} {problem}; the file is not the CSV that PhysioNet "
                    "serves, fetch it again"
                )
            yield dict(zip(header, row, strict=True))
        del row


def _problem(header: list[str], row: list[str]) -> str:
    """What is wrong with a row, in words that hold nothing of it."""
    if len(row) != len(header):
        return f"has {len(row)} fields where the header has {len(header)}"
    for name in ("note_id", "subject_id"):
        if not row[header.index(name)].strip():
            return f"has no {name}"
    return ""


def _rows(path: Path) -> Iterator[list[str]]:
    """The rows of a CSV file; an InputError without context where it cannot be read."""
    csv.field_size_limit(_LONGEST_FIELD)
    problem = ""
    line = 0
    try:
        with _open(path) as stream:
            reader = csv.reader(stream, strict=True)
            for row in reader:
                yield row
                del row
                line = reader.line_num
    except (EOFError, gzip.BadGzipFile, zlib.error):
        problem = "is a damaged or truncated gzip file"
    except UnicodeDecodeError:
        problem = f"is not UTF-8 text after line {line}"
    except csv.Error:
        problem = f"is malformed or cut short: the record that begins after line {line} is not CSV"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    if problem:
        raise InputError(f"{path} {problem}; fetch it again and compare its SHA256SUMS")


def _open(path: Path) -> TextIO:
    """The file's text with its line ends, unpacked where it is gzip by its magic bytes."""
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    if is_gzip:
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open("rt", encoding="utf-8-sig", newline="")


def _check_header(path: Path, header: list[str]) -> None:
    missing = [name for name in _COLUMNS if name not in header]
    if not missing and len(set(header)) == len(header):
        return
    expected = f"the columns {', '.join(_COLUMNS)} are expected"
    known = set(header) & set(_COLUMNS)
    # Without a header the first row is a note, and may not be shown.
    if not known or not all(_COLUMN_NAME.fullmatch(name) for name in header):
        problem = f"has no header in its first row ({len(header)} fields)"
    elif missing:
        problem = f"has no column {', '.join(missing)}, only {', '.join(header)}"
    else:
        problem = f"names a column twice in {', '.join(header)}"
    header.clear()
    raise InputError(f"{path} {problem}; {expected}, as MIMIC-IV-Note 2.2 has them")


def _check_distinct(path: Path, hashes: "array.array[int]") -> None:
    ordered = np.sort(np.frombuffer(hashes, dtype=np.uint64))
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise InputError(
            f"{path}: {len(twice)} records repeat a note_id (the first with hash {twice[0]:016x}); "
            "keep one of each, or fetch the file again"
        )


def _hash(identifier: str) -> str:
    return hashlib.blake2b(identifier.encode(), digest_size=8).hexdigest()
