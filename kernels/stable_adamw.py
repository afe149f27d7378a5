"""StableAdamW's step on a flat tensor that holds pieces of parameters, in two passes over memory.

First pass, with gradient g, moments m and v, their shares c₁ and c₂ of what is new, and for each
piece:

    g ← 0 if skip else g / scale
    m ← m + c₁ (g − m),      v ← v + c₂ (g² − v)
    S = Σ over the piece of g² / max(v, ε²)

Between the passes the caller adds up S over the pieces of a parameter, which may lie on other
ranks, and chooses a rate r for each (train/stable_adamw.py has the rule). Second pass:

    θ ← θ − r (m / (sqrt(v) + ε) + decay θ)

All tensors are fp32. The passes read g, m, v and write m, v, and read θ, m, v and write θ: 36 bytes
an element. A piece is cut into chunks, a program each; what lies between pieces is padding and is
left alone. Sums are made in a fixed order, so two runs on one kind of GPU give the same bits.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

Pieces = tuple[tuple[int, int], ...]
"""(start, stop) of each piece in the flat tensor, start == stop where there is none of it"""

# Elements of a program.
_CHUNK = 2048
_CHUNK_INTERPRETED = 32
_PARTIAL_SUMS = 1024


def update_moments_reference(
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    shares: Tensor,
    scale: Tensor,
    skip: Tensor,
    eps: float,
    pieces: Pieces,
) -> Tensor:
    """What `update_moments` computes, in plain PyTorch; the gradient is scaled in place."""
    gradient.div_(scale).masked_fill_(skip.bool(), 0)
    mean.lerp_(gradient, shares[0])
    squared = gradient * gradient
    square.lerp_(squared, shares[1])
    ratio = squared.div_(square.clamp(min=eps * eps))
    return torch.stack([ratio[start:stop].sum() for start, stop in pieces])


def apply_update_reference(
    weights: Tensor,
    mean: Tensor,
    square: Tensor,
    rates: Tensor,
    decay: float,
    eps: float,
    pieces: Pieces,
) -> None:
    """What `apply_update` does, in plain PyTorch."""
    update = (mean / square.sqrt().add_(eps)).add_(weights, alpha=decay)
    for (start, stop), rate in zip(pieces, rates.unbind(), strict=True):
        weights[start:stop].addcmul_(update[start:stop], rate, value=-1)


def update_moments(
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    shares: Tensor,
    scale: Tensor,
    skip: Tensor,
    eps: float,
    pieces: Pieces,
) -> Tensor:
    """The first pass; `mean` and `square` in place, the sums S returned, (pieces,) fp32.

    gradient, mean, square: (N,) fp32, contiguous. shares: (2,); scale, skip: scalars; fp32 on the
    device, which is not waited for. Raises TypeError or ValueError otherwise.
    """
    _check(gradient, mean, square)
    begin, length, _, first, aligned = _cut(pieces, mean.device)
    partial = torch.empty(len(begin), dtype=torch.float32, device=mean.device)
    sums = torch.empty(len(pieces), dtype=torch.float32, device=mean.device)
    if len(begin):
        with torch.cuda.device_of(mean):
            _moments_kernel[(len(begin),)](
                gradient,
                mean,
                square,
                shares,
                scale,
                skip,
                begin,
                length,
                partial,
                eps * eps,
                aligned,
                _block(mean.device),
            )
    with torch.cuda.device_of(sums):
        _sum_kernel[(len(pieces),)](partial, first, sums, _PARTIAL_SUMS)
    return sums


def apply_update(
    weights: Tensor,
    mean: Tensor,
    square: Tensor,
    rates: Tensor,
    decay: float,
    eps: float,
    pieces: Pieces,
) -> None:
    """The second pass; `weights` in place. rates: (pieces,) fp32, the rest as `update_moments`."""
    _check(weights, mean, square)
    begin, length, piece, _, aligned = _cut(pieces, weights.device)
    if len(begin):
        with torch.cuda.device_of(weights):
            _update_kernel[(len(begin),)](
                weights,
                mean,
                square,
                rates,
                begin,
                length,
                piece,
                decay,
                eps,
                aligned,
                _block(weights.device),
            )


def _check(*tensors: Tensor) -> None:
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        raise TypeError(f"needs fp32, got {[tensor.dtype for tensor in tensors]}")
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise ValueError(f"needs flat tensors of one length, got {shapes}")
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("needs contiguous tensors")


def _block(device: torch.device) -> int:
    return _CHUNK_INTERPRETED if device.type == "cpu" else _CHUNK


@functools.cache
def _cut(pieces: Pieces, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Chunks of the pieces: begin, length and piece of each; and each piece's first chunk.

    On the device, put there once, for that waits for it. Last, the elements, up to four, that every
    begin and length is a multiple of: as many are loaded at once.
    """
    chunks, first, block = [], [0], _block(device)
    for index, (start, stop) in enumerate(pieces):
        for at in range(start, stop, block):
            chunks.append((at, min(block, stop - at), index))
        first.append(len(chunks))
    table = torch.tensor(chunks, dtype=torch.int64).view(-1, 3).t().contiguous().to(device)
    begin, length, piece = table.unbind()
    aligned = math.gcd(4, *(edge for piece in pieces if piece[0] < piece[1] for edge in piece))
    return begin, length, piece, torch.tensor(first, dtype=torch.int64, device=device), aligned


@triton.jit
def _moments_kernel(  # type: ignore[no-untyped-def]
    gradient,
    mean,
    square,
    shares,
    scale,
    skip,
    begin,
    length,
    partial,
    least,  # ε²
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < tl.multiple_of(tl.load(length + chunk), ALIGNED)
    offset = tl.multiple_of(tl.load(begin + chunk), ALIGNED) + at
    g = tl.div_rn(tl.load(gradient + offset, mask=inside, other=0.0), tl.load(scale))
    g = tl.where(tl.load(skip) != 0, 0.0, g)
    m = tl.load(mean + offset, mask=inside, other=0.0)
    m += tl.load(shares) * (g - m)
    tl.store(mean + offset, m, mask=inside)
    v = tl.load(square + offset, mask=inside, other=0.0)
    v += tl.load(shares + 1) * (g * g - v)
    tl.store(square + offset, v, mask=inside)
    ratio = tl.where(inside, tl.div_rn(g * g, tl.maximum(v, least)), 0.0)
    tl.store(partial + chunk, tl.sum(ratio, 0))


@triton.jit
def _sum_kernel(partial, first, sums, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    piece = tl.program_id(0)
    start = tl.load(first + piece)
    stop = tl.load(first + piece + 1)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for at in range(start, stop, BLOCK):
        offset = at + tl.arange(0, BLOCK)
        total += tl.load(partial + offset, mask=offset < stop, other=0.0)
    tl.store(sums + piece, tl.sum(total, 0))


@triton.jit
def _update_kernel(  # type: ignore[no-untyped-def]
    weights,
    mean,
    square,
    rates,
    begin,
    length,
    piece,
    decay,
    eps,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < tl.multiple_of(tl.load(length + chunk), ALIGNED)
    offset = tl.multiple_of(tl.load(begin + chunk), ALIGNED) + at
    rate = tl.load(rates + tl.load(piece + chunk))
    p = tl.load(weights + offset, mask=inside, other=0.0)
    m = tl.load(mean + offset, mask=inside, other=0.0)
    v = tl.load(square + offset, mask=inside, other=0.0)
    p -= rate * (tl.div_rn(m, tl.sqrt_rn(v) + eps) + decay * p)
    tl.store(weights + offset, p, mask=inside)
