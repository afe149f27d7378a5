"""The tokenizer: SentencePiece BPE trained here, or an existing Hugging Face one, used alike."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from data_prep.document import Document


def train_tokenizer(
    documents: Iterable[Document],
    out: Path,
    vocab_size: int,
    *,
    sample_bytes: int = 256 * 2**20,
    shares: Mapping[str, float] | None = None,
    seed: int = 0,
) -> None:
    """Train a tokenizer on a sample of `documents` and write its Hugging Face folder to `out`.

    vocab_size: a multiple of 64, special tokens and the 256 bytes included.
    sample_bytes: bytes of UTF-8 text to train on; memory is bounded by it, however many documents
        there are. Which documents are used depends on (seed, their ids) alone, not on their order.
    shares: source -> its part of `sample_bytes`; without it, one pool of all sources.
    Raises InputError for no text, or a vocabulary that the sample does not support.
    """
    raise NotImplementedError


def load_tokenizer(folder_or_name: str | Path) -> PreTrainedTokenizerFast:
    """A fast tokenizer from a folder, or by its name on the Hugging Face hub.

    Raises InputError when there is none, it is not a fast one, or lacks one of the tokens cls, sep,
    pad, mask, unk.
    """
    raise NotImplementedError


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[NDArray[Any]]:
    """The token ids of each text, without [CLS] and [SEP], never cut; uint16 or uint32.

    A literal `[MASK]` in a text is text here: no special id is ever returned for it.
    """
    raise NotImplementedError


def describe(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What the manifest and masking need to know of a tokenizer.

    sha256: of the canonical tokenizer.json; vocab_size: padded to a multiple of 64, the model's;
    real_vocab_size: highest id + 1; special_ids: {"cls", "sep", "pad", "mask", "unk"} -> id;
    excluded_ids: sorted ids below `real_vocab_size` that are special, added, unused or missing.
    Random replacement draws from [0, real_vocab_size) without excluded_ids.
    """
    raise NotImplementedError


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the tokenizer's folder to `out`, whole or not at all, `sentencepiece.model` included.

    `describe` is the same for what `load_tokenizer(out)` returns.
    """
    raise NotImplementedError
