"""Attention over packed documents: one interface, several backends, chosen once at start.

A backend is a function `(q_THD, k_THD, v_THD, cu_seqlens, max_seqlen, window) -> out_THD`:

- q, k, v (T, H, D): queries and keys after the rotary positions, and values;
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

# Queries that the reference treats together in a long document's window.
_TILE = 64

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, int, int | None], Tensor]


def reference_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: int | None,
) -> Tensor:
    """Plain PyTorch, any floating dtype, any device: the truth in tests, and what a CPU uses.

    Documents of one length are computed together and no document is padded, so what a document
    gets depends on its own tokens alone, to the last bit, wherever in the row it lies.
    Reads `cu_seqlens` on the host. Raises ValueError where it does not end at T.
    """
    qkv_T3HD = torch.stack([q_THD, k_THD, v_THD], dim=1)
    lengths = cu_seqlens.diff().tolist()
    if sum(lengths) != qkv_T3HD.shape[0]:
        raise ValueError(
            f"cu_seqlens spans {sum(lengths)} tokens but there are {qkv_T3HD.shape[0]}: "
            "tokens outside every document have no result; give padding a document of its own"
        )
    pieces = qkv_T3HD.split(lengths)
    alike: dict[int, list[int]] = {}
    for document, length in enumerate(lengths):
        alike.setdefault(length, []).append(document)
    outputs = [piece[:, 2] for piece in pieces]  # stays so for empty documents only
    for length, documents in alike.items():
        if length > 0:
            qkv_NL3HD = torch.stack([pieces[document] for document in documents])
            out_NLHD = _attend(qkv_NL3HD, window)
            for document, out_LHD in zip(documents, out_NLHD.unbind(), strict=True):
                outputs[document] = out_LHD
    return torch.cat(outputs)


def _attend(qkv_NL3HD: Tensor, window: int | None) -> Tensor:
    """Attention within each of N documents of length L: (N, L, 3, H, D) to (N, L, H, D)."""
    length = qkv_NL3HD.shape[1]
    if window is not None and length > 2 * (_TILE + 2 * window):
        return _attend_in_tiles(qkv_NL3HD, window)
    q_NHLD, k_NHLD, v_NHLD = qkv_NL3HD.permute(2, 0, 3, 1, 4).unbind()
    mask_LL = None
    if window is not None and length > window + 1:
        mask_LL = _band(length, window, qkv_NL3HD.dtype, qkv_NL3HD.device)
    return _softmax_attention(q_NHLD, k_NHLD, v_NHLD, mask_LL).transpose(1, 2)


def _attend_in_tiles(qkv_NL3HD: Tensor, window: int) -> Tensor:
    """The same over a window, for long documents: tiles of queries against the keys they can see.

    Work and memory grow with L · (tile + 2 · window) instead of L².
    """
    documents, length, _, heads, width = qkv_NL3HD.shape
    tiles = -(-length // _TILE)
    behind = tiles * _TILE - length
    q_NLHD, kv_NL2HD = qkv_NL3HD[:, :, 0], qkv_NL3HD[:, :, 1:]
    q = F.pad(q_NLHD, (0, 0, 0, 0, 0, behind)).view(documents * tiles, _TILE, heads, width)
    kv = F.pad(kv_NL2HD, (0, 0, 0, 0, 0, 0, window, window + behind))
    # The width comes last in memory too: only so does PyTorch take its fast kernel.
    k, v = kv.unfold(1, _TILE + 2 * window, _TILE).permute(2, 0, 1, 3, 5, 4).flatten(1, 2)
    place = torch.arange(-window, tiles * _TILE + window, device=q.device)
    key = place.unfold(0, _TILE + 2 * window, _TILE)[:, None, :]
    query = place[window : window + tiles * _TILE].view(tiles, _TILE, 1)
    seen = ((query - key).abs() <= window) & (key >= 0) & (key < length)
    # Queries behind the document's end are thrown away; they see everything, so that no row of the
    # softmax is empty and no NaN comes back through the gradient.
    mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device)
    mask.masked_fill_(~(seen | (query >= length)), float("-inf"))
    out = _softmax_attention(q.transpose(1, 2), k, v, mask.repeat(documents, 1, 1)[:, None])
    return out.transpose(1, 2).reshape(documents, -1, heads, width)[:, :length]


def _band(length: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(length, length): 0 where two places are at most `window` apart, −inf elsewhere."""
    place = torch.arange(length, device=device)
    apart = (place[:, None] - place[None, :]).abs() > window
    return torch.zeros(apart.shape, dtype=dtype, device=device).masked_fill_(apart, float("-inf"))


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, mask)
    # The fused kernels of a GPU round differently, and cuDNN's has given NaN with a mask
    # (pytorch issue 196678).
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, mask)


def varlen_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: int | None,
) -> Tensor:
    """torch's `varlen_attn` (CUDA, bf16 or fp16)."""
    size = (-1, -1) if window is None else (window, window)
    out_THD = varlen_attn(
        q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=size
    )
    assert isinstance(out_THD, Tensor)  # a tuple only where the log-sum-exp is asked for
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
