"""What the data card says of texts: one pass over a file of kept documents, counts only.

`python -m data_prep` makes it a stage, a task a file: so it runs wherever and as parallel as the
other stages do, is done once, and a page is drawn in seconds however large the corpus is. Memory
holds a batch of documents and one number for each year, type, language and group of terms.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.files import write_json
from data_prep.card.terms import MODALITIES, REGIONS, SERVICES, TOPICS
from data_prep.document import Document, read_documents

UNKNOWN = "not stated"
OTHER = "other"
DECADES = (*(f"{first} to {first + 9}" for first in range(0, 90, 10)), "90 or more")
_NOTE_NUMBERS = ((1, "1st"), (5, "2nd to 5th"), (20, "6th to 20th"))
_HEADING_BYTES = 4000

# Lower case; all ASCII that is neither letter nor digit is space.
_WORD_BYTES = bytes(
    byte if bytes([byte]).isalnum() or byte >= 128 else 32 for byte in bytes(range(256)).lower()
)
_YEARS = frozenset((b"year", b"years", b"yr", b"yrs", b"y"))
_OLD = frozenset((b"old", b"o"))
_AGE_MARKS = _OLD | {b"aged"}
_SERVICE = re.compile(rb"^Service:[^\S\n]*(.*)$", re.MULTILINE | re.IGNORECASE)
_SEX = re.compile(rb"\bSex:[^\S\n]*([MF])\b", re.IGNORECASE)
_EXAMINATION = re.compile(
    rb"^[^\S\n]*(?:EXAMINATION|EXAM|STUDY|IMAGE):[^\S\n]*(\S.*)$", re.MULTILINE | re.IGNORECASE
)
_FIRST_LINE = re.compile(rb"\S.*")


class TermIndex:
    """The terms of `topics`, found in the words of a text in one pass over them."""

    def __init__(self, topics: dict[str, dict[str, tuple[str, ...]]]) -> None:
        self._words: dict[bytes, set[tuple[str, str]]] = {}
        self._phrases: dict[bytes, list[tuple[bytes, tuple[str, str]]]] = {}
        for topic, groups in topics.items():
            for group, terms in groups.items():
                for term in terms:
                    first, *more = term.encode().split()
                    if more:
                        phrase = b" " + term.encode() + b" "
                        self._phrases.setdefault(first, []).append((phrase, (topic, group)))
                    else:
                        self._words.setdefault(first, set()).add((topic, group))
        self._triggers = frozenset([*self._words, *self._phrases])

    def find(self, words: Sequence[bytes]) -> set[tuple[str, str]]:
        """The (topic, group) of every term among `words`."""
        present = self._triggers.intersection(words)
        found: set[tuple[str, str]] = set()
        for word in present:
            found |= self._words.get(word, set())
        firsts = present & self._phrases.keys()
        if firsts:
            text = b" " + b" ".join(words) + b" "
            for word in firsts:
                found |= {group for phrase, group in self._phrases[word] if phrase in text}
        return found


_TERMS = TermIndex(TOPICS)


def write_statistics(documents: Path, out: Path) -> dict[str, int]:
    """Count what the documents of a file say into `out` (JSON); returns documents and words.

    `totals`: documents, characters, words (runs of letters and digits); `breakdowns`: name -> value
    -> documents. Values are numbers, codes of closed vocabularies and names from
    `data_prep.card.terms`, never words of a text.
    """
    totals: Counter[str] = Counter(documents=0, characters=0, words=0)
    breakdowns: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for document in read_documents(documents):
        words = document.text.encode("utf-8", "replace").translate(_WORD_BYTES).split()
        totals["documents"] += 1
        totals["characters"] += len(document.text)
        totals["words"] += len(words)
        for name, value in [*_said(document, words), *_described(document)]:
            breakdowns[name][value] += 1
    write_json(out, {"totals": totals, "breakdowns": breakdowns})
    return {"documents": totals["documents"], "words": totals["words"]}


def stated_age(words: Sequence[bytes]) -> int | None:
    """The first age in years among the words of a text: "55-year-old", "55 y/o", "aged 55"."""
    # Few texts get any further, and so most are not walked word by word.
    if not _AGE_MARKS.intersection(words):
        return None
    for before, word, after in zip(words, words[1:], [*words[2:], b""], strict=False):
        if word in _YEARS and after in _OLD and before.isdigit() and len(before) <= 3:
            return int(before)
        if before == b"aged" and word.isdigit() and len(word) <= 3:
            return int(word)
    return None


def _said(document: Document, words: Sequence[bytes]) -> list[tuple[str, str]]:
    """What is found in the text of prose; the text of a code is a title."""
    describe = _TEXTS_OF.get(document.source)
    if describe is None:
        return []
    found = [(topic, group) for topic, group in _TERMS.find(words)]
    age = stated_age(words)
    if age is not None:
        found.append(("stated age", DECADES[min(age // 10, len(DECADES) - 1)]))
    return found + describe(document)


def _abstract(document: Document) -> list[tuple[str, str]]:
    return []


def _discharge(document: Document) -> list[tuple[str, str]]:
    head = document.text[:_HEADING_BYTES].encode("utf-8", "replace")
    service, sex = _SERVICE.search(head), _SEX.search(head)
    return [
        ("service", _name_of(service[1], SERVICES) if service else UNKNOWN),
        ("sex in the heading", sex[1].decode().upper() if sex else UNKNOWN),
    ]


def _radiology(document: Document) -> list[tuple[str, str]]:
    content = document.text.encode("utf-8", "replace")
    line = _EXAMINATION.search(content)
    words = line[1] if line else _FIRST_LINE.search(content)[0]  # type: ignore[index]
    return [("modality", _name_of(words, MODALITIES)), ("region", _name_of(words, REGIONS))]


_TEXTS_OF: dict[str, Callable[[Document], list[tuple[str, str]]]] = {
    "pubmed": _abstract,
    "discharge": _discharge,
    "radiology": _radiology,
}


def _name_of(line: bytes, names: Sequence[tuple[str, tuple[str, ...]]]) -> str:
    """The first of `names` with a word of the line; OTHER for any other line."""
    words = {word.decode("utf-8", "replace") for word in line.translate(_WORD_BYTES).split()}
    return next((name for name, known in names if words.intersection(known)), OTHER)


def _described(document: Document) -> list[tuple[str, str]]:
    """What is known of the document beside its text."""
    meta = document.meta
    if document.source == "pubmed":
        return _article(meta)
    if "note_type" in meta:
        return _note(meta)
    billable = {True: "billable code", False: "heading", None: UNKNOWN}[meta["billable"]]
    version = meta["version"] or "no edition stated"
    return [("table", f"{meta['system']} {meta['kind']}, {version}"), ("entry", billable)]


def _article(meta: dict[str, Any]) -> list[tuple[str, str]]:
    content = "title and abstract" if meta["has_abstract"] else "title only"
    return [
        ("publication year", str(meta["year"] or UNKNOWN)),
        *(("article type", name) for name in sorted(set(meta["publication_types"]))),
        ("language of the text", meta.get("language") or "not identified"),
        *(("language of the article", name) for name in sorted(set(meta["languages"]))),
        ("content", meta.get("part", content).replace("_", " ")),
    ]


def _note(meta: dict[str, Any]) -> list[tuple[str, str]]:
    kind = meta["note_type"]
    number = meta["note_seq"]
    place = "21st or later" if number is not None else UNKNOWN
    for last, name in reversed(_NOTE_NUMBERS):
        if number is not None and number <= last:
            place = name
    return [
        # A column of MIMIC with two letters; anything else is not shown.
        ("note type", kind if re.fullmatch("[A-Z]{2}", kind) else OTHER),
        ("number of the note", place),
        ("admission", "of an admission" if meta["admission"] else "without one"),
    ]
