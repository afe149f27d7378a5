"""Quality rules: what each finds, and that nothing good goes, on the real files."""

from pathlib import Path

import pytest

from data_prep import codes, mimic
from data_prep.config import Quality, QualityRules
from data_prep.quality import RULES, broken_rules
from data_prep.words import hash_words

SENTENCE = "The patient was seen in clinic and has no complaints today, but feels tired. "


def broken(text: str, rules: QualityRules) -> str | None:
    return broken_rules([text], hash_words([text], whole_values=False), rules)[0]


def varied(number: int) -> str:
    return " ".join(f"word{n}" for n in range(number))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "short"),
        ("...  - ", "short"),
        ("Normal.", None),
        ("12 34 56 78 a", "few_letters"),
        ("___ ___ ___ ___ 1", "few_letters"),
        ("\n".join(["The same line of a note again"] * 30), "repeated_lines"),
        (SENTENCE * 12, "repeated_words"),
        (SENTENCE * 2, None),
        (f"{varied(60)} {'x' * 1001}", "long_word"),
        (f"{varied(60)} {'x' * 1000}", None),
        ("café ménière " + "\ufffd" * 9, "unreadable"),
        ("chest\x00\x01\x02 x ray", "unreadable"),
        ("Größe 12 µm, Ménière\tno\r\nchange", None),
    ],
)
def test_each_rule_finds_what_it_is_for(text: str, rule: str | None) -> None:
    assert broken(text, QualityRules()) == rule
    assert rule is None or rule in RULES


def test_texts_of_a_batch_do_not_change_each_others_verdicts() -> None:
    texts = [SENTENCE * 12, "Normal.", "", varied(80), "\n".join([SENTENCE] * 9)]
    rules = QualityRules()
    together = broken_rules(texts, hash_words(texts, whole_values=False), rules)
    assert together == [broken(text, rules) for text in texts]


def test_code_descriptions_have_no_rules(shared_data: Path) -> None:
    """So none can be dropped; and radiology's rules would not drop a title either."""
    found = codes.documents(shared_data / "codes/cms_2026_dx.zip", "icd10cm")
    assert {Quality().of(document.source) for document in found} == {None}
    for source in ("icd9cm", "icd10pcs", "hcpcs", "labitems"):
        assert Quality().of(source) is None


@pytest.mark.parametrize("source", mimic.SOURCES)
def test_no_real_note_is_dropped(shared_data: Path, source: str) -> None:
    path = shared_data / f"mimic-iv-note/note/{source}.csv.gz"
    rules = Quality().of(source)
    assert rules is not None
    texts = [document.text for document in mimic.documents(path, source)]
    found = broken_rules(texts, hash_words(texts, whole_values=False), rules)
    assert [rule for rule in found if rule] == []


def test_no_short_impression_is_dropped(shared_data: Path) -> None:
    """The sections of the real reports each alone, the impression repeated 301 times included."""
    path = shared_data / "mimic-iv-note/note/radiology.csv.gz"
    texts = [
        line.partition(":")[2]
        for document in mimic.documents(path, "radiology")
        for line in document.text.split("\n")
        if line.startswith("IMPRESSION:") and any(map(str.isalpha, line.partition(":")[2]))
    ]
    assert len(texts) > 3_000
    assert min(len(text.split()) for text in texts) <= 2
    rules = Quality().radiology
    found = broken_rules(texts, hash_words(texts, whole_values=False), rules)
    assert [text for text, rule in zip(texts, found, strict=True) if rule] == []
