"""Times steps of a run exactly as `train.loop` takes them: its loader, `accumulate` and `step`.

A step is timed from its beginning to the next one's: on a GPU by events in the stream, so that the
host runs ahead as it does in training, otherwise by the host's clock. Steps whose norms are logged
wait for the device; none of the timed ones is.
"""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from train.benchmark.parts import Parts, profile_step
from train.engine import Engine, start_engine, step
from train.flops import training_flops
from train.interval import Interval, peak_of
from train.loader import LoadedStep, Loader, StepMaker
from train.loop import accumulate, make_ready
from train.ranks import Ranks, gather
from train.resolve import Run, RunPhase
from train.schedule import Progress, StepPlan

WARM_UP = 5
"""steps before the first that is timed: compilation, allocations, clocks, the loader's start"""
_PRODUCT = 8192

StartEngine = Callable[[nn.Module, Run], Engine]


@dataclass(frozen=True)
class Measurement:
    """Steps that were timed, one after another.

    seconds: of each, on the slowest rank; elapsed: of all together, on the rank that took longest;
    tokens, flops: real tokens and model FLOPs of each, over all ranks. memory_gib: peak of what
    tensors took, on the rank with most; None on a CPU. data_wait_share: share of the time in which
    the host waited for a batch, on the worst rank; None where no loader is at work. parts:
    milliseconds of one step by what they go into.
    """

    seconds: list[float]
    elapsed: float
    tokens: list[int]
    flops: list[float]
    memory_gib: float | None
    data_wait_share: float | None
    parts: Parts | None
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


class Clock:
    """Marks moments in the work handed to a device; the seconds between them, once it is done."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """This moment, without waiting for the device."""
        if not self._on_gpu:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """From each mark to the next; waits for the last."""
        pairs = itertools.pairwise(self._marks)
        if not self._on_gpu:
            return [end - start for start, end in pairs]
        self._marks[-1].synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in pairs]


class Memory:
    """Peak of the memory that tensors take, beside what was there before."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        free_memory(device)
        self._before = torch.cuda.memory_allocated() if self._on_gpu else 0

    def restart(self) -> None:
        """Forget the peak so far."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        """GiB; None on a CPU."""
        if not self._on_gpu:
            return None
        return float((torch.cuda.max_memory_allocated() - self._before) / 2**30)


def with_engine(model: nn.Module, run: Run) -> Engine:
    """DeepSpeed's engine, as training starts it."""
    return start_engine(model, run.config, run.deepspeed)


def measure(
    run: Run, ranks: Ranks, device: torch.device, start: StartEngine, repeats: int
) -> Measurement:
    """Time `repeats` steps of `run`; on a GPU one more is taken apart. Every rank calls this."""
    memory = Memory(device)
    model, attention = make_ready(run, device)
    engine = start(model, run)
    on_gpu, phase = device.type == "cuda", run.phases["main"]
    plans = list(itertools.islice(run.plans(Progress()), WARM_UP + repeats + on_gpu))
    timed = plans[WARM_UP : WARM_UP + repeats]

    try:
        with Loader(StepMaker(run, ranks.rank), plans, on_gpu) as loader:
            interval = Interval(loader, device, peak_of(device, run.precision))
            interval.restart(phase)

            def take(loaded: LoadedStep) -> None:
                sums = accumulate(engine, interval.watch(loaded), ranks, device)
                step(engine, loaded.plan.rates, want_norms=False)
                interval.add(loaded, sums)

            steps = iter(loader)
            for loaded in itertools.islice(steps, WARM_UP):
                take(loaded)
            memory.restart()
            seconds, waited = _time(loader, itertools.islice(steps, repeats), take, device)
            peak = memory.peak_gib()
            parts = None
            for loaded in steps:
                parts = take_apart(engine, loaded, take, device)
    finally:
        engine.destroy()
    counts = [StepMaker(run, ranks.rank).counts(plan) for plan in timed]
    return Measurement(
        # A step takes as long as its slowest rank.
        seconds=[max(times) for times in zip(*gather(seconds), strict=True)],
        elapsed=max(gather(sum(seconds))),
        tokens=[one.tokens for one in counts],
        flops=[
            training_flops(phase.model_config, document_lengths(phase, plan), one.masked_tokens)
            for plan, one in zip(timed, counts, strict=True)
        ],
        memory_gib=None if peak is None else max(gather(peak)),
        data_wait_share=max(gather(waited)),
        parts=parts,
        note=f"attention {attention}",
    )


def _time(
    loader: Loader,
    steps: Iterable[LoadedStep],
    take: Callable[[LoadedStep], None],
    device: torch.device,
) -> tuple[list[float], float]:
    """Seconds of each step, and the share of the time that the host waited for the loader."""
    clock = Clock(device)
    begin, waited = time.perf_counter(), loader.wait_seconds
    for loaded in steps:
        clock.mark()
        take(loaded)
    clock.mark()
    seconds = clock.seconds()
    return seconds, (loader.wait_seconds - waited) / (time.perf_counter() - begin)


def take_apart(
    engine: Engine, loaded: LoadedStep, take: Callable[[LoadedStep], None], device: torch.device
) -> Parts:
    """Where the time of this one step goes: taken by the clock and, again, under the profiler.

    Steps differ in work, so that neither another's time nor a median would tell what is idle.
    """
    batches = list(loaded.micro_batches)

    def again() -> None:
        take(replace(loaded, micro_batches=iter(batches)))

    # Once before, so that the host is ahead of the device, as it is in training.
    again()
    clock = Clock(device)
    clock.mark()
    again()
    clock.mark()
    return profile_step(engine, again, clock.seconds()[0])


def document_lengths(phase: RunPhase, plan: StepPlan) -> NDArray[np.int64]:
    """Lengths of all documents of a step, over all ranks, in the order of its rows."""
    lengths = []
    for number in range(plan.rows):
        at = phase.order[plan.first_row + number]
        row = phase.data.read("train", at.source, at.row)
        lengths.append(np.diff(row.cu_seqlens[: len(row.documents) + 1]))
    return np.concatenate(lengths).astype(np.int64)


def product_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of a product of 8192 × 8192 matrices on a GPU, the median of twenty; None on a CPU."""
    if device.type != "cuda":
        return None
    a, b = torch.randn(2, _PRODUCT, _PRODUCT, device=device).to(dtype)
    for _ in range(50):  # clocks rise under load
        a @ b
    clock = Clock(device)
    for _ in range(20):
        clock.mark()
        a @ b
    clock.mark()
    return 2 * _PRODUCT**3 / statistics.median(clock.seconds())


def free_memory(device: torch.device) -> None:
    """Give back what the last measurement left, compiled graphs among it."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
