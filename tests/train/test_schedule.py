"""The schedule against its formulas, and the plan of steps from any point on."""

import itertools
import math

import pytest

from train.config import Schedule
from train.schedule import Progress, last_step, lr_factor, plan_steps

SCHEDULE = Schedule(total_tokens=1000, warmup_tokens=100, decay_tokens=400)


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        (0, 0.0),
        (25, 0.25),
        (100, 1.0),
        (600, 1.0),
        (700, 1 - math.sqrt(0.25)),
        (900, 1 - math.sqrt(0.75)),
        (1000, 0.0),
    ],
)
def test_lr_factor(slots: int, expected: float) -> None:
    assert lr_factor(SCHEDULE, slots) == pytest.approx(expected)


def test_without_ramps_the_rate_is_constant() -> None:
    flat = Schedule(total_tokens=1000, warmup_tokens=0, decay_tokens=0)
    assert [lr_factor(flat, slots) for slots in (0, 500, 1000)] == [1, 1, 1]


def test_plan_counts_steps_rows_and_slots() -> None:
    plans = list(plan_steps(SCHEDULE, 2.0, 0.3, rows_per_step=3, row_tokens=50, start=Progress()))
    assert len(plans) == last_step(SCHEDULE, 150, Progress()) == 7
    assert [plan.is_last for plan in plans] == [False] * 6 + [True]
    assert [plan.step for plan in plans] == list(range(1, 8))
    assert [plan.first_row for plan in plans] == [0, 3, 6, 9, 12, 15, 18]
    assert [plan.slots for plan in plans] == [150 * step for step in range(1, 8)]
    assert plans[0].lr == 2.0 * 0.75, "the rate of the middle slot"
    assert all(plan.lr > 0 for plan in plans)
    assert all(plan.mask_rate == 0.3 for plan in plans)


def test_a_plan_from_the_middle_is_the_rest_of_the_whole_plan() -> None:
    plans = list(plan_steps(SCHEDULE, 2.0, 0.3, 3, 50, Progress()))
    middle = Progress(step=4, next_row=12, slots=600, tokens=555)
    assert list(plan_steps(SCHEDULE, 2.0, 0.3, 3, 50, middle)) == plans[4:]


def test_nothing_is_left_of_a_complete_run() -> None:
    done = Progress(step=7, next_row=21, slots=1050)
    assert list(itertools.islice(plan_steps(SCHEDULE, 2.0, 0.3, 3, 50, done), 1)) == []


def test_a_run_that_continues_with_larger_steps_ends_where_it_should() -> None:
    """Steps of 150 slots up to 600, of 250 from there."""
    middle = Progress(step=4, next_row=12, slots=600)
    plans = list(plan_steps(SCHEDULE, 2.0, 0.3, 5, 50, middle))
    assert [plan.step for plan in plans] == [5, 6]
    assert plans[-1].is_last
    assert last_step(SCHEDULE, 250, middle) == 6
