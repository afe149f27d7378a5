"""What a step does only now and then, and which makes a timed one no longer like the others.

Each is a count since the process began; two readings say what happened between them. None waits
for the device.
"""

import gc
from collections.abc import Mapping, Sequence

import torch

Counts = dict[str, int | None]
"""None where there is no such count, as of a GPU's memory on a CPU"""

NAMES = (
    "device_allocations",
    "allocation_retries",
    "pinned_allocations",
    "recompilations",
    "full_collections",
)
"""memory asked of the driver rather than of PyTorch's pool, and again after the pool was emptied;
page-locked memory asked of it, by the loader; graphs compiled; collections of Python's garbage that
went through the oldest generation"""


def read(device: torch.device) -> Counts:
    """The counts so far."""
    # Only here: it takes seconds to import, and the model is compiled before anything is timed.
    from torch._dynamo.utils import counters

    on_gpu: Mapping[str, int] = {}
    pinned: Mapping[str, int] = {}
    if device.type == "cuda":
        on_gpu = torch.cuda.memory_stats(device)
        # Since torch 2.7.
        if hasattr(torch.cuda, "host_memory_stats"):
            pinned = torch.cuda.host_memory_stats()
    found = (
        on_gpu.get("num_device_alloc"),
        on_gpu.get("num_alloc_retries"),
        pinned.get("num_host_alloc"),
        counters["stats"]["unique_graphs"],
        gc.get_stats()[-1]["collections"],
    )
    return dict(zip(NAMES, found, strict=True))


def between(before: Counts, after: Counts) -> Counts:
    """How often each happened from one reading to the other."""
    found: Counts = {}
    for name in NAMES:
        first, last = before[name], after[name]
        found[name] = None if first is None or last is None else last - first
    return found


def most(of_ranks: Sequence[Counts]) -> Counts:
    """Of each the most that it happened on one rank."""
    found: Counts = {}
    for name in NAMES:
        known = [count for counts in of_ranks if (count := counts[name]) is not None]
        found[name] = max(known) if known else None
    return found


def in_words(counts: Counts) -> str | None:
    """What happened, in words; None where nothing did."""
    happened = [f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count]
    return ", ".join(happened) or None
