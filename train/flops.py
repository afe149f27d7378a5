"""Model FLOPs of training, and what a GPU could do: the two sides of the MFU.

Model FLOPs are the multiplications and additions of the matrix products that the model's formula
needs, counted as 2 a multiply-add and three times for forward and backward (Kaplan et al. 2020,
arXiv:2001.08361; Chowdhery et al. 2022, arXiv:2204.02311, appendix B). Padding does not count, nor
does what an implementation does twice or for nobody: activation recomputation, products with
ignored rows, attention outside of a window, tokens in the last layer that the loss does not read
(of which only the keys and values count). So a share of the peak says how well the time was used.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model.config import ModernBertConfig

BF16_PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989.4e12,
    "H200 NVL": 835.5e12,
    "H200": 989.4e12,
    "H100 80GB HBM3": 989.4e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756e12,
    "A100": 312e12,
    "L40S": 362e12,
}
"""Dense bf16 FLOP/s of NVIDIA's datasheets, by words of the name that CUDA gives the device; the
first that are in it count."""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its name; None for a device that is not in the table.

    None for a part of a GPU as well, which has a part of the peak: MIG, and NVIDIA's virtual GPUs,
    whose names end in a profile (GRID A100-10C, NVIDIA H100-1-10CME).
    """
    if re.search(r"\bMIG\b|\bGRID\b|-\d+[ABCQ](ME)?$", device_name):
        return None
    return next(
        (peak for part, peak in BF16_PEAKS.items() if re.search(rf"\b{part}\b", device_name)), None
    )


def training_flops(
    config: ModernBertConfig,
    documents: Sequence[int] | NDArray[np.integer],
    masked_tokens: int,
) -> float:
    """Model FLOPs of forward and backward.

    documents: (n,) lengths of the real documents, in tokens; masked_tokens: how many of these the
    loss reads, taken to be spread evenly over the documents.
    """
    lengths = np.asarray(documents, np.int64)
    tokens = int(lengths.sum())
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = 2 * hidden * hidden
    # The query, what attention gives, and the MLP.
    others = 2 * hidden * hidden + 3 * hidden * inner
    head = hidden * hidden + hidden * config.vocab_size
    last = config.num_hidden_layers - 1
    multiply_adds = tokens * (keys + others) * last
    multiply_adds += tokens * keys + masked_tokens * (others + head)
    for window, layers in Counter(map(config.window, range(last))).items():
        multiply_adds += layers * _attention(hidden, lengths, window)
    read = masked_tokens / max(tokens, 1)
    return 6.0 * (multiply_adds + read * _attention(hidden, lengths, config.window(last)))


def _attention(hidden: int, lengths: NDArray[np.int64], window: int | None) -> int:
    """Multiply-adds of a layer's pairs: one product with the key, one with the value, all heads."""
    return 2 * hidden * attended_pairs(lengths, window)


def attended_pairs(lengths: NDArray[np.int64], window: int | None) -> int:
    """Pairs of a query and a key within documents of `lengths` (n,), `window` tokens to a side."""
    if window is None:
        return int((lengths * lengths).sum())
    # To one side a token sees min(its distance to the end, window) others.
    reach = np.minimum(np.maximum(lengths - 1, 0), window)
    one_side = reach * (reach + 1) // 2 + (lengths - 1 - reach) * reach
    return int((lengths + 2 * np.where(lengths > 0, one_side, 0)).sum())
