"""The made-up corpus: the same bytes for a seed, real formats, every promised case."""

import gzip
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from data_prep import codes, mimic, pubmed
from data_prep.document import Document
from data_prep.synthetic.corpus import write_corpus
from data_prep.synthetic.facts import CONDITIONS

NUMBER = 400


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, seed=17, documents=NUMBER)
    return folder


def _read_pubmed(folder: Path, counts: Counter[str], **options: bool) -> dict[str, Document]:
    paths = pubmed.in_order((folder / "pubmed").rglob("*.xml*"))
    winners = pubmed.fold(map(pubmed.scan, paths))
    return {
        document.id: document
        for path, positions in zip(paths, winners, strict=True)
        for document in pubmed.documents(path, positions, counts=counts, **options)
    }


def _contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_layout_is_that_of_the_real_sources(corpus: Path) -> None:
    """So that configurations for the demo and for real data differ in one key."""
    assert list(_contents(corpus)) == [
        "benchmarks/pmids.txt",
        "codes/CMS32_DESC_LONG_DX.txt",
        "codes/CMS32_DESC_LONG_SG.txt",
        "codes/icd10cm_order_demo.txt",
        "mimic-iv-note/note/discharge.csv.gz",
        "mimic-iv-note/note/radiology.csv.gz",
        "pubmed/baseline/pubmed26n0001.xml.gz",
        "pubmed/baseline/pubmed26n0001.xml.gz.md5",
        "pubmed/baseline/pubmed26n0002.xml.gz",
        "pubmed/baseline/pubmed26n0002.xml.gz.md5",
        "pubmed/updatefiles/pubmed26n0003.xml.gz",
        "pubmed/updatefiles/pubmed26n0003.xml.gz.md5",
    ]


def test_bytes_depend_on_the_seed_alone(corpus: Path, tmp_path: Path) -> None:
    """The command line in another process writes the same; another seed writes other texts."""
    command = [sys.executable, "-m", "data_prep.synthetic", str(tmp_path / "again")]
    command += ["--seed", "17", "--documents", str(NUMBER)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert _contents(tmp_path / "again") == _contents(corpus)
    assert "discharge.csv.gz" in done.stdout
    write_corpus(tmp_path / "other", seed=18, documents=NUMBER)
    other = _contents(tmp_path / "other")
    for name in ("pubmed/baseline/pubmed26n0001.xml.gz", "mimic-iv-note/note/radiology.csv.gz"):
        assert other[name] != _contents(corpus)[name]


def test_pubmed_holds_its_special_cases(corpus: Path) -> None:
    """Retractions, versions, deletions, translations, marks and markup, each read as it should."""
    counts: Counter[str] = Counter()
    found = _read_pubmed(corpus, counts)
    assert counts["retracted"] == 2
    assert counts["without_text"] == 1
    assert counts["title_only"] == 1
    assert counts["replaced"] == 4  # revised, older version, and two deleted
    assert len(found) == counts["documents"] > 180
    assert found["pubmed-90000000"].meta["file"] == "pubmed26n0003.xml.gz"
    assert found["pubmed-90000001"].meta["version"] == 2
    assert not {"pubmed-90000002", "pubmed-90000003"} & set(found)
    assert sum(document.meta["truncated"] for document in found.values()) == 1
    texts = "\n".join(document.text for document in found.values())
    for sign in ("[", "<i>", "&amp;", "TRUNCATED", "Zusammenfassung", "nobody"):
        assert sign not in texts
    assert "Doses of 5 mg or less (<5 mg) were safe." in texts
    assert re.search(r"^RESULTS: ", texts, re.MULTILINE)
    raw = gzip.decompress((corpus / "pubmed/baseline/pubmed26n0002.xml.gz").read_bytes()).decode()
    for sign in ("<i>", "<sub>", "<sup>", "<ArticleTitle>[", "<OtherAbstract", "Retracted Publ"):
        assert sign in raw


def test_notes_hold_their_special_cases(corpus: Path) -> None:
    """Layout, redaction marks, several notes a subject in both tables, missing hadm_id, repeats."""
    read = {
        source: list(mimic.documents(corpus / f"mimic-iv-note/note/{source}.csv.gz", source))
        for source in mimic.SOURCES
    }
    summaries, reports = read["discharge"], read["radiology"]
    assert (len(summaries), len(reports)) == (NUMBER // 5, NUMBER * 3 // 10)
    assert {d.group for d in summaries} & {d.group for d in reports}
    assert max(Counter(d.group for d in summaries).values()) > 1
    without = sum(d.meta["admission"] is None for d in reports)
    assert 0.2 < without / len(reports) < 0.5
    assert all(d.meta["admission"] for d in summaries)
    for notes in read.values():
        assert max(Counter(note.text for note in notes).values()) > 1
        assert all("___" in note.text and "\n \n" in note.text for note in notes)
    assert all("\nBrief Hospital Course:\n" in note.text for note in summaries)


def test_code_tables_parse(corpus: Path) -> None:
    """Headers and billable codes, accents in latin-1, V- and E-codes, procedures."""
    found = {
        kind: list(codes.documents(corpus / "codes" / name, kind))
        for name, kind in (
            ("icd10cm_order_demo.txt", "icd10cm"),
            ("CMS32_DESC_LONG_DX.txt", "icd9cm-dx"),
            ("CMS32_DESC_LONG_SG.txt", "icd9cm-sg"),
        )
    }
    assert {d.meta["billable"] for d in found["icd10cm"]} == {True, False}
    assert any(
        re.search(r"S72\.00\dA: Hip fracture, left, initial", d.text) for d in found["icd10cm"]
    )
    titles = " ".join(d.text for d in found["icd9cm-dx"])
    for sign in ("Ménière", "code for V1", "code for E880.0"):
        assert sign in titles
    assert len({d.text for table in found.values() for d in table}) == sum(map(len, found.values()))


def test_texts_carry_relations_to_learn(corpus: Path) -> None:
    """A drug goes with its condition: what is masked can be told from what is not."""
    texts = [d.text.lower() for d in _read_pubmed(corpus, Counter()).values()]
    owners = Counter(drug[0] for condition in CONDITIONS for drug in condition.drugs)
    seen = 0
    for condition in CONDITIONS:
        for name in (drug[0] for drug in condition.drugs if owners[drug[0]] == 1):
            about = [text for text in texts if f" received {name.lower()} (" in text]
            assert all(f"adults with {condition.name.lower()}" in text for text in about)
            seen += len(about)
    assert seen > 30


def test_more_documents_leave_the_earlier_ones(corpus: Path, tmp_path: Path) -> None:
    """Text is a pure function of seed and number."""
    write_corpus(tmp_path, seed=17, documents=2 * NUMBER)
    path = "mimic-iv-note/note/discharge.csv.gz"
    small, large = (list(mimic.documents(f / path, "discharge")) for f in (corpus, tmp_path))
    assert large[: len(small)] == small
