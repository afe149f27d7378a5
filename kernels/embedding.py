"""Rows of an embedding, and the sums of their gradients by sorted tokens.

    out[t] = W[i[t]],        ∂W[v] = Σ over t with i[t] = v of ∂out[t],  0 for the padding row

The lookup is PyTorch's. Its backward sorts the tokens by their rows and keeps the order of tokens
within a row, so that a row's tokens are a run of sorted places. Runs are of very different lengths:
most rows have no token, some one or two, and one may have a tenth of all. So programs go over equal
blocks of sorted places, not over rows:

    first launch    each block adds up its pieces of runs. A run that lies in one block is a row of
                    ∂W; pieces of one that goes on into the next block are kept in fp32
    second launch   for each block in which such a run begins: the sum of its pieces, in order.
                    For each row: zeros if a binary search finds no token of it

Every row of ∂W is written once. Tokens of the padding row are sorted but their gradients are not
read. Sums are fp32 in an order that the tokens alone decide, without atomics, and rounded once.

Memory limits this: every gradient is read once and every row written once. What a radix sort takes
goes by the bits of what is sorted, so rows are numbered by 16 of them where these are enough; rows
from 2¹⁵ on are then negative and come first, which is as good an order as any.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton
from torch.nn import functional as F

# Sorted places of a block, how many of them are loaded at once, and the most columns of a program,
# which is one warp.
_PLACES, _AT_ONCE, _COLUMNS = 128, 8, 256
# Few, so that the interpreter, too, meets runs over many blocks.
_PLACES_INTERPRETED = 16
# Pieces that are added up at once, and at most so many columns of them; rows that a program looks
# for; warps of both.
_PIECES, _PIECE_COLUMNS, _ROWS, _WARPS = 32, 128, 32, 4


def embedding_reference(ids: Tensor, weight_VD: Tensor, padding_idx: int | None = None) -> Tensor:
    """What `embedding` computes, in plain PyTorch, for any floating dtype."""
    return F.embedding(ids, weight_VD, padding_idx)


def embedding(ids: Tensor, weight_VD: Tensor, padding_idx: int | None = None) -> Tensor:
    """Rows `ids` of the weight, (…) to (…, D), differentiable in the weight.

    ids: int64 or int32, 0 … V − 1. weight: (V, D) in bf16, fp16 or fp32; its gradient is summed in
    fp32 and rounded once. padding_idx: the row, 0 … V − 1, that gets a gradient of zero.
    Raises TypeError or ValueError otherwise.
    """
    if weight_VD.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"embedding takes a weight in bf16, fp16 or fp32, not {weight_VD.dtype}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"embedding takes ids in int64 or int32, not {ids.dtype}")
    if weight_VD.dim() != 2 or weight_VD.shape[1] == 0:
        raise ValueError(
            f"embedding takes a weight (V, D), D at least 1, not {tuple(weight_VD.shape)}"
        )
    if padding_idx is not None and not 0 <= padding_idx < weight_VD.shape[0]:
        raise ValueError(f"the padding row {padding_idx} is none of {weight_VD.shape[0]} rows")
    return _embedding(ids, weight_VD, padding_idx)


@triton.jit
def _row_of(key):  # type: ignore[no-untyped-def]
    """The row that a sorted number stands for."""
    row = key.to(tl.int32)
    if key.dtype == tl.int16:
        row = row & 0xFFFF
    return row


@triton.jit
def _sum_runs_kernel(  # type: ignore[no-untyped-def]
    grad,
    keys,
    order,
    out,
    pieces,  # (blocks, 2, WIDTH) fp32: of the run that began before the block, of the one that
    # goes on behind it; of a run that does both the first
    tokens,
    padding,
    WIDTH: tl.constexpr,
    PLACES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    block = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    start = block * PLACES
    stop = tl.minimum(start + PLACES, tokens)
    before = tl.load(keys + start - 1, mask=start > 0, other=0)
    began = (start == 0) | (before != tl.load(keys + start))
    total = tl.zeros((BLOCK_W,), dtype=tl.float32)
    for first in range(0, PLACES, AT_ONCE):
        # All loads before the stores, behind which none could be moved.
        rows = ()
        values = ()
        for i in tl.static_range(AT_ONCE):
            place = start + first + i
            row = _row_of(tl.load(keys + place, mask=place < stop, other=0))
            read = (place < stop) & (row != padding)
            token = tl.load(order + place, mask=read, other=0).to(tl.int64)
            # A condition on the row is one on the columns: the interpreter spreads no bool.
            value = tl.load(
                grad + token * WIDTH + column,
                mask=column < tl.where(read, WIDTH, 0),
                other=0.0,
                eviction_policy="evict_first",
            )
            rows = rows + (row,)  # type: ignore[assignment]  # noqa: RUF005
            values = values + (value,)  # type: ignore[assignment]  # noqa: RUF005
        for i in tl.static_range(AT_ONCE):
            place = start + first + i
            row = rows[i]
            behind = _row_of(tl.load(keys + place + 1, mask=place + 1 < tokens, other=0))
            ends = (place < stop) & ((behind != row) | (place + 1 == tokens))
            total += values[i].to(tl.float32)
            whole = ends & began
            result = total.to(out.dtype.element_ty)
            at = out + row.to(tl.int64) * WIDTH + column
            tl.store(at, result, mask=column < tl.where(whole, WIDTH, 0))
            cut = (ends | (place + 1 == stop)) & (whole == 0)
            at_piece = pieces + (block.to(tl.int64) * 2 + began.to(tl.int64)) * WIDTH + column
            tl.store(at_piece, total, mask=column < tl.where(cut, WIDTH, 0))
            total = tl.where(ends, 0.0, total)
            began = began | ends


@triton.jit
def _join(  # type: ignore[no-untyped-def]
    keys,
    out,
    pieces,
    block,
    start_column,
    blocks,
    tokens,
    WIDTH: tl.constexpr,
    PLACES: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The row whose run begins in this block and ends in a later one, if there is such a run."""
    start = block * PLACES
    behind = start + PLACES
    goes_on = behind < tokens
    key = tl.load(keys + behind, mask=goes_on, other=0)
    last = tl.load(keys + behind - 1, mask=goes_on, other=0)
    before = tl.load(keys + start - 1, mask=goes_on & (start > 0), other=0)
    if goes_on & (last == key) & ((start == 0) | (before != key)):
        column = start_column + tl.arange(0, BLOCK_C)
        filled = column < WIDTH
        total = tl.zeros((PIECES, BLOCK_C), dtype=tl.float32)
        first = block + 1
        more = goes_on
        while more:
            other = first + tl.arange(0, PIECES)
            inside = other < blocks
            same = (tl.load(keys + other * PLACES, mask=inside, other=0) == key) & inside
            offset = (other.to(tl.int64) * 2 * WIDTH)[:, None] + column[None, :]
            total += tl.load(pieces + offset, mask=same[:, None] & filled[None, :], other=0.0)
            more = tl.min(same.to(tl.int32), 0) == 1
            first += PIECES
        at_first = pieces + (block.to(tl.int64) * 2 + 1) * WIDTH + column
        result = tl.load(at_first, mask=filled, other=0.0) + tl.sum(total, 0)
        at = out + _row_of(key).to(tl.int64) * WIDTH + column
        tl.store(at, result.to(out.dtype.element_ty), mask=filled)


@triton.jit
def _clear(  # type: ignore[no-untyped-def]
    keys,
    out,
    first_row,
    tokens,
    vocabulary,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Zeros in those of some rows that have no token."""
    row = first_row + tl.arange(0, ROWS)
    key = row.to(keys.dtype.element_ty)
    # Binary search for the first place whose key is not smaller. Once found it stays, so that the
    # number of steps need not follow the number of tokens.
    low = tl.zeros((ROWS,), tl.int32)
    high = low + tokens
    for _ in range(0, 32):
        middle = low + (high - low) // 2
        open = low < high
        smaller = open & (tl.load(keys + middle, mask=open, other=0) < key)
        low = tl.where(smaller, middle + 1, low)
        high = tl.where(smaller, high, middle)
    found = (low < tokens) & (tl.load(keys + low, mask=low < tokens, other=0) == key)
    absent = (row < vocabulary) & (found == 0)
    zeros = tl.zeros((ROWS, BLOCK_W), out.dtype.element_ty)
    for start in range(0, WIDTH, BLOCK_W):
        column = start + tl.arange(0, BLOCK_W)
        offset = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        tl.store(out + offset, zeros, mask=absent[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _join_and_clear_kernel(  # type: ignore[no-untyped-def]
    keys,
    out,
    pieces,
    blocks,
    tokens,
    vocabulary,
    WIDTH: tl.constexpr,
    PLACES: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    # Joins come first: a long run's takes a while, in which others clear.
    program = tl.program_id(0)
    tiles: tl.constexpr = (WIDTH + BLOCK_C - 1) // BLOCK_C
    joins = blocks * tiles
    if program < joins:
        block = program // tiles
        column = program % tiles * BLOCK_C
        _join(keys, out, pieces, block, column, blocks, tokens, WIDTH, PLACES, PIECES, BLOCK_C)
    else:
        _clear(keys, out, (program - joins) * ROWS, tokens, vocabulary, WIDTH, ROWS, BLOCK_W)


@triton_op("clinical_modernbert::embedding", mutates_args={})
def _embedding(ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:
    return F.embedding(ids, weight)


@triton_op("clinical_modernbert::embedding_backward", mutates_args={})
def _embedding_backward(grad: Tensor, ids: Tensor, vocabulary: int, padding: int | None) -> Tensor:
    """Gradient (V, D) of the weight, from (T, D) and (T,)."""
    tokens, width = grad.shape
    if tokens == 0:
        return grad.new_zeros((vocabulary, width))
    # 16 bits wrap around: that is their unsigned number, minus 2¹⁶ from 2¹⁵ on.
    kind = torch.int16 if vocabulary <= 2**16 else torch.int32
    keys, order = torch.sort(ids.to(kind), stable=True)
    out = grad.new_empty((vocabulary, width))
    places = _PLACES_INTERPRETED if grad.device.type == "cpu" else _PLACES
    blocks = triton.cdiv(tokens, places)
    pieces = grad.new_empty((blocks, 2, width), dtype=torch.float32)
    columns = triton.next_power_of_2(width)
    block_w, block_c = min(columns, _COLUMNS), min(columns, _PIECE_COLUMNS)
    programs = blocks * triton.cdiv(width, block_c) + triton.cdiv(vocabulary, _ROWS)
    with torch.cuda.device_of(out):
        wrap_triton(_sum_runs_kernel)[(blocks, triton.cdiv(width, block_w))](
            grad,
            keys,
            order,
            out,
            pieces,
            tokens,
            -1 if padding is None else padding,
            WIDTH=width,
            PLACES=places,
            AT_ONCE=_AT_ONCE,
            BLOCK_W=block_w,
            num_warps=1,
        )
        wrap_triton(_join_and_clear_kernel)[(programs,)](
            keys,
            out,
            pieces,
            blocks,
            tokens,
            vocabulary,
            WIDTH=width,
            PLACES=places,
            PIECES=_PIECES,
            ROWS=_ROWS,
            BLOCK_C=block_c,
            BLOCK_W=block_w,
            num_warps=_WARPS,
        )
    return out


@_embedding.register_fake
def _embedding_fake(ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]))


@_embedding_backward.register_fake
def _embedding_backward_fake(
    grad: Tensor, ids: Tensor, vocabulary: int, padding: int | None
) -> Tensor:
    return grad.new_empty((vocabulary, grad.shape[1]))


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ids, weight, ctx.padding = inputs
    ctx.save_for_backward(ids)
    ctx.vocabulary = weight.shape[0]


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    (ids,) = ctx.saved_tensors
    rows_TD = grad.reshape(-1, grad.shape[-1]).contiguous()
    return None, _embedding_backward(rows_TD, ids.reshape(-1), ctx.vocabulary, ctx.padding), None


_embedding.register_autograd(_backward, setup_context=_save_for_backward)
