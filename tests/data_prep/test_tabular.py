"""CMS's tabular list: chapter and block above every ICD-10-CM code, in a file of its form."""

import gzip
import zipfile
from pathlib import Path
from typing import Any

import pytest

from common.config import ConfigError
from data_prep import codes
from data_prep.codes.tabular import read_headings
from data_prep.config import DataPrep, Sources, Tokenizer
from data_prep.document import InputError, read_documents
from data_prep.pipeline import Pipeline, find_run

NAME = "icd10cm_tabular_2026.xml"
# As CMS's: a version, an introduction and an index of sections; notes beside codes; a block that
# is only a heading of others, and one of a single category; a title over two lines.
TABULAR = """<?xml version="1.0" encoding="utf-8"?>
<ICD10CM.tabular>
  <version>2026</version>
  <introduction><introSection type="title"><title>TABULAR LIST</title></introSection></introduction>
  <chapter>
    <name>1</name>
    <desc>Certain infectious and parasitic diseases (A00-B99)</desc>
    <includes><note>diseases that are transmissible</note></includes>
    <sectionIndex>
      <sectionRef first="A00" last="A09" id="A00-A09">Intestinal infectious diseases</sectionRef>
      <sectionRef first="B10" last="B10" id="B10">Other human herpesviruses</sectionRef>
    </sectionIndex>
    <section id="A00-A09">
      <desc>Intestinal infectious
        diseases (A00-A09)</desc>
      <diag><name>A00</name><desc>Cholera</desc>
        <diag><name>A00.0</name><desc>Cholera due to Vibrio cholerae</desc>
          <inclusionTerm><note>Classical cholera</note></inclusionTerm></diag>
      </diag>
    </section>
    <section id="B10"><desc>Other human herpesviruses (B10)</desc>
      <diag><name>B10</name><desc>Other human herpesviruses</desc></diag></section>
  </chapter>
  <chapter>
    <name>19</name>
    <desc>Injury, poisoning and certain other consequences of external causes (S00-T88)</desc>
    <section id="S00-S99"><desc>Injuries (S00-S99)</desc></section>
    <section id="S70-S79"><desc>Injuries to the hip and thigh (S70-S79)</desc>
      <sevenChrDef><extension char="A">initial encounter</extension></sevenChrDef>
      <diag><name>S72</name><desc>Fracture of femur</desc></diag></section>
  </chapter>
</ICD10CM.tabular>
"""
ORDER = "".join(
    f"{number:05d} {code:7} {billable} {title[:60]:60} {title}\r\n"
    for number, (code, billable, title) in enumerate(
        [
            ("A00", 0, "Cholera"),
            ("A000", 1, "Cholera due to Vibrio cholerae"),
            ("S72", 0, "Fracture of femur"),
            ("S72001A", 1, "Fracture of neck of right femur, initial encounter"),
            ("Z99", 0, "Dependence on enabling machines"),
        ],
        start=1,
    )
)
INJURY = "Injury, poisoning and certain other consequences of external causes (S00-T88)"


def _write(folder: Path, tabular: str = TABULAR) -> Path:
    path = folder / NAME
    path.write_text(tabular, encoding="utf-8")
    (folder / "icd10cm_order_2026.txt").write_text(ORDER)
    return path


def test_chapter_and_block_of_each_category(tmp_path: Path) -> None:
    path = _write(tmp_path)
    found = read_headings(path)
    first = ("Chapter 1", "Certain infectious and parasitic diseases (A00-B99)")
    assert found == {
        "A00": (first, ("A00-A09", "Intestinal infectious diseases")),
        "B10": (first, ("B10", "Other human herpesviruses")),
        "S72": (("Chapter 19", INJURY), ("S70-S79", "Injuries to the hip and thigh")),
    }
    with gzip.open(tmp_path / f"{NAME}.gz", "wb") as file:
        file.write(path.read_bytes())
    assert read_headings(tmp_path / f"{NAME}.gz") == found


@pytest.mark.parametrize("name", [NAME, "icd10cm-tabular-April-1-2026.xml", "Tabular.xml"])
def test_the_list_is_found_among_what_cms_packs_with_it(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "2026-code-tables-tabular-and-index.zip", "w") as archive:
        archive.writestr(f"Table and Index/{name}", TABULAR)
        archive.writestr("Table and Index/icd10cm_tabular_addenda_2026.xml", "<addenda/>")
        archive.writestr("Table and Index/icd10cm_index_2026.xml", "<ICD10CM.index/>")
    assert len(read_headings(tmp_path / "2026-code-tables-tabular-and-index.zip")) == 3


def test_a_code_is_seen_below_its_chapter_and_block(tmp_path: Path) -> None:
    """Of the order file and of MIMIC's dictionary; a category that is not in the list has none."""
    headings = _write(tmp_path)
    options: dict[str, Any] = {"templates": ["hierarchy"], "headings": headings}
    texts = {
        d.id: d.text.split("\n")[1:]
        for d in codes.documents(tmp_path / "icd10cm_order_2026.txt", "icd10cm", **options)
    }
    assert texts["icd10cm-S72001A"] == [
        f"Chapter 19: {INJURY}",
        "S70-S79: Injuries to the hip and thigh",
        "S72: Fracture of femur",
        "S72.001A: Fracture of neck of right femur, initial encounter",
    ]
    assert texts["icd10cm-A00"][1:] == ["A00-A09: Intestinal infectious diseases", "A00: Cholera"]
    assert texts["icd10cm-Z99"] == ["Z99: Dependence on enabling machines"]
    table = tmp_path / "d_icd_diagnoses.csv"
    table.write_text("icd_code,icd_version,long_title\nA000,10,Cholera\nA000,9,Not this\n")
    ten, nine = codes.documents(table, "d-icd-diagnoses", **options)
    assert len(ten.text.split("\n")) == 4
    assert "Chapter 1: " in ten.text
    assert "Chapter" not in nine.text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ICD10CM.tabular", "ICD10CM.index", "is not the tabular list of ICD-10-CM: its root"),
        ("</ICD10CM.tabular>", "", "line 3[0-9]: no whole XML; fetch it again"),
        ("<name>S72</name>", "<name>A00</name>", "line 3[0-9]: A00 for the 2nd time"),
        ("<name>S72</name>", "<name>S72.0</name>", "line 3[0-9]: no category of a block"),
        ('<section id="S70-S79">', "<section>", "line 3[0-9]: no category of a block"),
        ("<desc>Other human herpesviruses (B10)</desc>", "", "a section without <desc>"),
        ("<name>19</name>", "", "a chapter without <name>"),
        ("diag>", "other>", "holds no category of ICD-10-CM"),
    ],
)
def test_another_form_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_headings(_write(tmp_path, TABULAR.replace(old, new)))


def _config(raw: Path, out: Path, **sources: list[str]) -> DataPrep:
    return DataPrep(
        raw_dir=raw,
        out_dir=out,
        sources=Sources(**sources),
        tokenizer=Tokenizer(vocab_size=512),
        code_templates=["hierarchy"],
    )


def test_the_list_is_an_input_that_makes_no_documents(tmp_path: Path) -> None:
    """Another list makes the documents anew, and its md5 is that of an input."""
    _write(tmp_path)
    config = _config(
        tmp_path, tmp_path / "out", icd10cm=["icd10cm_order_*.txt"], icd10cm_tabular=[NAME]
    )
    run = find_run(config)[0]
    assert [found.kind for found in run.inputs] == ["icd10cm", "icd10cm-tabular"]
    pipeline = Pipeline(run)
    for make in (pipeline.scan, pipeline.fold, pipeline.documents):
        stage = make()
        stage.prepare()
        for index in range(len(stage.tasks)):
            stage.run_task(index)
        stage.finish()
    (path,) = (tmp_path / "out" / "documents").rglob("*.parquet")
    assert sum("Chapter" in document.text for document in read_documents(path)) == 4
    _write(tmp_path, TABULAR.replace("transmissible", "communicable"))
    assert find_run(config)[0].keys["documents"] != run.keys["documents"]


def test_one_list_for_a_table_that_has_its_codes(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / "icd10cm_tabular_2025.xml").write_text(TABULAR)
    (tmp_path / "CMS32_DESC_LONG_DX.txt").write_text("0010  Cholera\n")
    both = ["icd10cm_tabular_*.xml"]
    with pytest.raises(ConfigError, match=r"icd10cm_tabular has 2 files .*name the newest"):
        find_run(_config(tmp_path, tmp_path / "a", icd10cm=["*order*"], icd10cm_tabular=both))
    with pytest.raises(ConfigError, match=r"name that too: icd10cm or d_icd_diagnoses"):
        find_run(_config(tmp_path, tmp_path / "b", icd9cm_dx=["CMS*"], icd10cm_tabular=[NAME]))
