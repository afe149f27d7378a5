"""Rotary positions on packed queries and keys, in one launch over tokens.

For a token at position p of its document, the pair (x_i, x_{i + D/2}) of a head of width D turns
by the angle p · theta^(-2i/D):

    out_i         = x_i · cos − x_{i+D/2} · sin
    out_{i + D/2} = x_{i+D/2} · cos + x_i · sin

(Su et al. 2021, arXiv 2104.09864; the two halves of a head make the pairs, as in GPT-NeoX.)
Queries and keys turn, values pass through. The inverse turn, by −angle, is the backward.

The grid runs over tokens, so that it does as much work for one long document among thousands of
short ones as for even lengths. Sines and cosines come from fp32 tables and the arithmetic is fp32;
only the result is rounded to the dtype of the input.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

_HEADS_A_PROGRAM = 8
_TOKENS_A_PROGRAM = 4


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
    qk_T2HD, v_T1HD = qkv_T3HD.split([2, 1], dim=1)
    first, second = qk_T2HD.to(wide).chunk(2, dim=-1)
    turned = torch.cat(
        [first * cos_T11R - second * sin_T11R, second * cos_T11R + first * sin_T11R], dim=-1
    )
    return torch.cat([turned.to(qkv_T3HD.dtype), v_T1HD], dim=1)


def rope(qkv_T3HD: Tensor, cos_PR: Tensor, sin_PR: Tensor, position_ids_T: Tensor) -> Tensor:
    """Packed (T, 3, H, D) with queries and keys turned to their positions, values copied.

    qkv: bf16, fp16 or fp32, any even D; copied first if it is not contiguous.
    cos, sin: (P, D / 2) fp32 from `rope_tables`. position_ids: (T,) int32 or int64, each below P
    (not checked: that would wait for the GPU).
    Differentiable in qkv. Raises TypeError or ValueError for other dtypes and shapes.
    """
    _check(qkv_T3HD, cos_PR, sin_PR, position_ids_T)
    return _rope(
        qkv_T3HD.contiguous(),
        cos_PR.contiguous(),
        sin_PR.contiguous(),
        position_ids_T.contiguous(),
        False,
    )


def _check(qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> None:
    if qkv.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"rope takes bf16, fp16 or fp32, not {qkv.dtype}")
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise TypeError(f"the tables must be fp32, not {cos.dtype} and {sin.dtype}")
    if qkv.dim() != 4 or qkv.shape[1] != 3 or qkv.shape[3] % 2:
        raise ValueError(f"qkv must be (T, 3, H, D) with D even, not {tuple(qkv.shape)}")
    if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[1] * 2 != qkv.shape[3]:
        raise ValueError(
            f"the tables must be (positions, {qkv.shape[3] // 2}), "
            f"not {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if position_ids.shape != qkv.shape[:1]:
        raise ValueError(f"position_ids must be ({qkv.shape[0]},), not {tuple(position_ids.shape)}")


@triton.jit
def _rope_kernel(  # type: ignore[no-untyped-def]
    qkv,
    out,
    cos,
    sin,
    position_ids,
    tokens,
    HEADS: tl.constexpr,  # of q, k and v together: 3 H
    TURNED: tl.constexpr,  # of q and k: 2 H
    HALF: tl.constexpr,  # D / 2
    INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,  # HALF rounded up to a power of two
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    pair = tl.arange(0, BLOCK_R)
    live = token < tokens
    position = tl.load(position_ids + token, mask=live, other=0).to(tl.int64)
    in_table = live[:, None] & (pair < HALF)[None, :]
    entry = position[:, None] * HALF + pair[None, :]
    c = tl.load(cos + entry, mask=in_table, other=1.0)[:, None, :]
    s = tl.load(sin + entry, mask=in_table, other=0.0)[:, None, :]
    if INVERSE:
        s = -s
    offset = (token[:, None, None] * HEADS + head[None, :, None]) * (2 * HALF) + pair[None, None, :]
    inside = in_table[:, None, :] & (head < HEADS)[None, :, None]
    first = tl.load(qkv + offset, mask=inside, other=0.0)
    second = tl.load(qkv + offset + HALF, mask=inside, other=0.0)
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    turns = (head < TURNED)[None, :, None]
    dtype = out.dtype.element_ty
    tl.store(out + offset, tl.where(turns, (a * c - b * s).to(dtype), first), mask=inside)
    tl.store(out + offset + HALF, tl.where(turns, (b * c + a * s).to(dtype), second), mask=inside)


@triton_op("clinical_modernbert::rope", mutates_args={})
def _rope(qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, inverse: bool) -> Tensor:
    out = torch.empty_like(qkv)
    tokens, _, heads, head_dim = qkv.shape
    if tokens == 0:
        return out
    grid = (triton.cdiv(tokens, _TOKENS_A_PROGRAM), triton.cdiv(3 * heads, _HEADS_A_PROGRAM))
    wrap_triton(_rope_kernel)[grid](
        qkv,
        out,
        cos,
        sin,
        position_ids,
        tokens,
        HEADS=3 * heads,
        TURNED=2 * heads,
        HALF=head_dim // 2,
        INVERSE=inverse,
        BLOCK_T=_TOKENS_A_PROGRAM,
        BLOCK_H=_HEADS_A_PROGRAM,
        BLOCK_R=triton.next_power_of_2(head_dim // 2),
    )
    return out


@_rope.register_fake
def _rope_fake(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, inverse: bool
) -> Tensor:
    return torch.empty_like(qkv)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, cos, sin, position_ids, inverse = inputs
    ctx.save_for_backward(cos, sin, position_ids)
    ctx.inverse = inverse


def _backward(ctx, grad_T3HD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    cos, sin, position_ids = ctx.saved_tensors
    grad = _rope(grad_T3HD.contiguous(), cos, sin, position_ids, not ctx.inverse)
    return grad, None, None, None, None


_rope.register_autograd(_backward, setup_context=_save_for_backward)
