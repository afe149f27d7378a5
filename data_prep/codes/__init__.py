"""Tables of medical codes to one document a code: ICD, HCPCS, LOINC, RxNorm, NDC, MIMIC's own.

Codes are strings: read as numbers they would lose their zeros, and the same digits mean different
things as an ICD-9-CM diagnosis, an ICD-9-CM procedure and an ICD-10-CM code. So a code is known by
its system, its kind and its table's edition, and an id names them; the dot stands in the text only.

    kind               file                                       source
    icd10cm, icd10pcs  icd10cm_order_2026.txt (CMS)               of that name
    icd9cm-dx, -sg     CMS32_DESC_LONG_DX.txt, …_SG.txt (CMS)     icd9cm
    hcpcs              HCPC2026_JUL_ANWEB.txt (CMS)               hcpcs
    d-icd-diagnoses, d-icd-procedures, d-hcpcs, d-labitems
                       d_icd_diagnoses.csv … (MIMIC-IV, hosp)     mimic_codes
    loinc              Loinc.csv (Regenstrief)                    loinc
    rxnorm, ndc        RXNCONSO.RRF; RXNSAT.RRF beside it (NLM)   rxnorm

    icd10cm-tabular    icd10cm_tabular_2026.xml (CMS)             none: headings for ICD-10-CM

Files are plain, gzip (`.gz`) or inside the zip that is published. A table is read as a whole: some
100,000 codes, a few times as many for RxNorm, below a gigabyte of memory.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from data_prep.codes import hcpcs, icd, loinc, mimic_tables, rxnorm
from data_prep.codes.code import Code, Table
from data_prep.codes.files import problem, version_of
from data_prep.codes.tabular import Headings, read_headings
from data_prep.codes.wording import TEMPLATES, wording
from data_prep.document import Document, InputError

_TABLES: dict[str, Table] = (
    icd.TABLES | hcpcs.TABLES | mimic_tables.TABLES | loinc.TABLES | rxnorm.TABLES
)
KINDS = tuple(_TABLES)
SOURCE_OF_KIND = {kind: table.source for kind, table in _TABLES.items()}

# The file that has chapters and blocks, and no documents of its own.
HEADINGS = "icd10cm-tabular"
# The tables with codes that these stand above.
KINDS_UNDER_HEADINGS = ("icd10cm", "d-icd-diagnoses")

__all__ = [
    "HEADINGS",
    "KINDS",
    "KINDS_UNDER_HEADINGS",
    "SOURCE_OF_KIND",
    "TEMPLATES",
    "documents",
]


def documents(
    path: Path,
    kind: str,
    counts: Counter[str] | None = None,
    *,
    templates: Sequence[str] = ("paper",),
    edition_in_id: bool = False,
    headings: Path | None = None,
) -> Iterator[Document]:
    """A document for each code of the table of `kind` (one of KINDS) in `path`, in its order.

    The text is the code in one of `templates` (of TEMPLATES), as `wording` chooses; chapter and
    block are above an ICD-10-CM code with `headings`, CMS's tabular list. id:
    `icd10cm-S72001A`, `icd9cm-dx-0010`, `icd9cm-sg-0011`, `hcpcs-A0080`, `hcpcs-mod-RT`,
    `loinc-2345-7`, `rxnorm-36567`, `ndc-00006074061`, `mimic-icd10cm-S72001A`, `mimic-lab-50931`;
    with `edition_in_id` the edition stands before the code, `icd10cm-2026-S72001A`, so that those
    of several editions stay apart.
    group: the category (`icd10cm-S72`, `icd9cm-dx-E000`, `hcpcs-A00`), for LOINC and MIMIC's items
    what is measured, for NDC the drug; for MIMIC's ICD and HCPCS codes that of the same code in the
    publisher's table.
    meta: `system`, `kind`, `version` (the edition, from the name of the file or of its folder or
    zip; None where it does not say), `billable` (bool; None where the table does not say),
    `category`; for LOINC also `status` and `copyright_notice`, for RxNorm `term_type` and
    `obsolete`, for NDC `rxcui`.
    `counts` gets added: `records` = `documents` + `without_text` (no title).
    Raises InputError for a line of another form and a code that occurs twice (with the line's
    number), for an edition that is asked for and unknown, and for a file without the table.
    """
    if kind not in _TABLES:
        raise ValueError(f"kind must be one of {KINDS}, not {kind!r}")
    table = _TABLES[kind]
    counts = Counter() if counts is None else counts
    codes = _distinct(path, table.read(path), counts)
    version = version_of(path, table.name, table.version) if table.version else None
    if edition_in_id and version is None:
        raise InputError(
            f"{path} is one of several tables of {kind}, and its name does not say which edition; "
            "give it its published name, or give one table only"
        )
    above = {} if headings is None else read_headings(headings)
    edition = f"{version}-".replace(".", "_") if edition_in_id else ""
    for code in codes.values():
        counts["documents"] += 1
        yield Document(
            id=f"{code.prefix}-{edition}{code.code}",
            source=table.source,
            group=code.group,
            text=wording(replace(code, parents=_parents(code, codes, above)), templates),
            meta={
                "system": code.system,
                "kind": code.kind,
                "version": version,
                "billable": code.billable,
                "category": code.category,
            }
            | code.meta,
        )


def _distinct(
    path: Path, codes: Iterator[tuple[int, Code]], counts: Counter[str]
) -> dict[tuple[str, str], Code]:
    """The codes that have a title, by prefix and code, in their order."""
    found: dict[tuple[str, str], Code] = {}
    is_empty = True
    for number, code in codes:
        is_empty = False
        if (code.prefix, code.code) in found:
            raise problem(path, number, f"the code {code.shown} for the 2nd time")
        counts["records"] += 1
        counts["without_text"] += not code.title
        if code.title:
            found[code.prefix, code.code] = code
    if is_empty:
        raise InputError(f"{path} is empty; fetch it again from its publisher or leave it out")
    return found


def _parents(
    code: Code, codes: dict[tuple[str, str], Code], above: Mapping[str, Headings]
) -> tuple[tuple[str, str], ...]:
    """What stands above a code: for ICD the codes of its table that it begins with, and for
    ICD-10-CM what is `above` its category.
    """
    if not code.system.startswith("icd"):
        return code.parents
    lengths = range(len(code.category), len(code.code))
    parents = (codes.get((code.prefix, code.code[:length])) for length in lengths)
    found = tuple((parent.shown, parent.title) for parent in parents if parent is not None)
    return (above.get(code.category, ()) if code.system == "icd10cm" else ()) + found
