"""The ways of masking: exact counts in all of them, whole words, and draws by weight."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.config import ConfigError
from data_prep.shards import DataError, DataSet
from train.mask_order import MaskOrder, TokenAwareOrder, TokenOrder, WholeWordOrder
from train.masking import Masker, Vocabulary, masked_count
from train.word_pieces import WordPieces

CLS, SEP, PAD, MASK, UNK = range(5)
SPECIAL = np.arange(128) <= UNK
VOCABULARY = Vocabulary(mask_id=MASK, special=SPECIAL, ordinary_ids=np.arange(5, 120))
# Even ids begin a word, odd ones go on with it.
TEXTS = [f"{' ' if i % 2 == 0 else ''}x" for i in range(120)]
WEIGHTS = np.where(np.arange(128) % 3, 1.0, 2.5)
ORDERS = [
    TokenOrder(),
    WholeWordOrder(WordPieces.from_texts(TEXTS, SPECIAL)),
    TokenAwareOrder(WEIGHTS),
]


def masker(order: MaskOrder) -> Masker:
    return Masker(seed=3, vocabulary=VOCABULARY, order=order)


def make_row(lengths: list[int], padding: int, seed: int) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(seed)
    documents = [[CLS, *random.integers(5, 120, length), SEP] for length in lengths]
    return np.array([*itertools.chain(*documents), *[PAD] * padding], np.uint16)


def words_of(ids: np.ndarray[Any, Any]) -> list[list[int]]:
    """The positions of every word, found one token after another."""
    words: list[list[int]] = []
    for position, token in enumerate(ids.tolist()):
        if token <= UNK:
            words.append([])
        elif token % 2 and words and words[-1]:
            words[-1].append(position)
        else:
            words.append([position])
    return [word for word in words if word]


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: type(order).__name__)
@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 40), max_size=6),
    padding=st.integers(0, 30),
    rate=st.floats(0.01, 0.99),
    row=st.integers(0, 2**40),
)
def test_every_way_masks_exactly_as_many_and_spares_special_tokens(
    order: MaskOrder, lengths: list[int], padding: int, rate: float, row: int
) -> None:
    ids = make_row(lengths, padding, seed=row % 1000)
    first, again = (masker(order).mask(ids, sum(lengths), rate, "train", row) for _ in range(2))
    assert len(first.positions) == masked_count(rate, sum(lengths))
    assert (np.diff(first.positions) > 0).all()
    assert (first.labels > UNK).all()
    np.testing.assert_array_equal(first.labels, ids[first.positions])
    drawn = first.replacements[(first.replacements != first.labels) & (first.replacements != MASK)]
    assert np.isin(drawn, VOCABULARY.ordinary_ids).all()
    for name in ("positions", "replacements", "labels"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    lower = masker(order).mask(ids, sum(lengths), rate / 2, "train", row)
    assert set(lower.positions.tolist()) <= set(first.positions.tolist())


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: type(order).__name__)
def test_other_rows_and_seeds_have_other_masks(order: MaskOrder) -> None:
    ids = make_row([60], 4, seed=1)
    masks = [
        masker(order).mask(ids, 60, 0.3, "train", 7),
        masker(order).mask(ids, 60, 0.3, "train", 8),
        dataclasses.replace(masker(order), seed=4).mask(ids, 60, 0.3, "train", 7),
    ]
    assert len({tuple(mask.positions.tolist()) for mask in masks}) == 3


@given(row=st.integers(0, 2**40), rate=st.floats(0.01, 0.99))
def test_words_are_masked_whole_but_one_from_its_first_token(row: int, rate: float) -> None:
    ids = make_row([30, 1, 50], 5, seed=row % 1000)
    masked = set(masker(ORDERS[1]).mask(ids, 81, rate, "train", row).positions.tolist())
    parts = [[position in masked for position in word] for word in words_of(ids)]
    cut = [part for part in parts if any(part) and not all(part)]
    assert len(cut) <= 1
    for part in cut:
        assert part == sorted(part, reverse=True), "the first tokens of the word"


def test_words_are_drawn_like_a_shuffle_of_them() -> None:
    """How often each token is masked, against words shuffled by NumPy and cut at the same count."""
    ids = make_row([40], 0, seed=5)
    words = words_of(ids)
    rows, number = 1500, masked_count(0.3, 40)
    random = np.random.default_rng(0)
    wanted, found = np.zeros((2, len(ids)))
    for row in range(rows):
        shuffled = [words[i] for i in random.permutation(len(words))]
        wanted[list(itertools.chain(*shuffled))[:number]] += 1
        found[masker(ORDERS[1]).mask(ids, 40, 0.3, "train", row).positions] += 1
    # Five standard deviations of the difference of two binomial counts.
    assert np.abs(wanted - found).max() < 5 * np.sqrt(2 * rows * 0.3 * 0.7)


@pytest.mark.parametrize("number", [1, 2])
def test_tokens_are_drawn_by_their_weights(number: int) -> None:
    """The exact distribution of one and of two draws without replacement."""
    weights = np.ones(128)
    tokens = np.arange(10, 20)
    weights[tokens] = [0.1, 0.2, 0.5, 0.5, 1.0, 1.0, 1.5, 2.0, 3.0, 3.0]
    ids = np.array([CLS, *tokens, SEP], np.uint16)
    share = weights[tokens] / weights[tokens].sum()
    # First i then j: share i × share j / (1 - share i).
    pairs = share[:, None] * share / (1 - share[:, None]) * (1 - np.eye(10))
    rows = 1500
    found = np.zeros((10, 10))
    for row in range(rows):
        mask = masker(TokenAwareOrder(weights)).mask(ids, 10, number / 10, "train", row)
        first, last = mask.positions[[0, -1]] - 1
        found[first, last] += 1
    if number == 1:
        result = stats.chisquare(np.diag(found), rows * share)
    else:
        above = np.triu_indices(10, 1)
        expected = rows * (pairs + pairs.T)[above]
        assert found[above].sum() == rows
        # Pairs that are expected a few times only are one cell.
        rare = expected < 10
        cells = [np.append(c[~rare], c[rare].sum()) for c in (found[above], expected)]
        result = stats.chisquare(*cells)
    assert result.pvalue > 1e-3


def test_a_run_weights_tokens_by_the_counts_of_its_data(resolved: Callable[..., Any]) -> None:
    run = resolved(
        phase={"masking": {"kind": "token_aware", "term_sources": ["notes"], "weight_cap": 1.2}}
    )
    weights = run.last_phase.masker.order.weights
    counts = sum(run.last_phase.data.token_counts().values())
    assert weights.max() == 1.2
    used = np.flatnonzero(counts)
    plain = resolved(
        phase={"masking": {"kind": "token_aware", "term_sources": []}}
    ).last_phase.masker.order.weights
    order = used[np.argsort(counts[used])]
    assert (np.diff(plain[order]) <= 0).all(), "more frequent, less weight"
    assert set(np.round(weights[used] / np.minimum(plain[used], 1.2), 9)) - {1.0}, "some boosted"


def test_what_the_data_set_lacks_is_named(
    resolved: Callable[..., Any], data_maker: Callable[..., Path], tmp_path: Path
) -> None:
    aware = {"kind": "token_aware", "term_sources": ["notes"]}
    with pytest.raises(ConfigError, match=r"no source 'icd10cm'; it has notes, papers"):
        resolved(phase={"masking": {"kind": "token_aware"}})
    data = data_maker(tmp_path / "d", {"train": {"notes": 8}, "validation": {"notes": 2}})
    resolved(phase={"masking": aware, "data": {"dir": data}})
    counts = data / "token_counts.npy"
    counts.write_bytes(counts.read_bytes()[:-8] + b"\1" * 8)
    with pytest.raises(DataError, match=r"token_counts\.npy is not what manifest\.json says"):
        resolved(phase={"masking": aware, "data": {"dir": data}})
    with pytest.raises(DataError, match=r"token_counts\.npy is not what"):
        DataSet(data).verify()
    counts.unlink()
    with pytest.raises(DataError, match=r"token_counts\.npy cannot be read"):
        resolved(phase={"masking": aware, "data": {"dir": data}})
    manifest = json.loads((data / "manifest.json").read_text())
    del manifest["token_counts"]
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="the same python -m data_prep adds them"):
        resolved(phase={"masking": aware, "data": {"dir": data}})
    resolved(phase={"masking": {"kind": "whole_word"}, "data": {"dir": data}})
