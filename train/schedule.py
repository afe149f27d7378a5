"""What each step of a run is: a pure function of counters, worked out before it is taken.

Lengths are token slots: a slot is a place for one token, padding included, and a step of B rows
takes B × row_tokens of them. A schedule in slots depends on one counter and on no data, and it
keeps its meaning when the batch size changes. Real tokens are what throughput and reports count.

Nothing here depends on the number of ranks: the rows of a step are those of all of them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from train.phase_config import Batch, LearningRate, Masking

BySource = dict[str, int]


@dataclass(frozen=True)
class Progress:
    """Where a run is: everything that a checkpoint needs beside weights and optimizer.

    rows, tokens: what has been read, of each source in each phase; real tokens, without padding.
    """

    step: int = 0
    rows: dict[str, BySource] = field(default_factory=dict)
    tokens: dict[str, BySource] = field(default_factory=dict)

    def rows_of(self, phase: str) -> int:
        """Rows read in a phase."""
        return sum(self.rows.get(phase, {}).values())

    def tokens_of(self, phase: str) -> int:
        """Real tokens read in a phase."""
        return sum(self.tokens.get(phase, {}).values())

    @property
    def tokens_by_source(self) -> BySource:
        """Real tokens read of each source in all phases."""
        total: BySource = {}
        for tokens in self.tokens.values():
            total = _add(total, tokens)
        return total

    @property
    def all_tokens(self) -> int:
        """Real tokens read in all phases."""
        return sum(self.tokens_of(phase) for phase in self.tokens)

    def after(self, plan: "StepPlan", rows: BySource, tokens: BySource) -> "Progress":
        """Progress once a step is taken that reads `rows` and `tokens` of each source."""
        return Progress(
            step=plan.step,
            rows={**self.rows, plan.phase: _add(self.rows.get(plan.phase, {}), rows)},
            tokens={**self.tokens, plan.phase: _add(self.tokens.get(plan.phase, {}), tokens)},
        )


@dataclass(frozen=True)
class Rates:
    """How far a step goes: its learning rate, the phase's peak, and the share of the weights that
    a step at the peak takes away."""

    lr: float
    peak: float
    weight_decay: float


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step before it is taken."""

    step: int
    phase: str
    first_row: int
    """of the phase's row order"""
    rows: int
    slots: int
    """slots of the whole run taken once the step is"""
    rates: Rates
    mask_rate: float
    ends_phase: bool


@dataclass(frozen=True)
class PhaseSchedule:
    """What determines the steps of a phase.

    tokens: its slots, rounded up to a whole step; row_tokens: slots of a row.
    """

    name: str
    tokens: int
    row_tokens: int
    batch: Batch
    lr: LearningRate
    masking: Masking
    weight_decay: float

    def rows(self) -> int:
        """Rows of the whole phase."""
        return sum(rows * steps for rows, steps in stretches(self, 0))


def lr_factor(lr: LearningRate, slots: float, tokens: int) -> float:
    """The share of the peak learning rate at `slots` of a phase of `tokens`.

    Linear from 0 over `warmup_tokens`; 1; over the last `decay_tokens`, x being the share of the
    decay that has passed and f the final share, f + (1 - f) · s(x) with s(x) =

    - sqrt: 1 - √x (Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
      Durations", 2024, equation 1; ModernBERT's OneMinusSqrtScheduler, with f = 0.001);
    - cosine: (1 + cos πx) / 2 (Loshchilov and Hutter, "SGDR", ICLR 2017, equation 5);
    - linear: 1 - x.
    """
    if slots < lr.warmup_tokens:
        return slots / lr.warmup_tokens
    if lr.decay == "none":
        return 1.0
    length = tokens - lr.warmup_tokens if lr.decay_tokens is None else lr.decay_tokens
    start = tokens - length
    if slots <= start:
        return 1.0
    x = min(1.0, (slots - start) / length)
    shape = {
        "sqrt": 1 - math.sqrt(x),
        "cosine": (1 + math.cos(math.pi * x)) / 2,
        "linear": 1 - x,
    }[lr.decay]
    return lr.final_share + (1 - lr.final_share) * shape


def mask_rate(masking: Masking, slots: float, tokens: int) -> float:
    """The masking rate at `slots` of a phase of `tokens`: linear from `rate` to `final_rate`."""
    if masking.final_rate is None:
        return masking.rate
    return masking.rate + (masking.final_rate - masking.rate) * min(1.0, slots / tokens)


def batch_sizes(batch: Batch, tokens: int) -> Iterator[tuple[int, int]]:
    """The sizes of a phase's steps in order: (rows, slots before which a step of them begins).

    With warm-up sizes b_0 < b_1 < …, size b_i ends at warmup.tokens · (b_0 + … + b_i) / Σ b, which
    gives every size equally many steps (ModernBERT's BatchSizeWarmupScheduler).
    """
    if batch.warmup is not None:
        sizes = range(batch.warmup.rows, batch.rows, batch.warmup.increment)
        passed = 0
        for rows in sizes:
            passed += rows
            yield rows, min(tokens, batch.warmup.tokens * passed // sum(sizes))
    yield batch.rows, tokens


def stretches(schedule: PhaseSchedule, slots: int) -> Iterator[tuple[int, int]]:
    """The rest of a phase from `slots` on, as runs of equal steps: (rows of a step, steps)."""
    for rows, end in batch_sizes(schedule.batch, schedule.tokens):
        steps = math.ceil(max(0, end - slots) / (rows * schedule.row_tokens))
        if steps:
            yield rows, steps
            slots += steps * rows * schedule.row_tokens


def last_step(phases: Sequence[PhaseSchedule], start: Progress) -> int:
    """The number of the run's last step, counted on from `start`.

    Steps before `start` may have had other sizes.
    """
    left = phases[current_phase(phases, start) :]
    return start.step + sum(
        steps
        for phase in left
        for _, steps in stretches(phase, start.rows_of(phase.name) * phase.row_tokens)
    )


def last_slot(phases: Sequence[PhaseSchedule], start: Progress) -> int:
    """The token slots of the run up to its last step, counted on from `start`."""
    begun = sum(start.rows_of(phase.name) * phase.row_tokens for phase in phases)
    left = phases[current_phase(phases, start) :]
    return begun + sum(
        rows * steps * phase.row_tokens
        for phase in left
        for rows, steps in stretches(phase, start.rows_of(phase.name) * phase.row_tokens)
    )


def plan_steps(phases: Sequence[PhaseSchedule], start: Progress) -> Iterator[StepPlan]:
    """Every step from `start` to the end of the run, in order: a pure function of its arguments.

    A step is taken at the learning rate and the masking rate of its middle slot (of its part up to
    the phase's `tokens`), so that neither the first step of a warm-up nor the last one of a decay
    is taken at a rate of 0.
    """
    step = start.step
    before = sum(start.rows_of(phase.name) * phase.row_tokens for phase in phases)
    for phase in phases[current_phase(phases, start) :]:
        row = start.rows_of(phase.name)
        for rows, steps in stretches(phase, row * phase.row_tokens):
            for _ in range(steps):
                begin, end = row * phase.row_tokens, (row + rows) * phase.row_tokens
                middle = (begin + min(end, phase.tokens)) / 2
                step += 1
                before += end - begin
                yield StepPlan(
                    step=step,
                    phase=phase.name,
                    first_row=row,
                    rows=rows,
                    slots=before,
                    rates=Rates(
                        lr=phase.lr.peak * lr_factor(phase.lr, middle, phase.tokens),
                        peak=phase.lr.peak,
                        weight_decay=phase.weight_decay,
                    ),
                    mask_rate=mask_rate(phase.masking, middle, phase.tokens),
                    ends_phase=end >= phase.tokens,
                )
                row += rows


def current_phase(phases: Sequence[PhaseSchedule], progress: Progress) -> int:
    """The number of the last phase that has begun, or 0."""
    begun = [number for number, phase in enumerate(phases) if progress.rows_of(phase.name)]
    return begun[-1] if begun else 0


def _add(one: Mapping[str, int], other: Mapping[str, int]) -> BySource:
    return {name: one.get(name, 0) + other.get(name, 0) for name in sorted({*one, *other})}
