"""The command line: what a user sees of a run that would be, and of one that cannot be."""

import re
from pathlib import Path
from typing import Any


def test_dry_run_prints_the_resolved_run_and_trains_nothing(
    launcher: Any, data_folder: Path
) -> None:
    config = launcher.write("dry", data_folder)
    done = launcher.run(1, "--config", str(config), "--dry-run", "phases.main.lr.peak=1e-3")
    assert done.code == 0, done.err
    for line in (
        "peak: 0.001",
        "model: 2 layers × 32, vocabulary 64, 20,736 parameters, fp32",
        "batch: 8 rows a step = 1 ranks × 4 micro-steps × 2 rows",
        "run: 12 steps, 6,144 token slots, phases: main",
        "phase main: 12 steps, 96 rows, 6,144 token slots",
        "source notes: 40 rows",
        '"gradient_accumulation_steps": 4',
    ):
        assert line in done.out
    assert not (launcher.folder / "dry").exists()


def test_one_process_trains_without_a_launcher(launcher: Any, data_folder: Path) -> None:
    config = launcher.write("alone", data_folder)
    done = launcher.run(1, "--config", str(config), "log.every_steps=5")
    assert done.code == 0, done.err
    run_dir = launcher.folder / "alone"
    steps = [record["step"] for record in launcher.records("alone", "train")]
    assert steps == [1, 4, 5, 6, 8, 10, 12]
    last = launcher.records("alone", "train")[-1]
    assert last["slots"] == 12 * 8 * 64
    assert 0 < last["tokens"] < last["slots"]
    assert re.search(rf"step 12/12  {last['tokens'] / 1000:.2f}k tokens  loss \d", done.out)
    assert not done.err, "nothing of DeepSpeed's or torch's noise"
    assert len(done.out.splitlines()) == 1 + 9 + 7 + 2 + 3, "start, phase, log, validation, …"
    assert not [path for path in run_dir.rglob("*") if path.stat().st_mode & 0o077], "private"


def test_what_a_user_can_put_right_is_one_line(launcher: Any, data_folder: Path) -> None:
    config = str(launcher.write("wrong", data_folder))
    for words, message in (
        (["phases.main.batch.micro_rows=3"], "does not divide batch.rows = 8; what fits"),
        (["init_from=nowhere"], "nowhere/config.json"),
    ):
        done = launcher.run(1, "--config", config, *words)
        assert done.code == 2
        assert done.err.startswith("error: ")
        assert message in done.err
        assert done.err.count("\n") == 1
        assert not done.out


def test_weights_that_are_not_finite_end_the_run_before_a_checkpoint(
    launcher: Any, data_folder: Path
) -> None:
    config = launcher.write("diverged", data_folder)
    done = launcher.run(
        1, "--config", str(config), "phases.main.lr.peak=1e30", "log.every_steps=12"
    )
    assert done.code == 2
    assert re.fullmatch(r"error: at step \d+ the norm of the update is \S+: .*\n", done.err)
    assert "lower phases.main.lr.peak" in done.err
    last = launcher.records("diverged", "train")[-1]
    assert f"at step {last['step']} the norm" in done.err, "what went wrong is on record"
    assert last["update_norm"] is None
    assert not (launcher.folder / "diverged" / "checkpoints").exists()
    assert launcher.records("diverged", "validation") == []


def test_every_rank_stops_and_one_says_why(launcher: Any) -> None:
    """Without --config, configs/base.yaml is run."""
    done = launcher.run(2, "phases.short.data.dir=nowhere")
    assert done.code == 2
    text = done.out + done.err
    assert text.count("error: nowhere is not a finished data set") == 1
    assert "python -m data_prep" in text
    assert "make demo" in text
    assert "Traceback" not in text
