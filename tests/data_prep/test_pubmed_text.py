"""The text of PubMed's elements: formulas, notices and brackets, and nothing else is changed."""

import gzip
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from data_prep.pubmed import in_order
from data_prep.pubmed_text import section_of, text_of, without_copyright

MATHML = 'xmlns:mml="http://www.w3.org/1998/Math/MathML"'


def _element(content: str, tag: str = "AbstractText") -> Any:
    parser = etree.XMLParser(resolve_entities=False, remove_comments=True)
    return etree.fromstring(f"<{tag} {MATHML}>{content}</{tag}>", parser)


def _roots(shared_data: Path) -> list[Any]:
    paths = in_order((shared_data / "pubmed").rglob("*.xml*"))
    contents = [p.read_bytes() for p in paths if "nonconforming" not in p.parts]
    return [etree.fromstring(gzip.decompress(c) if c[:2] == b"\x1f\x8b" else c) for c in contents]


# --------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize(
    ("formula", "text"),
    [
        (
            """
            <mml:msub>
               <mml:mrow> <mml:mover> <mml:mrow> <mml:mi>V</mml:mi> </mml:mrow>
                 <mml:mo> .
                 </mml:mo> </mml:mover> <mml:mi>O</mml:mi> </mml:mrow>
               <mml:mrow> <mml:mn>2</mml:mn> <mml:mi>max</mml:mi> </mml:mrow>
            </mml:msub>
            """,
            "V.O2max",
        ),
        (
            "<mml:msub> <mml:mi>Cu</mml:mi> <mml:mn>2</mml:mn> </mml:msub> <mml:mi>O</mml:mi>",
            "Cu2O",
        ),
        ("<mml:mfrac> <mml:mn>1</mml:mn> <mml:mn>2</mml:mn> </mml:mfrac>", "1/2"),
        ("<mml:mi>Xe</mml:mi><mml:mtext>&#8201;</mml:mtext><mml:mi>MRI</mml:mi>", "Xe MRI"),
        ("<mml:mtext> heart  rate\n index </mml:mtext>", "heart rate index"),
        (
            "<mml:semantics><mml:mi>x</mml:mi><mml:annotation>\\hat{x}</mml:annotation>"
            "</mml:semantics>",
            "x",
        ),
        ("", ""),
    ],
)
def test_a_formula_is_its_tokens(formula: str, text: str) -> None:
    """Without the publisher's indentation; what surrounds it stays as it is."""
    element = _element(f"size of <mml:math>{formula}</mml:math>, <i>x</i> (<sup>3</sup>He)")
    assert text_of(element) == " ".join(f"size of {text}, x (3He)".split())


def test_formulas_of_the_real_files(shared_data: Path) -> None:
    """No white space inside, but where an mtext holds it; every character of a token is there."""
    found = {}
    for root in _roots(shared_data):
        for math in root.iter("{http://www.w3.org/1998/Math/MathML}math"):
            characters = "".join("".join(math.itertext()).split())
            text = text_of(_element(etree.tostring(math, with_tail=False).decode()))
            assert "".join(text.split()) == characters
            found[characters] = text
    assert sorted(found.values()) == [
        *("AuCl4-", "Cu2O", "H1 MRI"),
        *("He3/Xe129 MRI", "PO4-3", "Rpre2", "SeO32-", "TeO32-", "V.O2max"),
    ]


# ---------------------------------------------------------------------------------------- notices


@pytest.mark.parametrize(
    "notice",
    [
        "©2018 AACR.",
        "© 2017 American Cancer Society.",
        "(c)2001 by Le Jacq.",
        "(c)2001 Le Jacq Communications, Inc.",
        "(C) 1999 Wiley-Liss, Inc.",
        "Copyright 1999 Academic Press.",
        "Copyright © 2018 Pathological Society of Great Britain and Ireland. "
        "Published by John Wiley & Sons, Ltd.",
        "© 2015 Wiley Periodicals, Inc. Head Neck 38: E665-E672, 2016.",
        "© 2019 The Author(s). Published by S. Karger AG, Basel.",
        "This article is protected by copyright. All rights reserved.",
    ],
)
def test_a_notice_at_the_end_goes(notice: str) -> None:
    """And only it: the citation before it stays."""
    before = "It can impede growth. Cancer Res; 78(2); 372-86."
    assert without_copyright(f"{before} {notice}") == before
    assert without_copyright(f"{before}{notice}") == before
    assert without_copyright(notice) == ""


@pytest.mark.parametrize(
    "text",
    [
        "The Migraine Quality of Life QuestionnaireCopyright was used in 2001.",
        "Classified with Explify(c) 2019 in all.",
        "Groups: (a) placebo, (b) clonidine, (c) 2001 patients.",
        "Outcomes were seen in three groups. (c) 2001 patients died.",
        "Copyright law changed in 1998. Copyright 1998 was the act's name.",
        "The images are © 2015 of the journal and were read again by two readers.",
        "This article is protected by copyright. We show how readers get round it.",
        "Copyright.",
        "",
    ],
)
def test_what_only_looks_like_a_notice_stays(text: str) -> None:
    """A sentence has words that no notice has; a notice begins where a sentence does."""
    assert without_copyright(text) == text


@given(st.text(alphabet="ab A.©(c)2018 \n", max_size=40), st.sampled_from(["", "©2018 AACR."]))
def test_what_stays_is_the_beginning(text: str, notice: str) -> None:
    """Whatever the text: a piece of the end goes, never anything before a notice."""
    kept = without_copyright(text + notice)
    assert (text + notice).startswith(kept)
    assert re.match(r" ?(©|\([cC]\)|Copyright|This article|$)", (text + notice)[len(kept) :])


def test_notices_of_the_real_files(shared_data: Path) -> None:
    """All of those that are there go, nothing else does, and no mark with a year is left."""
    taken = {}
    left = []
    for root in _roots(shared_data):
        for citation in root.iter("MedlineCitation"):
            for section in citation.iterfind("Article/Abstract/AbstractText"):
                text = text_of(section)
                kept = without_copyright(text)
                if kept != text:
                    taken[citation.findtext("PMID"), text[len(kept) :].strip()] = len(text)
                left += re.findall(r"(?:©|Copyright|\([cC]\)) ?(?:19|20)\d\d.*", kept)
    assert left == []
    assert len(taken) == 17
    for (_, notice), length in taken.items():
        assert re.match(r"©|\(c\)2001|Copyright ©|This article is protected", notice)
        assert len(notice) < min(110, length / 2)


def test_marks_are_taken_off_a_section_and_its_label_stays() -> None:
    """Both marks at once, and a section that is nothing but a notice."""
    section = _element("It ends.(ABSTRACT TRUNCATED AT 250 WORDS)")
    section.set("Label", "AIM")
    assert section_of(section) == ("AIM: It ends.", True)
    notice = _element("Copyright © 2018 Elsevier Inc. All rights reserved.")
    notice.set("Label", "COPYRIGHT")
    assert section_of(notice) == ("", False)
