"""Rows of one source and split: planned from lengths, then written shard by shard.

A plan says of every row which pieces of which documents it holds. It lies on disk as arrays, so
that the writer of a shard reads its own part only; then it takes the tokens from the token files in
their order, each file once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.counter_random import derive_key
from common.files import whole_folder
from data_prep.packing import SPECIAL_TOKENS, cut_documents, pack
from data_prep.shard_writer import PIECE_MARK, ShardEntry, write_shard
from data_prep.shards import Row, row_key
from data_prep.token_files import TokenFile

# (split, source)
Part = tuple[str, str]
PLAN_FILES = ("bounds.npy", "document.npy", "number.npy", "begin.npy", "end.npy", "cut.npy")


@dataclass(frozen=True)
class RowShape:
    """What a row may hold; tokens of a row, of a document, and documents of a row."""

    row_tokens: int
    max_length: int
    max_documents: int


@dataclass(frozen=True)
class RowTokens:
    """The ids that rows add to those of the documents, and the type of all of them."""

    cls: int
    sep: int
    pad: int
    dtype: np.dtype[Any]


def write_plan(
    folder: Path, files: Sequence[TokenFile], shape: RowShape, key: int
) -> dict[str, int]:
    """Plan the rows of all documents of `files`, in `folder`, whole or not at all.

    The arrays of PLAN_FILES lie in the order of the rows: row i holds the pieces bounds[i] to
    bounds[i + 1], each of the document of that number over all files, its tokens begin to end.
    Memory: some 80 bytes a piece.
    """
    lengths = np.concatenate([np.zeros(0, np.int64), *(file.lengths() for file in files)])
    pieces = cut_documents(lengths, shape.max_length)
    plan = pack(
        pieces.lengths, shape.row_tokens, shape.max_documents, derive_key(key, shape.max_length)
    )
    with whole_folder(folder) as temporary:
        np.save(temporary / "bounds.npy", plan.bounds)
        for name in ("document", "number", "begin", "end", "cut"):
            np.save(temporary / f"{name}.npy", getattr(pieces, name)[plan.order])
    return {
        "rows": plan.rows,
        "documents": len(lengths),
        "pieces": len(pieces),
        "tokens": int(pieces.lengths.sum()),
    }


def write_planned_shard(
    path: Path,
    plan_folder: Path,
    files: Sequence[TokenFile],
    rows: range,
    part: Part,
    row_tokens: int,
    tokens: RowTokens,
) -> ShardEntry:
    """Write the planned `rows` of `part` to the shard `path`; returns its entry in the manifest.

    Memory: the rows of the shard.
    """
    plan = [np.load(plan_folder / name, mmap_mode="r") for name in PLAN_FILES]
    bounds = np.array(plan[0][rows.start : rows.stop + 1])
    inside = slice(int(bounds[0]), int(bounds[-1]))
    document, number, begin, end, cut = (np.array(array[inside]) for array in plan[1:])
    bounds -= bounds[0]
    row = np.repeat(np.arange(len(rows)), np.diff(bounds))
    lengths = end - begin + SPECIAL_TOKENS
    # Where a piece begins in its row: all that lies before it in the shard, less what lies before
    # its row.
    before = np.concatenate([[0], np.cumsum(lengths)])
    place = before[:-1] - before[bounds[row]]
    ids = np.full((len(rows), row_tokens), tokens.pad, tokens.dtype)
    ids[row, place] = tokens.cls
    ids[row, place + lengths - 1] = tokens.sep
    names = np.empty(len(document), object)
    for file, local, chosen in _by_file(files, document):
        content, starts = file.tokens(), file.starts()[local]
        names[chosen] = [identifier.decode() for identifier in file.ids()[local].tolist()]
        columns = (row[chosen], place[chosen] + 1, starts + begin[chosen], starts + end[chosen])
        for to_row, to, first, last in zip(*(c.tolist() for c in columns), strict=True):
            ids[to_row, to : to + last - first] = content[first:last]
    for index in np.flatnonzero(cut):
        names[index] += f"{PIECE_MARK}{number[index]}"
    return write_shard(path, _rows(ids, bounds, place + lengths, names, rows, part))


def _by_file(
    files: Sequence[TokenFile], document: NDArray[np.int64]
) -> Iterator[tuple[TokenFile, NDArray[np.int64], NDArray[np.int64]]]:
    """(file, its documents' numbers in it, their positions in `document`), in the file's order."""
    order = np.argsort(document, kind="stable")
    ordered = document[order]
    first = 0
    for file in files:
        last = first + len(file)
        chosen = order[np.searchsorted(ordered, first) : np.searchsorted(ordered, last)]
        if len(chosen):
            yield file, document[chosen] - first, chosen
        first = last


def _rows(
    ids: NDArray[Any],
    bounds: NDArray[np.int64],
    ends: NDArray[np.int64],
    names: NDArray[np.object_],
    rows: range,
    part: Part,
) -> Iterator[Row]:
    """Rows from their ids (rows, row_tokens); row i has the pieces bounds[i] to bounds[i + 1].

    ends: where each piece ends in its row; names: what its document is called.
    """
    split, source = part
    row_tokens = ids.shape[1]
    for index, row in enumerate(rows):
        inside = slice(int(bounds[index]), int(bounds[index + 1]))
        padding = [row_tokens] if ends[inside][-1] < row_tokens else []
        cu_seqlens = np.array([0, *ends[inside], *padding], np.int32)
        key = row_key(source, split, row)
        yield Row(ids[index], cu_seqlens, names[inside].tolist(), source, key)
