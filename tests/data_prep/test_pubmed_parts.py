"""PubMed's other abstracts and vernacular titles, and which languages are kept."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.document import Document
from data_prep.pubmed import documents, fold, in_order, scan

ENGLISH = (
    "We report on the use of metformin in a cohort of patients who were followed up for years."
)
GERMAN = "Die Behandlung der Patienten mit Metformin war bei den meisten von ihnen erfolgreich."
RECORD = f"""<PubmedArticleSet><MedlineCitation><PMID Version="1">7</PMID><Article>
  <ArticleTitle>[Treatment with metformin].</ArticleTitle>
  <Abstract><AbstractText>{ENGLISH}</AbstractText></Abstract>
  <Language>ger</Language><VernacularTitle>Behandlung der Patienten mit Metformin.</VernacularTitle>
  <PublicationTypeList>%s</PublicationTypeList></Article>
  <OtherAbstract Type="Publisher" Language="ger"><AbstractText Label="ZIEL">{GERMAN}</AbstractText>
    <CopyrightInformation>Verlag</CopyrightInformation></OtherAbstract>
  <OtherAbstract Type="NASA"><AbstractText> </AbstractText></OtherAbstract>
  <OtherAbstract Type="plain-language-summary" Language="eng"><AbstractText>{ENGLISH} It is safe.
    </AbstractText></OtherAbstract></MedlineCitation></PubmedArticleSet>"""
RETRACTED = '<PublicationType UI="D016441">Retracted Publication</PublicationType>'
EVERYTHING: dict[str, Any] = {"other_abstracts": ["*"], "vernacular_titles": True}


def _read(folder: Path, record: str = RECORD % "", **options: Any) -> list[Document]:
    path = folder / "x.xml"
    path.write_text(record, encoding="utf-8")
    return list(documents(path, np.arange(1), **options))


def test_parts_are_documents_of_their_own(tmp_path: Path) -> None:
    """With the article's group, so that a split cannot part them, and what they are in meta."""
    article, german, summary, title = _read(tmp_path, **EVERYTHING)
    assert article.text == f"Treatment with metformin.\n{ENGLISH}"
    assert (german.id, german.text) == ("pubmed-7-other-1", f"ZIEL: {GERMAN}")
    assert (summary.id, summary.text) == ("pubmed-7-other-3", f"{ENGLISH} It is safe.")
    assert (title.id, title.text) == (
        "pubmed-7-vernacular",
        "Behandlung der Patienten mit Metformin.",
    )
    assert {d.group for d in (article, german, summary, title)} == {"pubmed-7"}
    assert "part" not in article.meta
    assert german.meta == article.meta | {
        "part": "other_abstract",
        "type": "Publisher",
        "declared_language": "ger",
    }
    assert title.meta["part"] == "vernacular_title"
    assert title.meta["has_abstract"] is False


def test_which_parts_is_a_choice(tmp_path: Path) -> None:
    """By type; by default none."""
    assert [d.id for d in _read(tmp_path)] == ["pubmed-7"]
    wanted = _read(tmp_path, other_abstracts=["plain-language-summary", "PIP"])
    assert [d.id for d in wanted] == ["pubmed-7", "pubmed-7-other-3"]


def test_languages_are_those_of_the_text(tmp_path: Path) -> None:
    """The article says `ger` and is English; each document is kept by its own language."""
    counts: Counter[str] = Counter()
    english = _read(tmp_path, languages=["en"], counts=counts, **EVERYTHING)
    assert [d.id for d in english] == ["pubmed-7", "pubmed-7-other-3"]
    assert {d.meta["language"] for d in english} == {"en"}
    assert counts == Counter(
        records=1, documents=2, other_abstracts=1, other_language_parts=2, title_only=0
    )
    counts.clear()
    german = _read(tmp_path, languages=["de", "fr"], counts=counts, **EVERYTHING)
    assert [d.id for d in german] == ["pubmed-7-other-1", "pubmed-7-vernacular"]
    assert counts["other_language"] == counts["other_language_parts"] == 1


@pytest.mark.parametrize(("text", "kept"), [("Nasopharyngeal carcinoma.", 1), (GERMAN, 0)])
def test_a_title_that_is_too_short_to_tell_counts_as_english(
    tmp_path: Path, text: str, kept: int
) -> None:
    """NLM's titles are English; a part that cannot be told is left out instead."""
    article = f"<ArticleTitle>{text}</ArticleTitle>"
    article += "<VernacularTitle>Nephropathia.</VernacularTitle>"
    record = f"<MedlineCitation><PMID>7</PMID><Article>{article}</Article></MedlineCitation>"
    found = _read(tmp_path, record, languages=["en"], vernacular_titles=True)
    assert [d.id for d in found] == ["pubmed-7"] * kept
    assert all(d.meta["language"] is None for d in found)


def test_parts_of_a_retracted_article_are_left_out(tmp_path: Path) -> None:
    """With the article, and kept with it."""
    assert _read(tmp_path, RECORD % RETRACTED, **EVERYTHING) == []
    assert len(_read(tmp_path, RECORD % RETRACTED, keep_retracted=True, **EVERYTHING)) == 4


def test_the_real_parts(shared_data: Path) -> None:
    """What is counted adds up; the abstract declared Chinese that is English is taken for it."""
    folder = shared_data / "pubmed"
    paths = in_order(p for p in folder.rglob("*.xml*") if "nonconforming" not in p.parts)
    winners = fold([scan(path) for path in paths])
    counts: Counter[str] = Counter()
    found = [
        document
        for path, positions in zip(paths, winners, strict=True)
        for document in documents(path, positions, languages=["en"], counts=counts, **EVERYTHING)
    ]
    assert len({d.id for d in found}) == len(found) == counts["documents"]
    parts = counts["other_abstracts"] + counts["vernacular_titles"]
    assert counts["records"] == counts["documents"] - parts + sum(
        counts[name] for name in ("replaced", "without_text", "retracted", "other_language")
    )
    assert sum("part" in d.meta for d in found) == parts
    others = {d.id: d.meta for d in found if d.meta.get("part") == "other_abstract"}
    assert others["pubmed-37482746-other-1"]["declared_language"] == "chi"
    assert counts["other_abstracts"] == 7
    assert counts["vernacular_titles"] <= 2
    assert counts["other_language"] < 0.0005 * counts["records"]
