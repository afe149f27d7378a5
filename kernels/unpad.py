"""Padded batches to packed tokens and back, without padding in between.

A padded batch is (B, S, …) with a mask (B, S); packed, its real tokens lie behind one another as
(T, …), row after row, and row b is tokens cu_seqlens[b] to cu_seqlens[b + 1]. With

    slot[b, s]    = the place of token (b, s) among the packed ones, −1 for padding
    index[t]      = b · S + s of packed token t, −1 for filler

both directions are the same gather of rows, out[i] = source[which[i]] (a constant where which[i]
is −1), and each is the other's backward: no addition, no atomics.

A caller who knows how many tokens are enough gives the packed `capacity` and nothing waits for the
GPU; without it the number of tokens has to be read back once. What capacity leaves over is filler:
documents of their own behind the real ones, none longer than S, so that attention never meets a
token outside a document.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

_COLUMNS_A_BLOCK = 1024
_ELEMENTS_A_PROGRAM = 2048


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a padded batch of B rows and S columns lie when packed into T places.

    index_T: int32, b · S + s of each packed token, −1 for filler. slot_BS: int32, the inverse.
    cu_seqlens: int32, first the B rows (some may be empty), then the filler's documents; the last
    entry is T. max_seqlen: no document is longer.
    """

    index_T: Tensor
    slot_BS: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


def unpad(
    mask_BS: Tensor, tensors: Sequence[Tensor], capacity: int | None = None
) -> tuple[Packing, list[Tensor]]:
    """Pack the real tokens of several padded tensors; differentiable in each of them.

    mask: (B, S), nonzero at real tokens (in any place). tensors: (B, S, …), any dtype.
    capacity: number of packed places T; must hold all real tokens (checked on the device, without
    waiting for it). None means exactly as many as there are, which waits for the device.
    Returns the packing and, for each tensor, (T, …) with zeros as filler.
    """
    lengths_B = _row_lengths(mask_BS.contiguous())
    capacity, max_seqlen, cu_seqlens = _layout(mask_BS.shape[1], lengths_B, capacity)
    index_T, slot_BS = _maps(mask_BS.contiguous(), cu_seqlens, capacity)
    packing = Packing(index_T, slot_BS, cu_seqlens, max_seqlen)
    return packing, [
        _gather_rows(tensor.flatten(0, 1).contiguous(), index_T, slot_BS.flatten(), 0.0)
        for tensor in tensors
    ]


def pad(packing: Packing, tensors: Sequence[Tensor], fill: float = 0.0) -> list[Tensor]:
    """The way back: each packed (T, …) tensor as (B, S, …), `fill` where there is no token.

    Differentiable in each tensor; filler gets a gradient of zero.
    """
    slot = packing.slot_BS.flatten()
    return [
        _gather_rows(tensor.contiguous(), slot, packing.index_T, fill).unflatten(
            0, packing.slot_BS.shape
        )
        for tensor in tensors
    ]


def unpad_reference(
    mask_BS: Tensor, tensors: Sequence[Tensor], capacity: int | None = None
) -> tuple[Packing, list[Tensor]]:
    """What `unpad` computes, in plain PyTorch."""
    real_BS = mask_BS != 0
    capacity, max_seqlen, cu_seqlens = _layout(mask_BS.shape[1], real_BS.sum(1), capacity)
    found = real_BS.flatten().nonzero().flatten().int()
    index_T = torch.full((capacity,), -1, dtype=torch.int32, device=mask_BS.device)
    index_T[: found.numel()] = found
    place_BS = real_BS.flatten().cumsum(0).view_as(real_BS) - 1
    slot_BS = torch.where(real_BS, place_BS, -1).int()
    packing = Packing(index_T, slot_BS, cu_seqlens, max_seqlen)
    return packing, [_gather_reference(t.flatten(0, 1), index_T, 0.0) for t in tensors]


def pad_reference(packing: Packing, tensors: Sequence[Tensor], fill: float = 0.0) -> list[Tensor]:
    """What `pad` computes, in plain PyTorch."""
    slot = packing.slot_BS.flatten()
    shape = packing.slot_BS.shape
    return [_gather_reference(t, slot, fill).unflatten(0, shape) for t in tensors]


def _gather_reference(source: Tensor, which: Tensor, fill: float) -> Tensor:
    live = (which >= 0).view(-1, *[1] * (source.dim() - 1))
    if source.shape[0] == 0:
        return source.new_full((which.numel(), *source.shape[1:]), fill)
    return torch.where(live, source[which.clamp(min=0).long()], source.new_tensor(fill))


def _layout(columns: int, lengths_B: Tensor, capacity: int | None) -> tuple[int, int, Tensor]:
    """Capacity, bound on a document's length, and cu_seqlens with the filler's documents."""
    ends_B = lengths_B.cumsum(0, dtype=torch.int32)
    start = ends_B.new_zeros(1)
    if capacity is None:
        if lengths_B.numel() == 0:
            return 0, 0, start
        total, longest = torch.stack([ends_B[-1], lengths_B.max().int()]).tolist()
        return total, longest, torch.cat([start, ends_B])
    ends = torch.cat([start, ends_B])
    torch._assert_async(
        ends[-1] <= capacity, f"unpad: more real tokens than the capacity of {capacity} places"
    )
    fillers = triton.cdiv(capacity, max(columns, 1))
    steps = torch.arange(1, fillers + 1, dtype=torch.int32, device=ends.device) * columns
    return capacity, columns, torch.cat([ends, (ends[-1] + steps).clamp(max=capacity)])


@triton.jit
def _row_lengths_kernel(mask, lengths, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    count = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        here = tl.load(mask + row * columns + column, mask=column < columns, other=0)
        count += (here != 0).to(tl.int32)
    tl.store(lengths + row, tl.sum(count, 0))


@triton.jit
def _maps_kernel(mask, starts, index, slot, columns, capacity, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    before = tl.load(starts + row)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        here = tl.load(mask + row * columns + column, mask=inside, other=0)
        real = (here != 0).to(tl.int32)
        place = before + tl.cumsum(real, 0) - 1
        # The second condition only matters in the moment before the failed check of the capacity
        # stops the program.
        fits = (real != 0) & (place < capacity)
        tl.store(index + place, (row * columns + column).to(tl.int32), mask=fits)
        tl.store(slot + row * columns + column, tl.where(fits, place, -1), mask=inside)
        before += tl.sum(real, 0)


@triton.jit
def _gather_rows_kernel(  # type: ignore[no-untyped-def]
    source,
    which,
    out,
    rows,
    width,
    fill,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    at = tl.load(which + row, mask=row < rows, other=-1).to(tl.int64)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    found = (at >= 0)[:, None] & inside
    value = tl.load(source + at[:, None] * width + column[None, :], mask=found, other=0)
    value = tl.where(found, value, tl.full((BLOCK_R, BLOCK_W), fill, out.dtype.element_ty))
    tl.store(out + row[:, None] * width + column[None, :], value, mask=inside)


@triton_op("clinical_modernbert::row_lengths", mutates_args={})
def _row_lengths(mask: Tensor) -> Tensor:
    rows, columns = mask.shape
    lengths = torch.empty(rows, dtype=torch.int32, device=mask.device)
    if rows > 0:
        wrap_triton(_row_lengths_kernel)[(rows,)](mask, lengths, columns, BLOCK=_COLUMNS_A_BLOCK)
    return lengths


@_row_lengths.register_fake
def _row_lengths_fake(mask: Tensor) -> Tensor:
    return mask.new_empty(mask.shape[0], dtype=torch.int32)


@triton_op("clinical_modernbert::unpad_maps", mutates_args={})
def _maps(mask: Tensor, cu_seqlens: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    rows, columns = mask.shape
    index = torch.full((capacity,), -1, dtype=torch.int32, device=mask.device)
    slot = torch.empty((rows, columns), dtype=torch.int32, device=mask.device)
    if slot.numel() > 0:
        wrap_triton(_maps_kernel)[(rows,)](
            mask, cu_seqlens, index, slot, columns, capacity, BLOCK=_COLUMNS_A_BLOCK
        )
    return index, slot


@_maps.register_fake
def _maps_fake(mask: Tensor, cu_seqlens: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    return cu_seqlens.new_empty(capacity), cu_seqlens.new_empty(mask.shape)


@triton_op("clinical_modernbert::gather_rows", mutates_args={})
def _gather_rows(source: Tensor, which: Tensor, inverse: Tensor, fill: float) -> Tensor:
    rows = which.shape[0]
    out = source.new_empty((rows, *source.shape[1:]))
    if out.numel() == 0:
        return out
    width = out.numel() // rows
    block_w = min(triton.next_power_of_2(width), _COLUMNS_A_BLOCK)
    block_r = _ELEMENTS_A_PROGRAM // block_w
    grid = (triton.cdiv(rows, block_r), triton.cdiv(width, block_w))
    wrap_triton(_gather_rows_kernel)[grid](
        source, which, out, rows, width, float(fill), BLOCK_R=block_r, BLOCK_W=block_w
    )
    return out


@_gather_rows.register_fake
def _gather_rows_fake(source: Tensor, which: Tensor, inverse: Tensor, fill: float) -> Tensor:
    return source.new_empty((which.shape[0], *source.shape[1:]))


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, which, inverse, _ = inputs
    ctx.save_for_backward(which, inverse)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    which, inverse = ctx.saved_tensors
    return _gather_rows(grad.contiguous(), inverse, which, 0.0), None, None, None


_gather_rows.register_autograd(_backward, setup_context=_save_for_backward)
