"""Attention over packed documents: one interface, several backends, chosen once at start.

A backend is a function `(qkv_T3HD, cu_seqlens, max_seqlen, window) -> out_THD`:

- qkv (T, 3, H, D): queries, keys and values after the rotary positions;
- cu_seqlens (N + 1,) int32: document n is tokens cu_seqlens[n] to cu_seqlens[n + 1], possibly
  none; the first entry is 0 and the last is T, so that no token lies outside a document;
- max_seqlen: no document is longer (a bound, need not be reached);
- window: tokens a query sees to either side, both ends included, within its document; None is the
  whole document.

out = softmax(q kᵀ / sqrt(D)) v, softmax in fp32. No token of one document reaches another.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

Attention = Callable[[Tensor, Tensor, int, int | None], Tensor]


def reference_attention(
    qkv_T3HD: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int | None
) -> Tensor:
    """Plain PyTorch, any floating dtype, any device: the truth in tests, and what a CPU uses."""
    if int(cu_seqlens[-1]) != qkv_T3HD.shape[0]:
        raise ValueError(
            f"cu_seqlens ends at {int(cu_seqlens[-1])} but there are {qkv_T3HD.shape[0]} tokens: "
            "tokens outside every document have no result; give padding a document of its own"
        )
    outputs = []
    for document in qkv_T3HD.split(cu_seqlens.diff().tolist()):
        q_HLD, k_HLD, v_HLD = document.permute(1, 2, 0, 3).unbind(0)
        length = document.shape[0]
        mask = None
        if window is not None and length > window + 1:
            place = torch.arange(length, device=qkv_T3HD.device)
            mask = (place[:, None] - place[None, :]).abs() <= window
        out = F.scaled_dot_product_attention(q_HLD[None], k_HLD[None], v_HLD[None], mask)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def varlen_attention(
    qkv_T3HD: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int | None
) -> Tensor:
    """torch's `varlen_attn` (CUDA, bf16 or fp16)."""
    q_THD, k_THD, v_THD = qkv_T3HD.unbind(1)
    size = (-1, -1) if window is None else (window, window)
    out_THD: Tensor = varlen_attn(
        q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=size
    )
    return out_THD


BACKENDS: dict[str, Attention] = {
    "varlen_attn": varlen_attention,
    "reference": reference_attention,
}


def choose_attention(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the best backend for `qkv` of this dtype on this device."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return "varlen_attn"
    return "reference"
