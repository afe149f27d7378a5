"""Records reach their files once, and a run taken up again leaves no step twice."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.metrics import Metrics, Record, duration, keep_until

TRAIN = {
    "slots": 10,
    "loss": 4.0,
    "lr": 1e-3,
    "grad_norm": 1.0,
    "tok_per_s": 100.0,
    "step_s": 2.0,
    "data_wait_s": 0.0,
}


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_reach_file_board_and_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = {"loss": 3.5, "accuracy": 0.25, "masked_tokens": 9}
    with Metrics(tmp_path, 0, total_steps=30) as metrics:
        metrics.train({"step": 10, **TRAIN})
        metrics.validation({"step": 10, **part, "by_source": {"notes": part}})
    first, second = read(tmp_path / "metrics.jsonl")
    assert first == {"kind": "train", "step": 10, **TRAIN}
    assert second["kind"] == "validation"
    assert second["by_source"] == {"notes": part}
    out = capsys.readouterr().out
    assert "step 10/30  loss 4.0000  lr 1.00e-03" in out
    assert "left 0:00:40" in out
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(10, 4.0)]
    assert board.Scalars("validation/by_source/notes/accuracy")[0].value == 0.25


def test_a_run_taken_up_again_replaces_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    with Metrics(tmp_path, 0, 30) as metrics:
        for step in (10, 20, 30):
            metrics.train({"step": step, **TRAIN})
    with Metrics(tmp_path, 10, 30) as metrics:
        metrics.train({"step": 20, **TRAIN, "loss": 3.0})
    assert [(r["step"], r["loss"]) for r in read(tmp_path / "metrics.jsonl")] == [
        (10, 4.0),
        (20, 3.0),
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(10, 4.0), (20, 3.0)]


def test_a_line_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    keep_until(path, 5)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    keep_until(path, 0)
    assert path.read_text() == ""
    keep_until(tmp_path / "absent.jsonl", 0)
    assert not (tmp_path / "absent.jsonl").exists()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
