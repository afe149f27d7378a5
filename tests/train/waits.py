"""Errors where the host would wait for a GPU, for the tests of what must not."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

# torch's own mode (`torch.cuda.set_sync_debug_mode`) raises at copies and at numbers that are read,
# but not where somebody waits outright. Neither sees what waits within C++: NCCL, a cudaFree.
OUTRIGHT = [
    (torch.cuda, "torch.cuda"),
    (torch.accelerator, "torch.accelerator"),
    (torch.cuda.Event, "an event"),
    (torch.cuda.Stream, "a stream"),
]


class WaitedError(RuntimeError):
    """The host would have waited for the device."""


@contextlib.contextmanager
def refuse_waits(on_gpu: bool) -> Iterator[None]:
    """Raise at whatever waits for the device, in any thread, as far as Python and torch's mode see.

    On a CPU torch's mode is left out, for there is none.
    """
    with contextlib.ExitStack() as stack:
        for owner, name in OUTRIGHT:
            stack.enter_context(mock.patch.object(owner, "synchronize", _refusal(name)))
        if on_gpu:
            torch.cuda.set_sync_debug_mode("error")
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
        yield


def _refusal(name: str) -> Any:
    def synchronize(*arguments: Any, **options: Any) -> None:
        raise WaitedError(f"{name}.synchronize() waits for the device")

    return synchronize
