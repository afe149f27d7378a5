"""One phase of a run: its data, batch, masking and learning rate, keys of `train.phases.NAME`.

Lengths are counted in token slots, rows × row_tokens, padding included.
"""

import math
from dataclasses import field
from pathlib import Path
from typing import Literal, get_args

from common.config import ConfigError, config

MaskingKind = Literal["token", "whole_word", "token_aware"]


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def check_decay(key: str, decay: float) -> None:
    """Raise ConfigError unless `decay` can be the share that a step takes away."""
    require(decay >= 0, f"{key} is {decay}, it must not be negative")
    require(
        decay < 1e-3,
        f"{key} is {decay}: it is the share that a step at the peak rate takes away, ModernBERT's "
        f"1e-5. Where AdamW has {decay} elsewhere, set {decay} × the peak rate",
    )


@config
class Data:
    """What is read; sources by `weights`, by `epochs`, or by default as many rows as each has."""

    dir: Path
    """a data set of `python -m data_prep`: the folder that holds manifest.json"""
    weights: dict[str, float] | None = None
    """share of each source in the rows read, on any scale"""
    epochs: dict[str, float] | None = None
    """how often each source is read in the phase; sources not named here fill what `tokens` leaves,
    or are not read where the phase has no `tokens`"""

    def __post_init__(self) -> None:
        require(
            self.weights is None or self.epochs is None,
            "weights and epochs both say how much of each source is read; leave one of them out",
        )
        for name, shares in (("weights", self.weights), ("epochs", self.epochs)):
            require(shares is None or bool(shares), f"{name} names no source; leave it out")
            for source, share in (shares or {}).items():
                require(
                    0 < share < math.inf,
                    f"{name}.{source} is {share}, it must be above 0 and finite",
                )


@config
class BatchWarmup:
    """Steps that grow from `rows` to the batch's own, by `increment`, over the first `tokens`.

    Every size is kept for equally many steps, as ModernBERT does, and is a multiple of
    ranks × micro_rows.
    """

    rows: int
    """rows of the first steps"""
    increment: int
    tokens: int
    """token slots after which steps have their full size"""

    def __post_init__(self) -> None:
        for name in ("rows", "increment", "tokens"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, not above 0")


@config
class Batch:
    """Rows of an optimizer step."""

    rows: int = 576
    """rows of a step, over all ranks and micro-steps"""
    micro_rows: int = 8
    """rows that a rank passes through the model at once"""
    warmup: BatchWarmup | None = None
    """smaller steps at first; by default all are of `rows` rows"""

    def __post_init__(self) -> None:
        for name in ("rows", "micro_rows"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, not above 0")
        if self.warmup is not None:
            growth = self.rows - self.warmup.rows
            require(
                growth > 0 and growth % self.warmup.increment == 0,
                f"warmup goes from {self.warmup.rows} rows by {self.warmup.increment}, which does "
                f"not lead to rows = {self.rows}",
            )


@config
class Masking:
    """Masked-language-model targets of training; validation masks single tokens, all alike."""

    rate: float = 0.3
    """share of the maskable tokens that is masked"""
    final_rate: float | None = None
    """share at the end of the phase, reached linearly; by default `rate` throughout"""
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
        for name, rate in (("rate", self.rate), ("final_rate", self.final_rate)):
            require(rate is None or 0 < rate < 1, f"{name} is {rate}, it must lie between 0 and 1")
        for name in ("weight_cap", "term_boost"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, not above 0")
        require(
            self.frequency_exponent >= 0,
            f"frequency_exponent is {self.frequency_exponent}, it must not be negative",
        )
        shares = (self.mask_share, self.random_share)
        require(
            min(shares) >= 0 and sum(shares) <= 1,
            f"mask_share + random_share is {sum(shares)}, it must lie in 0 … 1",
        )

    @property
    def highest_rate(self) -> float:
        """The highest rate of the phase."""
        return max(self.rate, self.rate if self.final_rate is None else self.final_rate)


Decay = Literal["none", "sqrt", "cosine", "linear"]
_SHAPES = [name for name in get_args(Decay) if name != "none"]


@config
class LearningRate:
    """Linear warm-up from 0, the peak, and a decay at the end; without either it is constant."""

    peak: float = 8e-4
    warmup_tokens: int = 0
    decay: Decay = "none"
    """the shape of the decay; sqrt is ModernBERT's 1 - sqrt"""
    decay_tokens: int | None = None
    """length of the decay that ends the phase; by default all that follows the warm-up"""
    final_share: float = 0.0
    """share of the peak that the decay ends at"""

    def __post_init__(self) -> None:
        require(self.peak > 0, f"peak is {self.peak}, it must be above 0")
        require(self.warmup_tokens >= 0, f"warmup_tokens is {self.warmup_tokens}, it is negative")
        require(
            self.decay_tokens is None or self.decay_tokens > 0,
            f"decay_tokens is {self.decay_tokens}, it must be above 0",
        )
        require(
            self.decay != "none" or self.decay_tokens is None,
            f"decay_tokens needs a shape: set decay to one of {', '.join(_SHAPES)}",
        )
        require(
            self.decay != "none" or self.final_share == 0,
            f"final_share needs a shape: set decay to one of {', '.join(_SHAPES)}",
        )
        require(
            0 <= self.final_share < 1, f"final_share is {self.final_share}, it must lie in 0 … 1"
        )


@config
class Phase:
    """A stretch of a run on one data set; the documents' length is the data set's."""

    data: Data
    tokens: int | None = None
    """slots after which the phase is complete (rounded up to a whole step); by default those that
    data.epochs ask for"""
    batch: Batch = field(default_factory=Batch)
    masking: Masking = field(default_factory=Masking)
    lr: LearningRate = field(default_factory=LearningRate)
    weight_decay: float | None = None
    """by default optimizer.weight_decay, where it says what it means"""
    global_rope_theta: float | None = None
    """base of the rotary positions in global attention; by default it stays what it was"""

    def __post_init__(self) -> None:
        require(self.tokens is None or self.tokens > 0, f"tokens is {self.tokens}, not above 0")
        require(
            self.tokens is not None or self.data.epochs is not None,
            "tokens is missing: give the length of the phase in token slots, or data.epochs",
        )
        if self.weight_decay is not None:
            check_decay("weight_decay", self.weight_decay)
        require(
            self.global_rope_theta is None or self.global_rope_theta > 0,
            f"global_rope_theta is {self.global_rope_theta}, it must be above 0",
        )


def micro_steps(name: str, batch: Batch, ranks: int) -> int:
    """Micro-steps of an optimizer step at its full size: batch.rows / (ranks × batch.micro_rows).

    Raises ConfigError about the phase `name`, with the counts that fit, where a step would not be
    a whole number of micro-steps on every rank.
    """
    at_once = ranks * batch.micro_rows
    sizes = {"batch.rows": batch.rows}
    if batch.warmup is not None:
        sizes |= {
            "batch.warmup.rows": batch.warmup.rows,
            "batch.warmup.increment": batch.warmup.increment,
        }
    for key, rows in sizes.items():
        if rows % at_once:
            raise ConfigError(
                f"phases.{name}: {ranks} ranks × batch.micro_rows = {batch.micro_rows} does not "
                f"divide {key} = {rows}; what fits: {_what_fits(key, rows, batch, ranks)}"
            )
    return batch.rows // at_once


def _what_fits(key: str, rows: int, batch: Batch, ranks: int) -> str:
    at_once = ranks * batch.micro_rows
    lower, upper = rows // at_once * at_once, (rows // at_once + 1) * at_once
    fitting_micro_rows = [m for m in range(1, rows + 1) if rows % (ranks * m) == 0]
    fitting_ranks = [n for n in range(1, rows + 1) if rows % (n * batch.micro_rows) == 0]
    advice = [f"{key} = {' or '.join(str(n) for n in (lower, upper) if n)}"]
    if fitting_micro_rows:
        advice.append(f"batch.micro_rows one of {fitting_micro_rows}")
    if fitting_ranks:
        advice.append(f"ranks one of {fitting_ranks}")
    return ", or ".join(advice)
