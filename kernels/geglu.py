"""GeGLU on the packed product of one linear layer, alone or with the linear map behind it.

The input holds both halves of a row side by side, x = [a | b], each I wide:

    out = gelu(a) · b,            gelu(a) = a Φ(a),   Φ(a) = (1 + erf(a / √2)) / 2
    ∂/∂a = g b (Φ(a) + a φ(a)),   φ(a) = exp(−a² / 2) / √(2π)
    ∂/∂b = g gelu(a)

for a gradient g of out (Shazeer 2020, arXiv 2002.05202; gelu: Hendrycks and Gimpel 2016, arXiv
1606.08415, the exact form, not the one with tanh). Arithmetic is fp32; only results are rounded.

`geglu_linear` is Wo · geglu(x), which keeps x for its backward and not geglu(x), although the
gradient of Wo needs it: the backward reads all it takes to make it anyway, and writes it once more
beside ∂x. For I = 1.5 D that is a seventh less to keep of a layer of ModernBERT.

What limits this is memory: 3 I numbers a token forward, 5 I backward, 6 I with geglu(x) again. A
library's erf costs about as much time again, so that Φ is computed here as

    Φ(−t) = 2^−P(t),   Φ(t) = 1 − 2^−P(t),   t ≥ 0

with P a polynomial of degree 8 for −log2 Φ(−t), fitted so that Φ and t Φ(−t) are within 6e-8 of
the truth everywhere: half the spacing of fp32 numbers below 1. Beyond t = 5.3, Φ(−t) is smaller
than that.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton
from torch.nn import functional as F

# Rows and at most as many columns of a program's tile, and its warps: a whole row of the usual
# widths. Measured on one H200 (docs/kernels.md).
_TILE = (1, 4096, 8)


def geglu_reference(x_TI2: Tensor) -> Tensor:
    """What `geglu` computes, in plain PyTorch, for any floating dtype."""
    activated_TI, gate_TI = x_TI2.chunk(2, dim=-1)
    return F.gelu(activated_TI) * gate_TI


def geglu_linear_reference(x_TI2: Tensor, weight_DI: Tensor) -> Tensor:
    """What `geglu_linear` computes, in plain PyTorch, for any floating dtype."""
    return F.linear(geglu_reference(x_TI2), weight_DI)


def geglu(x_TI2: Tensor) -> Tensor:
    """gelu(a) · b of x = [a | b]: (…, 2 I) to (…, I), differentiable.

    x: bf16, fp16 or fp32; copied first if it is not contiguous.
    Raises TypeError or ValueError for other dtypes and shapes.
    """
    return _geglu(_rows(x_TI2)).view(*x_TI2.shape[:-1], x_TI2.shape[-1] // 2)


def geglu_linear(x_TI2: Tensor, weight_DI: Tensor) -> Tensor:
    """geglu(x) Wᵀ: (…, 2 I) and (D, I) to (…, D), differentiable in both; keeps x and W alone.

    x: bf16, fp16 or fp32; copied first if it is not contiguous. weight: of the same dtype.
    Raises TypeError or ValueError for other dtypes and shapes.
    """
    rows_TI2 = _rows(x_TI2)
    if weight_DI.dtype != x_TI2.dtype:
        raise TypeError(f"x and weight must have one dtype, not {x_TI2.dtype}, {weight_DI.dtype}")
    if weight_DI.dim() != 2 or 2 * weight_DI.shape[1] != x_TI2.shape[-1]:
        sizes = tuple(x_TI2.shape), tuple(weight_DI.shape)
        raise ValueError(f"geglu_linear takes (…, 2 I) and (D, I), not {sizes[0]} and {sizes[1]}")
    return _geglu_linear(rows_TI2, weight_DI).view(*x_TI2.shape[:-1], weight_DI.shape[0])


def _rows(x: Tensor) -> Tensor:
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"geglu takes bf16, fp16 or fp32, not {x.dtype}")
    if x.dim() < 1 or x.shape[-1] % 2 or x.shape[-1] == 0:
        raise ValueError(f"geglu takes (…, 2 I), I at least 1, not {tuple(x.shape)}")
    return x.reshape(-1, x.shape[-1]).contiguous()


@triton.jit
def _normal_cdf(x):  # type: ignore[no-untyped-def]
    """Φ(x) in fp32; see the module's text."""
    t = tl.abs(x)
    p = t * 2.27593887e-06 - 3.29688992e-05
    p = p * t + 1.57283444e-04
    p = p * t + 2.02466224e-04
    p = p * t - 7.14276265e-03
    p = p * t + 5.25464192e-02
    p = p * t + 4.59193051e-01
    p = p * t + 1.15110695
    p = p * t + 0.99999994
    tail = tl.exp2(-p)
    return tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x, out, rows, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = x + row[:, None] * (2 * WIDTH) + column[None, :]
    a = tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    b = tl.load(at + WIDTH, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    result = a * _normal_cdf(a) * b
    to = out + row[:, None] * WIDTH + column[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    x,
    grad,
    grad_x,
    out,  # with AGAIN what the forward made; otherwise not touched
    rows,
    WIDTH: tl.constexpr,
    AGAIN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    offset = row[:, None] * (2 * WIDTH) + column[None, :]
    half = row[:, None] * WIDTH + column[None, :]
    a = tl.load(x + offset, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    b = tl.load(x + offset + WIDTH, mask=inside, other=0.0, eviction_policy="evict_first")
    g = tl.load(grad + half, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    b = b.to(tl.float32)
    cdf = _normal_cdf(a)
    # exp(−a² / 2) = 2^(−a² / (2 ln 2))
    density = tl.exp2(a * a * -0.72134752) * 0.39894228
    gelu = a * cdf
    dtype = grad_x.dtype.element_ty
    tl.store(grad_x + offset, (g * b * (cdf + a * density)).to(dtype), mask=inside)
    tl.store(grad_x + offset + WIDTH, (g * gelu).to(dtype), mask=inside)
    if AGAIN:
        tl.store(out + half, (gelu * b).to(dtype), mask=inside)


def _grid(rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid, and what both kernels are compiled for."""
    block_r, most, warps = _TILE
    block_w = min(most, triton.next_power_of_2(width))
    sizes = {"WIDTH": width, "BLOCK_R": block_r, "BLOCK_W": block_w, "num_warps": warps}
    return (triton.cdiv(rows, block_r), triton.cdiv(width, block_w)), sizes


@triton_op("clinical_modernbert::geglu", mutates_args={})
def _geglu(x: Tensor) -> Tensor:
    rows, width = x.shape[0], x.shape[1] // 2
    out = x.new_empty((rows, width))
    if out.numel() == 0:
        return out
    grid, sizes = _grid(rows, width)
    with torch.cuda.device_of(x):
        wrap_triton(_forward_kernel)[grid](x, out, rows, **sizes)
    return out


@_geglu.register_fake
def _geglu_fake(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1] // 2))


@triton_op("clinical_modernbert::geglu_backward", mutates_args={})
def _geglu_backward(x: Tensor, grad: Tensor, again: bool) -> tuple[Tensor, Tensor]:
    """The gradient of x, and geglu(x) if it is wanted again, otherwise nothing."""
    grad_x = torch.empty_like(x)
    rows, width = grad.shape
    out = x.new_empty((rows if again else 0, width))
    if grad.numel() == 0:
        return grad_x, out
    grid, sizes = _grid(rows, width)
    with torch.cuda.device_of(x):
        wrap_triton(_backward_kernel)[grid](x, grad, grad_x, out, rows, AGAIN=again, **sizes)
    return grad_x, out


@_geglu_backward.register_fake
def _geglu_backward_fake(x: Tensor, grad: Tensor, again: bool) -> tuple[Tensor, Tensor]:
    rows, width = grad.shape
    return torch.empty_like(x), x.new_empty((rows if again else 0, width))


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    (x,) = ctx.saved_tensors
    return _geglu_backward(x, grad.contiguous(), False)[0]


_geglu.register_autograd(_backward, setup_context=_save_for_backward)


@triton_op("clinical_modernbert::geglu_linear", mutates_args={})
def _geglu_linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(_geglu(x), weight)


@_geglu_linear.register_fake
def _geglu_linear_fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _linear_backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    x, weight = ctx.saved_tensors
    grad_x, activated = _geglu_backward(x, grad @ weight, True)
    return grad_x, grad.T @ activated


_geglu_linear.register_autograd(_linear_backward, setup_context=_save_for_backward)
