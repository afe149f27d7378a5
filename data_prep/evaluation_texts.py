"""Texts and PMIDs of evaluation sets, in the formats in which the field hands them round.

    lines          a text a line
    jsonl          a JSON object a line; the strings in its `fields`
    json_by_pmid   one JSON object, PMID -> object; the strings in its `fields` (PubMedQA)
    tokens         a token a line, its label after a tab (NER); the file is one text
    sections       `###PMID`, then _, tab, sentence (NICTA-PIBOSO, PubMed RCT)
    pubtator       `PMID|t|title`, `PMID|a|abstract`, annotations
    pmids          a PMID a line

Files are plain or gzip, by their first bytes.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.document import InputError

# A text with the PMID of its article, either of which may be missing.
Found = tuple[int | None, str]


def evaluation_texts(path: Path, kind: str, fields: Sequence[str]) -> Iterator[Found]:
    """What the file `path` of the format `kind` holds.

    Raises InputError, with the line's number, for a file that is not of that format.
    """
    readers = {
        "lines": lambda: ((None, line) for line in _lines(path)),
        "jsonl": lambda: _jsonl(path, fields),
        "json_by_pmid": lambda: _json_by_pmid(path, fields),
        "tokens": lambda: [(None, " ".join(line.split("\t")[0] for line in _lines(path)))],
        "sections": lambda: _sections(path),
        "pubtator": lambda: _pubtator(path),
        "pmids": lambda: (
            (_pmid(path, number, line), "") for number, line in enumerate(_lines(path), 1) if line
        ),
    }
    yield from readers[kind]()


def _jsonl(path: Path, fields: Sequence[str]) -> Iterator[Found]:
    for number, line in enumerate(_lines(path), 1):
        if line:
            entry = _json(path, f"line {number}", line)
            yield None, _strings(path, f"line {number}", entry, fields)


def _json_by_pmid(path: Path, fields: Sequence[str]) -> Iterator[Found]:
    entries = _json(path, "the file", "\n".join(_lines(path)))
    for name, entry in entries.items():
        if not isinstance(entry, dict):
            raise InputError(f"{path}: the entry {name[:20]!r} is no JSON object; check its format")
        yield _pmid(path, 0, name), _strings(path, f"entry {name}", entry, fields)


def _sections(path: Path) -> Iterator[Found]:
    pmid: int | None = None
    sentences: list[str] = []
    for number, line in enumerate(_lines(path), 1):
        if line.startswith("###"):
            yield pmid, "\n".join(sentences)
            pmid, sentences = _pmid(path, number, line[3:]), []
        elif line:
            _, tab, sentence = line.partition("\t")
            if not tab:
                raise InputError(f"{path}, line {number}: no label and tab; check its format")
            sentences.append(sentence)
    yield pmid, "\n".join(sentences)


def _pubtator(path: Path) -> Iterator[Found]:
    for number, line in enumerate(_lines(path), 1):
        pmid, bar, rest = line.partition("|")
        if bar and rest[:2] in ("t|", "a|"):
            yield _pmid(path, number, pmid), rest[2:]
        elif line and line.count("\t") < 3:
            raise InputError(f"{path}, line {number}: no line of PubTator; check its format")


def _lines(path: Path) -> Iterator[str]:
    problem = ""
    try:
        with path.open("rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"
        with (gzip.open if is_gzip else open)(path, "rt", encoding="utf-8-sig") as stream:
            for line in stream:
                yield line.strip("\r\n")
    except (EOFError, gzip.BadGzipFile, zlib.error):
        problem = "is a damaged or truncated gzip file; fetch it again"
    except UnicodeDecodeError:
        problem = "is not UTF-8 text"
    if problem:
        raise InputError(f"{path} {problem}")


def _json(path: Path, where: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path}: {where} is no JSON object; check its format")
    return found


def _strings(path: Path, where: str, entry: dict[str, Any], fields: Sequence[str]) -> str:
    """The strings in `fields`, which may hold lists of them, a line each."""
    found: list[str] = []
    for name in fields:
        value = entry.get(name)
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in values):
            known = ", ".join(sorted(map(str, entry)))
            raise InputError(f"{path}: {where} has no text {name!r}; it has {known}")
        found.extend(str(text) for text in values)
    return "\n".join(found)


def _pmid(path: Path, number: int, text: str) -> int:
    if not (text.strip().isascii() and text.strip().isdecimal()):
        where = f", line {number}" if number else ""
        raise InputError(f"{path}{where}: {text[:20]!r} is no PMID; check its format")
    return int(text)
