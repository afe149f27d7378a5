"""What the data card counts in texts: terms, ages, headings; and nothing of a text comes out."""

import json
import re
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import mimic
from data_prep.card.statistics import DECADES, TermIndex, stated_age, write_statistics
from data_prep.card.terms import MODALITIES, REGIONS, SERVICES, TOPICS
from data_prep.document import Document, write_documents

NOTE = {"note_type": "DS", "note_seq": 1, "admission": None}
ARTICLE: dict[str, Any] = {
    "year": 2003,
    "publication_types": ["Journal Article", "Review"],
    "languages": ["eng"],
    "language": "en",
    "has_abstract": True,
}


def words(text: str) -> list[bytes]:
    return re.findall(rb"[a-z0-9\x80-\xff]+", text.lower().encode())


def counted(folder: Path, *documents: Document) -> dict[str, Any]:
    write_documents(folder / "x.parquet", documents)
    write_statistics(folder / "x.parquet", folder / "x.json")
    return json.loads((folder / "x.json").read_text())


def test_terms_are_written_as_they_are_looked_for() -> None:
    index = TermIndex(TOPICS)
    for topic, groups in TOPICS.items():
        for group, terms in groups.items():
            assert len(set(terms)) == len(terms)
            for term in terms:
                assert re.fullmatch("[a-z]+( [a-z]+)*", term), term
                assert (topic, group) in index.find(words(f"A {term.upper()}."))
    for names in (SERVICES, MODALITIES, REGIONS):
        assert len({name for name, _ in names}) == len(names)
        assert all(re.fullmatch("[a-z]+", word) for _, known in names for word in known)


def test_terms_are_whole_words_and_punctuation_does_not_count() -> None:
    index = TermIndex(TOPICS)
    found = index.find(words("African-American WOMEN; the childbirth, white blood cells, Theman"))
    assert found == {("race or ethnicity", "Black or African American"), ("sex", "female")}
    assert index.find(words("a native of the Pacific")) == set()
    assert index.find([]) == set()


@given(st.lists(st.sampled_from(["she", "older", "adults", "white", "men", "native", "x"])))
def test_terms_are_those_of_a_plain_search(texts: list[str]) -> None:
    text = " ".join(texts)
    expected = {
        (topic, group)
        for topic, groups in TOPICS.items()
        for group, terms in groups.items()
        if any(re.search(rf"\b{term}\b", text) for term in terms)
    }
    assert TermIndex(TOPICS).find(words(text)) == expected


@pytest.mark.parametrize(
    ("text", "age"),
    [
        ("a 55-year-old man, 70 years old", 55),
        ("This 9 yo girl, a 7 y/o boy", 7),
        ("patients aged 65 or older", 65),
        ("___ year old man", None),
        ("for 10 years; an old man", None),
        ("in 2003 years old", None),
        ("old", None),
        ("", None),
    ],
)
def test_the_first_age_is_found(text: str, age: int | None) -> None:
    assert stated_age(words(text)) == age


def test_notes_are_counted_by_names_of_lists_only(tmp_path: Path) -> None:
    """A heading may hold anything; what is no word of a list is `other`."""
    heading = "Date of Birth:  ___             Sex:   F\n \nService: {}\n \nShe is 93 years old."
    found = counted(
        tmp_path,
        *(
            Document(f"discharge-{n}", "discharge", "s", heading.format(service), NOTE)
            for n, service in enumerate(["MEDICINE", "CARDIOTHORACIC SURGERY", "John Canary", ""])
        ),
        Document("discharge-9", "discharge", "s", "No heading.", NOTE | {"note_type": "Canary"}),
    )
    breakdowns = found["breakdowns"]
    assert breakdowns["service"] == {
        "medicine": 1,
        "cardiothoracic surgery": 1,
        "other": 2,
        "not stated": 1,
    }
    assert breakdowns["sex in the heading"] == {"F": 4, "not stated": 1}
    assert breakdowns["stated age"] == {DECADES[-1]: 4}
    assert breakdowns["sex"] == {"female": 4}
    assert breakdowns["note type"] == {"DS": 4, "other": 1}
    assert breakdowns["admission"] == {"without one": 5}
    assert found["totals"]["documents"] == 5
    assert "anary" not in json.dumps(found)


@pytest.mark.parametrize(
    ("text", "modality", "region"),
    [
        ("EXAMINATION:  CT HEAD W/O CONTRAST\n\nFINDINGS: chest", "CT", "head and neck"),
        ("INDICATION: fever\nEXAMINATION: CHEST (PA AND LAT)", "radiography", "chest"),
        ("\n LIVER OR GALLBLADDER US (SINGLE ORGAN)\n", "ultrasound", "abdomen and pelvis"),
        ("MR L-SPINE W/O CONTRAST", "MRI", "spine"),
        ("Wet read by the resident", "other", "other"),
    ],
)
def test_reports_are_counted_by_what_was_examined(
    tmp_path: Path, text: str, modality: str, region: str
) -> None:
    found = counted(tmp_path, Document("radiology-1", "radiology", "s", text, NOTE))["breakdowns"]
    assert (found["modality"], found["region"]) == ({modality: 1}, {region: 1})


def test_articles_and_codes_are_counted_by_what_is_known_of_them(tmp_path: Path) -> None:
    summary = {"part": "other_abstract", "language": None, "year": None}
    code = {"system": "icd9cm", "kind": "diagnosis", "version": "32", "billable": None}
    found = counted(
        tmp_path,
        Document("pubmed-1", "pubmed", "1", "Women\nMen", ARTICLE),
        Document("pubmed-1-other-1", "pubmed", "1", "Women", ARTICLE | summary),
        Document("icd9cm-dx-0010", "icd9cm", "1", "Pregnant women", code),
    )["breakdowns"]
    assert found["publication year"] == {"2003": 1, "not stated": 1}
    assert found["article type"] == {"Journal Article": 2, "Review": 2}
    assert found["language of the text"] == {"en": 1, "not identified": 1}
    assert found["content"] == {"title and abstract": 1, "other abstract": 1}
    # A code's title says nothing about whom it is of.
    assert found["sex"] == {"female": 2, "male": 1}
    assert found["table"] == {"icd9cm diagnosis, 32": 1}


def test_memory_does_not_grow_with_the_number_of_documents(tmp_path: Path) -> None:
    peaks = []
    for number in (1_000, 8_000):
        found = (
            Document(f"pubmed-{n}", "pubmed", "", "Men. " * 40, ARTICLE) for n in range(number)
        )
        write_documents(tmp_path / "x.parquet", found)
        tracemalloc.start()
        write_statistics(tmp_path / "x.parquet", tmp_path / "x.json")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


def test_real_reports_have_the_terms_of_a_plain_search(shared_data: Path, tmp_path: Path) -> None:
    """Document frequencies of every group, against regular expressions over the real reports."""
    path = shared_data / "mimic-iv-note/note/radiology.csv.gz"
    notes = list(mimic.documents(path, "radiology"))
    found = counted(tmp_path, *notes)
    texts = [re.sub(r"[^a-z0-9\x80-\U0010ffff]+", " ", note.text.lower()) for note in notes]
    for topic, groups in TOPICS.items():
        expected: Counter[str] = Counter()
        for group, terms in groups.items():
            form = re.compile(rf"(?:^| )(?:{'|'.join(terms)})(?: |$)")
            expected[group] = sum(form.search(text) is not None for text in texts)
        assert Counter(found["breakdowns"].get(topic, {})) == +expected
    assert found["totals"]["words"] == sum(len(text.split()) for text in texts)
    assert found["breakdowns"]["region"]["chest"] > 3_500
