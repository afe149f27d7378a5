"""Pretraining from the command line.

    deepspeed train/main.py                                            # configs/base.yaml
    deepspeed --num_accelerators 2 train/main.py --config configs/sample.yaml seed=18
    python train/main.py --config configs/sample.yaml --dry-run        # what would run
    srun python train/main.py --config FILE         # with MASTER_ADDR and MASTER_PORT exported

Words `key=value` are keys of the file's `train:` section. Without a GPU it runs on CPU.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed

ROOT = Path(__file__).resolve().parent.parent
# Run as a file, Python puts train/ itself first, where `import config` would find ours.
sys.path[0] = str(ROOT)

from common.checkpoint_manifest import CheckpointError  # noqa: E402
from common.config import ConfigError, load_config  # noqa: E402
from common.files import make_private  # noqa: E402
from common.process import run_and_exit  # noqa: E402
from data_prep.shards import DataError  # noqa: E402
from train.config import Train  # noqa: E402
from train.describe import describe  # noqa: E402
from train.ranks import (  # noqa: E402
    Ranks,
    choose_device,
    find_ranks,
    gather,
    join,
    problem_of_any,
)
from train.resolve import Run, resolve  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code, 2 for what the user can put right."""
    parser = argparse.ArgumentParser(
        prog="train/main.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "base.yaml")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved run and exit")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    asked = parser.parse_intermixed_args(arguments)
    make_private()
    try:
        ranks = find_ranks()
        device = choose_device(ranks)
    except ConfigError as error:
        return _fail(str(error))
    return _run(asked, ranks, device)


def _run(asked: argparse.Namespace, ranks: Ranks, device: torch.device) -> int:
    run, problem = _prepare(asked, ranks, device)
    if asked.dry_run and ranks.is_first:
        if run is None:
            return _fail(problem)
        print(describe(run))
    if asked.dry_run:
        return 0

    try:
        join(ranks, device)
    except ConfigError as error:
        return _fail_together(str(error), ranks)
    # A file may be missing on one machine alone; then every rank must stop, and one must say so.
    if problem := problem_of_any(problem):
        return _fail_together(problem, ranks)
    assert run is not None

    # Imported late, for DeepSpeed takes seconds to import and reads what `join` set.
    from train.loop import TrainingError, train

    try:
        train(run, ranks, device)
    except (CheckpointError, ConfigError, TrainingError) as error:
        return _fail_together(str(error), ranks)
    except DataError as error:
        return _fail(f"rank {ranks.rank}: {error}")
    torch.distributed.destroy_process_group()
    return 0


def _prepare(
    asked: argparse.Namespace, ranks: Ranks, device: torch.device
) -> tuple[Run | None, str]:
    """The resolved run, or what is wrong with it."""
    try:
        config = load_config(Train, "train", asked.config, asked.overrides)
        return resolve(config, ranks.size, device.type == "cuda"), ""
    except (ConfigError, DataError) as error:
        return None, str(error)


def _fail_together(problem: str, ranks: Ranks) -> int:
    """End a run for a reason that every rank has; one of them says it, or each that has not met
    the others."""
    if not torch.distributed.is_initialized():
        return _fail(problem)
    if ranks.is_first:
        _fail(problem)
    # A launcher ends everybody once one has ended: not before it is said.
    gather("said")
    torch.distributed.destroy_process_group()
    return 2


def _fail(problem: str) -> int:
    print(f"error: {problem}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    run_and_exit(main)
