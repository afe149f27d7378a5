"""HCPCS Level II: CMS's alphanumeric file (`HCPC2026_JUL_ANWEB.txt` and the like).

Fixed columns: code [0:5] (a modifier has three blanks and two characters), sequence number [5:10],
record type [10], text [11:91], short title [91:119]. Type 3 begins a code and 4 continues its text,
7 begins a modifier and 8 continues it. Lines before the first record are notices.

Modifiers are kept, as a kind of their own: notes and bills are full of them (`RT`, `LT`), and their
descriptions are nowhere else. CPT (Level I) is not in the file.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from data_prep.codes.code import Code, Table, detail
from data_prep.codes.files import lines, problem
from data_prep.text import normalise

_NAME = re.compile(
    r"HCPC(\d{4}(?:_(?:JAN|APR|JUL|OCT))?)_(?:[A-Z0-9]+_)??ANWEB\w*\.txt", re.IGNORECASE
)
_RECORD = re.compile(
    r"(?P<code>[A-Z]\d{4}|   [0-9A-Z]{2})\d{5}(?P<type>[3478])(?P<text>.{0,80})(?P<short>.{0,28}).*"
)
_FIRST = {"3": "procedure", "7": "modifier"}
_CONTINUED = {"4": "procedure", "8": "modifier"}


def hcpcs_code(kind: str, code: str, text: str, short: str) -> Code:
    """A code (`procedure`) or a `modifier`, with its short title as a detail where it differs."""
    short = normalise(short)
    title = normalise(text) or short
    is_modifier = kind == "modifier"
    prefix = "hcpcs-mod" if is_modifier else "hcpcs"
    category = code[:1] if is_modifier else code[:3]
    return Code(
        system="hcpcs",
        kind=kind,
        prefix=prefix,
        code=code,
        shown=code,
        title=title,
        category=category,
        group=f"{prefix}-{category}",
        details=detail("Short title", short) if short != title else (),
    )


def join(chunks: list[str]) -> str:
    """The text of a record's lines: they break between words, or after a hyphen or stroke."""
    text = ""
    for chunk in map(str.strip, chunks):
        glued = re.search(r"\w[-/]$", text) and re.match(r"\w", chunk)
        text += chunk if glued or not text else f" {chunk}"
    return text


def _read(path: Path) -> Iterator[tuple[int, Code]]:
    first, kind, code, short = 0, "", "", ""
    chunks: list[str] = []
    for number, line in lines(path, _NAME, "latin-1"):
        match = _RECORD.fullmatch(line)
        if match is None:
            if not code:
                continue
            raise problem(path, number, "no record of an ANWEB file")
        found, record = match["code"].strip(), match["type"]
        if record in _FIRST:
            if code:
                yield first, hcpcs_code(kind, code, join(chunks), short)
            first, kind, code, short = number, _FIRST[record], found, match["short"]
            chunks = [match["text"]]
        elif (found, _CONTINUED[record]) == (code, kind):
            chunks.append(match["text"])
        else:
            raise problem(path, number, "a record that continues another code than the one before")
    if code:
        yield first, hcpcs_code(kind, code, join(chunks), short)


TABLES = {"hcpcs": Table("hcpcs", _NAME, _NAME, _read)}
