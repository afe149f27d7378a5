"""The device that is measured: its clock, its memory, its warmth, and the product it does best."""

import gc
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from train.ranks import gather

_PRODUCT = 8192
_PRODUCT_WARM_UP_S = 2.0
_AT_ONCE = 50


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


def free_memory(device: torch.device) -> None:
    """Give back what the last measurement left, compiled graphs among it."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def warm_up(
    round_of_steps: Callable[[], None], device: torch.device, rounds: int, seconds: float
) -> float:
    """Take so many rounds at least, and more until all but the first took so many seconds.

    The first compiles and allocates, while the device rests. Returns the seconds of the shortest
    round, on the slowest rank. Every rank calls this, and takes as many rounds as the others: after
    each of them, which is waited for, they agree whether it was the last.
    """
    begin: float | None = None
    shortest = float("inf")
    for number in itertools.count(1):
        clock = Clock(device)
        clock.mark()
        round_of_steps()
        clock.mark()
        shortest = min(shortest, *clock.seconds())
        now = time.perf_counter()
        begin = now if begin is None else begin
        if number >= rounds and max(gather(now - begin)) >= seconds:
            return max(gather(shortest))
    raise AssertionError("there is no last number")


def product_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of a product of 8192 × 8192 matrices on a hot GPU; None on a CPU.

    The median of fifty, after products of two seconds: a rested GPU is faster for a while, and one
    whose clocks are down slower.
    """
    if device.type != "cuda":
        return None
    a, b = torch.randn(2, _PRODUCT, _PRODUCT, device=device).to(dtype)

    def multiply() -> list[float]:
        clock = Clock(device)
        for _ in range(_AT_ONCE):
            clock.mark()
            a @ b
        clock.mark()
        return clock.seconds()

    begin = time.perf_counter()
    while time.perf_counter() < begin + _PRODUCT_WARM_UP_S:
        multiply()
    return 2 * _PRODUCT**3 / statistics.median(multiply())
