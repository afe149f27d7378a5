"""Masks: exact counts, special tokens untouched, replacements from the ordinary ids alone."""

import hashlib
import itertools
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.shards import DataError
from train.masking import Masker, Vocabulary, masked_count

CLS, SEP, PAD, MASK, UNK = range(5)
VOCABULARY = Vocabulary.from_manifest(
    {
        "vocab_size": 128,
        "real_vocab_size": 120,
        "special_ids": {"cls": CLS, "sep": SEP, "pad": PAD, "mask": MASK, "unk": UNK},
        "excluded_ids": [CLS, SEP, PAD, MASK, UNK, 50],
    }
)
MASKER = Masker(seed=3, vocabulary=VOCABULARY)


def make_row(lengths: list[int], padding: int, seed: int) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(seed)
    documents = [[CLS, *random.integers(5, 120, length), SEP] for length in lengths]
    return np.array([*itertools.chain(*documents), *[PAD] * padding], np.uint16)


@given(
    lengths=st.lists(st.integers(1, 40), max_size=6),
    padding=st.integers(0, 30),
    rate=st.floats(0.01, 0.99),
    row=st.integers(0, 2**40),
)
def test_a_mask_is_exact_and_spares_special_tokens(
    lengths: list[int], padding: int, rate: float, row: int
) -> None:
    ids = make_row(lengths, padding, seed=row % 1000)
    mask = MASKER.mask(ids, sum(lengths), rate, "train", row)
    assert len(mask.positions) == masked_count(rate, sum(lengths))
    assert (np.diff(mask.positions) > 0).all()
    np.testing.assert_array_equal(mask.labels, ids[mask.positions])
    assert (mask.labels > UNK).all()
    allowed = (mask.replacements == mask.labels) | (mask.replacements == MASK)
    drawn = mask.replacements[~allowed]
    assert np.isin(drawn, VOCABULARY.ordinary_ids).all()


def test_random_ids_cover_the_ordinary_ids_and_nothing_else() -> None:
    masker = Masker(seed=1, vocabulary=VOCABULARY, mask_share=0.0, random_share=1.0)
    ids = make_row([20_000], 0, seed=0)
    drawn = masker.mask(ids, 20_000, 0.9, "train", 0).replacements
    assert set(drawn.tolist()) == set(range(5, 120)) - {50}


def test_shares_are_kept() -> None:
    ids = make_row([100_000], 0, seed=0)
    mask = MASKER.mask(ids, 100_000, 0.5, "train", 0)
    kept = (mask.replacements == mask.labels).mean()
    assert (mask.replacements == MASK).mean() == pytest.approx(0.8, abs=0.01)
    # One in 114 random ids is the token that was there.
    assert kept == pytest.approx(0.1 + 0.1 / 114, abs=0.01)


@given(st.integers(0, 1000))
def test_a_mask_is_a_function_of_its_counter(row: int) -> None:
    ids = make_row([60], 4, seed=1)
    first, again = (MASKER.mask(ids, 60, 0.3, "train", row) for _ in range(2))
    np.testing.assert_array_equal(first.positions, again.positions)
    np.testing.assert_array_equal(first.replacements, again.replacements)
    others = [
        MASKER.mask(ids, 60, 0.3, "train", row + 1),
        MASKER.mask(ids, 60, 0.3, "validation", row),
        Masker(seed=4, vocabulary=VOCABULARY).mask(ids, 60, 0.3, "train", row),
    ]
    assert all(other.positions.tolist() != first.positions.tolist() for other in others)


def test_a_lower_rate_masks_a_part_of_what_a_higher_one_does() -> None:
    ids = make_row([200], 4, seed=1)
    low, high = (MASKER.mask(ids, 200, rate, "train", 9) for rate in (0.15, 0.3))
    assert set(low.positions.tolist()) < set(high.positions.tolist())


def test_positions_are_masked_equally_often() -> None:
    ids = make_row([50], 0, seed=1)
    counts = np.zeros(52)
    for row in range(4000):
        counts[MASKER.mask(ids, 50, 0.3, "train", row).positions] += 1
    assert counts[[0, 51]].tolist() == [0, 0]
    # Five standard deviations of a binomial with n = 4000, p = 0.3.
    assert np.abs(counts[1:51] - 1200).max() < 5 * np.sqrt(4000 * 0.3 * 0.7)


def test_plain_masks_are_those_of_runs_that_have_been_trained() -> None:
    """Positions and replacements written down once: a run must be resumable."""
    ids = np.array(
        [CLS, *[5 + (7 * i * i + i) % 115 for i in range(200)], SEP, PAD, PAD], np.uint16
    )
    mask = MASKER.mask(ids, 200, 0.1, "train", 9)
    assert mask.positions.tolist() == [
        *(13, 15, 17, 22, 28, 37, 47, 60, 77, 81),
        *(90, 92, 96, 120, 133, 141, 143, 158, 169, 182),
    ]
    assert mask.replacements.tolist() == [
        *(3, 3, 3, 3, 3, 3, 3, 3, 33, 3),
        *(3, 3, 3, 116, 3, 119, 3, 90, 56, 88),
    ]
    masks = [MASKER.mask(ids, 200, 0.3, "train", row) for row in range(50)]
    masks.append(MASKER.mask(ids, 200, 0.15, "validation", "notes", 4))
    found = hashlib.sha256()
    for mask in masks:
        for array in (mask.positions, mask.replacements, mask.labels):
            found.update(array.astype("<i8").tobytes())
    wanted = "89f9f1895113b10c3a08f24b143697143a55cab3244220edeccaf2b063524fca"
    assert found.hexdigest() == wanted


def test_a_row_that_its_tokenizer_does_not_know_is_refused() -> None:
    ids = np.array([CLS, *[UNK] * 20, SEP], np.uint16)
    with pytest.raises(DataError, match="does not know the text"):
        MASKER.mask(ids, 20, 0.3, "train", 0)


def test_masking_is_fast() -> None:
    ids = make_row([8190], 0, seed=1)
    best = min(_cpu_seconds(ids, row) for row in range(200))
    assert best < 1e-3


def _cpu_seconds(ids: np.ndarray[Any, Any], row: int) -> float:
    begin = time.thread_time()
    MASKER.mask(ids, 8190, 0.3, "train", row)
    return time.thread_time() - begin
