"""LOINC: the table `Loinc.csv` of a release, unpacked or inside the release's zip.

Codes of every status are read; `status` is in meta. LOINC's licence asks that the copyright notices
of others travel with their codes: `copyright_notice` in meta.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from data_prep.codes.code import Code, Table, detail, group_of_text
from data_prep.codes.files import problem, rows
from data_prep.text import normalise

_NAME = re.compile(r"Loinc\.csv", re.IGNORECASE)
_VERSION = re.compile(r"Loinc[_-]v?(\d+\.\d+)", re.IGNORECASE)
_CODE = re.compile(r"\d{1,7}-\d")
# The six axes that name a code (LOINC Users' Guide), and what a reader needs beside them.
_DETAILS = {
    "COMPONENT": "Component",
    "PROPERTY": "Property",
    "TIME_ASPCT": "Time",
    "SYSTEM": "System",
    "SCALE_TYP": "Scale",
    "METHOD_TYP": "Method",
    "CLASS": "Class",
    "SHORTNAME": "Short name",
}
_AXES = tuple(_DETAILS)[:6]
# From what is wide to what is measured.
_HEADINGS = ("CLASS", "COMPONENT")


def _read(path: Path) -> Iterator[tuple[int, Code]]:
    required = ("LOINC_NUM", "LONG_COMMON_NAME", "STATUS", *_DETAILS)
    for number, row in rows(path, _NAME, required):
        code = row["LOINC_NUM"].strip()
        if not _CODE.fullmatch(code):
            raise problem(path, number, "no LOINC code")
        values = {column: normalise(row[column]) for column in _DETAILS}
        name = normalise(row["LONG_COMMON_NAME"])
        yield (
            number,
            Code(
                system="loinc",
                kind="observation",
                prefix="loinc",
                code=code,
                shown=code,
                title=name or ":".join(filter(None, (values[axis] for axis in _AXES))),
                category=values["CLASS"],
                # Codes that differ in method or specimen only are near-identical texts.
                group=group_of_text("loinc", values["COMPONENT"]),
                parents=sum((detail(_DETAILS[c], values[c]) for c in _HEADINGS), ()),
                details=sum((detail(_DETAILS[c], v) for c, v in values.items()), ()),
                definition=normalise(row.get("DefinitionDescription", "")),
                meta={
                    "status": row["STATUS"].strip(),
                    "copyright_notice": normalise(row.get("EXTERNAL_COPYRIGHT_NOTICE", "")) or None,
                },
            ),
        )


TABLES = {"loinc": Table("loinc", _NAME, _VERSION, _read)}
