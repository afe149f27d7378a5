"""Running the tasks of a stage: datatrove's executors for this machine and for SLURM.

datatrove starts the processes or the job array. Which tasks are done is known by the stage's own
markers, not by datatrove's, which are bare ranks and say nothing of what was done. Its log of a
task is not written: it would print the local variables of a step that fails, which are texts.

What a process gets is a `Work`: which stage of which run. The run's description, `run.json`, is
written once by the command that started it (`data_prep.run_file`).
"""

import ctypes
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import multiprocess
import pyarrow as pa
from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.utils.logging import logger
from datatrove.utils.stats import PipelineStats
from multiprocess.pool import Pool

from common.config import ConfigError
from data_prep.config import DataPrep
from data_prep.document import InputError
from data_prep.progress import bar, signs_of_life
from data_prep.stages import Counts, Stage

_PROJECT = Path(__file__).parent.parent


class TaskFailed(RuntimeError):
    """A task that failed, in words that hold no text of a document.

    kind: `input` (a file or a key), `system` (a disk that is full, …) or `defect` (of data_prep).
    """

    def __init__(self, message: str, kind: str = "defect") -> None:
        super().__init__(message, kind)
        self.message = message
        self.kind = kind

    def __str__(self) -> str:
        return self.message

    def as_raised(self) -> Exception:
        """What the command that asked for the task raises."""
        kinds = {"input": InputError, "system": OSError}
        return kinds[self.kind](self.message) if self.kind in kinds else self


@dataclass(frozen=True)
class Work:
    """The tasks of a stage, described for any process: the stage `stage` of the run `run`."""

    out_dir: Path
    run: str
    stage: str
    key: str

    def open(self) -> Stage:
        """The stage. Raises InputError where `out_dir` holds another run's description by now."""
        return _open(self)


def run_stage(stage: Stage, work: Work, config: DataPrep) -> list[Counts]:
    """Do the tasks of `stage` that are not done; returns the counts of all.

    work: describes the same stage. Raises InputError, OSError or TaskFailed for the first task
    that failed; what others did is kept.
    """
    if not stage.tasks:
        return []
    stage.prepare()
    logger.disable("datatrove")
    try:
        with bar(stage.name, len(stage.tasks), stage.number_done):
            _executor(stage, work, config).run()
        problem = None
    except TaskFailed as error:
        problem = error.as_raised()
    if problem is not None:
        raise problem
    return stage.finish()


def _executor(stage: Stage, work: Work, config: DataPrep) -> PipelineExecutor:
    """Who does what is left of a stage. A single task is not worth a place in SLURM's queue."""
    left = sum(not stage.is_done(index) for index in range(len(stage.tasks)))
    if config.executor == "slurm":
        from data_prep.slurm import SlurmStageExecutor

        return (
            SlurmStageExecutor(stage, work, config)
            if left > 1
            else LocalStageExecutor(stage, work, 1)
        )
    workers = min(config.workers or available_cores(), max(left, 1))
    return LocalStageExecutor(stage, work, workers)


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def perform(work: Work, index: int) -> None:
    """Do a task of `work` in this process. Raises TaskFailed, without a context, for any error."""
    problem = None
    try:
        stage = work.open()
        name = f"{stage.name}, task {index} ({stage.tasks[index].group})"
        with signs_of_life(name):
            stage.run_task(index)
    except (InputError, ConfigError) as error:
        problem = TaskFailed(str(error), "input")
    except OSError as error:
        problem = _system_problem(work, index, error)
    except Exception as error:
        problem = _defect(work, index, error)
    # Here, outside of the handlers: else the error, and the texts in it, would be its context.
    if problem is not None:
        raise problem


class StageExecutor(PipelineExecutor):
    """What both executors share: what a rank does, and how it is known to be done."""

    pipeline: list[Work]

    def is_rank_completed(self, rank: int) -> bool:
        return self.pipeline[0].open().is_done(rank)

    def get_incomplete_ranks(
        self, ranks: Any = None, skip_completed: bool | None = None
    ) -> list[int]:
        ranks = range(self.world_size) if ranks is None else ranks
        return [rank for rank in ranks if not self.is_rank_completed(rank)]

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        logger.disable("datatrove")
        perform(self.pipeline[0], rank)
        return PipelineStats()


class LocalStageExecutor(StageExecutor, LocalPipelineExecutor):
    """`workers` processes on this machine; one does everything in this process."""

    def __init__(self, stage: Stage, work: Work, workers: int) -> None:
        super().__init__(
            pipeline=[work],
            tasks=len(stage.tasks),
            workers=workers,
            logging_dir=str(stage.executor_folder.absolute()),
        )
        self.threads = max(1, available_cores() // self.workers)

    def run(self) -> None:
        if self.workers > 1:
            # Its import takes seconds: once for all processes of the run.
            multiprocess.set_forkserver_preload(["data_prep.pipeline"])
        with _noticing_dead_workers(self.pipeline[0].stage), _taking_forks_along():
            super().run()

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        if self.workers > 1:
            # Of the libraries that would take all cores.
            os.environ["RAYON_NUM_THREADS"] = str(self.threads)
            pa.set_cpu_count(self.threads)
        return super()._run_for_rank(rank, local_rank, node_rank)


@contextmanager
def _noticing_dead_workers(stage: str) -> Iterator[None]:
    """Raise TaskFailed when a worker process ends by itself: its pool would wait for ever.

    Such as one that the kernel kills when memory is short. The pool puts another in its place, but
    its task is lost. The thread that does so is woken by the end of any worker; it asks here first.
    """
    main = threading.main_thread().ident
    codes: list[int] = []
    join = Pool._join_exited_workers

    def noticing(workers: list[Any]) -> bool:
        # A worker that is told to end, at the end of the stage, ends with 0.
        found = [worker.exitcode for worker in workers if worker.exitcode]
        is_first = bool(found) and not codes
        codes.extend(found)
        if is_first and main is not None:
            signal.pthread_kill(main, signal.SIGUSR2)
        return bool(join(workers))

    def fail(*_: Any) -> None:
        # Unless an interruption or a task's error is ending the stage already.
        if not isinstance(sys.exc_info()[1], KeyboardInterrupt | SystemExit | TaskFailed):
            raise TaskFailed(f"a worker of stage {stage} {_ending(codes[0])}", "system")

    before = signal.signal(signal.SIGUSR2, fail)
    Pool._join_exited_workers = staticmethod(noticing)
    try:
        yield
    finally:
        Pool._join_exited_workers = staticmethod(join)
        signal.signal(signal.SIGUSR2, before)


def _ending(code: int) -> str:
    """How a process with this exit code ended, and what to do about it."""
    if code == -signal.SIGKILL:
        return (
            "was killed (SIGKILL); if memory was short (see dmesg), run the command again with "
            "fewer workers"
        )
    cause = f"exit status {code}" if code > 0 else signal.Signals(-code).name
    return (
        f"ended before its task ({cause}); run the command again, and with workers = 1 if it "
        "does so again, which shows the task"
    )


@contextmanager
def _taking_forks_along() -> Iterator[None]:
    """Let processes that are forked in the block end with this one, even if it is killed.

    datatrove's executor forks one that keeps its counters; it would live for ever, and hold the
    lock of the folder that it has inherited. (The workers are no forks of this process. They end
    with their task, for which `wait_for_workers` waits.)
    """
    _forks_end_with.append(os.getpid())
    try:
        yield
    finally:
        _forks_end_with.pop()


_forks_end_with: list[int] = []
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    if _forks_end_with:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != _forks_end_with[-1]:
            os._exit(1)
        _forks_end_with.clear()


os.register_at_fork(after_in_child=_end_with_parent)


def _system_problem(work: Work, index: int, error: OSError) -> TaskFailed:
    if error.filename is None or error.strerror is None:
        return _defect(work, index, error)
    return TaskFailed(
        f"{error.filename}: {error.strerror} (stage {work.stage}, task {index}); mend this and run "
        "the command again",
        "system",
    )


def _defect(work: Work, index: int, error: Exception) -> TaskFailed:
    """An error that nobody foresaw: its kind and its place, not its message."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_PROJECT)]
    place = ", ".join(f"{Path(f.filename).name}:{f.lineno} in {f.name}" for f in ours[-4:])
    name = type(error).__name__
    return TaskFailed(
        f"stage {work.stage}, task {index}: {name} at {place}; its message is not shown because it "
        "may quote a text. This is a defect of data_prep, please report it"
    )


@lru_cache(maxsize=1)
def _open(work: Work) -> Stage:
    """Kept because a process does many tasks of a stage."""
    from data_prep.pipeline import Pipeline

    stage = Pipeline.of_run(work.out_dir, work.run).stage(work.stage)
    if stage.key != work.key:
        raise InputError(f"{work.out_dir}: stage {work.stage} is another one now; run again")
    return stage
