"""What a run starts from: its geometry, and weights that are random or those of `init_from`.

`init_from` is a Hugging Face folder or a training checkpoint, RUN/checkpoints/step_….
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from common.config import ConfigError
from common.counter_random import derive_key
from data_prep.shards import DataSet
from kernels.layer_norm import SMALLEST_WEIGHT
from model.config import GEOMETRIES, ModernBertConfig, from_hugging_face
from model.modernbert import ModernBertForMaskedLM, Norm
from train.config import Train

TOKENIZER_FILE = "tokenizer.json"


def starting_geometry(config: Train, data: DataSet, max_length: int) -> ModernBertConfig:
    """The model that a run starts with, for documents of up to `max_length` tokens.

    Sizes are those of `init_from`, if there is one, and of `model`; ids are the tokenizer's. Raises
    ConfigError where they do not fit together.
    """
    special = data.tokenizer["special_ids"]
    base = GEOMETRIES[config.model.geometry or "base"]
    if config.init_from is not None:
        start = read_geometry(config.init_from)
        _check_vocabulary(config.init_from, start, data)
        if start.max_position_embeddings < max_length:
            raise ConfigError(
                f"init_from = {config.init_from} has {start.max_position_embeddings} positions, "
                f"the longest documents have {max_length} tokens; use data sets of a smaller "
                "max_length"
            )
        # Sizes that are not asked for stay those of init_from; so do all constants.
        asked = dataclasses.asdict(base) if config.model.geometry is not None else {}
        base = dataclasses.replace(
            start, **{name: asked[name] for name in _sizes(config) if name in asked}
        )
    sizes = {name: size for name, size in _sizes(config).items() if size is not None}
    try:
        geometry = dataclasses.replace(
            base,
            **sizes,
            vocab_size=data.tokenizer["vocab_size"],
            max_position_embeddings=max(base.max_position_embeddings, max_length),
            pad_token_id=special["pad"],
            cls_token_id=special["cls"],
            sep_token_id=special["sep"],
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    if config.init_from is not None:
        _check_growth(config, start, geometry)
    return geometry


def make_model(config: Train, geometry: ModernBertConfig) -> ModernBertForMaskedLM:
    """The model a run starts from: random weights, the same on every rank, or those of init_from.

    A smaller model's weights are tiled. Where the optimizer is kept, the weights come with it, see
    `train.checkpoint`, and those made here are random.
    """
    if config.init_from is None or config.init_optimizer == "kept":
        seed = derive_key(config.seed, "weights") >> 1
        return ModernBertForMaskedLM(geometry, torch.Generator().manual_seed(seed))
    # Only here, for they bring transformers and DeepSpeed with them, which takes seconds.
    from model.export import load_checkpoint
    from model.huggingface import load_pretrained
    from model.tiling import tile

    read = load_checkpoint if _is_checkpoint(config.init_from) else load_pretrained
    try:
        model = read(config.init_from)
        check_norms(model)
        return model if _same_sizes(model.config, geometry) else tile(model, geometry)
    except ValueError as error:
        raise ConfigError(f"init_from: {error}") from None


def check_norms(model: ModernBertForMaskedLM) -> None:
    """Raise ConfigError for a norm whose weight holds a 0, which no gradient could ever move.

    See `kernels.layer_norm`: the backward divides by the weight.
    """
    for name, module in model.named_modules():
        if isinstance(module, Norm):
            hidden = int((module.weight.abs() < SMALLEST_WEIGHT).sum())
            if hidden:
                raise ConfigError(
                    f"{name}.weight holds {hidden} zeros (or numbers below {SMALLEST_WEIGHT:.1e}), "
                    "which would get no gradient; take other weights, or put a small number, such "
                    "as 1e-6, in their place"
                )


def read_geometry(folder: Path) -> ModernBertConfig:
    """The geometry of a Hugging Face folder or a training checkpoint."""
    path = folder / ("manifest.json" if _is_checkpoint(folder) else "config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if _is_checkpoint(folder):
            return ModernBertConfig(**values["model"])
        return from_hugging_face(values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"init_from: cannot take the model from {path}: {error}; give a Hugging Face folder "
            "or a checkpoint RUN/checkpoints/step_…"
        ) from None


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "manifest.json").exists()


def _sizes(config: Train) -> dict[str, Any]:
    sizes = dataclasses.asdict(config.model)
    del sizes["geometry"]
    return sizes


def _same_sizes(one: ModernBertConfig, other: ModernBertConfig) -> bool:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _check_growth(config: Train, start: ModernBertConfig, geometry: ModernBertConfig) -> None:
    """Raise ConfigError unless the weights of `start` are the model's, or can be tiled to it."""
    if _same_sizes(start, geometry):
        return
    if config.init_optimizer == "kept":
        raise ConfigError(
            f"init_optimizer is kept, but `model` asks for other sizes than init_from = "
            f"{config.init_from} has; leave the sizes out, or set init_optimizer to fresh"
        )
    for name in _sizes(config):
        ours, theirs = getattr(geometry, name), getattr(start, name)
        if ours < theirs:
            raise ConfigError(
                f"model.{name} is {ours}, but init_from = {config.init_from} has {theirs}: weights "
                "can be tiled to a larger model, not cut to a smaller one"
            )
    if geometry.head_dim != start.head_dim:
        raise ConfigError(
            f"model: heads are {geometry.head_dim} wide, those of init_from = {config.init_from} "
            f"{start.head_dim}; to be tiled, they must be of one width"
        )


def _check_vocabulary(init_from: Path, start: ModernBertConfig, data: DataSet) -> None:
    """Raise ConfigError unless the data set was made with the tokenizer of `init_from`."""
    remedy = (
        f"make the data set with that model's tokenizer (data_prep's tokenizer.existing={init_from}"
        "), or leave init_from out"
    )
    expected = data.tokenizer["vocab_size"]
    if start.vocab_size != expected:
        raise ConfigError(
            f"init_from = {init_from} has a vocabulary of {start.vocab_size}, the tokenizer of "
            f"{data.folder} one of {expected}; {remedy}"
        )
    for token in ("cls", "sep", "pad"):
        ours, theirs = data.tokenizer["special_ids"][token], getattr(start, f"{token}_token_id")
        if ours != theirs:
            raise ConfigError(
                f"init_from = {init_from} has another tokenizer than {data.folder}: its {token} "
                f"token is {theirs}, not {ours}; {remedy}"
            )
    folder = init_from / "tokenizer" if _is_checkpoint(init_from) else init_from
    # A folder of weights alone is judged by its ids.
    if (folder / TOKENIZER_FILE).is_file():
        ours, theirs = (_token_ids(path) for path in (tokenizer_folder(data), folder))
        differing = sorted(
            number
            for token, number in (ours.items() ^ theirs.items())
            if ours.get(token) != theirs.get(token)
        )
        if differing:
            raise ConfigError(
                f"init_from = {init_from} has another tokenizer than {data.folder}: "
                f"{len(set(differing))} ids stand for other tokens, the first is {differing[0]}; "
                f"{remedy}"
            )


def tokenizer_folder(data: DataSet) -> Path:
    """The tokenizer's folder, which lies beside the data set's."""
    return data.folder.resolve().parent / "tokenizer"


def _token_ids(folder: Path) -> dict[str, int]:
    """Token -> id of a tokenizer.json of the tokenizers library."""
    path = folder / TOKENIZER_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tokens = content.get("model", {}).get("vocab", {})
        if isinstance(tokens, list):  # of a unigram model: [token, score] in the order of the ids
            tokens = {token: number for number, (token, _) in enumerate(tokens)}
        return tokens | {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read as a tokenizer: {error}") from None
