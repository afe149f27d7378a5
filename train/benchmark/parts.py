"""Where the time of a step goes, from the GPU kernels of one that the profiler watched.

A kernel's part follows from its name and from what was going on when it was launched: the step of
the optimizer (norm of the gradient included), the rest of the engine's step, what the engine does
around backward (sums of gradients), or the model. Time in which several kernels run counts once,
for the part that stands first in PARTS: communication that hides behind products costs nothing.
`idle` is what is left of the same step as it was timed without the profiler, which slows the host
but not the kernels.
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
from torch.profiler import ProfilerActivity, profile, record_function

from train.engine import Engine

Parts = dict[str, float]
"""milliseconds by part"""

PARTS = ("gemm", "attention", "memory_bound", "optimizer", "engine", "idle")

# Labels in the trace: of what the loop calls of an engine, which profile_step puts there, ...
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

    where: what was going on when it was launched: "optimizer", "engine" or "model".
    """

    name: str
    start: float
    end: float
    where: str = "model"


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


def split(kernels: Iterable[Kernel], step_seconds: float) -> Parts:
    """Milliseconds of a step of `step_seconds` by part; what no kernel covers is idle."""
    by_part: dict[str, list[tuple[float, float]]] = {name: [] for name in PARTS}
    for kernel in kernels:
        by_part[category(kernel)].append((kernel.start, kernel.end))
    parts: Parts = {}
    covered: list[tuple[float, float]] = []
    before = 0.0
    for name in PARTS[:-1]:
        covered = _union([*covered, *by_part[name]])
        total = sum(end - start for start, end in covered)
        parts[name], before = (total - before) / 1000, total
    parts["idle"] = max(0.0, step_seconds * 1000 - before / 1000)
    return parts


def profile_step(engine: Engine, take: Callable[[], None], step_seconds: float) -> Parts:
    """Take a step under the profiler; its parts, where it took `step_seconds` without."""
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with labelled(engine):
        torch.cuda.synchronize()
        with profile(activities=activities) as profiler:
            take()
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_bytes())
    return split(read_kernels(trace["traceEvents"]), step_seconds)


def read_kernels(events: Sequence[dict[str, Any]]) -> list[Kernel]:
    """The kernels of a trace in Chrome's format, as `torch.profiler` writes it.

    A kernel and its launch have the same `correlation`; the launch's thread and moment say what
    was going on.
    """
    launches: dict[int, tuple[Any, float]] = {}
    marks = {label: _Ranges() for label in LABELS}
    for event in events:
        kind, name = event.get("cat"), str(event.get("name", ""))
        if kind in ("cuda_runtime", "cuda_driver"):
            if "correlation" in event.get("args", {}):
                launches[event["args"]["correlation"]] = (event["tid"], event["ts"])
        elif kind in ("user_annotation", "cpu_op"):
            for label, ranges in marks.items():
                if label in name:
                    ranges.add(event["tid"], event["ts"], event["ts"] + event["dur"])
    kernels = []
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            launch = launches.get(event.get("args", {}).get("correlation"))
            where = "model" if launch is None else _where(marks, *launch)
            start = float(event["ts"])
            kernels.append(Kernel(event["name"], start, start + float(event["dur"]), where))
    return kernels


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
        place = bisect.bisect_right(merged, (moment, float("inf"))) - 1
        return place >= 0 and moment <= merged[place][1]


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
