"""What test_zero.py starts under a launcher: steps with given gradients, under every wrapper.

`OUT` (a folder): for each case OUT/<name>.npz gets the fp32 weights after every step, by name.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

STEPS, MICRO_STEPS = 12, 2
SHAPES = {"tied": (50, 3), "matrix": (7, 5), "norm": (11,), "long": (64, 33), "one": (1,), "bias": (5,)}
CASES: dict[str, dict[str, Any]] = {
    f"{precision}_zero{stage}": {"zero_stage": stage, "precision": precision}
    for precision in ("fp32", "bf16")
    for stage in range(4)
}
CASES["bf16_zero1_bf16_sums"] = {
    "zero_stage": 1,
    "precision": "bf16",
    "grad_accum_dtype": "bf16",
    "reduce_dtype": "bf16",
}
# The parameters in sub-groups of their own, each of which is stepped by itself.
CASES["fp32_zero3_sub_groups"] = {
    "zero_stage": 3,
    "precision": "fp32",
    "deepspeed": {"zero_optimization": {"sub_group_size": 40}},
}


class Dot(nn.Module):
    """The sum of weight × factors, so that the gradient is `factors` whatever the weight."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, factors: Tensor) -> Tensor:
        return (self.weight * factors).float().sum()


class Model(nn.Module):
    """A parameter a shape; the first is used by two modules."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        for name, shape in SHAPES.items():
            # bf16 holds them exactly, so that all start from the same weights.
            weight = torch.randn(shape, generator=draw).bfloat16().float()
            self.add_module(name, Dot(nn.Parameter(weight)))
        self.again = Dot(self.tied.weight)

    def forward(self, factors: dict[str, Tensor]) -> Tensor:
        return sum(module(factors[name]) for name, module in self.named_children())


def factors(step: int, micro_step: int, rank: int) -> dict[str, Tensor]:
    """Gradients of a micro-step: small whole numbers, their sums exact, their scale leaping."""
    draw = torch.Generator().manual_seed(step * 100 + micro_step * 10 + rank)
    shapes = SHAPES | {"again": SHAPES["tied"]}
    scales = dict(zip(shapes, (1, 8, 64, 2, 32, 16, 1), strict=True))
    return {
        name: torch.randint(-3, 4, shape, generator=draw).float()
        * (scales[name] if step % 4 == 3 else 1)
        / 8
        for name, shape in shapes.items()
    }


def full_gradients(step: int, ranks: int) -> dict[str, Tensor]:
    """The mean over ranks of the sums over micro-steps, of each parameter."""
    parts = [factors(step, m, rank) for m in range(MICRO_STEPS) for rank in range(ranks)]
    sums = {name: sum(part[name] for part in parts) / ranks for name in parts[0]}
    sums["tied"] = sums["tied"] + sums.pop("again")
    return sums


def lr_of(step: int) -> float:
    """A rate that changes."""
    return 0.02 * (step + 1) / STEPS


def run_case(ranks: Any, changes: dict[str, Any]) -> dict[str, np.ndarray]:
    from deepspeed.utils import safe_get_full_fp32_param

    from train.config import Train
    from train.engine import deepspeed_config, start_engine, step

    values = {"optimizer": {"lr": 0.02, "weight_decay": 1e-4}, "batch": {"rows": 2 * ranks.size, "micro_rows": 1}}
    config = TypeAdapter(Train).validate_python(values | changes)
    settings = deepspeed_config(config, config.precision, MICRO_STEPS, ranks.size)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine = start_engine(Model(), config, settings)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    rows: dict[str, list[np.ndarray]] = {name: [] for name in SHAPES}
    for number in range(STEPS):
        for micro_step in range(MICRO_STEPS):
            given = factors(number, micro_step, ranks.rank)
            loss = engine({name: value.to(dtype) for name, value in given.items()})
            engine.set_gradient_accumulation_boundary(micro_step == MICRO_STEPS - 1)
            engine.backward(loss, scale_wrt_gas=False)
        step(engine, lr_of(number), want_norms=False)
        for name, parameter in engine.module.named_parameters():
            if config.zero_stage == 0:
                weights = engine.rule._held.weights
                full = weights[[id(p) for g in engine_groups(engine) for p in g].index(id(parameter))]
            else:
                full = safe_get_full_fp32_param(parameter)
            rows[name.split(".")[0]].append(full.detach().float().numpy().reshape(-1).copy())
    return {name: np.stack(values) for name, values in rows.items()}


def engine_groups(engine: Any) -> list[list[nn.Parameter]]:
    wrapper = engine.optimizer
    return wrapper.fp16_groups if hasattr(wrapper, "fp16_groups") else [g["params"] for g in wrapper.param_groups]


def main() -> None:
    from train.ranks import choose_device, find_ranks, join

    ranks = find_ranks()
    join(ranks, choose_device(ranks))
    out = Path(sys.argv[-1])
    for name, changes in CASES.items():
        result = run_case(ranks, changes)
        if ranks.is_first:
            np.savez(out / f"{name}.npz", **result)


if __name__ == "__main__":
    main()
