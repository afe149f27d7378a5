"""The configuration of a pretraining run: the `train:` section of a YAML file.

What may differ between stretches of a run (data, batch, masking, schedule) each has a section of
its own; everything else holds for the whole run.
"""

from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from common.config import ConfigError, config

MaskingKind = Literal["token", "whole_word", "token_aware"]


@config
class Data:
    """What is read."""

    dir: Path = Path("data/base/rows-1024")
    """a data set of `python -m data_prep`: the folder that holds manifest.json"""
    weights: dict[str, float] | None = None
    """share of each source in the rows read, on any scale; by default as many as it has rows"""


@config
class Model:
    """A named geometry, and any size that differs from it; the vocabulary is the tokenizer's."""

    geometry: Literal["base", "large"] = "base"
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None


@config
class Batch:
    """Rows of an optimizer step."""

    rows: int = 576
    """rows of a step, over all ranks and micro-steps"""
    micro_rows: int = 8
    """rows that a rank passes through the model at once"""


@config
class Masking:
    """Masked-language-model targets of training; validation masks single tokens, all alike."""

    rate: float = 0.3
    """share of the maskable tokens that is masked"""
    kind: MaskingKind = "token"
    """token: every token alone, all equally likely; whole_word: all tokens of a word; token_aware:
    every token alone, rarer ones and medical terms more often (the next four keys)"""
    frequency_exponent: float = 0.5
    """a token's weight falls with this power of its frequency; 0 weights all alike"""
    weight_cap: float = 3.0
    """largest weight; the typical token (half of all training tokens are no rarer) has 1"""
    term_sources: list[str] = field(default_factory=lambda: ["icd10cm", "icd9cm"])
    """sources whose texts are medical terms: tokens that are frequent there are boosted; [] none"""
    term_boost: float = 1.5
    """factor to the weight of these"""
    mask_share: float = 0.8
    """share of these that becomes [MASK]"""
    random_share: float = 0.1
    """share of these that becomes a random token; the rest keeps its token"""

    def __post_init__(self) -> None:
        for name in ("weight_cap", "term_boost"):
            _require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, not above 0")
        _require(
            self.frequency_exponent >= 0,
            f"frequency_exponent is {self.frequency_exponent}, it must not be negative",
        )


@config
class Optimizer:
    """The rule of a step; weight decay is decoupled, and zero on norms and biases."""

    name: Literal["stable_adamw", "adamw", "muon"] = "stable_adamw"
    """stable_adamw: ModernBERT's; muon: Muon on the layers' matrices, AdamW on the rest"""
    lr: float = 8e-4
    """the peak learning rate"""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 1e-5
    """share of a weight that a step at the peak rate takes away; at a lower rate, that much less"""
    gradient_clipping: float = 0.0
    """largest norm of the gradient of all parameters; 0 leaves it as it is, as ModernBERT does"""
    muon_lr_factor: float | None = None
    """muon alone: the rate of its matrices as a multiple of lr, 25 by default"""
    muon_momentum: float | None = None
    """muon alone: 0.95 by default"""


@config
class Schedule:
    """Warm-up, stable, 1-sqrt decay to zero, in token slots (rows × row_tokens)."""

    total_tokens: int = 20_000_000_000
    """slots after which the run is complete (rounded up to a whole step)"""
    warmup_tokens: int = 200_000_000
    decay_tokens: int = 2_000_000_000
    """length of the decay that ends the run; 0 keeps the peak rate to the end"""


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
    """newest checkpoints to keep, at least 2: the newest may turn out to be damaged"""


@config
class Log:
    """Lines of metrics.jsonl, TensorBoard and the console."""

    every_steps: int = 10


@config
class Train:
    """A pretraining run."""

    run_dir: Path = Path("runs/base")
    """folder of the run's configuration, metrics and checkpoints"""
    seed: int = 17
    init_from: Path | None = None
    """a Hugging Face folder to take weights and geometry from; by default weights are random"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """dtype of weights and activations; auto: bf16 on a GPU, fp32 on CPU. Steps are always fp32"""
    grad_accum_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """of the sum of gradients over micro-steps; auto: fp32, but bf16 with zero_stage 0 and bf16"""
    reduce_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """of the sum of gradients over ranks; auto: fp32"""
    zero_stage: Literal[0, 1, 2, 3] = 1
    resume: Literal["auto", "never"] = "auto"
    """auto: from the newest checkpoint that verifies; never: refuse a run_dir with checkpoints"""
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    batch: Batch = field(default_factory=Batch)
    masking: Masking = field(default_factory=Masking)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    validation: Validation = field(default_factory=Validation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed's own keys (zero_optimization, comms_logger, …), over those the run sets itself"""

    def __post_init__(self) -> None:
        positive = {
            "batch.rows": self.batch.rows,
            "batch.micro_rows": self.batch.micro_rows,
            "schedule.total_tokens": self.schedule.total_tokens,
            "validation.every_steps": self.validation.every_steps,
            "checkpoint.every_steps": self.checkpoint.every_steps,
            "log.every_steps": self.log.every_steps,
            "validation.rows": self.validation.rows,
            "optimizer.lr": self.optimizer.lr,
            "optimizer.eps": self.optimizer.eps,
        }
        for key, value in positive.items():
            _require(value > 0, f"{key} is {value}, it must be above 0")
        not_negative = {
            "optimizer.weight_decay": self.optimizer.weight_decay,
            "optimizer.gradient_clipping": self.optimizer.gradient_clipping,
        }
        for key, value in not_negative.items():
            _require(value >= 0, f"{key} is {value}, it must not be negative")
        _check_optimizer(self.optimizer)
        for beta in self.optimizer.betas:
            _require(0 <= beta < 1, f"optimizer.betas has {beta}, it must be at least 0, below 1")
        for key, rate in {"masking": self.masking.rate, "validation": self.validation.rate}.items():
            _require(0 < rate < 1, f"{key}.rate is {rate}, it must lie between 0 and 1")
        shares = (self.masking.mask_share, self.masking.random_share)
        _require(
            min(shares) >= 0 and sum(shares) <= 1,
            f"masking.mask_share + masking.random_share is {sum(shares)}, it must lie in 0 … 1",
        )
        ramps = self.schedule.warmup_tokens + self.schedule.decay_tokens
        _require(
            min(self.schedule.warmup_tokens, self.schedule.decay_tokens) >= 0
            and ramps <= self.schedule.total_tokens,
            f"schedule.warmup_tokens + schedule.decay_tokens is {ramps}, more than "
            f"schedule.total_tokens = {self.schedule.total_tokens}",
        )
        _require(self.checkpoint.keep >= 2, "checkpoint.keep must be at least 2")
        weights = self.data.weights
        _require(weights is None or bool(weights), "data.weights names no source; leave it out")
        for name, weight in (weights or {}).items():
            _require(weight > 0, f"data.weights.{name} is {weight}, it must be above 0")
        _require(
            self.optimizer.name != "muon" or self.zero_stage > 0,
            "zero_stage is 0, and nothing there keeps Muon from taking a step that is not finite; "
            "set zero_stage=1",
        )
        zero = self.deepspeed.get("zero_optimization") or {}
        owned = sorted(set(self.deepspeed) & OWNED_DEEPSPEED_KEYS)
        owned += [
            f"zero_optimization.{key}" for key in ("stage", "compute_grad_norm") if key in zero
        ]
        _require(
            not owned, f"deepspeed.{', deepspeed.'.join(owned)}: set the run's own key instead"
        )
        _require(
            not zero.get("offload_optimizer"),
            "deepspeed.zero_optimization.offload_optimizer: optimizer steps run on the GPU alone; "
            "leave it out, and use a higher zero_stage or more GPUs to save memory",
        )


def _check_optimizer(optimizer: Optimizer) -> None:
    decay, is_muon = optimizer.weight_decay, optimizer.name == "muon"
    _require(
        decay < 1e-3,
        f"optimizer.weight_decay is {decay}: it is the share that a step at the peak rate takes "
        f"away, ModernBERT's 1e-5. Where AdamW has {decay} elsewhere, set {decay} × the peak rate",
    )
    for key in ("muon_lr_factor", "muon_momentum"):
        value = getattr(optimizer, key)
        _require(
            value is None or is_muon,
            f"optimizer.{key} is set but optimizer.name is {optimizer.name}; leave it out",
        )
        _require(value is None or value > 0, f"optimizer.{key} is {value}, it must be above 0")
    _require(
        not (is_muon and optimizer.gradient_clipping),
        "optimizer.gradient_clipping: Muon's steps have one size whatever the gradient's norm, and "
        "DeepSpeed would clip them, not the gradient; set it to 0",
    )


OWNED_DEEPSPEED_KEYS = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "data_types",
    "communication_data_type",
    "zero_allow_untested_optimizer",
}


def micro_steps(batch: Batch, ranks: int) -> int:
    """Micro-steps of an optimizer step: batch.rows / (ranks × batch.micro_rows).

    Raises ConfigError, with the counts that fit, where that is no whole number.
    """
    rows, at_once = batch.rows, ranks * batch.micro_rows
    if rows % at_once == 0:
        return rows // at_once
    fitting_micro_rows = [m for m in range(1, rows + 1) if rows % (ranks * m) == 0]
    fitting_ranks = [n for n in range(1, rows + 1) if rows % (n * batch.micro_rows) == 0]
    lower, upper = rows // at_once * at_once, (rows // at_once + 1) * at_once
    advice = [f"batch.rows = {' or '.join(str(n) for n in (lower, upper) if n)}"]
    if fitting_micro_rows:
        advice.append(f"batch.micro_rows one of {fitting_micro_rows}")
    if fitting_ranks:
        advice.append(f"ranks one of {fitting_ranks}")
    raise ConfigError(
        f"{ranks} ranks × batch.micro_rows = {batch.micro_rows} does not divide batch.rows = "
        f"{rows}; what fits: {', or '.join(advice)}"
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
