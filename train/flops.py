"""Model FLOPs of training, and what a GPU could do: the two sides of the MFU.

Model FLOPs are the multiplications and additions of the matrix products that the model's formula
needs, counted as 2 a multiply-add and three times for forward and backward (Kaplan et al. 2020,
arXiv:2001.08361; Chowdhery et al. 2022, arXiv:2204.02311, appendix B). Padding does not count, nor
does what an implementation does twice: activation recomputation, products with ignored rows,
attention outside of a window. So a share of the peak says how well the time was used.
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

    documents: (n,) lengths of the real documents, in tokens; masked_tokens: how many of these go
    through the prediction head and the decoder.
    """
    lengths = np.asarray(documents, np.int64)
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = 4 * hidden * hidden + 3 * hidden * inner
    head = hidden * hidden + hidden * config.vocab_size
    multiply_adds = int(lengths.sum()) * layer * config.num_hidden_layers + masked_tokens * head
    for window, layers in Counter(map(config.window, range(config.num_hidden_layers))).items():
        # A pair costs a product with the key and one with the value, over all heads.
        multiply_adds += layers * 2 * hidden * attended_pairs(lengths, window)
    return 3.0 * 2.0 * multiply_adds


def attended_pairs(lengths: NDArray[np.int64], window: int | None) -> int:
    """Pairs of a query and a key within documents of `lengths` (n,), `window` tokens to a side."""
    if window is None:
        return int((lengths * lengths).sum())
    # To one side a token sees min(its distance to the end, window) others.
    reach = np.minimum(np.maximum(lengths - 1, 0), window)
    one_side = reach * (reach + 1) // 2 + (lengths - 1 - reach) * reach
    return int((lengths + 2 * np.where(lengths > 0, one_side, 0)).sum())
