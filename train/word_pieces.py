"""Which tokens make up a word, from a tokenizer's vocabulary alone.

A word is a run of letters, or of digits, or of other signs, with the space before it: what GPT-2's
pre-tokeniser cuts a text into, for every kind of tokenizer. "106" is one word, though a tokenizer
may give each digit a token; "10.6" is three. Of each token it is enough to know its first and its
last character, so that the words of a row are found by comparing its tokens with their neighbours.
"""

import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.shards import TOKENIZER_FILE, DataError

SENTENCEPIECE_SPACE = "\u2581"
# Kinds of characters, a bit each. A fragment goes on with a character that is spelled in bytes.
_LETTER, _DIGIT, _SIGN, _SPACE, _FRAGMENT = (1 << bit for bit in range(5))
_KINDS = {"L": _LETTER, "M": _LETTER, "N": _DIGIT, "Z": _SPACE}
# Bytes with which the UTF-8 of Latin-1's signs, of mathematics and punctuation, and of emoji begin;
# nearly all that begins otherwise is letters.
_SIGN_BYTES = (0xC2, 0xE2, 0xF0)
# Python's mark of a byte that is no character by itself (PEP 383).
_BYTE = 0xDC00


@dataclass(frozen=True)
class WordPieces:
    """What tokens join: token b continues the word of token a if `right[a] & left[b]` is not 0.

    left, right: (vocab_size,) uint8, the kind of a token's first and of its last character as a
    bit; left is 0 for a token that begins with a space, both are 0 for special tokens.
    """

    left: NDArray[np.uint8]
    right: NDArray[np.uint8]

    @classmethod
    def from_texts(cls, texts: list[str], special: NDArray[np.bool_]) -> "WordPieces":
        """From the text of every token (`token_texts`); special: (vocab_size,) bool."""
        left, right = np.zeros((2, len(special)), np.uint8)
        for token, text in enumerate(texts):
            if not text or special[token]:
                continue
            left[token] = 0 if text[0] == " " else _first_kind(text[0])
            # A lone space is the one before a word, whatever the word is made of.
            right[token] = _last_kind(text[-1]) if text != " " else _LETTER | _DIGIT | _SIGN
        return cls(left, right)

    def begins(self, input_ids: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
        """Whether a word begins at each of `input_ids` (n,), of any documents one after another."""
        joined = self.right.take(input_ids[:-1]) & self.left.take(input_ids[1:])
        begins = np.ones(len(input_ids), np.bool_)
        np.equal(joined, 0, out=begins[1:])
        return begins


def token_texts(tokenizer_folder: Path) -> list[str]:
    """The text of every token by its id, with the space before it as a space.

    Byte-level BPE (GPT-2's, ModernBERT's), SentencePiece's (BPE or unigram) and WordPiece
    vocabularies are understood; a token of WordPiece that does not continue a word gets a space.
    Bytes that are no whole character stand as in PEP 383. Raises DataError for any other
    tokenizer.json.
    """
    path = tokenizer_folder / TOKENIZER_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model, added = content["model"], content.get("added_tokens", [])
        vocabulary = model["vocab"]
        if isinstance(vocabulary, list):  # unigram: [piece, score] in the order of the ids
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        texts = [""] * (1 + max([*vocabulary.values(), *(token["id"] for token in added)]))
        read = _reader(content, vocabulary)
        for piece, number in vocabulary.items():
            texts[number] = read(piece)
        # They are matched in a text as they are written.
        for token in added:
            texts[token["id"]] = token["content"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} tells no words apart ({type(error).__name__}: {error}); use masking.kind = "
            "token, or a tokenizer of byte-level BPE, SentencePiece or WordPiece"
        ) from None
    return texts


def _reader(content: dict[str, Any], vocabulary: dict[str, int]) -> Callable[[str], str]:
    """The function from a piece of the vocabulary to its text."""
    if content["model"]["type"] == "WordPiece":
        prefix = content["model"]["continuing_subword_prefix"]
        return lambda piece: piece.removeprefix(prefix) if piece.startswith(prefix) else f" {piece}"
    if "ByteLevel" in _types(content.get("pre_tokenizer")) | _types(content.get("decoder")):
        to_byte = _byte_of_character()
        return lambda piece: bytes(map(to_byte.__getitem__, piece)).decode(
            "utf-8", "surrogateescape"
        )
    if not any(piece.startswith(SENTENCEPIECE_SPACE) for piece in vocabulary):
        raise ValueError("no piece of its vocabulary marks a space")
    return _sentencepiece_text


def _sentencepiece_text(piece: str) -> str:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        byte = int(piece[3:5], 16)
        return chr(byte if byte < 0x80 else _BYTE + byte)
    return piece.replace(SENTENCEPIECE_SPACE, " ")


def _types(component: Any) -> set[str]:
    """The types of a part of a tokenizer.json and of all that it is made of."""
    if isinstance(component, dict):
        nested = set[str]().union(*map(_types, component.values()))
        return nested | ({component["type"]} if isinstance(component.get("type"), str) else set())
    if isinstance(component, list):
        return set[str]().union(*map(_types, component))
    return set()


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: which character stands for which byte.

    Bytes that are visible characters of Latin-1 stand for themselves, the others, in their order,
    are the characters from U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(0x100 + number): byte for number, byte in enumerate(hidden)
    }


def _first_kind(character: str) -> int:
    """What a token that begins with `character` goes on with."""
    byte = ord(character) - _BYTE
    if 0x80 <= byte < 0xC0:
        return _FRAGMENT
    if 0xC0 <= byte < 0x100:
        return _SIGN if byte in _SIGN_BYTES else _LETTER
    return _kind(character)


def _last_kind(character: str) -> int:
    """What goes on with a token that ends with `character`."""
    byte = ord(character) - _BYTE
    if 0x80 <= byte < 0xC0:  # Its character may be complete, or not.
        return _FRAGMENT | _LETTER
    if 0xC0 <= byte < 0x100:
        return _FRAGMENT
    return _kind(character)


def _kind(character: str) -> int:
    if character.isspace():
        return _SPACE
    return _KINDS.get(unicodedata.category(character)[0], _SIGN)
