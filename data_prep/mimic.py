"""MIMIC-IV-Note: `discharge.csv.gz` and `radiology.csv.gz` to one document a note.

The text of a note never reaches a log or an exception: errors name the file, the record's number
and lengths.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data_prep.document import Document


def documents(path: Path, source: str, counts: Counter[str] | None = None) -> Iterator[Document]:
    """A document for each note of `path`, a CSV file (RFC 4180), plain or gzip.

    source: `discharge` or `radiology`. The text is unchanged but for CRLF, which becomes LF.
    id is `<source>-<hash of note_id>`, group `subject-<hash of subject_id>`, so that the notes of
    one subject share a group across both files; a hash is 16 hexadecimal digits of BLAKE2b.
    meta: `note_type`, `note_seq` (int), `chart_year` (int or None, shifted by MIMIC),
    `admission` (hash of hadm_id, None where it is missing), `characters`.
    `counts` gets `documents`, `records` and `without_text` added.
    Raises InputError for a missing column, a damaged or truncated file, a malformed record and,
    when the file has been read to its end, a note_id that occurs twice.
    """
    raise NotImplementedError
