"""The device that is measured: how it is warmed up, its product, what interrupts its steps."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from train.benchmark import __main__ as command
from train.benchmark import device, interruptions
from train.benchmark.measure import Effort, usual_effort
from train.resolve import Run

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@dataclass
class Rounds:
    """Rounds of steps that take as long as they are said to, the last of them again and again."""

    takes: list[float]
    now: float = 100.0
    done: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        self.done.append(self.takes[min(len(self.done), len(self.takes) - 1)])
        self.now += self.done[-1]


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Rounds]:
    """Rounds on the clock of `device`, and the other ranks: what they say when they are asked."""

    def make(takes: list[float], others: Callable[[int], list[float]] = lambda call: []) -> Rounds:
        made, calls = Rounds(takes), []

        def gather(value: float) -> list[float]:
            calls.append(value)
            return [value, *others(len(calls))]

        monkeypatch.setattr(device.time, "perf_counter", lambda: made.now)
        monkeypatch.setattr(device, "gather", gather)
        return made

    return make


def test_the_first_round_compiles_and_warms_nothing(rounds: Callable[..., Rounds]) -> None:
    taken = rounds([30.0, 2.0, 2.0, 1.0])
    assert device.warm_up(taken, CPU, rounds=1, seconds=5) == 1
    assert taken.done == [30, 2, 2, 1]


def test_so_many_rounds_are_taken_at_least(rounds: Callable[..., Rounds]) -> None:
    assert len_of(rounds([3.0]), rounds=3, seconds=0) == 3
    assert len_of(rounds([3.0]), rounds=1, seconds=0) == 1


def len_of(taken: Rounds, rounds: int, seconds: float) -> int:
    device.warm_up(taken, CPU, rounds, seconds)
    return len(taken.done)


def test_ranks_agree_on_the_last_round_and_on_the_time_of_one(
    rounds: Callable[..., Rounds],
) -> None:
    """The others' clock is ahead: 5 seconds have passed there after the second round."""
    taken = rounds([9.0, 2.0], lambda call: [[0.0], [5.5], [2.75]][call - 1])
    assert device.warm_up(taken, CPU, rounds=1, seconds=5) == 2.75
    assert len(taken.done) == 2


def test_steps_are_timed_for_so_long_and_so_often() -> None:
    assert Effort(20, seconds=8).timed(0.125) == 64
    assert Effort(20, seconds=8).timed(1.0) == 20
    assert Effort(3).timed(1e-4) == 3
    assert usual_effort(8, on_gpu=False) == Effort(8)
    on_gpu = usual_effort(8, on_gpu=True)
    assert on_gpu.seconds >= 8
    assert on_gpu.warm_up_s >= 5
    assert on_gpu.parts_s >= 1


class HotGpu:
    """Products that take 2 ms until two seconds of work have passed, then 1 ms, for any device."""

    def __init__(self) -> None:
        self.now = 0.0

    def work(self) -> None:
        self.now += 0.002 if self.now < 2 else 0.001


def test_the_product_is_that_of_a_hot_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = HotGpu()

    class Matrix:
        def to(self, dtype: torch.dtype) -> "Matrix":
            return self

        def __iter__(self) -> Any:
            return iter([self, self])

        def __matmul__(self, other: "Matrix") -> None:
            gpu.work()

    class Clock(device.Clock):
        def __init__(self, on: torch.device) -> None:
            super().__init__(CPU)

    monkeypatch.setattr(device.torch, "randn", lambda *shape, device: Matrix())
    monkeypatch.setattr(device, "Clock", Clock)
    monkeypatch.setattr(device.time, "perf_counter", lambda: gpu.now)
    rate = device.product_rate(GPU, torch.bfloat16)
    assert rate == pytest.approx(2 * 8192**3 / 0.001)
    assert device.product_rate(CPU, torch.float32) is None


def test_a_measurement_has_the_better_of_the_products_around_it(
    monkeypatch: pytest.MonkeyPatch, resolved: Callable[..., Run]
) -> None:
    products = iter([6e14, 7e14, 6.5e14, 8e14, 5e14])
    monkeypatch.setattr(command, "product_rate", lambda *of: next(products))
    monkeypatch.setattr(command, "free_memory", lambda on: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda on: "NVIDIA H200")
    peak = command.Peak(resolved(), GPU)
    measured: Any = object()
    found, machine = peak.around(lambda: measured)
    assert found is measured
    assert machine.products == (6e14, 7e14)
    assert machine.peak == 7e14
    assert "600 TFLOP/s before and 700 TFLOP/s after" in str(machine.peak_source)
    # What came after the one comes before the next.
    assert peak.around(lambda: measured)[1].products == (7e14, 6.5e14)

    def fails() -> Any:
        raise MemoryError

    with pytest.raises(MemoryError):
        peak.around(fails)
    assert peak.around(lambda: measured)[1].products == (8e14, 5e14)


def test_on_a_cpu_there_is_no_peak(resolved: Callable[..., Run]) -> None:
    measured: Any = object()
    _, machine = command.Peak(resolved(), CPU).around(lambda: measured)
    assert machine.peak is None
    assert machine.peak_source is None


# What interrupts steps.


def test_collections_and_compilations_are_counted() -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    before = interruptions.read(CPU)
    gc.collect()
    torch.compile(twice, backend="eager")(torch.ones(3))
    found = interruptions.between(before, interruptions.read(CPU))
    assert found == {
        "device_allocations": None,
        "allocation_retries": None,
        "pinned_allocations": None,
        "recompilations": 1,
        "full_collections": 1,
    }


def test_what_a_gpu_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"num_device_alloc": 5, "num_alloc_retries": 1}
    host = {"num_host_alloc": 7}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda on: dict(counts))
    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: dict(host), raising=False)
    before = interruptions.read(GPU)
    counts["num_device_alloc"] = 8
    host["num_host_alloc"] = 8
    found = interruptions.between(before, interruptions.read(GPU))
    assert found["device_allocations"] == 3
    assert found["allocation_retries"] == 0
    assert found["pinned_allocations"] == 1
    monkeypatch.delattr(torch.cuda, "host_memory_stats")
    assert interruptions.read(GPU)["pinned_allocations"] is None


def test_the_worst_rank_counts() -> None:
    none = dict.fromkeys(interruptions.NAMES)
    one = none | {"recompilations": 0, "full_collections": 2}
    other = none | {"recompilations": 3, "full_collections": 1}
    worst = interruptions.most([one, other])
    assert worst == none | {"recompilations": 3, "full_collections": 2}
    assert interruptions.in_words(worst) == "3 recompilations, 2 full collections"
    assert interruptions.in_words(none | {"recompilations": 0}) is None
