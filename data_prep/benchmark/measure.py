"""Measuring work in CPU seconds, which a machine that is busy with other things hardly changes."""

import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    """One piece of work.

    stage: what was done; who: by what; source: to which documents.
    documents, bytes: what was worked on, bytes of UTF-8 text (0 where the work sees no text).
    cpu_s: of this process and its children, all threads; wall_s: the time that passed.
    written: bytes of files that the work left.
    """

    stage: str
    who: str
    source: str
    documents: int
    bytes: int
    cpu_s: float
    wall_s: float
    written: int = 0

    @property
    def documents_per_s(self) -> float:
        """Documents a second of one core."""
        return self.documents / max(self.cpu_s, 1e-9)

    @property
    def mb_per_s(self) -> float:
        """Megabytes (10^6) a second of one core."""
        return self.bytes / 1e6 / max(self.cpu_s, 1e-9)


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended, in user and system mode."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall seconds of one call."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    work()
    return cpu_seconds() - cpu, time.perf_counter() - wall


def measure(
    stage: str,
    who: str,
    source: str,
    work: Callable[[], object],
    documents: int,
    size: int,
    repeats: int,
) -> Measured:
    """The call with the least CPU time of `repeats`, after one that is not counted if there are."""
    if repeats > 1:
        work()
    cpu, wall = min(timed(work) for _ in range(repeats))
    return Measured(stage, who, source, documents, size, cpu, wall)


def cpu_model() -> str:
    """The processor's name, and how many cores of it there are."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown'}, {os.cpu_count()} cores"
