"""That a wait for the device is an error where the tests of steps say so."""

import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import waits

from train.optimizer_step import OptimizerStep


def deepspeeds() -> None:
    """What DeepSpeed calls on a GPU, at the end of a backward for one."""
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    CUDA_Accelerator.synchronize(None)


# Without a GPU there are no events and streams; their class will do.
OUTRIGHT: dict[str, Callable[[], Any]] = {
    "torch.cuda": lambda: torch.cuda.synchronize(),
    "of a device": lambda: torch.cuda.synchronize(0),
    "torch.accelerator": lambda: torch.accelerator.synchronize(),
    "an event": lambda: torch.cuda.Event.synchronize(None),
    "a stream": lambda: torch.cuda.Stream.synchronize(None),
    "DeepSpeed's": deepspeeds,
}


@pytest.mark.parametrize("name", OUTRIGHT)
def test_who_waits_outright_is_refused(name: str) -> None:
    before = [owner.synchronize for owner, _ in waits.OUTRIGHT]
    with waits.refuse_waits(on_gpu=False), pytest.raises(waits.WaitedError, match="waits for the"):
        OUTRIGHT[name]()
    assert [owner.synchronize for owner, _ in waits.OUTRIGHT] == before


@dataclass
class Event:
    """Stands in for a GPU's: reached by the device, or waited for."""

    reached: bool
    waits: int = 0

    def query(self) -> bool:
        return self.reached

    def synchronize(self) -> None:
        self.waits += 1


def test_a_flag_that_has_come_is_read_without_a_wait() -> None:
    step: Any = object.__new__(OptimizerStep)
    counted: list[bool] = []
    step._count = counted.append
    events = [Event(reached=True), Event(reached=False), Event(reached=True)]
    step._flags = deque((torch.ones(()), event) for event in events)
    step._read_flags(wait=False)
    assert counted == [True]
    assert [event.waits for event in events] == [0, 0, 0]
    step._read_flags(wait=True)
    assert counted == [True] * 3
    assert [event.waits for event in events] == [0, 1, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "wait",
    [
        lambda there, event: there.item(),
        lambda there, event: there.cpu(),
        lambda there, event: torch.cuda.synchronize(),
        lambda there, event: torch.cuda.current_stream().synchronize(),
        lambda there, event: event.synchronize(),
    ],
    ids=["a number", "a copy", "all", "a stream", "an event"],
)
def test_on_a_gpu_waits_of_all_kinds_are_refused(wait: Callable[..., Any]) -> None:
    there, event = torch.ones((), device="cuda"), torch.cuda.Event()
    event.record()
    with waits.refuse_waits(on_gpu=True):
        there + 1
        with pytest.raises(RuntimeError):
            wait(there, event)
    torch.cuda.synchronize()
