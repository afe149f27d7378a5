"""Rotary positions on packed queries and keys, in one launch over tokens.

For a token at position p of its document, the pair (x_i, x_{i + D/2}) of a head of width D turns
by the angle p · theta^(-2i/D):

    out_i         = x_i · cos − x_{i+D/2} · sin
    out_{i + D/2} = x_{i+D/2} · cos + x_i · sin

(Su et al. 2021, arXiv 2104.09864; the two halves of a head make the pairs, as in GPT-NeoX.)
Queries and keys turn, values pass through. The inverse turn, by −angle, is the backward.

`rope` takes the product of one linear layer, (T, 3, H, D), apart into contiguous q, k and v, as
attention wants them, and its backward puts their gradients together again, so that nothing else
copies them. `rope_in_place`, for inference, leaves the values where they are: a third less to move.

The grid runs over tokens, one a program, so that it does as much work for one long document among
thousands of short ones as for even lengths. Sines and cosines come from fp32 tables and the
arithmetic is fp32; only the result is rounded to the dtype of the input.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
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
) -> tuple[Tensor, Tensor, Tensor]:
    """What `rope` computes, in plain PyTorch, for any floating dtype (fp64 in fp64)."""
    wide = torch.promote_types(qkv_T3HD.dtype, torch.float32)
    cos_T11R = cos_PR[position_ids_T].to(wide)[:, None, None]
    sin_T11R = sin_PR[position_ids_T].to(wide)[:, None, None]
    first, second = qkv_T3HD[:, :2].to(wide).chunk(2, dim=-1)
    turned = torch.cat(
        [first * cos_T11R - second * sin_T11R, second * cos_T11R + first * sin_T11R], dim=-1
    )
    q_THD, k_THD = turned.to(qkv_T3HD.dtype).unbind(1)
    return q_THD, k_THD, qkv_T3HD[:, 2]


def rope(
    qkv_T3HD: Tensor, cos_PR: Tensor, sin_PR: Tensor, position_ids_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys turned to their positions, and values: contiguous (T, H, D) each.

    qkv: (T, 3, H, D) bf16, fp16 or fp32, any even D; copied first if it is not contiguous.
    cos, sin: (P, D / 2) fp32 from `rope_tables`. position_ids: (T,) int32 or int64, each below P
    (not checked: that would wait for the GPU); `kernels.documents` makes them from cu_seqlens.
    Differentiable in qkv. Raises TypeError or ValueError for other dtypes and shapes.
    """
    check_rope("rope", qkv_T3HD, cos_PR, sin_PR, position_ids_T)
    tables = (cos_PR.contiguous(), sin_PR.contiguous(), position_ids_T.contiguous())
    return _rope(qkv_T3HD.contiguous(), *tables)


def rope_in_place(
    qkv_T3HD: Tensor, cos_PR: Tensor, sin_PR: Tensor, position_ids_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same without autograd, written over qkv, of which q, k and v are views.

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
    q_THD, k_THD, v_THD = qkv_T3HD.unbind(1)
    return q_THD, k_THD, v_THD


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
    q,
    k,
    v,  # with VALUES only, like v_out
    q_out,
    k_out,
    v_out,
    cos,
    sin,
    position_ids,
    tokens,
    STEP: tl.constexpr,  # elements from one token to the next
    STEP_OUT: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,  # D / 2
    INVERSE: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,  # HEADS and HALF rounded up to powers of two
    BLOCK_R: tl.constexpr,
):
    """Turn all heads of BLOCK_T tokens; every load comes before the first store."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.arange(0, BLOCK_H)[None, :, None]
    pair = tl.arange(0, BLOCK_R)[None, None, :]
    live = (token < tokens)[:, None, None]
    inside = live & (head < HEADS) & (pair < HALF)
    within = head * (2 * HALF) + pair
    at = token[:, None, None] * STEP + within
    q_first = tl.load(q + at, mask=inside, other=0.0, eviction_policy="evict_first")
    q_second = tl.load(q + at + HALF, mask=inside, other=0.0, eviction_policy="evict_first")
    k_first = tl.load(k + at, mask=inside, other=0.0, eviction_policy="evict_first")
    k_second = tl.load(k + at + HALF, mask=inside, other=0.0, eviction_policy="evict_first")
    if VALUES:
        v_first = tl.load(v + at, mask=inside, other=0.0, eviction_policy="evict_first")
        v_second = tl.load(v + at + HALF, mask=inside, other=0.0, eviction_policy="evict_first")
    position = tl.load(position_ids + token, mask=token < tokens, other=0).to(tl.int64)
    entry = position[:, None, None] * HALF + pair
    c = tl.load(cos + entry, mask=live & (pair < HALF), other=1.0)
    s = tl.load(sin + entry, mask=live & (pair < HALF), other=0.0)
    if INVERSE:
        s = -s
    to = token[:, None, None] * STEP_OUT + within
    dtype = q_out.dtype.element_ty
    a = q_first.to(tl.float32)
    b = q_second.to(tl.float32)
    tl.store(q_out + to, (a * c - b * s).to(dtype), mask=inside, cache_modifier=".cs")
    tl.store(q_out + to + HALF, (b * c + a * s).to(dtype), mask=inside, cache_modifier=".cs")
    a = k_first.to(tl.float32)
    b = k_second.to(tl.float32)
    tl.store(k_out + to, (a * c - b * s).to(dtype), mask=inside, cache_modifier=".cs")
    tl.store(k_out + to + HALF, (b * c + a * s).to(dtype), mask=inside, cache_modifier=".cs")
    if VALUES:
        tl.store(v_out + to, v_first, mask=inside, cache_modifier=".cs")
        tl.store(v_out + to + HALF, v_second, mask=inside, cache_modifier=".cs")


# Three entries to the same turn. Each names the packed tensor once, so that a compiler sees which
# whole tensors are written.
@triton.jit
def _apart_kernel(  # type: ignore[no-untyped-def]
    qkv, q_out, k_out, v_out, cos, sin, position_ids, tokens,
    HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = HEADS * 2 * HALF
    _turn(
        qkv, qkv + WIDTH, qkv + 2 * WIDTH, q_out, k_out, v_out, cos, sin, position_ids, tokens,
        3 * WIDTH, WIDTH, HEADS, HALF, False, True, BLOCK_T, BLOCK_H, BLOCK_R,
    )  # fmt: skip


@triton.jit
def _together_kernel(  # type: ignore[no-untyped-def]
    q, k, v, out, cos, sin, position_ids, tokens,
    HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = HEADS * 2 * HALF
    _turn(
        q, k, v, out, out + WIDTH, out + 2 * WIDTH, cos, sin, position_ids, tokens,
        WIDTH, 3 * WIDTH, HEADS, HALF, True, True, BLOCK_T, BLOCK_H, BLOCK_R,
    )  # fmt: skip


@triton.jit
def _in_place_kernel(  # type: ignore[no-untyped-def]
    qkv, cos, sin, position_ids, tokens,
    HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = HEADS * 2 * HALF
    _turn(
        qkv, qkv + WIDTH, qkv, qkv, qkv + WIDTH, qkv, cos, sin, position_ids, tokens,
        3 * WIDTH, 3 * WIDTH, HEADS, HALF, False, False, BLOCK_T, BLOCK_H, BLOCK_R,
    )  # fmt: skip


def _sizes(heads: int, head_dim: int) -> dict[str, int]:
    half = head_dim // 2
    return {
        "HEADS": heads,
        "HALF": half,
        "BLOCK_T": _TILE[0],
        "BLOCK_H": triton.next_power_of_2(heads),
        "BLOCK_R": triton.next_power_of_2(half),
        "num_warps": _TILE[1],
    }


@triton_op("clinical_modernbert::rope", mutates_args={})
def _rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, _, heads, head_dim = qkv.shape
    q, k, v = (qkv.new_empty((tokens, heads, head_dim)) for _ in range(3))
    if qkv.numel() > 0:
        with torch.cuda.device_of(qkv):
            wrap_triton(_apart_kernel)[(triton.cdiv(tokens, _TILE[0]),)](
                qkv, q, k, v, cos, sin, position_ids, tokens, **_sizes(heads, head_dim)
            )
    return q, k, v


@_rope.register_fake
def _rope_fake(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, _, heads, head_dim = qkv.shape
    q, k, v = (qkv.new_empty((tokens, heads, head_dim)) for _ in range(3))
    return q, k, v


@triton_op("clinical_modernbert::rope_backward", mutates_args={})
def _rope_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor
) -> Tensor:
    tokens, heads, head_dim = grad_q.shape
    out = grad_q.new_empty((tokens, 3, heads, head_dim))
    if out.numel() > 0:
        with torch.cuda.device_of(grad_q):
            wrap_triton(_together_kernel)[(triton.cdiv(tokens, _TILE[0]),)](
                grad_q,
                grad_k,
                grad_v,
                out,
                cos,
                sin,
                position_ids,
                tokens,
                **_sizes(heads, head_dim),
            )
    return out


@_rope_backward.register_fake
def _rope_backward_fake(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor
) -> Tensor:
    tokens, heads, head_dim = grad_q.shape
    return grad_q.new_empty((tokens, 3, heads, head_dim))


@triton_op("clinical_modernbert::rope_in_place", mutates_args={"qkv"})
def _rope_in_place(qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> None:
    tokens, _, heads, head_dim = qkv.shape
    if qkv.numel() > 0:
        with torch.cuda.device_of(qkv):
            wrap_triton(_in_place_kernel)[(triton.cdiv(tokens, _TILE[0]),)](
                qkv, cos, sin, position_ids, tokens, **_sizes(heads, head_dim)
            )


@_rope_in_place.register_fake
def _rope_in_place_fake(qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> None:
    return None


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    grad_qkv = _rope_backward(*(grad.contiguous() for grad in grads), *ctx.saved_tensors)
    return grad_qkv, None, None, None


_rope.register_autograd(_backward, setup_context=_save_for_backward)
