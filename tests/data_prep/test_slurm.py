"""SLURM's commands, as far as they can be had without a cluster (`tests/slurm` starts one)."""

import subprocess
from typing import Any

import pytest

from data_prep import slurm


def test_a_controller_that_never_answers_is_an_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, waited = [], []

    def failing(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command[0])
        return subprocess.CompletedProcess(command, 1, "", "slurm_load_jobs error\n")

    monkeypatch.setattr(subprocess, "run", failing)
    monkeypatch.setattr("time.sleep", waited.append)
    with pytest.raises(OSError, match=r"squeue has failed .* `scontrol ping`.* submit again"):
        slurm._jobs()
    assert set(asked) == {"squeue"}
    assert sum(waited) == 3600
    assert "slurm_load_jobs error" in capsys.readouterr().err


def test_a_controller_that_answers_again_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(1, ""), (1, ""), (0, "7 data_prep.a\n7 data_prep.a\n8 b c\n")]

    def some(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, *answers.pop(0), "")

    monkeypatch.setattr(subprocess, "run", some)
    monkeypatch.setattr("time.sleep", lambda _: None)
    assert slurm._jobs() == [("7", "data_prep.a"), ("8", "b c")]
