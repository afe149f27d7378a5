"""Stages: lists of independent tasks, each done once, whatever interrupts them.

A stage has a folder for what its tasks write and a key, a hash of all that decides the content.
A finished task leaves a marker below `completions/<stage>/<key>/`, with its counts and the sizes of
its files; it is not done again while these are there. Under another key nothing of the stage is
valid any more: its folder is emptied first.
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

from common.files import write_json
from data_prep.document import InputError
from data_prep.shards import MANIFEST_NAME

SUMMARY_NAME = "summary.json"

Counts = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One piece of work.

    group: what the stage's summary adds the counts up by, such as the source.
    outputs: the files it writes, relative to the stage's folder, each whole or not at all.
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
    """A stage below `out_dir`: `run()` does all its tasks, `run_task(index)` one of them."""

    def __init__(self, out_dir: Path, name: str, key: str, tasks: Sequence[Task]) -> None:
        self.name = name
        self.tasks = tasks
        self.folder = out_dir / name
        self._all_markers = out_dir / "completions" / name
        self._markers = self._all_markers / key[:16]

    def run(self) -> list[Counts]:
        """Do what is not done yet, and write the summary; returns the counts of every task."""
        if not self.tasks:
            return []
        self.prepare()
        indexes = range(len(self.tasks))
        with tqdm(indexes, desc=self.name, unit="task", mininterval=0.5) as progress:
            counts = [self.run_task(index) for index in progress]
        self._write_summary(counts)
        return counts

    def prepare(self) -> None:
        """Make the folder, without what another key left there."""
        if self.is_stale():
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
        self.folder.mkdir(parents=True, exist_ok=True)

    def is_stale(self) -> bool:
        """Whether something was made here under another key."""
        if not self._all_markers.is_dir():
            return False
        return any(found != self._markers for found in self._all_markers.iterdir())

    def withdraw_manifest(self) -> None:
        """From here on the folder is no data set."""
        (self.folder / MANIFEST_NAME).unlink(missing_ok=True)

    def run_task(self, index: int) -> Counts:
        """Do task `index`, unless it is done; returns its counts."""
        task = self.tasks[index]
        marker = self._markers / f"{index:06d}.json"
        counts = self._finished(task, marker)
        if counts is None:
            if marker.is_file():
                found = f"{self.folder}: {task.outputs[0]}"
                tqdm.write(f"data_prep: {found} is not as it was left; made again", file=sys.stderr)
            for output in task.outputs:
                (self.folder / output).parent.mkdir(parents=True, exist_ok=True)
            counts = task.run()
            write_json(marker, {"counts": counts, "sizes": self._sizes(task)})
        return counts

    def _finished(self, task: Task, marker: Path) -> Counts | None:
        if not marker.is_file():
            return None
        record = json.loads(marker.read_text(encoding="utf-8"))
        return record["counts"] if record["sizes"] == self._sizes(task) else None

    def _sizes(self, task: Task) -> dict[str, int]:
        paths = {output: self.folder / output for output in task.outputs}
        return {name: path.stat().st_size for name, path in paths.items() if path.is_file()}

    def _write_summary(self, counts: Sequence[Counts]) -> None:
        groups: dict[str, Counter[str]] = {}
        for task, numbers in zip(self.tasks, counts, strict=True):
            added = {name: n for name, n in numbers.items() if isinstance(n, int)}
            groups.setdefault(task.group, Counter()).update(added)
        summary = {"stage": self.name, "tasks": len(self.tasks), "counts": groups}
        write_json(self.folder / SUMMARY_NAME, summary)
