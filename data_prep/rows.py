"""Rows of one source and split: planned from lengths, then written shard by shard.

Documents are planned in parts that are drawn at random, so that memory is that of a part. A plan
says of every row which pieces of which documents it holds. It lies on disk as arrays, so that the
writer of a shard reads its own rows only, from all plans; then it takes the tokens from the token
files in their order, each file once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.counter_random import derive_key, permutation, random_bits
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


def plan_parts(files: Sequence[TokenFile], plan_documents: int) -> int:
    """The number of parts in which the documents of `files` are planned."""
    return -(-sum(map(len, files)) // plan_documents) or 1


def write_plan(
    folder: Path, files: Sequence[TokenFile], shape: RowShape, key: int, part: int, parts: int
) -> dict[str, int]:
    """Plan the rows of a part of the documents of `files`, in `folder`, whole or not at all.

    A document's part is drawn at random. The arrays of PLAN_FILES lie in the order of the rows: row
    i holds the pieces bounds[i] to bounds[i + 1], each of the document of that number over all
    files, its tokens begin to end. Memory: some 200 bytes a piece of the part.
    """
    documents, lengths = _documents_of_part(files, derive_key("plan", key), part, parts)
    pieces = cut_documents(lengths, shape.max_length)
    plan = pack(
        pieces.lengths,
        shape.row_tokens,
        shape.max_documents,
        derive_key(key, shape.max_length, part),
    )
    with whole_folder(folder) as temporary:
        np.save(temporary / "bounds.npy", plan.bounds)
        np.save(temporary / "document.npy", documents[pieces.document[plan.order]])
        for name in ("number", "begin", "end", "cut"):
            np.save(temporary / f"{name}.npy", getattr(pieces, name)[plan.order])
    return {
        "rows": plan.rows,
        "documents": len(lengths),
        "pieces": len(pieces),
        "tokens": int(pieces.lengths.sum()),
    }


def rows_in(plan_folder: Path) -> int:
    """The number of rows that `write_plan` planned in `plan_folder`."""
    return len(np.load(plan_folder / "bounds.npy", mmap_mode="r")) - 1


def write_planned_shard(
    path: Path,
    plan_folders: Sequence[Path],
    files: Sequence[TokenFile],
    rows: range,
    part: Part,
    row_tokens: int,
    tokens: RowTokens,
    key: int,
) -> ShardEntry:
    """Write `rows` of `part` to the shard `path`; returns its entry in the manifest.

    The rows of a part are those of all its plans in an order that `key` decides.
    Memory: the rows of the shard, and 24 bytes for each row of the part.
    """
    bounds, (document, number, begin, end, cut) = _planned(plan_folders, rows, key)
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


def _documents_of_part(
    files: Sequence[TokenFile], key: int, part: int, parts: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The numbers over all files of the documents of a part, ascending, and their lengths."""
    numbers, lengths = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    begin = 0
    for file in files:
        of_file = file.lengths()
        counters = np.arange(begin, begin + len(of_file), dtype=np.uint64)
        inside = np.flatnonzero(random_bits(key, counters) % np.uint64(parts) == np.uint64(part))
        numbers.append(inside + begin)
        lengths.append(of_file[inside])
        begin += len(of_file)
    return np.concatenate(numbers), np.concatenate(lengths)


def _planned(
    plan_folders: Sequence[Path], rows: range, key: int
) -> tuple[NDArray[np.int64], list[NDArray[Any]]]:
    """Of some rows of all plans: bounds (rows + 1,), and the columns of their pieces.

    The columns are those of PLAN_FILES without bounds, (pieces,) each, in the order of the rows.
    """
    starts = np.cumsum([0, *map(rows_in, plan_folders)])
    source = permutation(key, int(starts[-1]))[rows.start : rows.stop]
    of_plan = np.searchsorted(starts, source, side="right") - 1
    chosen, begins = [], []
    sizes = np.zeros(len(rows), np.int64)
    for plan, folder in enumerate(plan_folders):
        here = np.flatnonzero(of_plan == plan)
        all_bounds = np.load(folder / PLAN_FILES[0], mmap_mode="r")
        local = source[here] - starts[plan]
        begins.append(np.asarray(all_bounds[local]))
        sizes[here] = all_bounds[local + 1] - begins[-1]
        chosen.append(here)
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    columns: list[list[NDArray[Any]]] = [[] for _ in PLAN_FILES[1:]]
    places = []
    for here, begin, folder in zip(chosen, begins, plan_folders, strict=True):
        # The pieces of a row lie side by side, in the plan and in the result.
        within = np.arange(sizes[here].sum()) - np.repeat(
            np.cumsum(sizes[here]) - sizes[here], sizes[here]
        )
        pieces = np.repeat(begin, sizes[here]) + within
        places.append(np.repeat(bounds[here], sizes[here]) + within)
        for column, name in zip(columns, PLAN_FILES[1:], strict=True):
            column.append(np.load(folder / name, mmap_mode="r")[pieces])
    order = np.argsort(np.concatenate(places))
    return bounds, [np.concatenate(column)[order] for column in columns]


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
