"""Code tables of CMS: ICD-10-CM order files and ICD-9-CM long titles to one document a code."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data_prep.document import Document

KINDS = ("icd10cm", "icd9cm-dx", "icd9cm-sg")


def find_tables(folder: Path) -> list[tuple[Path, str]]:
    """The (path, kind) of every table below `folder` that `documents` reads, by kind and path.

    Known by the names CMS gives: `icd10cm_order_*.txt`, `CMS*_DESC_LONG_DX.txt` and
    `CMS*_DESC_LONG_SG.txt`, plain, gzip (`.txt.gz`) or inside a `.zip`.
    """
    raise NotImplementedError


def documents(path: Path, kind: str, counts: Counter[str] | None = None) -> Iterator[Document]:
    """A document for each code of the table of `kind` (one of KINDS) in `path`, in its order.

    `path` is the .txt, the .txt.gz or the .zip as CMS serves it. The text is
    `ICD 10 code for S72.001A: Fracture of …`; id `icd10cm-S72001A`, `icd9cm-dx-0010` or
    `icd9cm-sg-0011`; source `icd10cm` or `icd9cm`; group the category (`icd10cm-S72`,
    `icd9cm-dx-001`, `icd9cm-dx-E000`, `icd9cm-sg-00`).
    meta: `system` (the source), `kind` (`diagnosis` or `procedure`), `version` (from the file's
    name, or None), `billable` (bool; None in ICD-9, whose tables do not say), `category`.
    `counts` gets `documents` and `records` added.
    Raises InputError for a line of another form (with its number) and a file without the table.
    """
    raise NotImplementedError
