"""Tables of HCPCS, MIMIC, LOINC and RxNorm, in their published formats: nothing of them is lost."""

import contextlib
import csv
import gzip
import io
import json
import re
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.codes import KINDS, documents
from data_prep.codes.hcpcs import join
from data_prep.document import Document, InputError

PAPER = {"templates": ["paper"]}


def _write(path: Path, content: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding))
    return path


def _csv(header: list[str], *rows: list[str]) -> str:
    """As PhysioNet and Regenstrief write it: quoted where needed, line breaks inside fields."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerows([header, *rows])
    return table.getvalue()


def _schema(shared_data: Path, table: str) -> list[str]:
    fields = json.loads((shared_data / "mimic_schema" / f"hosp_{table}.json").read_text())
    return [field["name"] for field in fields]


def _texts(found: list[Document]) -> dict[str, str]:
    return {document.id: document.text for document in found}


# ----------------------------------------------------------------------------------------- ICD-10

ORDER_PCS = "\r\n".join(
    f"{number:05d} {code:<7} {billable} {title[:60]:<60} {title}"
    for number, (code, billable, title) in enumerate(
        [
            ("001", 0, "Central Nervous System and Cranial Nerves, Bypass"),
            ("0016070", 1, "Bypass Cerebral Ventricle to Nasopharynx, Open Approach"),
            ("0DTJ4ZZ", 1, "Resection of Appendix, Percutaneous Endoscopic Approach"),
        ],
        start=1,
    )
)


def test_icd10pcs(tmp_path: Path) -> None:
    """No dot; the three-character table is the heading of its codes."""
    path = _write(tmp_path / "icd10pcs_order_2026.txt", ORDER_PCS)
    header, bypass, resection = documents(path, "icd10pcs")
    assert header.meta["billable"] is False
    assert resection == Document(
        id="icd10pcs-0DTJ4ZZ",
        source="icd10pcs",
        group="icd10pcs-0DT",
        text="ICD 10 PCS code for 0DTJ4ZZ: Resection of Appendix, Percutaneous Endoscopic Approach",
        meta={
            "system": "icd10pcs",
            "kind": "procedure",
            "version": "2026",
            "billable": True,
            "category": "0DT",
        },
    )
    *_, tree, _ = documents(path, "icd10pcs", templates=["hierarchy"])
    assert tree.text == (
        "ICD-10-PCS procedure codes\n001: Central Nervous System and Cranial Nerves, Bypass\n"
        "0016070: Bypass Cerebral Ventricle to Nasopharynx, Open Approach"
    )
    assert bypass.group == header.group


def test_editions_can_stand_side_by_side(tmp_path: Path) -> None:
    """The id names the edition when asked to, the group never; an unknown edition is refused."""
    paths = [_write(tmp_path / f"icd10pcs_order_{y}.txt", ORDER_PCS) for y in (2025, 2026)]
    found = [list(documents(path, "icd10pcs", edition_in_id=True)) for path in paths]
    assert [d.id for d in found[0]][2] == "icd10pcs-2025-0DTJ4ZZ"
    assert len({d.id for table in found for d in table}) == 6
    for old, new in zip(*found, strict=True):
        assert (old.text, old.group) == (new.text, new.group)
    other = _write(tmp_path / "order.txt", ORDER_PCS)
    assert len(list(documents(other, "icd10pcs"))) == 3
    with pytest.raises(InputError, match=r"order\.txt .* which edition"):
        list(documents(other, "icd10pcs", edition_in_id=True))


# ------------------------------------------------------------------------------------------ HCPCS


def _anweb(code: str, record: str, text: str, short: str = "", number: int = 1) -> str:
    return f"{code:>5}{number:04d}0{record}{text:<80}{short:<28}{'':100}20030101N".ljust(320)


ANWEB = "\r\n".join(
    [
        "HCPCS copyright notice, to be shown with the table".ljust(320),
        _anweb(
            "A0080", "3", "Non-emergency transportation, per mile - vehicle", "Noninterest escort"
        ),
        _anweb("A0080", "4", "(individual or organization), with no vested inter-", number=2),
        _anweb("A0080", "4", "est", number=3),
        _anweb("J1100", "3", "Injection, dexamethasone sodium phosphate, 1 mg", "Dexamethasone"),
        _anweb(
            "RT", "7", "Right side (used to identify procedures performed on the right", "Right"
        ),
        _anweb("RT", "8", "side of the body)", number=2),
    ]
)


def test_hcpcs(tmp_path: Path) -> None:
    """Continuation lines are joined, modifiers are a kind of their own, notices are no codes."""
    path = _write(tmp_path / "HCPC2026_JUL_ANWEB_06172026.txt", ANWEB, "latin-1")
    vehicle, injection, right = documents(path, "hcpcs")
    assert vehicle.text == (
        "HCPCS code for A0080: Non-emergency transportation, per mile - vehicle (individual or "
        "organization), with no vested inter-est"
    )
    assert (vehicle.group, vehicle.meta["version"]) == ("hcpcs-A00", "2026_JUL")
    assert injection.text.endswith("J1100: Injection, dexamethasone sodium phosphate, 1 mg")
    assert (right.id, right.meta["kind"], right.group) == (
        "hcpcs-mod-RT",
        "modifier",
        "hcpcs-mod-R",
    )
    assert right.text.endswith("performed on the right side of the body)")
    (record, *_) = documents(path, "hcpcs", templates=["record"])
    assert record.text.splitlines()[-1] == "Short title: Noninterest escort"


@pytest.mark.parametrize(
    ("chunks", "text"),
    [
        (["one ", " two"], "one two"),
        (["per mile -", "vehicle"], "per mile - vehicle"),
        (["non-", "invasive"], "non-invasive"),
        (["and/", "or"], "and/or"),
        (["with", ""], "with"),
        ([], ""),
    ],
)
def test_continuation_lines_break_between_words(chunks: list[str], text: str) -> None:
    """Or after a hyphen or stroke, which then belongs to the word."""
    assert join(chunks).strip() == text


@pytest.mark.parametrize(
    "line",
    [
        _anweb("J1100", "4", "of another code"),
        "free text in between",
        _anweb("A0080", "3", "Again"),
    ],
)
def test_a_broken_anweb_file_is_refused_by_line(tmp_path: Path, line: str) -> None:
    """A continuation of another code, text after the first record, a code for the second time."""
    lines = ANWEB.split("\r\n")
    path = _write(tmp_path / "HCPC2026_ANWEB.txt", "\r\n".join([*lines[:4], line]), "latin-1")
    with pytest.raises(InputError, match=r"ANWEB\.txt, line 5: .*fetch"):
        list(documents(path, "hcpcs"))


def test_names_of_anweb_files(tmp_path: Path) -> None:
    """Those of all years, and nothing else from the zip they come in."""
    names = {
        "HCPC2019_CONTR_ANWEB.txt": "2019",
        "HCPC2026_JUL_ANWEB_06172026.txt": "2026_JUL",
        "HCPC2024_APR_ANWEB_v2.txt": "2024_APR",
        "HCPC2025_OCT_ANWEB.txt": "2025_OCT",
    }
    for name, version in names.items():
        archive = tmp_path / f"{name}.zip"
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr(name, ANWEB)
            file.writestr("HCPC2026_recordlayout.txt", "layout")
            file.writestr("proc_notes_APR2026.txt", "notes")
        assert {d.meta["version"] for d in documents(archive, "hcpcs")} == {version}


# ------------------------------------------------------------------------------------------ MIMIC


def test_mimic_icd(tmp_path: Path, shared_data: Path) -> None:
    """ICD-9 and ICD-10 side by side, with the groups of CMS's codes; zeros stay; headings too."""
    header = _schema(shared_data, "d_icd_diagnoses")
    table = _csv(
        header,
        ["0010", "9", "Cholera due to vibrio cholerae"],
        ["A00", "10", "Cholera"],
        ["A000 ", "10", 'Cholera due to "Vibrio cholerae" 01,\n biovar cholerae'],
        ["E8870", "9", "Fracture, cause unspecified"],
        ["A001", "10", ""],
    )
    path = tmp_path / "hosp" / "d_icd_diagnoses.csv.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(table.encode()))
    counts: Counter[str] = Counter()
    found = list(documents(path, "d-icd-diagnoses", counts, **PAPER))
    assert counts == Counter(records=5, documents=4, without_text=1)
    assert [(d.id, d.group, d.source) for d in found] == [
        ("mimic-icd9cm-dx-0010", "icd9cm-dx-001", "mimic_codes"),
        ("mimic-icd10cm-A00", "icd10cm-A00", "mimic_codes"),
        ("mimic-icd10cm-A000", "icd10cm-A00", "mimic_codes"),
        ("mimic-icd9cm-dx-E8870", "icd9cm-dx-E887", "mimic_codes"),
    ]
    assert found[2].text == (
        'ICD 10 code for A00.0: Cholera due to "Vibrio cholerae" 01, biovar cholerae'
    )
    *_, tree, _ = documents(path, "d-icd-diagnoses", templates=["hierarchy"])
    assert tree.text.splitlines()[1] == "A00: Cholera"
    procedures = _csv(header, ["0011", "9", "Infusion"], ["0DTJ4ZZ", "10", "Resection"])
    found = list(
        documents(_write(tmp_path / "d_icd_procedures.csv", procedures), "d-icd-procedures")
    )
    assert [d.text for d in found] == [
        "ICD 9 code for 00.11: Infusion",
        "ICD 10 PCS code for 0DTJ4ZZ: Resection",
    ]


def test_codes_that_were_read_as_numbers_are_noticed(tmp_path: Path) -> None:
    """Of a whole table of ICD-9 codes some begin with 0, unless something has eaten the zeros."""
    rows = [[str(code), "9", f"Title {code}"] for code in range(1000, 2000)]
    header = ["icd_code", "icd_version", "long_title"]
    path = _write(tmp_path / "d_icd_diagnoses.csv", _csv(header, *rows))
    with pytest.raises(InputError, match=r"d_icd_diagnoses\.csv: none of 1000 .* as numbers"):
        list(documents(path, "d-icd-diagnoses"))
    _write(path, _csv(header, ["0010", "9", "Cholera"], *rows))
    assert len(list(documents(path, "d-icd-diagnoses"))) == 1001


def test_mimic_hcpcs_and_labitems(tmp_path: Path, shared_data: Path) -> None:
    """The short description where there is no long one; a label with its fluid and category."""
    hcpcs = _csv(
        _schema(shared_data, "d_hcpcs"),
        ["A0080", "1", "Noninterest escort in non er, by car", "Noninterest escort"],
        ["00100", "", "", "Anesthesia"],
        ["00102", "", "", ""],
    )
    counts: Counter[str] = Counter()
    path = _write(tmp_path / "d_hcpcs.csv", hcpcs)
    assert _texts(list(documents(path, "d-hcpcs", counts))) == {
        "mimic-hcpcs-A0080": "HCPCS code for A0080: Noninterest escort in non er, by car",
        "mimic-hcpcs-00100": "HCPCS code for 00100: Anesthesia",
    }
    assert counts["without_text"] == 1
    items = _csv(
        _schema(shared_data, "d_labitems"),
        ["50809", "Glucose", "Blood", "Blood Gas"],
        ["50931", "Glucose", "Blood", "Chemistry"],
        ["52999", "Delete", "", ""],
    )
    path = _write(tmp_path / "d_labitems.csv", items)
    gas, chemistry, bare = documents(path, "d-labitems")
    assert gas.text == "MIMIC laboratory item code for 50809: Glucose (Blood, Blood Gas)"
    assert (bare.id, bare.text.rpartition(": ")[2]) == ("mimic-lab-52999", "Delete")
    assert gas.group == chemistry.group != bare.group


# ------------------------------------------------------------------------------------------ LOINC

LOINC_COLUMNS = (
    "LOINC_NUM,COMPONENT,PROPERTY,TIME_ASPCT,SYSTEM,SCALE_TYP,METHOD_TYP,CLASS,VersionLastChanged,"
    "CHNG_TYPE,DefinitionDescription,STATUS,CONSUMER_NAME,CLASSTYPE,FORMULA,EXMPL_ANSWERS,"
    "SURVEY_QUEST_TEXT,SURVEY_QUEST_SRC,UNITSREQUIRED,RELATEDNAMES2,SHORTNAME,ORDER_OBS,"
    "HL7_FIELD_SUBFIELD_ID,EXTERNAL_COPYRIGHT_NOTICE,EXAMPLE_UNITS,LONG_COMMON_NAME,"
    "EXAMPLE_UCUM_UNITS,STATUS_REASON,STATUS_TEXT,CHANGE_REASON_PUBLIC,COMMON_TEST_RANK,"
    "COMMON_ORDER_RANK,HL7_ATTACHMENT_STRUCTURE,EXTERNAL_COPYRIGHT_LINK,PanelType,AskAtOrderEntry,"
    "AssociatedObservations,VersionFirstReleased,ValidHL7AttachmentRequest,DisplayName"
)


def _loinc(*rows: dict[str, str]) -> str:
    table = io.StringIO()
    writer = csv.DictWriter(table, LOINC_COLUMNS.split(","), restval="", quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


GLUCOSE: dict[str, str] = {
    "LOINC_NUM": "2345-7",
    "COMPONENT": "Glucose",
    "PROPERTY": "MCnc",
    "TIME_ASPCT": "Pt",
    "SYSTEM": "Ser/Plas",
    "SCALE_TYP": "Qn",
    "CLASS": "CHEM",
    "STATUS": "ACTIVE",
    "SHORTNAME": "Glucose SerPl-mCnc",
    "LONG_COMMON_NAME": "Glucose [Mass/volume] in Serum or Plasma",
}


def test_loinc(tmp_path: Path) -> None:
    """Name, axes, definition and the notices of others; the release from the folder's name."""
    table = _loinc(
        GLUCOSE,
        GLUCOSE
        | {
            "LOINC_NUM": "44261-6",
            "COMPONENT": "Score",
            "LONG_COMMON_NAME": "",
            "STATUS": "DEPRECATED",
            "DefinitionDescription": "A sum of\nnine items.",
            "EXTERNAL_COPYRIGHT_NOTICE": "Copyright © Somebody. No permission required.",
        },
    )
    path = _write(tmp_path / "Loinc_2.80" / "LoincTable" / "Loinc.csv", "\ufeff" + table)
    glucose, score = documents(path, "loinc", **PAPER)
    assert (glucose.id, glucose.source) == ("loinc-2345-7", "loinc")
    assert glucose.text == "LOINC code for 2345-7: Glucose [Mass/volume] in Serum or Plasma"
    assert glucose.meta["version"] == "2.80"
    assert glucose.meta["copyright_notice"] is None
    assert score.text == ("LOINC code for 44261-6: Score:MCnc:Pt:Ser/Plas:Qn\nA sum of nine items.")
    assert score.meta["status"] == "DEPRECATED"
    assert score.meta["copyright_notice"] == "Copyright © Somebody. No permission required."
    record, _ = documents(path, "loinc", templates=["record"], edition_in_id=True)
    assert record.id == "loinc-2_80-2345-7"
    assert record.text.splitlines() == [
        "LOINC code: 2345-7",
        "Title: Glucose [Mass/volume] in Serum or Plasma",
        *("Component: Glucose", "Property: MCnc", "Time: Pt", "System: Ser/Plas", "Scale: Qn"),
        *("Class: CHEM", "Short name: Glucose SerPl-mCnc"),
    ]
    tree, _ = documents(path, "loinc", templates=["hierarchy"])
    assert tree.text.splitlines()[1:-1] == ["Class: CHEM", "Component: Glucose"]


def test_codes_for_one_component_are_one_group(tmp_path: Path) -> None:
    """They differ in specimen or method only, so a split must not part them."""
    urine = GLUCOSE | {"LOINC_NUM": "2350-7", "SYSTEM": "Urine", "COMPONENT": "GLUCOSE"}
    sodium = GLUCOSE | {"LOINC_NUM": "2951-2", "COMPONENT": "Sodium"}
    path = _write(tmp_path / "Loinc.csv", _loinc(GLUCOSE, urine, sodium))
    blood, urine_document, salt = documents(path, "loinc")
    assert blood.group == urine_document.group != salt.group
    assert blood.meta["version"] is None


# ----------------------------------------------------------------------------------------- RxNorm


def _conso(rxcui: str, kind: str, name: str, suppress: str = "N", source: str = "RXNORM") -> str:
    return f"{rxcui}|ENG||||||1||{rxcui}||{source}|{kind}|{rxcui}|{name}||{suppress}|4096|\n"


def _sat(rxcui: str, ndc: str, source: str = "RXNORM", name: str = "NDC") -> str:
    return f"{rxcui}|||1|AUI|{rxcui}|||{name}|{source}|{ndc}|N|4096|\n"


CONSO = (
    _conso("314231", "PSN", "simvastatin 10 MG Oral Tablet (brief)")
    + _conso("314231", "SCD", "simvastatin 10 MG Oral Tablet")
    + _conso("314231", "SY", "Simvastatin 10 mg tab", "Y")
    + _conso("314231", "FN", "Simvastatin 10mg tablet (product)", source="SNOMEDCT_US")
    + _conso("36567", "IN", "simvastatin")
    + _conso("99", "BN", "Old Brand", "O")
    + _conso("98", "SY", "suppressed", "E")
    + _conso("97", "PT", "of another vocabulary", source="MTHSPL")
)
SAT = (
    _sat("314231", "00006074031")
    + _sat("314231", "67544015958", source="NDDF")
    + _sat("314231", "x", name="SPL_SET_ID")
    + _sat("36567", "00006074031")
    + _sat("12345", "00006074099")
)


def test_rxnorm(tmp_path: Path) -> None:
    """RxNorm's own names, the best as title; obsolete concepts stay, suppressed names do not."""
    path = _write(tmp_path / "RxNorm_full_07072025" / "rrf" / "RXNCONSO.RRF", CONSO)
    tablet, ingredient, old = documents(path, "rxnorm", **PAPER)
    assert tablet.text == "RxNorm code for 314231: simvastatin 10 MG Oral Tablet"
    assert (tablet.id, tablet.group, tablet.source) == (
        *("rxnorm-314231", "rxnorm-314231", "rxnorm"),
    )
    assert (tablet.meta["term_type"], tablet.meta["version"]) == ("SCD", "07072025")
    assert (ingredient.meta["term_type"], ingredient.meta["obsolete"]) == ("IN", False)
    assert (old.id, old.meta["obsolete"]) == ("rxnorm-99", True)
    record, *_ = documents(path, "rxnorm", templates=["record"])
    assert record.text.splitlines()[-1] == "Synonym: simvastatin 10 MG Oral Tablet (brief)"


def test_ndc(tmp_path: Path) -> None:
    """Each NDC once, with its drug's name and group; those without a name are counted."""
    _write(tmp_path / "RXNCONSO.RRF", CONSO)
    counts: Counter[str] = Counter()
    path = _write(tmp_path / "RXNSAT.RRF", SAT)
    (ndc,) = documents(path, "ndc", counts)
    assert ndc.id == "ndc-00006074031"
    assert ndc.text == "NDC code for 00006-0740-31: simvastatin 10 MG Oral Tablet"
    assert (ndc.group, ndc.source, ndc.meta["rxcui"]) == ("rxnorm-314231", "rxnorm", "314231")
    assert counts == Counter(records=2, documents=1, without_text=1)
    (tmp_path / "RXNCONSO.RRF").unlink()
    with pytest.raises(InputError, match=r"RXNSAT\.RRF needs RXNCONSO\.RRF beside it"):
        list(documents(path, "ndc"))


def test_the_release_is_read_as_it_is_packed(tmp_path: Path) -> None:
    """RxNorm's zip holds a second, smaller set in a folder below, which is left alone."""
    archive = tmp_path / "RxNorm_full_07072025.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("rrf/RXNCONSO.RRF", CONSO)
        file.writestr("rrf/RXNSAT.RRF", SAT)
        file.writestr("prescribe/rrf/RXNCONSO.RRF", CONSO[:70])
    assert [d.id for d in documents(archive, "ndc")] == ["ndc-00006074031"]
    assert len(list(documents(archive, "rxnorm"))) == 3
    assert next(documents(archive, "rxnorm")).meta["version"] == "07072025"


# ------------------------------------------------------------------------------------ bad tables

GOOD: dict[str, tuple[str, str]] = {
    "d-icd-diagnoses": ("d_icd_diagnoses.csv", "icd_code,icd_version,long_title\n0010,9,Cholera\n"),
    "d-hcpcs": ("d_hcpcs.csv", "code,category,long_description,short_description\nA0080,1,a,b\n"),
    "d-labitems": ("d_labitems.csv", "itemid,label,fluid,category\n50809,Glucose,Blood,Gas\n"),
    "loinc": ("Loinc.csv", _loinc(GLUCOSE)),
    "rxnorm": ("RXNCONSO.RRF", CONSO),
    "hcpcs": ("HCPC2026_ANWEB.txt", ANWEB),
    "icd10pcs": ("icd10pcs_order_2026.txt", ORDER_PCS),
}


@pytest.mark.parametrize(
    ("kind", "old", "new", "line"),
    [
        ("d-icd-diagnoses", "0010,9,", "0010,11,", 2),
        ("d-icd-diagnoses", "0010,9,Cholera\n", "0010,9,Cholera\n0010,9,Other\n", 3),
        ("d-icd-diagnoses", "Cholera\n", "Cholera, of any kind\n", 2),
        ("d-icd-diagnoses", "long_title", "title", 0),
        ("d-hcpcs", "A0080", "A80", 2),
        ("d-labitems", "50809", "Fifty", 2),
        ("loinc", '"2345-7"', '"2345.7"', 2),
        ("rxnorm", "314231|ENG", "314231|EN|G", 1),
        ("icd10pcs", "0DTJ4ZZ 1", "0DTJ4ZZ 3", 3),
    ],
)
def test_a_bad_line_is_refused_by_number(
    tmp_path: Path, kind: str, old: str, new: str, line: int
) -> None:
    """A missing column, another number of fields, what is no code, a code twice."""
    name, content = GOOD[kind]
    path = _write(tmp_path / name, content.replace(old, new, 1))
    where = rf", line {line}: " if line else r" has no column long_title"
    with pytest.raises(InputError, match=rf"{re.escape(name)}{where}.*fetch"):
        list(documents(path, kind))


@settings(
    deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(sorted(GOOD)),
    position=st.integers(0, 5000),
    removed=st.integers(0, 30),
    added=st.binary(max_size=10),
    packing=st.sampled_from(["plain", "gzip", "zip"]),
)
def test_damaged_tables_give_the_documented_error_or_documents(
    tmp_path: Path, kind: str, position: int, removed: int, added: bytes, packing: str
) -> None:
    """Whatever a transfer does to a table, no other exception comes out."""
    name, text = GOOD[kind]
    content = text.encode()
    if packing == "gzip":
        content, name = gzip.compress(content, mtime=0), f"{name}.gz"
    elif packing == "zip":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, content)
        content, name = buffer.getvalue(), f"{name}.zip"
    position %= len(content)
    path = tmp_path / name
    path.write_bytes(content[:position] + added + content[position + removed :])
    with contextlib.suppress(InputError):
        assert all(document.text for document in documents(path, kind))


def test_every_kind_has_a_test() -> None:
    """New kinds need one."""
    assert set(KINDS) == {*GOOD, "icd10cm", "icd9cm-dx", "icd9cm-sg", "d-icd-procedures", "ndc"}
