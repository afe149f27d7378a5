"""What a run says on the console: lines and, on a terminal, a bar below them."""

import sys
from typing import IO, Any

from tqdm import tqdm

Record = dict[str, Any]

MUCH = 0.01
"""the share of a step from which on it is said which rank waited for data"""
_SCALES = (("B", 1e9), ("M", 1e6), ("k", 1e3))


class Console:
    """Prints lines; where they go to a terminal, a bar with the run's state stays below them.

    A context manager. The bar follows every step by what the host knows; figures that the device
    has to be asked for are those of the last record.
    """

    def __init__(self, last_step: int, last_slot: int, stream: IO[str] | None = None) -> None:
        """last_step, last_slot: those of the whole run; stream: standard output."""
        self._stream = stream or sys.stdout
        self._last_step, self._last_slot = last_step, last_slot
        self._figures = ""
        self._bar: tqdm | None = None

    def __enter__(self) -> "Console":
        if self._stream.isatty():
            self._bar = tqdm(
                total=self._last_slot,
                file=self._stream,
                bar_format="{percentage:3.0f} % |{bar:20}| {desc}",
                dynamic_ncols=True,
                mininterval=0.2,
                miniters=1,
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def line(self, text: str) -> None:
        """Print a line, above the bar."""
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.write(text, file=self._stream)

    def step(self, step: int, slots: int, tokens: int) -> None:
        """A step is handed to the device; slots, tokens: those of the run up to its end."""
        if self._bar is not None:
            text = f"{self._place(step)}  {amount(tokens)} tokens{self._figures}"
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(slots - self._bar.n)

    def train(self, record: Record) -> None:
        """The line of a training step's record."""
        mfu = "" if record["mfu"] is None else f"  MFU {record['mfu']:.1%}"
        left = f"left {duration(record['eta_s'])}"
        loss = "none finite" if record["loss"] is None else f"{record['loss']:.4f}"
        speed = f"loss {loss}  {record['tok_per_s']:,.0f} tok/s{mfu}"
        self._figures = f"  {speed}  {left}"
        wait = record["data_wait_s"] / record["step_s"]
        rank = f" of rank {record['data_wait_rank']}" if wait >= MUCH else ""
        skipped = f"  skipped {record['skipped_steps']}" if record["skipped_steps"] else ""
        self.line(
            f"{self._place(record['step'])}  {amount(record['tokens'])} tokens  {speed}  "
            f"lr {record['lr']:.2e}  grad {record['grad_norm']:.3f}  data wait {wait:.1%}"
            f"{rank}{skipped}  {left}"
        )

    def validation(self, record: Record) -> None:
        """The line of a validation's record."""
        parts = "  ".join(
            f"{name} {part['loss']:.4f}" for name, part in sorted(record["by_source"].items())
        )
        self.line(
            f"validation at step {record['step']}  loss {record['loss']:.4f}  "
            f"accuracy {record['accuracy']:.3f}  ({parts})"
        )

    def _place(self, step: int) -> str:
        return f"step {step:>{len(str(self._last_step))}}/{self._last_step}"


def amount(number: float) -> str:
    """A count in thousands, millions or billions: 1.23M."""
    for letter, scale in _SCALES:
        if number >= scale:
            return f"{number / scale:.2f}{letter}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Seconds as 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
