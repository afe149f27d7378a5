"""Where the time of a step goes, from the GPU kernels of some that the profiler watched.

A kernel's part follows from its name and from what was going on when it was launched: the step of
the optimizer (norm of the gradient included), the rest of the engine's step, what the engine does
around backward (sums of gradients), or the model. Time in which several kernels run counts once,
for the part that stands first in PARTS: communication that hides behind products costs nothing.

All of it is of one trace of steps one after another, none of which waits for the device: of whole
steps, each from its first kernel to the first of the next. `idle` is the part of that time in which
no stream has a kernel or a copy at work. The first and the last of the recorded steps only bound
the others: before the first the profiler turns on, after the last the device is waited for. The
profiler slows the host, not the kernels; where the host is not ahead of the device, `idle` has that
in it, and the parts add up to more than a step that was timed.
"""

import bisect
import contextlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from train.engine import Engine

Parts = dict[str, float]
"""milliseconds by part"""

MOST_KERNELS, MOST_LETTERS = 40, 120
"""of a breakdown, and of a kernel's name in it"""

PARTS = ("gemm", "attention", "memory_bound", "optimizer", "engine", "idle")

# Labels in the trace: of a whole step and of what the loop calls of an engine, which profile_steps
# puts there, ...
_ONE_STEP = "benchmark: one step"
_WHOLE_STEP, _STEP, _BACKWARD = "benchmark: whole step", "benchmark: step", "benchmark: backward"
_LABELS = {"optimizer_step": _WHOLE_STEP, "step": _STEP, "backward": _BACKWARD}
# ... and PyTorch's own.
_OPTIMIZER, _ACCUMULATE = "Optimizer.step#", "AccumulateGrad"
_AUTOGRAD = "autograd::engine::evaluate_function"
LABELS = (*_LABELS.values(), _OPTIMIZER, _ACCUMULATE, _AUTOGRAD)

_COMMUNICATION = re.compile(r"nccl", re.IGNORECASE)
# Inductor puts the names of all it has fused into a kernel's; its products are templates.
_FUSED = re.compile(r"^triton_(?!tem_|mm)")
_ATTENTION = re.compile(r"flash|fmha|attention|attn|sdpa", re.IGNORECASE)
_GEMM = re.compile(
    r"gemm|nvjet|xmma|cublas|cutlass|wgmma|gemv|split_?k|triton_tem_|triton_mm|scaled_mm",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Kernel:
    """A kernel, a copy or a fill on the GPU, from `start` to `end` in microseconds.

    where: what was going on when it was launched: "optimizer", "engine" or "model". step: the
    number of the recorded step that launched it; None where that was before the first of them,
    for the device comes later than the host.
    """

    name: str
    start: float
    end: float
    where: str = "model"
    step: int | None = None


@dataclass(frozen=True)
class Breakdown:
    """Where the time of a step goes: means over `steps` whole ones.

    kernels: the longest of all, (milliseconds and launches a step, part, name); other than in
    parts, all of a kernel's time counts, also what is hidden behind another one.
    """

    parts: Parts
    steps: int
    kernels: list[tuple[float, float, str, str]]


def category(kernel: Kernel) -> str:
    """The part of PARTS that a kernel belongs to."""
    if _COMMUNICATION.search(kernel.name):
        return "engine"
    if kernel.where != "model":
        return kernel.where
    if _FUSED.match(kernel.name):
        return "memory_bound"
    if _ATTENTION.search(kernel.name):
        return "attention"
    return "gemm" if _GEMM.search(kernel.name) else "memory_bound"


def split(kernels: Sequence[Kernel]) -> Breakdown | None:
    """Of the whole steps among those that launched these kernels.

    None where fewer than three steps have kernels: there is no whole one between the first and the
    last.
    """
    starts: dict[int, float] = {}
    for kernel in kernels:
        if kernel.step is not None:
            starts[kernel.step] = min(kernel.start, starts.get(kernel.step, kernel.start))
    if len(starts) < 3:
        return None
    _, begin, *_, end = (starts[step] for step in sorted(starts))
    by_part: dict[str, list[tuple[float, float]]] = {name: [] for name in PARTS}
    by_name: dict[tuple[str, str], list[float]] = {}
    for kernel in kernels:
        first, last = max(kernel.start, begin), min(kernel.end, end)
        if first < last:
            part = category(kernel)
            by_part[part].append((first, last))
            by_name.setdefault((part, kernel.name[:MOST_LETTERS]), []).append(last - first)
    parts: Parts = {}
    steps = len(starts) - 2
    covered: list[tuple[float, float]] = []
    before = 0.0
    for name in PARTS[:-1]:
        covered = _union([*covered, *by_part[name]])
        total = sum(end - start for start, end in covered)
        parts[name], before = (total - before) / 1000 / steps, total
    # Sums of times may be off in their last bits.
    parts["idle"] = max(0.0, end - begin - before) / 1000 / steps
    longest = sorted(((sum(times), part, name) for (part, name), times in by_name.items()))
    return Breakdown(
        parts,
        steps,
        [
            (total / 1000 / steps, len(by_name[part, name]) / steps, part, name)
            for total, part, name in longest[: -MOST_KERNELS - 1 : -1]
        ],
    )


def profile_steps(engine: Engine, take: Callable[[], None], steps: int) -> Breakdown | None:
    """Take steps under the profiler; where the time of `steps` of them goes.

    Twice as many go before, under a profiler that is on but records nothing: it takes a while to
    get ready, and the device rests meanwhile.
    """
    return split(read_kernels(record(engine, take, warm_up=2 * steps, steps=steps + 2)))


def record(
    engine: Engine, take: Callable[[], None], warm_up: int, steps: int
) -> list[dict[str, Any]]:
    """The events of a trace of `steps` steps, taken right behind `warm_up` others.

    Nothing waits for the device before the end of the last, where the profiler does.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    plan = schedule(wait=0, warmup=warm_up, active=steps, repeat=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"

        def save(profiler: profile) -> None:
            profiler.export_chrome_trace(str(path))

        with (
            labelled(engine),
            profile(activities=activities, schedule=plan, on_trace_ready=save) as profiler,
        ):
            for _ in range(warm_up + steps):
                with record_function(_ONE_STEP):
                    take()
                profiler.step()
        events: list[dict[str, Any]] = json.loads(path.read_bytes())["traceEvents"]
    return events


def read_kernels(events: Sequence[dict[str, Any]]) -> list[Kernel]:
    """The kernels of a trace in Chrome's format, as `torch.profiler` writes it.

    A kernel and its launch have the same `correlation`; the launch's thread and moment say what
    was going on, and its moment alone in which step: backward runs in a thread of autograd's.
    """
    launches: dict[int, tuple[Any, float]] = {}
    steps: list[tuple[float, float]] = []
    marks = {label: _Ranges() for label in LABELS}
    for event in events:
        kind, name = event.get("cat"), str(event.get("name", ""))
        if kind in ("cuda_runtime", "cuda_driver"):
            if "correlation" in event.get("args", {}):
                launches[event["args"]["correlation"]] = (event["tid"], event["ts"])
        elif kind == "user_annotation" and name == _ONE_STEP:
            steps.append((event["ts"], event["ts"] + event["dur"]))
        elif kind in ("user_annotation", "cpu_op"):
            for label, ranges in marks.items():
                if label in name:
                    ranges.add(event["tid"], event["ts"], event["ts"] + event["dur"])
    steps.sort()
    kernels = []
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            launch = launches.get(event.get("args", {}).get("correlation"))
            where = "model" if launch is None else _where(marks, *launch)
            step = None if launch is None else _holding(steps, launch[1])
            start = float(event["ts"])
            kernels.append(Kernel(event["name"], start, start + float(event["dur"]), where, step))
    return kernels


def _holding(ranges: Sequence[tuple[float, float]], moment: float) -> int | None:
    """The number of the stretch of time that holds the moment; they are sorted."""
    place = bisect.bisect_right(ranges, (moment, float("inf"))) - 1
    return place if place >= 0 and moment <= ranges[place][1] else None


class _Ranges:
    """Stretches of time on threads, added in any order."""

    def __init__(self) -> None:
        self._ranges: dict[Any, list[tuple[float, float]]] = {}
        self._merged: dict[Any, list[tuple[float, float]]] = {}

    def add(self, thread: Any, start: float, end: float) -> None:
        self._ranges.setdefault(thread, []).append((start, end))

    def hold(self, thread: Any, moment: float) -> bool:
        """Whether one of the thread's stretches holds the moment."""
        if thread not in self._merged:
            self._merged[thread] = _union(self._ranges.get(thread, []))
        merged = self._merged[thread]
        return _holding(merged, moment) is not None


def _where(marks: dict[str, _Ranges], thread: Any, moment: float) -> str:
    if marks[_OPTIMIZER].hold(thread, moment):
        return "optimizer"
    if marks[_STEP].hold(thread, moment) or marks[_ACCUMULATE].hold(thread, moment):
        return "engine"
    if marks[_WHOLE_STEP].hold(thread, moment):
        return "optimizer"
    # Backward itself runs in autograd's own thread; what the thread that asked for it launches is
    # the engine's.
    if marks[_BACKWARD].hold(thread, moment) and not marks[_AUTOGRAD].hold(thread, moment):
        return "engine"
    return "model"


@contextlib.contextmanager
def labelled(engine: Engine) -> Iterator[None]:
    """Let what the loop calls of the engine show in a trace."""
    before = {name: vars(engine).get(name) for name in _LABELS}
    for name, label in _LABELS.items():
        setattr(engine, name, _with_label(getattr(engine, name), label))
    try:
        yield
    finally:
        for name, own in before.items():
            if own is None:
                delattr(engine, name)
            else:
                setattr(engine, name, own)


def _with_label(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return function(*args, **kwargs)

    return call


def _union(ranges: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same stretches of time, sorted and merged where they touch."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
