"""Learning rate and length of a run, as functions of token slots.

A slot is a place for one token, padding included: a step of B rows takes B × row_tokens slots. A
schedule in slots depends on one counter and on no data, and it keeps its meaning when the batch
size changes within a run. Real tokens are what throughput and reports count.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from train.config import Schedule


@dataclass(frozen=True)
class Progress:
    """Where a run is: everything that a checkpoint needs beside weights and optimizer."""

    step: int = 0
    next_row: int = 0
    slots: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step before it is taken."""

    step: int
    first_row: int
    rows: int
    slots: int
    """slots taken once the step is"""
    lr: float
    mask_rate: float
    is_last: bool


def lr_factor(schedule: Schedule, slots: float) -> float:
    """The share of the peak learning rate at `slots`: warm-up, stable, 1-sqrt decay.

    Linear from 0 over `warmup_tokens`; 1; over the last `decay_tokens` 1 - sqrt(x), x being the
    share of the decay that has passed (Hägele et al., "Scaling Laws and Compute-Optimal Training
    Beyond Fixed Training Durations", 2024, equation 1; ModernBERT decays so too).
    """
    if slots < schedule.warmup_tokens:
        return slots / schedule.warmup_tokens
    decay_start = schedule.total_tokens - schedule.decay_tokens
    if slots <= decay_start:
        return 1.0
    return max(0.0, 1.0 - math.sqrt((slots - decay_start) / schedule.decay_tokens))


def last_step(schedule: Schedule, slots_per_step: int, start: Progress) -> int:
    """The number of the step that reaches `total_tokens`, counted on from `start`.

    Steps before `start` may have had another size.
    """
    return start.step + math.ceil(max(0, schedule.total_tokens - start.slots) / slots_per_step)


def plan_steps(
    schedule: Schedule,
    peak_lr: float,
    mask_rate: float,
    rows_per_step: int,
    row_tokens: int,
    start: Progress,
) -> Iterator[StepPlan]:
    """Every step from `start` to the end of the run, in order: a pure function of its arguments.

    A step is taken at the learning rate of its middle slot (of its part up to `total_tokens`), so
    that neither the first step of a warm-up nor the last one of a decay is taken at a rate of 0.
    """
    slots_per_step = rows_per_step * row_tokens
    progress = start
    while progress.slots < schedule.total_tokens:
        end = min(progress.slots + slots_per_step, schedule.total_tokens)
        yield StepPlan(
            step=progress.step + 1,
            first_row=progress.next_row,
            rows=rows_per_step,
            slots=progress.slots + slots_per_step,
            lr=peak_lr * lr_factor(schedule, (progress.slots + end) / 2),
            mask_rate=mask_rate,
            is_last=end == schedule.total_tokens,
        )
        progress = Progress(
            step=progress.step + 1,
            next_row=progress.next_row + rows_per_step,
            slots=progress.slots + slots_per_step,
        )
