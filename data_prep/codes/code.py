"""A code and what its table says of it, whatever the table."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from re import Pattern
from typing import Any


@dataclass(frozen=True)
class Code:
    """One code of one edition of one table.

    system, kind: what the code belongs to, such as `icd9cm` and `procedure`; the same characters
    are another code elsewhere.
    prefix: how ids begin, such as `icd9cm-sg`; one for each (system, kind).
    code: without a dot, a string always: read as a number it would lose its zeros.
    shown: as people write it (`S72.001A`, `00071-0155-23`).
    category: the part of the classification it stands in, such as `S72`.
    group: what a split may not cut; the same for one code in the tables of several publishers.
    parents: (shown, title) of the headings above it, the outermost first; those of ICD codes are
    other codes of the table, all others are columns of its own row.
    details: (name, value) of what else the table says in a few words.
    definition: a sentence or more on what it means.
    meta: of this system only, added to the document's.
    """

    system: str
    kind: str
    prefix: str
    code: str
    shown: str
    title: str
    category: str
    group: str
    billable: bool | None = None
    parents: tuple[tuple[str, str], ...] = ()
    details: tuple[tuple[str, str], ...] = ()
    definition: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A kind of table: how its file is called, and what reads it.

    source: the source of its documents.
    name: matches the file's name (without .gz).
    version: searched in the last parts of the path, file name included; its group 1 is the edition.
    read: the codes of a file with their line numbers, in its order; raises InputError.
    """

    source: str
    name: Pattern[str]
    version: Pattern[str] | None
    read: Callable[[Path], Iterator[tuple[int, Code]]]


def detail(name: str, value: str) -> tuple[tuple[str, str], ...]:
    """The detail `name`, or none where the table leaves its value out."""
    return ((name, value),) if value else ()


def group_of_text(prefix: str, text: str) -> str:
    """A group for codes that say the same of `text`, where a table has no categories."""
    digest = hashlib.blake2b(text.casefold().encode(), digest_size=8).hexdigest()
    return f"{prefix}-{digest}"
