"""Who a process is, by the variables of each launcher."""

import os
from pathlib import Path

import pytest

from common.config import ConfigError
from common.files import only_user_of
from train.ranks import Ranks, find_ranks, only_run_in, problem_of_any

MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_NTASKS_PER_NODE": "4",
}


def test_alone() -> None:
    assert find_ranks({}) == Ranks(rank=0, local_rank=0, size=1, local_size=1)


def test_deepspeed_and_torchrun() -> None:
    own = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", **MEETING}
    expected = Ranks(rank=3, local_rank=1, size=4, local_size=2)
    assert find_ranks(own | {"LOCAL_SIZE": "2"}) == expected
    assert find_ranks(own | {"LOCAL_WORLD_SIZE": "2"}) == expected
    assert find_ranks(own | {"LOCAL_SIZE": "2"} | SLURM) == expected


def test_slurm() -> None:
    assert find_ranks(SLURM | MEETING) == Ranks(rank=5, local_rank=1, size=8, local_size=4)


def test_the_shell_of_a_batch_job_is_alone() -> None:
    assert find_ranks(SLURM) == Ranks()


def test_a_missing_variable_is_named() -> None:
    with pytest.raises(ConfigError, match="MASTER_PORT"):
        find_ranks(SLURM | {"MASTER_ADDR": "node1"})


@pytest.mark.parametrize(
    ("problems", "said"),
    [(["", ""], ""), (["no data", "no data"], "no data"), (["", "no data"], "rank 1: no data")],
)
def test_a_problem_of_one_rank_is_everybodys(
    problems: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.ranks.gather", lambda problem: problems)
    for problem in problems:
        assert problem_of_any(problem) == said


@pytest.mark.usefixtures("joined")
def test_one_run_at_a_time_has_a_run_dir(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    refusal = rf"run_dir: {run_dir} is in use by process {os.getpid()} on .*choose another folder"
    with only_run_in(run_dir, Ranks()):
        with pytest.raises(ConfigError, match=refusal), only_run_in(run_dir, Ranks()):
            pass
    with only_user_of(run_dir), pytest.raises(ConfigError, match=refusal):
        only_run_in(run_dir, Ranks()).__enter__()
    with only_run_in(run_dir, Ranks()):
        pass
