"""Passes over an fp32 tensor and a narrower one, as fast as memory is.

    add_narrow:    sums ← sums + values            10 bytes an element, of bf16 and fp16
    write_narrow:  sums ← 0 + values                6 bytes
    scale_narrow:  out = round(scale · values)      6 bytes

PyTorch's own kernels for two dtypes load element by element, which on an H200 took 1.7 times as
long (docs/decisions.md); its copy to fp32 is one of these, its copy from fp32 is not. A step of
several micro-batches has all three: the gradient of every parameter is the first of its fp32 sum or
is added to it, and the loss's fp32 gradients are scaled and rounded.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

# Elements of a program, and its warps.
_BLOCK, _WARPS = 2048, 4
_NARROW = (torch.bfloat16, torch.float16)


def add_narrow(sums: Tensor, values: Tensor) -> None:
    """Add bf16 or fp16 `values` to fp32 `sums`, in place; as many elements, both contiguous.

    The same bits as `sums.add_(values)`. Raises TypeError or ValueError otherwise.
    """
    _pass(_add_kernel, "add_narrow", sums, values)


def write_narrow(sums: Tensor, values: Tensor) -> None:
    """Write bf16 or fp16 `values` to fp32 `sums`; as many elements, both contiguous.

    The same bits as `sums.zero_().add_(values)`, -0 becomes +0. Raises TypeError or ValueError
    otherwise.
    """
    _pass(_write_kernel, "write_narrow", sums, values)


def _pass(kernel: Any, name: str, sums: Tensor, values: Tensor) -> None:
    if sums.dtype != torch.float32 or values.dtype not in _NARROW:
        raise TypeError(
            f"{name} takes fp32 sums and bf16 or fp16 values, not {sums.dtype} and {values.dtype}"
        )
    if sums.shape != values.shape or not (sums.is_contiguous() and values.is_contiguous()):
        raise ValueError(f"{name} needs two contiguous tensors of one shape")
    elements = sums.numel()
    if elements > 0:
        with torch.cuda.device_of(sums):
            kernel[(triton.cdiv(elements, _BLOCK),)](
                sums, values, elements, BLOCK=_BLOCK, num_warps=_WARPS
            )


def scale_narrow(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 `values` times an fp32 scalar on the device, rounded to bf16 or fp16: a new tensor.

    values: contiguous, of any shape. Raises TypeError or ValueError otherwise.
    """
    if values.dtype != torch.float32 or scale.dtype != torch.float32 or dtype not in _NARROW:
        raise TypeError(
            f"scale_narrow makes bf16 or fp16 of fp32, not {dtype} of {values.dtype} and "
            f"{scale.dtype}"
        )
    if scale.numel() != 1 or not values.is_contiguous():
        raise ValueError("scale_narrow needs contiguous values and one number to scale them")
    return _scale_narrow(values, scale, dtype)


@triton_op("clinical_modernbert::scale_narrow", mutates_args={})
def _scale_narrow(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    out, elements = torch.empty_like(values, dtype=dtype), values.numel()
    if elements > 0:
        with torch.cuda.device_of(values):
            wrap_triton(_scale_kernel)[(triton.cdiv(elements, _BLOCK),)](
                values, scale, out, elements, BLOCK=_BLOCK, num_warps=_WARPS
            )
    return out


@_scale_narrow.register_fake
def _scale_narrow_fake(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(values, dtype=dtype)


@triton.jit
def _add_kernel(sums, values, elements, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    value = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(sums + at, tl.load(sums + at, mask=inside, other=0.0) + value, mask=inside)


@triton.jit
def _write_kernel(sums, values, elements, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    value = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(sums + at, 0.0 + value, mask=inside)


@triton.jit
def _scale_kernel(values, scale, out, elements, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    scaled = tl.load(values + at, mask=inside, other=0.0) * tl.load(scale)
    tl.store(out + at, scaled.to(out.dtype.element_ty), mask=inside)
