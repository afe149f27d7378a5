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

from torch import Tensor, nn

from common.config import ConfigError
from train.config import Train
from train.optimizer import make_optimizer
from train.optimizer_step import Norms, OptimizerStep
from train.phase_config import Batch
from train.schedule import Rates
from train.stable_adamw import StableAdamW
from train.zero import without_copies, without_losses

Engine = Any
"""deepspeed.DeepSpeedEngine, which has no types"""

# Never reached: DeepSpeed prints a line of its own every so many steps.
_NEVER = 2**62


def choose_dtypes(config: Train, precision: str) -> tuple[str, str]:
    """The dtypes of gradient accumulation and of reduction for weights of `precision`.

    Raises ConfigError for an accumulation that DeepSpeed has no buffers for.
    """
    accumulation, reduction = config.grad_accum_dtype, config.reduce_dtype
    only_bf16 = precision == "bf16" and config.zero_stage == 0
    if accumulation == "auto":
        accumulation = "bf16" if only_bf16 else "fp32"
    if only_bf16 and accumulation == "fp32":
        raise ConfigError(
            "grad_accum_dtype is fp32, but zero_stage 0 keeps the gradients of bf16 weights in "
            "bf16 alone; set zero_stage=1, or grad_accum_dtype=bf16"
        )
    if precision == "fp32" and accumulation == "bf16":
        raise ConfigError(
            "grad_accum_dtype is bf16, but weights are fp32; leave it out, or set precision=bf16"
        )
    return accumulation, "fp32" if reduction == "auto" else reduction


def deepspeed_config(
    config: Train, precision: str, batch: Batch, micro_steps: int, ranks: int
) -> dict[str, Any]:
    """The configuration that DeepSpeed gets, the run's own `deepspeed` keys included.

    batch, micro_steps: those of the run's largest step. DeepSpeed wants one size; where each step
    ends it is told outright, see `backward`.
    """
    stage = config.zero_stage
    accumulation, reduction = choose_dtypes(config, precision)
    own: dict[str, Any] = {
        "train_batch_size": batch.rows,
        "train_micro_batch_size_per_gpu": batch.micro_rows,
        "gradient_accumulation_steps": micro_steps,
        # Clipped by `step`, on the device.
        "gradient_clipping": 0.0,
        "steps_per_print": _NEVER,
        # Its throughput timer waits for the device in every step.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "zero_optimization": {"stage": stage},
        "data_types": {"grad_accum_dtype": accumulation},
        "communication_data_type": reduction,
    }
    if stage > 0:
        own["zero_optimization"] |= {
            # Buckets are reduced on a stream of their own while backward goes on.
            "overlap_comm": True,
            "contiguous_gradients": True,
            # Elements. DeepSpeed's 500 million are more than most models have: nothing would be
            # reduced before backward ends, and two such buckets stay allocated.
            "reduce_bucket_size": 25_000_000,
        }
    # See OptimizerStep.
    checks_itself = config.optimizer.name == "muon"
    if precision == "bf16":
        own["bf16"] = {"enabled": True, "check_grad_overflow": checks_itself}
    if stage in (1, 2):
        own["zero_optimization"]["compute_grad_norm"] = checks_itself
    if checks_itself and stage == 3:
        # DeepSpeed's Muon refuses it.
        own["zero_optimization"]["reduce_scatter"] = False
    return _merge(own, config.deepspeed)


def start_engine(model: nn.Module, config: Train, settings: dict[str, Any]) -> Engine:
    """Wrap `model` with its optimizer; every rank calls this once they have joined.

    `engine.optimizer_step` is what `step` calls.
    """
    deepspeed = _import_deepspeed()
    optimizer = make_optimizer(model, config.optimizer)
    with quiet(), _reduced_during_backward(config.zero_stage):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
    # The step that ZeRO 0 takes in bf16 to allocate the moments is none of the run's, and AdamW's
    # bias correction must not count it.
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] *= 0
    if config.optimizer.name == "muon":
        without_losses(engine.optimizer)
    else:
        without_copies(engine.optimizer)
    engine.optimizer_step = OptimizerStep(engine, optimizer, config.optimizer)
    return engine


@contextlib.contextmanager
def _reduced_during_backward(stage: int) -> Iterator[None]:
    """Have ZeRO 1 and 2 step through DeepSpeedZeroOptimizer, whatever the dtypes.

    For stage 1 with bf16 weights and fp32 sums DeepSpeed takes BF16_Optimizer, which reduces after
    backward and adds all gradients up in passes of their own. The other class knows fp32 sums as
    well (stage 2 uses them), and reduces while the last backward goes on. No key chooses.
    """
    from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine

    chosen_by_deepspeed = DeepSpeedEngine._do_optimizer_sanity_check
    if stage in (1, 2):
        DeepSpeedEngine._do_optimizer_sanity_check = lambda engine, optimizer: ZERO_OPTIMIZATION
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = chosen_by_deepspeed


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


def step(engine: Engine, rates: Rates, want_norms: bool) -> Norms | None:
    """Take the optimizer step at `rates`; what is to be logged of it if `want_norms`.

    A step whose gradient is not finite changes nothing and is counted in `engine.skipped_steps`.
    The device is waited for if `want_norms`, and otherwise not.
    """
    optimizer_step: OptimizerStep = engine.optimizer_step
    return optimizer_step(rates, want_norms)


def _import_deepspeed() -> Any:
    # Calls of DeepSpeed's that torch has renamed; nothing a user could change.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    # A list of the optimizers that were tested with ZeRO; tests/train/test_zero.py is our test.
    if StableAdamW not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(StableAdamW)
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
