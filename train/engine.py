"""DeepSpeed as this project uses it: what it is told, and the few calls that the loop makes.

The loss that goes into `engine.backward` is already divided by the masked tokens of the whole step
and multiplied by the number of ranks, since DeepSpeed averages gradients over ranks; its own
division by the number of micro-steps is off. The learning rate is set by the run's schedule.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train.config import Train
from train.optimizer import make_optimizer, set_lr
from train.phase_config import Batch

Engine = Any
"""deepspeed.DeepSpeedEngine, which has no types"""

# Never reached: DeepSpeed prints a line of its own every so many steps.
_NEVER = 2**62


def deepspeed_config(
    config: Train, precision: str, batch: Batch, micro_steps: int, ranks: int
) -> dict[str, Any]:
    """The configuration that DeepSpeed gets, the run's own `deepspeed` keys included.

    batch, micro_steps: those of the run's largest step. DeepSpeed wants one size; where each step
    ends it is told outright, see `backward`.
    """
    stage = config.zero_stage
    own: dict[str, Any] = {
        "train_batch_size": batch.rows,
        "train_micro_batch_size_per_gpu": batch.micro_rows,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "steps_per_print": _NEVER,
        # Its throughput timer waits for the device in every step.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "zero_optimization": {"stage": stage},
    }
    if precision == "bf16":
        # A step whose gradients overflow is skipped rather than taken.
        own["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if stage > 0:
            own["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merge(own, config.deepspeed)


def start_engine(model: nn.Module, config: Train, settings: dict[str, Any]) -> Engine:
    """Wrap `model` with its optimizer; every rank calls this once they have joined."""
    deepspeed = _import_deepspeed()
    optimizer = make_optimizer(model, config.optimizer)
    with quiet():
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
    # The step that ZeRO 0 takes in bf16 to allocate the moments is none of the run's, and AdamW's
    # bias correction must not count it.
    for state in optimizer.state.values():
        state["step"].zero_()
    return engine


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what DeepSpeed prints about its memory; its warnings are logged and still shown."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def backward(
    engine: Engine, loss_sum: Tensor, ranks: int, masked_tokens: int, is_last: bool
) -> None:
    """Accumulate the gradients of a micro-batch.

    loss_sum: scalar, the sum of cross-entropy over its masked tokens; masked_tokens: those of the
    whole step, over all ranks and micro-steps; is_last: the step's last micro-batch on this rank.
    """
    # Said outright, because DeepSpeed's own count of micro-steps holds for one batch size alone.
    engine.set_gradient_accumulation_boundary(is_last)
    engine.backward(loss_sum * (ranks / masked_tokens), scale_wrt_gas=False)


def step(engine: Engine, lr: float, want_norm: bool) -> float | None:
    """Take the optimizer step at `lr`; the gradient norm before clipping if `want_norm`.

    Asking for the norm may wait for the device.
    """
    set_lr(engine.optimizer.param_groups, lr)
    norm: Tensor | float | None = None
    if want_norm and engine.zero_optimization_stage() == 0:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
    engine.step()
    if not want_norm:
        return None
    return float(norm if norm is not None else engine.get_global_grad_norm())


def _import_deepspeed() -> Any:
    # Calls of DeepSpeed's that torch has renamed; nothing a user could change.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed
    import deepspeed.ops

    # Compiled at first use, and needed for inference alone.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            merged[key] = _merge(inner, value)
        else:
            merged[key] = value
    return merged
