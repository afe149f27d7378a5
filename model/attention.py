"""Attention over packed documents: one interface, several backends.

`attend` takes packed queries, keys and values before the rotary positions and gives what every
token, or each of some `Queries`, has seen of its document, the whole of it or a window. How it is
computed is a `Choice`, made once at start (`model.attention_choice`): one backend for all layers
and, where this project's kernels run, `kernels.local_attention` for those with a window, which
turns queries and keys by itself. In layers without one, documents no longer than SHORT_DOCUMENTS
can be windows too (`kernels.short_documents`): a grid over tokens does not pay for the number of
documents, as a backend's grid does. Which documents stay a backend's, `LongDocuments` says.

A backend is a function `(qkv_T3HD, places_M, cu_seqlens_q, cu_seqlens_k, max_seqlen, window,
short) -> out_MHD`:

- qkv (T, 3, H, D): queries q and keys k after the rotary positions, and values v, of all tokens;
- places_M: int64, the tokens whose queries are meant, M of them; None means all: M is T, and the
  two cu_seqlens are alike;
- cu_seqlens_k (N + 1,) int32: document n is tokens cu_seqlens_k[n] to cu_seqlens_k[n + 1],
  possibly none; the first entry is 0; tokens behind the last get no gradient;
- cu_seqlens_q (N + 1,) int32: the same of the queries of document n, again possibly none; those
  behind the last get zeros, and no gradient;
- max_seqlen: no document is longer (a bound, need not be reached), nor has more queries;
- window: tokens a query sees to either side, both ends included, within its document; None is the
  whole document. With a window all tokens are queries;
- short: None, or the `ShortDocuments` that are computed in its place; then there is no window.

out = softmax(q kᵀ / sqrt(D)) v, softmax in fp32. No token of one document reaches another, as long
as all numbers are finite. Those that are not never do in the reference; kernels compute whole tiles
and count pairs of two documents 0 times, and 0 · ∞ is no number, so that there they may make NaN of
tokens near by (`kernels.local_attention` says how near).
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.documents import document_bounds
from kernels.local_attention import local_attention
from kernels.short_documents import SHORT_DOCUMENTS, ShortDocuments
from model.attention_backends import (
    fa2_attention,
    fa4_attention,
    put_rows,
    register,
    varlen_attention,
)
from model.rotary import RotaryTables

# Queries that the reference treats together in a long document's window.
_TILE = 64

Attention = Callable[
    [Tensor, Tensor | None, Tensor, Tensor, int, int | None, ShortDocuments | None], Tensor
]


class Choice(NamedTuple):
    """What computes attention: a name of BACKENDS and, for layers with a window and for short
    documents in the others, "kernel" for `kernels.local_attention` and its tiles or "backend" for
    the same as elsewhere.
    """

    backend: str
    local: str

    def __str__(self) -> str:
        if self.local == "backend":
            return f"{self.backend}, in layers with a window {self.backend}"
        short = f"for many documents up to {SHORT_DOCUMENTS} tokens"
        return f"{self.backend}, in layers with a window and {short} kernels.local_attention"


class LongDocuments(NamedTuple):
    """The documents, from the first on, that stay a backend's where it has no window: their number,
    and that of their tokens. None of the others is longer than SHORT_DOCUMENTS; some of these need
    not be either."""

    number: int
    tokens: int


class Documents(NamedTuple):
    """Where the documents of a packed row lie.

    sizes: (max_seqlen + 2, LongDocuments.number + 2, LongDocuments.tokens + 2, 0), nothing but
    numbers of the host, which a compiled layer takes as they come: for each new int it would be
    compiled anew, and for lengths of 0 and 1. bounds_2T: where this project's kernels run.
    """

    position_ids_T: Tensor
    cu_seqlens: Tensor
    sizes: Tensor
    bounds_2T: Tensor | None


class Queries(NamedTuple):
    """The tokens of a packed row whose results somebody reads.

    places_M: int64 places in 0 … T − 1. cu_seqlens (N + 1,) int32: entries cu_seqlens[n] to
    cu_seqlens[n + 1] of places_M lie in document n, each place once, and those behind the last are
    filler, whose results mean nothing; or None, where they come in any order.
    """

    places_M: Tensor
    cu_seqlens: Tensor | None

    def take(self, values: Tensor) -> Tensor:
        """The rows of (T, …) values at these places, (M, …), differentiable in values."""
        if self.cu_seqlens is None:
            return values.index_select(0, self.places_M)
        taken: Tensor = _TakeRows.apply(values, self.places_M, self.cu_seqlens)
        return taken


class _TakeRows(torch.autograd.Function):
    """`index_select` whose backward writes rows: each has one place, so that nothing adds up.

    That of `index_select` adds row by row, atomically, which is slow in bf16.
    """

    @staticmethod
    def forward(ctx, values: Tensor, places_M: Tensor, cu_seqlens: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(places_M, cu_seqlens)
        ctx.rows = values.shape[0]
        return values.index_select(0, places_M)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        places_M, cu_seqlens = ctx.saved_tensors
        rows = grad.new_empty((ctx.rows, *grad.shape[1:]))
        put_rows(rows, grad, places_M, cu_seqlens)
        return rows, None, None


def describe_documents(
    position_ids_T: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    choice: Choice,
    long: LongDocuments | None = None,
) -> Documents:
    """What `attend` needs to know, computed once for all layers.

    long: None where it is not known. All are short then if max_seqlen says so, or none.
    """
    tokens, bounds_2T = position_ids_T.shape[0], None
    if choice.local == "kernel":
        bounds_2T = document_bounds(cu_seqlens, tokens)
    if long is None:
        # Where all of a model is one graph that takes any max_seqlen, it is not asked, and stays
        # one graph.
        all_short = statically_known_true(max_seqlen <= SHORT_DOCUMENTS)
        long = LongDocuments(0, 0) if all_short else LongDocuments(cu_seqlens.shape[0] - 1, tokens)
    sizes = cu_seqlens.new_empty(*(size + 2 for size in (max_seqlen, *long)), 0)
    if not torch.compiler.is_compiling():
        torch._dynamo.maybe_mark_dynamic(sizes, [0, 1, 2])
    return Documents(position_ids_T, cu_seqlens, sizes, bounds_2T)


def attend(
    qkv_T3HD: Tensor,
    tables: RotaryTables,
    documents: Documents,
    window: int | None,
    choice: Choice,
    queries: Queries | None = None,
) -> Tensor:
    """Rotary positions and attention: (T, 3, H, D) to (T, H, D), differentiable in qkv.

    queries: of these tokens alone, (M, H, D). Of a backend's documents no other rows are computed
    then, if their order allows; of windows all are, as there is little to save.
    """
    if queries is not None and (queries.cu_seqlens is None or window is not None):
        every_THD = attend(qkv_T3HD, tables, documents, window, choice)
        return queries.take(every_THD)
    position_ids_T, cu_seqlens, sizes, bounds_2T = documents
    if choice.local == "kernel" and window is not None:
        assert bounds_2T is not None
        return local_attention(
            qkv_T3HD, tables.cos_PR, tables.sin_PR, position_ids_T, bounds_2T, window
        )
    max_seqlen, first_document, first_token = (length - 2 for length in sizes.shape[:3])
    short = None
    if choice.local == "kernel":
        short = ShortDocuments(bounds_2T, first_document, first_token)
    places_M, cu_seqlens_q = (None, cu_seqlens) if queries is None else queries
    assert cu_seqlens_q is not None
    turned_T3HD = tables(qkv_T3HD, position_ids_T)
    return BACKENDS[choice.backend](
        turned_T3HD, places_M, cu_seqlens_q, cu_seqlens, max_seqlen, window, short
    )


def reference_attention(
    qkv_T3HD: Tensor,
    places_M: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen: int,
    window: int | None,
    short: ShortDocuments | None = None,
) -> Tensor:
    """Plain PyTorch, any floating dtype, any device: the truth in tests, and what a CPU uses.

    Documents of one length and as many queries are computed together and none is padded, so what
    a document gets depends on its own tokens alone, to the last bit, wherever in the row it lies.
    Reads both cu_seqlens on the host, which no compiler can look into: to one it is an operation.
    """
    if torch.compiler.is_compiling() or short is not None:
        return _opaque_reference(
            qkv_T3HD, places_M, cu_seqlens_q, cu_seqlens_k, max_seqlen, window, short
        )
    q_MHD, kv_T2HD = qkv_T3HD[:, 0], qkv_T3HD[:, 1:]
    if places_M is not None:
        q_MHD = q_MHD.index_select(0, places_M)
    return _reference(q_MHD, kv_T2HD, cu_seqlens_q, cu_seqlens_k, window)


def _reference(
    q_MHD: Tensor,
    kv_T2HD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    window: int | None,
) -> Tensor:
    queries, keys = (ends.diff().tolist() for ends in (cu_seqlens_q, cu_seqlens_k))
    *q_of, q_behind = q_MHD.split([*queries, q_MHD.shape[0] - sum(queries)])
    *kv_of, _ = kv_T2HD.split([*keys, kv_T2HD.shape[0] - sum(keys)])
    alike: dict[tuple[int, int], list[int]] = {}
    for document, sizes in enumerate(zip(queries, keys, strict=True)):
        alike.setdefault(sizes, []).append(document)
    # Stays so for documents without queries, and what lies behind all of them becomes zeros.
    outputs = [*q_of, torch.zeros_like(q_behind)]
    for sizes, documents in alike.items():
        if 0 not in sizes:
            q_NMHD = torch.stack([q_of[document] for document in documents])
            kv_NL2HD = torch.stack([kv_of[document] for document in documents])
            out_NMHD = _attend(q_NMHD, kv_NL2HD, window)
            for document, out_MHD in zip(documents, out_NMHD.unbind(), strict=True):
                outputs[document] = out_MHD
    return torch.cat(outputs)


def _attend(q_NMHD: Tensor, kv_NL2HD: Tensor, window: int | None) -> Tensor:
    """Attention within each of N documents of L tokens: (N, M, H, D), as q."""
    length = kv_NL2HD.shape[1]
    if window is not None and length > 2 * (_TILE + 2 * window):
        return _attend_in_tiles(q_NMHD, kv_NL2HD, window)
    k_NHLD, v_NHLD = kv_NL2HD.permute(2, 0, 3, 1, 4).unbind()
    mask_LL = None
    if window is not None and length > window + 1:
        mask_LL = _band(length, window, kv_NL2HD.dtype, kv_NL2HD.device)
    return _softmax_attention(q_NMHD.transpose(1, 2), k_NHLD, v_NHLD, mask_LL).transpose(1, 2)


def _attend_in_tiles(q_NLHD: Tensor, kv_NL2HD: Tensor, window: int) -> Tensor:
    """The same over a window, for long documents: tiles of queries against the keys they can see.

    Work and memory grow with L · (tile + 2 · window) instead of L².
    """
    documents, length, heads, width = q_NLHD.shape
    tiles = -(-length // _TILE)
    behind = tiles * _TILE - length
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


def _opaque_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    side = None if window < 0 else window
    out = _reference(q, torch.stack([k, v], dim=1), cu_seqlens_q, cu_seqlens_k, side)
    # The backward makes its own softmax.
    return out, q.new_zeros((q.shape[1], q.shape[0]), dtype=torch.float32)


def _opaque_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen: int,
    window: int,
) -> None:
    """The formula, a few queries of a document at a time, in fp32 or wider.

    p = softmax(q kᵀ s), s = 1 / sqrt(D);  ∂v = pᵀ g,  ∂z = p (g vᵀ − g · o),  ∂q = ∂z k s,
    ∂k = ∂zᵀ q s
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q_HMD, k_HTD, v_HTD, out_HMD, grad_HMD = (
        tensor.transpose(0, 1).to(wide) for tensor in (q, k, v, out, grad)
    )
    grads = [torch.zeros_like(tensor) for tensor in (q_HMD, k_HTD, v_HTD)]
    along_out_HM1 = (grad_HMD * out_HMD).sum(-1, keepdim=True)
    scale = q.shape[-1] ** -0.5
    bounds = (itertools.pairwise(ends.tolist()) for ends in (cu_seqlens_q, cu_seqlens_k))
    for (first_query, end), (start, stop) in zip(*bounds, strict=True):
        for first in range(first_query, end, 8 * _TILE):
            last = min(first + 8 * _TILE, end)
            low = start if window < 0 else max(start, first - window)
            high = stop if window < 0 else min(stop, last + window)
            queries, keys = slice(first, last), slice(low, high)
            scores = q_HMD[:, queries] @ k_HTD[:, keys].mT * scale
            if window >= 0:
                band = _band(high - low, window, wide, q.device)
                scores += band[first - low : last - low]
            p = scores.softmax(-1)
            g = grad_HMD[:, queries]
            slope = p * (g @ v_HTD[:, keys].mT - along_out_HM1[:, queries]) * scale
            grads[0][:, queries] = slope @ k_HTD[:, keys]
            grads[1][:, keys] += slope.mT @ q_HMD[:, queries]
            grads[2][:, keys] += p.mT @ g
    for place, gradient in zip((dq, dk, dv), grads, strict=True):
        place.copy_(gradient.transpose(0, 1))


_opaque_reference = register(
    "reference_attention", _opaque_forward, _opaque_backward, leaves_rows_unwritten=False
)

BACKENDS: dict[str, Attention] = {
    "fa4": fa4_attention,
    "fa2": fa2_attention,
    "varlen": varlen_attention,
    "reference": reference_attention,
}
