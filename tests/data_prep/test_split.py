"""The split: by group, near the wanted share, and stable."""

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.split import (
    SPLITS,
    TRAIN,
    VALIDATION,
    Split,
    cluster_pairs,
    group_key,
    link_groups,
    on_both_sides,
)


def split_of(group: str, share: float, seed: int) -> str:
    keys = np.array([group_key(group)], np.uint64)
    return VALIDATION if Split(share, seed).is_validation(keys)[0] else TRAIN


@given(
    groups=st.lists(st.text(max_size=8), max_size=40),
    share=st.floats(0, 0.999),
    seed=st.integers(0, 2**31),
)
def test_no_group_is_on_both_sides(groups: list[str], share: float, seed: int) -> None:
    sides: dict[str, set[str]] = {}
    for group in groups * 2:
        sides.setdefault(group, set()).add(split_of(group, share, seed))
    assert all(len(side) == 1 and side <= set(SPLITS) for side in sides.values())


@pytest.mark.parametrize("share", [0.0, 0.01, 0.03, 0.2, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_share_is_near_the_wanted_one(share: float, seed: int) -> None:
    number = 20_000
    held_out = sum(split_of(f"pubmed-{n}", share, seed) == VALIDATION for n in range(number))
    # Four standard deviations of a binomial share.
    assert abs(held_out / number - share) <= 4 * (share * (1 - share) / number) ** 0.5


@given(group=st.text(max_size=8), seed=st.integers(0, 2**31))
def test_a_larger_share_only_moves_groups_to_validation(group: str, seed: int) -> None:
    sides = [split_of(group, share, seed) for share in (0.0, 0.1, 0.3, 0.6, 0.9)]
    assert sides == sorted(sides)
    assert sides[0] == TRAIN


def test_another_seed_gives_another_split() -> None:
    groups = [f"subject-{n}" for n in range(1000)]
    assert [split_of(g, 0.5, 0) for g in groups] != [split_of(g, 0.5, 1) for g in groups]


KEYS = st.integers(0, 15)


@given(
    pairs=st.lists(st.tuples(KEYS, KEYS), max_size=20),
    most=st.integers(1, 6),
    share=st.floats(0, 0.9),
    seed=st.integers(0, 99),
)
def test_linked_groups_are_on_one_side_and_never_too_many(
    pairs: list[tuple[int, int]], most: int, share: float, seed: int
) -> None:
    links = link_groups(np.array(pairs, np.uint64).reshape(-1, 2), most)
    leads = dict(zip(links.keys.tolist(), links.leads.tolist(), strict=True))
    sets: dict[int, set[int]] = {}
    for key, lead in leads.items():
        sets.setdefault(lead, set()).add(key)
    assert set(leads) == {key for pair in pairs for key in pair}
    for lead, members in sets.items():
        assert len(members) <= most
        assert lead == min(members)
    # Who is linked is connected by pairs; when nothing is too large, all that is connected is.
    plain = {key: {key} for key in leads}
    for first, second in pairs:
        together = plain[first] | plain[second]
        plain.update(dict.fromkeys(together, together))
    assert all(members <= plain[lead] for lead, members in sets.items())
    if most >= max(map(len, plain.values()), default=0):
        assert all(members == plain[lead] for lead, members in sets.items())
    sides = Split(share, seed, links).is_validation(np.arange(16, dtype=np.uint64))
    for members in sets.values():
        assert len({bool(sides[member]) for member in members}) == 1
    # Groups without links go where they went.
    alone = [key for key in range(16) if key not in leads]
    unlinked = Split(share, seed).is_validation(np.arange(16, dtype=np.uint64))
    np.testing.assert_array_equal(sides[alone], unlinked[alone])


def test_pairs_tie_the_groups_of_a_cluster_together() -> None:
    clusters = np.array([5, 2, 5, 5, 2, 9])
    groups = np.array([1, 3, 1, 4, 7, 8], np.uint64)
    assert cluster_pairs(clusters, groups).tolist() == [[3, 7], [1, 4]]


def test_validation_gives_way_where_a_cluster_is_on_both_sides() -> None:
    clusters = np.array([1, 1, 2, 2, 3])
    is_validation = np.array([True, False, True, True, False])
    assert on_both_sides(clusters, is_validation).tolist() == [True, False, False, False, False]


def test_a_group_is_where_its_key_is() -> None:
    groups = [f"subject-{n}" for n in range(200)]
    keys = np.array([group_key(group) for group in groups], np.uint64)
    sides = Split(0.3, 1).is_validation(keys)
    assert [split_of(g, 0.3, 1) == VALIDATION for g in groups] == sides.tolist()


CLUSTERED = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 19)), max_size=40)


def sides_of(
    documents: list[tuple[int, int]], most: int, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which (cluster, group) documents are for validation, and which of these are left out."""
    clusters = np.array([cluster for cluster, _ in documents], np.int64)
    groups = np.array([group_key(f"subject-{group}") for _, group in documents], np.uint64)
    pairs = cluster_pairs(clusters, groups)
    links = link_groups(pairs, most)
    is_validation = Split(share, seed, links).is_validation(groups)
    return is_validation, on_both_sides(clusters, is_validation)


@given(CLUSTERED, st.integers(1, 25), st.floats(0, 0.9), st.integers(0, 99))
def test_no_cluster_and_no_group_is_on_both_sides(
    documents: list[tuple[int, int]], most: int, share: float, seed: int
) -> None:
    """However few groups may be linked: validation gives way."""
    is_validation, left_out = sides_of(documents, most, share, seed)
    assert not (left_out & ~is_validation).any()
    sides: dict[tuple[str, int], set[bool]] = {}
    for (cluster, group), side, gone in zip(documents, is_validation, left_out, strict=True):
        sides.setdefault(("group", group), set()).add(bool(side))
        if not gone:
            sides.setdefault(("cluster", cluster), set()).add(bool(side))
    assert all(len(side) == 1 for side in sides.values())
    if most >= 20:
        # All groups could be one, so nothing has to go.
        assert not left_out.any()


@given(CLUSTERED, st.floats(0, 0.9), st.integers(0, 99), st.randoms())
def test_the_order_of_documents_and_clusters_changes_no_side(
    documents: list[tuple[int, int]], share: float, seed: int, random: Random
) -> None:
    """Nor do the clusters' names: with files in another order other documents are the first."""
    order, names = list(range(len(documents))), list(range(10))
    random.shuffle(order)
    random.shuffle(names)
    shuffled = [(names[documents[place][0]], documents[place][1]) for place in order]
    first, _ = sides_of(documents, 20, share, seed)
    second, _ = sides_of(shuffled, 20, share, seed)
    assert first[order].tolist() == second.tolist()
