"""Rotary positions and attention within a window, on packed queries, keys and values.

With q̂ and k̂ the queries and keys of a head of width D turned to their positions (see
`kernels.rope`), token i sees the tokens j of its own document with |i − j| ≤ W:

    s_ij = q̂_i · k̂_j / √D,   p_ij = exp(s_ij − L_i),   L_i = log Σ_j exp(s_ij),   o_i = Σ_j p_ij v_j

and backward, for a gradient g of o (Dao 2023, arXiv 2307.08691):

    δ_i   = g_i · o_i                       d_ij  = p_ij (g_i · v_j − δ_i)
    ∂v_j  = Σ_i p_ij g_i                    ∂q̂_i = Σ_j d_ij k̂_j / √D,   ∂k̂_j = Σ_i d_ij q̂_i / √D

∂q and ∂k are these turned back by their angles. Results are rounded to the input's dtype, and so
are q̂, k̂ and the factors p and d of a product; everything else is fp32. A token behind
cu_seqlens[-1] belongs to no document: its output is 0, and so is every gradient of it.

Forward, `rope` turns queries and keys, at the speed of a copy, and one launch does the rest;
backward turns ∂q and ∂k back before they leave the chip, and reads what `rope` made, which may lie
where its input did. Turning tiles inside the attention instead costs more than the pass that it
saves: every key tile is turned for three query tiles forward and as many backward, its tables are
twice its size, and what is computed cannot be prefetched into shared memory as what is loaded can.

There are two implementations, and `pipelined` says which is taken. The one in this file runs
anywhere: a program has one head and one tile of tokens and walks over the tiles that its window and
the documents let it see. The other, `kernels.local_attention_hopper`, is for Hopper, bf16, heads of
64 and windows up to 64. All that follows holds for both. The grid runs over tokens: neither the
number of documents nor the longest one changes it. ∂q is summed over keys, ∂k and ∂v over queries,
each in a fixed order and without atomics, so two runs give the same bits.

No token reaches one that does not see it, in another document or outside the window, as long as
all numbers are finite: queries, keys, values, g and o, and in fp32 their products. Pairs that do
not see one another are computed with their tile and then count 0 times, and 0 · ∞ is no number: an
∞ or NaN may make results NaN up to tokens of a program + tokens of a step + W away, gradients twice
as far, and changes nothing beyond. o is finite where no score is beyond 2²⁷: a GPU multiplies by
log2 e and subtracts with one rounding, which leaves of a row's largest score what the maximum lost
in its product. Of a product of 2²⁸ that may be 16, and fp16 does not hold 2¹⁶.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.documents import document_bounds_reference
from kernels.rope import check_rope, rope, rope_reference

_LOG2_E = 1.4426950408889634
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
# Whether `local_attention_hopper` is taken where it can be; off to compare the two.
WALKS = True
# Gluon is experimental, and each version changes it: what runs is what was measured, with the
# triton 3.6 that torch 2.11 for CUDA brings. With 3.9 these kernels compile, and have not run.
_WALKING_TRITON = "3.6"
_WIDEST_HEAD = 256
_WIDEST_WINDOW = 2**19  # so that places stay exact in the mask


def tuning(element_size: int, head_dim: int) -> Tuning:
    """The tiles for a dtype and a width; only the narrow ones are chosen for speed."""
    if element_size == 2 and head_dim <= 64:
        return NARROW
    if element_size == 2:
        tiles = Tiles(64, 32, 4 if head_dim <= 128 else 8, 1)
    else:  # products of full fp32 have no tensor cores, and take many registers
        tiles = Tiles(32, 32, 4, 1) if head_dim <= 64 else Tiles(16, 16, 4, 1)
    return Tuning(tiles, tiles, tiles)


def pipelined(dtype: torch.dtype, head_dim: int, window: int, device: torch.device) -> bool:
    """Whether `kernels.local_attention_hopper` computes this, rather than the kernels here."""
    wanted = triton_to_walk(dtype, head_dim, window, device)
    return WALKS and wanted is not None and f"{triton.__version__}.".startswith(f"{wanted}.")


def triton_to_walk(
    dtype: torch.dtype, head_dim: int, window: int, device: torch.device
) -> str | None:
    """The version of triton with which `pipelined` says yes; None where no version would do."""
    walks = (
        dtype == torch.bfloat16
        and head_dim == 64
        and window <= 64
        and device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device)[0] == 9
    )
    return _WALKING_TRITON if walks else None


def local_attention_reference(
    qkv_T3HD: Tensor,
    cos_PR: Tensor,
    sin_PR: Tensor,
    position_ids_T: Tensor,
    cu_seqlens: Tensor,
    window: int,
) -> Tensor:
    """What `local_attention` computes, in plain PyTorch, for any floating dtype; T × T scores."""
    turned_T3HD = rope_reference(qkv_T3HD, cos_PR, sin_PR, position_ids_T)
    q_THD, k_THD, v_THD = turned_T3HD.unbind(1)
    first_T, end_T = document_bounds_reference(cu_seqlens, qkv_T3HD.shape[0])
    token_T = torch.arange(qkv_T3HD.shape[0], device=qkv_T3HD.device)
    seen_TT = (token_T >= first_T[:, None]) & (token_T < end_T[:, None])
    seen_TT &= (token_T[:, None] - token_T).abs() <= window
    scores_HTT = torch.einsum("ihd,jhd->hij", q_THD, k_THD) * qkv_T3HD.shape[-1] ** -0.5
    wide = torch.promote_types(qkv_T3HD.dtype, torch.float32)
    scores_HTT = scores_HTT.to(wide).masked_fill(~seen_TT, torch.finfo(wide).min)
    weights_HTT = (scores_HTT.softmax(-1) * seen_TT).to(qkv_T3HD.dtype)
    return torch.einsum("hij,jhd->ihd", weights_HTT, v_THD)


def local_attention(
    qkv_T3HD: Tensor,
    cos_PR: Tensor,
    sin_PR: Tensor,
    position_ids_T: Tensor,
    bounds_2T: Tensor,
    window: int,
) -> Tensor:
    """Attention of every token over the `window` tokens to either side in its document: (T, H, D).

    qkv: (T, 3, H, D) bf16, fp16 or fp32, any even D up to 256; copied first if not contiguous.
    cos, sin: (P, D / 2) fp32 from `rope_tables`. position_ids: (T,) int32 or int64, each below P
    (not checked: that would wait for the GPU); `kernels.documents.positions_from` makes them.
    bounds: (2, T) int32 from `kernels.documents.document_bounds`, made once for all layers.
    Differentiable in qkv. Raises TypeError or ValueError for other dtypes and shapes.
    """
    check_rope("local_attention", qkv_T3HD, cos_PR, sin_PR, position_ids_T)
    if qkv_T3HD.shape[3] > _WIDEST_HEAD:
        raise ValueError(f"local_attention takes heads up to {_WIDEST_HEAD}, not {qkv_T3HD.shape}")
    if bounds_2T.shape != (2, qkv_T3HD.shape[0]) or bounds_2T.dtype != torch.int32:
        raise ValueError(
            f"bounds must be (2, {qkv_T3HD.shape[0]}) int32 from document_bounds, not "
            f"{tuple(bounds_2T.shape)} {bounds_2T.dtype}"
        )
    if not 0 <= window <= _WIDEST_WINDOW:
        raise ValueError(f"window must be between 0 and {_WIDEST_WINDOW}, not {window}")
    out_THD: Tensor = _LocalAttention.apply(
        qkv_T3HD.contiguous(),
        cos_PR.contiguous(),
        sin_PR.contiguous(),
        position_ids_T.contiguous(),
        bounds_2T.contiguous(),
        window,
    )
    return out_THD


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


# Opaque to the compiler: the launches that it generates know no bound on registers.
@torch.library.custom_op("clinical_modernbert::local_attention", mutates_args=())
def _local_attention(turned: Tensor, bounds: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Of what `rope` gave, the result, and log2 of the sums, (H, T) fp32."""
    tokens, _, heads, head_dim = turned.shape
    out = turned.new_empty((tokens, heads, head_dim))
    logsumexp = turned.new_empty((heads, tokens), dtype=torch.float32)
    if turned.numel() == 0:
        return out, logsumexp
    with torch.cuda.device_of(turned):
        if pipelined(turned.dtype, head_dim, window, turned.device):
            # Imported where it is needed: not every triton has Gluon as these kernels write it.
            from kernels import local_attention_hopper as walks

            walks.forward(turned, bounds, out, logsumexp, window, _LOG2_E * head_dim**-0.5)
        else:
            forward_by_tiles(turned, bounds, out, logsumexp, window)
    return out, logsumexp


def forward_by_tiles(
    turned: Tensor, bounds: Tensor, out: Tensor, logsumexp: Tensor, window: int
) -> None:
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
        _LOG2_E * head_dim**-0.5,
        **launch_options(tiles, heads, head_dim, window),
    )


@_local_attention.register_fake
def _local_attention_fake(turned: Tensor, bounds: Tensor, window: int) -> tuple[Tensor, Tensor]:
    tokens, _, heads, head_dim = turned.shape
    out = turned.new_empty((tokens, heads, head_dim))
    return out, turned.new_empty((heads, tokens), dtype=torch.float32)


@torch.library.custom_op("clinical_modernbert::local_attention_backward", mutates_args=())
def _local_attention_backward(
    grad: Tensor,
    turned: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    bounds: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    window: int,
) -> Tensor:
    """The gradient by what was given to `rope`: (T, 3, H, D)."""
    head_dim = turned.shape[-1]
    grad_qkv = torch.empty_like(turned)
    if turned.numel() == 0:
        return grad_qkv
    given = (grad, turned, cos, sin, position_ids, bounds, out, logsumexp, grad_qkv, window)
    with torch.cuda.device_of(turned):
        if pipelined(turned.dtype, head_dim, window, turned.device):
            from kernels import local_attention_hopper as walks

            walks.backward(*given, head_dim**-0.5, _LOG2_E * head_dim**-0.5)
        else:
            backward_by_tiles(*given)
    return grad_qkv


def backward_by_tiles(
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

    The conditions are those of `forward_by_tiles`.
    """
    tokens, _, heads, head_dim = turned.shape
    cut = tuning(turned.element_size(), head_dim)
    pairs = logsumexp.new_empty((*logsumexp.shape, 2))
    turn, sizes = (cos, sin, position_ids), (tokens, head_dim**-0.5, _LOG2_E * head_dim**-0.5)
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


@_local_attention_backward.register_fake
def _local_attention_backward_fake(
    grad: Tensor,
    turned: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    bounds: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    window: int,
) -> Tensor:
    return torch.empty_like(turned)


class _LocalAttention(torch.autograd.Function):
    """Two operations forward, of which the second alone has a backward: it turns back as well.

    The compiler sees `rope`, and so turns a product where it lies.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor,
        bounds: Tensor,
        window: int,
    ) -> Tensor:
        turned = rope(qkv, cos, sin, position_ids)
        out, logsumexp = _local_attention(turned, bounds, window)
        ctx.save_for_backward(turned, cos, sin, position_ids, bounds, out, logsumexp)
        ctx.window = window
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        grad_qkv = _local_attention_backward(grad.contiguous(), *ctx.saved_tensors, ctx.window)
        return grad_qkv, None, None, None, None, None
