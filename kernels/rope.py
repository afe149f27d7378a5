"""Rotary positions on packed queries and keys, in one launch over tokens.

For a token at position p of its document, the pair (x_i, x_{i + D/2}) of a head of width D turns
by the angle p · theta^(-2i/D):

    out_i         = x_i · cos − x_{i+D/2} · sin
    out_{i + D/2} = x_{i+D/2} · cos + x_i · sin

(Su et al. 2021, arXiv 2104.09864; the two halves of a head make the pairs, as in GPT-NeoX.)
Queries and keys turn, values pass through. The inverse turn, by −angle, is the backward.

Queries, keys and values stay where one linear layer's product has them, (T, 3, H, D): attention
reads and writes rows of it as well as others. `rope` makes a new one, and `rope_in_place`, for
inference, writes over what it is given and leaves the values alone: a third less to move. A
compiler does that for `rope` too, forward and backward, where nobody reads what it is given again.

The grid runs over tokens, one a program, so that it does as much work for one long document among
thousands of short ones as for even lengths. Sines and cosines come from fp32 tables and the
arithmetic is fp32; only the result is rounded to the dtype of the input.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.library import triton_op, wrap_triton

# Tokens and warps of a program. Measured on one H200 (docs/kernels.md).
_TILE = (1, 2)


def rope_tables(positions: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each (positions, head_dim / 2) fp32 on the CPU.

    The frequencies and angles are rounded to fp32 exactly as transformers rounds them, so that the
    two models agree at the far end of a long document too, where an fp32 angle is off by up to
    5e-4. From numpy, because DeepSpeed rewrites torch's constructors while it builds a ZeRO-3
    model and would round the tables to its own dtype.
    """
    exponents = torch.from_numpy(np.arange(0, head_dim, 2, dtype=np.float32)) / head_dim
    frequencies = 1.0 / (theta**exponents)
    places = torch.from_numpy(np.arange(positions, dtype=np.float32))
    angles = places[:, None] * frequencies
    return angles.cos(), angles.sin()


def rope_reference(
    qkv_T3HD: Tensor, cos_PR: Tensor, sin_PR: Tensor, position_ids_T: Tensor
) -> Tensor:
    """What `rope` computes, in plain PyTorch, for any floating dtype (fp64 in fp64)."""
    wide = torch.promote_types(qkv_T3HD.dtype, torch.float32)
    cos_T11R = cos_PR[position_ids_T].to(wide)[:, None, None]
    sin_T11R = sin_PR[position_ids_T].to(wide)[:, None, None]
    first, second = qkv_T3HD[:, :2].to(wide).chunk(2, dim=-1)
    turned = torch.cat(
        [first * cos_T11R - second * sin_T11R, second * cos_T11R + first * sin_T11R], dim=-1
    )
    return torch.cat([turned.to(qkv_T3HD.dtype), qkv_T3HD[:, 2:]], dim=1)


def rope(qkv_T3HD: Tensor, cos_PR: Tensor, sin_PR: Tensor, position_ids_T: Tensor) -> Tensor:
    """Queries and keys turned to their positions, and values as they are: a new (T, 3, H, D).

    qkv: (T, 3, H, D) bf16, fp16 or fp32, any even D; copied first if it is not contiguous.
    cos, sin: (P, D / 2) fp32 from `rope_tables`. position_ids: (T,) int32 or int64, each below P
    (not checked: that would wait for the GPU); `kernels.documents` makes them from cu_seqlens.
    Differentiable in qkv. Raises TypeError or ValueError for other dtypes and shapes.
    """
    check_rope("rope", qkv_T3HD, cos_PR, sin_PR, position_ids_T)
    tables = (cos_PR.contiguous(), sin_PR.contiguous(), position_ids_T.contiguous())
    return _rope(qkv_T3HD.contiguous(), *tables, False)


def rope_in_place(
    qkv_T3HD: Tensor, cos_PR: Tensor, sin_PR: Tensor, position_ids_T: Tensor
) -> Tensor:
    """The same without autograd, written over qkv, which is returned.

    As `rope`, but a non-contiguous qkv (ValueError) and one that needs a gradient (RuntimeError)
    are refused.
    """
    check_rope("rope_in_place", qkv_T3HD, cos_PR, sin_PR, position_ids_T)
    if qkv_T3HD.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("rope_in_place has no gradient; use rope where one is needed")
    if not qkv_T3HD.is_contiguous():
        raise ValueError("rope_in_place needs a contiguous qkv; rope copies one that is not")
    tables = (cos_PR.contiguous(), sin_PR.contiguous(), position_ids_T.contiguous())
    _rope_in_place(qkv_T3HD, *tables)
    return qkv_T3HD


def check_rope(who: str, qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> None:
    """Raise TypeError or ValueError, in the name of `who`, for what cannot be turned."""
    if qkv.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"{who} takes bf16, fp16 or fp32, not {qkv.dtype}")
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise TypeError(f"the tables must be fp32, not {cos.dtype} and {sin.dtype}")
    if qkv.dim() != 4 or qkv.shape[1] != 3 or qkv.shape[3] % 2:
        raise ValueError(f"qkv must be (T, 3, H, D) with D even, not {tuple(qkv.shape)}")
    if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[1] * 2 != qkv.shape[3]:
        raise ValueError(
            f"the tables must be (positions, {qkv.shape[3] // 2}), "
            f"not {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if position_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"position_ids must be int32 or int64, not {position_ids.dtype}")
    if position_ids.shape != qkv.shape[:1]:
        raise ValueError(f"position_ids must be ({qkv.shape[0]},), not {tuple(position_ids.shape)}")


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    qkv,
    out,
    cos,
    sin,
    position_ids,
    tokens,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,  # D / 2
    INVERSE: tl.constexpr,
    VALUES: tl.constexpr,  # whether `out` lies elsewhere and needs them too
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,  # HEADS and HALF rounded up to powers of two
    BLOCK_R: tl.constexpr,
):
    """Turn all heads of BLOCK_T tokens; every load comes before the first store."""
    WIDTH: tl.constexpr = HEADS * 2 * HALF
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.arange(0, BLOCK_H)[None, :, None]
    pair = tl.arange(0, BLOCK_R)[None, None, :]
    live = (token < tokens)[:, None, None]
    inside = live & (head < HEADS) & (pair < HALF)
    q = token[:, None, None] * (3 * WIDTH) + head * (2 * HALF) + pair
    k = q + WIDTH
    v = q + 2 * WIDTH
    q_first = tl.load(qkv + q, mask=inside, other=0.0, eviction_policy="evict_first")
    q_second = tl.load(qkv + q + HALF, mask=inside, other=0.0, eviction_policy="evict_first")
    k_first = tl.load(qkv + k, mask=inside, other=0.0, eviction_policy="evict_first")
    k_second = tl.load(qkv + k + HALF, mask=inside, other=0.0, eviction_policy="evict_first")
    if VALUES:
        v_first = tl.load(qkv + v, mask=inside, other=0.0, eviction_policy="evict_first")
        v_second = tl.load(qkv + v + HALF, mask=inside, other=0.0, eviction_policy="evict_first")
    position = tl.load(position_ids + token, mask=token < tokens, other=0).to(tl.int64)
    entry = position[:, None, None] * HALF + pair
    c = tl.load(cos + entry, mask=live & (pair < HALF), other=1.0)
    s = tl.load(sin + entry, mask=live & (pair < HALF), other=0.0)
    if INVERSE:
        s = -s
    dtype = out.dtype.element_ty
    a = q_first.to(tl.float32)
    b = q_second.to(tl.float32)
    tl.store(out + q, (a * c - b * s).to(dtype), mask=inside, cache_modifier=".cs")
    tl.store(out + q + HALF, (b * c + a * s).to(dtype), mask=inside, cache_modifier=".cs")
    a = k_first.to(tl.float32)
    b = k_second.to(tl.float32)
    tl.store(out + k, (a * c - b * s).to(dtype), mask=inside, cache_modifier=".cs")
    tl.store(out + k + HALF, (b * c + a * s).to(dtype), mask=inside, cache_modifier=".cs")
    if VALUES:
        tl.store(out + v, v_first, mask=inside, cache_modifier=".cs")
        tl.store(out + v + HALF, v_second, mask=inside, cache_modifier=".cs")


# Two entries to the same turn. Each names a tensor once, so that a compiler sees which is written.
@triton.jit
def _rope_kernel(  # type: ignore[no-untyped-def]
    qkv, out, cos, sin, position_ids, tokens,
    HEADS: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    _turn(
        qkv, out, cos, sin, position_ids, tokens, HEADS, HALF, INVERSE, True,
        BLOCK_T, BLOCK_H, BLOCK_R,
    )  # fmt: skip


@triton.jit
def _rope_in_place_kernel(  # type: ignore[no-untyped-def]
    qkv, cos, sin, position_ids, tokens,
    HEADS: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    _turn(
        qkv, qkv, cos, sin, position_ids, tokens, HEADS, HALF, INVERSE, False,
        BLOCK_T, BLOCK_H, BLOCK_R,
    )  # fmt: skip


def _launch(qkv: Tensor, inverse: bool) -> tuple[tuple[int], dict[str, int | bool]]:
    """Grid, and what both kernels are compiled for."""
    tokens, _, heads, head_dim = qkv.shape
    half, (block_t, warps) = head_dim // 2, _TILE
    sizes: dict[str, int | bool] = {
        "HEADS": heads,
        "HALF": half,
        "INVERSE": inverse,
        "BLOCK_T": block_t,
        "BLOCK_H": triton.next_power_of_2(heads),
        "BLOCK_R": triton.next_power_of_2(half),
        "num_warps": warps,
    }
    return (triton.cdiv(tokens, block_t),), sizes


@triton_op("clinical_modernbert::rope", mutates_args={})
def _rope(qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, inverse: bool) -> Tensor:
    # Where a compiler traces. (torch.compiler.is_compiling() is False in here before torch 2.13.)
    if detect_fake_mode() is not None:
        # A copy that the compiler leaves out where nobody reads qkv again, as behind a linear
        # layer, whose product is then turned where it is.
        out = qkv.clone()
        _turn_in_place(out, cos, sin, position_ids, inverse)
        return out
    out = torch.empty_like(qkv)
    if qkv.numel() > 0:
        grid, sizes = _launch(qkv, inverse)
        with torch.cuda.device_of(qkv):
            wrap_triton(_rope_kernel)[grid](qkv, out, cos, sin, position_ids, qkv.shape[0], **sizes)
    return out


@_rope.register_fake
def _rope_fake(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, inverse: bool
) -> Tensor:
    return torch.empty_like(qkv)


@triton_op("clinical_modernbert::rope_in_place", mutates_args={"qkv"})
def _rope_in_place(qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> None:
    _turn_in_place(qkv, cos, sin, position_ids, False)


@_rope_in_place.register_fake
def _rope_in_place_fake(qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> None:
    return None


def _turn_in_place(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, inverse: bool
) -> None:
    if qkv.numel() > 0:
        grid, sizes = _launch(qkv, inverse)
        with torch.cuda.device_of(qkv):
            wrap_triton(_rope_in_place_kernel)[grid](
                qkv, cos, sin, position_ids, qkv.shape[0], **sizes
            )


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, *turn, ctx.inverse = inputs
    ctx.save_for_backward(*turn)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    grad_qkv = _rope(grad.contiguous(), *ctx.saved_tensors, not ctx.inverse)
    return grad_qkv, None, None, None, None


_rope.register_autograd(_backward, setup_context=_save_for_backward)
