"""Opening a table, plain, gzip or inside a zip, and reading its lines, rows and fields."""

import contextlib
import csv
import gzip
import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from re import Pattern
from typing import IO, cast

from data_prep.document import InputError

_AGAIN = "fetch it again from its publisher"
# A definition or a list of names may be longer than Python's own limit for a field, 128 KiB.
_LONGEST_FIELD = 2**24


def names_inside(path: Path, name: Pattern[str]) -> list[str]:
    """The tables called `name` that a file holds: members of a zip, or the file itself.

    Of members in folders of different depth only the uppermost: RxNorm's zip holds its tables, and
    once more those of a smaller set in a folder below.
    """
    if path.suffix.lower() != ".zip":
        return [path.name] if name.fullmatch(path.name.removesuffix(".gz")) else []
    with zipfile.ZipFile(path) as archive:
        members = [PurePosixPath(member) for member in archive.namelist()]
    found = [m for m in members if name.fullmatch(m.name.removesuffix(".gz"))]
    depth = min((len(member.parts) for member in found), default=0)
    return [str(member) for member in found if len(member.parts) == depth]


def version_of(path: Path, name: Pattern[str], version: Pattern[str]) -> str | None:
    """The edition that the table's name or the folders and the zip above it state, or None."""
    inside = names_inside(path, name) if path.suffix.lower() == ".zip" else []
    parts = [part for member in inside for part in reversed(PurePosixPath(member).parts)]
    for part in [*parts, *reversed(path.parts[-4:])]:
        match = version.search(part)
        if match:
            return match[1]
    return None


def lines(path: Path, name: Pattern[str], encoding: str) -> Iterator[tuple[int, str]]:
    """(number from 1, text without line end) of each line of a table that is not blank."""
    with open_table(path, name) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode(encoding).rstrip("\r\n")
            except UnicodeDecodeError:
                raise problem(path, number, f"not {encoding}") from None
            if text.strip():
                yield number, text


def rows(
    path: Path, name: Pattern[str], columns: Sequence[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, {column: value}) of each row of a CSV table with a header, all strings.

    Raises InputError where one of `columns` is missing, and for a row with another number of
    fields: its values would stand in the wrong columns.
    """
    csv.field_size_limit(max(_LONGEST_FIELD, csv.field_size_limit()))
    with open_table(path, name) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        reader = csv.reader(text, strict=True)
        try:
            header = next(reader, [])
            missing = [column for column in columns if column not in header]
            if missing:
                raise InputError(
                    f"{path} has no column {', '.join(missing)} in its first line; {_AGAIN}"
                )
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    what = f"{len(row)} fields where the header has {len(header)}"
                    raise problem(path, reader.line_num, what)
                yield reader.line_num, dict(zip(header, row, strict=True))
        except csv.Error:
            raise problem(path, reader.line_num, "no CSV") from None
        except UnicodeDecodeError:
            raise problem(path, reader.line_num + 1, "not UTF-8") from None


def fields(path: Path, name: Pattern[str], count: int) -> Iterator[tuple[int, list[str]]]:
    """(line number, the `count` fields) of each line in NLM's Rich Release Format (`a|b|c|`)."""
    for number, line in lines(path, name, "utf-8"):
        found = line.split("|")
        if len(found) not in (count, count + 1):  # the last field ends in a bar as well
            raise problem(path, number, f"{len(found)} fields where {count} are expected")
        yield number, found[:count]


def problem(path: Path, number: int, what: str) -> InputError:
    """The error for a line that cannot be used."""
    return InputError(f"{path}, line {number}: {what}; {_AGAIN} or leave it out")


@contextlib.contextmanager
def open_table(path: Path, name: Pattern[str]) -> Iterator[IO[bytes]]:
    """The bytes of the table called `name` in `path`. Raises InputError where it is damaged."""
    try:
        with contextlib.ExitStack() as stack:
            with path.open("rb") as file:
                magic = file.read(2)
            if magic == b"PK":
                names = names_inside(path, name)
                if len(names) != 1:
                    raise InputError(
                        f"{path} holds {len(names)} tables of this kind where one is expected; "
                        "unpack it and give the table itself, or fetch it again"
                    )
                archive = stack.enter_context(zipfile.ZipFile(path))
                yield stack.enter_context(archive.open(names[0]))
            elif magic == b"\x1f\x8b":
                yield cast(IO[bytes], stack.enter_context(gzip.open(path)))
            else:
                yield stack.enter_context(path.open("rb"))
    except (EOFError, gzip.BadGzipFile, zlib.error, zipfile.BadZipFile):
        raise InputError(f"{path} is damaged or truncated; {_AGAIN}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
