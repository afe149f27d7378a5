"""What a PubMed element says: the text of titles and sections, without what is no text.

The text of an element is all the text inside it (`itertext`: markup such as `<i>` goes, its text
stays where it stands), after `text.normalise`. Beyond that only this is taken away or changed:

* MathML. Publishers indent it, so that its plain text would be `V . O 2 m a x` over ten lines. A
  formula becomes the texts of its tokens (`mi`, `mn`, `mo`, `mtext`, `ms`) in their order, each
  without the white space round it, and a fraction's parts with `/` between them: `V.O2max`,
  `Cu2O`, `PO4-3`, `1/2`. So it reads like the same formula in `<sub>` and `<sup>`. The TeX or XML
  twin that `annotation` may hold is left out.
* The brackets round a translated title.
* The mark "(ABSTRACT TRUNCATED AT 250 WORDS)" at the end of a section.
* The publisher's copyright notice at the end of a section (`without_copyright`).
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from lxml import etree

from data_prep.text import normalise

_MATHML = "{http://www.w3.org/1998/Math/MathML}"
_MATHML_TOKENS = frozenset(f"{_MATHML}{name}" for name in ("mi", "mn", "mo", "mtext", "ms"))
_MATHML_TWINS = frozenset(f"{_MATHML}{name}" for name in ("annotation", "annotation-xml"))
# White space as MathML means it (3.0, 2.1.7): a no-break or thin space is text.
_MATHML_SPACE = " \t\r\n"
_TRUNCATION = re.compile(r"\(ABSTRACT TRUNCATED(?: AT \d+ WORDS)?\)$")
_TRUNCATION_ENDS = (" WORDS)", "TRUNCATED)")
_TRANSLATED = re.compile(r"\[(.+)\] ?([.?!]?)")
# Where a notice begins: with a sentence, by a mark and a year or by Wiley's formula.
_NOTICE = re.compile(
    r"(?:^|(?<=[.?!)\]])) ?"
    r"(?:(?:Copyright ?)?(?:©|\([cC]\)) ?(?:19|20)\d\d\b|Copyright (?:19|20)\d\d\b"
    r"|This article is protected by copyright\b)"
)
_NOTICE_CHARACTERS = 250
# The words of a notice that do not begin with a capital or a digit; a sentence has others.
_SMALL_WORDS = (
    "a all and article behalf by copyright de del der domain et exclusive for has in is la le "
    "licence license of on protected public published reserved rights s the this to under und van "
    "von with work y"
)
_NOTICE_WORDS = frozenset(_SMALL_WORDS.split())
_normalise_term = lru_cache(maxsize=4096)(normalise)


def text_of(element: Any) -> str:
    """The text of an element on one line; empty for None."""
    if element is None:
        return ""
    return normalise("".join(_parts(element)) if len(element) else element.text or "")


def term_of(element: Any) -> str:
    """`text_of` for an element that holds one of a few terms, which are remembered."""
    return text_of(element) if len(element) else _normalise_term(element.text or "")


def section_of(element: Any) -> tuple[str, bool]:
    """A section of an abstract as one line, and whether a truncation mark was taken off it.

    `LABEL: text` where it is labelled; empty where it has no text, whatever its label.
    """
    whole = text_of(element)
    cut = _TRUNCATION.sub("", whole) if whole.endswith(_TRUNCATION_ENDS) else whole
    text = without_copyright(cut).rstrip()
    label = _normalise_term(element.get("Label", ""))
    return (f"{label}: {text}" if label and text else text), cut != whole


def without_copyright(text: str) -> str:
    """`text` without the copyright notice at its end, if it ends in one.

    A notice begins like a sentence, with `©`, `(c)` or `Copyright` and a year or with `This article
    is protected by copyright`; it goes on to the end for at most 250 characters, and in it are only
    names, numbers and the few small words of such notices. So `©2018 AACR.` goes, and a sentence
    about a copyright, a list with an item (c), and all that stands before the notice stay.
    """
    end = text[-_NOTICE_CHARACTERS:]
    # Cheap to look for, and one of these is in every notice.
    if not ("©" in end or "opyright" in end or "(c)" in end or "(C)" in end):
        return text
    begin = len(text) - len(end)
    for notice in _NOTICE.finditer(text, begin):
        words = re.findall(r"[^\W\d_]+", text[notice.end() :])
        if all(word[0].isupper() or word in _NOTICE_WORDS for word in words):
            return text[: notice.start()]
    return text


def without_brackets(title: str) -> str:
    """`Effect of X.` for `[Effect of X].`, NLM's form for a title translated into English.

    Only where the first bracket closes at the very end: `[18F]CFA as a probe [PET].` stays.
    """
    match = _TRANSLATED.fullmatch(title) if title.startswith("[") else None
    if match is None:
        return title
    depth = 1
    for bracket in re.findall(r"[\[\]]", match[1]):
        depth += 1 if bracket == "[" else -1
        if depth == 0:
            return title
    inner = match[1].strip()
    return inner if inner.endswith((".", "?", "!")) else inner + match[2]


def _parts(element: Any) -> Iterator[str]:
    if element.text:
        yield element.text
    for child in element:
        if child.tag is etree.Entity:
            yield child.text  # `&name;`: entities that a file defines are not expanded
        elif child.tag == f"{_MATHML}math":
            yield from _formula(child)
        else:
            yield from _parts(child)
        if child.tail:
            yield child.tail


def _formula(element: Any) -> Iterator[str]:
    if element.tag in _MATHML_TOKENS:
        yield re.sub(f"[{_MATHML_SPACE}]+", " ", "".join(element.itertext())).strip(_MATHML_SPACE)
        return
    for number, child in enumerate(element):
        if child.tag in _MATHML_TWINS:
            continue
        if number and element.tag == f"{_MATHML}mfrac":
            yield "/"
        yield from _formula(child)
