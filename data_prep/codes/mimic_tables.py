"""The dictionaries of MIMIC-IV's `hosp` module: d_icd_diagnoses, d_icd_procedures, d_hcpcs,
d_labitems; CSV, plain or gzip.

They hold ICD-9 and ICD-10 side by side, and headings as well as codes. Rows without a title are
left out: there is nothing to read in them.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from data_prep.codes.code import Code, Table, detail, group_of_text
from data_prep.codes.files import problem, rows
from data_prep.codes.hcpcs import hcpcs_code
from data_prep.codes.icd import ICD9CM_DX, ICD9CM_SG, ICD10CM, ICD10PCS, Classification
from data_prep.document import InputError
from data_prep.text import normalise

SOURCE = "mimic_codes"
# Of so many ICD-9 codes some begin with a zero, unless something has read them as numbers.
_ENOUGH_CODES = 1000


def _reader_of_icd(name: re.Pattern[str], versions: dict[str, Classification]) -> Table:
    def read(path: Path) -> Iterator[tuple[int, Code]]:
        codes = zeros = 0
        for number, row in rows(path, name, ("icd_code", "icd_version", "long_title")):
            code, version = row["icd_code"].strip(), row["icd_version"].strip()
            if version not in versions or not re.fullmatch("[0-9A-Z]{1,7}", code):
                raise problem(path, number, "no ICD code with the version 9 or 10")
            codes += version == "9"
            zeros += version == "9" and code.startswith("0")
            yield number, versions[version].code(code, row["long_title"])
        if codes >= _ENOUGH_CODES and zeros == 0:
            raise InputError(
                f"{path}: none of {codes} ICD-9 codes begins with 0, so something has read them as "
                "numbers; fetch the file again from PhysioNet"
            )

    return _table(name, read)


def _read_hcpcs(path: Path) -> Iterator[tuple[int, Code]]:
    for number, row in rows(path, _HCPCS, ("code", "long_description", "short_description")):
        code, text, short = row["code"].strip(), row["long_description"], row["short_description"]
        if not re.fullmatch("[0-9A-Z]{5}", code):
            raise problem(path, number, "no HCPCS code")
        yield number, hcpcs_code("procedure", code, text, short)


def _read_labitems(path: Path) -> Iterator[tuple[int, Code]]:
    """Label, fluid and category make the title: "Glucose" alone is five items."""
    for number, row in rows(path, _LABITEMS, ("itemid", "label", "fluid", "category")):
        item = row["itemid"].strip()
        label, fluid, category = (normalise(row[c]) for c in ("label", "fluid", "category"))
        if not item.isdecimal():
            raise problem(path, number, "no itemid")
        where = ", ".join(filter(None, (fluid, category)))
        yield (
            number,
            Code(
                system="mimic-lab",
                kind="laboratory",
                prefix="lab",
                code=item,
                shown=item,
                title=f"{label} ({where})" if label and where else label,
                category=category,
                group=group_of_text("mimic-lab", label),
                parents=detail("Category", category) + detail("Fluid", fluid),
                details=detail("Fluid", fluid) + detail("Category", category),
            ),
        )


def _table(name: re.Pattern[str], read: Callable[[Path], Iterator[tuple[int, Code]]]) -> Table:
    def prefixed(path: Path) -> Iterator[tuple[int, Code]]:
        for number, code in read(path):
            yield number, replace(code, prefix=f"mimic-{code.prefix}")

    return Table(SOURCE, name, None, prefixed)


def _name(table: str) -> re.Pattern[str]:
    return re.compile(rf"{table}\.csv", re.IGNORECASE)


_HCPCS, _LABITEMS = _name("d_hcpcs"), _name("d_labitems")
TABLES = {
    "d-icd-diagnoses": _reader_of_icd(_name("d_icd_diagnoses"), {"9": ICD9CM_DX, "10": ICD10CM}),
    "d-icd-procedures": _reader_of_icd(_name("d_icd_procedures"), {"9": ICD9CM_SG, "10": ICD10PCS}),
    "d-hcpcs": _table(_HCPCS, _read_hcpcs),
    "d-labitems": _table(_LABITEMS, _read_labitems),
}
