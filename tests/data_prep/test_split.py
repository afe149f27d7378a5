"""The split: by group, near the wanted share, and stable."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.split import SPLITS, TRAIN, VALIDATION, split_of


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
