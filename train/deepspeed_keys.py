"""Which of DeepSpeed's keys a run may set: not those that would work around what is done here.

The run's own keys say precision, batch and stage; the optimizer step, its rule and the export of
weights know where each parameter lies in DeepSpeed's flat buffers (`train.zero`). A key of
DeepSpeed's that changes one of these would be obeyed by one half of the code only.
"""

import difflib
from typing import Any

from train.phase_config import require

_OWN = "set the run's own key instead"
_PRECISION = "`precision`, `grad_accum_dtype` and `reduce_dtype` say all dtypes; leave it out"
_OFFLOAD = (
    "weights and optimizer steps stay on the GPU; leave it out, and use a higher zero_stage or "
    "more GPUs to save memory"
)
_LAYOUT = (
    "it lays parameters out in another way than the optimizer's rule, its norms and the export of "
    "weights know; leave it out"
)
_ROUNDED = "it rounds what travels between ranks, where `reduce_dtype` says how; leave it out"
_BATCH = "batches, their rows and their sum are the run's phases'; leave it out"
_PARALLEL = "ranks share out rows alone; leave it out"
_MODEL = "it changes the model or what is trained of it; leave it out"

REFUSED = {
    "train_batch_size": _OWN,
    "train_micro_batch_size_per_gpu": _OWN,
    "gradient_accumulation_steps": _OWN,
    "gradient_clipping": _OWN,
    "optimizer": _OWN,
    "scheduler": _OWN,
    "fp16": _OWN,
    "bfloat16": _OWN,
    "data_types": _OWN,
    "communication_data_type": _OWN,
    "zero_allow_untested_optimizer": _OWN,
    "amp": _PRECISION,
    "torch_autocast": _PRECISION,
    "sparse_gradients": _LAYOUT,
    "managed_gradient_accumulation": _BATCH,
    "prescale_gradients": _BATCH,
    "gradient_predivide_factor": _BATCH,
    "gradient_allreduce_op": _BATCH,
    "data_efficiency": _BATCH,
    "curriculum_learning": _BATCH,
    "elasticity": _BATCH,
    "autotuning": _BATCH,
    "tensor_parallel": _PARALLEL,
    "expert_parallel": _PARALLEL,
    "sequence_parallel_size": _PARALLEL,
    "pipeline": _PARALLEL,
    "progressive_layer_drop": _MODEL,
    "compression_training": _MODEL,
    "quantize_training": _MODEL,
    "weight_quantization": _MODEL,
    "hybrid_engine": _MODEL,
    "activation_checkpointing": "`recompute` says what is computed again; leave it out",
    "compile": "`compile` says what is compiled; leave it out",
    "checkpoint": "checkpoints are checked and taken up as DeepSpeed writes them; leave it out",
    "zero_optimization.stage": _OWN,
    "zero_optimization.offload_param": _OFFLOAD,
    "zero_optimization.offload_optimizer": _OFFLOAD,
    "zero_optimization.cpu_offload": _OFFLOAD,
    "zero_optimization.cpu_offload_param": _OFFLOAD,
    "zero_optimization.cpu_offload_use_pin_memory": _OFFLOAD,
    "zero_optimization.zenflow": _OFFLOAD,
    "zero_optimization.zero_hpz_partition_size": _LAYOUT,
    "zero_optimization.mics_shard_size": _LAYOUT,
    "zero_optimization.mics_hierarchical_params_gather": _LAYOUT,
    "zero_optimization.round_robin_gradients": _LAYOUT,
    "zero_optimization.parameter_alignment": _LAYOUT,
    "zero_optimization.elastic_checkpoint": _LAYOUT,
    "zero_optimization.legacy_stage1": _LAYOUT,
    "zero_optimization.contiguous_gradients": _LAYOUT,
    "zero_optimization.load_from_fp32_weights": (
        "a run goes on from the fp32 weights of its checkpoint; leave it out"
    ),
    "zero_optimization.zero_quantized_weights": _ROUNDED,
    "zero_optimization.zero_quantized_nontrainable_weights": _ROUNDED,
    "zero_optimization.zero_quantized_gradients": _ROUNDED,
}
"""Key -> why, and what to do."""

TAKEN = frozenset(
    {
        "zero_optimization",
        "bf16",
        "comms_logger",
        "flops_profiler",
        "wall_clock_breakdown",
        "memory_breakdown",
        "timers",
        "steps_per_print",
        "dump_state",
        "log_level",
        "disable_allgather",
        "disable_python_gc",
        "tensorboard",
        "wandb",
        "comet",
        "csv_monitor",
    }
)
"""What is left to DeepSpeed at the top level, where it passes over names that it does not know; it
refuses those within `zero_optimization` itself."""

CHECKS = ("bf16.check_grad_overflow", "zero_optimization.compute_grad_norm")
"""DeepSpeed's own checks before a step, off by default: they may be turned on beside ours, which
changes no step but has the host wait for the device, to measure what that costs."""


def check_deepspeed_keys(keys: dict[str, Any]) -> None:
    """Raise ConfigError for keys of `deepspeed:` that a run may not set, with the reason."""
    inner: dict[str, Any] = {}
    for name in ("zero_optimization", "bf16"):
        section = keys.get(name) or {}
        require(isinstance(section, dict), f"deepspeed.{name} must hold keys, not {section!r}")
        inner |= {f"{name}.{key}": value for key, value in section.items()}
    for key in sorted(keys.keys() | inner.keys()):
        require(key not in REFUSED, f"deepspeed.{key}: {REFUSED.get(key)}")
        require("." in key or key in TAKEN, f"deepspeed.{key}: {_unknown(key)}")
        require(
            not key.startswith("bf16.") or key in CHECKS,
            f"deepspeed.{key}: {_OWN}, `precision`; of this section only {CHECKS[0]} may be set",
        )
    for key in CHECKS:
        require(
            inner.get(key, True) is True,
            f"deepspeed.{key} may only be true: it is off by default, and Muon cannot do without",
        )


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, TAKEN, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(TAKEN))}"
    return f"DeepSpeed has no such key, or a run has no use for it; {hint}"
