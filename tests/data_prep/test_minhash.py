"""MinHash: agreement as often as sets are similar, and candidates found as often as promised."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.mimic import documents
from data_prep.minhash import Banding, batches, candidate_pairs, distinct_pairs, signatures
from data_prep.near_duplicates import jaccard, run_sets

SINGLE = Banding(words=1, bands=1024, rows=1)


def keys_of(texts: list[str], banding: Banding) -> np.ndarray:
    return np.concatenate([keys for _, _, keys in signatures(enumerate(texts), banding)])


@pytest.mark.parametrize("common", [0, 10, 40, 90, 160])
def test_keys_agree_as_often_as_the_jaccard_similarity(common: int) -> None:
    """1,024 hash functions: four standard deviations are 0.0625 at most."""
    shared = [f"word{n}" for n in range(common)]
    first = " ".join([*shared, *(f"first{n}" for n in range(40))])
    second = " ".join([*(f"second{n}" for n in range(40)), *shared])
    keys = keys_of([first, second], SINGLE)
    agreement = (keys[0] == keys[1]).mean()
    assert agreement == pytest.approx(common / (common + 80), abs=0.0625)


def test_all_candidates_of_real_reports_are_found_as_often_as_promised(shared_data: Path) -> None:
    """Against all 124,750 pairs of 500 real reports."""
    path = shared_data / "mimic-iv-note/note/radiology.csv.gz"
    texts = [
        document.text for document, _ in zip(documents(path, "radiology"), range(500), strict=False)
    ]
    banding = Banding(words=5, bands=14, rows=8)
    keys = keys_of(texts, banding)
    assert len(keys) == len(texts)
    sets = [runs for runs, _ in run_sets(texts, 5)]
    promised = found = 0.0
    for first in range(len(texts)):
        for second in range(first):
            similarity = jaccard(sets[first], sets[second])
            if similarity >= 0.6:
                promised += 1 - (1 - similarity**8) ** 14
                found += bool((keys[first] == keys[second]).any())
    assert promised > 25
    assert found == pytest.approx(promised, abs=4 * promised**0.5)


def test_what_is_hashed_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"note {n} of the patient " * (n % 7) for n in range(50)]
    banding = Banding(5, 3, 2)
    whole = [
        np.concatenate(parts) for parts in zip(*signatures(enumerate(texts), banding), strict=False)
    ]
    monkeypatch.setattr("data_prep.minhash._BATCH_CHARACTERS", 100)
    monkeypatch.setattr("data_prep.minhash._BLOCK_RUNS", 3)
    parts = [
        np.concatenate(parts) for parts in zip(*signatures(enumerate(texts), banding), strict=False)
    ]
    for first, second in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(first, second)
    # Texts without a word have no key.
    assert whole[0].tolist() == [n for n in range(50) if n % 7]
    assert [n for batch in batches(enumerate(texts)) for n, _ in batch] == list(range(50))


@given(
    files=st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=8), max_size=4
    ),
    part_keys=st.sampled_from([1, 3, 1 << 20]),
)
def test_the_longest_is_paired_with_all_that_share_its_key(
    files: list[list[tuple[int, int]]], part_keys: int
) -> None:
    flat = [document for file in files for document in file]
    bounds = np.cumsum([0, *map(len, files)])
    bands = [
        (
            np.array([key for key, _ in file], np.uint64),
            np.arange(begin, begin + len(file)),
            np.array([words for _, words in file], np.uint32),
        )
        for file, begin in zip(files, bounds, strict=False)
    ]
    blocks = list(candidate_pairs(lambda: bands, len(flat), part_keys))
    pairs = [tuple(pair) for block in blocks for pair in block.tolist()]
    expected = set()
    for key in range(4):
        members = [place for place, (of, _) in enumerate(flat) if of == key]
        members.sort(key=lambda place: (-flat[place][1], place))
        expected |= {(members[0], other) for other in members[1:]}
        expected |= set(itertools.pairwise(members))
    assert sorted(pairs) == sorted(expected)


def test_distinct_pairs_are_ordered_and_there_once() -> None:
    pairs = np.array([[3, 1], [2, 5], [3, 1], [2, 4]])
    assert distinct_pairs(pairs).tolist() == [[2, 4], [2, 5], [3, 1]]
    assert distinct_pairs(pairs[:0]).shape == (0, 2)
