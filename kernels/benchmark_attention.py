"""What `kernels.benchmark` measures of attention: this project's and everybody's who is installed.

FlashAttention-4, flash-attn 2 and torch's `varlen_attn` take queries and keys that are turned
already; for layers with a window they are timed together with this project's `rope`, forward and
backward, which is the best there is for them. All of them read one packed tensor and give one
gradient of it, which the first two write in place, as in `model.attention_backends`, and PyTorch
puts together for the third. Deterministic modes are contestants of their own; this project's
kernels have no other mode. Where `kernels.local_attention.pipelined` takes walks these are "ours",
and the kernels by tiles are contestants as well.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from kernels import local_attention as ours
from kernels import local_attention_tiles as tiles
from kernels.benchmark_layouts import (
    BF16,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    Case,
    Outputs,
    bucketed,
    layouts,
    random_tensor,
    sets_of,
    version_of,
)
from kernels.determinism import use_deterministic_algorithms
from kernels.documents import document_bounds, positions_from
from kernels.local_attention import local_attention, local_attention_reference
from kernels.local_attention_tiles import Tiles, Tuning
from kernels.rope import rope, rope_tables
from kernels.short_documents import (
    SHORT_DOCUMENTS,
    backward_short,
    forward_short,
    room_for_sums,
)

WINDOW = 64
# A matrix of all scores, as references make several, is 1.5 GiB in bf16 at so many tokens.
_MOST_FOR_ALL_PAIRS = 8192
_TUNED_LAYOUTS = ("full1024", "abstracts", "skewed")
# Of --tune: other tiles than those in use, for one kernel at a time. Each compiles for sm_90 with
# at most 64 bytes of registers spilled, and two programs or more fit on a multiprocessor
# (tests/kernels/test_compile_for_gpu.py). Programs of 128 tokens are left out: on an H200 they took
# longer in every kernel and layout.
_FORWARD = [Tiles(64, 64, 4, 2, 128), Tiles(64, 64, 4, 3, 128), Tiles(64, 64, 4, 1, 128)]
_QUERIES = [Tiles(64, 32, 4, 3, 96), Tiles(64, 64, 4, 1, 128), Tiles(64, 64, 4, 2, 168)]
_KEYS = [
    Tiles(64, 64, 4, 1, 168),
    Tiles(64, 64, 4, 2, 168),
    Tiles(64, 32, 4, 1, 128),
    Tiles(64, 16, 4, 3, 128),
]

Attend = Callable[[Tensor], Tensor]
"""(T, 3, H, D), turned, to (T, H, D)"""
Forward = Callable[[Tensor], tuple[Tensor, ...]]
"""The same, to the result and what the backward needs beside it."""
Backward = Callable[..., None]
"""∂out, qkv, the place for its gradient, and what the forward gave."""


def make_local(tokens: int, tune: bool = False) -> Iterator[Case]:
    """A layer with a window, rotary included: (T, 3, H, D) to (T, H, D)."""
    packed, moved = _packed(tokens)
    usual = tiles.NARROW
    for layout, lengths in layouts(tokens).items():
        if tune and layout not in _TUNED_LAYOUTS:
            continue
        ends, inputs = _with_documents(packed, lengths)
        who: dict[str, Callable[..., Outputs]] = {}
        if tune:
            who |= {name_of(tuning): partial(_tuned, tuning) for tuning in candidates(usual)}
        else:
            who["ours"] = partial(_local_by, True)
            if walks_here():
                who["ours, by tiles"] = partial(_local_by, False)
            if tokens <= _MOST_FOR_ALL_PAIRS:
                who["reference"] = partial(_local_reference, ends)
            others = _others(ends, max(lengths), WINDOW)
            others["torch.compile, FlexAttention"] = flex(ends, tokens, WINDOW)
            for name, attend in others.items():
                who[f"{name} + our rope"] = partial(_turned, attend)
        pairs = sum(seen_pairs(length, WINDOW) for length in lengths)
        yield Case(
            "local_attention_tuning" if tune else "local_attention",
            layout,
            inputs,
            who,
            moved,
            _flops(pairs),
        )
        tiles.NARROW, ours.WALKS = usual, True  # what the last contestant left


def _packed(tokens: int) -> tuple[list[Tensor], dict[str, int]]:
    """Sets of queries, keys and values together, and the least to move."""
    size = 3 * tokens * HIDDEN * BF16
    unit = tokens * HIDDEN * BF16
    # Rotary or not: q, k, v and out; with out's gradient and theirs in the backward.
    moved = {"forward": 4 * unit, "backward": 8 * unit, "both": 12 * unit}
    return [random_tensor(tokens, 3, HEADS, HEAD_DIM) for _ in sets_of(size)], moved


def _with_documents(packed: list[Tensor], lengths: list[int]) -> tuple[Tensor, list[list[Tensor]]]:
    """cu_seqlens, and the input sets of `_local` and `_turned`."""
    cos, sin = (table.cuda() for table in rope_tables(8192, HEAD_DIM, 10_000.0))
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).cuda()
    tokens = sum(lengths)
    documents = (positions_from(ends, tokens), document_bounds(ends, tokens))
    return ends, [[qkv, cos, sin, *documents] for qkv in packed]


def make_global(tokens: int) -> Iterator[Case]:
    """A layer without a window, on queries and keys that are turned already.

    "… and ours" is as the model does it: short documents, where there are none but these behind the
    long ones, are windows to the kernels by tiles, and the long ones alone the other's.
    """
    packed, moved = _packed(tokens)
    inputs = [[qkv] for qkv in packed]
    cases = {name: (lengths, max(lengths)) for name, lengths in layouts(tokens).items()}
    cases["code titles, bucketed"] = bucketed(cases["code titles"][0])
    halves = layouts(tokens // 2)
    mixed = sorted(halves["notes"] + halves["code titles"], reverse=True)
    cases["notes and code titles"] = mixed, max(mixed)
    for layout, (lengths, longest) in cases.items():
        ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).cuda()
        who: dict[str, Callable[..., Outputs]] = dict(_others(ends, longest, None))
        if tokens <= _MOST_FOR_ALL_PAIRS:
            who["reference"] = _masked(ends, tokens)
        long = sum(length > SHORT_DOCUMENTS for length in lengths)
        if long < len(lengths) and all(length <= SHORT_DOCUMENTS for length in lengths[long:]):
            if long == 0:
                who["ours, as windows"] = _windows(ends, tokens, 0, None)
            elif version_of("flash-attn-4"):
                long_ends, of_long = ends[: long + 1], sum(lengths[:long])
                asked = _fa4_in_place(long_ends, longest, None, False)
                who["FA4 and ours"] = _windows(ends, tokens, of_long, asked)
        pairs = sum(length**2 for length in lengths)
        yield Case("global_attention", layout, inputs, who, moved, _flops(pairs))


def _flops(pairs: int) -> dict[str, int]:
    """Two products of the pairs that see one another forward, five backward."""
    product = 2 * pairs * HEADS * HEAD_DIM
    return {"forward": 2 * product, "backward": 5 * product, "both": 7 * product}


def seen_pairs(length: int, window: int) -> int:
    """Pairs of tokens in a document at most `window` apart, each with itself too."""
    reach = min(window, length - 1)
    return length * (2 * reach + 1) - reach * (reach + 1)


def _local(
    qkv: Tensor, cos: Tensor, sin: Tensor, places: Tensor, bounds: Tensor, *, window: int = WINDOW
) -> Outputs:
    return local_attention(qkv, cos, sin, places, bounds, window)


def _local_reference(
    ends: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, places: Tensor, bounds: Tensor
) -> Outputs:
    return local_attention_reference(qkv, cos, sin, places, ends, WINDOW)


def walks_here() -> bool:
    """Whether walks compute what `make_local` measures as "ours"."""
    return ours.pipelined(torch.bfloat16, HEAD_DIM, WINDOW, torch.device("cuda"))


def _local_by(walks: bool, *inputs: Tensor) -> Outputs:
    # Stays so for the backward, which is measured before the next contestant.
    ours.WALKS = walks
    return _local(*inputs)


def _turned(
    attend: Attend, qkv: Tensor, cos: Tensor, sin: Tensor, places: Tensor, bounds: Tensor
) -> Outputs:
    return attend(rope(qkv, cos, sin, places))


def candidates(usual: Tuning) -> Iterator[Tuning]:
    """What --tune compares: the tuning in use, and others that differ from it in one kernel."""
    yield usual
    for field, others in (("forward", _FORWARD), ("queries", _QUERIES), ("keys", _KEYS)):
        yield from (replace(usual, **{field: other}) for other in others)


def name_of(tuning: Tuning) -> str:
    """block.step.warps.stages.registers of the forward, of ∂q and of ∂k and ∂v."""
    return " ".join(
        ".".join(str(n or "-") for n in (t.block, t.step, t.warps, t.stages, t.registers))
        for t in (tuning.forward, tuning.queries, tuning.keys)
    )


def _tuned(tuning: Tuning, *inputs: Tensor) -> Outputs:
    tiles.NARROW = tuning
    return _local_by(False, *inputs)


def _others(ends: Tensor, longest: int, window: int | None) -> dict[str, Attend]:
    """Everybody's attention over these documents; deterministic where it can be asked for."""
    who: dict[str, Attend] = {}
    modes = ((False, ""), (True, ", deterministic"))
    if version_of("flash-attn-4"):
        who |= {f"FA4{note}": _fa4(ends, longest, window, mode) for mode, note in modes}
    if version_of("flash-attn"):
        who |= {f"flash-attn{note}": _fa2(ends, longest, window, mode) for mode, note in modes}

    def torch_attend(deterministic: bool, qkv: Tensor) -> Tensor:
        size = (-1, -1) if window is None else (window, window)
        q, k, v = qkv.unbind(1)
        out = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=size)
        assert isinstance(out, Tensor)
        if deterministic and out.grad_fn is not None:
            # Its backward asks torch, whenever it comes; set around that alone.
            out.grad_fn.register_prehook(lambda _: use_deterministic_algorithms(True))
            out.grad_fn.register_hook(lambda *_: use_deterministic_algorithms(False))
        return out

    who |= {f"varlen_attn{note}": partial(torch_attend, mode) for mode, note in modes}
    return who


def _masked(ends: Tensor, tokens: int) -> Attend:
    """PyTorch's attention over all pairs, with a mask, which is made once."""
    document = _documents(ends, tokens)
    seen = document[:, None] == document

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = (value.transpose(0, 1)[None] for value in qkv.unbind(1))
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return out[0].transpose(0, 1)

    return attend


def _documents(ends: Tensor, tokens: int) -> Tensor:
    """The number of each token's document."""
    places = torch.arange(tokens, device=ends.device)
    return torch.bucketize(places, ends[1:].long(), right=True)


def flex(ends: Tensor, tokens: int, window: int) -> Attend:
    """What torch.compile makes of the mask. The blocks that are not empty are found once, by the
    first call."""
    document = _documents(ends, tokens)

    def is_seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document[query] == document[key]) & ((query - key).abs() <= window)

    @functools.cache
    def prepared() -> tuple[Callable[..., object], BlockMask]:
        # Compiled, because it looks at all pairs, which would not fit.
        mask_of = torch.compile(create_block_mask)
        mask = mask_of(is_seen, None, None, tokens, tokens, device=str(ends.device))
        return torch.compile(flex_attention, dynamic=False), mask

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = (value.transpose(0, 1)[None] for value in qkv.unbind(1))
        compiled, mask = prepared()
        out = compiled(q, k, v, block_mask=mask)
        assert isinstance(out, Tensor)
        return out[0].transpose(0, 1)

    return attend


def _fa4(ends: Tensor, longest: int, window: int | None, deterministic: bool) -> Attend:
    return _with_autograd(*_fa4_in_place(ends, longest, window, deterministic))


def _fa4_in_place(
    ends: Tensor, longest: int, window: int | None, deterministic: bool
) -> tuple[Forward, Backward]:
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    options = {
        "cu_seqlens_q": ends,
        "cu_seqlens_k": ends,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
        "window_size_left": window,
        "window_size_right": window,
    }

    def forward(qkv: Tensor) -> tuple[Tensor, ...]:
        out, logsumexp, *_ = _flash_attn_fwd(*qkv.unbind(1), return_lse=True, **options)
        return out, logsumexp

    def backward(grad: Tensor, qkv: Tensor, grad_qkv: Tensor, *saved: Tensor) -> None:
        places = dict(zip(("dq", "dk", "dv"), grad_qkv.unbind(1), strict=True))
        out, logsumexp = saved
        given = (*qkv.unbind(1), out, grad, logsumexp)
        _flash_attn_bwd(*given, deterministic=deterministic, **options, **places)

    return forward, backward


def _windows(
    ends: Tensor, tokens: int, first: int, before: tuple[Forward, Backward] | None
) -> Attend:
    """Ours by tiles, of the documents from token `first` on; before it somebody else's."""
    bounds = document_bounds(ends, tokens)

    def forward(qkv: Tensor) -> tuple[Tensor, ...]:
        saved: tuple[Tensor, ...] = (qkv.new_empty((tokens, HEADS, HEAD_DIM)),)
        if before is not None:
            saved = before[0](qkv)
        short_sums = room_for_sums(qkv, bounds)
        forward_short(qkv, bounds, first, saved[0], short_sums)
        return *saved, short_sums

    def backward(grad: Tensor, qkv: Tensor, grad_qkv: Tensor, *saved: Tensor) -> None:
        *of_long, short_sums = saved
        if before is not None:
            before[1](grad, qkv, grad_qkv, *of_long)
        backward_short(grad, qkv, bounds, first, of_long[0], short_sums, grad_qkv)

    return _with_autograd(forward, backward)


def _with_autograd(forward: Forward, backward: Backward) -> Attend:
    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, qkv: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            out, *others = forward(qkv)
            ctx.save_for_backward(qkv, out, *others)
            return out

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            qkv, *saved = ctx.saved_tensors
            grad_qkv = torch.empty_like(qkv)
            backward(grad, qkv, grad_qkv, *saved)
            return grad_qkv

    return Attention.apply


def _fa2(ends: Tensor, longest: int, window: int | None, deterministic: bool) -> Attend:
    from flash_attn import flash_attn_varlen_qkvpacked_func

    side = -1 if window is None else window
    return partial(
        flash_attn_varlen_qkvpacked_func,
        cu_seqlens=ends,
        max_seqlen=longest,
        window_size=(side, side),
        deterministic=deterministic,
    )
