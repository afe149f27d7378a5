"""Times steps of a run exactly as `train.loop` takes them: its loader, `accumulate` and `step`.

A step is timed from its beginning to the next one's: on a GPU by events in the stream, so that the
host runs ahead as it does in training, otherwise by the host's clock. Steps whose norms are logged
wait for the device; none of the timed ones is. How many there are is agreed between the ranks
before the first, by how long steps took that warmed up.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from common.config import ConfigError
from train.benchmark import interruptions
from train.benchmark.device import Clock, Memory, warm_up
from train.benchmark.interruptions import Counts
from train.benchmark.parts import Breakdown, profile_steps
from train.engine import Engine, start_engine, step
from train.flops import training_flops
from train.interval import Interval, peak_of
from train.loader import LoadedStep, Loader, StepCounts, StepMaker
from train.loop import accumulate, make_ready
from train.ranks import Ranks, gather
from train.resolve import Run, RunPhase
from train.schedule import Progress, StepPlan

WARM_UP = 5
"""steps of a round that warms up: compilation, allocations, the loader's start"""
LEAD = 2
"""steps right before the first that is timed, so that the host is ahead of the device by then"""

StartEngine = Callable[[nn.Module, Run], Engine]


@dataclass(frozen=True)
class Effort:
    """How much is measured: at least so many steps, and as many more as take so many seconds.

    steps, seconds: timed ones; warm_up_s: before them, beside the first round; parts_s: of those
    that the profiler records, 0 for none. On a GPU a step takes longer when it has been busy for a
    second or two than at first, and what happens now and then (another number of documents, a
    kernel that is loaded when it is first called) must have happened before.
    """

    steps: int
    seconds: float = 0.0
    warm_up_s: float = 0.0
    parts_s: float = 0.0

    def timed(self, step_s: float) -> int:
        """How many steps are timed, where one takes `step_s`."""
        return max(self.steps, math.ceil(self.seconds / step_s))


def usual_effort(steps: int, on_gpu: bool) -> Effort:
    """Seconds on a GPU; on a CPU, whose speed nobody asks for, steps alone."""
    return Effort(steps, seconds=8, warm_up_s=5, parts_s=1) if on_gpu else Effort(steps)


@dataclass(frozen=True)
class Measurement:
    """Steps that were timed, one after another.

    seconds: of each, on the slowest rank; elapsed: of all together, on the rank that took longest;
    tokens, flops: real tokens and model FLOPs of each, over all ranks. memory_gib: peak of what
    tensors took, on the rank with most; None on a CPU. data_wait_share: share of the time in which
    the host waited for a batch, on the worst rank; None where no loader is at work. breakdown:
    where the time of other steps went; None where no profiler saw them. interruptions: what
    happened while steps were timed, most on one rank.
    """

    seconds: list[float]
    elapsed: float
    tokens: list[int]
    flops: list[float]
    memory_gib: float | None
    data_wait_share: float | None
    breakdown: Breakdown | None
    interruptions: Counts
    note: str

    def speeds(self, ranks: int) -> list[float]:
        """Real tokens a second and rank, of each step."""
        return [n / s / ranks for n, s in zip(self.tokens, self.seconds, strict=True)]

    def speed(self, ranks: int) -> float:
        """Real tokens a second and rank, of all steps together."""
        return sum(self.tokens) / self.elapsed / ranks

    def flop_rate(self, ranks: int) -> float:
        """Model FLOPs a second and rank, of all steps together."""
        return sum(self.flops) / self.elapsed / ranks


def with_engine(model: nn.Module, run: Run) -> Engine:
    """DeepSpeed's engine, as training starts it."""
    return start_engine(model, run.config, run.deepspeed)


def measure(
    run: Run, ranks: Ranks, device: torch.device, start: StartEngine, effort: Effort
) -> Measurement:
    """Warm up, time steps of `run`, then take some more apart. Every rank calls this."""
    memory = Memory(device)
    model, attention = make_ready(run, device)
    engine = start(model, run)
    phase, maker = run.phases["main"], StepMaker(run, ranks.rank)

    try:
        with Loader(maker, run.plans(Progress()), pin=device.type == "cuda") as loader:
            interval = Interval(loader, device, peak_of(device, run.precision))
            interval.restart(phase)

            def take(loaded: LoadedStep) -> None:
                sums = accumulate(engine, interval.watch(loaded), ranks, device)
                step(engine, loaded.plan.rates, want_norms=False)
                interval.add(loaded, sums)

            steps = iter(loader)

            def take_some(number: int) -> None:
                for loaded in _exactly(number, steps):
                    take(loaded)

            a_round = warm_up(lambda: take_some(WARM_UP), device, 1, effort.warm_up_s)
            number = effort.timed(a_round / WARM_UP)
            take_some(LEAD)
            memory.restart()
            before = interruptions.read(device)
            timed = _time(loader, _exactly(number, steps), take, device)
            happened = interruptions.between(before, interruptions.read(device))
            peak = memory.peak_gib()
            elapsed = max(gather(sum(timed.seconds)))
            breakdown = None
            if effort.parts_s:
                of_steps = max(2, math.ceil(effort.parts_s * number / elapsed))
                breakdown = profile_steps(engine, lambda: take_some(1), of_steps)
    finally:
        engine.destroy()
    return Measurement(
        # A step takes as long as its slowest rank.
        seconds=[max(times) for times in zip(*gather(timed.seconds), strict=True)],
        elapsed=elapsed,
        tokens=[counts.tokens for _, counts in timed.steps],
        flops=[
            training_flops(phase.model_config, document_lengths(phase, plan), counts.masked_tokens)
            for plan, counts in timed.steps
        ],
        memory_gib=None if peak is None else max(gather(peak)),
        data_wait_share=max(gather(timed.waited)),
        breakdown=breakdown,
        interruptions=interruptions.most(gather(happened)),
        note=f"attention {attention}",
    )


def _exactly(number: int, steps: Iterator[LoadedStep]) -> Iterator[LoadedStep]:
    """So many steps; ConfigError where the run ends before."""
    for taken in range(number):
        loaded = next(steps, None)
        if loaded is None:
            raise ConfigError(
                f"the run ends {number - taken} steps too early to be measured; leave "
                "phases.main.tokens to the case"
            )
        yield loaded


@dataclass(frozen=True)
class _Timed:
    """Steps that were timed on this rank: what they were, the seconds of each, and the share of
    the time that the host waited for the loader."""

    steps: list[tuple[StepPlan, StepCounts]]
    seconds: list[float]
    waited: float


def _time(
    loader: Loader,
    steps: Iterator[LoadedStep],
    take: Callable[[LoadedStep], None],
    device: torch.device,
) -> _Timed:
    """Take steps by the clock; the device is waited for after the last."""
    clock, taken = Clock(device), []
    begin, waited = time.perf_counter(), loader.wait_seconds
    for loaded in steps:
        clock.mark()
        take(loaded)
        taken.append((loaded.plan, loaded.counts))
    clock.mark()
    seconds = clock.seconds()
    share = (loader.wait_seconds - waited) / (time.perf_counter() - begin)
    return _Timed(taken, seconds, share)


def document_lengths(phase: RunPhase, plan: StepPlan) -> NDArray[np.int64]:
    """Lengths of all documents of a step, over all ranks, in the order of its rows."""
    lengths = []
    for number in range(plan.rows):
        at = phase.order[plan.first_row + number]
        row = phase.data.read("train", at.source, at.row)
        lengths.append(np.diff(row.cu_seqlens[: len(row.documents) + 1]))
    return np.concatenate(lengths).astype(np.int64)
