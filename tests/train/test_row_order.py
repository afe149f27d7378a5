"""The order of rows: shares are kept at every row, each row comes once an epoch, nothing clumps."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.row_order import RowOrder

Weights = dict[str, float]

ROWS = {"codes": 7, "notes": 900, "papers": 3000}
WEIGHTS = {"codes": 0.01, "notes": 0.5, "papers": 0.49}
MIXTURES: list[Weights] = [
    {"a": 1},
    {"a": 1, "b": 1},
    {"a": 0.7, "b": 0.3},
    {"a": 0.9, "b": 0.1},
    {"a": 3, "b": 5},
    {"a": 1, "b": 1, "c": 1},
    {"a": 0.4, "b": 0.35, "c": 0.25},
    {"a": 0.6, "b": 0.2, "c": 0.15, "d": 0.04, "e": 0.01},
    {"a": 0.9, "b": 0.09, "c": 0.009, "d": 0.001},
    {"a": 10, "b": 1, "c": 1, "d": 1, "e": 1, "f": 1, "g": 1, "h": 1},
    {"a": 0.1, "b": 0.123456789, "c": 0.3, "d": 0.1},
]


def endless(weights: Weights, seed: int = 1) -> RowOrder:
    """An order over sources that are not read through."""
    return RowOrder(seed, dict.fromkeys(weights, 50), weights)


def sources(order: RowOrder, rows: int) -> list[str]:
    return [order[number].source for number in range(rows)]


def shares(weights: Weights) -> dict[str, Fraction]:
    """Exactly, as they are written."""
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    return {name: weight / sum(exact.values()) for name, weight in exact.items()}


@pytest.mark.parametrize("weights", MIXTURES, ids=str)
def test_among_any_first_rows_are_their_shares(weights: Weights) -> None:
    """At every length: to a row of the heaviest source, or of two; to two rows of any."""
    order, counted = endless(weights), Counter[str]()
    exact, heaviest = shares(weights), max(weights.values())
    for rows, source in enumerate(sources(order, 3000), start=1):
        counted[source] += 1
        for name, share in exact.items():
            off = abs(counted[name] - rows * share)
            assert off < (1 if weights[name] == heaviest or len(weights) < 3 else 2)
        if rows % 10 == 0:
            assert order.rows_read(rows) == {name: counted[name] for name in weights}


@pytest.mark.parametrize("weights", MIXTURES, ids=str)
def test_shares_that_are_whole_rows_are_kept_exactly(weights: Weights) -> None:
    exact = shares(weights)
    period = math.lcm(*(share.denominator for share in exact.values()))
    for rows in (period, 7 * period):
        expected = {name: rows * share for name, share in exact.items()}
        assert endless(weights).rows_read(rows) == expected


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.text("abcdef", min_size=1, max_size=3),
        st.floats(1e-6, 1e6),
        min_size=1,
        max_size=12,
    ),
    st.integers(0, 10**12),
)
def test_any_weights_are_kept_at_any_row(weights: Weights, rows: int) -> None:
    """The worst that Huffman's tree could do is weights like Fibonacci's numbers: 3.4 rows."""
    order = endless(weights)
    read, after = order.rows_read(rows), order.rows_read(rows + 1)
    assert sum(read.values()) == rows
    for name, share in shares(weights).items():
        assert abs(read[name] - rows * share) < 3.4
    assert after == read | {order[rows].source: read[order[rows].source] + 1}


def test_epochs_are_what_is_read() -> None:
    """Every row once of sources of 100 and of 900, where blocks of shares read 9 of them twice."""
    rows = {"codes": 100, "papers": 900}
    order = RowOrder(1, rows, {name: float(number) for name, number in rows.items()})
    assert order.rows_read(1000) == rows
    assert len({(order[number].source, order[number].row) for number in range(1000)}) == 1000


@pytest.mark.parametrize("seed", range(5))
def test_a_tiny_source_is_read_as_often_as_is_asked(seed: int) -> None:
    """Thirty rows three times beside a million, evenly over all of them."""
    rows = {"codes": 30, "papers": 1_000_000}
    order = RowOrder(seed, rows, {"codes": 90, "papers": 1_000_000})
    total = 1_000_090
    assert order.rows_read(total) == {"codes": 90, "papers": 1_000_000}
    for tenth in range(11):
        assert abs(order.rows_read(total * tenth // 10)["codes"] - 9 * tenth) <= 1


def test_a_source_without_weight_is_not_read() -> None:
    order = RowOrder(1, ROWS, {"codes": 0, "notes": 1, "papers": 1})
    assert set(sources(order, 100)) == {"notes", "papers"}
    assert order.rows_read(100) == {"notes": 50, "papers": 50}


def test_weights_mean_their_proportions_whatever_their_scale_or_order() -> None:
    order = endless(WEIGHTS)
    assert order.weights == {"codes": 1, "notes": 50, "papers": 49}
    same = RowOrder(1, order.rows, {"papers": 98, "notes": 100, "codes": Fraction(2)})
    assert same.identity == order.identity
    assert sources(same, 500) == sources(order, 500)


def test_every_row_comes_once_an_epoch_before_any_comes_again() -> None:
    order = RowOrder(1, ROWS, WEIGHTS)
    seen: dict[str, list[tuple[int, int]]] = {name: [] for name in ROWS}
    for number in range(30_000):
        at = order[number]
        seen[at.source].append((at.epoch, at.row))
    for name, addresses in seen.items():
        assert [epoch for epoch, _ in addresses] == [i // ROWS[name] for i in range(len(addresses))]
        for epoch in range(len(addresses) // ROWS[name]):
            rows = [row for of, row in addresses if of == epoch]
            assert sorted(rows) == list(range(ROWS[name]))
    first, second = ([row for of, row in seen["notes"] if of == epoch] for epoch in (0, 1))
    assert first != second
    assert first != sorted(first)


def test_an_order_is_a_function_of_seed_and_row_alone() -> None:
    """So a run may be taken up at any row, on however many ranks."""
    forwards = [RowOrder(5, ROWS, WEIGHTS)[number] for number in range(2000)]
    for first in (1, 17, 999, 1998):
        taken_up = RowOrder(5, ROWS, WEIGHTS)
        assert [taken_up[number] for number in range(first, 2000)] == forwards[first:]
    backwards = RowOrder(5, ROWS, WEIGHTS)
    assert [backwards[number] for number in reversed(range(2000))] == forwards[::-1]
    assert backwards[10**15] == RowOrder(5, ROWS, WEIGHTS)[10**15]
    assert [RowOrder(6, ROWS, WEIGHTS)[number] for number in range(20)] != forwards[:20]


@given(st.integers(0, 50_000))
def test_rows_read_are_counted(rows: int) -> None:
    order = RowOrder(1, ROWS, WEIGHTS)
    assert sum(order.rows_read(rows).values()) == rows
    if rows:
        last = order[rows - 1]
        assert last.epoch == (order.rows_read(rows)[last.source] - 1) // ROWS[last.source]


def test_later_phases_read_on_where_earlier_ones_stopped() -> None:
    """Whatever the mixtures are, a source is read through before a row of it comes again."""
    first = RowOrder(1, ROWS, WEIGHTS)
    second = RowOrder(1, ROWS, {"notes": 0.9, "papers": 0.1}, first.rows_read(1000))
    read = Counter(first.rows_read(1000)) + Counter(second.rows_read(600))
    third = RowOrder(1, ROWS, {"papers": 1}, read)
    seen = [
        order[number]
        for order, rows in ((first, 1000), (second, 600), (third, 2800))
        for number in range(rows)
    ]
    assert 0 < first.rows_read(1000)["notes"] < ROWS["notes"] < read["notes"]
    for name in ("notes", "papers"):
        rows = [at.row for at in seen if at.source == name]
        assert len(rows) > ROWS[name]
        assert sorted(rows[: ROWS[name]]) == list(range(ROWS[name]))
        epochs = [at.epoch for at in seen if at.source == name]
        assert epochs == [i // ROWS[name] for i in range(len(rows))]


def places(weights: Weights, name: str, rows: int, seed: int = 1) -> np.ndarray:
    """Where rows of a source come among the first `rows`: (rows,) of 0 and 1."""
    return np.array([source == name for source in sources(endless(weights, seed), rows)], float)


@pytest.mark.parametrize("weights", MIXTURES[1:], ids=str)
def test_no_rank_gets_more_of_a_source_than_another(weights: Weights) -> None:
    """Of every k-th row as large a share is a source's, from whichever of k rows one begins."""
    exact = shares(weights)
    of = np.array(sources(endless(weights), 30_000))
    for every in (2, 3, 4, 5, 8, 10, 16):
        for first in range(every):
            for name, share in exact.items():
                mine = of[first::every] == name
                # Draws that were independent would be off by so much; these are never further.
                deviation = math.sqrt(share * (1 - share) / len(mine))
                assert abs(mine.mean() - float(share)) < 4.5 * deviation


def test_every_row_is_equally_likely_a_sources_over_seeds() -> None:
    """Also where a span begins and ends within a row."""
    weights = {"a": 0.37, "b": 0.63}
    seeds = 1500
    found = sum(places(weights, "a", 40, seed) for seed in range(seeds)) / seeds
    deviation = math.sqrt(0.37 * 0.63 / seeds)
    assert np.abs(found - 0.37).max() < 4.5 * deviation


@pytest.mark.parametrize("weights", MIXTURES[1:], ids=str)
def test_sources_do_not_clump_and_have_no_rhythm(weights: Weights) -> None:
    rows = 20_000
    of = np.array(sources(endless(weights), rows))
    for name, share in shares(weights).items():
        at = np.flatnonzero(of == name)
        # A row of a source is never further from the next than the spans of a few of its rows.
        assert np.diff(at).max() < 4 / share + 4
        if share < 0.5:
            stretches = [
                len(list(same)) for is_name, same in itertools.groupby(of == name) if is_name
            ]
            assert max(stretches) <= 4
        signal = (of == name) - float(share)
        # Rows further apart than a few spans know nothing of each other.
        for lag in range(math.ceil(6 / share), math.ceil(6 / share) + 60):
            if lag < rows // 10:
                together = float(np.dot(signal[lag:], signal[:-lag])) / (rows - lag)
                bound = 5 * float(share * (1 - share)) / math.sqrt(rows - lag)
                assert abs(together) < bound, f"{name} at a distance of {lag}"
