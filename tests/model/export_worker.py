"""Run by two processes: train a few steps under one ZeRO stage after another, save each.

    python export_worker.py FOLDER RANK RANKS

Leaves FOLDER/<stage>-<dtype>/deepspeed/state, and beside it what the weights were.
"""

import json
import logging
import sys
from pathlib import Path

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist

from common.process import run_and_exit
from model.config import ModernBertConfig
from model.modernbert import ModernBertForMaskedLM

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def train_and_save(folder: Path, config: ModernBertConfig, stage: int, dtype: str) -> None:
    model = ModernBertForMaskedLM(config, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }
    if dtype == "bf16":
        settings["bf16"] = {"enabled": True}
        if stage > 0:  # as training does; under stage 1 this is another of DeepSpeed's optimizers
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False
    )
    losses = []
    for step in range(3):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        ids = torch.randint(3, config.vocab_size, (40,), generator=generator)
        places = torch.arange(0, 40, 4)
        cu_seqlens = torch.tensor([0, 30, 40], dtype=torch.int32)
        position_ids = torch.cat([torch.arange(30), torch.arange(10)])
        loss = engine(ids, position_ids, cu_seqlens, 30, places, ids[places])
        losses.append(loss.item())
        engine.backward(loss / 20)
        engine.step()
    engine.save_checkpoint(str(folder / "deepspeed"), tag="state", save_latest=False)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    if dist.get_rank() == 0:
        torch.save(weights, folder / "weights.pt")
        (folder / "losses.json").write_text(json.dumps(losses))


def main() -> None:
    folder, rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    deepspeed.init_distributed(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=ranks,
        auto_mpi_discovery=False,
        verbose=False,
    )
    config = ModernBertConfig(**json.loads((folder / "config.json").read_text()))
    for stage, dtype in (
        (0, "fp32"),
        (1, "fp32"),
        (2, "fp32"),
        (3, "fp32"),
        (0, "bf16"),
        (1, "bf16"),
        (2, "bf16"),
        (3, "bf16"),
    ):
        out = folder / f"{stage}-{dtype}"
        out.mkdir(exist_ok=True)
        train_and_save(out, config, stage, dtype)
        dist.barrier()


if __name__ == "__main__":
    run_and_exit(main)
