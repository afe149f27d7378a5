"""Token ids of texts, looked up word by word.

A tokenizer that was trained here cuts a text before every run of spaces, and what a word becomes
does not depend on the words round it (`data_prep.tokenizer_export` says why). So each different
word, with the spaces before it, goes through the tokenizer once, and the ids of a text are those of
its words put together. Words repeat so much that this is faster than SentencePiece itself. A call
of the tokenizer costs more for each text than for each word, so new words share texts.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Text between spaces is one word, line breaks included; only the first may stand without a space.
_WORD = re.compile(" +[^ ]*|[^ ]+")
# Words remembered, at some 150 bytes each; longer ones hardly come again.
_MOST_WORDS = 1 << 20
_LONGEST_WORD = 64
# New words in one text for the tokenizer; more make it no faster, and fewer texts for its threads.
_JOINED_WORDS = 256

# The ids of a text, and for each of them the number of its word in the text.
Encoded = tuple[list[int], NDArray[np.int64]]


class WordEncoder:
    """Encodes texts by `encode_joined`, which is asked for every different word once.

    encode_joined: the ids of each text of a list, and of each id the number of its word. Memory:
    some 150 bytes for each of at most 1,048,576 words, and what a call of `encode` takes.
    """

    def __init__(
        self, encode_joined: Callable[[list[str]], list[Encoded]], dtype: np.dtype[Any]
    ) -> None:
        self._encode_joined = encode_joined
        self._dtype = dtype
        self._known: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """The token ids of each text, (tokens,) of the dtype."""
        if len(self._known) > _MOST_WORDS:
            self._known.clear()
        words = [_WORD.findall(text) for text in texts]
        new = set().union(*words).difference(self._known)
        self._known.update(self._encode_words(new))
        look_up = self._known.__getitem__
        encoded = [np.frombuffer(b"".join(map(look_up, of)), self._dtype) for of in words]
        for word in new:
            if len(word) > _LONGEST_WORD:
                del self._known[word]
        return encoded

    def _encode_words(self, words: set[str]) -> Iterator[tuple[str, bytes]]:
        """The words, in some order, with their ids."""
        # A word without a space before it, or of spaces alone, would be one with its neighbour.
        joinable = [word for word in words if word[0] == " " and word[-1] != " "]
        groups = [[word] for word in words.difference(joinable)]
        groups += [
            joinable[begin : begin + _JOINED_WORDS]
            for begin in range(0, len(joinable), _JOINED_WORDS)
        ]
        encoded = self._encode_joined(["".join(group) for group in groups])
        for group, (ids, numbers) in zip(groups, encoded, strict=True):
            content = np.array(ids, self._dtype).tobytes()
            bounds = np.searchsorted(numbers, np.arange(len(group) + 1)) * self._dtype.itemsize
            for word, (begin, end) in zip(group, pairwise(bounds.tolist()), strict=True):
                yield word, content[begin:end]
