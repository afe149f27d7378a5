"""PubMed: nothing of a text is lost, what is no text is left, bad files are named."""

import contextlib
import gzip
import hashlib
import html
import re
import subprocess
import sys
import unicodedata
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.document import Document, InputError
from data_prep.pubmed import documents, fold, in_order, scan

ALL = np.arange(10**6)
MATHML = "{http://www.w3.org/1998/Math/MathML}"
NOTICES = (
    r"(?:©20\d\d AACR|© 2017 American Cancer Society|© 2015 Wiley Periodicals, Inc\. Head Neck 38: "
    r"E665-E672, 2016|\(c\)2001 (?:by )?Le Jacq(?: Communications, Inc)?|Copyright © 2018 "
    r"Pathological Society of Great Britain and Ireland\. Published by John Wiley & Sons, Ltd|"
    r"This article is protected by copyright\. All rights reserved)\.$"
)


def _record(pmid: int = 1, *, version: int | None = 1, article: str = "", rest: str = "") -> str:
    number = "" if version is None else f' Version="{version}"'
    return (
        f"<MedlineCitation><PMID{number}>{pmid}</PMID><Article>{article}</Article>{rest}"
        "</MedlineCitation>"
    )


def _title(text: str) -> str:
    return f"<ArticleTitle>{text}</ArticleTitle>"


def _abstract(*sections: str) -> str:
    return f"<Abstract>{''.join(f'<AbstractText{s}</AbstractText>' for s in sections)}</Abstract>"


def _file(path: Path, *records: str, root: str = "PubmedArticleSet", after: str = "") -> Path:
    wrapped = "".join(f"<PubmedArticle>{r}<PubmedData/></PubmedArticle>\n" for r in records)
    path.write_text(f"<{root}>\n{wrapped}{after}</{root}>", encoding="utf-8")
    return path


def _read(path: Path, **options: bool) -> list[Document]:
    return list(documents(path, ALL[: len(scan(path).pmids)], **options))


def _one(tmp_path: Path, article: str, rest: str = "") -> Document:
    (document,) = _read(
        _file(tmp_path / "one.xml", _record(article=article, rest=rest)), keep_retracted=True
    )
    return document


# ----------------------------------------------------------------- an independent second opinion


def _conforming(shared_data: Path) -> list[Path]:
    folder = shared_data / "pubmed"
    return in_order(p for p in folder.rglob("*.xml*") if "nonconforming" not in p.parts)


def _reference_text(element: ET.Element | None) -> str:
    """The documented rules in regular expressions, on the standard library's parser."""
    if element is None:
        return ""
    for part in element.iter():
        if part.tag.startswith(MATHML):  # white space between the parts of a formula is layout
            part.text = (part.text or "").strip(" \t\r\n")
            is_formula = part.tag == f"{MATHML}math"
            part.tail = part.tail if is_formula else (part.tail or "").strip(" \t\r\n")
    text = html.unescape("".join(element.itertext()))
    text = unicodedata.normalize("NFC", text)
    text = re.sub(
        "[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000\u2028\u2029\u0085\r\n\t]", " ", text
    )
    return re.sub(" +", " ", text).strip(" ")


def _reference(citation: ET.Element) -> str:
    title = _reference_text(citation.find("./Article/ArticleTitle"))
    if title.startswith("[") and title.rstrip(".").rstrip().endswith("]"):
        inner = title.rstrip(".").rstrip()[1:-1].strip()
        title = inner if inner[-1] in ".?!" or not title.endswith(".") else inner + "."
    lines = [title]
    for section in citation.findall("./Article/Abstract/AbstractText"):
        text = _reference_text(section)
        text = re.sub(r"\(ABSTRACT TRUNCATED(?: AT [0-9]+ WORDS)?\)$", "", text).rstrip()
        # The notices that these files have, written out; test_pubmed_text.py has the rule.
        text = re.sub(NOTICES, "", text).rstrip()
        label = re.sub(r"\s+", " ", section.get("Label") or "").strip()
        if text:
            lines.append(f"{label}: {text}" if label else text)
    return "\n".join(line for line in lines if line)


def test_every_real_record_is_lossless(shared_data: Path) -> None:
    """Title and abstract of each record of each conforming file equal a second implementation."""
    compared = marked = 0
    for path in _conforming(shared_data):
        content = path.read_bytes()
        root = ET.fromstring(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
        expected = [(c.findtext("PMID"), _reference(c)) for c in root.iter("MedlineCitation")]
        read = [(d.id.removeprefix("pubmed-"), d.text) for d in _read(path, keep_retracted=True)]
        assert read == [pair for pair in expected if pair[1]], path.name
        compared += len(read)
        marked += sum(len(e) > 0 for e in root.iter("AbstractText"))
    assert compared > 13_000
    assert marked > 150


def test_the_real_files_fold_to_distinct_articles(shared_data: Path) -> None:
    """Over all files together every PMID occurs once, and what is counted adds up."""
    paths = _conforming(shared_data)
    scans = [scan(path) for path in paths]
    counts: Counter[str] = Counter()
    ids = [
        document.id
        for path, positions in zip(paths, fold(scans), strict=True)
        for document in documents(path, positions, counts=counts)
    ]
    assert len(ids) == len(set(ids)) == counts["documents"]
    assert counts["records"] == sum(len(s.pmids) for s in scans)
    parts = ("documents", "replaced", "without_text", "retracted")
    assert counts["records"] == sum(counts[part] for part in parts)
    assert counts["retracted"] > 0
    assert counts["replaced"] > 0


# ------------------------------------------------------------------------------------------ text


def test_inline_markup_leaves_its_text_in_place(tmp_path: Path) -> None:
    """Markup inside words, before the first and after the last character, and nested."""
    document = _one(
        tmp_path,
        _title("<i>In Vitro</i> effects of CO<sub>2</sub> on MoS<sub>2</sub> at 10<sup>9</sup>/L.")
        + _abstract("><b>Aim:</b> H<sub>2</sub>O, <i>p<sup>53</sup></i>; a &lt; b &amp;gt; c"),
    )
    assert document.text == ("In Vitro effects of CO2 on MoS2 at 109/L.\nAim: H2O, p53; a < b > c")


def test_sections_stand_on_lines_of_their_own(tmp_path: Path) -> None:
    """`LABEL: text`; without a label only the text; empty sections and line wraps leave nothing."""
    document = _one(
        tmp_path,
        _title("A title\n   in two lines.")
        + _abstract(
            ' Label="METHODS AND\n RESULTS">One\n      two.',
            ' Label="" NlmCategory="UNASSIGNED">Three.',
            ' Label="VIDEO ABSTRACT"> ',
            ">Four.",
        ),
    )
    assert document.text == ("A title in two lines.\nMETHODS AND RESULTS: One two.\nThree.\nFour.")


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("[Effect of X].", "Effect of X."),
        ("[Effect of X.]", "Effect of X."),
        ("[Is it X?].", "Is it X?"),
        ("[Effect of [14C] X]  .", "Effect of [14C] X."),
        ("[18F]CFA as a probe.", "[18F]CFA as a probe."),
        ("[18F]CFA as a probe for [PET].", "[18F]CFA as a probe for [PET]."),
        ("Effect of X [letter].", "Effect of X [letter]."),
        ("[]", "[]"),
    ],
)
def test_brackets_of_a_translation(tmp_path: Path, title: str, expected: str) -> None:
    """Only brackets round the whole title are NLM's mark for a translation."""
    assert _one(tmp_path, _title(title)).text == expected


def test_truncation_mark_is_taken_off_and_recorded(tmp_path: Path) -> None:
    """At the end of a section it is no text of the author's; elsewhere it would be."""
    cut = _one(tmp_path, _title("T.") + _abstract(">Ends here.(ABSTRACT TRUNCATED AT 250 WORDS)"))
    assert (cut.text, cut.meta["truncated"]) == ("T.\nEnds here.", True)
    whole = _one(tmp_path, _title("T.") + _abstract(">The mark (ABSTRACT TRUNCATED) is odd."))
    assert (whole.text, whole.meta["truncated"]) == (
        "T.\nThe mark (ABSTRACT TRUNCATED) is odd.",
        False,
    )


def test_only_the_articles_own_abstract_is_read(tmp_path: Path) -> None:
    """No CopyrightInformation, no OtherAbstract, no VernacularTitle, no comment."""
    article = (
        _title("T.<!-- no -->")
        + "<Abstract><AbstractText>Text<?no?>.</AbstractText><CopyrightInformation>Publisher"
        "</CopyrightInformation></Abstract><VernacularTitle>Titel</VernacularTitle>"
    )
    other = '<OtherAbstract Language="ger"><AbstractText>Andere</AbstractText></OtherAbstract>'
    assert _one(tmp_path, article, other).text == "T.\nText."


def test_meta_says_what_the_record_is(tmp_path: Path) -> None:
    """Years in both forms, languages, types; a record of before 2012 has version 1."""
    article = (
        "<Journal><JournalIssue><PubDate><MedlineDate>1998 Dec-1999 Jan</MedlineDate></PubDate>"
        f"</JournalIssue></Journal>{_title('T.')}<Language>ENG</Language><Language>fre</Language>"
        "<PublicationTypeList><PublicationType>Letter</PublicationType></PublicationTypeList>"
    )
    path = _file(tmp_path / "old.xml", _record(7, version=None, article=article))
    (document,) = _read(path)
    assert document == Document(
        id="pubmed-7",
        source="pubmed",
        group="pubmed-7",
        text="T.",
        meta={
            "year": 1998,
            "languages": ["eng", "fre"],
            "publication_types": ["Letter"],
            "has_abstract": False,
            "truncated": False,
            "retracted": False,
            "retraction_notice": False,
            "version": 1,
            "file": "old.xml",
        },
    )


def test_records_without_text_are_counted(tmp_path: Path) -> None:
    """Neither title nor abstract: no document; a title alone or an abstract alone is one."""
    path = _file(
        tmp_path / "x.xml",
        _record(1, article=_title("")),
        _record(2, article=_title("Only a title.")),
        _record(3, article=_abstract(">Only an abstract.")),
        _record(4),
    )
    counts: Counter[str] = Counter()
    texts = [d.text for d in documents(path, ALL[:4], counts=counts)]
    assert texts == ["Only a title.", "Only an abstract."]
    assert counts == Counter(records=4, documents=2, title_only=1, without_text=2, books=0)


@pytest.mark.parametrize(
    ("kind", "link", "flag"),
    [
        ('<PublicationType UI="D016441">Retracted Publication</PublicationType>', "", "retracted"),
        ("<PublicationType>Retracted Publication</PublicationType>", "", "retracted"),
        ("", '<CommentsCorrections RefType="RetractionIn"/>', "retracted"),
        (
            '<PublicationType UI="D016440">Retraction Notice</PublicationType>',
            "",
            "retraction_notice",
        ),
        ("<PublicationType>Retraction of Publication</PublicationType>", "", "retraction_notice"),
    ],
)
def test_retractions_are_left_out_unless_wanted(
    tmp_path: Path, kind: str, link: str, flag: str
) -> None:
    """The article and the notice, by type or by link; flagged where they are kept."""
    record = _record(
        article=_title("T.") + f"<PublicationTypeList>{kind}</PublicationTypeList>",
        rest=f"<CommentsCorrectionsList>{link}</CommentsCorrectionsList>",
    )
    path = _file(tmp_path / "x.xml", record, _record(2, article=_title("Sound.")))
    assert [d.id for d in _read(path)] == ["pubmed-2"]
    retracted, sound = _read(path, keep_retracted=True)
    assert [retracted.meta[flag], sound.meta[flag]] == [True, False]


# ----------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("root", ["PubmedArticleSet", "MedlineCitationSet", "SomeExport"])
def test_any_root(tmp_path: Path, root: str) -> None:
    """What surrounds the records does not matter."""
    path = _file(tmp_path / "x.xml", _record(5, article=_title("T.")), root=root)
    assert [d.id for d in _read(path)] == ["pubmed-5"]


def test_a_bare_record_and_an_update_without_records(tmp_path: Path) -> None:
    """A record may be the root; a set may hold deletions only, or nothing."""
    (tmp_path / "bare.xml").write_text(_record(5, article=_title("T.")))
    assert [d.id for d in _read(tmp_path / "bare.xml")] == ["pubmed-5"]
    deletion = '<DeleteCitation><PMID Version="1">31034065</PMID></DeleteCitation>'
    assert scan(_file(tmp_path / "d.xml", after=deletion)).deleted_pmids.tolist() == [31034065]
    assert _read(_file(tmp_path / "none.xml")) == []


def test_gzip_is_known_by_its_bytes(tmp_path: Path) -> None:
    """A .gz that is plain XML and an .xml that is gzip are read."""
    plain = _file(tmp_path / "a.xml.gz", _record(5, article=_title("T.")))
    packed = tmp_path / "b.xml"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert [d.text for d in _read(plain) + _read(packed)] == ["T.", "T."]


def _bad_files(folder: Path) -> dict[str, Path]:
    good = "<PubmedArticleSet>" + _record(1, article=_title("T.")) * 500 + "</PubmedArticleSet>"
    contents = {
        "empty": b"",
        "empty_gzip": gzip.compress(b""),
        "truncated_gzip": gzip.compress(good.encode())[:-40],
        "corrupt_gzip": gzip.compress(good.encode())[:-8] + b"\0" * 8,
        "only_magic": b"\x1f\x8b",
        "truncated_xml": good.encode()[:-200],
        "json": b'"<PubmedArticleSet></PubmedArticleSet>"',
        "html": b"<html><body>Not found</body></html>",
        "no_pmid": good.replace('<PMID Version="1">1</PMID>', "").encode(),
        "word_for_pmid": good.replace(">1</PMID>", ">PMC1</PMID>", 1).encode(),
        "wrong_encoding": good.replace("T.", "T\xe9.", 1).encode("latin-1"),
        "unknown_encoding": b'<?xml version="1.0" encoding="martian"?>' + good.encode(),
    }
    for name, content in contents.items():
        (folder / f"{name}.xml.gz").write_bytes(content)
    return {name: folder / f"{name}.xml.gz" for name in contents}


def test_bad_files_are_named(tmp_path: Path) -> None:
    """Each says which file, what is wrong and what to do, in both passes."""
    for name, path in _bad_files(tmp_path).items():
        for read in (scan, lambda path: list(documents(path, ALL[:1000]))):
            with pytest.raises(InputError, match=rf"{name}\.xml\.gz .*(fetch|leave)"):
                read(path)
    with pytest.raises(InputError, match=r"missing\.xml"):
        scan(tmp_path / "missing.xml")


def test_an_error_in_xml_gives_its_place_and_nothing_of_the_file(tmp_path: Path) -> None:
    """The parser quotes the names of elements, which may be words where a text is cut."""
    path = tmp_path / "x.xml"
    path.write_text("<PubmedArticleSet>\n<canary></other>")
    with pytest.raises(InputError, match=r"x\.xml is not whole .*\(line 2, column \d+\)") as error:
        scan(path)
    assert "canary" not in str(error.value)


def test_the_real_nonconforming_files_are_named(shared_data: Path) -> None:
    """XML inside a JSON string; a PubmedArticleSet without PMIDs."""
    for path in sorted((shared_data / "pubmed" / "nonconforming").iterdir()):
        with pytest.raises(InputError, match=rf"{re.escape(path.name)} is not .*PubMed XML"):
            scan(path)


def test_a_file_that_shrank_between_the_passes_is_noticed(tmp_path: Path) -> None:
    """Positions beyond the last record mean another file than the one scanned."""
    path = _file(tmp_path / "x.xml", _record(1, article=_title("T.")))
    with pytest.raises(InputError, match=r"x\.xml has lost records"):
        list(documents(path, ALL[:2]))


def _with_dtd(path: Path, declarations: str, title: str) -> Path:
    doctype = f'<!DOCTYPE PubmedArticleSet SYSTEM "http://127.0.0.1:9/no.dtd" [{declarations}]>'
    record = _record(article=_title(title))
    path.write_text(f"{doctype}<PubmedArticleSet>{record}</PubmedArticleSet>")
    return path


def test_entities_are_neither_fetched_nor_expanded(tmp_path: Path) -> None:
    """No DTD is loaded and no file read; character references and HTML's names work."""
    declarations = '<!ENTITY own "laugh"><!ENTITY file SYSTEM "file:///etc/passwd">'
    path = _with_dtd(tmp_path / "x.xml", declarations, "A&#946;&#x3b3;&amp; &own;&file;&delta;")
    (document,) = _read(path)
    assert document.text == "Aβγ& &own;&file;δ"


def test_an_entity_bomb_does_not_explode(tmp_path: Path) -> None:
    """A billion laughs end in the error for bad files, at once."""
    laughs = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    path = _with_dtd(tmp_path / "bomb.xml", f'<!ENTITY l0 "ha">{laughs}', "&l9;")
    with pytest.raises(InputError, match=r"bomb\.xml is not whole PubMed XML"):
        scan(path)


@pytest.mark.parametrize(
    "form", ["MD5({name})= {hex}\n", "{hex}  {name}\n", "MD5 ({name}) = {hex}"]
)
def test_sidecars_are_verified(tmp_path: Path, form: str) -> None:
    """NLM's form, md5sum's and BSD's; another sum or another form is an error."""
    path = _file(tmp_path / "a.xml.gz", _record(5, article=_title("T.")))
    digest = hashlib.md5(path.read_bytes()).hexdigest()
    sidecar = tmp_path / "a.xml.gz.md5"
    sidecar.write_text(form.format(name=path.name, hex=digest))
    assert scan(path).pmids.tolist() == [5]
    sidecar.write_text(form.format(name=path.name, hex=digest[::-1]))
    with pytest.raises(InputError, match=r"MD5 of .*a\.xml\.gz is not .* fetch both again"):
        scan(path)
    sidecar.write_text("404 not found")
    with pytest.raises(InputError, match=r"a\.xml\.gz\.md5 holds neither .* fetch it again"):
        scan(path)


MEASURE = r"""
import re, sys
from pathlib import Path
import numpy as np
from data_prep.pubmed import documents, scan
path = Path(sys.argv[1])
size = len(scan(path).pmids)
assert sum(1 for _ in documents(path, np.arange(size))) == size
# Not getrusage's ru_maxrss: it begins with that of the process this one was started from.
print(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
"""


def test_memory_stays_flat(tmp_path: Path) -> None:
    """Ten times the records (some 35 MB of XML) take hardly more memory: parts are forgotten."""
    peaks = []
    for number in (1000, 10_000):
        article = _title("T" * 200) + _abstract(">" + "text " * 500)
        path = _file(
            tmp_path / f"{number}.xml", *(_record(i, article=article) for i in range(number))
        )
        command = [sys.executable, "-c", MEASURE, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 8 * 1024  # KiB


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    position=st.integers(0, 2000),
    removed=st.integers(0, 40),
    added=st.binary(max_size=12),
    packed=st.booleans(),
)
def test_damaged_bytes_give_the_documented_error_or_documents(
    tmp_path: Path, position: int, removed: int, added: bytes, packed: bool
) -> None:
    """Whatever a transfer does to a file, no other exception comes out."""
    content = _file(
        tmp_path / "x.xml",
        *(
            _record(i, article=_title("Tïtle &amp; <i>x</i>") + _abstract(' Label="A">B'))
            for i in range(6)
        ),
        after="<DeleteCitation><PMID>3</PMID></DeleteCitation>",
    ).read_bytes()
    content = gzip.compress(content, mtime=0) if packed else content
    position %= len(content)
    path = tmp_path / "damaged.xml.gz"
    path.write_bytes(content[:position] + added + content[position + removed :])
    with contextlib.suppress(InputError):
        for positions in fold([scan(path)]):
            assert all(document.text for document in documents(path, positions))
