"""The tokenizer: SentencePiece BPE trained here, or an existing Hugging Face one, used alike.

A tokenizer is a Hugging Face folder. One trained here also holds `sentencepiece.model`, which gives
the same ids as the fast tokenizer beside it and decodes them to the same text
(`tokenizer_export.py` says why). Its vocabulary is, in this order: [PAD] [UNK] [CLS] [SEP] [MASK],
the 256 bytes, the learned pieces best first, the characters. `vocab_size` is a multiple of 64 and
all of it is real, so nothing has to be padded.

Digits stand alone; a word carries the space before it; spaces and newlines form runs of their own.
"""

import copy
import hashlib
import io
import json
import re
import shutil
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.files import whole_folder, write_json
from data_prep.document import Document, InputError
from data_prep.encoding import WordEncoder
from data_prep.tokenizer_export import (
    ESCAPES,
    SPECIAL_TOKENS,
    fast_tokenizer,
    has_separate_parts,
    is_word_by_word,
)
from data_prep.tokenizer_sample import draw_sample

SENTENCEPIECE_FILE = "sentencepiece.model"
MODEL_MAX_LENGTH = 8192
_VOCAB_MULTIPLE = 64
# "electroencephalography" and a line of dashes are one piece each.
_MAX_PIECE_CHARACTERS = 32
# The rest, rarely seen, is spelled in bytes.
_CHARACTER_COVERAGE = 0.9999
# SentencePiece drops a training line of more than 4,192 bytes without an error; a character has at
# most four. Cutting where a run of spaces begins changes nothing: it cuts into words there itself.
_LINE = re.compile(r"(?s).{1,1000}(?:\Z|(?<! )(?= ))|.{1,1000}")
# SentencePiece's trainer writes this for an unknown character and drops a line that holds it, so it
# is taken out, of what is trained on only.
_TRAINER_UNKNOWN = "\u2585"
_word_encoders: weakref.WeakKeyDictionary[PreTrainedTokenizerFast, WordEncoder | None]
_word_encoders = weakref.WeakKeyDictionary()
_UNUSED = re.compile(r"[\[<]\|?unused[ _-]?\d+\|?[\]>]", re.IGNORECASE)


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
    sample_bytes: bytes of UTF-8 text to train on; memory is bounded by it (some ten times as
        much), however many documents there are. Which documents are used depends on (seed, their
        ids) alone, not on their order.
    shares: source -> its part of `sample_bytes`; other sources are left out. Without it, all
        sources are one pool and have the shares that they have in the documents.

    The same documents, in any order, give the same bytes in every file. Raises InputError for no
    text, or a vocabulary that the sample does not support.
    """
    if vocab_size <= 0 or vocab_size % _VOCAB_MULTIPLE:
        raise InputError(
            f"{out}: vocab_size is {vocab_size}, which is not a multiple of {_VOCAB_MULTIPLE}; "
            f"set it to {max(1, -(-vocab_size // _VOCAB_MULTIPLE)) * _VOCAB_MULTIPLE}"
        )
    texts = draw_sample(documents, sample_bytes, shares or {}, seed, out)
    model = _train_sentencepiece(texts, vocab_size, out)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast_tokenizer(model),
        model_max_length=MODEL_MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": token for name, token in SPECIAL_TOKENS.items()},
    )
    with whole_folder(out) as folder:
        _write_folder(tokenizer, folder)
        (folder / SENTENCEPIECE_FILE).write_bytes(model)


def load_tokenizer(folder_or_name: str | Path) -> PreTrainedTokenizerFast:
    """A fast tokenizer from a folder, or by its name on the Hugging Face hub.

    Raises InputError when there is none, it is not a fast one, or lacks one of the tokens cls, sep,
    pad, mask, unk.
    """
    folder = Path(folder_or_name)
    if folder.is_dir() and not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"{folder} is not a fast tokenizer's folder: it has no tokenizer.json; give the folder "
            "that save_pretrained of a fast tokenizer wrote"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder_or_name), trust_remote_code=False)
    except Exception as error:  # The tokenizers library raises bare Exceptions for a damaged file.
        problem = (
            "holds no tokenizer that loads"
            if folder.is_dir()
            else "is no folder, and the Hugging Face hub gave no tokenizer of that name"
        )
        raise InputError(
            f"{folder_or_name} {problem}; give the folder of a fast tokenizer (tokenizer.json and "
            f"tokenizer_config.json), or a hub name on a machine with network: {error}"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(
            f"{folder_or_name} is a {type(tokenizer).__name__}, not a fast tokenizer; convert "
            "it to one with a tokenizer.json"
        )
    missing = [name for name in SPECIAL_TOKENS if getattr(tokenizer, f"{name}_token_id") is None]
    if missing:
        raise InputError(
            f"{folder_or_name} has no {', '.join(f'{name}_token' for name in sorted(missing))}; "
            "name them in its tokenizer_config.json, or use a tokenizer made for masked models"
        )
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[NDArray[Any]]:
    """The token ids of each text, without [CLS] and [SEP], never cut.

    Each is (tokens,) uint16 where the vocabulary has at most 65,536 ids, else uint32. A literal
    `[MASK]` in a text is text here: no special id is ever returned for it (called directly, the
    tokenizer does match it, which filling a mask needs). Other added tokens are matched as always.
    One that was trained here is asked for every part of a word once (`data_prep.encoding`).

    Uses the tokenizers library's threads; not for two threads and one `tokenizer`.
    """
    encoder = _word_encoder(tokenizer)
    if encoder is not None:
        return encoder.encode(texts)
    dtype = _id_dtype(tokenizer)
    with _plain_backend(tokenizer) as backend:
        found = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, dtype) for encoding in found]


def new_word_encoder(tokenizer: PreTrainedTokenizerFast) -> WordEncoder | None:
    """An encoder that has met no word; None for a tokenizer that was not trained here.

    It does not keep `tokenizer`.
    """
    backend = tokenizer.backend_tokenizer
    if not (is_word_by_word(backend) and has_separate_parts(backend)):
        return None
    proxy = weakref.proxy(tokenizer)

    def encode_whole(texts: list[str]) -> list[list[int]]:
        with _plain_backend(proxy) as backend:
            found = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]

    return WordEncoder(encode_whole, _id_dtype(tokenizer))


def _word_encoder(tokenizer: PreTrainedTokenizerFast) -> WordEncoder | None:
    """The encoder that remembers the words of `tokenizer`, as long as there is a tokenizer."""
    # What comes after the vocabulary may have changed since the last call: tokens can be added.
    if not is_word_by_word(tokenizer.backend_tokenizer):
        return None
    if tokenizer not in _word_encoders:
        _word_encoders[tokenizer] = new_word_encoder(tokenizer)
    return _word_encoders[tokenizer]


@contextmanager
def _plain_backend(tokenizer: PreTrainedTokenizerFast) -> Iterator[Tokenizer]:
    """Its Rust tokenizer, while that neither cuts, pads nor matches special tokens."""
    backend = tokenizer.backend_tokenizer
    truncation, padding = backend.truncation, backend.padding
    match_special = backend.encode_special_tokens
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    try:
        yield backend
    finally:
        backend.encode_special_tokens = match_special
        if truncation:
            backend.enable_truncation(**truncation)
        if padding:
            backend.enable_padding(**padding)


def _id_dtype(tokenizer: PreTrainedTokenizerFast) -> np.dtype[Any]:
    return np.dtype(np.uint16 if _real_vocab_size(tokenizer) <= 2**16 else np.uint32)


def describe(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What the manifest and masking need to know of a tokenizer.

    sha256: of the canonical tokenizer.json (sorted keys; without the padding and truncation that
    a caller last asked for); vocab_size: the model's, a multiple of 64; real_vocab_size: highest
    id + 1; special_ids: {"cls", "sep", "pad", "mask", "unk"} -> id; excluded_ids: the sorted ids
    below real_vocab_size that are special, added, unused or missing. Random replacement draws from
    [0, real_vocab_size) without excluded_ids.
    """
    real = _real_vocab_size(tokenizer)
    vocab = tokenizer.get_vocab()
    ordinary = {i for token, i in vocab.items() if not _UNUSED.fullmatch(token)}
    ordinary -= {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content.update(truncation=None, padding=None)
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return {
        "sha256": hashlib.sha256(canonical.encode()).hexdigest(),
        "vocab_size": -(-real // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE,
        "real_vocab_size": real,
        "special_ids": {name: getattr(tokenizer, f"{name}_token_id") for name in SPECIAL_TOKENS},
        "excluded_ids": sorted(set(range(real)) - ordinary),
    }


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the tokenizer's folder to `out`, whole or not at all, `sentencepiece.model` included.

    `describe` is the same for what `load_tokenizer(out)` returns.
    """
    model = Path(tokenizer.name_or_path) / SENTENCEPIECE_FILE
    with whole_folder(out) as folder:
        _write_folder(tokenizer, folder)
        if model.is_file():
            shutil.copyfile(model, folder / SENTENCEPIECE_FILE)


def _write_folder(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.backend_tokenizer.no_truncation()
    plain.backend_tokenizer.no_padding()
    plain.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # How this process came by the tokenizer is no property of it.
    for key in ("is_local", "local_files_only", "backend"):
        config.pop(key, None)
    # transformers 5's name for the class, which version 4 does not know.
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, config)


def _real_vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def _train_sentencepiece(texts: list[str], vocab_size: int, out: Path) -> bytes:
    """The serialised SentencePiece model, with the rules that undo its normalisation."""
    # Its messages quote the text.
    sentencepiece.set_min_log_level(3)
    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=writer,
            normalizer=_normalizer(ESCAPES, escape_whitespaces=True),
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            max_sentencepiece_length=_MAX_PIECE_CHARACTERS,
            character_coverage=_CHARACTER_COVERAGE,
            # Other numbers of threads give other models.
            num_threads=1,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=SPECIAL_TOKENS["pad"],
            unk_piece=SPECIAL_TOKENS["unk"],
            bos_piece=SPECIAL_TOKENS["cls"],
            eos_piece=SPECIAL_TOKENS["sep"],
            control_symbols=[SPECIAL_TOKENS["mask"]],
            minloglevel=3,
        )
    except RuntimeError as error:
        sizes = re.search(r"smaller than required_chars\. *\d+ vs (\d+)", str(error))
        problem = f" and must be above {sizes[1]}" if sizes else ""
        # The original message may quote the text too.
        raise InputError(
            f"{out}: SentencePiece cannot train a vocabulary of {vocab_size}: it must hold 261 "
            f"special tokens and bytes and the characters of the text{problem}; raise vocab_size"
        ) from None
    proto = sentencepiece_model_pb2.ModelProto.FromString(writer.getvalue())
    if len(proto.pieces) < vocab_size:
        fits = len(proto.pieces) // _VOCAB_MULTIPLE * _VOCAB_MULTIPLE
        raise InputError(
            f"{out}: the sample of {sum(map(len, texts))} characters supports a vocabulary of only "
            f"{len(proto.pieces)}, not {vocab_size}; set vocab_size to {fits} or less, or give "
            "more text (more documents, or a larger sample_bytes)"
        )
    undo = _normalizer([(mark, plain) for plain, mark in ESCAPES], escape_whitespaces=False)
    proto.denormalizer_spec.ParseFromString(undo.serialized_normalizer_spec())
    return bytes(proto.SerializeToString(deterministic=True))


def _normalizer(
    rules: Iterable[tuple[str, str]], *, escape_whitespaces: bool
) -> sentencepiece.SentencePieceNormalizer:
    return sentencepiece.SentencePieceNormalizer(
        norm_map=list(rules),
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        escape_whitespaces=escape_whitespaces,
    )


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for part in text.split(_TRAINER_UNKNOWN):
            yield from _LINE.findall(part)
