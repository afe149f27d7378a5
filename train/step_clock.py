"""Where the time of a step goes, without waiting for the device to find out.

Between two marks the time is one part's. On a GPU a mark is an event on its stream: the device
notes the time when it gets there, and the host reads it later. So a part lasts as long as the
device is at it or, in `data`, has nothing to do because the next micro-batch is not there yet.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch

PARTS = ("data", "forward_backward", "optimizer")


class Event(Protocol):
    """What the clock uses of torch.cuda.Event."""

    def record(self) -> None: ...

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: Any) -> float: ...


class HostEvent:
    """A moment of the host, which is over as soon as it is noted."""

    def record(self) -> None:
        """Note the moment."""
        self.at = time.perf_counter()

    def query(self) -> bool:
        """Whether it has come."""
        return True

    def synchronize(self) -> None:
        """Wait for it."""

    def elapsed_time(self, end_event: "HostEvent") -> float:
        """Milliseconds from here to there."""
        return (end_event.at - self.at) * 1e3


def event_maker(device: torch.device) -> Callable[[], Event]:
    """What makes the events of a device."""
    if device.type == "cuda":
        return lambda: torch.cuda.Event(enable_timing=True)
    return HostEvent


class StepClock:
    """Adds up the seconds of each part of the steps since `start`."""

    def __init__(self, make_event: Callable[[], Event]) -> None:
        self._make = make_event
        self._spare: list[Event] = []
        self.start()

    def start(self) -> None:
        """Begin anew: what lies before this is no part's."""
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._pending: deque[tuple[str, Event]] = deque()
        self._last = self._now()

    def mark(self, part: str) -> None:
        """The time since the last mark was `part`'s; does not wait for the device."""
        self._pending.append((part, self._now()))
        while self._pending and self._pending[0][1].query():
            self._settle()

    def read(self) -> dict[str, float]:
        """Seconds of each part since `start`; waits for the last mark."""
        while self._pending:
            self._pending[0][1].synchronize()
            self._settle()
        return dict(self._seconds)

    def _now(self) -> Event:
        event = self._spare.pop() if self._spare else self._make()
        event.record()
        return event

    def _settle(self) -> None:
        part, event = self._pending.popleft()
        self._seconds[part] += self._last.elapsed_time(event) / 1e3
        self._spare.append(self._last)
        self._last = event
