"""Token ids of texts, looked up word by word.

A tokenizer that was trained here cuts a text before every run of spaces, and what a word becomes
does not depend on the words round it; nor do the parts of a word, its runs of letters, its digits
and its punctuation, depend on each other (`data_prep.tokenizer_export` says why). So a different
word, with the spaces before it, is put together once from its parts, each different part goes
through the tokenizer once, and the ids of a text are those of its words put together. Words repeat
so much that this is faster than SentencePiece itself, and where they do not (`S72.001A:`) their
parts do. A call of the tokenizer costs more for each text than for each part, so new parts share
texts.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Text between spaces is one word, line breaks included; only the first may stand without a space.
_WORD = re.compile(" +[^ ]*|[^ ]+")
# The parts of a word: digits, which are known from the start, and apart from each other letters and
# other characters of ASCII.
# What is beyond ASCII may be a letter's neighbour or a mark's, so there only digits are cut off.
_ASCII_PART = re.compile(r" *[A-Za-z]+|[0-9]+|[^A-Za-z0-9]+")
_PART = re.compile(r"[0-9]+|[^0-9]+")
# Stands between parts that share a text: a digit is a token of its own wherever it stands.
_MARK = "0"
_DIGITS = "0123456789"
# Words remembered, at some 150 bytes each, and parts; longer ones hardly come again.
_MOST_WORDS = 1 << 20
_LONGEST_WORD = 64
# New parts in one text for the tokenizer; more make it no faster, and fewer texts for its threads.
_JOINED_PARTS = 64


class WordEncoder:
    """Encodes texts by `encode_whole`, which is asked for every different part of a word once.

    encode_whole: the ids of each text of a list. Memory: some 150 bytes for each of at most
    1,048,576 words, fewer parts, and what a call of `encode` takes.
    """

    def __init__(
        self, encode_whole: Callable[[list[str]], list[list[int]]], dtype: np.dtype[Any]
    ) -> None:
        self._encode_whole = encode_whole
        self._dtype = dtype
        self._words: dict[str, bytes] = {}
        self._parts: dict[str, bytes] = {}
        digits = encode_whole(list(_DIGITS))
        self._digits = {
            d: np.array(i, dtype).tobytes() for d, i in zip(_DIGITS, digits, strict=True)
        }
        [self._mark] = digits[_DIGITS.index(_MARK)]

    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """The token ids of each text, (tokens,) of the dtype."""
        if max(len(self._words), len(self._parts)) > _MOST_WORDS:
            self.forget()
        words = [_WORD.findall(text) for text in texts]
        new = set().union(*words).difference(self._words)
        self._learn(list(new))
        look_up = self._words.__getitem__
        encoded = [np.frombuffer(b"".join(map(look_up, of)), self._dtype) for of in words]
        for word in new:
            if len(word) > _LONGEST_WORD:
                del self._words[word]
        return encoded

    def forget(self) -> None:
        """From here on no word has been met."""
        self._words.clear()
        self._parts.clear()

    def _learn(self, words: list[str]) -> None:
        parts = [(_ASCII_PART if word.isascii() else _PART).findall(word) for word in words]
        new = set().union(*parts).difference(self._parts)
        self._parts.update(self._encode_parts(new))
        look_up = self._parts.__getitem__
        for word, of in zip(words, parts, strict=True):
            self._words[word] = b"".join(map(look_up, of))
        for part in new:
            if len(part) > _LONGEST_WORD:
                del self._parts[part]

    def _encode_parts(self, parts: set[str]) -> Iterator[tuple[str, bytes]]:
        """The parts, in some order, with their ids."""
        joinable = []
        for part in parts:
            if part[0] in self._digits:
                yield part, b"".join(map(self._digits.__getitem__, part))
            else:
                joinable.append(part)
        groups = [
            joinable[begin : begin + _JOINED_PARTS]
            for begin in range(0, len(joinable), _JOINED_PARTS)
        ]
        encoded = self._encode_whole([_MARK.join(group) for group in groups])
        for group, ids in zip(groups, encoded, strict=True):
            found = np.array(ids, self._dtype)
            content, size = found.tobytes(), self._dtype.itemsize
            marks = np.flatnonzero(found == self._mark).tolist()
            begin = 0
            for part, end in zip(group, [*marks, len(found)], strict=True):
                yield part, content[begin * size : end * size]
                begin = end + 1
