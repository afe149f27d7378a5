"""The schedules against their formulas, and the plan of steps from any point on."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.phase_config import Batch, BatchWarmup, LearningRate, Masking
from train.schedule import (
    PhaseSchedule,
    Progress,
    batch_sizes,
    last_slot,
    last_step,
    lr_factor,
    mask_rate,
    plan_steps,
    stretches,
)

WARM = LearningRate(peak=2.0, warmup_tokens=100, decay="sqrt", decay_tokens=400)
PHASE = PhaseSchedule("one", 1000, 50, Batch(rows=3, micro_rows=1), WARM, Masking(rate=0.3), 1e-5)


def read(phase: str, rows: int, step: int) -> Progress:
    return Progress(step=step, rows={phase: {"notes": rows}}, tokens={phase: {"notes": 45 * rows}})


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
        (1100, 0.0),
    ],
)
def test_warm_up_stable_and_1_sqrt_decay(slots: int, expected: float) -> None:
    assert lr_factor(WARM, slots, 1000) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("decay", "middle"),
    [("sqrt", 1 - math.sqrt(0.5)), ("cosine", 0.5), ("linear", 0.5)],
)
@pytest.mark.parametrize("final", [0.0, 0.001, 0.25])
def test_decays_begin_at_the_peak_and_end_at_the_final_share(
    decay: str, middle: float, final: float
) -> None:
    lr = LearningRate(warmup_tokens=200, decay=decay, decay_tokens=400, final_share=final)
    assert lr_factor(lr, 600, 1000) == 1.0
    assert lr_factor(lr, 800, 1000) == pytest.approx(final + (1 - final) * middle, rel=1e-15)
    assert lr_factor(lr, 1000, 1000) == pytest.approx(final, abs=1e-15)


def test_a_cosine_follows_its_formula_from_the_end_of_the_warm_up() -> None:
    """Against torch's scheduler, an independent implementation of the same formula."""
    from torch import nn
    from torch.optim import SGD
    from torch.optim.lr_scheduler import CosineAnnealingLR

    optimizer = SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    theirs = CosineAnnealingLR(optimizer, T_max=900, eta_min=0.1)
    lr = LearningRate(warmup_tokens=100, decay="cosine", final_share=0.1)
    for slots in range(100, 1001):
        assert lr_factor(lr, slots, 1000) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_without_ramps_the_rate_is_constant() -> None:
    assert [lr_factor(LearningRate(), slots, 1000) for slots in (0, 500, 1000)] == [1, 1, 1]


def test_the_masking_rate_goes_linearly_to_its_end_or_stays() -> None:
    falling = Masking(rate=0.3, final_rate=0.15)
    assert mask_rate(falling, 0, 1000) == 0.3
    assert mask_rate(falling, 400, 1000) == pytest.approx(0.24, rel=1e-15)
    assert mask_rate(falling, 1000, 1000) == 0.15
    assert mask_rate(falling, 1100, 1000) == 0.15
    assert [mask_rate(Masking(rate=0.3), slots, 1000) for slots in (0, 1000)] == [0.3, 0.3]
    assert falling.highest_rate == 0.3
    assert Masking(rate=0.1, final_rate=0.2).highest_rate == 0.2


def test_every_size_of_a_batch_warm_up_has_as_many_steps() -> None:
    """ModernBERT-base: 768 to 4608 sequences of 1024 over 50 billion tokens."""
    warmup = BatchWarmup(rows=96, increment=96, tokens=50_000_000_000)
    batch = Batch(rows=576, micro_rows=12, warmup=warmup)
    sizes = list(batch_sizes(batch, 1_719_000_000_000))
    assert [rows for rows, _ in sizes] == [96, 192, 288, 384, 480, 576]
    ends = [end for _, end in sizes]
    assert ends[4:] == [50_000_000_000, 1_719_000_000_000]
    # Σ b of the five sizes is 15 times the first.
    assert ends[0] == 50_000_000_000 // 15
    phase = PhaseSchedule("short", 1_719_000_000_000, 8192, batch, LearningRate(), Masking(), 0.0)
    growing = [steps for _, steps in stretches(phase, 0)][:-1]
    assert max(growing) - min(growing) <= 2


WARMED = replace(
    PHASE,
    batch=Batch(rows=9, micro_rows=1, warmup=BatchWarmup(rows=3, increment=3, tokens=450)),
)


def test_a_step_has_the_size_of_the_slot_it_begins_at() -> None:
    """Sizes 3 and 6 up to 150 and 450 slots, steps of 150, 300 and 450 slots."""
    plans = list(plan_steps([WARMED], Progress()))
    assert [plan.rows for plan in plans] == [3, 6, 9, 9]
    assert [plan.first_row for plan in plans] == [0, 3, 9, 18]
    assert [plan.slots for plan in plans] == [150, 450, 900, 1350]
    assert WARMED.rows() == 27


def test_plan_counts_steps_rows_and_slots() -> None:
    plans = list(plan_steps([PHASE], Progress()))
    assert len(plans) == last_step([PHASE], Progress()) == 7
    assert [plan.ends_phase for plan in plans] == [False] * 6 + [True]
    assert [plan.step for plan in plans] == list(range(1, 8))
    assert [plan.first_row for plan in plans] == [0, 3, 6, 9, 12, 15, 18]
    assert [plan.slots for plan in plans] == [150 * step for step in range(1, 8)]
    assert plans[0].rates.lr == 2.0 * 0.75, "the rate of the middle slot"
    assert all(plan.rates.lr > 0 for plan in plans)
    assert all(plan.mask_rate == 0.3 for plan in plans)
    assert PHASE.rows() == 21


OTHER = PhaseSchedule(
    "two",
    800,
    100,
    Batch(rows=2, micro_rows=1),
    LearningRate(peak=0.5, decay="linear"),
    Masking(rate=0.3, final_rate=0.1),
    1e-6,
)


def test_phases_follow_each_other_and_each_counts_from_its_own_start() -> None:
    plans = list(plan_steps([WARMED, OTHER], Progress()))
    assert [plan.phase for plan in plans] == ["one"] * 4 + ["two"] * 4
    assert [plan.step for plan in plans] == list(range(1, 9))
    assert [plan.ends_phase for plan in plans] == [False] * 3 + [True] + [False] * 3 + [True]
    second = plans[4:]
    assert [plan.first_row for plan in second] == [0, 2, 4, 6]
    assert [plan.slots for plan in second] == [1550, 1750, 1950, 2150]
    assert [plan.rates.lr for plan in second] == pytest.approx(
        [0.5 * f for f in (7 / 8, 5 / 8, 3 / 8, 1 / 8)]
    )
    assert {(plan.rates.peak, plan.rates.weight_decay) for plan in second} == {(0.5, 1e-6)}
    assert [plan.mask_rate for plan in second] == pytest.approx([0.275, 0.225, 0.175, 0.125])


@given(st.integers(0, 8))
def test_a_plan_from_anywhere_is_the_rest_of_the_whole_plan(steps: int) -> None:
    phases = [WARMED, OTHER]
    plans = list(plan_steps(phases, Progress()))
    progress = Progress()
    for plan in plans[:steps]:
        rows = {"notes": plan.rows - 1, "papers": 1}
        progress = progress.after(plan, rows, {"notes": 10 * plan.rows})
    assert list(plan_steps(phases, progress)) == plans[steps:]
    assert last_step(phases, progress) == len(plans)
    assert last_slot(phases, progress) == plans[-1].slots
    assert progress.step == steps
    assert progress.rows_of("one") == min(27, sum(plan.rows for plan in plans[:steps]))
    assert progress.all_tokens == 10 * sum(plan.rows for plan in plans[:steps])
    assert progress.tokens_by_source.get("papers", 0) == 0


def test_nothing_is_left_of_a_complete_run() -> None:
    done = read("one", rows=21, step=7)
    assert list(itertools.islice(plan_steps([PHASE], done), 1)) == []


def test_a_run_that_continues_with_larger_steps_ends_where_it_should() -> None:
    """Steps of 150 slots up to 600, of 250 from there."""
    middle = read("one", rows=12, step=4)
    larger = replace(PHASE, batch=Batch(rows=5, micro_rows=1))
    plans = list(plan_steps([larger], middle))
    assert [plan.step for plan in plans] == [5, 6]
    assert plans[-1].ends_phase
    assert last_step([larger], middle) == 6
    assert last_slot([larger], middle) == list(plan_steps([larger], middle))[-1].slots


def test_a_phase_that_is_made_longer_once_it_is_over_is_not_taken_up_again() -> None:
    longer = replace(PHASE, tokens=5000)
    progress = Progress(step=9, rows={"one": {"notes": 21}, "two": {"notes": 4}})
    assert {plan.phase for plan in plan_steps([longer, OTHER], progress)} == {"two"}
