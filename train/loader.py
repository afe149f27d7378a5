"""The rank's micro-batches, made ahead of the training loop by a background thread.

A rank reads its own rows by offset and nothing else. What a micro-batch holds is a pure function of
the run's configuration and the plan of steps, so a loader that starts at any step continues exactly
where another one stopped.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from data_prep.shards import DataSet
from train.batch import BatchShape, PackedBatch, pack
from train.masking import Masker, masked_count
from train.row_order import RowAddress, RowOrder
from train.schedule import StepPlan

AHEAD = 8
"""micro-batches that wait, ready, for the training loop"""

T = TypeVar("T")


@dataclass(frozen=True)
class StepCounts:
    """What a whole step holds over all ranks and micro-steps."""

    masked_tokens: int
    tokens: int
    """real tokens, padding not counted"""


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

    def __init__(
        self,
        data: DataSet,
        order: RowOrder,
        masker: Masker,
        shape: BatchShape,
        rank: int,
        ranks: int,
    ) -> None:
        self._data, self._order, self._masker, self._shape = data, order, masker, shape
        self._rank, self._ranks = rank, ranks
        self._counts = RowCounts(data, "train")

    def counts(self, plan: StepPlan) -> StepCounts:
        """The counts of a whole step, the same on every rank, without reading a row."""
        addresses = self._addresses(plan)
        maskable = [self._counts.maskable(at.source, at.row) for at in addresses]
        return StepCounts(
            masked_tokens=sum(masked_count(plan.mask_rate, count) for count in maskable),
            tokens=sum(self._counts.tokens(at.source, at.row) for at in addresses),
        )

    def micro_batches(self, plan: StepPlan) -> Iterator[PackedBatch]:
        """The rank's micro-batches of a step, in order."""
        addresses = self._addresses(plan)
        size = self._shape.rows
        for first in range(self._rank * size, plan.rows, self._ranks * size):
            numbers = range(first, first + size)
            yield self._micro_batch(plan, numbers, addresses)

    def micro_steps(self, plan: StepPlan) -> int:
        """How many micro-batches of a step a rank gets."""
        return plan.rows // (self._ranks * self._shape.rows)

    def _addresses(self, plan: StepPlan) -> list[RowAddress]:
        return [self._order[plan.first_row + number] for number in range(plan.rows)]

    def _micro_batch(
        self, plan: StepPlan, numbers: range, addresses: Sequence[RowAddress]
    ) -> PackedBatch:
        rows, masks = [], []
        for number in numbers:
            at = addresses[number]
            row = self._data.read("train", at.source, at.row)
            maskable = self._counts.maskable(at.source, at.row)
            rows.append(row)
            masks.append(
                self._masker.mask(
                    row.input_ids, maskable, plan.mask_rate, "train", plan.first_row + number
                )
            )
        return pack(rows, masks, self._shape)


@dataclass(frozen=True)
class LoadedStep:
    """A step as the training loop takes it; `micro_batches` waits for the loader as it is read."""

    plan: StepPlan
    counts: StepCounts
    micro_steps: int
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
            plan, counts, micro_steps = item
            yield LoadedStep(plan, counts, micro_steps, self._take(micro_steps))

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
    ) -> Iterator[tuple[StepPlan, StepCounts, int] | PackedBatch]:
        for plan in plans:
            yield plan, maker.counts(plan), maker.micro_steps(plan)
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
