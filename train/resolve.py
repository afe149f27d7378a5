"""A run worked out before anything is trained: configuration, data and ranks fitted together."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import ConfigError, config_to_yaml
from data_prep.shards import DataError, DataSet
from model.config import GEOMETRIES, ModernBertConfig, from_hugging_face
from train.batch import BatchShape
from train.config import Train, micro_steps
from train.engine import choose_dtypes, deepspeed_config
from train.mask_order import make_order
from train.masking import Masker, Vocabulary
from train.row_order import RowOrder
from train.schedule import Progress, StepPlan, last_step, plan_steps


@dataclass(frozen=True)
class Run:
    """Everything that follows from the configuration, the data set and the number of ranks."""

    config: Train
    data: DataSet
    model_config: ModernBertConfig
    precision: str
    ranks: int
    micro_steps: int
    order: RowOrder
    masker: Masker
    shape: BatchShape
    validation_rows: dict[str, int]

    @property
    def slots_per_step(self) -> int:
        """Token slots of an optimizer step."""
        return self.config.batch.rows * self.data.row_tokens

    def last_step(self, start: Progress) -> int:
        """The number of the run's last step when it continues from `start`."""
        return last_step(self.config.schedule, self.slots_per_step, start)

    @property
    def deepspeed(self) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        return deepspeed_config(self.config, self.precision, self.micro_steps, self.ranks)

    def plans(self, start: Progress) -> Iterator[StepPlan]:
        """Every step from `start` to the end."""
        config = self.config
        return plan_steps(
            config.schedule,
            config.optimizer.lr,
            config.masking.rate,
            config.batch.rows,
            self.data.row_tokens,
            start,
        )


def resolve(config: Train, ranks: int, on_gpu: bool) -> Run:
    """Work out a run; raises ConfigError or DataError for whatever does not fit together."""
    steps = micro_steps(config.batch, ranks)
    precision = _precision(config.precision, on_gpu)
    choose_dtypes(config, precision)
    data = _open_data(config)
    vocabulary = Vocabulary.from_manifest(data.tokenizer)
    return Run(
        config=config,
        data=data,
        model_config=_model_config(config, data),
        precision=precision,
        ranks=ranks,
        micro_steps=steps,
        order=RowOrder(config.seed, data.sources("train"), _weights(config, data)),
        masker=Masker(
            seed=config.seed,
            vocabulary=vocabulary,
            mask_share=config.masking.mask_share,
            random_share=config.masking.random_share,
            order=make_order(config.masking, data, tokenizer_folder(data), vocabulary.special),
        ),
        shape=BatchShape(
            rows=config.batch.micro_rows,
            row_tokens=data.row_tokens,
            max_length=data.max_length,
            highest_rate=config.masking.rate,
        ),
        validation_rows=_validation_rows(config.validation.rows, data.sources("validation")),
    )


def describe(run: Run) -> str:
    """The resolved run as text, for `--dry-run`."""
    model = run.model_config
    steps = run.last_step(Progress())
    rows = steps * run.config.batch.rows
    weights = run.order.quotas
    lines = [
        config_to_yaml(run.config).rstrip(),
        "---",
        f"model: {model.num_hidden_layers} layers × {model.hidden_size}, vocabulary "
        f"{model.vocab_size}, {parameter_count(model):,} parameters, {run.precision}",
        f"data: {run.data.folder}, rows of {run.data.row_tokens:,} tokens, documents of at most "
        f"{run.data.max_length:,}",
        f"batch: {run.config.batch.rows} rows a step = {run.ranks} ranks × {run.micro_steps} "
        f"micro-steps × {run.config.batch.micro_rows} rows",
        f"run: {steps:,} steps, {rows:,} rows, {rows * run.data.row_tokens:,} token slots",
    ]
    epochs = run.order.epochs(rows)
    lines += [
        f"source {name}: {run.order.rows[name]:,} rows, {weights[name] / sum(weights.values()):.2%}"
        f" of the rows read, {epochs[name]:.3f} epochs"
        for name in weights
    ]
    lines += [
        f"validation {name}: {number:,} of {run.data.sources('validation')[name]:,} rows"
        for name, number in run.validation_rows.items()
    ]
    lines.append("deepspeed: " + json.dumps(run.deepspeed, indent=2))
    return "\n".join(lines)


def parameter_count(model: ModernBertConfig) -> int:
    """Parameters of a model, the tied decoder's matrix counted once."""
    hidden, layers = model.hidden_size, model.num_hidden_layers
    attention = 4 * hidden * hidden
    mlp = 3 * hidden * model.intermediate_size
    norms = 2 * hidden
    # The first layer has no norm before its attention; the encoder has one before and one after.
    encoder = model.vocab_size * hidden + layers * (attention + mlp + norms) + hidden
    head = hidden * hidden + hidden + model.vocab_size
    return encoder + head


def _open_data(config: Train) -> DataSet:
    data = DataSet(config.data.dir)
    data.check_tokenizer(tokenizer_folder(data))
    return data


def tokenizer_folder(data: DataSet) -> Path:
    """The tokenizer's folder, which lies beside the data set's."""
    return data.folder.resolve().parent / "tokenizer"


def _model_config(config: Train, data: DataSet) -> ModernBertConfig:
    tokenizer = data.tokenizer
    special = tokenizer["special_ids"]
    if config.init_from is not None:
        start = _read_geometry(config)
        if start.vocab_size != tokenizer["vocab_size"]:
            raise ConfigError(
                f"init_from = {config.init_from} has a vocabulary of {start.vocab_size}, the "
                f"tokenizer of data.dir = {data.folder} one of {tokenizer['vocab_size']}; make "
                "the data set with the tokenizer of that model"
            )
        if start.max_position_embeddings < data.max_length:
            raise ConfigError(
                f"init_from = {config.init_from} has {start.max_position_embeddings} positions, "
                f"data.dir = {data.folder} documents of {data.max_length} tokens; use a data set "
                "of a smaller max_length"
            )
        for token in ("cls", "sep", "pad"):
            if getattr(start, f"{token}_token_id") != special[token]:
                raise ConfigError(
                    f"init_from = {config.init_from} has another tokenizer than data.dir = "
                    f"{data.folder}: its {token} token is {getattr(start, f'{token}_token_id')}, "
                    f"not {special[token]}; make the data set with the tokenizer of that model"
                )
    else:
        start = GEOMETRIES[config.model.geometry]
    sizes = {
        name: value
        for name, value in dataclasses.asdict(config.model).items()
        if name != "geometry" and value is not None
    }
    if config.init_from is not None and sizes:
        raise ConfigError(f"model.{min(sizes)} cannot be set: init_from brings the model's sizes")
    try:
        return dataclasses.replace(
            start,
            **sizes,
            vocab_size=tokenizer["vocab_size"],
            max_position_embeddings=max(start.max_position_embeddings, data.max_length),
            pad_token_id=special["pad"],
            cls_token_id=special["cls"],
            sep_token_id=special["sep"],
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None


def _read_geometry(config: Train) -> ModernBertConfig:
    assert config.init_from is not None
    path = config.init_from / "config.json"
    try:
        return from_hugging_face(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"init_from: cannot take the model from {path}: {error}") from None


def _precision(asked: str, on_gpu: bool) -> str:
    if asked == "auto":
        return "bf16" if on_gpu else "fp32"
    return asked


def _weights(config: Train, data: DataSet) -> dict[str, float]:
    rows = data.sources("train")
    if config.data.weights is None:
        return {name: float(number) for name, number in rows.items()}
    for name in config.data.weights:
        if name not in rows:
            raise ConfigError(
                f"data.weights.{name}: the data set {data.folder} has no source {name!r}; it has "
                f"{', '.join(sorted(rows))}"
            )
    return config.data.weights


def _validation_rows(wanted: int, available: dict[str, int]) -> dict[str, int]:
    """How many rows of each source to validate on: all, or a share, at least one, of each."""
    total = sum(available.values())
    if not total:
        raise DataError(
            "the data set has no validation rows; make it again with a larger validation_share, or "
            "of more documents"
        )
    if wanted >= total:
        return available
    return {
        name: min(rows, max(1, round(wanted * rows / total))) for name, rows in available.items()
    }
