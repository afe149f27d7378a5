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

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_scalar
from torch.library import triton_op, wrap_triton
from torch.nn import functional as F

# Columns of the mask that a program scans at once, and its warps.
_SCAN = (8192, 8)
# Rows of a program that gathers, the most columns of a tile, and its warps. Measured on one H200
# (docs/kernels.md).
_GATHER = (4, 1024, 4)
# Tensors that one launch gathers from; the kernel has room for as many.
_TENSORS_A_LAUNCH = 4


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
    Returns the packing and, for each tensor, (T, …) with zeros as filler. Raises ValueError for
    other shapes, tensors on other devices than the mask, a negative capacity, and where places in
    the batch, or filler behind it, would not be int32 numbers; TypeError for complex numbers.
    """
    _check_padded(mask_BS, tensors, capacity)
    mask_BS = mask_BS.contiguous()
    if mask_BS.numel() + (capacity or 0) + mask_BS.shape[1] >= 2**31:
        raise ValueError(
            f"unpad numbers places with int32: a batch of {tuple(mask_BS.shape)} and a capacity "
            f"of {capacity} are too large; take fewer rows at once"
        )
    lengths_B = _row_lengths(mask_BS)
    capacity, max_seqlen, fillers = _bounds(mask_BS.shape[1], lengths_B, capacity)
    index_T, slot_BS, cu_seqlens, fits = _maps(mask_BS, lengths_B, capacity, fillers)
    _assert_fits(fits, capacity)
    packing = Packing(index_T, slot_BS, cu_seqlens, max_seqlen)
    rows = [tensor.flatten(0, 1) for tensor in tensors]
    return packing, _gather(rows, index_T, slot_BS.flatten(), 0.0)


def pad(packing: Packing, tensors: Sequence[Tensor], fill: float = 0.0) -> list[Tensor]:
    """The way back: each packed (T, …) tensor as (B, S, …), `fill` where there is no token.

    Differentiable in each tensor; filler gets a gradient of zero. fill: a number that each dtype
    can hold, for fp64 and whole numbers one of fp32's, in which the kernel is told of it. Raises
    ValueError for another fill, and for tensors of another length than the packing or on another
    device; TypeError for complex numbers.
    """
    _check_packed(packing, tensors, fill)
    slot = packing.slot_BS.flatten()
    return [
        padded.unflatten(0, packing.slot_BS.shape)
        for padded in _gather(tensors, slot, packing.index_T, fill)
    ]


def unpad_reference(
    mask_BS: Tensor, tensors: Sequence[Tensor], capacity: int | None = None
) -> tuple[Packing, list[Tensor]]:
    """What `unpad` computes, in plain PyTorch."""
    _check_padded(mask_BS, tensors, capacity)
    real_BS = mask_BS != 0
    lengths_B = real_BS.sum(1)
    capacity, max_seqlen, fillers = _bounds(mask_BS.shape[1], lengths_B, capacity)
    ends = F.pad(lengths_B.cumsum(0), (1, 0)).int()
    _assert_fits(ends[-1] <= capacity, capacity)
    steps = torch.arange(1, fillers + 1, dtype=torch.int32, device=ends.device)
    filler_ends = (ends[-1] + steps * mask_BS.shape[1]).clamp(max=capacity)
    cu_seqlens = torch.cat([ends, filler_ends])
    place_BS = real_BS.flatten().cumsum(0).view_as(real_BS) - 1
    slot_BS = torch.where(real_BS, place_BS, -1).int()
    # Where nothing is real goes behind the end, which is cut off.
    to = torch.where(real_BS, place_BS, capacity).flatten()
    source = torch.arange(to.numel(), dtype=torch.int32, device=to.device)
    index_T = source.new_full((capacity + 1,), -1).scatter(0, to, source)[:capacity]
    packing = Packing(index_T, slot_BS, cu_seqlens, max_seqlen)
    return packing, [_gather_reference(t.flatten(0, 1), index_T, 0.0) for t in tensors]


def pad_reference(packing: Packing, tensors: Sequence[Tensor], fill: float = 0.0) -> list[Tensor]:
    """What `pad` computes, in plain PyTorch."""
    _check_packed(packing, tensors, fill)
    slot = packing.slot_BS.flatten()
    shape = packing.slot_BS.shape
    return [_gather_reference(t, slot, fill).unflatten(0, shape) for t in tensors]


def _check_padded(mask: Tensor, tensors: Sequence[Tensor], capacity: int | None) -> None:
    """Raise ValueError or TypeError for what the places of the mask do not lie in."""
    if mask.dim() != 2:
        raise ValueError(f"unpad needs a mask (B, S), not {tuple(mask.shape)}")
    if capacity is not None and capacity < 0:
        raise ValueError(f"unpad: the capacity is {capacity}, it is negative")
    for number, tensor in enumerate(tensors):
        if tensor.dim() < 2 or tensor.shape[:2] != mask.shape:
            raise ValueError(
                f"unpad: tensor {number} must be ({mask.shape[0]}, {mask.shape[1]}, …) like the "
                f"mask, not {tuple(tensor.shape)}"
            )
    _check_all("unpad", [mask, *tensors], "the mask", mask.device)


def _check_packed(packing: Packing, tensors: Sequence[Tensor], fill: float) -> None:
    """The same for tensors that the packing says how to pad."""
    places = packing.index_T.shape[0]
    for number, tensor in enumerate(tensors):
        if tensor.dim() < 1 or tensor.shape[0] != places:
            raise ValueError(
                f"pad: tensor {number} must be ({places}, …), as many places as the packing has, "
                f"not {tuple(tensor.shape)}"
            )
    _check_all("pad", tensors, "the packing", packing.index_T.device)
    for tensor in tensors:
        if not _stays_the_same(fill, tensor.dtype):
            raise ValueError(
                f"pad: a fill of {fill} would be another number in a tensor of {tensor.dtype}, "
                "which is given it in fp32"
            )


def _stays_the_same(fill: float, dtype: torch.dtype) -> bool:
    """Whether `fill`, rounded to fp32, becomes of a dtype what it becomes without that."""
    if dtype.is_floating_point and dtype.itemsize < 8:
        return not torch.finfo(dtype).max < abs(fill) < math.inf
    # Arithmetic on it: to a compiler it is a constant.
    fill = guard_scalar(fill)
    if not math.isfinite(fill):
        return dtype.is_floating_point
    if dtype.is_floating_point:
        return _in_fp32(fill)
    if dtype == torch.bool:
        return fill in (0, 1)
    limits = torch.iinfo(dtype)
    return limits.min <= fill <= limits.max and fill == int(fill) and _in_fp32(fill)


def _in_fp32(number: float) -> bool:
    """Whether a number, or a Python integer, is one of fp32's, subnormal ones left out."""
    fraction, exponent = math.frexp(number)
    whole = fraction * 2.0**24
    return float(number) == number and whole == int(whole) and -126 < exponent <= 128


def _check_all(who: str, tensors: Sequence[Tensor], what: str, device: torch.device) -> None:
    for tensor in tensors:
        if tensor.device != device:
            raise ValueError(
                f"{who}: a tensor is on {tensor.device}, {what} on {device}; move one of them"
            )
        if tensor.is_complex():
            raise TypeError(f"{who} takes whole and floating numbers and bools, not {tensor.dtype}")


def _gather_reference(source: Tensor, which: Tensor, fill: float) -> Tensor:
    live = (which >= 0).view(-1, *[1] * (source.dim() - 1))
    if source.shape[0] == 0:
        return source.new_full((which.numel(), *source.shape[1:]), fill)
    return torch.where(live, source[which.clamp(min=0).long()], source.new_full((), fill))


def _bounds(columns: int, lengths_B: Tensor, capacity: int | None) -> tuple[int, int, int]:
    """Capacity, bound on a document's length, and the number of documents that may be filler."""
    if capacity is not None:
        return capacity, columns, triton.cdiv(capacity, max(columns, 1))
    lengths = lengths_B.tolist()
    return sum(lengths), max(lengths, default=0), 0


def _assert_fits(fits: Tensor, capacity: int) -> None:
    torch._assert_async(fits, f"unpad: more real tokens than the capacity of {capacity} places")


def _gather(tensors: Sequence[Tensor], which: Tensor, inverse: Tensor, fill: float) -> list[Tensor]:
    """Rows `which` of any number of tensors, as many launches as that takes."""
    gathered: list[Tensor] = []
    for first in range(0, len(tensors), _TENSORS_A_LAUNCH):
        group = [tensor.contiguous() for tensor in tensors[first : first + _TENSORS_A_LAUNCH]]
        gathered += _gather_rows(group, which, inverse, fill)
    return gathered


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
def _maps_kernel(  # type: ignore[no-untyped-def]
    mask,
    lengths,
    index,
    slot,
    cu_seqlens,
    fits,
    rows,
    columns,
    capacity,
    fillers,
    BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Row b's places; beside them its entry in cu_seqlens, and its share of the filler's."""
    row = tl.program_id(0)
    before = 0
    total = 0
    for start in range(0, rows, BLOCK_B):
        other = start + tl.arange(0, BLOCK_B)
        length = tl.load(lengths + other, mask=other < rows, other=0)
        before += tl.sum(tl.where(other < row, length, 0), 0)
        total += tl.sum(length, 0)
    tl.store(cu_seqlens + row, before)
    if row == 0:
        tl.store(cu_seqlens + rows, total)
        tl.store(fits, total <= capacity)
    for filler in range(row, fillers, rows):
        end = tl.minimum(total + (filler + 1) * columns, capacity)
        tl.store(cu_seqlens + rows + 1 + filler, end)
    # In 64 bits: with columns a little above half a block, rows · BLOCK exceeds what is there.
    for start in range(total + row.to(tl.int64) * BLOCK, capacity, tl.cast(rows, tl.int64) * BLOCK):
        place = start + tl.arange(0, BLOCK)
        tl.store(index + place, tl.full((BLOCK,), -1, tl.int32), mask=place < capacity)
    base = row.to(tl.int64) * columns
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        here = tl.load(mask + base + column, mask=inside, other=0)
        real = (here != 0).to(tl.int32)
        place = before + tl.cumsum(real, 0) - 1
        # The second condition only matters in the moment before the failed check of the capacity
        # stops the program.
        placed = (real != 0) & (place < capacity)
        tl.store(index + place, (base + column).to(tl.int32), mask=placed)
        tl.store(slot + base + column, tl.where(placed, place, -1), mask=inside)
        before += tl.sum(real, 0)


@triton.jit
def _copy_rows(  # type: ignore[no-untyped-def]
    source, out, row, live, at, fill, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr
):
    """Rows `at` of one source, or fill where at is −1, to rows `row` of out."""
    for start in range(0, WIDTH, BLOCK_W):
        column = start + tl.arange(0, BLOCK_W)
        inside = live[:, None] & (column < WIDTH)[None, :]
        found = (at >= 0)[:, None] & inside
        value = tl.load(source + at[:, None] * WIDTH + column[None, :], mask=found, other=0)
        value = tl.where(found, value, tl.full(value.shape, fill, out.dtype.element_ty))
        tl.store(out + row[:, None] * WIDTH + column[None, :], value, mask=inside)


@triton.jit
def _gather_rows_kernel(  # type: ignore[no-untyped-def]
    which, rows, fill,
    source_0, out_0, source_1, out_1, source_2, out_2, source_3, out_3,
    WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr, WIDTH_2: tl.constexpr, WIDTH_3: tl.constexpr,
    BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr, BLOCK_3: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < rows
    at = tl.load(which + row, mask=live, other=-1).to(tl.int64)
    _copy_rows(source_0, out_0, row, live, at, fill, WIDTH_0, BLOCK_0)
    if WIDTH_1 > 0:
        _copy_rows(source_1, out_1, row, live, at, fill, WIDTH_1, BLOCK_1)
    if WIDTH_2 > 0:
        _copy_rows(source_2, out_2, row, live, at, fill, WIDTH_2, BLOCK_2)
    if WIDTH_3 > 0:
        _copy_rows(source_3, out_3, row, live, at, fill, WIDTH_3, BLOCK_3)


@triton_op("clinical_modernbert::row_lengths", mutates_args={})
def _row_lengths(mask: Tensor) -> Tensor:
    rows, columns = mask.shape
    lengths = torch.empty(rows, dtype=torch.int32, device=mask.device)
    if rows > 0:
        with torch.cuda.device_of(mask):
            wrap_triton(_row_lengths_kernel)[(rows,)](mask, lengths, columns, **_scan(columns))
    return lengths


def _scan(columns: int) -> dict[str, int]:
    block, warps = _SCAN
    return {"BLOCK": min(block, triton.next_power_of_2(max(columns, 1))), "num_warps": warps}


@_row_lengths.register_fake
def _row_lengths_fake(mask: Tensor) -> Tensor:
    return mask.new_empty(mask.shape[0], dtype=torch.int32)


@triton_op("clinical_modernbert::unpad_maps", mutates_args={})
def _maps(
    mask: Tensor, lengths: Tensor, capacity: int, fillers: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """index_T, slot_BS, cu_seqlens, and whether the real tokens fit."""
    rows, columns = mask.shape
    slot = torch.empty((rows, columns), dtype=torch.int32, device=mask.device)
    if rows == 0:
        index = torch.full((capacity,), -1, dtype=torch.int32, device=mask.device)
        ends = torch.arange(fillers + 1, dtype=torch.int32, device=mask.device) * columns
        return index, slot, ends.clamp(max=capacity), ends.new_ones((), dtype=torch.bool)
    index = torch.empty(capacity, dtype=torch.int32, device=mask.device)
    cu_seqlens = torch.empty(rows + 1 + fillers, dtype=torch.int32, device=mask.device)
    fits = torch.empty((), dtype=torch.bool, device=mask.device)
    with torch.cuda.device_of(mask):
        wrap_triton(_maps_kernel)[(rows,)](
            mask,
            lengths,
            index,
            slot,
            cu_seqlens,
            fits,
            rows,
            columns,
            capacity,
            fillers,
            BLOCK_B=1024,
            **_scan(columns),
        )
    return index, slot, cu_seqlens, fits


@_maps.register_fake
def _maps_fake(
    mask: Tensor, lengths: Tensor, capacity: int, fillers: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        lengths.new_empty(capacity),
        lengths.new_empty(mask.shape),
        lengths.new_empty(mask.shape[0] + 1 + fillers),
        lengths.new_empty((), dtype=torch.bool),
    )


@triton_op("clinical_modernbert::gather_rows", mutates_args={})
def _gather_rows(
    sources: list[Tensor], which: Tensor, inverse: Tensor, fill: float
) -> list[Tensor]:
    """Rows `which` of up to four contiguous sources, in one launch."""
    rows = which.shape[0]
    outs = [source.new_empty((rows, *source.shape[1:])) for source in sources]
    pairs = [pair for pair in zip(sources, outs, strict=True) if pair[1].numel() > 0]
    if not pairs:
        return outs
    block_r, most, warps = _GATHER
    arguments: dict[str, Tensor | int | None] = {}
    for i in range(_TENSORS_A_LAUNCH):
        source, out = pairs[i] if i < len(pairs) else (None, None)
        width = 0 if out is None else math.prod(out.shape[1:])
        arguments |= {f"source_{i}": source, f"out_{i}": out, f"WIDTH_{i}": width}
        arguments[f"BLOCK_{i}"] = min(triton.next_power_of_2(max(width, 1)), most)
    with torch.cuda.device_of(which):
        wrap_triton(_gather_rows_kernel)[(triton.cdiv(rows, block_r),)](
            which, rows, float(fill), **arguments, BLOCK_R=block_r, num_warps=warps
        )
    return outs


@_gather_rows.register_fake
def _gather_rows_fake(
    sources: list[Tensor], which: Tensor, inverse: Tensor, fill: float
) -> list[Tensor]:
    return [source.new_empty((which.shape[0], *source.shape[1:])) for source in sources]


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    sources, which, inverse, _ = inputs
    ctx.save_for_backward(which, inverse)
    ctx.floating = [source.is_floating_point() for source in sources]


def _backward(ctx, grads: list[Tensor | None]):  # type: ignore[no-untyped-def]
    which, inverse = ctx.saved_tensors
    wanted = {
        place: grad.contiguous()
        for place, grad in enumerate(grads)
        if grad is not None and ctx.floating[place]
    }
    gathered = _gather_rows(list(wanted.values()), inverse, which, 0.0)
    found = dict(zip(wanted, gathered, strict=True))
    return [found.get(place) for place in range(len(grads))], None, None, None


_gather_rows.register_autograd(_backward, setup_context=_save_for_backward)
