"""The configuration of a pretraining run: the `train:` section of a YAML file.

What may differ between stretches of a run (data, batch, masking, learning rate) is a key of a
phase, see `train.phase_config`; everything else holds for the whole run. A run has at least one
phase.
"""

import re
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from common.config import config
from model.config import Backend, Local, Recompute
from train.deepspeed_keys import check_deepspeed_keys
from train.phase_config import Phase, check_decay, require


@config
class Model:
    """A named geometry, and any size that differs from it; the vocabulary is the tokenizer's."""

    geometry: Literal["base", "large"] | None = None
    """by default base, or that of init_from"""
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None


@config
class Optimizer:
    """The rule of a step; weight decay is decoupled, and zero on norms and biases."""

    name: Literal["stable_adamw", "adamw", "muon"] = "stable_adamw"
    """stable_adamw: ModernBERT's; muon: Muon on the layers' matrices, AdamW on the rest"""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 1e-5
    """share of a weight that a step at the peak rate takes away; at a lower rate, that much less. A
    phase may have its own"""
    gradient_clipping: float = 0.0
    """largest norm of the gradient of all parameters; 0 leaves it as it is, as ModernBERT does"""
    muon_lr_factor: float | None = None
    """muon alone: the rate of its matrices as a multiple of lr, 25 by default"""
    muon_momentum: float | None = None
    """muon alone: 0.95 by default"""


@config
class Validation:
    """Loss on the validation rows, whose masks are the same every time."""

    every_steps: int = 500
    """steps between validations; the end of a run is always validated"""
    rows: int = 512
    """rows to use, shared among the sources like the validation rows are; all if there are fewer"""
    rate: float = 0.15


@config
class Checkpoint:
    """Checkpoints in RUN/checkpoints; the end of a run always leaves one."""

    every_steps: int = 500
    keep: int = 2
    """newest checkpoints to keep, at least 2: the newest may turn out to be damaged; those at the
    end of a phase are kept besides"""


@config
class Log:
    """Lines of metrics.jsonl, TensorBoard and the console."""

    every_steps: int = 10


@config
class Profile:
    """A profiler's trace of a few steps, in RUN/profile; these steps take longer than others."""

    first_step: int
    """first step of the trace; the first steps of a process are not like the others"""
    steps: int = 3
    rank: int = 0
    """which process writes one"""

    def __post_init__(self) -> None:
        for name in ("first_step", "steps"):
            require(
                getattr(self, name) > 0, f"profile.{name} is {getattr(self, name)}, not above 0"
            )
        require(self.rank >= 0, f"profile.rank is {self.rank}, it is negative")


@config
class Train:
    """A pretraining run."""

    phases: dict[str, Phase]
    """what is trained on, one phase after another, in the order of the file"""
    run_dir: Path = Path("runs/base")
    """folder of the run's configuration, metrics and checkpoints"""
    seed: int = 17
    init_from: Path | None = None
    """weights to start from: a Hugging Face folder, or a checkpoint RUN/checkpoints/step_…; where
    `model` asks for a larger geometry, its weights are tiled; by default weights are random"""
    init_optimizer: Literal["fresh", "kept"] = "fresh"
    """kept: the optimizer's state, too, is that of init_from, a checkpoint of as many ranks"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """dtype of weights and activations; auto: bf16 on a GPU, fp32 on CPU. Steps are always fp32"""
    grad_accum_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """of the sum of gradients over micro-steps; auto: fp32, but bf16 with zero_stage 0 and bf16"""
    reduce_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """of the sum of gradients over ranks; auto: fp32"""
    attention: Backend = "auto"
    """what computes attention; auto: the best that is installed and fits the GPU"""
    local_attention: Local = "auto"
    """layers with a window, and documents up to 128 tokens in all layers, where they are many;
    auto: kernels.local_attention on a GPU; backend: as in `attention`"""
    compile: Literal["auto", "layers", "none"] = "auto"
    """layers: each layer is one compiled graph; auto: so on a GPU, but not with zero_stage 3"""
    deterministic: bool = False
    """the same bits in every run on as many GPUs of one kind: torch's deterministic algorithms, and
    attention's; slower"""
    recompute: Recompute = "none"
    """what the backward computes again to save memory: the activation of each layer, its MLP, or
    all of it (layer)"""
    fp8: Literal["none", "tensorwise", "rowwise", "rowwise_with_gw_hp"] = "none"
    """matrix products of the layers in 8 bits, by torchao's recipes; for H100 and later"""
    zero_stage: Literal[0, 1, 2, 3] = 1
    resume: Literal["auto", "never"] = "auto"
    """auto: from the newest checkpoint that verifies; never: refuse a run_dir with checkpoints"""
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    validation: Validation = field(default_factory=Validation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    profile: Profile | None = None
    """by default no trace is made"""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed's own keys (zero_optimization, comms_logger, …), over those the run sets itself;
    `train.deepspeed_keys` says which are refused"""

    def __post_init__(self) -> None:
        require(bool(self.phases), "phases is empty; a run has at least one")
        for name in self.phases:
            # Key=value words split keys at dots, and file names are made of a phase's name.
            require(
                re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None,
                f"the phase name {name!r} may have letters, digits, - and _ only",
            )
        positive = {
            "validation.every_steps": self.validation.every_steps,
            "checkpoint.every_steps": self.checkpoint.every_steps,
            "log.every_steps": self.log.every_steps,
            "validation.rows": self.validation.rows,
            "optimizer.eps": self.optimizer.eps,
        }
        for key, value in positive.items():
            require(value > 0, f"{key} is {value}, it must be above 0")
        clipping = self.optimizer.gradient_clipping
        require(clipping >= 0, f"optimizer.gradient_clipping is {clipping}, it is negative")
        _check_optimizer(self.optimizer)
        for beta in self.optimizer.betas:
            require(0 <= beta < 1, f"optimizer.betas has {beta}, it must be at least 0, below 1")
        rate = self.validation.rate
        require(0 < rate < 1, f"validation.rate is {rate}, it must lie between 0 and 1")
        require(self.checkpoint.keep >= 2, "checkpoint.keep must be at least 2")
        require(
            self.init_optimizer == "fresh" or self.init_from is not None,
            "init_optimizer is kept, but init_from names no checkpoint to keep it from",
        )
        require(
            self.optimizer.name != "muon" or self.zero_stage > 0,
            "zero_stage is 0, and nothing there keeps Muon from taking a step that is not finite; "
            "set zero_stage=1",
        )
        check_deepspeed_keys(self.deepspeed)


def _check_optimizer(optimizer: Optimizer) -> None:
    is_muon = optimizer.name == "muon"
    check_decay("optimizer.weight_decay", optimizer.weight_decay)
    for key in ("muon_lr_factor", "muon_momentum"):
        value = getattr(optimizer, key)
        require(
            value is None or is_muon,
            f"optimizer.{key} is set but optimizer.name is {optimizer.name}; leave it out",
        )
        require(value is None or value > 0, f"optimizer.{key} is {value}, it must be above 0")
    require(
        not (is_muon and optimizer.gradient_clipping),
        "optimizer.gradient_clipping: Muon's steps have one size whatever the gradient's norm, and "
        "DeepSpeed would clip them, not the gradient; set it to 0",
    )
