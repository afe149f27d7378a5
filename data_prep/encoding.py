"""Token ids of texts, looked up word by word.

A tokenizer that was trained here cuts a text before every run of spaces, and what a word becomes
does not depend on the words round it (`data_prep.tokenizer_export` says why). So each different
word, with the spaces before it, goes through the tokenizer once, and the ids of a text are those of
its words put together. Words repeat so much that this is faster than SentencePiece itself.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Text between spaces is one word, line breaks included; only the first may stand without a space.
_WORD = re.compile(" +[^ ]*|[^ ]+")
# Words remembered, at some 150 bytes each; longer ones hardly come again.
_MOST_WORDS = 1 << 20
_LONGEST_WORD = 64


class WordEncoder:
    """Encodes texts by `encode_words`, which is asked for every different word once.

    encode_words: the ids of each text of a list. Memory: some 150 bytes for each of at most
    1,048,576 words, and what a call of `encode` takes.
    """

    def __init__(
        self, encode_words: Callable[[list[str]], list[list[int]]], dtype: np.dtype[Any]
    ) -> None:
        self._encode_words = encode_words
        self._dtype = dtype
        self._known: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """The token ids of each text, (tokens,) of the dtype."""
        if len(self._known) > _MOST_WORDS:
            self._known.clear()
        words = [_WORD.findall(text) for text in texts]
        new = list(set().union(*words).difference(self._known))
        found = (np.array(ids, self._dtype).tobytes() for ids in self._encode_words(new))
        self._known.update(zip(new, found, strict=True))
        look_up = self._known.__getitem__
        encoded = [np.frombuffer(b"".join(map(look_up, of)), self._dtype) for of in words]
        for word in new:
            if len(word) > _LONGEST_WORD:
                del self._known[word]
        return encoded
