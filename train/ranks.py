"""The processes of a run: who this one is, on which device, and how all of them agree.

The same `train/main.py` is started by `deepspeed` (or torchrun), by `srun` with MASTER_ADDR and
MASTER_PORT exported, or plainly as a single process.
"""

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from common.config import ConfigError
from common.files import only_user_of

T = TypeVar("T")

_ONE_EACH = (
    "start at most one process a GPU. Under srun let every task see all GPUs of its node "
    "(--gpus-per-node, neither --gpus-per-task nor --gpu-bind; leave CUDA_VISIBLE_DEVICES to "
    "SLURM), or bind one to each (--gpus-per-task=1)"
)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    """processes of the run"""
    local_size: int = 1
    """processes of the run on this machine"""

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0


def find_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """From the variables of a launcher: RANK, WORLD_SIZE, …, else SLURM's with MASTER_ADDR.

    SLURM_PROCID alone is no proof of a parallel run: the shell of a batch job has it too.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")
    elif "SLURM_PROCID" in environment and "MASTER_ADDR" in environment:
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "")
    else:
        return Ranks()
    rank, local_rank, size, *local_sizes = names
    for needed in (rank, local_rank, size, "MASTER_ADDR", "MASTER_PORT"):
        if needed not in environment:
            raise ConfigError(f"the launcher set {rank} but not {needed}; export it")
    total = int(environment[size])
    local = next((environment[name] for name in local_sizes if name in environment), str(total))
    return Ranks(
        rank=int(environment[rank]),
        local_rank=int(environment[local_rank]),
        size=total,
        local_size=int(local),
    )


def choose_device(ranks: Ranks) -> torch.device:
    """This rank's GPU, or the CPU where there is none or DS_ACCELERATOR=cpu asks for it.

    A process that sees one GPU has that one: SLURM may bind one to each task, which is then number
    0 to each of them. Whether two have the same, `join` finds out. One that sees several takes that
    of its local rank. Tells DeepSpeed, which must not guess otherwise, and gives a CPU rank its
    share of the cores. Raises ConfigError where there is no GPU for this process.
    """
    on_gpu = os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available()
    os.environ["DS_ACCELERATOR"] = "cuda" if on_gpu else "cpu"
    if on_gpu:
        seen = torch.cuda.device_count()
        if 1 < seen <= ranks.local_rank:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
            raise ConfigError(
                f"process {ranks.local_rank + 1} of the run on {socket.gethostname()} sees {seen} "
                f"GPUs (CUDA_VISIBLE_DEVICES: {visible}); {_ONE_EACH}"
            )
        device = torch.device("cuda", 0 if seen == 1 else ranks.local_rank)
        torch.cuda.set_device(device)
        return device
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // ranks.local_size))
    return torch.device("cpu")


def join(ranks: Ranks, device: torch.device) -> None:
    """Meet the other processes: tensors on a GPU travel by NCCL, those on the host by gloo.

    Raises ConfigError where the port at which they meet is taken and, on every rank alike, where
    two have the same GPU.
    """
    # DeepSpeed reads these; under srun nobody else sets them. It takes LOCAL_RANK for the number of
    # its GPU.
    os.environ.update(
        RANK=str(ranks.rank),
        LOCAL_RANK=str(ranks.local_rank if device.index is None else device.index),
        WORLD_SIZE=str(ranks.size),
        LOCAL_SIZE=str(ranks.local_size),
    )
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if ranks.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        try:
            dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.size)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise ConfigError(
                f"port {os.environ['MASTER_PORT']}, at which the processes would meet, is in use, "
                "perhaps by another run on this machine; give another: deepspeed --master_port N, "
                "or MASTER_PORT=N"
            ) from None
    if device.type == "cuda":
        _check_own_gpu(device)


def _check_own_gpu(device: torch.device) -> None:
    """Raise ConfigError, on every rank alike, where two have the same GPU."""
    mine = (socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid))
    rank_of: dict[tuple[str, str], int] = {}
    for rank, gpu in enumerate(gather(mine)):
        other = rank_of.setdefault(gpu, rank)
        if other != rank:
            raise ConfigError(
                f"ranks {other} and {rank} have the same GPU of {gpu[0]}; {_ONE_EACH}"
            )


def gather(value: T) -> list[T]:
    """`value` of every rank, by rank, on every rank."""
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def problem_of_any(problem: str) -> str:
    """What is wrong on some rank, "" where nothing is; every rank calls this with its own.

    The same text on every rank; it names the rank where not all have the same problem.
    """
    problems = gather(problem)
    for rank, text in enumerate(problems):
        if text:
            return text if len(set(problems)) == 1 else f"rank {rank}: {text}"
    return ""


def from_first(value: T) -> T:
    """Rank 0's `value`, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


@contextlib.contextmanager
def only_run_in(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Make `run_dir` and keep it for this run until the block ends; every rank calls this.

    Raises ConfigError on every rank while another run has it: two would cut back each other's logs
    and delete each other's checkpoints as they are written. Rank 0 holds the lock (`only_user_of`
    says when other machines see it); it dies with the process, so a killed run goes on at once.
    """
    with contextlib.ExitStack() as stack:
        problem = ""
        if ranks.is_first:
            try:
                stack.enter_context(only_user_of(run_dir))
            except OSError as error:
                problem = f"run_dir: {error}"
        problem = from_first(problem)
        if problem:
            raise ConfigError(problem)
        yield


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The elementwise sum over all ranks, in place."""
    dist.all_reduce(tensor)
    return tensor


def of_all_ranks(tensor: Tensor) -> Tensor:
    """`tensor` of every rank, by rank: (ranks, …)."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)
