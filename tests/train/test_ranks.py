"""Who a process is, by the variables of each launcher."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.config import ConfigError
from common.files import only_user_of
from train.ranks import Ranks, choose_device, find_ranks, join, only_run_in, problem_of_any

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


@pytest.fixture
def see_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has this process see so many GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    return lambda number: monkeypatch.setattr(torch.cuda, "device_count", lambda: number)


@pytest.mark.parametrize(
    ("seen", "local_rank", "taken"), [(1, 0, 0), (1, 3, 0), (4, 0, 0), (4, 3, 3)]
)
def test_a_process_has_the_gpu_of_its_local_rank_or_the_one_it_sees(
    see_gpus: Callable[[int], None], seen: int, local_rank: int, taken: int
) -> None:
    """With `--gpus-per-task=1` each task's own GPU is number 0 to it."""
    see_gpus(seen)
    ranks = Ranks(rank=local_rank, local_rank=local_rank, size=4, local_size=4)
    assert choose_device(ranks) == torch.device("cuda", taken)


def test_more_processes_than_gpus_are_refused(see_gpus: Callable[[int], None]) -> None:
    see_gpus(2)
    with pytest.raises(ConfigError) as caught:
        choose_device(Ranks(rank=2, local_rank=2, size=4, local_size=4))
    message = str(caught.value)
    assert "process 3 of the run on" in message
    assert "sees 2 GPUs (CUDA_VISIBLE_DEVICES: 0,1)" in message
    assert "--gpus-per-node, neither --gpus-per-task nor --gpu-bind" in message


class Group:
    """A process group whose ranks have these GPUs, each given as machine and UUID."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gpus: list[tuple[str, str]]) -> None:
        monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **named: None)
        monkeypatch.setattr("train.ranks.gather", lambda mine: gpus)
        mine = SimpleNamespace(uuid=gpus[1][1])
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: mine)
        # What `join` sets is taken back at the end.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE"):
            monkeypatch.setenv(name, "")

    def join(self) -> None:
        join(Ranks(rank=1, local_rank=1, size=2, local_size=2), torch.device("cuda", 0))


def test_deepspeed_is_told_the_number_of_a_gpu_that_is_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Group(monkeypatch, [("node1", "aa"), ("node1", "bb")]).join()
    assert (os.environ["RANK"], os.environ["LOCAL_RANK"]) == ("1", "0")


def test_two_ranks_on_one_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where two processes are started on a machine with one."""
    with pytest.raises(ConfigError, match=r"^ranks 0 and 1 have the same GPU of node1; start at"):
        Group(monkeypatch, [("node1", "aa"), ("node1", "aa")]).join()


def test_a_port_in_use_is_said_with_how_to_give_another(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        # What `join` sets is taken back at the end.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE"):
            monkeypatch.setenv(name, "")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(ConfigError, match=rf"port {port}.* in use.*deepspeed --master_port N"):
            join(Ranks(rank=0, local_rank=0, size=2, local_size=2), torch.device("cpu"))
    assert not torch.distributed.is_initialized()


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
