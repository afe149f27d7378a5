"""Signs of life: a bar over the tasks of a stage, and lines from a task that takes long.

They hold names of stages, numbers and times, never text.
"""

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

# A task that takes longer says so, again and again.
LINE_EVERY_S = 30.0
_BAR_EVERY_S = 0.5

# What the task of this process has done so far; a process does one task at a time.
_done: Counter[str] = Counter()


def advance(what: str, number: int) -> None:
    """Note that the running task has done `number` more of `what`, such as documents."""
    _done[what] += number


@contextmanager
def signs_of_life(name: str, every_s: float = LINE_EVERY_S) -> Iterator[None]:
    """While the block runs, a line on stderr every `every_s` seconds: how far the task is."""
    _done.clear()
    began = time.monotonic()

    def line() -> None:
        numbers = [f"{number:,} {what}" for what, number in dict(_done).items()]
        elapsed = f"{time.monotonic() - began:.0f} s"
        tqdm.write(f"data_prep: {name}: {', '.join([*numbers, elapsed])}", file=sys.stderr)

    with _repeating(line, every_s):
        yield


@contextmanager
def bar(name: str, total: int, number_done: Callable[[], int]) -> Iterator[None]:
    """While the block runs, a bar on stderr that shows how many tasks are done, by whomever."""
    with tqdm(total=total, desc=name, unit="task", initial=number_done()) as shown:

        def update() -> None:
            shown.update(number_done() - shown.n)

        with _repeating(update, _BAR_EVERY_S):
            yield
        update()


@contextmanager
def _repeating(action: Callable[[], None], every_s: float) -> Iterator[None]:
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(every_s):
            action()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
