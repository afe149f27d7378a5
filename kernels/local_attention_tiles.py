"""`kernels.local_attention` by tiles, on any GPU: its Triton kernels, and how they are cut up.

A program has one head and one tile of tokens and walks over the tiles that its window and the
documents let it see. The forward is one launch, the backward two: ∂q over keys, and ∂k and ∂v over
queries. The mathematics stands in `kernels.local_attention`.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
# For the mask: the bits of 1.5 · 2¹²³, whose last place is 2¹⁰⁰, and less than any score is.
_ORIGIN = tl.constexpr(0x7D400000)
_LOWEST = tl.constexpr(-(2.0**80))


@dataclass(frozen=True)
class Tiles:
    """How a kernel is cut up: tokens of a program, tokens of a step of its walk, warps, the steps
    that are loaded ahead, and the most registers of a thread (None: as many as it takes)."""

    block: int
    step: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True)
class Tuning:
    """The tiles of the forward, of ∂q (a program has queries) and of ∂k and ∂v (it has keys)."""

    forward: Tiles
    queries: Tiles
    keys: Tiles


# Heads of 64 and less in half precision, by `python -m kernels.benchmark --tune` on an H200
# (docs/kernels.md). The bounds on registers let four programs share a multiprocessor, or three.
# For the keys, this took 15 to 24 µs less than the next best on each of the three layouts; forwards
# differ by less than 5 %.
NARROW = Tuning(
    forward=Tiles(64, 32, 4, 3, 96),
    queries=Tiles(64, 64, 4, 2, 128),
    keys=Tiles(64, 32, 4, 3, 128),
)


def tuning(element_size: int, head_dim: int) -> Tuning:
    """The tiles for a dtype and a width; only the narrow ones are chosen for speed."""
    if element_size == 2 and head_dim <= 64:
        return NARROW
    if element_size == 2:
        tiles = Tiles(64, 32, 4 if head_dim <= 128 else 8, 1)
    else:  # products of full fp32 have no tensor cores, and take many registers
        tiles = Tiles(32, 32, 4, 1) if head_dim <= 64 else Tiles(16, 16, 4, 1)
    return Tuning(tiles, tiles, tiles)


@triton.jit
def _load(  # type: ignore[no-untyped-def]
    base, first, end, ROW: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr
):
    """Rows `first` and following of one head, (ROWS, 2 · PAIRS); 0 from row `end` on.

    Each half of a head is padded by itself, so that a tile splits into its two halves.
    """
    row = tl.arange(0, ROWS)
    column = tl.arange(0, 2 * PAIRS)
    pair = column % PAIRS
    at = base + tl.full((), ROW, tl.int64) * first
    at = at + row[:, None] * ROW + (column // PAIRS * HALF + pair)[None, :]
    inside = (first + row < end)[:, None]
    if PAIRS > HALF:
        inside = inside & (pair < HALF)[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    base, tile, first, end,
    ROW: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The other way round: a tile to rows `first` and following, up to row `end`."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, 2 * PAIRS)
    pair = column % PAIRS
    at = base + tl.full((), ROW, tl.int64) * first
    at = at + row[:, None] * ROW + (column // PAIRS * HALF + pair)[None, :]
    inside = (first + row < end)[:, None]
    if PAIRS > HALF:
        inside = inside & (pair < HALF)[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _store_turned_back(  # type: ignore[no-untyped-def]
    base, tile, cos, sin, position_ids, first, end,
    ROW: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """As `_store`, each row turned by minus the angles of its position."""
    row = first + tl.arange(0, ROWS)
    pair = tl.arange(0, PAIRS)
    inside = (row < end)[:, None] & (pair < HALF)[None, :]
    position = tl.load(position_ids + row, mask=row < end, other=0).to(tl.int64)
    entry = position[:, None] * HALF + pair[None, :]
    c = tl.load(cos + entry, mask=inside, other=1.0)
    s = tl.load(sin + entry, mask=inside, other=0.0)
    a, b = tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, PAIRS)), (0, 2, 1)))
    turned = tl.join(a * c + b * s, b * c - a * s)
    turned = tl.reshape(tl.permute(turned, (0, 2, 1)), (ROWS, 2 * PAIRS))
    _store(base, turned, first, end, ROW, HALF, ROWS, PAIRS)


@triton.jit
def _seen(bounds, first, tokens, WINDOW: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first token that each of a tile's tokens sees, counted from `first`; how many lie behind
    that one up to the last, −1 for a token that sees none; and the ends of what the tile sees.

    As seeing is mutual, these are also the tokens that each is seen by.
    """
    row = first + tl.arange(0, ROWS)
    live = row < tokens
    low = tl.load(bounds + row, mask=live, other=1)
    high = tl.load(bounds + tokens + row, mask=live, other=0) - 1
    last = tl.minimum(first + ROWS, tokens) - 1
    begin = tl.maximum(tl.load(bounds + first), first - WINDOW)
    end = tl.minimum(tl.load(bounds + tokens + last), last + WINDOW + 1)
    low = tl.maximum(low, row - WINDOW)
    behind = tl.minimum(high, row + WINDOW) - low
    return low - first, tl.maximum(behind, -1), begin, end


@triton.jit
def _masked(scores, start, low, behind, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores with the tokens `start` and following, counted as `low` is; −2¹⁰⁰ where not seen.

    The middle of what a row sees is (2 low + behind) / 2 and its reach is behind / 2, so what has
    reach − |token − middle| ≥ 0 is seen. In halves of a token, plus one, times 2¹⁰⁰, this bound is
    positive and above every score or negative and below every score: the lesser of the two is the
    masked score. (A score beyond 2¹⁰⁰, an infinite one too, counts as about that; NaN stays NaN.)
    It takes two sums and a minimum, where two comparisons took as many selects, on half as many
    units as sums have. The integers become floats, exactly, as last places of
    1.5 · 2¹²³. `start` goes with the columns to keep them from holding registers between steps.
    """
    token = (2 * (start + tl.arange(0, STEP)) + _ORIGIN).to(tl.float32, bitcast=True)
    middle = (2 * low + behind + _ORIGIN).to(tl.float32, bitcast=True)
    reach = (behind + 1 + _ORIGIN).to(tl.float32, bitcast=True) - 1.5 * 2.0**123
    bound = reach[:, None] - tl.abs(token[None, :] - middle[:, None])
    return tl.minimum(scores, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _local_attention_forward_kernel(  # type: ignore[no-untyped-def]
    qkv, bounds, out, logsumexp, tokens, scale_log2,
    WINDOW: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = HEADS * 2 * HALF
    head = tl.program_id(0) % HEADS
    first = tl.program_id(0) // HEADS * BLOCK
    column = head * 2 * HALF
    q_in = qkv + column
    k_in = q_in + WIDTH
    v_in = k_in + WIDTH
    low, behind, begin, end = _seen(bounds, first, tokens, WINDOW, BLOCK)
    q = _load(q_in, first, end, 3 * WIDTH, HALF, BLOCK, PAIRS)
    top = tl.full((BLOCK,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    result = tl.zeros((BLOCK, 2 * PAIRS), tl.float32)
    for start in tl.range(begin // STEP * STEP, end, STEP, num_stages=STAGES):
        k = _load(k_in, start, end, 3 * WIDTH, HALF, STEP, PAIRS)
        v = _load(v_in, start, end, 3 * WIDTH, HALF, STEP, PAIRS)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s = _masked(s, start - first, low, behind, STEP)
        higher = tl.maximum(top, tl.max(s, 1) * scale_log2)
        p = tl.exp2(s * scale_log2 - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        result = tl.dot(p.to(v.dtype), v, result * shrink[:, None], input_precision="ieee")
        top = higher
    # A token outside every document has seen nothing: total is 0, and so is result.
    safe = tl.where(total > 0, total, 1.0)
    result = result * (1.0 / safe)[:, None]
    _store(out + column, result, first, tokens, WIDTH, HALF, BLOCK, PAIRS)
    row = first + tl.arange(0, BLOCK)
    to = logsumexp + head.to(tl.int64) * tokens + row
    tl.store(to, top + tl.log2(safe), mask=row < tokens)


@triton.jit
def _local_attention_queries_kernel(  # type: ignore[no-untyped-def]
    qkv, bounds, out, logsumexp, grad, cos, sin, position_ids, grad_qkv, pairs,
    tokens, scale, scale_log2,
    WINDOW: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """∂q of a tile of queries, and each one's L and δ side by side for the keys' kernel."""
    WIDTH: tl.constexpr = HEADS * 2 * HALF
    head = tl.program_id(0) % HEADS
    first = tl.program_id(0) // HEADS * BLOCK
    column = head * 2 * HALF
    q_in = qkv + column
    k_in = q_in + WIDTH
    v_in = k_in + WIDTH
    row = first + tl.arange(0, BLOCK)
    live = row < tokens
    low, behind, begin, end = _seen(bounds, first, tokens, WINDOW, BLOCK)
    q = _load(q_in, first, end, 3 * WIDTH, HALF, BLOCK, PAIRS)
    g = _load(grad + column, first, end, WIDTH, HALF, BLOCK, PAIRS)
    o = _load(out + column, first, end, WIDTH, HALF, BLOCK, PAIRS)
    d = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    at = head.to(tl.int64) * tokens + row
    log_sum = tl.load(logsumexp + at, mask=live, other=0.0)
    to = pairs + 2 * at[:, None] + tl.arange(0, 2)[None, :]
    tl.store(to, tl.join(log_sum, d), mask=live[:, None])
    grad_q = tl.zeros((BLOCK, 2 * PAIRS), tl.float32)
    for start in tl.range(begin // STEP * STEP, end, STEP, num_stages=STAGES):
        k = _load(k_in, start, end, 3 * WIDTH, HALF, STEP, PAIRS)
        v = _load(v_in, start, end, 3 * WIDTH, HALF, STEP, PAIRS)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s = _masked(s, start - first, low, behind, STEP)
        along_p = tl.dot(g, tl.trans(v), input_precision="ieee")
        p = tl.exp2(s * scale_log2 - log_sum[:, None])
        along_s = p * (along_p - d[:, None])
        grad_q = tl.dot(along_s.to(k.dtype), k, grad_q, input_precision="ieee")
    _store_turned_back(
        grad_qkv + column, grad_q * scale, cos, sin, position_ids, first, tokens,
        3 * WIDTH, HALF, BLOCK, PAIRS,
    )  # fmt: skip


@triton.jit
def _local_attention_keys_kernel(  # type: ignore[no-untyped-def]
    qkv, bounds, grad, cos, sin, position_ids, grad_qkv, pairs,
    tokens, scale, scale_log2,
    WINDOW: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """∂k and ∂v of a tile of keys; scores stand transposed, keys by queries."""
    WIDTH: tl.constexpr = HEADS * 2 * HALF
    head = tl.program_id(0) % HEADS
    first = tl.program_id(0) // HEADS * BLOCK
    column = head * 2 * HALF
    q_in = qkv + column
    k_in = q_in + WIDTH
    v_in = k_in + WIDTH
    low, behind, begin, end = _seen(bounds, first, tokens, WINDOW, BLOCK)
    k = _load(k_in, first, end, 3 * WIDTH, HALF, BLOCK, PAIRS)
    v = _load(v_in, first, end, 3 * WIDTH, HALF, BLOCK, PAIRS)
    grad_k = tl.zeros((BLOCK, 2 * PAIRS), tl.float32)
    grad_v = tl.zeros((BLOCK, 2 * PAIRS), tl.float32)
    for start in tl.range(begin // STEP * STEP, end, STEP, num_stages=STAGES):
        q = _load(q_in, start, end, 3 * WIDTH, HALF, STEP, PAIRS)
        g = _load(grad + column, start, end, WIDTH, HALF, STEP, PAIRS)
        query = start + tl.arange(0, STEP)
        at = head.to(tl.int64) * tokens + query
        # One load of both: two short ones would each be spread over all threads.
        both = pairs + 2 * at[:, None] + tl.arange(0, 2)[None, :]
        log_sum, d = tl.split(tl.load(both, mask=(query < end)[:, None], other=0.0))
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        s = _masked(s, start - first, low, behind, STEP)
        along_p = tl.dot(v, tl.trans(g), input_precision="ieee")
        p = tl.exp2(s * scale_log2 - log_sum[None, :])
        along_s = p * (along_p - d[None, :])
        grad_v = tl.dot(p.to(g.dtype), g, grad_v, input_precision="ieee")
        grad_k = tl.dot(along_s.to(q.dtype), q, grad_k, input_precision="ieee")
    _store(grad_qkv + 2 * WIDTH + column, grad_v, first, tokens, 3 * WIDTH, HALF, BLOCK, PAIRS)
    _store_turned_back(
        grad_qkv + WIDTH + column, grad_k * scale, cos, sin, position_ids, first, tokens,
        3 * WIDTH, HALF, BLOCK, PAIRS,
    )  # fmt: skip


def launch_options(tiles: Tiles, heads: int, head_dim: int, window: int) -> dict[str, int | None]:
    """What a kernel is compiled for."""
    half = head_dim // 2
    options = {
        "WINDOW": window,
        "HEADS": heads,
        "HALF": half,
        "PAIRS": max(8, triton.next_power_of_2(half)),  # a product is at least 16 wide
        "BLOCK": tiles.block,
        "STEP": tiles.step,
        "STAGES": tiles.stages,
        "num_warps": tiles.warps,
    }
    return options if tiles.registers is None else options | {"maxnreg": tiles.registers}


def forward(turned: Tensor, bounds: Tensor, out: Tensor, logsumexp: Tensor, window: int) -> None:
    """Write the result of what `rope` gave into (T, H, D) `out`, and log2 of the sums, (H, T) fp32.

    For operations that are opaque to a compiler, with the tensors' GPU as the current one. All are
    contiguous; `turned` and `out` may be the last rows of longer tensors.
    """
    tokens, _, heads, head_dim = turned.shape
    tiles = tuning(turned.element_size(), head_dim).forward
    _local_attention_forward_kernel[(heads * triton.cdiv(tokens, tiles.block),)](
        turned,
        bounds,
        out,
        logsumexp,
        tokens,
        LOG2_E * head_dim**-0.5,
        **launch_options(tiles, heads, head_dim, window),
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
    """Write the gradient by what was given to `rope` into (T, 3, H, D) `grad_qkv`.

    The conditions are those of `forward`.
    """
    tokens, _, heads, head_dim = turned.shape
    cut = tuning(turned.element_size(), head_dim)
    pairs = logsumexp.new_empty((*logsumexp.shape, 2))
    turn, sizes = (cos, sin, position_ids), (tokens, head_dim**-0.5, LOG2_E * head_dim**-0.5)
    _local_attention_queries_kernel[(heads * triton.cdiv(tokens, cut.queries.block),)](
        turned,
        bounds,
        out,
        logsumexp,
        grad,
        *turn,
        grad_qkv,
        pairs,
        *sizes,
        **launch_options(cut.queries, heads, head_dim, window),
    )
    _local_attention_keys_kernel[(heads * triton.cdiv(tokens, cut.keys.block),)](
        turned,
        bounds,
        grad,
        *turn,
        grad_qkv,
        pairs,
        *sizes,
        **launch_options(cut.keys, heads, head_dim, window),
    )
