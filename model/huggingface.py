"""Hugging Face folders in and out: `config.json`, safetensors, tokenizer files.

What is written here loads with `AutoModelForMaskedLM.from_pretrained` and `AutoTokenizer`, with no
missing or unexpected key and the same logits; what is read here is used to the last key.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.files import whole_folder
from model.config import ModernBertConfig, from_hugging_face, to_hugging_face
from model.modernbert import ModernBertForMaskedLM

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TIED, _SOURCE = "decoder.weight", "model.embeddings.tok_embeddings.weight"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "sentencepiece.model",
    "vocab.txt",
)
_WRITTEN = {"config.json", _WEIGHTS, *_TOKENIZER_FILES}
# A vocabulary is padded to a round number of rows; by more than this it is another tokenizer's.
_MOST_VOCABULARY_PADDING = 511


class ModelError(ValueError):
    """A model folder that cannot be read or written; the message names it and says what to do."""


def load_config(folder: Path) -> ModernBertConfig:
    """The geometry in a Hugging Face folder; raises ModelError for one that is not implemented."""
    path = folder / "config.json"
    try:
        return from_hugging_face(_read_json(path))
    except ValueError as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path}: {error}") from None


def load_pretrained(folder: Path) -> ModernBertForMaskedLM:
    """The model in a Hugging Face folder, on the CPU, in fp32 whatever dtype is stored.

    Raises ModelError unless every tensor of the file is used, none is missing and all have the
    shape that `config.json` asks for.
    """
    config = load_config(folder)
    tensors = _read_tensors(folder)
    tied = tensors.get(_TIED)
    if tied is not None and _SOURCE in tensors and not torch.equal(tied, tensors[_SOURCE]):
        raise ModelError(
            f"{folder}: {_TIED} differs from {_SOURCE}, but the model ties them; "
            "an untied decoder is not implemented"
        )
    model = ModernBertForMaskedLM(config)
    load_weights(model, tensors, str(folder))
    return model


def load_weights(model: ModernBertForMaskedLM, tensors: dict[str, Tensor], origin: str) -> None:
    """Copy `tensors` into `model`; the tied decoder may be left out.

    Raises ModelError, which begins with `origin`, unless keys and shapes are exactly the model's.
    """
    expected = model.state_dict()
    missing = sorted(set(expected) - set(tensors) - {_TIED})
    unexpected = sorted(set(tensors) - set(expected))
    if missing or unexpected:
        raise ModelError(
            f"{origin}: these are not the weights of a ModernBertForMaskedLM with this "
            f"configuration; missing: {missing or 'none'}; unexpected: {unexpected or 'none'}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ModelError(
                f"{origin}: {name} has the shape {tuple(tensor.shape)}, the configuration asks "
                f"for {tuple(expected[name].shape)}"
            )
    model.load_state_dict({_TIED: tensors[_SOURCE], **tensors})


def save_pretrained(model: ModernBertForMaskedLM, *, tokenizer_folder: Path, out: Path) -> None:
    """Write `model` and its tokenizer as a Hugging Face folder, whole or not at all.

    The ids of [PAD], [CLS] and [SEP] in `config.json` are the tokenizer's. An earlier export at
    `out` is replaced. Raises ModelError if the tokenizer does not fit the model, or if `out` holds
    something else.
    """
    _check_replaceable(out)
    config = replace(model.config, **_special_ids(tokenizer_folder, model.config.vocab_size))
    dtype = str(model.decoder.weight.dtype).removeprefix("torch.")
    description = {**to_hugging_face(config), "dtype": dtype}
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name != _TIED
    }
    with whole_folder(out) as folder:
        text = json.dumps(description, indent=2, sort_keys=True) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
        for name in _TOKENIZER_FILES:
            if (tokenizer_folder / name).is_file():
                shutil.copyfile(tokenizer_folder / name, folder / name)


def _check_replaceable(out: Path) -> None:
    """Raise ModelError unless `out` is absent, empty or an earlier export and nothing more."""
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise ModelError(f"{out} is not a folder; choose another name, or remove it")
    foreign = sorted({path.name for path in out.iterdir()} - _WRITTEN)
    if foreign:
        raise ModelError(
            f"{out} holds {foreign[0]}, which no export writes; choose another folder, or remove it"
        )


def _special_ids(tokenizer_folder: Path, vocab_size: int) -> dict[str, int]:
    """The ids a configuration needs, from a tokenizer that fits `vocab_size`."""
    # Takes seconds to import, which training ranks need not spend at start.
    from transformers import AutoTokenizer

    if not (tokenizer_folder / "tokenizer.json").is_file():
        raise ModelError(
            f"{tokenizer_folder} has no tokenizer.json: it is not a tokenizer's folder"
        )
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    tokens = max(tokenizer.get_vocab().values()) + 1
    if not tokens <= vocab_size <= tokens + _MOST_VOCABULARY_PADDING:
        raise ModelError(
            f"the tokenizer in {tokenizer_folder} has {tokens} tokens and the model's vocab_size "
            f"is {vocab_size}: they do not belong together; give the tokenizer that the model was "
            "trained with"
        )
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "cls", "sep", "mask")}
    absent = [kind for kind, number in ids.items() if number is None]
    if absent:
        raise ModelError(f"the tokenizer in {tokenizer_folder} has no {', '.join(absent)} token")
    return {f"{kind}_token_id": ids[kind] for kind in ("pad", "cls", "sep")}


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of `model.safetensors`, or of the shards that its index lists."""
    if (folder / _WEIGHTS).is_file():
        return load_file(folder / _WEIGHTS)
    if not (folder / _INDEX).is_file():
        raise ModelError(
            f"{folder} has neither {_WEIGHTS} nor {_INDEX}; a model saved as pytorch_model.bin "
            "has to be saved again with transformers' save_pretrained"
        )
    tensors: dict[str, Tensor] = {}
    places: dict[str, str] = _read_json(folder / _INDEX).get("weight_map", {})
    for shard in sorted(set(places.values())):
        if not (folder / shard).is_file():
            raise ModelError(f"{folder / shard} is missing, but {_INDEX} lists it")
        tensors.update(load_file(folder / shard))
    if set(tensors) != set(places):
        wrong = sorted(set(tensors) ^ set(places))
        raise ModelError(f"{folder / _INDEX} and its shards disagree about {wrong}")
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{path}: {error.strerror}; a Hugging Face model folder is needed"
        ) from None
    except ValueError:
        raise ModelError(f"{path} is not JSON; the folder is damaged, get it again") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds no JSON object; the folder is damaged, get it again")
    return values
