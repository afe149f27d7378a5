"""Counter-based randomness: pure, known values, and uniform enough."""

import numpy as np
from scipy import stats

from common.counter_random import derive_key, permutation, random_bits


def test_known_values_hold_forever() -> None:
    """SplitMix64's published first words; a change here would break every resumed run."""
    first = random_bits(0, np.arange(3, dtype=np.uint64))
    assert [int(word) for word in first] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]
    assert derive_key("mask", 17) != derive_key("mask", "17")


def test_permutation_is_one_and_depends_on_the_key() -> None:
    one, two = permutation(1, 1000), permutation(2, 1000)
    assert sorted(one) == list(range(1000))
    assert not np.array_equal(one, two)
    np.testing.assert_array_equal(one, permutation(1, 1000))


def test_bits_are_uniform() -> None:
    top_byte = random_bits(derive_key("uniform"), np.arange(1 << 16, dtype=np.uint64)) >> np.uint64(
        56
    )
    counts = np.bincount(top_byte.astype(np.int64), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-4
