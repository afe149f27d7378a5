"""Local attention on Hopper: walks along the tokens, with their pipelines written out in Gluon.

The formulas and the roundings are those of `kernels.local_attention`, which calls these kernels
where `pipelined` says so: bf16, heads of 64, windows up to 64. Tokens go by blocks of 64, so that
queries of block i see keys of the blocks i − 1, i and i + 1 and of no other. A program has one head
and a stretch of blocks, begin ≤ i < end, of which it writes the results, and it walks over them.
Rows outside the documents are 0 wherever a block has some, those before the first token too.

Backward. Two kernels, one by queries and one by keys, make every tile of scores and of g · v twice.
The walk makes it once, keys by queries, (j, i), and all three gradients from it. In step j:

    (j, j − 1)   completes ∂q of block j − 1, which had (j − 2, j − 1) and (j − 1, j − 1) before
    (j, j)       meanwhile ∂q of block j − 1 is turned back and leaves
    (j, j + 1)   its two products begin while those of (j, j) to the gradients still run
                 then ∂k and ∂v of block j, complete, leave

At its ends a stretch lacks keys that others walk over: before the first step it makes
(begin − 1, begin), after the last (end, end − 1), each for ∂q alone. Step `begin` makes a part of
∂q of block begin − 1 as well, and step end − 1 one of block `end`, which are not written. So n
blocks take 3 n + 2 tiles.

Every sum has one order, ∂q over keys by ascending blocks, ∂k and ∂v over queries likewise, whatever
the stretch; tiles in which nobody sees anybody add zeros. So neither the length of a stretch nor
the number of multiprocessors that it follows changes a bit.

In shared memory lie rings of blocks: queries and gradients, with their L and δ, of three (block i
in slot (i − begin + 1) mod 3), keys and values of two. As soon as (j, j − 1) is done, block j + 2
is fetched into the place of the queries j − 1, and block j + 1 into that of the keys j − 1: they
have the rest of the step to arrive. o, of which only δ = g · o is wanted, has room for one block.
A left factor is transposed in shared memory alone: d goes to its product for ∂q by way of the tile
`staging`, and so do results to memory, where threads write 16 bytes each.

Forward. Rings of three blocks of keys and values and of two of queries. A row's three tiles of
scores are in registers together, so that its maximum is known before its first weight and nothing
is scaled again. Keys of the next block are fetched when scores are done, values when results are.

What is not finite: a program computes with whole blocks, whoever's tokens they hold, and so an ∞ or
NaN may make results NaN up to 127 tokens away, gradients twice as far. That is within the bound of
`kernels.local_attention`. Rows behind all documents are not read.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy
from triton.language import PropagateNan

from kernels.local_attention_tiles import LOG2_E

BLOCK = 64
"""tokens of a block; the widest window, and the only width of a head"""
_SCALE = BLOCK**-0.5
# Programs that a multiprocessor holds at once, by shared memory, of which they take 98 and 64 KiB,
# and by registers, of which a thread of the forward gets no more than lets three programs in.
_BACKWARD_PROGRAMS = 2
_FORWARD_PROGRAMS, _FORWARD_REGISTERS = 3, 168

# Gluon renamed two of its functions, the barrier after triton 3.6 and the copy after 3.7.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
if hasattr(async_copy, "async_load"):
    _copy = async_copy.async_load
else:
    _copy = async_copy.async_copy_global_to_shared

# As in `kernels.local_attention_tiles`: the bits of 1.5 · 2¹²³, and less than any score.
_ORIGIN = gl.constexpr(0x7D400000)
_LOWEST = gl.constexpr(-(2.0**80))
_ALL = gl.constexpr(PropagateNan.ALL)

# How tiles lie: those of a product of 4 warps, half as wide ones, a product's left factor, rows
# that are copied 16 bytes a thread, and, in shared memory, blocks for products and rows of fp32.
_product = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
_half = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 32, 16])
_copied = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
_PRODUCT = gl.constexpr(_product)
_ROW = gl.constexpr(gl.SliceLayout(1, _product))
_COLUMN = gl.constexpr(gl.SliceLayout(0, _product))
_HALF = gl.constexpr(_half)
_ROW_OF_HALF = gl.constexpr(gl.SliceLayout(1, _half))
_COLUMN_OF_HALF = gl.constexpr(gl.SliceLayout(0, _half))
_LEFT = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=_product, k_width=2))
_COPIED = gl.constexpr(_copied)
_ROW_OF_COPIED = gl.constexpr(gl.SliceLayout(1, _copied))
_COLUMN_OF_COPIED = gl.constexpr(gl.SliceLayout(0, _copied))
_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
_FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[0]))


def stretch(tokens: int, heads: int, programs: int) -> int:
    """Blocks of a program, where the GPU holds so many programs at once: as few as let all of them
    run at the same time, for a second wave would be as long as the first, however small.

    65,536 tokens of 12 heads on 132 multiprocessors: 47 backward, 32 forward, and so as many
    programs as fit, or 97 % of them. Of few tokens each has one block. On an H200 half as long
    stretches took the backward 3 % longer, those of 8 blocks 11 % (docs/decisions.md).
    """
    return triton.cdiv(triton.cdiv(tokens, BLOCK), max(1, programs // heads))


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def forward(turned: Tensor, bounds: Tensor, out: Tensor, logsumexp: Tensor, window: int) -> None:
    """Write out, (T, H, 64), and log2 of the sums, (H, T), of turned (T, 3, H, 64), T > 0."""
    tokens, _, heads, _ = turned.shape
    span = stretch(tokens, heads, _FORWARD_PROGRAMS * multiprocessors(turned.device))
    _local_attention_walk_forward_kernel[(heads * triton.cdiv(tokens, BLOCK * span),)](
        turned,
        bounds,
        out,
        logsumexp,
        tokens,
        span,
        LOG2_E * _SCALE,
        WINDOW=window,
        HEADS=heads,
        num_warps=4,
        maxnreg=_FORWARD_REGISTERS,
    )


def backward(
    grad: Tensor,
    turned: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    bounds: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    grad_qkv: Tensor,
    window: int,
) -> None:
    """Write grad_qkv, (T, 3, H, 64), for T > 0; queries' and keys' part of it turned back."""
    tokens, _, heads, _ = turned.shape
    span = stretch(tokens, heads, _BACKWARD_PROGRAMS * multiprocessors(turned.device))
    _local_attention_walk_backward_kernel[(heads * triton.cdiv(tokens, BLOCK * span),)](
        turned,
        bounds,
        out,
        logsumexp,
        grad,
        cos,
        sin,
        position_ids,
        grad_qkv,
        tokens,
        span,
        _SCALE,
        LOG2_E * _SCALE,
        WINDOW=window,
        HEADS=heads,
        num_warps=4,
    )


@gluon.jit
def _at(base, first, ROW: gl.constexpr):  # type: ignore[no-untyped-def]
    """Where row `first` begins, which may be before the first one or beyond 2³¹ numbers."""
    return base + first.to(gl.int64) * ROW


@gluon.jit
def _fetch(slot, base, first, live, ROW: gl.constexpr):  # type: ignore[no-untyped-def]
    """Begin to copy the rows from `first` on; 0 outside the documents, which end at `live`."""
    row = gl.arange(0, 64, _ROW_OF_COPIED)
    column = gl.arange(0, 64, _COLUMN_OF_COPIED)
    inside = (first + row >= 0) & (first + row < live)
    rows = _at(base, first, ROW) + ((row * ROW)[:, None] + column[None, :])
    _copy(slot, rows, mask=inside[:, None])


@gluon.jit
def _arrive(WAITING: gl.constexpr):  # type: ignore[no-untyped-def]
    """Wait for all copies but so many groups, everybody's, and show them to the products."""
    async_copy.wait_group(WAITING)
    hopper.fence_async_shared()
    _barrier()


@gluon.jit
def _sums(logsumexp, first, tokens):  # type: ignore[no-untyped-def]
    """L of a block of queries; outside the row that of some other, whom nobody sees there."""
    row = first + gl.arange(0, 64, _ROW_OF_COPIED)
    return gl.load(logsumexp + gl.minimum(gl.maximum(row, 0), tokens - 1))


@gluon.jit
def _delta(g, o):  # type: ignore[no-untyped-def]
    return gl.sum(g.load(_COPIED).to(gl.float32) * o.load(_COPIED).to(gl.float32), 1)


@gluon.jit
def _ends(bounds, first, tokens):  # type: ignore[no-untyped-def]
    """First token and end of the document of each of a block's rows."""
    row = first + gl.arange(0, 64, _ROW)
    inside = (row >= 0) & (row < tokens)
    low = gl.load(bounds + row, mask=inside, other=1)
    high = gl.load(bounds + tokens + row, mask=inside, other=0)
    return low, high


@gluon.jit
def _reach(low, high, first, origin, WINDOW: gl.constexpr):  # type: ignore[no-untyped-def]
    """Middle and reach of what a block's rows see, counted from `origin`.

    `kernels.local_attention_tiles._masked` has how and why.
    """
    row = first + gl.arange(0, 64, _ROW)
    low = gl.maximum(low, row - WINDOW)
    behind = gl.maximum(gl.minimum(high - 1, row + WINDOW) - low, -1)
    middle = (2 * (low - origin) + behind + _ORIGIN).to(gl.float32, bitcast=True)
    reach = (behind + 1 + _ORIGIN).to(gl.float32, bitcast=True) - 1.5 * 2.0**123
    return middle, reach


@gluon.jit
def _masked(scores, middle, reach, start):  # type: ignore[no-untyped-def]
    """Scores with the tokens from `start` on, counted from `origin`; −2¹⁰⁰ where not seen."""
    token = (2 * (start + gl.arange(0, 64, _COLUMN)) + _ORIGIN).to(gl.float32, bitcast=True)
    bound = reach[:, None] - gl.abs(token[None, :] - middle[:, None])
    return gl.minimum(scores, bound, propagate_nan=_ALL)


@gluon.jit
def _store(staging, tile, base, first, tokens, begin, ROW: gl.constexpr):  # type: ignore[no-untyped-def]
    """A tile to the rows from `first` on, of those from `begin` up to the last token."""
    staging.store(tile)
    _barrier()
    rows = staging.load(_COPIED)
    row = gl.arange(0, 64, _ROW_OF_COPIED)
    column = gl.arange(0, 64, _COLUMN_OF_COPIED)
    to = _at(base, first, ROW) + ((row * ROW)[:, None] + column[None, :])
    gl.store(to, rows, mask=((first + row >= begin) & (first + row < tokens))[:, None])
    _barrier()  # the staging tile may be written again


@gluon.jit
def _positions(position_ids, first, tokens):  # type: ignore[no-untyped-def]
    row = first + gl.arange(0, 64, _ROW_OF_HALF)
    return gl.load(position_ids + gl.minimum(gl.maximum(row, 0), tokens - 1)).to(gl.int32)


@gluon.jit
def _turned_back(tile, position, cos, sin):  # type: ignore[no-untyped-def]
    """A tile's rows turned by minus the angles of their positions, below 2²⁶, in bf16."""
    a, b = gl.split(gl.permute(gl.reshape(tile, (64, 2, 32)), (0, 2, 1)))
    a = gl.convert_layout(a, _HALF)
    b = gl.convert_layout(b, _HALF)
    entry = (position * 32)[:, None] + gl.arange(0, 32, _COLUMN_OF_HALF)[None, :]
    c = gl.load(cos + entry)
    s = gl.load(sin + entry)
    turned = gl.join(a * c + b * s, b * c - a * s)
    turned = gl.reshape(gl.permute(turned, (0, 2, 1)), (64, 64))
    return gl.convert_layout(turned.to(gl.bfloat16), _PRODUCT)


@gluon.jit
def _moved(tile):  # type: ignore[no-untyped-def]
    """A copy that is made where it is written, at the end of a step.

    Left to itself, LLVM gives the next step's sum the registers of this one's by moving them where
    the values meet, between the start of a product and the wait for it. ptxas then sees somebody
    read a sum in flight, and makes every product of the loop wait for the one before.
    """
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=f,f", [tile], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _scores(k, v, q, g):  # type: ignore[no-untyped-def]
    """Begin the two products of a tile, k · q and v · g, keys by queries."""
    zero = gl.zeros((64, 64), gl.float32, _PRODUCT)
    s = hopper.warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    along_p = hopper.warpgroup_mma(v, g.permute((1, 0)), zero, use_acc=False, is_async=True)
    return s, along_p


@gluon.jit
def _weights(s, along_p, log_sums, deltas, middle, reach, scale_log2, start):  # type: ignore[no-untyped-def]
    """p, as a left factor, and d of a tile, from the products of `_scores`, which it waits for."""
    log_sum = log_sums.load(_COLUMN)
    s = hopper.warpgroup_mma_wait(1, [s])
    s = _masked(s, middle, reach, start)
    p = gl.exp2(s * scale_log2 - log_sum[None, :])
    p_left = gl.convert_layout(p.to(gl.bfloat16), _LEFT)
    delta = deltas.load(_COLUMN)
    along_p = hopper.warpgroup_mma_wait(0, [along_p])
    d = (p * (along_p - delta[None, :])).to(gl.bfloat16)
    return p_left, d


@gluon.jit
def _gradients(  # type: ignore[no-untyped-def]
    p, d, k, q, g, staging, grad_q, grad_v, grad_k,
    ADD_TO_Q: gl.constexpr, ADD_TO_KV: gl.constexpr,
):  # fmt: skip
    """Begin a tile's three products: to what there is of ∂q, ∂v and ∂k, or in its place.

    d as a left factor is handed back: products read it and p in their registers until they are
    done, so that the wait for them has to name both.
    """
    staging.store(d)
    d_left = gl.convert_layout(d, _LEFT)
    hopper.fence_async_shared()
    _barrier()  # everybody's part of d is there
    transposed = staging.permute((1, 0))
    grad_q = hopper.warpgroup_mma(transposed, k, grad_q, use_acc=ADD_TO_Q, is_async=True)
    grad_v = hopper.warpgroup_mma(p, g, grad_v, use_acc=ADD_TO_KV, is_async=True)
    grad_k = hopper.warpgroup_mma(d_left, q, grad_k, use_acc=ADD_TO_KV, is_async=True)
    return grad_q, grad_v, grad_k, d_left


@gluon.jit
def _gradient_of_queries(p, d, k, staging, grad_q, ADD: gl.constexpr):  # type: ignore[no-untyped-def]
    """The same for ∂q alone, and wait for it."""
    staging.store(d)
    hopper.fence_async_shared()
    _barrier()
    transposed = staging.permute((1, 0))
    grad_q = hopper.warpgroup_mma(transposed, k, grad_q, use_acc=ADD, is_async=True)
    return hopper.warpgroup_mma_wait(0, [grad_q])


@gluon.jit(do_not_specialize=["tokens", "span"])
def _local_attention_walk_backward_kernel(  # type: ignore[no-untyped-def]
    turned, bounds, out, logsumexp, grad, cos, sin, position_ids, grad_qkv,
    tokens, span, scale, scale_log2,
    WINDOW: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    WIDTH: gl.constexpr = HEADS * 64
    PACKED: gl.constexpr = 3 * WIDTH
    head = gl.program_id(0) % HEADS
    begin = gl.program_id(0) // HEADS * span
    end = gl.minimum(begin + span, (tokens + 63) // 64)
    live = gl.load(bounds + tokens + (tokens - 1))  # behind all documents both are their end
    q_in = turned + head * 64
    k_in = q_in + WIDTH
    v_in = k_in + WIDTH
    out += head * 64
    grad += head * 64
    grad_qkv += head * 64
    logsumexp += head.to(gl.int64) * tokens

    qs = gl.allocate_shared_memory(gl.bfloat16, [3, 64, 64], _SHARED)
    gs = gl.allocate_shared_memory(gl.bfloat16, [3, 64, 64], _SHARED)
    ks = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], _SHARED)
    vs = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], _SHARED)
    outs = gl.allocate_shared_memory(gl.bfloat16, [64, 64], _SHARED)
    staging = gl.allocate_shared_memory(gl.bfloat16, [64, 64], _SHARED)
    log_sums = gl.allocate_shared_memory(gl.float32, [3, 64], _FLAT)
    deltas = gl.allocate_shared_memory(gl.float32, [3, 64], _FLAT)
    zero = gl.zeros((64, 64), gl.float32, _PRODUCT)

    # Before the first step: queries of the blocks begin − 1 and begin, keys of begin − 1.
    first = begin * 64
    origin = first
    before = first - 64
    _fetch(qs.index(0), q_in, before, live, PACKED)
    _fetch(gs.index(0), grad, before, live, WIDTH)
    _fetch(staging, out, before, live, WIDTH)
    _fetch(ks.index(0), k_in, before, live, PACKED)
    _fetch(vs.index(0), v_in, before, live, PACKED)
    _fetch(qs.index(1), q_in, first, live, PACKED)
    _fetch(gs.index(1), grad, first, live, WIDTH)
    _fetch(outs, out, first, live, WIDTH)
    async_copy.commit_group()
    log_sums.index(0).store(_sums(logsumexp, before, tokens))
    log_sums.index(1).store(_sums(logsumexp, first, tokens))
    low, high = _ends(bounds, before, tokens)
    middle, reach = _reach(low, high, before, origin, WINDOW)
    _arrive(0)
    deltas.index(0).store(_delta(gs.index(0), staging))
    deltas.index(1).store(_delta(gs.index(1), outs))
    _barrier()  # δ is there, and `staging` and `outs` may be written again
    _fetch(ks.index(1), k_in, first, live, PACKED)
    _fetch(vs.index(1), v_in, first, live, PACKED)
    _fetch(qs.index(2), q_in, first + 64, live, PACKED)
    _fetch(gs.index(2), grad, first + 64, live, WIDTH)
    _fetch(outs, out, first + 64, live, WIDTH)
    async_copy.commit_group()
    next_sum = _sums(logsumexp, first + 64, tokens)
    low, high = _ends(bounds, first, tokens)
    s, along_p = _scores(ks.index(0), vs.index(0), qs.index(1), gs.index(1))
    p, d = _weights(s, along_p, log_sums.index(1), deltas.index(1), middle, reach, scale_log2, 0)
    grad_here = _gradient_of_queries(p, d, ks.index(0), staging, zero, False)
    grad_before = zero

    slot_before = begin * 0
    slot_k = begin * 0 + 1
    for block in range(begin, end):
        first = block * 64
        slot_here = gl.where(slot_before == 2, 0, slot_before + 1)
        slot_after = gl.where(slot_here == 2, 0, slot_here + 1)
        _arrive(0)
        k = ks.index(slot_k)
        v = vs.index(slot_k)
        middle, reach = _reach(low, high, first, origin, WINDOW)

        # Queries of the block before; meanwhile δ of the block after, whose rows have come.
        q = qs.index(slot_before)
        g = gs.index(slot_before)
        s, along_p = _scores(k, v, q, g)
        log_sums.index(slot_after).store(next_sum)
        deltas.index(slot_after).store(_delta(gs.index(slot_after), outs))
        p, d = _weights(
            s, along_p, log_sums.index(slot_before), deltas.index(slot_before),
            middle, reach, scale_log2, first - 64 - origin,
        )  # fmt: skip
        grad_before, grad_v, grad_k, d_left = _gradients(
            p, d, k, q, g, staging, grad_before, zero, zero, True, False
        )
        grad_before, grad_v, grad_k, p, d_left = hopper.warpgroup_mma_wait(
            0, [grad_before, grad_v, grad_k, p, d_left]
        )
        _barrier()  # everybody is done with these queries, and with `outs` and `staging`

        position = _positions(position_ids, first - 64, tokens)
        _fetch(ks.index(1 - slot_k), k_in, first + 64, live, PACKED)
        _fetch(vs.index(1 - slot_k), v_in, first + 64, live, PACKED)
        _fetch(q, q_in, first + 128, live, PACKED)
        _fetch(g, grad, first + 128, live, WIDTH)
        _fetch(outs, out, first + 128, live, WIDTH)
        async_copy.commit_group()

        # Queries of this block; meanwhile ∂q of the block before leaves.
        q = qs.index(slot_here)
        g = gs.index(slot_here)
        s, along_p = _scores(k, v, q, g)
        tile = _turned_back(grad_before * scale, position, cos, sin)
        _store(staging, tile, grad_qkv, first - 64, tokens, begin * 64, PACKED)
        p, d = _weights(
            s, along_p, log_sums.index(slot_here), deltas.index(slot_here),
            middle, reach, scale_log2, first - origin,
        )  # fmt: skip
        grad_here, grad_v, grad_k, d_left = _gradients(
            p, d, k, q, g, staging, grad_here, grad_v, grad_k, True, True
        )
        # The next two products begin while these three run.
        q = qs.index(slot_after)
        g = gs.index(slot_after)
        s, along_p = _scores(k, v, q, g)
        grad_here, grad_v, grad_k, p, d_left = hopper.warpgroup_mma_wait(
            2, [grad_here, grad_v, grad_k, p, d_left]
        )
        _barrier()  # everybody is done with `staging`

        # Queries of the block after; meanwhile what the next step asks of memory in registers.
        p, d = _weights(
            s, along_p, log_sums.index(slot_after), deltas.index(slot_after),
            middle, reach, scale_log2, first + 64 - origin,
        )  # fmt: skip
        grad_after, grad_v, grad_k, d_left = _gradients(
            p, d, k, q, g, staging, zero, grad_v, grad_k, False, True
        )
        position = _positions(position_ids, first, tokens)
        low, high = _ends(bounds, first + 64, tokens)
        next_sum = _sums(logsumexp, first + 128, tokens)
        grad_v, grad_k, grad_after, p, d_left = hopper.warpgroup_mma_wait(
            0, [grad_v, grad_k, grad_after, p, d_left]
        )
        _barrier()  # everybody is done with `staging` and with this block's keys and values
        tile = grad_v.to(gl.bfloat16)
        _store(staging, tile, grad_qkv + 2 * WIDTH, first, tokens, begin * 64, PACKED)
        tile = _turned_back(grad_k * scale, position, cos, sin)
        _store(staging, tile, grad_qkv + WIDTH, first, tokens, begin * 64, PACKED)
        grad_before = _moved(grad_here)
        grad_here = _moved(grad_after)
        slot_before = slot_here
        slot_k = 1 - slot_k

    # Queries of the last block with the keys of the one behind it, which the last step fetched.
    first = end * 64
    _arrive(0)
    middle, reach = _reach(low, high, first, origin, WINDOW)
    position = _positions(position_ids, first - 64, tokens)
    k = ks.index(slot_k)
    s, along_p = _scores(k, vs.index(slot_k), qs.index(slot_before), gs.index(slot_before))
    p, d = _weights(
        s, along_p, log_sums.index(slot_before), deltas.index(slot_before),
        middle, reach, scale_log2, first - 64 - origin,
    )  # fmt: skip
    grad_before = _gradient_of_queries(p, d, k, staging, grad_before, True)
    _barrier()  # everybody is done with `staging`
    tile = _turned_back(grad_before * scale, position, cos, sin)
    _store(staging, tile, grad_qkv, first - 64, tokens, begin * 64, PACKED)


@gluon.jit(do_not_specialize=["tokens", "span"])
def _local_attention_walk_forward_kernel(  # type: ignore[no-untyped-def]
    turned, bounds, out, logsumexp, tokens, span, scale_log2,
    WINDOW: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    WIDTH: gl.constexpr = HEADS * 64
    PACKED: gl.constexpr = 3 * WIDTH
    head = gl.program_id(0) % HEADS
    begin = gl.program_id(0) // HEADS * span
    end = gl.minimum(begin + span, (tokens + 63) // 64)
    live = gl.load(bounds + tokens + (tokens - 1))
    q_in = turned + head * 64
    k_in = q_in + WIDTH
    v_in = k_in + WIDTH
    out += head * 64
    logsumexp += head.to(gl.int64) * tokens
    qs = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], _SHARED)
    ks = gl.allocate_shared_memory(gl.bfloat16, [3, 64, 64], _SHARED)
    vs = gl.allocate_shared_memory(gl.bfloat16, [3, 64, 64], _SHARED)
    zero = gl.zeros((64, 64), gl.float32, _PRODUCT)

    # Two groups at a time: queries and keys, for which scores wait, then values.
    first = begin * 64
    origin = first
    _fetch(ks.index(0), k_in, first - 64, live, PACKED)
    _fetch(vs.index(0), v_in, first - 64, live, PACKED)
    _fetch(qs.index(0), q_in, first, live, PACKED)
    _fetch(ks.index(1), k_in, first, live, PACKED)
    _fetch(vs.index(1), v_in, first, live, PACKED)
    _fetch(ks.index(2), k_in, first + 64, live, PACKED)
    async_copy.commit_group()
    _fetch(vs.index(2), v_in, first + 64, live, PACKED)
    async_copy.commit_group()
    low, high = _ends(bounds, first, tokens)
    slot_before = begin * 0
    slot_q = begin * 0
    for block in range(begin, end):
        first = block * 64
        slot_here = gl.where(slot_before == 2, 0, slot_before + 1)
        slot_after = gl.where(slot_here == 2, 0, slot_here + 1)
        middle, reach = _reach(low, high, first, origin, WINDOW)
        q = qs.index(slot_q)
        _arrive(1)
        s0 = _score(q, ks.index(slot_before))
        s1 = _score(q, ks.index(slot_here))
        s2 = _score(q, ks.index(slot_after))
        low, high = _ends(bounds, first + 64, tokens)
        s0 = hopper.warpgroup_mma_wait(2, [s0])
        s0 = _masked(s0, middle, reach, first - 64 - origin)
        s1 = hopper.warpgroup_mma_wait(1, [s1])
        s1 = _masked(s1, middle, reach, first - origin)
        s2 = hopper.warpgroup_mma_wait(0, [s2])
        _barrier()  # everybody is done with the keys before, and with the queries before these
        _fetch(qs.index(1 - slot_q), q_in, first + 64, live, PACKED)
        _fetch(ks.index(slot_before), k_in, first + 128, live, PACKED)
        async_copy.commit_group()
        s2 = _masked(s2, middle, reach, first + 64 - origin)
        most = gl.maximum(gl.maximum(s0, s1, propagate_nan=_ALL), s2, propagate_nan=_ALL)
        top = gl.maximum(gl.max(most, 1) * scale_log2, _LOWEST)
        p0 = gl.exp2(s0 * scale_log2 - top[:, None])
        p1 = gl.exp2(s1 * scale_log2 - top[:, None])
        p2 = gl.exp2(s2 * scale_log2 - top[:, None])
        total = gl.sum(p0 + p1 + p2, 1)
        _arrive(1)
        p0 = gl.convert_layout(p0.to(gl.bfloat16), _LEFT)
        p1 = gl.convert_layout(p1.to(gl.bfloat16), _LEFT)
        p2 = gl.convert_layout(p2.to(gl.bfloat16), _LEFT)
        result = hopper.warpgroup_mma(p0, vs.index(slot_before), zero, use_acc=False, is_async=True)
        result = hopper.warpgroup_mma(p1, vs.index(slot_here), result, is_async=True)
        result = hopper.warpgroup_mma(p2, vs.index(slot_after), result, is_async=True)
        # A token outside every document has seen nothing: total is 0, and so is result.
        safe = gl.where(total > 0, total, 1.0)
        row = first + gl.arange(0, 64, _ROW)
        gl.store(logsumexp + row, top + gl.log2(safe), mask=row < tokens)
        over = 1.0 / safe
        result, p0, p1, p2 = hopper.warpgroup_mma_wait(0, [result, p0, p1, p2])
        _barrier()  # everybody is done with the values before
        _fetch(vs.index(slot_before), v_in, first + 128, live, PACKED)
        async_copy.commit_group()
        # The place of the queries, which nobody reads any more, takes the result to memory.
        _store(q, (result * over[:, None]).to(gl.bfloat16), out, first, tokens, origin, WIDTH)
        slot_before = slot_here
        slot_q = 1 - slot_q
    async_copy.wait_group(0)


@gluon.jit
def _score(q, k):  # type: ignore[no-untyped-def]
    """Begin q · k, queries by keys."""
    zero = gl.zeros((64, 64), gl.float32, _PRODUCT)
    return hopper.warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
