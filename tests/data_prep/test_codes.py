"""Code tables: every line a document, codes with their dots, other lines refused by number."""

import gzip
import re
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from data_prep.codes import documents
from data_prep.document import Document, InputError

ICD10 = "icd10cm_order_2026.txt"
LINES = [
    "00001 A00     0 Cholera                                                      Cholera",
    "57427 S72001A 1 Fracture of unsp part of neck of right femur, init           "
    "Fracture of unspecified part of neck of right femur, initial encounter for closed fracture",
]


def _write(path: Path, lines: list[str], end: str = "\r\n", encoding: str = "ascii") -> Path:
    path.write_bytes("".join(line + end for line in lines).encode(encoding))
    return path


def test_an_order_file(tmp_path: Path) -> None:
    """The long title, the dotted code, the category as group; headers are documents as well."""
    header, code = documents(_write(tmp_path / ICD10, LINES), "icd10cm")
    assert header.text == "ICD 10 code for A00: Cholera"
    assert header.meta["billable"] is False
    assert code == Document(
        id="icd10cm-S72001A",
        source="icd10cm",
        group="icd10cm-S72",
        text="ICD 10 code for S72.001A: Fracture of unspecified part of neck of right femur, "
        "initial encounter for closed fracture",
        meta={
            "system": "icd10cm",
            "kind": "diagnosis",
            "version": "2026",
            "billable": True,
            "category": "S72",
        },
    )


@pytest.mark.parametrize(
    ("kind", "line", "identifier", "group", "text"),
    [
        ("icd9cm-dx", "0010  Cholera", "icd9cm-dx-0010", "icd9cm-dx-001", "001.0: Cholera"),
        ("icd9cm-dx", "25000 Diabetes", "icd9cm-dx-25000", "icd9cm-dx-250", "250.00: Diabetes"),
        ("icd9cm-dx", "486   Pneumonia", "icd9cm-dx-486", "icd9cm-dx-486", "486: Pneumonia"),
        ("icd9cm-dx", "V1020 History", "icd9cm-dx-V1020", "icd9cm-dx-V10", "V10.20: History"),
        ("icd9cm-dx", "E0000 Activity", "icd9cm-dx-E0000", "icd9cm-dx-E000", "E000.0: Activity"),
        ("icd9cm-dx", "E887  Fracture", "icd9cm-dx-E887", "icd9cm-dx-E887", "E887: Fracture"),
        ("icd9cm-sg", "0011 Infusion", "icd9cm-sg-0011", "icd9cm-sg-00", "00.11: Infusion"),
        ("icd9cm-sg", "640  Circumcision", "icd9cm-sg-640", "icd9cm-sg-64", "64.0: Circumcision"),
    ],
)
def test_dots_of_icd9(
    tmp_path: Path, kind: str, line: str, identifier: str, group: str, text: str
) -> None:
    """After three characters, four in an E-code, two in a procedure; none at the end of a code."""
    name = f"CMS32_DESC_LONG_{kind[-2:].upper()}.txt"
    (document,) = documents(_write(tmp_path / name, [line], "\n"), kind)
    assert (document.id, document.group) == (identifier, group)
    assert document.text == f"ICD 9 code for {text}"
    assert (document.source, document.meta["version"]) == ("icd9cm", "32")


def test_titles_are_latin_1(tmp_path: Path) -> None:
    """ICD-9-CM's accents are single bytes."""
    path = _write(tmp_path / "CMS32_DESC_LONG_DX.txt", ["38600 Ménière's disease"], "\n", "latin-1")
    assert next(documents(path, "icd9cm-dx")).text == "ICD 9 code for 386.00: Ménière's disease"


def test_plain_gzip_and_zip_say_the_same(tmp_path: Path) -> None:
    """The table may be packed; neighbours in the zip (the addenda) are not read."""
    plain = _write(tmp_path / ICD10, LINES)
    packed = tmp_path / f"{ICD10}.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    archive = tmp_path / "cms_2026.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(plain, f"Code Descriptions/{ICD10}")
        file.writestr("icd10cm_order_addenda_2026.txt", "Delete:      1 B880    ...")
    expected = list(documents(plain, "icd10cm"))
    assert len(expected) == 2
    assert list(documents(packed, "icd10cm")) == expected
    assert list(documents(archive, "icd10cm")) == expected


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        ("icd10cm", "A000    Cholera due to Vibrio cholerae 01, biovar cholerae"),
        ("icd10cm", "Delete:      1 B880    Other acariasis"),
        ("icd10cm", LINES[1].replace("S72001A 1", "S72001A 2")),
        ("icd10cm", LINES[1][:80].rstrip()[:60]),
        ("icd10cm", LINES[1].replace("neck", "néck")),
        ("icd10cm", LINES[0]),
        ("icd9cm-dx", "001.0 Cholera"),
        ("icd9cm-dx", "A000  Cholera"),
        ("icd9cm-dx", "0010"),
        ("icd9cm-sg", "00110 Infusion"),
    ],
)
def test_another_line_is_refused_by_number(tmp_path: Path, kind: str, bad: str) -> None:
    """A line that is not of the table (or a code again) is an error, not a document or a skip."""
    good = {"icd10cm": LINES[0], "icd9cm-dx": "0010  Cholera", "icd9cm-sg": "0011 Infusion"}[kind]
    path = _write(tmp_path / "table.txt", [good, "", bad], encoding="utf-8")
    with pytest.raises(InputError, match=r"table\.txt, line 3: .*fetch"):
        list(documents(path, kind))


def test_files_without_the_table_are_refused(tmp_path: Path) -> None:
    """Empty, cut, a zip of something else, a missing file."""
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(LINES[0].encode() * 1000)[:-30])
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("readme.txt", "nothing")
    (tmp_path / "broken.zip").write_bytes((tmp_path / "other.zip").read_bytes()[:-30])
    for name in ("empty.txt", "cut.gz", "other.zip", "broken.zip", "missing.txt"):
        with pytest.raises(InputError, match=re.escape(name)):
            list(documents(tmp_path / name, "icd10cm"))


def test_the_real_tables(shared_data: Path) -> None:
    """Every line of CMS's files is a document of its own, and each text ends in its title."""
    counts: Counter[str] = Counter()
    found = {}
    for name, kind in (
        ("cms_2026_dx.zip", "icd10cm"),
        ("cms_v32_icd9.zip", "icd9cm-dx"),
        ("cms_v32_icd9.zip", "icd9cm-sg"),
    ):
        path = shared_data / "codes" / name
        found[kind] = list(documents(path, kind, counts))
    sizes = {kind: len(table) for kind, table in found.items()}
    assert sizes == {"icd10cm": 98_186, "icd9cm-dx": 14_567, "icd9cm-sg": 3_882}
    everything = [document for table in found.values() for document in table]
    assert counts["documents"] == len({document.id for document in everything}) == 116_635
    assert sum(d.meta["billable"] for d in found["icd10cm"]) == 74_719
    with zipfile.ZipFile(shared_data / "codes" / "cms_2026_dx.zip") as archive:
        lines = archive.read("icd10cm_order_2026.txt").decode().splitlines()
    for line, document in zip(lines, found["icd10cm"], strict=True):
        code = line[6:14].strip()
        dotted = code[:3] + ("." + code[3:] if code[3:] else "")
        assert document.id == f"icd10cm-{code}"
        assert document.text == f"ICD 10 code for {dotted}: {' '.join(line[77:].split())}"
    assert any("Ménière" in document.text for document in found["icd9cm-dx"])
