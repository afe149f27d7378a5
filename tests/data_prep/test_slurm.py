"""SLURM's commands, as far as they can be had without a cluster (`tests/slurm` starts one)."""

import re
import subprocess
from pathlib import Path
from typing import Any

import datatrove.executor.slurm as datatrove_slurm
import pytest
from datatrove.utils.stats import PipelineStats

from common.config import ConfigError, load_config
from data_prep import slurm
from data_prep.config import DataPrep
from data_prep.executors import TaskFailed, Work
from data_prep.stages import Stage, Task


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


def answering(monkeypatch: pytest.MonkeyPatch, stdout: str, stderr: str = "") -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command == ["scontrol", "show", "config"]
        return subprocess.CompletedProcess(command, bool(stderr), stdout, stderr)

    monkeypatch.setattr(subprocess, "run", run)


def test_arrays_are_as_long_as_the_cluster_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, "MaxArrayTasks = 7\nMaxArraySize            = 1001\nMaxJobCount = 9\n")
    assert slurm._largest_array() == 1001


@pytest.mark.parametrize(
    ("stdout", "stderr"), [("MaxArraySize = 0\n", ""), ("", "Unable to contact controller\n")]
)
def test_a_cluster_without_arrays_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch, stdout: str, stderr: str
) -> None:
    answering(monkeypatch, stdout, stderr)
    with pytest.raises(TaskFailed, match=rf"MaxArraySize above 0.*{stderr.strip()}") as caught:
        slurm._largest_array()
    assert isinstance(caught.value.as_raised(), OSError)


class Recording(slurm.SlurmStageExecutor):
    """Whose rank does nothing but note itself."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        with (self.failures.parent / "done").open("a") as file:
            file.write(f"{rank}\n")
        return PipelineStats()


def test_2500_tasks_are_three_arrays_that_do_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What sbatch is given, and what each job of it does: the default limit of 1,001 a time."""
    tasks = [Task("a", (f"{n}.txt",), dict) for n in range(2500)]
    stage = Stage(tmp_path, "many", "0" * 64, tasks)
    stage.prepare()
    config = DataPrep(out_dir=tmp_path, executor="slurm", workers=None)
    executor = Recording(stage, Work(tmp_path, "run", "many", stage.key), config)
    arrays: list[tuple[int, int]] = []

    def submit(script: str, retriever: object, *arguments: str) -> str:
        (last,) = re.findall(r"#SBATCH --array=0-(\d+)$", script, re.MULTILINE)
        offset = re.search(r"RUN_OFFSET=(\d+)", arguments[0])
        assert offset is not None
        arrays.append((int(last), int(offset[1])))
        return str(len(arrays))

    monkeypatch.setattr(datatrove_slurm, "launch_slurm_job", submit)
    monkeypatch.setattr(slurm, "_largest_array", lambda: 1001)
    monkeypatch.setattr(slurm, "_wait_for_jobs", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda program: program)
    monkeypatch.setattr(
        Recording, "get_incomplete_ranks", lambda self, *_, **__: list(range(0 if arrays else 2500))
    )
    executor.run()
    assert [offset for _, offset in arrays] == [0, 1, 2]
    assert max(last for last, _ in arrays) == 1000
    for last, offset in arrays:
        monkeypatch.setenv("RUN_OFFSET", str(offset))
        for index in range(last + 1):
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(index))
            executor.run()
    done = (executor.failures.parent / "done").read_text().split()
    assert sorted(map(int, done)) == list(range(2500))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("slurm.time=24:00:00", r"^slurm\.time .* read as 86400; quote it: time: '24:00:00'"),
        ("slurm.time=90", "read as 90; quote it"),
        ("slurm.time=null", "read as None; quote it"),
        ("slurm.time=25h", "time is '25h'; SLURM's forms are"),
        ("slurm.time='1:90:00'", "time is '1:90:00'"),
    ],
)
def test_a_time_that_is_none_is_refused(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(DataPrep, "data_prep", None, [word])


@pytest.mark.parametrize(
    "time", ["'90'", "02:00:00", "'24:00:00'", "1-12", "7-00:00:00", "'30:00'", "UNLIMITED"]
)
def test_slurms_forms_of_a_time_are_taken(time: str) -> None:
    read = load_config(DataPrep, "data_prep", None, [f"slurm.time={time}"])
    assert read.slurm.time == time.strip("'")
