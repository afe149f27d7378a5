"""How much more often token-aware masking takes some tokens than others.

The weight of a token that is the share f of the training tokens is

    min(cap, boost × (f0 / f)^exponent)

f0 is the share of the typical token: half of all training tokens are no rarer. An exponent of 0.5
is XLM's (Lample and Conneau, "Cross-lingual language model pretraining", 2019), after word2vec's
subsampling; the cap keeps the rarest tokens from being masked nearly always. `boost` is 1 but for
medical terms: tokens that are a larger share of the sources whose texts are terms (titles of codes)
than of all sources together, the *keyness* of corpus linguistics. What codes are made of (digits,
fewer than three letters) and the wording round them (tokens no rarer there than the typical one:
"code", "diagnosis", "unspecified") are no terms.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

BANDS = {"frequent half": 0.5, "next four tenths": 0.9, "rarest tenth": 1.0}
"""upper ends of the bands of tokens, in shares of the training text, from the most frequent on"""
_LETTERS = re.compile(r"[^\W\d_]{3}")


def token_weights(
    counts: NDArray[np.int64],
    terms: NDArray[np.bool_],
    exponent: float,
    cap: float,
    boost: float,
) -> NDArray[np.float64]:
    """The weight of every token, (vocab_size,), above 0.

    counts: (vocab_size,), how often each occurs in training, 0 for tokens that are never masked;
    terms: (vocab_size,), which are boosted. A token that does not occur has the weight `cap`.
    """
    shares = counts / counts.sum()
    with np.errstate(divide="ignore"):
        weights = (_typical(shares) / shares) ** exponent
    return np.minimum(np.where(terms, boost, 1.0) * weights, cap)


def medical_terms(
    counts: Mapping[str, NDArray[np.int64]], sources: Sequence[str], texts: Sequence[str]
) -> NDArray[np.bool_]:
    """Which tokens are medical terms, (vocab_size,).

    counts: of every source, (vocab_size,), 0 for tokens that are never masked; sources: those whose
    texts are terms; texts: of the tokens by id, with vocabulary padding left out.
    """
    everywhere = np.sum(list(counts.values()), axis=0)
    if not sources:
        return np.zeros(len(everywhere), np.bool_)
    there = np.sum([counts[source] for source in sources], axis=0)
    shares = there / there.sum()
    key = (shares > everywhere / everywhere.sum()) & (shares < _typical(shares))
    words = np.zeros(len(everywhere), np.bool_)
    words[: len(texts)] = [_LETTERS.search(text) is not None for text in texts]
    return key & words


def frequency_bands(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The number of each token's band, (vocab_size,), from the most frequent tokens on."""
    falling = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[falling]) - counts[falling]
    ends = np.array(list(BANDS.values())) * counts.sum()
    bands = np.empty(len(counts), np.int64)
    bands[falling] = np.searchsorted(ends[:-1], before, side="right")
    return bands


def _typical(shares: NDArray[np.float64]) -> float:
    """The share of the token in the middle when all training tokens stand in order of share."""
    falling = np.sort(shares)[::-1]
    return float(falling[np.searchsorted(np.cumsum(falling), 0.5)])
