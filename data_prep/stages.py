"""Stages: lists of independent tasks, each done once, whatever interrupts them.

A stage has a folder for what its tasks write and a key, a hash of all that decides the content.
A finished task leaves a marker below `completions/<stage>/<key>/`, with its counts and the sizes of
its files; it is not done again while these are there. A marker is the number of a task, so a hash
of the list of tasks lies beside them. Under another key, or for another list, nothing of the stage
is valid any more: its folder is emptied first. `data_prep.executors` runs the tasks.
"""

import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.files import whole_file, working_in, write_json
from data_prep.document import InputError
from data_prep.shards import MANIFEST_NAME

SUMMARY_NAME = "summary.json"

Counts = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One piece of work.

    group: what the stage's summary adds the counts up by, such as the source.
    outputs: the files it writes, relative to the stage's folder, each whole or not at all; `*`
    stands for numbers that are known only once it has run.
    run: does it, without regard to other tasks; returns counts (and nothing that is text).
    """

    group: str
    outputs: tuple[str, ...]
    run: Callable[[], Counts]


def stage_key(name: str, **settings: Any) -> str:
    """The hash of what decides a stage's content: its settings and the keys it builds on."""
    text = json.dumps([name, settings], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Stage:
    """A stage below `out_dir`: `prepare()`, then each task's `run_task(index)`, then `finish()`.

    The tasks may run in any order and in any process; `prepare` and `finish` must not run while
    one of them does.
    """

    def __init__(self, out_dir: Path, name: str, key: str, tasks: Sequence[Task]) -> None:
        self.name = name
        self.key = key
        self.tasks = tasks
        self.folder = out_dir / name
        self._out_dir = out_dir
        self._all_markers = out_dir / "completions" / name
        self._markers = self._all_markers / key[:16]
        self._task_list = self._markers / "tasks.sha256"

    @property
    def executor_folder(self) -> Path:
        """Where an executor may keep its records of this stage: they go with its markers."""
        return self._markers / "executor"

    def prepare(self) -> None:
        """Make the folder, without what another key left there."""
        other_tasks = self._has_other_tasks()
        if other_tasks:
            text = (
                f"data_prep: {self.folder}: the work is divided otherwise than before; made again"
            )
            tqdm.write(text, file=sys.stderr)
        if other_tasks or self.is_stale():
            self.withdraw_manifest()
            if self.folder.exists():
                shutil.rmtree(self.folder)
            shutil.rmtree(self._all_markers)
        if not self._markers.exists() and self.folder.is_dir() and any(self.folder.iterdir()):
            raise InputError(
                f"{self.folder} holds files that data_prep has no record of; move it away or "
                "choose another out_dir"
            )
        self._markers.mkdir(parents=True, exist_ok=True)
        if not self._task_list.is_file():
            with whole_file(self._task_list) as file:
                file.write(self._tasks_hash())
        self.folder.mkdir(parents=True, exist_ok=True)

    def is_stale(self) -> bool:
        """Whether something was made here under another key."""
        if not self._all_markers.is_dir():
            return False
        return any(found != self._markers for found in self._all_markers.iterdir())

    def _has_other_tasks(self) -> bool:
        """Whether the markers of this key are of another list of tasks, or of no known one."""
        if not self._task_list.is_file():
            return self.number_done() > 0
        return self._task_list.read_bytes() != self._tasks_hash()

    def _tasks_hash(self) -> bytes:
        tasks = [[task.group, task.outputs] for task in self.tasks]
        return stage_key(self.name, tasks=tasks).encode()

    def withdraw_manifest(self) -> None:
        """From here on the folder is no data set."""
        (self.folder / MANIFEST_NAME).unlink(missing_ok=True)

    def is_done(self, index: int) -> bool:
        """Whether task `index` is done and its files are as it left them."""
        return self._finished(index) is not None

    def number_done(self) -> int:
        """How many tasks have left a marker, which is quick to ask."""
        return sum(1 for _ in self._markers.glob("*.json"))

    def run_task(self, index: int) -> None:
        """Do task `index`, unless it is done."""
        if self.is_done(index):
            return
        task, marker = self.tasks[index], self._marker(index)
        with working_in(self._out_dir):
            if marker.is_file():
                found = f"{self.folder}: {task.outputs[0]}"
                tqdm.write(f"data_prep: {found} is not as it was left; made again", file=sys.stderr)
            for output in task.outputs:
                (self.folder / output).parent.mkdir(parents=True, exist_ok=True)
            counts = task.run()
            write_json(marker, {"counts": counts, "sizes": self.sizes(index)})

    def finish(self) -> list[Counts]:
        """Write the summary once all tasks are done; returns the counts of each."""
        counts = [self._record(index)["counts"] for index in range(len(self.tasks))]
        groups: dict[str, Counter[str]] = {}
        for task, numbers in zip(self.tasks, counts, strict=True):
            added = {name: n for name, n in numbers.items() if isinstance(n, int)}
            groups.setdefault(task.group, Counter()).update(added)
        summary = {"stage": self.name, "tasks": len(self.tasks), "counts": groups}
        write_json(self.folder / SUMMARY_NAME, summary)
        return counts

    def _finished(self, index: int) -> Counts | None:
        if not self._marker(index).is_file():
            return None
        record = self._record(index)
        return record["counts"] if record["sizes"] == self.sizes(index) else None

    def _marker(self, index: int) -> Path:
        return self._markers / f"{index:06d}.json"

    def _record(self, index: int) -> dict[str, Any]:
        return json.loads(self._marker(index).read_text(encoding="utf-8"))

    def sizes(self, index: int) -> dict[str, int]:
        """The bytes of each file that task `index` has written, by its path in the folder."""
        paths = [path for output in self.tasks[index].outputs for path in self._files(output)]
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in paths}

    def _files(self, output: str) -> list[Path]:
        path = self.folder / output
        if "*" in path.name:
            return sorted(path.parent.glob(path.name))
        return [path] if path.is_file() else []


def summed_counts(out_dir: Path, name: str) -> dict[str, dict[str, int]]:
    """The counts of a finished stage by group, from its summary."""
    summary = json.loads((out_dir / name / SUMMARY_NAME).read_text(encoding="utf-8"))
    return summary["counts"]
