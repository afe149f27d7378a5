"""A run whose folder is copied at every point of saving a checkpoint; started by launched.py.

What a process leaves that is killed is what lies on disk at that moment: such a copy.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from train import checkpoint, loop
from train.metrics import Metrics
from train.ranks import Ranks
from train.resolve import Run
from train.schedule import Progress

STEP = 6
"""of the checkpoint whose saving is watched"""
NAME = f"step_{STEP:08d}"


def main(run: Run, ranks: Ranks, device: torch.device) -> None:
    """Train `run`; and again, from the copy at the point `over`, its newest checkpoint damaged.

    Copies lie beside its folder, by the names of their points, those of the second run behind
    `again`.
    """
    folder = run.config.run_dir
    again = folder.with_name("again")

    def copy(run_dir: Path, to: str) -> None:
        shutil.copytree(run_dir, folder.with_name(to))

    with pytest.MonkeyPatch.context() as patch:
        watch(patch, lambda name: copy(folder, name))
        loop.train(run, ranks, device)
    shutil.copytree(folder.with_name("over"), again)
    (state,) = (again / "checkpoints" / NAME).rglob("*model_states.pt")
    state.write_bytes(b"damaged")
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, lambda name: copy(again, f"again {name}"))
        config = dataclasses.replace(run.config, run_dir=again)
        loop.train(dataclasses.replace(run, config=config), ranks, device)


def watch(patch: pytest.MonkeyPatch, seen: Callable[[str], None]) -> None:
    """Have `seen` called with the name of each point when it is first reached."""
    plain_save, plain_flush = checkpoint.save, checkpoint._flush
    plain_complete, plain_remove = checkpoint._complete, checkpoint._remove
    plain_put_aside = checkpoint.put_aside
    plain_rename, plain_rmtree, plain_log = Path.rename, shutil.rmtree, Metrics.train
    reached: set[str] = set()
    saved = [STEP]
    """the step whose checkpoint was begun last"""

    def point(name: str) -> None:
        if saved[0] == STEP and name not in reached:
            reached.add(name)
            seen(name)

    def put_aside(path: Path) -> Path:
        aside = plain_put_aside(path)
        point("one put aside")
        return aside

    def save(engine: Any, run: Run, ranks: Ranks, progress: Progress) -> Path:
        saved[0] = progress.step
        point("begun")
        path = plain_save(engine, run, ranks, progress)
        point("over")
        return path

    def flush(path: Path) -> str:
        point("saved by DeepSpeed")
        return plain_flush(path)

    def complete(*arguments: Any) -> None:
        point("flushed")
        plain_complete(*arguments)
        point("completed")

    def rename(path: Path, target: Path) -> Path:
        result = plain_rename(path, target)
        if target.name == NAME:
            point("renamed")
        return result

    def rmtree(path: Path, **more: Any) -> None:
        plain_rmtree(path / checkpoint.DEEPSPEED_FOLDER, ignore_errors=True)
        point("one half removed")
        plain_rmtree(path, **more)

    def remove(path: Path) -> None:
        plain_remove(path)
        point("one removed")

    def log(metrics: Metrics, record: dict[str, Any]) -> None:
        plain_log(metrics, record)
        if record["step"] > STEP:
            point("a step logged since")

    patch.setattr(checkpoint, "put_aside", put_aside)
    patch.setattr(checkpoint, "save", save)
    patch.setattr(checkpoint, "_flush", flush)
    patch.setattr(checkpoint, "_complete", complete)
    patch.setattr(checkpoint, "_remove", remove)
    patch.setattr(shutil, "rmtree", rmtree)
    patch.setattr(Path, "rename", rename)
    patch.setattr(Metrics, "train", log)
