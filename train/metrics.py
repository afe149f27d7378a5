"""What a run records: a line in metrics.jsonl, points in TensorBoard, a line on the console.

One rank writes. A run that is taken up again continues its files: what was logged after the
checkpoint it continues from is cut off, so that no step appears twice. docs/training.md lists the
keys of every record.

What is not finite, such as the norm of the gradient of a step that was left out, is null there, for
JSON knows no infinity, and no point in TensorBoard; the console says it.
"""

import itertools
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from common.files import whole_file
from train.console import Console
from train.records import Record, read_records
from train.resolve import Run
from train.schedule import Progress, StepPlan


class Metrics:
    """Writes the records of a run; a context manager that closes its files."""

    def __init__(self, run_dir: Path, first_step: int, last_slot: int, console: Console) -> None:
        """Continue the files of `run_dir` after `first_step`, the last step that counts.

        last_slot: the token slots of the whole run.
        """
        path = run_dir / "metrics.jsonl"
        if warning := keep_until(path, first_step):
            console.line(f"warning: {warning}")
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        self._last_slot, self._console = last_slot, console
        self._first_slot: int | None = None
        self._pauses = 0.0

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._board.close()

    def start(self, record: Record) -> None:
        """A process takes up the run after `step`: on what, and in what way."""
        self._first_slot = record["slots"]
        self._write("start", record)

    def train(self, record: Record) -> None:
        """A training step: counters, loss, norms, speed, waits, memory."""
        record = {**record, "eta_s": self._left(record)}
        self._write("train", record)
        self._console.train(record)

    def validation(self, record: Record) -> None:
        """A validation: loss and accuracy on masked tokens, in all and by source."""
        self._write("validation", record)
        self._console.validation(record)

    def sync(self) -> None:
        """Return once `metrics.jsonl` is on disk: before a checkpoint that continues it is."""
        os.fsync(self._file.fileno())

    def _left(self, record: Record) -> float:
        """Seconds to the end of the run at the speed of the last steps and with as many pauses."""
        assert self._first_slot is not None, "start comes first"
        self._pauses += record["pause_s"]
        paused = self._pauses / (record["slots"] - self._first_slot)
        return float(self._last_slot - record["slots"]) * (1 / record["padded_tok_per_s"] + paused)

    def _write(self, kind: str, record: Record) -> None:
        record = only_finite(record)
        line = json.dumps({"kind": kind, "time": time.time(), **record}, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()
        if kind == "start":
            return
        for name, value in flatten(record):
            self._board.add_scalar(f"{kind}/{name}", value, record["step"])
        self._board.flush()


def counters(run: Run, plan: StepPlan, progress: Progress) -> Record:
    """The part of a record that follows from the counters alone.

    sources: what has been read so far of each, in real tokens and in epochs.
    """
    epochs = run.epochs_read(progress)
    tokens = progress.tokens_by_source
    return {
        "step": plan.step,
        "phase": plan.phase,
        "slots": plan.slots,
        "tokens": progress.all_tokens,
        "phase_tokens": progress.tokens_of(plan.phase),
        "rows_per_step": plan.rows,
        "lr": plan.rates.lr,
        "mask_rate": plan.mask_rate,
        "sources": {
            name: {"tokens": tokens[name], "epochs": epochs[name]} for name in sorted(tokens)
        },
    }


def keep_until(path: Path, step: int) -> str:
    """Drop the records of later steps than `step`, and what is no record with all behind it.

    Returns a warning, "" where there is nothing to warn of.
    """
    if not path.exists():
        return ""
    lines, warning = read_records(path)
    kept = itertools.takewhile(lambda entry: entry[1]["step"] <= step, lines)
    with whole_file(path) as file:
        file.write(b"".join(line for line, _ in kept))
    return warning


def only_finite(record: Record) -> Record:
    """The record, and those within, with None for infinities and for what is no number."""

    def value_of(value: Any) -> Any:
        if isinstance(value, dict):
            return only_finite(value)
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: value_of(value) for name, value in record.items()}


def flatten(record: Record, prefix: str = "") -> list[tuple[str, float]]:
    """The numbers of a record, those of inner records under names like by_source/pubmed/loss."""
    numbers: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, dict):
            numbers += flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            numbers.append((prefix + name, value))
    return numbers
