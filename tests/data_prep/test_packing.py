"""Packing: nothing lost, nothing twice, nothing too much in a row, and rows that are full."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import packing
from data_prep.packing import cut_documents, pack

LENGTHS = st.lists(st.integers(0, 300), max_size=200)


@given(lengths=LENGTHS, max_length=st.integers(3, 64))
def test_pieces_cover_every_document_in_even_parts(lengths: list[int], max_length: int) -> None:
    pieces = cut_documents(np.array(lengths, np.int64), max_length)
    assert (pieces.lengths <= max_length).all()
    for document, length in enumerate(lengths):
        own = np.flatnonzero(pieces.document == document)
        begins, ends = pieces.begin[own].tolist(), pieces.end[own].tolist()
        assert begins == [0, *ends[:-1]]
        assert ends[-1] == length
        sizes = np.diff([0, *ends])
        assert sizes.max() - sizes.min() <= 1
        # As few pieces as can be.
        assert len(own) == max(1, -(-length // (max_length - 2)))
        assert pieces.number[own].tolist() == list(range(len(own)))
        assert pieces.cut[own].tolist() == [len(own) > 1] * len(own)


@settings(max_examples=200)
@given(
    lengths=st.lists(st.integers(2, 50), max_size=300),
    row_tokens=st.integers(50, 200),
    max_documents=st.integers(1, 12),
    key=st.integers(0, 2**64 - 1),
    look_ahead=st.sampled_from([2, 7, 64, 1 << 14]),
)
def test_rows_hold_every_piece_once_within_their_bounds(
    lengths: list[int], row_tokens: int, max_documents: int, key: int, look_ahead: int
) -> None:
    sizes = np.array(lengths, np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "LOOK_AHEAD", look_ahead)
        plan = pack(sizes, row_tokens, max_documents, key)
        again = pack(sizes, row_tokens, max_documents, key)
    assert sorted(plan.order.tolist()) == list(range(len(lengths)))
    assert plan.bounds[0] == 0
    assert plan.bounds[-1] == len(lengths)
    for begin, end in zip(plan.bounds[:-1], plan.bounds[1:], strict=True):
        assert 1 <= end - begin <= max_documents
        assert sizes[plan.order[begin:end]].sum() <= row_tokens
    np.testing.assert_array_equal(plan.order, again.order)
    np.testing.assert_array_equal(plan.bounds, again.bounds)


@given(
    lengths=st.lists(st.integers(2, 50), max_size=120),
    row_tokens=st.integers(50, 200),
    max_documents=st.integers(1, 12),
    key=st.integers(0, 2**64 - 1),
)
def test_a_row_is_closed_only_when_nothing_that_waits_fits(
    lengths: list[int], row_tokens: int, max_documents: int, key: int
) -> None:
    """Of any two rows, the later one has no piece that would go into the earlier one.

    So at most one row is less than half full: fewer than twice as many rows as can be.
    """
    sizes = np.array(lengths, np.int64)
    plan = pack(sizes, row_tokens, max_documents, key)
    rows = [sizes[plan.order[b:e]] for b, e in zip(plan.bounds, plan.bounds[1:], strict=False)]

    def takes(row: np.ndarray, other: np.ndarray) -> bool:
        return len(row) < max_documents and row.sum() + other.min() <= row_tokens

    for number, row in enumerate(rows):
        for other in rows[:number]:
            assert not (takes(row, other) and takes(other, row))
    halves = [len(row) < max_documents and 2 * row.sum() <= row_tokens for row in rows]
    assert sum(halves) <= 1


def test_few_documents_make_one_row_and_none_make_none() -> None:
    assert pack(np.array([5, 7]), 64, 512, 1).rows == 1
    assert pack(np.zeros(0, np.int64), 64, 512, 1).rows == 0
    assert len(cut_documents(np.zeros(0, np.int64), 64)) == 0


def test_a_piece_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="a piece of 65 tokens, rows of 64"):
        pack(np.array([5, 65]), 64, 512, 1)


def test_rows_mix_documents_from_everywhere() -> None:
    """Neighbours in the files, such as codes of one chapter, do not come in one row."""
    plan = pack(np.full(50_000, 20), 2048, 512, 3)
    spread = [
        np.ptp(plan.order[begin:end])
        for begin, end in zip(plan.bounds[:-1], plan.bounds[1:], strict=True)
    ]
    assert min(spread) > 25_000
    # And another key gives another order.
    assert (pack(np.full(50_000, 20), 2048, 512, 4).order != plan.order).mean() > 0.99


def drawn_lengths(source: str, number: int) -> np.ndarray:
    """Lengths in tokens as the sources have them: medians, tails, and titles without abstract."""
    rng = np.random.default_rng(7)
    if source == "pubmed":
        title_only = rng.random(number) < 0.12
        abstract = rng.lognormal(5.7, 0.45, number)
        lengths = np.where(title_only, rng.lognormal(2.9, 0.4, number), abstract)
    else:
        median, spread = {
            "discharge": (2300, 0.5),
            "transcription": (540, 0.7),
            "radiology": (100, 0.5),
            "codes": (22, 0.35),
        }[source]
        lengths = rng.lognormal(np.log(median), spread, number)
    return np.clip(lengths, 5, 14_000).astype(np.int64)


@pytest.mark.parametrize(
    ("source", "number", "max_length", "least_fill"),
    [
        ("pubmed", 40_000, 1024, 0.995),
        ("pubmed", 40_000, 8192, 0.98),
        ("discharge", 20_000, 1024, 0.995),
        ("discharge", 20_000, 8192, 0.98),
        ("transcription", 2_300, 1024, 0.995),
        ("transcription", 2_300, 8192, 0.98),
        ("radiology", 20_000, 1024, 0.995),
        ("radiology", 20_000, 8192, 0.98),
        ("codes", 90_000, 1024, 0.995),
        ("codes", 90_000, 8192, 0.98),
    ],
)
def test_rows_of_real_like_lengths_are_full(
    source: str, number: int, max_length: int, least_fill: float
) -> None:
    pieces = cut_documents(drawn_lengths(source, number), max_length)
    plan = pack(pieces.lengths, 8192, 512, 11)
    assert pieces.lengths.sum() / (plan.rows * 8192) > least_fill
