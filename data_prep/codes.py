"""Code tables of CMS: ICD-10-CM order files and ICD-9-CM long titles to one document a code.

Codes are strings: read as numbers they would lose their zeros, and the same digits mean different
things as an ICD-9-CM diagnosis, an ICD-9-CM procedure and an ICD-10-CM code. So an id names the
system and the kind, and the dot stands in the text only.
"""

import contextlib
import gzip
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.document import Document, InputError
from data_prep.text import normalise


@dataclass(frozen=True)
class _Table:
    """How one kind of table is found, read and worded.

    name: matches the file's name (without .gz), its group 1 the version.
    line: matches a line; groups `code`, `title` and, where the table says it, `billable`.
    category_length: characters of the category, which is also where the dot goes.
    """

    system: str
    kind: str
    prefix: str
    words: str
    name: re.Pattern[str]
    encoding: str
    line: re.Pattern[str]
    category_length: Callable[[str], int]


_TABLES = {
    "icd10cm": _Table(
        system="icd10cm",
        kind="diagnosis",
        prefix="icd10cm",
        words="ICD 10",
        name=re.compile(r"icd10cm_order_(?!addenda)(\w+)\.txt", re.IGNORECASE),
        encoding="ascii",
        # Fixed width: order number, code, 1 billable or 0 header, short title, long title.
        line=re.compile(
            r"\d{5} (?=\S+ +[01] )(?P<code>[A-Z][0-9A-Z]{2}[0-9A-Z ]{4}) (?P<billable>[01]) "
            r".{60} (?P<title>\S.*)"
        ),
        category_length=lambda code: 3,
    ),
    "icd9cm-dx": _Table(
        system="icd9cm",
        kind="diagnosis",
        prefix="icd9cm-dx",
        words="ICD 9",
        name=re.compile(r"CMS(\d+)\w*_DESC_LONG_DX\.txt", re.IGNORECASE),
        encoding="latin-1",
        line=re.compile(r"(?P<code>\d{3,5}|V\d{2,4}|E\d{3,4}) +(?P<title>\S.*)"),
        category_length=lambda code: 4 if code.startswith("E") else 3,
    ),
    "icd9cm-sg": _Table(
        system="icd9cm",
        kind="procedure",
        prefix="icd9cm-sg",
        words="ICD 9",
        name=re.compile(r"CMS(\d+)\w*_DESC_LONG_SG\.txt", re.IGNORECASE),
        encoding="latin-1",
        line=re.compile(r"(?P<code>\d{2,4}) +(?P<title>\S.*)"),
        category_length=lambda code: 2,
    ),
}
KINDS = tuple(_TABLES)


def find_tables(folder: Path) -> list[tuple[Path, str]]:
    """The (path, kind) of every table below `folder` that `documents` reads, by kind and path.

    Known by the names CMS gives: `icd10cm_order_*.txt`, `CMS*_DESC_LONG_DX.txt` and
    `CMS*_DESC_LONG_SG.txt`, plain, gzip (`.txt.gz`) or inside a `.zip`.
    """
    return [
        (path, kind)
        for kind in KINDS
        for path in sorted(folder.rglob("*"))
        if path.is_file() and _tables_inside(path, kind)
    ]


def documents(path: Path, kind: str, counts: Counter[str] | None = None) -> Iterator[Document]:
    """A document for each code of the table of `kind` (one of KINDS) in `path`, in its order.

    `path` is the .txt, the .txt.gz or the .zip as CMS serves it. The text is
    `ICD 10 code for S72.001A: Fracture of …`; id `icd10cm-S72001A`, `icd9cm-dx-0010` or
    `icd9cm-sg-0011`; source `icd10cm` or `icd9cm`; group the category (`icd10cm-S72`,
    `icd9cm-dx-001`, `icd9cm-dx-E000`, `icd9cm-sg-00`).
    meta: `system` (the source), `kind` (`diagnosis` or `procedure`), `version` (from the file's
    name, or None), `billable` (bool; None in ICD-9, whose tables do not say), `category`.
    `counts` gets `documents` and `records` added.
    Raises InputError for a line of another form (with its number), a code that occurs twice and a
    file without the table.
    """
    if kind not in _TABLES:
        raise ValueError(f"kind must be one of {KINDS}, not {kind!r}")
    table = _TABLES[kind]
    counts = Counter() if counts is None else counts
    seen: set[str] = set()
    with _open(path, kind) as (stream, name):
        version = table.name.fullmatch(name.removesuffix(".gz"))
        for number, line in _lines(path, stream, table.encoding):
            match = table.line.fullmatch(line)
            document = _document(table, match, version[1] if version else None) if match else None
            if document is None or document.id in seen:
                what = (
                    f"no line of a {kind} table" if document is None else "a code for the 2nd time"
                )
                raise InputError(
                    f"{path}, line {number}: {what}; fetch the file again from CMS or leave it out"
                )
            seen.add(document.id)
            counts["records"] += 1
            counts["documents"] += 1
            yield document
    if not seen:
        raise InputError(f"{path} is empty; fetch it again from CMS or leave it out")


def _document(table: _Table, match: re.Match[str], version: str | None) -> Document:
    code = match["code"].rstrip()
    length = table.category_length(code)
    category = code[:length]
    dotted = f"{category}.{code[length:]}" if len(code) > length else code
    billable = match.groupdict().get("billable")
    return Document(
        id=f"{table.prefix}-{code}",
        source=table.system,
        group=f"{table.prefix}-{category}",
        text=f"{table.words} code for {dotted}: {normalise(match['title'])}",
        meta={
            "system": table.system,
            "kind": table.kind,
            "version": version,
            "billable": None if billable is None else billable == "1",
            "category": category,
        },
    )


@contextlib.contextmanager
def _open(path: Path, kind: str) -> Iterator[tuple[Iterable[bytes], str]]:
    """The lines of the table of `kind` in `path`, and the table's file name."""
    try:
        with contextlib.ExitStack() as stack:
            with path.open("rb") as file:
                magic = file.read(2)
            if magic == b"PK":
                names = _tables_inside(path, kind)
                if len(names) != 1:
                    raise InputError(
                        f"{path} holds {len(names)} {kind} tables where one is expected; "
                        "unpack it and give the table itself"
                    )
                archive = stack.enter_context(zipfile.ZipFile(path))
                yield stack.enter_context(archive.open(names[0])), Path(names[0]).name
            elif magic == b"\x1f\x8b":
                yield stack.enter_context(gzip.open(path)), path.name
            else:
                yield stack.enter_context(path.open("rb")), path.name
    except (EOFError, gzip.BadGzipFile, zlib.error, zipfile.BadZipFile):
        raise InputError(f"{path} is damaged or truncated; fetch it again from CMS") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def _lines(path: Path, stream: Iterable[bytes], encoding: str) -> Iterator[tuple[int, str]]:
    """(number from 1, text without line end) of each line that is not blank."""
    for number, line in enumerate(stream, start=1):
        try:
            text = line.decode(encoding).rstrip("\r\n")
        except UnicodeDecodeError:
            raise InputError(
                f"{path}, line {number}: not {encoding}; fetch the file again from CMS"
            ) from None
        if text.strip():
            yield number, text


def _tables_inside(path: Path, kind: str) -> list[str]:
    """The names of the tables of `kind` that a file holds: members of a zip, or the file itself."""
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    else:
        names = [path.name]
    pattern = _TABLES[kind].name
    return [n for n in names if pattern.fullmatch(Path(n).name.removesuffix(".gz"))]
