"""Clusters: who stays, templates, and that nothing is dropped without what it is dropped for."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_prep.clusters import (
    COPY,
    EXACT,
    KEPT,
    NEAR,
    Clustered,
    Similar,
    Templates,
    cluster,
    drop_near,
)
from data_prep.components import first_of_component
from data_prep.dedup import LEFT_OUT

NEVER = Templates(groups=10**9, copies=1)


def decide(
    first_of: list[int], groups: list[int], edges: Similar, templates: Templates
) -> Clustered:
    """`cluster` for all documents, each with the first that says the same, that are in one."""
    first, here = np.array(first_of), np.arange(len(first_of))
    counts = first != LEFT_OUT
    exact = np.stack([here, first], axis=1)[counts & (first != here)]
    label = first_of_component(len(first), [exact, edges.pairs]).astype(np.int64)
    members = np.flatnonzero((label != here) | np.isin(here, label[label != here]))
    keys = np.array(groups, np.uint64)[members]
    return cluster(members, label[members], exact, keys, edges, templates)


def similar(*pairs: tuple[int, int, bool]) -> Similar:
    return Similar(
        np.array([pair[:2] for pair in pairs], np.int64).reshape(-1, 2),
        np.full(len(pairs), 0.9, np.float32),
        np.array([pair[2] for pair in pairs], np.bool_),
    )


@given(st.sets(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=40))
def test_greedy_from_the_longest_on(drawn: set[tuple[int, int]]) -> None:
    """Positions are their order: 0 is the longest."""
    pairs = sorted({(min(pair), max(pair)) for pair in drawn if pair[0] != pair[1]})
    dropped: dict[int, int] = {}
    for node in range(12):
        for first, second in pairs:
            if second == node and first not in dropped:
                dropped[node] = first
                break
    found = drop_near(similar(*((a, b, True) for a, b in pairs)))
    assert {second: first for first, second in found.pairs.tolist()} == dropped


def test_a_chain_keeps_what_no_kept_document_resembles() -> None:
    # 0 ~ 1 ~ 2, but 0 and 2 are not similar: dropping 2 for 1, which is gone, would lose it.
    found = drop_near(similar((0, 1, True), (1, 2, True)))
    assert found.pairs.tolist() == [[0, 1]]


def test_a_pair_that_differs_in_a_value_stays_but_is_a_cluster() -> None:
    edges = similar((2, 0, False), (3, 1, True))
    found = decide([0, 1, 2, 3], [7, 8, 9, 9], edges, NEVER)
    assert found.positions.tolist() == [0, 1, 2, 3]
    assert found.decisions.tolist() == [KEPT, NEAR, KEPT, KEPT]
    assert found.clusters.tolist() == [0, 1, 0, 1]
    assert found.duplicate_of.tolist() == [0, 3, 2, 3]
    assert found.groups.tolist() == [7, 8, 9, 9]


def test_a_copy_of_a_near_duplicate_is_dropped_for_what_stays() -> None:
    found = decide([0, LEFT_OUT, 2, 2], [0, 1, 2, 3], similar((0, 2, True)), NEVER)
    assert found.positions.tolist() == [0, 2, 3]
    assert found.decisions.tolist() == [KEPT, NEAR, EXACT]
    assert found.duplicate_of.tolist() == [0, 0, 0]
    assert set(found.clusters.tolist()) == {0}


def test_a_template_is_capped_at_one_copy_a_group_and_so_many_in_all() -> None:
    # Twelve copies in four groups; the original is in group 1.
    groups = [1, 1, 2, 2, 3, 3, 3, 4, 4, 1, 2, 3]

    def staying(templates: Templates) -> list[int]:
        found = decide([0] * 12, groups, similar(), templates)
        assert set(found.duplicate_of.tolist()) == {0}
        return found.positions[found.decisions <= COPY].tolist()

    assert staying(Templates(groups=4, copies=3)) == [0, 2, 4]
    assert staying(Templates(groups=4, copies=99)) == [0, 2, 4, 7]
    assert staying(Templates(groups=4, copies=1)) == [0]
    assert staying(Templates(groups=5, copies=3)) == [0]


@given(
    values=st.lists(st.integers(0, 5), min_size=1, max_size=20),
    drawn=st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans()), max_size=8),
    groups=st.integers(1, 4),
    copies=st.integers(1, 4),
)
def test_every_document_dropped_has_one_that_stays(
    values: list[int], drawn: set[tuple[int, int, bool]], groups: int, copies: int
) -> None:
    first: dict[int, int] = {}
    first_of = [first.setdefault(value, place) for place, value in enumerate(values)]
    pairs = {
        tuple(sorted((first[a], first[b]))): is_duplicate
        for a, b, is_duplicate in drawn
        if a != b and a in first and b in first
    }
    edges = similar(*((a, b, is_duplicate) for (a, b), is_duplicate in sorted(pairs.items())))
    keys = [place % 5 for place in range(len(values))]
    found = decide(first_of, keys, edges, Templates(groups, copies))
    stays = np.ones(len(values), np.bool_)
    stays[found.positions] = found.decisions <= COPY
    near = {(a, b) for (a, b), is_duplicate in pairs.items() if is_duplicate}
    for position, decision, of in zip(
        found.positions, found.decisions, found.duplicate_of, strict=True
    ):
        assert stays[of]
        if decision != KEPT:
            assert first_of[position] == of or (of, first_of[position]) in near
    for text in np.unique(found.duplicate_of):
        members = found.duplicate_of == text
        kept = members & (found.decisions <= COPY)
        assert 1 <= kept.sum() <= max(copies, 1)
        assert len(np.unique(found.groups[kept])) == kept.sum()
