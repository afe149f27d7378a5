"""Lines everywhere, and a bar below them where there is a terminal."""

import io

import pytest

from train.console import Console, amount, duration

RECORD = {
    "step": 10,
    "tokens": 12_345_678,
    "loss": 4.0,
    "tok_per_s": 423_000.4,
    "mfu": 0.412,
    "lr": 1e-3,
    "grad_norm": 1.0,
    "data_wait_s": 0.004,
    "data_wait_rank": 3,
    "step_s": 2.0,
    "skipped_steps": 0,
    "eta_s": 3723.0,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_has_step_tokens_loss_speed_mfu_and_time_left() -> None:
    out = io.StringIO()
    with Console(300, 1000, out) as console:
        console.step(10, 100, 90)
        console.train(RECORD)
        console.train({**RECORD, "mfu": None, "skipped_steps": 2, "data_wait_s": 0.5})
    first, second = out.getvalue().splitlines()
    assert first == (
        "step  10/300  12.35M tokens  loss 4.0000  423,000 tok/s  MFU 41.2%  lr 1.00e-03  "
        "grad 1.000  data wait 0.2%  left 1:02:03"
    )
    assert "MFU" not in second
    assert "data wait 25.0% of rank 3  skipped 2" in second


def test_a_terminal_has_a_bar_below_the_lines() -> None:
    out = Terminal()
    with Console(300, 1000, out) as console:
        console.train(RECORD)
        console.line("checkpoint: here")
        console.step(300, 1000, 12_345_999)
    text = out.getvalue()
    assert "checkpoint: here\n" in text
    last = text.rstrip("\n").rpartition("\r")[2]
    assert last.startswith("100 % |")
    for part in ("step 300/300", "12.35M tokens", "loss 4.0000", "MFU 41.2%", "left 1:02:03"):
        assert part in last


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999"), (1234, "1.23k"), (2.5e6, "2.50M"), (34_380_000_000, "34.38B")],
)
def test_amount(number: float, text: str) -> None:
    assert amount(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
