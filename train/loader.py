"""The rank's micro-batches, made ahead of the training loop by a background thread.

A rank reads its own rows by offset and nothing else. What a micro-batch holds is a pure function of
the run's configuration and the plan of steps, so a loader that starts at any step continues exactly
where another one stopped.
"""

import contextlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from data_prep.shards import DataSet
from train.batch import PackedBatch, pack
from train.masking import masked_count
from train.resolve import Run, RunPhase
from train.row_order import RowAddress
from train.schedule import BySource, StepPlan

AHEAD = 8
"""micro-batches that wait, ready, for the training loop"""

T = TypeVar("T")


@dataclass(frozen=True)
class StepCounts:
    """What a whole step holds over all ranks and micro-steps."""

    masked_by_source: BySource
    rows_by_source: BySource
    tokens_by_source: BySource
    """real tokens, padding not counted"""

    @property
    def masked_tokens(self) -> int:
        """Masked tokens of all sources."""
        return sum(self.masked_by_source.values())

    @property
    def tokens(self) -> int:
        """Real tokens of all sources."""
        return sum(self.tokens_by_source.values())


class RowCounts:
    """Tokens and maskable tokens of every row of a split, without reading the row."""

    def __init__(self, data: DataSet, split: str) -> None:
        self._tokens, self._maskable = {}, {}
        for source in data.sources(split):
            tokens, documents = data.counts(split, source)
            self._tokens[source] = tokens
            self._maskable[source] = tokens - 2 * documents

    def tokens(self, source: str, row: int) -> int:
        """Real tokens of a row."""
        return int(self._tokens[source][row])

    def maskable(self, source: str, row: int) -> int:
        """Tokens of a row that may be masked: all but a [CLS] and a [SEP] a document."""
        return int(self._maskable[source][row])


class StepMaker:
    """Turns the plan of a step into a rank's micro-batches and the counts of the whole step."""

    def __init__(self, run: Run, rank: int) -> None:
        self._run, self._rank = run, rank
        self._counts: dict[Path, RowCounts] = {}

    def counts(self, plan: StepPlan) -> StepCounts:
        """The counts of a whole step, the same on every rank, without reading a row."""
        phase = self._run.phases[plan.phase]
        counts = self._counts_of(phase)
        rows: Counter[str] = Counter()
        tokens: Counter[str] = Counter()
        masked: Counter[str] = Counter()
        for at in _addresses(phase, plan):
            rows[at.source] += 1
            tokens[at.source] += counts.tokens(at.source, at.row)
            maskable = counts.maskable(at.source, at.row)
            masked[at.source] += masked_count(plan.mask_rate, maskable)
        return StepCounts(dict(masked), dict(rows), dict(tokens))

    def micro_batches(self, plan: StepPlan) -> Iterator[PackedBatch]:
        """The rank's micro-batches of a step, in order."""
        phase = self._run.phases[plan.phase]
        addresses = _addresses(phase, plan)
        size = phase.shape.rows
        for first in range(self._rank * size, plan.rows, self._run.ranks * size):
            yield self._micro_batch(phase, plan, range(first, first + size), addresses)

    def micro_steps(self, plan: StepPlan) -> int:
        """How many micro-batches of a step a rank gets."""
        return plan.rows // (self._run.ranks * self._run.phases[plan.phase].shape.rows)

    def sources(self, plan: StepPlan) -> tuple[str, ...]:
        """Those of a step's phase, by their numbers."""
        return self._run.phases[plan.phase].shape.sources

    def _counts_of(self, phase: RunPhase) -> RowCounts:
        """The row counts of a phase's data set, which other phases may share."""
        counts = self._counts.get(phase.data.folder)
        if counts is None:
            counts = self._counts[phase.data.folder] = RowCounts(phase.data, "train")
        return counts

    def _micro_batch(
        self, phase: RunPhase, plan: StepPlan, numbers: range, addresses: Sequence[RowAddress]
    ) -> PackedBatch:
        counts = self._counts_of(phase)
        rows, masks = [], []
        for number in numbers:
            at = addresses[number]
            row = phase.data.read("train", at.source, at.row)
            maskable = counts.maskable(at.source, at.row)
            global_row = plan.first_row + number
            rows.append(row)
            masks.append(
                phase.masker.mask(
                    row.input_ids, maskable, plan.mask_rate, "train", phase.name, global_row
                )
            )
        return pack(rows, masks, phase.shape)


def _addresses(phase: RunPhase, plan: StepPlan) -> list[RowAddress]:
    return [phase.order[plan.first_row + number] for number in range(plan.rows)]


@dataclass(frozen=True)
class LoadedStep:
    """A step as the training loop takes it; `micro_batches` waits for the loader as it is read."""

    plan: StepPlan
    counts: StepCounts
    micro_steps: int
    sources: tuple[str, ...]
    """those that the numbers of the micro-batches' sources are of"""
    micro_batches: Iterator[PackedBatch]


class Loader:
    """Iterates over the steps of a plan, the next micro-batches being made meanwhile.

    A context manager: leaving it ends the thread. `wait_seconds` grows by the time the training
    loop waited. An error of the thread is raised where its micro-batch would have come.
    """

    def __init__(self, maker: StepMaker, plans: Iterable[StepPlan], pin: bool) -> None:
        """pin: hand micro-batches over in page-locked memory, for a GPU."""
        self._ahead = Ahead(self._make(maker, plans, pin), AHEAD)

    @property
    def wait_seconds(self) -> float:
        """Seconds that the training loop has waited for data so far."""
        return self._ahead.wait_seconds

    def __iter__(self) -> Iterator[LoadedStep]:
        for item in self._ahead:
            assert isinstance(item, tuple)
            plan, counts, micro_steps, sources = item
            yield LoadedStep(plan, counts, micro_steps, sources, self._take(micro_steps))

    def __enter__(self) -> "Loader":
        self._ahead.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ahead.stop()

    def _take(self, number: int) -> Iterator[PackedBatch]:
        for _ in range(number):
            batch = next(self._ahead)
            assert isinstance(batch, PackedBatch)
            yield batch

    @staticmethod
    def _make(
        maker: StepMaker, plans: Iterable[StepPlan], pin: bool
    ) -> Iterator[tuple[StepPlan, StepCounts, int, tuple[str, ...]] | PackedBatch]:
        for plan in plans:
            yield plan, maker.counts(plan), maker.micro_steps(plan), maker.sources(plan)
            for batch in maker.micro_batches(plan):
                yield batch.pin() if pin else batch


class Ahead(Generic[T]):
    """An iterator whose next items are made by a background thread, at most `size` ahead."""

    def __init__(self, items: Iterator[T], size: int) -> None:
        self.wait_seconds = 0.0
        self._items = items
        self._queue: queue.Queue[T | _End] = queue.Queue(size)
        self._stopping = threading.Event()
        # A daemon: a training loop that dies must not be kept alive by its loader.
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)

    def start(self) -> None:
        """Begin to make items."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it; items not taken are dropped."""
        self._stopping.set()
        while self._thread.is_alive():
            _drain(self._queue)
            self._thread.join(timeout=0.05)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        begin = time.perf_counter()
        item = self._queue.get()
        self.wait_seconds += time.perf_counter() - begin
        if isinstance(item, _End):
            self._queue.put(item)
            if item.error is not None:
                raise item.error
            raise StopIteration
        return item

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            for item in self._items:
                self._queue.put(item)
                if self._stopping.is_set():
                    return
        except BaseException as raised:
            error = raised
        self._queue.put(_End(error))


@dataclass(frozen=True)
class _End:
    error: BaseException | None


def _drain(items: queue.Queue[T]) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            items.get_nowait()
