"""What is written into records comes out of them, whatever it is and however it is wrapped."""

import gzip
import html
import unicodedata
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.pubmed import documents, fold, in_order, scan

MATHML = "{http://www.w3.org/1998/Math/MathML}"
RETRACTIONS = ("Retracted Publication", "Retraction of Publication", "Retraction Notice")
# What XML 1.0 can hold, rare ones often; a carriage return is read as a line feed.
CHARACTERS = st.one_of(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff"),
    st.sampled_from(" \n\t\u00a0\u2009<>&;\"'[](){}é\u0301µ©."),
)
TEXT = st.text(CHARACTERS, max_size=30)
LABEL = st.one_of(st.none(), st.sampled_from(["", "METHODS", "Aim & scope", " A\u00a0B "]), TEXT)


@st.composite
def elements(draw: st.DrawFn, depth: int = 0) -> ET.Element:
    """An element with text and inline markup in it, three deep at most."""
    element = ET.Element(draw(st.sampled_from(["i", "b", "sub", "sup", "u", "sc"])))
    element.text = draw(TEXT)
    for _ in range(draw(st.integers(0, 2 if depth < 2 else 0))):
        child = draw(elements(depth + 1))
        child.tail = draw(TEXT)
        element.append(child)
    return element


RECORDS = st.lists(
    st.tuples(elements(), st.lists(st.tuples(LABEL, elements()), max_size=3)),
    min_size=1,
    max_size=3,
)


def _one_line(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", html.unescape(text)).split())


def _expected(title: ET.Element, sections: list[tuple[str | None, ET.Element]]) -> str:
    lines = [_one_line("".join(title.itertext()))]
    for label, section in sections:
        text, name = _one_line("".join(section.itertext())), _one_line(label or "")
        lines.append(f"{name}: {text}" if name and text else text)
    return "\n".join(filter(None, lines))


def _is_changed_on_purpose(text: str) -> bool:
    """Brackets round a title and notices are the business of other tests."""
    return text.startswith("[") or "©" in text or "(c)" in text.lower() or "copyright" in text


@settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(records=RECORDS, packed=st.booleans(), encoding=st.sampled_from(["utf-8", "us-ascii"]))
def test_text_goes_through_xml_unchanged(
    tmp_path: Path,
    records: list[tuple[ET.Element, list[tuple[str | None, ET.Element]]]],
    packed: bool,
    encoding: str,
) -> None:
    """Normalised as documented and nothing else; written by another library."""
    root = ET.Element("PubmedArticleSet")
    expected = {}
    for pmid, (title, sections) in enumerate(records, start=1):
        citation = ET.SubElement(ET.SubElement(root, "PubmedArticle"), "MedlineCitation")
        ET.SubElement(citation, "PMID", Version="1").text = str(pmid)
        article = ET.SubElement(citation, "Article")
        expected[f"pubmed-{pmid}"] = _expected(title, sections)
        title.tag = "ArticleTitle"
        article.append(title)
        abstract = ET.SubElement(article, "Abstract")
        for label, section in sections:
            section.tag = "AbstractText"
            if label is not None:
                section.set("Label", label)
            abstract.append(section)
    content = ET.tostring(root, encoding=encoding, xml_declaration=True)
    path = tmp_path / "x.xml.gz"
    path.write_bytes(gzip.compress(content, 1) if packed else content)
    found = {document.id: document.text for document in documents(path, np.arange(len(records)))}
    for name, text in expected.items():
        if not any(_is_changed_on_purpose(line) for line in text.split("\n")):
            assert found.get(name, "") == text


def _citations(path: Path) -> tuple[list[ET.Element], list[ET.Element]]:
    content = path.read_bytes()
    root = ET.fromstring(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
    return list(root.iter("MedlineCitation")), list(root.iterfind("DeleteCitation/PMID"))


def _key(pmid: ET.Element) -> tuple[str, int]:
    return (pmid.text or "").strip(), int(pmid.get("Version", "1"))


def _update(path: Path, base: list[ET.Element]) -> None:
    """Real records again: revised, in another version, brought back, and some deleted."""
    root = ET.Element("PubmedArticleSet")
    for number, citation in enumerate(base):
        if number % 4 > 1:
            continue
        copy = ET.fromstring(ET.tostring(citation))
        title, pmid = copy.find("Article/ArticleTitle"), copy.find("PMID")
        assert title is not None
        assert pmid is not None
        if number % 4 == 0:
            title.text = f"{path.stem} revised this. {title.text or ''}"
        else:
            pmid.set("Version", str(1 + int(path.stem[-1])))
        ET.SubElement(root, "PubmedArticle").append(copy)
    deleted = ET.SubElement(root, "DeleteCitation")
    for citation in base[:: 3 + int(path.stem[-1])]:
        pmid = citation.find("PMID")
        assert pmid is not None
        ET.SubElement(deleted, "PMID", Version=pmid.get("Version", "1")).text = pmid.text
    path.write_bytes(ET.tostring(root))


def test_baseline_and_updates_fold_as_a_dictionary_would(shared_data: Path, tmp_path: Path) -> None:
    """Real baseline, update and sample files, and updates made of their records."""
    for folder in ("baseline", "updatefiles", "nlm_sample", "medlinecitationset"):
        for path in (shared_data / "pubmed" / folder).iterdir():
            (tmp_path / path.name).symlink_to(path)
    base = [c for path in in_order(tmp_path.iterdir()) for c in _citations(path)[0]]
    for number in (1, 2, 3):
        _update(tmp_path / f"pubmed30n000{number}.xml", base[number::5] + base[:40])
    state: dict[tuple[str, int], tuple[int, str, ET.Element]] = {}
    paths = in_order(tmp_path.iterdir())
    for number, path in enumerate(paths):
        citations, deleted = _citations(path)
        for citation in citations:
            pmid = citation.find("PMID")
            assert pmid is not None
            state[_key(pmid)] = (number, path.name, citation)
        for pmid in deleted:
            state.pop(_key(pmid), None)
    best = dict(sorted(state))
    expected = {}
    for pmid, version in best.items():
        _, name, citation = state[pmid, version]
        title = citation.find("Article/ArticleTitle")
        abstract = citation.find("Article/Abstract")
        texts = [
            _one_line("".join(part.itertext()))
            for part in (title, *(() if abstract is None else abstract.iter("AbstractText")))
            if part is not None
        ]
        kinds = citation.iterfind("Article/PublicationTypeList/PublicationType")
        is_retracted = any(kind.text in RETRACTIONS for kind in kinds) or any(
            link.get("RefType") == "RetractionIn" for link in citation.iter("CommentsCorrections")
        )
        if any(texts) and not is_retracted:
            expected[f"pubmed-{pmid}"] = (version, name, "revised this." in texts[0])
    found = {
        d.id: (d.meta["version"], d.meta["file"], "revised this." in d.text.partition("\n")[0])
        for path, positions in zip(paths, fold([scan(path) for path in paths]), strict=True)
        for d in documents(path, positions)
    }
    assert found == expected
    assert len({value[1] for value in found.values()}) >= 6
    assert sum(value[2] for value in found.values()) > 10
