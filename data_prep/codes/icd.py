"""ICD-10-CM, ICD-10-PCS and ICD-9-CM as CMS publishes them, and how their codes are written.

The order files of ICD-10 have fixed columns: number, code, 1 for a billable code and 0 for a
heading, abbreviated title, full title. The long titles of ICD-9-CM have a code and a title.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.codes.code import Code, Table, detail
from data_prep.codes.files import lines, problem
from data_prep.text import normalise


@dataclass(frozen=True)
class Classification:
    """How a classification's codes are written.

    category_length: the characters of a code's category; what is in front of the dot.
    has_dot: whether there is one; ICD-10-PCS has none.
    """

    system: str
    kind: str
    prefix: str
    category_length: Callable[[str], int]
    has_dot: bool = True

    def code(self, code: str, title: str) -> Code:
        """The code in this classification, without what only some tables say of it."""
        category = code[: self.category_length(code)]
        return Code(
            system=self.system,
            kind=self.kind,
            prefix=self.prefix,
            code=code,
            shown=self.dotted(code),
            title=normalise(title),
            category=category,
            group=f"{self.prefix}-{category}",
        )

    def dotted(self, code: str) -> str:
        """`S72.001A` for `S72001A`."""
        length = self.category_length(code)
        return f"{code[:length]}.{code[length:]}" if self.has_dot and code[length:] else code


ICD10CM = Classification("icd10cm", "diagnosis", "icd10cm", lambda code: 3)
ICD10PCS = Classification("icd10pcs", "procedure", "icd10pcs", lambda code: 3, has_dot=False)
ICD9CM_DX = Classification(
    "icd9cm", "diagnosis", "icd9cm-dx", lambda code: 4 if code.startswith("E") else 3
)
ICD9CM_SG = Classification("icd9cm", "procedure", "icd9cm-sg", lambda code: 2)


def _order_file(
    kind: str, classification: Classification, code: str, heading_lengths: range
) -> tuple[str, Table]:
    name = re.compile(rf"{kind}_order_(?!addenda)(\w+)\.txt", re.IGNORECASE)
    form = re.compile(
        rf"\d{{5}} (?=\S+ +[01] )(?P<code>{code}) (?P<billable>[01]) "
        r"(?P<short>.{60}) (?P<title>\S.*)"
    )

    def read(path: Path) -> Iterator[tuple[int, Code]]:
        for number, line in lines(path, name, "ascii"):
            match = form.fullmatch(line)
            found = match["code"].rstrip() if match else ""
            if match is None or len(found) not in heading_lengths:
                raise problem(path, number, f"no line of an order file of {kind}")
            result = classification.code(found, match["title"])
            short = normalise(match["short"])
            details = detail("Short title", short) if short != result.title else ()
            yield number, replace(result, billable=match["billable"] == "1", details=details)

    return kind, Table(classification.system, name, name, read)


def _long_titles(kind: str, classification: Classification, code: str) -> tuple[str, Table]:
    name = re.compile(rf"CMS(\d+)\w*_DESC_LONG_{kind[-2:]}\.txt", re.IGNORECASE)
    form = re.compile(rf"(?P<code>{code}) +(?P<title>\S.*)")

    def read(path: Path) -> Iterator[tuple[int, Code]]:
        for number, line in lines(path, name, "latin-1"):
            match = form.fullmatch(line)
            if match is None:
                raise problem(path, number, f"no line of a table of {kind}")
            yield number, classification.code(match["code"], match["title"])

    return kind, Table(classification.system, name, name, read)


TABLES = dict(
    [
        _order_file("icd10cm", ICD10CM, r"[A-Z][0-9A-Z]{2}[0-9A-Z ]{4}", range(3, 8)),
        _order_file("icd10pcs", ICD10PCS, r"[0-9A-Z]{3}[0-9A-Z ]{4}", range(3, 8)),
        _long_titles("icd9cm-dx", ICD9CM_DX, r"\d{3,5}|V\d{2,4}|E\d{3,4}"),
        _long_titles("icd9cm-sg", ICD9CM_SG, r"\d{2,4}"),
    ]
)
