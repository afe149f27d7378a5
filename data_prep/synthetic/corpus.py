"""The made-up corpus as files: the formats and folders of the real sources, their traps included.

    pubmed/baseline/     two files with `.md5` sidecars; structured abstracts, inline markup, a
                         retracted article and its notice, a translated title, a cut abstract, …
    pubmed/updatefiles/  a revised record, a second version and a DeleteCitation list
    mimic-iv-note/note/  discharge.csv.gz and radiology.csv.gz, subjects in common
    codes/               an ICD-10-CM order file, ICD-9-CM titles of diagnoses and procedures

The same seed and number give the same bytes. Identifiers are outside the real ones' range. Codes
and titles are made up; only a category's first three characters are those of the real systems.
"""

import csv
import gzip
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from common.files import whole_file
from data_prep.synthetic.abstracts import Abstract, abstract
from data_prep.synthetic.dice import Dice, capital
from data_prep.synthetic.facts import CONDITIONS, Condition
from data_prep.synthetic.notes import discharge_note, radiology_report, subject

SEED = 17
DOCUMENTS = 6000

_FIRST_PMID = 90_000_000
_XML_HEAD = """<?xml version="1.0" encoding="utf-8"?>
<!DOCTYPE PubmedArticleSet PUBLIC "-//NLM//DTD PubMedArticle, 1st January 2025//EN" \
"https://dtd.nlm.nih.gov/ncbi/pubmed/out/pubmed_250101.dtd">
<PubmedArticleSet>
"""
_COLUMNS = (
    "note_id",
    "subject_id",
    "hadm_id",
    "note_type",
    "note_seq",
    "charttime",
    "storetime",
    "text",
)
_STAGES = (
    "mild",
    "moderate",
    "severe",
    "recurrent",
    "with acute exacerbation",
    "with organ involvement",
    "in remission",
    "unspecified severity",
)
_COURSES = (
    "without complication",
    "with acute complication",
    "with chronic complication",
    "with multiple complications",
    "complication unspecified",
)
# The articles of the evaluation set; the texts are too alike for one that goes by words.
_EVALUATED = range(10, 30)
_SIDES = {"1": "right", "2": "left", "9": "unspecified side"}
_ENCOUNTERS = {"A": "initial encounter", "D": "subsequent encounter", "S": "sequela"}
_CAUSES = ("fall on stairs", "fall from ladder", "fall from bed", "traffic accident", "burn")


def write_corpus(out: Path, seed: int = SEED, documents: int = DOCUMENTS) -> list[Path]:
    """Write the corpus of `documents` abstracts and notes (and some 2,700 codes) into `out`.

    Half are abstracts, a fifth discharge summaries, the rest radiology reports. Beside them lie the
    PMIDs of some of the abstracts, as an evaluation set. Returns the files.
    """
    abstracts, summaries = documents // 2, documents // 5
    files = {
        **_pubmed_files(seed, abstracts),
        "mimic-iv-note/note/discharge.csv.gz": _notes(seed, "DS", summaries),
        "mimic-iv-note/note/radiology.csv.gz": _notes(
            seed, "RR", documents - abstracts - summaries
        ),
        "codes/icd10cm_order_demo.txt": _icd10(),
        "codes/CMS32_DESC_LONG_DX.txt": _icd9_diagnoses(),
        "codes/CMS32_DESC_LONG_SG.txt": _icd9_procedures(),
        "benchmarks/pmids.txt": "".join(f"{_FIRST_PMID + i}\n" for i in _EVALUATED).encode(),
    }
    for name, content in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(content)
    return [out / name for name in files]


def _gzip(content: bytes) -> bytes:
    """Gzip without a time stamp or a name, so that equal contents give equal bytes."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", filename="", mtime=0) as file:
        file.write(content)
    return packed.getvalue()


def _pubmed_files(seed: int, number: int) -> dict[str, bytes]:
    special = list(_special_records(seed, number))
    ordinary = [_ordinary_record(seed, i) for i in range(number - len(special) - 1)]
    half = len(ordinary) // 2
    contents = {
        "pubmed/baseline/pubmed26n0001.xml.gz": "".join(ordinary[:half]),
        "pubmed/baseline/pubmed26n0002.xml.gz": "".join(ordinary[half:] + special),
        "pubmed/updatefiles/pubmed26n0003.xml.gz": _update(seed, number),
    }
    files = {}
    for name, records in contents.items():
        packed = _gzip(f"{_XML_HEAD}{records}</PubmedArticleSet>\n".encode())
        files[name] = packed
        digest = hashlib.md5(packed, usedforsecurity=False).hexdigest()
        files[f"{name}.md5"] = f"MD5({Path(name).name})= {digest}\n".encode()
    return files


def _ordinary_record(seed: int, index: int, version: int = 1) -> str:
    dice = Dice(seed, "abstract", index)
    return _record(
        _FIRST_PMID + index, abstract(dice), year=dice.whole(1985, 2025), version=version
    )


def _special_records(seed: int, first: int) -> Iterator[str]:
    """One record of each kind that a parser gets wrong; PMIDs from `first` on."""
    pmid = _FIRST_PMID + first
    texts = [abstract(Dice(seed, "special", i)) for i in range(8)]
    yield _record(
        pmid, texts[0], types=("Journal Article", "Retracted Publication"), link="RetractionIn"
    )
    yield _record(pmid + 1, texts[1], types=("Retraction of Publication",), link="RetractionOf")
    translated = Abstract(f"[{texts[2].title.removesuffix('.')}].", texts[2].sections)
    yield _record(pmid + 2, translated, language="fre")
    label, text = texts[3].sections[-1]
    cut = [*texts[3].sections[:-1], (label, f"{text}(ABSTRACT TRUNCATED AT 250 WORDS)")]
    yield _record(pmid + 3, Abstract(texts[3].title, cut))
    yield _record(pmid + 4, Abstract(texts[4].title, []))
    yield _record(pmid + 5, Abstract("", []))
    spaced = [
        (name, f"{part} Doses of 5\u2009mg\u00a0or\nless (&amp;lt;5 mg)&#x2003;were safe.")
        for name, part in texts[5].sections
    ]
    yield _record(pmid + 6, Abstract(texts[5].title, spaced))
    other = (
        '<OtherAbstract Type="Publisher" Language="ger"><AbstractText>Eine Zusammenfassung.'
        "</AbstractText></OtherAbstract>"
    )
    yield _record(pmid + 7, texts[6], after=other)


def _update(seed: int, number: int) -> str:
    """Revises record 0, adds version 2 of record 1 and a new record, deletes records 2 and 3."""
    revised = abstract(Dice(seed, "revised", 0))
    second = abstract(Dice(seed, "revised", 1))
    deleted = "".join(f'<PMID Version="1">{_FIRST_PMID + i}</PMID>' for i in (2, 3))
    return (
        _record(_FIRST_PMID, revised)
        + _record(_FIRST_PMID + 1, second, version=2)
        + _ordinary_record(seed, number + 100)
        + f"<DeleteCitation>{deleted}</DeleteCitation>\n"
    )


def _record(
    pmid: int,
    content: Abstract,
    *,
    version: int = 1,
    year: int = 2020,
    language: str = "eng",
    types: tuple[str, ...] = ("Journal Article",),
    link: str | None = None,
    after: str = "",
) -> str:
    """A PubmedArticle element; the texts of `content` are XML already."""
    sections = "".join(
        "<AbstractText"
        + (f" Label={quoteattr(label)}" if label else "")
        + f">{text}</AbstractText>"
        for label, text in content.sections
    )
    copyright_line = "<CopyrightInformation>Copyright, nobody.</CopyrightInformation>"
    body = f"<Abstract>{sections}{copyright_line}</Abstract>" if sections else ""
    kinds = "".join(f"<PublicationType>{escape(kind)}</PublicationType>" for kind in types)
    links = (
        f'<CommentsCorrectionsList><CommentsCorrections RefType="{link}"><RefSource>Demo'
        f'</RefSource><PMID Version="1">{pmid + 1}</PMID></CommentsCorrections>'
        "</CommentsCorrectionsList>"
        if link
        else ""
    )
    return (
        f'<PubmedArticle><MedlineCitation Status="MEDLINE" Owner="NLM">'
        f'<PMID Version="{version}">{pmid}</PMID><Article PubModel="Print"><Journal><JournalIssue>'
        f"<PubDate><Year>{year}</Year></PubDate></JournalIssue><Title>Demo</Title></Journal>"
        f"<ArticleTitle>{content.title}</ArticleTitle>{body}<Language>{language}</Language>"
        f"<PublicationTypeList>{kinds}</PublicationTypeList></Article>{links}{after}"
        f"</MedlineCitation><PubmedData><PublicationStatus>ppublish</PublicationStatus>"
        f'<ArticleIdList><ArticleId IdType="pubmed">{pmid}</ArticleId></ArticleIdList>'
        f"</PubmedData></PubmedArticle>\n"
    )


def _notes(seed: int, note_type: str, number: int) -> bytes:
    """A CSV file of notes of subjects 0, 1, …, one to four of each.

    A few notes in a hundred repeat the subject's note before word for word; a third of the
    radiology reports belong to no admission; one note in fifty has CRLF line ends.
    """
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(_COLUMNS)
    write = discharge_note if note_type == "DS" else radiology_report
    person = written = 0
    while written < number:
        who = subject(seed, person)
        text = ""
        for index in range(Dice(seed, note_type, person, "notes").whole(1, 4)):
            dice = Dice(seed, note_type, person, index)
            is_repeat = dice.chance(3) and index > 0
            text = text if is_repeat else write(dice, who, index)
            admission = "" if note_type == "RR" and dice.chance(33) else 90_000_000 + person
            time = f"{2110 + person % 90}-{dice.whole(1, 12):02d}-{dice.whole(1, 28):02d}"
            stored = f"{time} 18:30:00" if dice.chance(80) else ""
            shown = text.replace("\n", "\r\n") if dice.chance(2) else text
            writer.writerow(
                (
                    f"{who.number}-{note_type}-{index + 1}",
                    who.number,
                    admission,
                    note_type,
                    index + 1,
                    f"{time} 00:00:00",
                    stored,
                    shown,
                )
            )
            written += 1
            if written == number:
                break
        person += 1
    return _gzip(table.getvalue().encode())


def _icd10() -> bytes:
    """An order file: a header for each category and stage, billable codes below."""
    rows = [row for condition in CONDITIONS for row in _icd10_rows(condition)]
    lines = (
        f"{order:05d} {code:<7} {billable} {title[:60]:<60} {title}\r\n"
        for order, (code, billable, title) in enumerate(rows, start=1)
    )
    return "".join(lines).encode("ascii")


def _icd10_rows(condition: Condition) -> Iterator[tuple[str, int, str]]:
    name = capital(
        condition.name.replace("é", "e").replace("è", "e")
    )  # order files are plain ASCII
    yield condition.icd10, 0, name
    if condition.service == "ORTHOPAEDICS":
        for side, where in _SIDES.items():
            for letter, when in _ENCOUNTERS.items():
                yield f"{condition.icd10}00{side}{letter}", 1, f"{name}, {where}, {when}"
        return
    for stage, severity in enumerate(_STAGES):
        yield f"{condition.icd10}{stage}", 0, f"{name}, {severity}"
        for course, complication in enumerate(_COURSES):
            code = f"{condition.icd10}{stage}{course}"
            yield code, 1, f"{name}, {severity}, {complication}"


def _icd9_diagnoses() -> bytes:
    """Titles of diagnoses, latin-1, V- and E-codes among them."""
    rows = []
    for condition in CONDITIONS:
        name = capital(condition.name)
        rows += [(f"{condition.icd9}{i}", f"{name}, {stage}") for i, stage in enumerate(_STAGES)]
        rows += [(f"{condition.icd9}9{i}", f"{name}, {c}") for i, c in enumerate(_COURSES)]
    for number, condition in enumerate(CONDITIONS):
        rows.append((f"V{10 + number // 10}{number % 10}", f"Personal history of {condition.name}"))
    rows += [(f"E880{i}", f"Accidental {cause}") for i, cause in enumerate(_CAUSES)]
    return "".join(f"{code:<5} {title}\n" for code, title in rows).encode("latin-1")


def _icd9_procedures() -> bytes:
    """Titles of procedures, each once."""
    procedures = sorted({condition.procedure for condition in CONDITIONS})
    rows = ((f"{i // 10:02d}{i % 10}", capital(name)) for i, name in enumerate(procedures))
    return "".join(f"{code:<4} {title}\n" for code, title in rows).encode("latin-1")
