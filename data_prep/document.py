"""A document: one abstract, one note or one code title, and the Parquet files that hold them."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from common.files import whole_file
from data_prep.progress import advance

_COLUMNS = ("id", "source", "group", "text", "meta")
_SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in _COLUMNS])
# A row group is what a reader and a writer hold in memory.
_ROW_GROUP_DOCUMENTS = 4096
_ROW_GROUP_CHARACTERS = 16 * 2**20
_READ_DOCUMENTS = 256


class InputError(ValueError):
    """An input that cannot be used. The message names the file, what is wrong and what to do.

    It holds no text of a note, and neither does an exception chained to it.
    """


@dataclass(frozen=True)
class Document:
    """One text with where it comes from.

    id: stable and without dots (`pubmed-10067807`, `discharge-<hash>`, `icd10cm-S72001A`).
    source: `pubmed`, `discharge`, `radiology`, or that of a code table, such as `icd10cm`.
    group: the unit a split may not cut (a PMID, a subject, a code category).
    meta: values that JSON can hold; what they are is said by each source.
    """

    id: str
    source: str
    group: str
    text: str
    meta: dict[str, Any] = field(default_factory=dict)


def write_documents(path: Path, documents: Iterable[Document]) -> int:
    """Write `documents` to the Parquet file `path`, whole or not at all; returns their number.

    Columns `id, source, group, text, meta` (meta as JSON with sorted keys). Equal documents give
    equal bytes. Memory holds one row group, whatever the number of documents.
    """
    written = 0
    with whole_file(path) as file, pq.ParquetWriter(file, _SCHEMA, compression="zstd") as writer:
        for batch in _batches(documents):
            writer.write_batch(_to_arrow(batch))
            written += len(batch)
            advance("documents written", len(batch))
    return written


def write_parts(stem: Path, documents: Iterable[Document], part_characters: int) -> int:
    """Write `documents` to `stem`-0000.parquet, `stem`-0001.parquet, …; returns their number.

    A file is full once it has `part_characters`; there is one even for no documents.
    """
    left = iter(documents)
    written = parts = 0
    following = next(left, None)
    while following is not None or not parts:

        def of_part() -> Iterator[Document]:
            nonlocal following
            characters = 0
            while following is not None and characters < part_characters:
                characters += len(following.text)
                yield following
                following = next(left, None)

        written += write_documents(stem.with_name(f"{stem.name}-{parts:04d}.parquet"), of_part())
        parts += 1
    return written


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of a file that `write_documents` made, in its order.

    Raises InputError when the file is missing, damaged or has other columns.
    """
    remedy = "delete it and run this stage of data_prep again"
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException):
        problem = "is missing or is not a whole Parquet file"
    else:
        problem = "" if file.schema_arrow.names == list(_COLUMNS) else "has other columns"
    if problem:
        raise InputError(f"{path} {problem}; {remedy}")
    with file:
        batches = file.iter_batches(batch_size=_READ_DOCUMENTS)
        while True:
            try:
                batch = next(batches, None)
                found = [] if batch is None else _from_arrow(batch)
            except (OSError, ValueError, pa.ArrowException):
                # Without the cause, which may quote a text.
                raise InputError(f"{path} is damaged; {remedy}") from None
            if batch is None:
                return
            advance("documents read", len(found))
            yield from found


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists of a bounded number and a bounded length of text."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _ROW_GROUP_DOCUMENTS or characters >= _ROW_GROUP_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _from_arrow(batch: pa.RecordBatch) -> list[Document]:
    columns = [batch.column(name).to_pylist() for name in _COLUMNS]
    return [
        Document(identifier, source, group, text, json.loads(meta))
        for identifier, source, group, text, meta in zip(*columns, strict=True)
    ]


def _to_arrow(batch: list[Document]) -> pa.RecordBatch:
    columns = [
        [document.id for document in batch],
        [document.source for document in batch],
        [document.group for document in batch],
        [document.text for document in batch],
        [json.dumps(document.meta, sort_keys=True, ensure_ascii=False) for document in batch],
    ]
    return pa.record_batch([pa.array(column, pa.string()) for column in columns], schema=_SCHEMA)
