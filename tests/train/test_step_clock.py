"""The parts of a step: added up from events that come late, and never waited for before asked."""

import itertools

import pytest
import torch

from train.step_clock import PARTS, StepClock, event_maker


class Device:
    """Events that a device gets to when it is let: `reached` of them, a second after each other."""

    def __init__(self) -> None:
        self.recorded, self.reached, self.made, self.waits = 0, 0, 0, 0

    def make(self) -> "Late":
        self.made += 1
        return Late(self)


class Late:
    def __init__(self, device: Device) -> None:
        self.device, self.number = device, 0

    def record(self) -> None:
        self.device.recorded += 1
        self.number = self.device.recorded

    def query(self) -> bool:
        return self.number <= self.device.reached

    def synchronize(self) -> None:
        self.device.waits += 1
        self.device.reached = max(self.device.reached, self.number)

    def elapsed_time(self, end_event: "Late") -> float:
        assert end_event.query()
        assert self.query()
        return 1000.0 * (end_event.number - self.number)


def test_marks_do_not_wait_and_reading_does() -> None:
    device = Device()
    clock = StepClock(device.make)
    for part in ("data", "forward_backward", "data", "forward_backward", "optimizer"):
        clock.mark(part)
    assert device.waits == 0
    assert clock.read() == {"data": 2.0, "forward_backward": 2.0, "optimizer": 1.0}
    assert device.waits > 0
    clock.start()
    clock.mark("optimizer")
    assert clock.read() == {"data": 0.0, "forward_backward": 0.0, "optimizer": 1.0}


def test_events_that_have_been_are_used_again() -> None:
    device = Device()
    clock = StepClock(device.make)
    for number, part in zip(range(300), itertools.cycle(PARTS), strict=False):
        device.reached = number  # the device is a step behind
        clock.mark(part)
    assert device.made <= 5
    assert device.waits == 0
    assert clock.read() == dict.fromkeys(PARTS, 100.0)


def test_on_the_host_time_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 10.5, 13.5])
    monkeypatch.setattr("train.step_clock.time.perf_counter", lambda: next(now))
    clock = StepClock(event_maker(torch.device("cpu")))
    clock.mark("data")
    clock.mark("forward_backward")
    assert clock.read() == pytest.approx({"data": 0.5, "forward_backward": 3.0, "optimizer": 0.0})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_time_is_the_devices() -> None:
    """Cycles of the device that the host does not wait for."""
    clock = StepClock(event_maker(torch.device("cuda")))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        clock.start()
        clock.mark("data")
        torch.cuda._sleep(100_000_000)
        clock.mark("forward_backward")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    seconds = clock.read()
    assert seconds["forward_backward"] > 0.02
    assert seconds["data"] < 0.01
