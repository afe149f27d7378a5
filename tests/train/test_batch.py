"""Packed batches: positions, bounds and buckets of a micro-batch."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.shards import DataSet, Row
from train.batch import BatchShape, pack, seqlen_bucket
from train.masking import IGNORED, MaskedRow

NOTHING = MaskedRow(*(np.empty(0, np.int64),) * 3)


def shape_of(data: DataSet, rows: int) -> BatchShape:
    return BatchShape(
        rows=rows,
        row_tokens=data.row_tokens,
        max_length=data.max_length,
        highest_rate=0.3,
        sources=("codes", "notes", "papers"),
    )


def make_row(ids: list[int], bounds: list[int], documents: int) -> Row:
    names = [f"d{number}" for number in range(documents)]
    return Row(np.array(ids, np.uint16), np.array(bounds, np.int32), names, "notes", "key")


def test_rows_lie_end_to_end_with_their_masks_in_place(data_folder: Path) -> None:
    data = DataSet(data_folder)
    rows = [data.read("train", "notes", 3), data.read("train", "papers", 5)]
    mask = MaskedRow(np.array([2, 5]), np.array([3, 44]), rows[1].input_ids[[2, 5]].astype(int))
    batch = pack(rows, [NOTHING, mask], shape_of(data, rows=2))
    expected = np.concatenate([row.input_ids for row in rows]).astype(np.int64)
    expected[64 + 2], expected[64 + 5] = 3, 44
    assert batch.input_ids.tolist() == expected.tolist()
    assert batch.masked_tokens == 2
    assert batch.masked_indices[:3].tolist() == [66, 69, 0]
    assert batch.labels[:2].tolist() == rows[1].input_ids[[2, 5]].tolist()
    assert (batch.labels[2:] == IGNORED).all()
    assert batch.masked_indices.shape == batch.labels.shape == (2 * 19,), "2 × round(0.3 × 64)"
    assert batch.masked_sources[:3].tolist() == [2, 2, 0], "numbers of their sources, then filler"
    assert batch.masked_sources.shape == batch.labels.shape
    tensors = [batch.input_ids, batch.position_ids, batch.labels, batch.masked_sources]
    assert {tensor.dtype for tensor in tensors} == {torch.int64}
    assert batch.cu_seqlens.dtype == torch.int32


def test_positions_start_anew_in_every_document(data_folder: Path) -> None:
    data = DataSet(data_folder)
    rows = [data.read("train", "papers", row) for row in (0, 1, 2)]
    batch = pack(rows, [NOTHING] * 3, shape_of(data, rows=3))
    bounds = batch.cu_seqlens.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == 3 * 64
    for begin, end in itertools.pairwise(bounds):
        assert batch.position_ids[begin:end].tolist() == list(range(end - begin))
    real = [64 * n + bound for n, row in enumerate(rows) for bound in row.cu_seqlens.tolist()]
    assert set(real) <= set(bounds)
    documents = [np.diff(row.cu_seqlens[: len(row.documents) + 1]) for row in rows]
    assert batch.lengths.tolist() == np.concatenate(documents).tolist()


def test_long_padding_is_cut_so_that_it_does_not_raise_max_seqlen() -> None:
    row = make_row([0, 9, 1] + [2] * 2045, [0, 3, 2048], documents=1)
    shape = BatchShape(1, 2048, max_length=200, highest_rate=0.3, sources=("notes",))
    batch = pack([row], [NOTHING], shape)
    lengths = np.diff(batch.cu_seqlens.numpy())
    assert lengths.sum() == 2048
    assert lengths.max() == 200
    assert batch.max_seqlen == 200, "a bucket of 512 is more than any document has"
    assert batch.lengths.tolist() == [3], "padding is no document"


def test_a_full_row_keeps_its_bounds() -> None:
    row = make_row([0, 9, 1, 0, 9, 1], [0, 3, 6], documents=2)
    shape = BatchShape(1, 6, max_length=6, highest_rate=0.3, sources=("notes",))
    batch = pack([row], [NOTHING], shape)
    assert batch.cu_seqlens.tolist() == [0, 3, *[6] * 63]


@pytest.mark.parametrize(
    ("longest", "expected"), [(1, 128), (128, 128), (129, 512), (513, 2048), (2049, 8192)]
)
def test_buckets_of_the_longest_document(longest: int, expected: int) -> None:
    assert seqlen_bucket(longest) == expected


@pytest.mark.parametrize(("documents", "slots"), [(1, 64), (64, 64), (65, 128), (260, 320)])
def test_few_documents_are_empty(documents: int, slots: int) -> None:
    row = make_row([0] * documents, list(range(documents + 1)), documents)
    shape = BatchShape(1, documents, max_length=1, highest_rate=0.3, sources=("notes",))
    batch = pack([row], [NOTHING], shape)
    assert batch.cu_seqlens.tolist() == [*range(documents), *[documents] * (slots + 1 - documents)]


def test_shapes_take_few_values(data_folder: Path) -> None:
    data = DataSet(data_folder)
    shapes: set[tuple[Any, ...]] = set()
    for row in range(40):
        batch = pack([data.read("train", "notes", row)], [NOTHING], shape_of(data, rows=1))
        tensors = (batch.input_ids, batch.cu_seqlens, batch.masked_indices)
        shapes.add((*(tuple(tensor.shape) for tensor in tensors), batch.max_seqlen))
    assert shapes == {((64,), (65,), (19,), 32)}
