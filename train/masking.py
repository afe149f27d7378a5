"""Masked-language-model targets: which positions of a row are masked, and what is put there.

Masks are a pure function of (seed, phase, global row number, rate). Exactly
`masked_count(rate, maskable)` positions of a row are masked, those with the smallest counter-based
keys, where maskable are the tokens of the row's documents but their [CLS] and [SEP]. The number
follows from the index of the shards, so that every rank knows the masked tokens of a whole step
without reading others' rows.
What the keys are is the way of masking (`train.mask_order`).
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.counter_random import derive_key, random_bits
from data_prep.shards import DataError
from train.mask_order import MaskOrder, TokenOrder

IGNORED = -100
"""the label that the loss leaves out (torch's convention)"""


def masked_count(rate: float, maskable: int) -> int:
    """How many of `maskable` tokens are masked at `rate`: the nearest whole number, halves up."""
    return int(rate * maskable + 0.5)


@dataclass(frozen=True)
class Vocabulary:
    """What masking must know of a tokenizer."""

    mask_id: int
    special: NDArray[np.bool_]
    """(vocab_size,): ids that are never masked"""
    ordinary_ids: NDArray[np.int64]
    """(n,): ids a random replacement may be: no special token, no vocabulary padding"""

    @classmethod
    def from_manifest(cls, tokenizer: dict[str, Any]) -> "Vocabulary":
        """From the tokenizer's description in the manifest of a data set."""
        special = np.zeros(tokenizer["vocab_size"], np.bool_)
        special[list(tokenizer["special_ids"].values())] = True
        ordinary = np.arange(tokenizer["vocab_size"]) < tokenizer["real_vocab_size"]
        ordinary[tokenizer["excluded_ids"]] = False
        return cls(
            mask_id=tokenizer["special_ids"]["mask"],
            special=special,
            ordinary_ids=np.flatnonzero(ordinary & ~special),
        )


@dataclass(frozen=True)
class MaskedRow:
    """Where a row is masked: sorted positions (n,), what stands there instead, what stood there."""

    positions: NDArray[np.int64]
    replacements: NDArray[np.int64]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Masker:
    """Masks rows; the shares of [MASK] and of random ids, the rest keeps its token."""

    seed: int
    vocabulary: Vocabulary
    mask_share: float = 0.8
    random_share: float = 0.1
    order: MaskOrder = field(default_factory=TokenOrder)

    def mask(
        self,
        input_ids: NDArray[np.integer[Any]],
        maskable: int,
        rate: float,
        purpose: str,
        *counter: int | str,
    ) -> MaskedRow:
        """The masked positions of one row.

        input_ids: (row_tokens,); maskable: how many tokens of the row may be masked; purpose and
        counter: what the mask is for, ("train", phase, global row) or ("validation", source, row).
        Raises DataError if the row has fewer tokens to mask than the rate asks for, which only a
        text that its tokenizer does not know (nearly every token special) can bring about.
        """
        number = masked_count(rate, maskable)
        candidates = np.flatnonzero(~self.vocabulary.special[input_ids])
        if number > len(candidates):
            raise DataError(
                f"a row has {len(candidates)} ordinary tokens, fewer than the {number} to mask at "
                f"rate {rate}: its tokenizer does not know the text; train another tokenizer"
            )
        key = derive_key(self.seed, "mask", purpose, *counter)
        keys = self.order.keys(key, input_ids, candidates)
        smallest = np.argpartition(keys, max(number - 1, 0))[:number]
        positions = np.sort(candidates[smallest])
        labels = input_ids[positions].astype(np.int64)
        return MaskedRow(
            positions=positions,
            replacements=self._replace(labels, positions, purpose, *counter),
            labels=labels,
        )

    def _replace(
        self,
        labels: NDArray[np.int64],
        positions: NDArray[np.int64],
        purpose: str,
        *counter: int | str,
    ) -> NDArray[np.int64]:
        at = positions.astype(np.uint64)
        action = random_bits(derive_key(self.seed, "mask action", purpose, *counter), at)
        # 53 bits make a float64 uniform in [0, 1).
        uniform = (action >> np.uint64(11)).astype(np.float64) * 2.0**-53
        drawn = random_bits(derive_key(self.seed, "mask draw", purpose, *counter), at)
        ordinary = self.vocabulary.ordinary_ids
        # The remainder's bias is below 2^-48 for any vocabulary of 65,536.
        random_ids = ordinary[(drawn % np.uint64(len(ordinary))).astype(np.int64)]
        masked = uniform < self.mask_share
        at_random = ~masked & (uniform < self.mask_share + self.random_share)
        return np.where(masked, self.vocabulary.mask_id, np.where(at_random, random_ids, labels))
