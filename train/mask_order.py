"""The ways of masking: in which order the tokens of a row are masked.

Each gives every candidate of a row a key; `train.masking` masks the candidates with the smallest
ones, as many as the rate says. So all ways mask exactly the same number of tokens of a row, and a
lower rate masks a part of what a higher one does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from common.config import ConfigError
from common.counter_random import random_bits
from data_prep.shards import DataSet
from train.phase_config import Masking, MaskingKind
from train.token_weights import medical_terms, token_weights
from train.word_pieces import WordPieces, token_texts

KINDS: tuple[MaskingKind, ...] = get_args(MaskingKind)
# Bits of a whole-word key that hold a token's place in its word; no row has so many tokens.
_PLACE_BITS = np.uint64(24)


class MaskOrder(Protocol):
    """A way of masking."""

    def keys(
        self,
        key: int,
        input_ids: NDArray[np.integer[Any]],
        candidates: NDArray[np.int64],
    ) -> NDArray[Any]:
        """A key for each of `candidates` (n,), positions in `input_ids` (row_tokens,), sorted.

        key: of the random numbers of this row.
        """
        ...


@dataclass(frozen=True)
class TokenOrder:
    """Plain masking: every token alone, all equally likely."""

    def keys(
        self,
        key: int,
        input_ids: NDArray[np.integer[Any]],
        candidates: NDArray[np.int64],
    ) -> NDArray[np.uint64]:
        """Random bits of the position."""
        return random_bits(key, candidates.astype(np.uint64))


@dataclass(frozen=True)
class WholeWordOrder:
    """Whole words, all equally likely; the last word may be masked in part, from its first token.

    Otherwise the number of masked tokens would not follow from the shards' index alone. At most one
    word of a row is cut so.
    """

    pieces: WordPieces

    def keys(
        self,
        key: int,
        input_ids: NDArray[np.integer[Any]],
        candidates: NDArray[np.int64],
    ) -> NDArray[np.uint64]:
        """Random bits of the word's first position, then the token's place in the word."""
        begins = self.pieces.begins(input_ids)
        first = np.flatnonzero(begins)
        word = np.cumsum(begins).take(candidates) - 1
        bits = random_bits(key, first.astype(np.uint64)) << _PLACE_BITS
        return bits.take(word) | (candidates - first.take(word)).astype(np.uint64)


@dataclass(frozen=True)
class TokenAwareOrder:
    """Every token alone, by weight: sampling without replacement.

    A token of weight w gets the key -ln(u) / w with u uniform in (0, 1), that is, an exponential
    variable of rate w; the k smallest keys are k draws without replacement, each with probabilities
    proportional to the weights of what is left (Efraimidis and Spirakis, "Weighted random sampling
    with a reservoir", Information Processing Letters 97(5), 2006).
    """

    weights: NDArray[np.float64]
    """(vocab_size,): the weight of every token, above 0"""

    def keys(
        self,
        key: int,
        input_ids: NDArray[np.integer[Any]],
        candidates: NDArray[np.int64],
    ) -> NDArray[np.float64]:
        """Exponential variables of the positions, divided by the weights of the tokens."""
        bits = random_bits(key, candidates.astype(np.uint64))
        # The middles of 2^53 equal parts of (0, 1), so that no logarithm is of 0.
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        # Machines may differ in a logarithm's last bit: no matter, unless two keys are as near.
        return -np.log(uniform) / self.weights.take(input_ids.take(candidates))


def make_order(
    masking: Masking, data: DataSet, tokenizer_folder: Path, special: NDArray[np.bool_]
) -> MaskOrder:
    """The way of masking that `masking.kind` names; special: (vocab_size,), never masked.

    Raises ConfigError or DataError for what the data set or its tokenizer does not have.
    """
    if masking.kind == "token":
        return TokenOrder()
    texts = token_texts(tokenizer_folder)
    if masking.kind == "whole_word":
        return WholeWordOrder(WordPieces.from_texts(texts, special))
    counts, terms = token_statistics(masking, data, texts, special)
    weights = token_weights(
        counts, terms, masking.frequency_exponent, masking.weight_cap, masking.term_boost
    )
    return TokenAwareOrder(weights)


def token_statistics(
    masking: Masking, data: DataSet, texts: Sequence[str], special: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """How often each token occurs in training, and which are medical terms, (vocab_size,) both.

    texts: of the tokens by id; special: (vocab_size,), counted as 0. Raises ConfigError for a
    source of terms that the data set does not have, and DataError where it has no counts.
    """
    counts = {
        source: np.where(special, 0, numbers) for source, numbers in data.token_counts().items()
    }
    for source in masking.term_sources:
        if source not in counts:
            raise ConfigError(
                f"masking.term_sources: the data set {data.folder} has no source {source!r}; it "
                f"has {', '.join(counts)}; with [] no terms are boosted"
            )
    terms = medical_terms(counts, masking.term_sources, texts)
    return np.sum(list(counts.values()), axis=0), terms
