"""Packed batches: positions, bounds and buckets of a micro-batch."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.shards import DataSet, Row
from train.batch import FEWEST_SHORT, BatchShape, pack, seqlen_bucket
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


def places_longest_first(rows: list[Row]) -> list[int]:
    """Where each token of rows laid end to end stands in a batch, documents and padding alike."""
    segments, offset = [], 0
    for row in rows:
        segments += [range(offset + a, offset + b) for a, b in itertools.pairwise(row.cu_seqlens)]
        offset += len(row.input_ids)
    order = [at for segment in sorted(segments, key=len, reverse=True) for at in segment]
    return [order.index(at) for at in range(offset)]


def test_documents_stand_longest_first_with_their_masks_in_place(data_folder: Path) -> None:
    data = DataSet(data_folder)
    rows = [data.read("train", "notes", 3), data.read("train", "papers", 5)]
    mask = MaskedRow(np.array([2, 5]), np.array([3, 44]), rows[1].input_ids[[2, 5]].astype(int))
    batch = pack(rows, [NOTHING, mask], shape_of(data, rows=2))
    places = places_longest_first(rows)
    assert places != sorted(places), "these rows must be worth sorting"
    laid_out = np.concatenate([row.input_ids for row in rows]).astype(np.int64)
    laid_out[64 + 2], laid_out[64 + 5] = 3, 44
    assert batch.input_ids[places].tolist() == laid_out.tolist()
    assert batch.masked_tokens == 2
    masked = sorted((places[64 + at], rows[1].input_ids[at]) for at in (2, 5))
    assert batch.masked_indices[:3].tolist() == [*(place for place, _ in masked), 0]
    assert batch.labels[:2].tolist() == [label for _, label in masked]
    assert (batch.labels[2:] == IGNORED).all()
    assert batch.masked_indices.shape == batch.labels.shape == (64,), (
        "2 × round(0.3 × 64), and more"
    )
    assert batch.masked_sources[:3].tolist() == [2, 2, 0], "numbers of their sources, then filler"
    assert batch.masked_sources.shape == batch.labels.shape
    tensors = [batch.input_ids, batch.position_ids, batch.labels, batch.masked_sources]
    assert {tensor.dtype for tensor in tensors} == {torch.int64}
    assert batch.cu_seqlens.dtype == batch.masked_cu_seqlens.dtype == torch.int32


def test_masked_places_go_through_the_documents(data_folder: Path) -> None:
    """In ascending order, each with its own label and source, and which are in which document."""
    data = DataSet(data_folder)
    rows = [data.read("train", name, 3) for name in ("papers", "notes", "papers")]
    draw = np.random.default_rng(0)
    masks = []
    for row in rows:
        at = np.sort(draw.choice(64, 15, replace=False))
        masks.append(MaskedRow(at, row.input_ids[at].astype(int), 100 + at))
    batch = pack(rows, masks, shape_of(data, rows=3))
    came_from = np.argsort(places_longest_first(rows))
    masked = batch.masked_indices[: batch.masked_tokens].numpy()
    assert len(masked) == 45
    assert (np.diff(masked) > 0).all()
    assert batch.labels[:45].tolist() == (100 + came_from[masked] % 64).tolist()
    sources = np.array([2, 1, 2])  # of "codes", "notes", "papers"
    assert batch.masked_sources[:45].tolist() == sources[came_from[masked] // 64].tolist()
    bounds, of_each = batch.cu_seqlens.tolist(), batch.masked_cu_seqlens.tolist()
    assert len(bounds) == len(of_each)
    assert 0 in np.diff(of_each), "a document without a masked token"
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        inside = masked[of_each[number] : of_each[number + 1]].tolist()
        assert inside == [place for place in masked.tolist() if begin <= place < end]


def test_positions_start_anew_in_every_document(data_folder: Path) -> None:
    data = DataSet(data_folder)
    rows = [data.read("train", "papers", row) for row in (0, 1, 2)]
    batch = pack(rows, [NOTHING] * 3, shape_of(data, rows=3))
    bounds = batch.cu_seqlens.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == 3 * 64
    for begin, end in itertools.pairwise(bounds):
        assert batch.position_ids[begin:end].tolist() == list(range(end - begin))
    lengths = np.diff(bounds).tolist()
    assert lengths == sorted(lengths, reverse=True)
    documents = np.concatenate([np.diff(row.cu_seqlens[: len(row.documents) + 1]) for row in rows])
    assert Counter(documents.tolist()) <= Counter(lengths), "and padding, cut where it is long"
    assert batch.lengths.tolist() == documents.tolist()


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


@pytest.mark.parametrize(
    ("long", "short", "expected"),
    [
        (2, FEWEST_SHORT, (2, 258)),
        (1, FEWEST_SHORT + 12, (1, 129)),
        (2, FEWEST_SHORT - 1, None),
        (3, 0, None),
        (0, 5, (0, 0)),
    ],
)
def test_many_short_documents_stand_apart(
    long: int, short: int, expected: tuple[int, int] | None
) -> None:
    """Behind the long ones; few are left with them, and all are short where none is long."""
    lengths = [128] * (short > 0) + [5] * (short - 1) + [129] * long
    ends = [0, *itertools.accumulate(lengths)]
    row = make_row([0] * ends[-1], ends, len(lengths))
    shape = BatchShape(1, ends[-1], max_length=200, highest_rate=0.3, sources=("notes",))
    batch = pack([row], [NOTHING], shape)
    assert batch.long == (expected or (len(lengths), ends[-1]))
    assert batch.cu_seqlens[batch.long.number] == batch.long.tokens


def test_shapes_take_few_values(data_folder: Path) -> None:
    data = DataSet(data_folder)
    shapes: set[tuple[Any, ...]] = set()
    for row in range(40):
        batch = pack([data.read("train", "notes", row)], [NOTHING], shape_of(data, rows=1))
        tensors = (batch.input_ids, batch.cu_seqlens, batch.masked_indices)
        shapes.add((*(tuple(tensor.shape) for tensor in tensors), batch.max_seqlen))
    assert shapes == {((64,), (65,), (64,), 32)}
