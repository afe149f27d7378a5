"""Rows from token files: documents whole or in pieces, each token once, bounds that fit."""

import json
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.rows import RowShape, RowTokens, rows_in, write_plan, write_planned_shard
from data_prep.shards import INDEX_DTYPE, index_path_of
from data_prep.token_files import TokenFile

TOKENS = RowTokens(cls=0, sep=1, pad=2, dtype=np.dtype("<u2"))


def write_file(folder: Path, first: int, lengths: list[int]) -> TokenFile:
    """A token file whose tokens are all different, from `first` on."""
    folder.mkdir()
    starts = np.cumsum([0, *lengths])
    np.arange(first, first + starts[-1], dtype=TOKENS.dtype).tofile(folder / "tokens.bin")
    np.save(folder / "starts.npy", starts.astype(np.int64))
    np.save(folder / "ids.npy", np.array([f"pubmed-{first}-{n}" for n in range(len(lengths))], "S"))
    return TokenFile(folder, TOKENS.dtype)


@settings(max_examples=15, deadline=None)
@given(
    files=st.lists(st.lists(st.integers(1, 60), max_size=12), min_size=1, max_size=3),
    row_tokens=st.integers(16, 64),
    max_length=st.integers(3, 64),
    max_documents=st.integers(1, 6),
    rows_per_shard=st.integers(2, 8),
    parts=st.integers(1, 3),
    key=st.integers(0, 2**63),
)
def test_rows_hold_every_token_once_in_documents_that_fit(
    files: list[list[int]],
    row_tokens: int,
    max_length: int,
    max_documents: int,
    rows_per_shard: int,
    parts: int,
    key: int,
) -> None:
    shape = RowShape(row_tokens, min(max_length, row_tokens), max_documents)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found: list[TokenFile] = []
        first = 3
        for number, lengths in enumerate(files):
            found.append(write_file(folder / f"{number}", first, lengths))
            first += sum(lengths)
        plans = [folder / f"plan-{plan}" for plan in range(parts)]
        counts = [
            write_plan(plan, found, shape, key, number, parts) for number, plan in enumerate(plans)
        ]
        total = sum(count["rows"] for count in counts)
        assert total == sum(map(rows_in, plans))
        assert sum(count["documents"] for count in counts) == sum(map(len, files))
        contents: dict[str, dict[int, list[int]]] = {}
        for number, begin in enumerate(range(0, total, rows_per_shard)):
            path = folder / f"{number}.tar"
            rows = range(begin, min(begin + rows_per_shard, total))
            part = ("train", "pubmed")
            write_planned_shard(path, plans, found, rows, part, row_tokens, TOKENS, key)
            for ids, bounds, names in read_rows(path):
                check_bounds(ids, bounds, names, shape)
                for name, start, end in zip(names, bounds, bounds[1:], strict=False):
                    document, _, piece = name.partition("#")
                    pieces = contents.setdefault(document, {})
                    assert int(piece or 0) not in pieces
                    pieces[int(piece or 0)] = ids[start + 1 : end - 1].tolist()
        for file in found:
            starts, tokens = file.starts(), file.tokens().tolist()
            for name, start, end in zip(file.ids(), starts, starts[1:], strict=False):
                pieces = contents.pop(name.decode())
                whole = [token for _, piece in sorted(pieces.items()) for token in piece]
                assert whole == tokens[start:end]
        assert contents == {}


def read_rows(path: Path) -> list[tuple[np.ndarray, list[int], list[str]]]:
    """(ids, cu_seqlens, names) of a shard's rows, by the offsets of its index."""
    index, content = np.load(index_path_of(path)), path.read_bytes()
    assert index.dtype == INDEX_DTYPE
    rows = []
    for record in index:
        parts = [
            content[offset : offset + size]
            for offset, size in zip(record["offset"], record["size"], strict=True)
        ]
        ids, bounds = (np.load(BytesIO(part)) for part in parts[:2])
        rows.append((ids, bounds.tolist(), json.loads(parts[2])))
    return rows


def check_bounds(ids: np.ndarray, bounds: list[int], names: list[str], shape: RowShape) -> None:
    """From 0 to the row's end, rising, no document longer than it may be, padding at the end."""
    assert len(ids) == shape.row_tokens == bounds[-1]
    assert bounds[0] == 0
    assert (np.diff(bounds) > 0).all()
    assert 1 <= len(names) <= shape.max_documents
    assert len(bounds) - 1 - len(names) in (0, 1)
    used = bounds[len(names)]
    assert (ids[used:] == TOKENS.pad).all()
    assert (ids[:used] != TOKENS.pad).all()
    for start, end in pairwise(bounds[: len(names) + 1]):
        assert end - start <= shape.max_length
        assert (ids[start], ids[end - 1]) == (TOKENS.cls, TOKENS.sep)
