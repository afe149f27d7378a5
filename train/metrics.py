"""What a run shows: a line on the console, a line in metrics.jsonl, points in TensorBoard.

One rank writes. A run that is taken up again continues its files: what was logged after the
checkpoint it continues from is cut off, so that no step appears twice.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from common.files import whole_file
from train.loader import Loader, StepCounts
from train.ranks import max_over_ranks, sum_over_ranks
from train.resolve import Run
from train.schedule import Progress, StepPlan

Record = dict[str, Any]


class Metrics:
    """Writes the records of a run; a context manager that closes its files."""

    def __init__(self, run_dir: Path, first_step: int, total_steps: int) -> None:
        """Continue the files of `run_dir` after `first_step`, the last step that counts."""
        path = run_dir / "metrics.jsonl"
        keep_until(path, first_step)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        self._total_steps = total_steps

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._board.close()

    def train(self, record: Record) -> None:
        """A training step: loss, lr, grad_norm, tok_per_s, …"""
        self._write({"kind": "train", **record})
        left = (self._total_steps - record["step"]) * record["step_s"]
        print(
            f"step {record['step']:>{len(str(self._total_steps))}}/{self._total_steps}  "
            f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  grad {record['grad_norm']:.3f}  "
            f"{record['tok_per_s']:,.0f} tok/s  data wait {record['data_wait_s']:.3f} s  "
            f"left {duration(left)}",
            flush=True,
        )

    def validation(self, record: Record) -> None:
        """A validation: loss and accuracy on masked tokens, in all and by source."""
        self._write({"kind": "validation", **record})
        parts = "  ".join(
            f"{name} {part['loss']:.4f}" for name, part in sorted(record["by_source"].items())
        )
        print(
            f"validation at step {record['step']}  loss {record['loss']:.4f}  "
            f"accuracy {record['accuracy']:.3f}  ({parts})",
            flush=True,
        )

    def _write(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in flatten(record):
            self._board.add_scalar(f"{record['kind']}/{name}", value, record["step"])
        self._board.flush()


class Interval:
    """Loss and speed over the steps since the last line of the log.

    The loss is exact: the sum of cross-entropy over all ranks and steps divided by their masked
    tokens. Sums stay on the device until the interval is closed.
    """

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self._loader, self._device = loader, device
        self.restart()

    def restart(self) -> None:
        """Begin the next interval here; what lies between a close and this is not measured."""
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        self._steps = self._masked_tokens = self._tokens = 0
        self._wait = self._loader.wait_seconds
        self._start = time.perf_counter()

    def add(self, loss_sum: Tensor, counts: StepCounts) -> None:
        """Add a step: this rank's sum of cross-entropy, and the counts over all ranks."""
        self._loss_sum += loss_sum
        self._steps += 1
        self._masked_tokens += counts.masked_tokens
        self._tokens += counts.tokens

    def close(self) -> Record:
        """Figures over all ranks; waits for the device. Every rank calls this."""
        loss_sum = float(sum_over_ranks(self._loss_sum))
        seconds = time.perf_counter() - self._start
        wait = torch.tensor(self._loader.wait_seconds - self._wait, dtype=torch.float64)
        return {
            "loss": loss_sum / self._masked_tokens,
            "masked_tokens": self._masked_tokens,
            "tok_per_s": self._tokens / seconds,
            "step_s": seconds / self._steps,
            # A step takes as long as its slowest rank.
            "data_wait_s": float(max_over_ranks(wait)) / self._steps,
        }


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


def keep_until(path: Path, step: int) -> None:
    """Drop the records of later steps than `step`, and a last line that was cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    with whole_file(path) as file:
        file.write("".join(kept).encode())


def flatten(record: Record, prefix: str = "") -> list[tuple[str, float]]:
    """The numbers of a record, those of inner records under names like by_source/pubmed/loss."""
    numbers: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, dict):
            numbers += flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            numbers.append((prefix + name, value))
    return numbers


def duration(seconds: float) -> str:
    """Seconds as 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
