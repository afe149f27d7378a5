"""A run worked out before anything is trained: configuration, data and ranks fitted together."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from common.config import ConfigError
from data_prep.shards import DataError, DataSet
from model.config import ModernBertConfig
from train.batch import BatchShape
from train.config import Train
from train.engine import choose_dtypes, deepspeed_config
from train.mask_order import make_order
from train.masking import Masker, Vocabulary
from train.phase_config import Data, Phase, micro_steps
from train.prepare_model import check_preparation, check_tokens
from train.row_order import RowOrder, as_written
from train.schedule import (
    PhaseSchedule,
    Progress,
    StepPlan,
    current_phase,
    last_slot,
    last_step,
    plan_steps,
)
from train.start import starting_geometry, tokenizer_folder

_BF16_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class RunPhase:
    """Everything that follows from the configuration of a phase and its data set."""

    name: str
    config: Phase
    data: DataSet
    model_config: ModernBertConfig
    micro_steps: int
    """of a step of full size"""
    schedule: PhaseSchedule
    order: RowOrder
    masker: Masker
    shape: BatchShape
    validation_rows: dict[str, int]


@dataclass(frozen=True)
class Run:
    """Everything that follows from the configuration, the data sets and the number of ranks."""

    config: Train
    start: ModernBertConfig
    """the model that the first phase is given"""
    precision: str
    ranks: int
    phases: dict[str, RunPhase]

    @property
    def last_phase(self) -> RunPhase:
        """The phase that the run ends with."""
        return list(self.phases.values())[-1]

    @property
    def schedules(self) -> list[PhaseSchedule]:
        """What determines the steps, phase by phase."""
        return [phase.schedule for phase in self.phases.values()]

    @property
    def deepspeed(self) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        largest = max(self.phases.values(), key=lambda phase: phase.micro_steps)
        return deepspeed_config(
            self.config, self.precision, largest.config.batch, largest.micro_steps, self.ranks
        )

    def last_step(self, start: Progress) -> int:
        """The number of the run's last step when it continues from `start`."""
        return last_step(self.schedules, start)

    def last_slot(self, start: Progress) -> int:
        """The token slots of the whole run when it continues from `start`."""
        return last_slot(self.schedules, start)

    def plans(self, start: Progress) -> Iterator[StepPlan]:
        """Every step from `start` to the end."""
        return plan_steps(self.schedules, start)

    def current_phase(self, progress: Progress) -> RunPhase:
        """The last phase that has begun, or the first."""
        return list(self.phases.values())[current_phase(self.schedules, progress)]

    def epochs_read(self, progress: Progress) -> dict[str, float]:
        """How often each source has been read, whatever the length its rows were packed for."""
        epochs: dict[str, float] = {}
        for name, rows in progress.rows.items():
            available = self.phases[name].data.sources("train")
            for source, number in rows.items():
                epochs[source] = epochs.get(source, 0.0) + number / available[source]
        return epochs


def open_folders(config: Train) -> dict[Path, DataSet]:
    """The data sets of all phases by their `dir`, which must have one tokenizer."""
    opened: dict[Path, DataSet] = {}
    for name, phase in config.phases.items():
        if phase.data.dir in opened:
            continue
        data = DataSet(phase.data.dir)
        data.check_tokenizer(tokenizer_folder(data))
        for other in opened.values():
            if data.tokenizer["sha256"] != other.tokenizer["sha256"]:
                raise ConfigError(
                    f"phases.{name}.data.dir = {data.folder} was made with another tokenizer than "
                    f"{other.folder}; a model has one: make both with it (data_prep's max_lengths "
                    "makes data sets of several lengths at once)"
                )
        opened[phase.data.dir] = data
    return opened


def resolve(
    config: Train,
    ranks: int,
    on_gpu: bool,
    open_data: Callable[[Train], dict[Path, DataSet]] = open_folders,
) -> Run:
    """Work out a run; raises ConfigError or DataError for whatever does not fit together.

    open_data: gives the data sets of all phases by their `dir`.
    """
    precision = _precision(config.precision, on_gpu)
    choose_dtypes(config, precision)
    check_preparation(config, precision, on_gpu)
    if config.profile is not None and config.profile.rank >= ranks:
        raise ConfigError(
            f"profile.rank is {config.profile.rank}, and the run's ranks are 0 to {ranks - 1}"
        )
    steps = {name: micro_steps(name, part.batch, ranks) for name, part in config.phases.items()}
    opened = open_data(config)
    max_length = max(data.max_length for data in opened.values())
    start = starting_geometry(config, next(iter(opened.values())), max_length)
    phases: dict[str, RunPhase] = {}
    model = start
    for name, part in config.phases.items():
        if part.global_rope_theta is not None:
            model = dataclasses.replace(model, global_rope_theta=part.global_rope_theta)
        data = opened[part.data.dir]
        phases[name] = _resolve_phase(config, name, data, model, steps[name], phases)
    return Run(
        config=config,
        start=start,
        precision=precision,
        ranks=ranks,
        phases=phases,
    )


def _resolve_phase(
    config: Train,
    name: str,
    data: DataSet,
    model: ModernBertConfig,
    steps: int,
    earlier: dict[str, RunPhase],
) -> RunPhase:
    part = config.phases[name]
    vocabulary = Vocabulary.from_manifest(data.tokenizer)
    rows = data.sources("train")
    weights, total_rows = mixture(name, part.data, rows, part.tokens, data.row_tokens)
    tokens = part.tokens if part.tokens is not None else total_rows * data.row_tokens
    _check_ramps(name, part, tokens)
    check_tokens(config.fp8, name, part.batch.micro_rows, data.row_tokens)
    read: Counter[str] = Counter()
    for phase in earlier.values():
        if phase.data.manifest_sha256 == data.manifest_sha256:
            read.update(phase.order.rows_read(phase.schedule.rows()))
    return RunPhase(
        name=name,
        config=part,
        data=data,
        model_config=model,
        micro_steps=steps,
        schedule=PhaseSchedule(
            name=name,
            tokens=tokens,
            row_tokens=data.row_tokens,
            batch=part.batch,
            lr=part.lr,
            masking=part.masking,
            weight_decay=(
                config.optimizer.weight_decay if part.weight_decay is None else part.weight_decay
            ),
        ),
        order=RowOrder(config.seed, rows, weights, read),
        masker=Masker(
            seed=config.seed,
            vocabulary=vocabulary,
            mask_share=part.masking.mask_share,
            random_share=part.masking.random_share,
            order=make_order(part.masking, data, tokenizer_folder(data), vocabulary.special),
        ),
        shape=BatchShape(
            rows=part.batch.micro_rows,
            row_tokens=data.row_tokens,
            max_length=data.max_length,
            highest_rate=part.masking.highest_rate,
            sources=tuple(sorted(rows.keys() | data.sources("validation").keys())),
        ),
        validation_rows=_validation_rows(
            data.folder, config.validation.rows, data.sources("validation")
        ),
    )


def mixture(
    phase: str, data: Data, rows: dict[str, int], tokens: int | None, row_tokens: int
) -> tuple[dict[str, Fraction], int]:
    """The share of each source in a phase, exactly, on any scale, and the rows of the phase.

    rows: those that each source has. With `epochs`, a source gets epochs × rows; the sources that
    `epochs` does not name share what is left of `tokens` in proportion to their rows. The rows that
    make a whole step of the last one are none of these, for they depend on the batch, which may be
    changed while a phase goes on.
    """
    for key in ("weights", "epochs"):
        for source in getattr(data, key) or {}:
            if source not in rows:
                raise ConfigError(
                    f"phases.{phase}.data.{key}.{source}: the data set {data.dir} has no source "
                    f"{source!r}; it has {', '.join(sorted(rows))}"
                )
    total = 0 if tokens is None else math.ceil(tokens / row_tokens)
    if data.epochs is None:
        return {name: as_written(share) for name, share in (data.weights or rows).items()}, total
    wanted = {name: as_written(epochs) * rows[name] for name, epochs in data.epochs.items()}
    asked = sum(wanted.values(), Fraction())
    if tokens is None:
        return wanted, math.ceil(asked)
    others = {name: number for name, number in rows.items() if name not in wanted}
    left = total - asked
    if not others:
        raise ConfigError(
            f"phases.{phase}: data.epochs names every source, so that {float(asked):,.0f} rows are "
            f"read, {float(asked * row_tokens):,.0f} slots; leave tokens out, or leave a source "
            "out of data.epochs, which then fills what tokens leaves"
        )
    if left <= 0:
        raise ConfigError(
            f"phases.{phase}: data.epochs asks for {float(asked * row_tokens):,.0f} slots, "
            f"which leaves nothing of tokens = {tokens:,} to {', '.join(sorted(others))}; raise "
            "tokens or lower the epochs"
        )
    scale = left / sum(others.values())
    return wanted | {name: number * scale for name, number in others.items()}, total


def _check_ramps(name: str, phase: Phase, tokens: int) -> None:
    """Raise ConfigError where a warm-up or a decay is longer than the phase."""
    ramps = phase.lr.warmup_tokens + (phase.lr.decay_tokens or 0)
    if ramps > tokens:
        raise ConfigError(
            f"phases.{name}: lr.warmup_tokens + lr.decay_tokens is {ramps:,}, more than the "
            f"phase's {tokens:,} tokens"
        )
    if phase.lr.decay != "none" and phase.lr.warmup_tokens == tokens:
        raise ConfigError(f"phases.{name}: lr.warmup_tokens leaves no tokens for lr.decay")
    if phase.batch.warmup is not None and phase.batch.warmup.tokens > tokens:
        raise ConfigError(
            f"phases.{name}: batch.warmup.tokens is {phase.batch.warmup.tokens:,}, more than the "
            f"phase's {tokens:,} tokens"
        )


def _precision(asked: str, on_gpu: bool) -> str:
    precision = asked if asked != "auto" else "bf16" if on_gpu else "fp32"
    # A run on GPUs may be worked out where there is none.
    if precision == "bf16" and on_gpu and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < _BF16_CAPABILITY:
            raise ConfigError(
                f"precision is {asked}, but {torch.cuda.get_device_name()} has no bf16: its "
                f"compute capability is {capability[0]}.{capability[1]}, bf16 begins with 8.0; set "
                "precision=fp32"
            )
    return precision


def _validation_rows(folder: Path, wanted: int, available: dict[str, int]) -> dict[str, int]:
    """How many rows of each source to validate on: all, or a share, at least one, of each."""
    total = sum(available.values())
    if not total:
        raise DataError(
            f"the data set {folder} has no validation rows; make it again with a larger "
            "validation_share, or of more documents"
        )
    if wanted >= total:
        return available
    return {
        name: min(rows, max(1, round(wanted * rows / total))) for name, rows in available.items()
    }
