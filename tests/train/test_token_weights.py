"""Weights of tokens against the formula, and which tokens count as medical terms."""

import numpy as np
import pytest

from train.token_weights import frequency_bands, medical_terms, token_weights

COUNTS = np.array([0, 100, 60, 25, 10, 4, 1, 0])


@pytest.mark.parametrize(("exponent", "cap"), [(0.5, 3.0), (0.5, 100.0), (1.0, 8.0), (0.0, 3.0)])
def test_weights_are_the_formula(exponent: float, cap: float) -> None:
    terms = np.array([False, True, False, True, False, False, True, False])
    weights = token_weights(COUNTS, terms, exponent, cap, boost=1.5)
    # 100 and 60 of 200 tokens: the typical one, at half of them, is the first.
    for token in range(1, 7):
        ratio = 100 / COUNTS[token]
        wanted = min(cap, (1.5 if terms[token] else 1.0) * ratio**exponent)
        assert weights[token] == pytest.approx(wanted)
    if exponent:
        assert weights[[0, 7]].tolist() == [cap, cap]


def test_half_of_all_tokens_are_no_rarer_than_the_typical_one() -> None:
    counts = np.array([30, 25, 25, 10, 10])
    weights = token_weights(counts, np.zeros(5, np.bool_), 1.0, 100.0, 1.0)
    np.testing.assert_allclose(weights, [25 / 30, 1.0, 1.0, 2.5, 2.5])


def test_terms_are_words_that_are_frequent_where_terms_are() -> None:
    texts = [" of", " code", "71", " femur", "ulcer", " xy", " mice", " and"]
    counts = {
        "codes": np.array([40, 50, 30, 20, 6, 9, 1, 0, 0]),
        "papers": np.array([400, 4, 30, 2, 8, 1, 70, 300, 0]),
    }
    terms = medical_terms(counts, ["codes"], texts)
    # "of" and "mice" are rarer there than elsewhere, "code" is wording, "71" no word, "xy" short.
    assert np.flatnonzero(terms).tolist() == [3, 4]
    assert not medical_terms(counts, [], texts).any()


def test_bands_are_shares_of_the_training_text() -> None:
    counts = np.array([0, 30, 5, 25, 5, 30, 4, 1])
    # Falling: 30 (id 1), 30 (5) | 25 (3), 5 (2) | 5 (4), 4 (6), 1 (7), 0 (0).
    assert frequency_bands(counts).tolist() == [2, 0, 1, 1, 2, 0, 2, 2]
