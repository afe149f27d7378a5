"""Rotary positions and attention within a window, on packed queries, keys and values.

With q̂ and k̂ the queries and keys of a head of width D turned to their positions (see
`kernels.rope`), token i sees the tokens j of its own document with |i − j| ≤ W:

    s_ij = q̂_i · k̂_j / √D,   p_ij = exp(s_ij − L_i),   L_i = log Σ_j exp(s_ij),   o_i = Σ_j p_ij v_j

and backward, for a gradient g of o (Dao 2023, arXiv 2307.08691):

    δ_i   = g_i · o_i                       d_ij  = p_ij (g_i · v_j − δ_i)
    ∂v_j  = Σ_i p_ij g_i                    ∂q̂_i = Σ_j d_ij k̂_j / √D,   ∂k̂_j = Σ_i d_ij q̂_i / √D

∂q and ∂k are these turned back by their angles. Results are rounded to the input's dtype, and so
are q̂, k̂ and the factors p and d of a product; everything else is fp32. A token behind
cu_seqlens[-1] belongs to no document: its output is 0, and so is every gradient of it.

Forward, `rope` turns queries and keys, at the speed of a copy, and one launch does the rest;
backward turns ∂q and ∂k back before they leave the chip, and reads what `rope` made, which may lie
where its input did. Turning tiles inside the attention instead costs more than the pass that it
saves: every key tile is turned for three query tiles forward and as many backward, its tables are
twice its size, and what is computed cannot be prefetched into shared memory as what is loaded can.

There are two implementations, and `pipelined` says which is taken: `kernels.local_attention_tiles`
runs anywhere, `kernels.local_attention_hopper` is for Hopper, bf16, heads of 64 and windows up to
64. All that follows holds for both. The grid runs over tokens: neither the
number of documents nor the longest one changes it. ∂q is summed over keys, ∂k and ∂v over queries,
each in a fixed order and without atomics, so two runs give the same bits.

No token reaches one that does not see it, in another document or outside the window, as long as
all numbers are finite: queries, keys, values, g and o, and in fp32 their products. Pairs that do
not see one another are computed with their tile and then count 0 times, and 0 · ∞ is no number: an
∞ or NaN may make results NaN up to tokens of a program + tokens of a step + W away, gradients twice
as far, and changes nothing beyond. o is finite where no score is beyond 2²⁷: a GPU multiplies by
log2 e and subtracts with one rounding, which leaves of a row's largest score what the maximum lost
in its product. Of a product of 2²⁸ that may be 16, and fp16 does not hold 2¹⁶.
"""

import torch
import triton
from torch import Tensor

from kernels import local_attention_tiles as tiles
from kernels.documents import document_bounds_reference
from kernels.rope import check_rope, rope, rope_reference

# Whether `local_attention_hopper` is taken where it can be; off to compare the two.
WALKS = True
# Gluon is experimental, and each version changes it: what runs is what was measured, with the
# triton that torch 2.11 for CUDA brings and the one that 2.13 does.
WALKING_TRITONS = ("3.6", "3.7")
_WIDEST_HEAD = 256
_WIDEST_WINDOW = 2**19  # so that places stay exact in the mask


def pipelined(dtype: torch.dtype, head_dim: int, window: int, device: torch.device) -> bool:
    """Whether `kernels.local_attention_hopper` computes this, rather than tiles."""
    walks = WALKS and ".".join(triton.__version__.split(".")[:2]) in WALKING_TRITONS
    return walks and walkable(dtype, head_dim, window, device)


def walkable(dtype: torch.dtype, head_dim: int, window: int, device: torch.device) -> bool:
    """Whether `pipelined` says yes with one of WALKING_TRITONS, as long as WALKS is on."""
    return (
        dtype == torch.bfloat16
        and head_dim == 64
        and window <= 64
        and device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device)[0] == 9
    )


def local_attention_reference(
    qkv_T3HD: Tensor,
    cos_PR: Tensor,
    sin_PR: Tensor,
    position_ids_T: Tensor,
    cu_seqlens: Tensor,
    window: int,
) -> Tensor:
    """What `local_attention` computes, in plain PyTorch, for any floating dtype; T × T scores."""
    turned_T3HD = rope_reference(qkv_T3HD, cos_PR, sin_PR, position_ids_T)
    q_THD, k_THD, v_THD = turned_T3HD.unbind(1)
    first_T, end_T = document_bounds_reference(cu_seqlens, qkv_T3HD.shape[0])
    token_T = torch.arange(qkv_T3HD.shape[0], device=qkv_T3HD.device)
    seen_TT = (token_T >= first_T[:, None]) & (token_T < end_T[:, None])
    seen_TT &= (token_T[:, None] - token_T).abs() <= window
    scores_HTT = torch.einsum("ihd,jhd->hij", q_THD, k_THD) * qkv_T3HD.shape[-1] ** -0.5
    wide = torch.promote_types(qkv_T3HD.dtype, torch.float32)
    scores_HTT = scores_HTT.to(wide).masked_fill(~seen_TT, torch.finfo(wide).min)
    weights_HTT = (scores_HTT.softmax(-1) * seen_TT).to(qkv_T3HD.dtype)
    return torch.einsum("hij,jhd->ihd", weights_HTT, v_THD)


def local_attention(
    qkv_T3HD: Tensor,
    cos_PR: Tensor,
    sin_PR: Tensor,
    position_ids_T: Tensor,
    bounds_2T: Tensor,
    window: int,
) -> Tensor:
    """Attention of every token over the `window` tokens to either side in its document: (T, H, D).

    qkv: (T, 3, H, D) bf16, fp16 or fp32, any even D up to 256; copied first if not contiguous.
    cos, sin: (P, D / 2) fp32 from `rope_tables`. position_ids: (T,) int32 or int64, each below P
    (not checked: that would wait for the GPU); `kernels.documents.positions_from` makes them.
    bounds: (2, T) int32 from `kernels.documents.document_bounds`, made once for all layers.
    Differentiable in qkv. Raises TypeError or ValueError for other dtypes and shapes.
    """
    check_rope("local_attention", qkv_T3HD, cos_PR, sin_PR, position_ids_T)
    if qkv_T3HD.shape[3] > _WIDEST_HEAD:
        raise ValueError(f"local_attention takes heads up to {_WIDEST_HEAD}, not {qkv_T3HD.shape}")
    if bounds_2T.shape != (2, qkv_T3HD.shape[0]) or bounds_2T.dtype != torch.int32:
        raise ValueError(
            f"bounds must be (2, {qkv_T3HD.shape[0]}) int32 from document_bounds, not "
            f"{tuple(bounds_2T.shape)} {bounds_2T.dtype}"
        )
    if not 0 <= window <= _WIDEST_WINDOW:
        raise ValueError(f"window must be between 0 and {_WIDEST_WINDOW}, not {window}")
    out_THD: Tensor = _LocalAttention.apply(
        qkv_T3HD.contiguous(),
        cos_PR.contiguous(),
        sin_PR.contiguous(),
        position_ids_T.contiguous(),
        bounds_2T.contiguous(),
        window,
    )
    return out_THD


# Opaque to the compiler: the launches that it generates know no bound on registers.
@torch.library.custom_op("clinical_modernbert::local_attention", mutates_args=())
def _local_attention(turned: Tensor, bounds: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Of what `rope` gave, the result, and log2 of the sums, (H, T) fp32."""
    tokens, _, heads, head_dim = turned.shape
    out = turned.new_empty((tokens, heads, head_dim))
    logsumexp = turned.new_empty((heads, tokens), dtype=torch.float32)
    if turned.numel() == 0:
        return out, logsumexp
    with torch.cuda.device_of(turned):
        if pipelined(turned.dtype, head_dim, window, turned.device):
            # Imported where it is needed: not every triton has Gluon as these kernels write it.
            from kernels import local_attention_hopper as walks

            walks.forward(turned, bounds, out, logsumexp, window)
        else:
            tiles.forward(turned, bounds, out, logsumexp, window)
    return out, logsumexp


@_local_attention.register_fake
def _local_attention_fake(turned: Tensor, bounds: Tensor, window: int) -> tuple[Tensor, Tensor]:
    tokens, _, heads, head_dim = turned.shape
    out = turned.new_empty((tokens, heads, head_dim))
    return out, turned.new_empty((heads, tokens), dtype=torch.float32)


@torch.library.custom_op("clinical_modernbert::local_attention_backward", mutates_args=())
def _local_attention_backward(
    grad: Tensor,
    turned: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    bounds: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    window: int,
) -> Tensor:
    """The gradient by what was given to `rope`: (T, 3, H, D)."""
    grad_qkv = torch.empty_like(turned)
    if turned.numel() == 0:
        return grad_qkv
    given = (grad, turned, cos, sin, position_ids, bounds, out, logsumexp, grad_qkv, window)
    with torch.cuda.device_of(turned):
        if pipelined(turned.dtype, turned.shape[-1], window, turned.device):
            from kernels import local_attention_hopper as walks

            walks.backward(*given)
        else:
            tiles.backward(*given)
    return grad_qkv


@_local_attention_backward.register_fake
def _local_attention_backward_fake(
    grad: Tensor,
    turned: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    bounds: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    window: int,
) -> Tensor:
    return torch.empty_like(turned)


class _LocalAttention(torch.autograd.Function):
    """Two operations forward, of which the second alone has a backward: it turns back as well.

    The compiler sees `rope`, and so turns a product where it lies.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor,
        bounds: Tensor,
        window: int,
    ) -> Tensor:
        turned = rope(qkv, cos, sin, position_ids)
        out, logsumexp = _local_attention(turned, bounds, window)
        ctx.save_for_backward(turned, cos, sin, position_ids, bounds, out, logsumexp)
        ctx.window = window
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        grad_qkv = _local_attention_backward(grad.contiguous(), *ctx.saved_tensors, ctx.window)
        return grad_qkv, None, None, None, None, None
