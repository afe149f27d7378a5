"""The order of rows: quotas are kept, every row comes once an epoch, ranks do not matter."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.row_order import BLOCK, RowOrder, quotas

ROWS = {"codes": 7, "notes": 900, "papers": 3000}
WEIGHTS = {"codes": 0.01, "notes": 0.5, "papers": 0.49}


@given(
    st.dictionaries(
        st.text("abcdef", min_size=1, max_size=3),
        st.floats(1e-6, 1e6),
        min_size=1,
        max_size=12,
    )
)
def test_quotas_fill_a_block_and_follow_the_weights(weights: dict[str, float]) -> None:
    found = quotas(weights)
    total = sum(weights.values())
    assert sum(found.values()) == BLOCK
    assert found.keys() == weights.keys()
    for name, quota in found.items():
        assert quota >= 1, "no source vanishes"
        # A row to each source that would vanish comes off the largest ones.
        assert abs(quota - BLOCK * weights[name] / total) <= len(weights)


def test_quotas_do_not_depend_on_the_order_of_the_sources() -> None:
    assert quotas(WEIGHTS) == quotas(dict(reversed(WEIGHTS.items())))


@pytest.mark.parametrize("block", [0, 3])
def test_every_block_holds_exactly_the_quotas(block: int) -> None:
    order = RowOrder(1, ROWS, WEIGHTS)
    first = block * BLOCK
    counted = Counter(order[row].source for row in range(first, first + BLOCK))
    assert counted == quotas(WEIGHTS)


def test_every_row_comes_once_an_epoch_before_any_comes_again() -> None:
    order = RowOrder(1, ROWS, WEIGHTS)
    seen: dict[str, list[tuple[int, int]]] = {name: [] for name in ROWS}
    for number in range(2 * BLOCK):
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
    forwards, backwards = RowOrder(5, ROWS, WEIGHTS), RowOrder(5, ROWS, WEIGHTS)
    numbers = [0, 40_000, 17, BLOCK - 1, BLOCK, 3 * BLOCK + 5]
    expected = {number: forwards[number] for number in numbers}
    assert {number: backwards[number] for number in reversed(numbers)} == expected
    other = RowOrder(6, ROWS, WEIGHTS)
    assert [other[n] for n in range(20)] != [forwards[n] for n in range(20)]


@settings(max_examples=20)
@given(st.integers(0, 3 * BLOCK))
def test_rows_read_are_counted(rows: int) -> None:
    order = RowOrder(1, ROWS, WEIGHTS)
    assert sum(order.rows_read(rows).values()) == rows
    if rows:
        last = order[rows - 1]
        assert last.epoch == (order.rows_read(rows)[last.source] - 1) // ROWS[last.source]


def test_a_later_phase_reads_on_where_an_earlier_one_stopped() -> None:
    """Whatever the two mixtures are, a source is read through before a row of it comes again."""
    first = RowOrder(1, ROWS, WEIGHTS)
    second = RowOrder(1, ROWS, {"notes": 0.9, "papers": 0.1}, first.rows_read(1000))
    seen = [first[number] for number in range(1000)] + [second[number] for number in range(600)]
    notes = [at.row for at in seen if at.source == "notes"]
    assert 0 < first.rows_read(1000)["notes"] < ROWS["notes"] < len(notes)
    assert sorted(notes[: ROWS["notes"]]) == list(range(ROWS["notes"]))
    assert [at.epoch for at in seen if at.source == "notes"] == [
        i // 900 for i in range(len(notes))
    ]
    papers = [at.row for at in seen if at.source == "papers"]
    assert len(set(papers)) == len(papers)
