"""Records reach their files once, and a run taken up again leaves no step twice."""

import io
import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.console import Console
from train.metrics import Metrics, Record, keep_until

TRAIN = {
    "loss": 4.0,
    "tokens": 90,
    "lr": 1e-3,
    "grad_norm": 1.0,
    "tok_per_s": 5.0,
    "padded_tok_per_s": 10.0,
    "mfu": None,
    "step_s": 2.0,
    "data_wait_s": 0.0,
    "data_wait_rank": 0,
    "skipped_steps": 0,
    "pause_s": 0.0,
}


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_metrics(folder: Path, first_step: int, stream: io.StringIO | None = None) -> Metrics:
    """Steps of 10 slots, 30 of them; begun. stream: where lines go."""
    metrics = Metrics(folder, first_step, 300, Console(30, 300, stream or io.StringIO()))
    metrics.start({"step": first_step, "slots": 10 * first_step})
    return metrics


def record(step: int, **changes: object) -> Record:
    return {"step": step, "slots": 10 * step, **TRAIN, **changes}


def test_records_reach_file_and_board(tmp_path: Path) -> None:
    part = {"loss": 3.5, "accuracy": 0.25, "masked_tokens": 9}
    with make_metrics(tmp_path, 0) as metrics:
        metrics.train(record(10))
        metrics.validation({"step": 10, **part, "by_source": {"notes": part}})
    start, first, second = read(tmp_path / "metrics.jsonl")
    times = [r.pop("time") for r in (start, first, second)]
    assert times == sorted(times)
    assert start == {"kind": "start", "step": 0, "slots": 0}
    assert first == {"kind": "train", **record(10), "eta_s": 20.0}
    assert second["kind"] == "validation"
    assert second["by_source"] == {"notes": part}
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(10, 4.0)]
    assert board.Scalars("validation/by_source/notes/accuracy")[0].value == 0.25
    assert "train/mfu" not in board.Tags()["scalars"], "what is not known has no curve"


def test_time_left_knows_of_pauses(tmp_path: Path) -> None:
    with make_metrics(tmp_path, 10) as metrics:
        metrics.train(record(15, pause_s=100.0))
        metrics.train(record(20, padded_tok_per_s=20.0))
    first, second = (r["eta_s"] for r in read(tmp_path / "metrics.jsonl") if r["kind"] == "train")
    assert first == pytest.approx(150 / 10 + 150 * 100 / 50)
    assert second == pytest.approx(100 / 20 + 100 * 100 / 100)


def test_a_run_taken_up_again_replaces_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    with make_metrics(tmp_path, 0) as metrics:
        for step in (10, 20, 30):
            metrics.train(record(step))
    with make_metrics(tmp_path, 10) as metrics:
        metrics.train(record(20, loss=3.0))
    assert [(r["kind"], r["step"], r.get("loss")) for r in read(tmp_path / "metrics.jsonl")] == [
        ("start", 0, None),
        ("train", 10, 4.0),
        ("start", 10, None),
        ("train", 20, 3.0),
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(10, 4.0), (20, 3.0)]


def test_what_is_not_finite_is_null_and_no_point(tmp_path: Path) -> None:
    """A step that was left out has a gradient of infinite norm."""
    part = {"loss": math.nan, "accuracy": 0.0}
    stream = io.StringIO()
    with make_metrics(tmp_path, 0, stream) as metrics:
        metrics.train(record(10))
        metrics.train(record(20, grad_norm=math.inf, skipped_steps=1))
        metrics.validation({"step": 20, **part, "by_source": {"notes": part}})
    assert "grad inf" in stream.getvalue(), "the console says it"

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    *_, second, last = (json.loads(line, parse_constant=refuse) for line in text.splitlines())
    assert second["grad_norm"] is None
    assert last["loss"] is None
    assert last["by_source"] == {"notes": {"loss": None, "accuracy": 0.0}}
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/grad_norm")] == [(10, 1.0)]
    assert [e.step for e in board.Scalars("train/skipped_steps")] == [10, 20]


def lines(*steps: int) -> str:
    """Lines of records of these steps."""
    return "".join(f'{{"kind": "train", "step": {step}}}\n' for step in steps)


def test_a_line_cut_short_is_dropped(tmp_path: Path) -> None:
    """A process that is killed may leave one; there is nothing to say about that."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1, 2) + '{"kind": "tr')
    assert keep_until(path, 5) == ""
    assert path.read_text() == lines(1, 2)
    assert keep_until(path, 0) == ""
    assert path.read_text() == ""
    assert keep_until(tmp_path / "absent.jsonl", 0) == ""
    assert not (tmp_path / "absent.jsonl").exists()


@pytest.mark.parametrize(
    "line",
    [b"\0" * 40, b"", b'{"kind": "train", "st', b"\xff\xfe", b"17", b'{"kind": "train"}'],
    ids=["NULs", "empty", "half", "no text", "no record", "no step"],
)
def test_what_is_no_record_is_the_end_of_what_can_be_used(tmp_path: Path, line: bytes) -> None:
    """And it is said; a run goes on all the same."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(10, 20).encode() + line + b"\n" + lines(30, 40).encode())
    stream = io.StringIO()
    with make_metrics(tmp_path, 30, stream) as metrics:
        metrics.train(record(40))
    found = [(r["kind"], r["step"]) for r in read(path)]
    assert found == [("train", 10), ("train", 20), ("start", 30), ("train", 40)]
    warning, *_ = stream.getvalue().splitlines()
    assert warning == (
        f"warning: {path}: line 3 of 5 is no record, as after a crash of the machine; it and those "
        "behind it are left out"
    )


def test_records_are_put_on_disk_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []
    path = tmp_path / "metrics.jsonl"
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(path.read_bytes()))
    with make_metrics(tmp_path, 0) as metrics:
        metrics.train(record(10))
        assert not synced
        metrics.sync()
    assert synced == [path.read_bytes()]
