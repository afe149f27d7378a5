"""Attention of others over packed documents, each as an operation that a compiler takes whole.

Each kernel is wrapped in a custom operation for its forward and one for its backward, with shapes
for the compiler and autograd registered between them, so that a compiled layer has no graph break.
They read queries, keys and values where they lie in qkv (T, 3, H, D), contiguous, bf16 or fp16, and
write the gradients of it in one such tensor, so that nothing is put together or taken apart; those
of torch's kernel are copied there. Where places_M are given, the queries are those of these tokens,
(M, H, D), and their gradients are put to their places. cu_seqlens_q and cu_seqlens_k
(N + 1,) int32: where each document's queries and its keys lie, alike where all tokens are queries;
no document has more than max_seqlen of either; window tokens to either side, −1 for the whole
document. They leave the results behind the last entry of each unwritten: here these become zeros,
in the output and in all gradients. A document without queries gives its keys and values gradients
of zero.

Given `ShortDocuments`, those are left out of what others' kernels are asked, and the kernels of
`kernels.local_attention_tiles` write them into the same tensors, as windows: their grid goes over
tokens, where others' goes over documents. What is whose is decided in the operation, by numbers of
the host, so that a compiler has one graph for all.

Where `torch.use_deterministic_algorithms` is set, their backward sums in a fixed order.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.documents import clear_behind_documents
from kernels.short_documents import ShortDocuments, backward_short, forward_short, room_for_sums

Forward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor]]
Backward = Callable[..., None]


def _queries(qkv: Tensor, places: Tensor | None) -> Tensor:
    """(M, H, D): of all tokens, as a view, or of those at `places`."""
    return qkv[:, 0] if places is None else qkv[:, 0].index_select(0, places)


def _shapes(
    qkv: Tensor,
    places: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bounds: Tensor | None,
    max_seqlen: int,
    window: int,
    first_document: int,
    first_token: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = (qkv if places is None else places).shape[0]
    out = qkv.new_empty((rows, *qkv.shape[2:]))
    logsumexp = qkv.new_empty((qkv.shape[2], rows), dtype=torch.float32)
    return out, logsumexp, room_for_sums(qkv, bounds)


def _shapes_backward(
    grad: Tensor,
    qkv: Tensor,
    places: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    short_sums: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bounds: Tensor | None,
    max_seqlen: int,
    window: int,
    first_document: int,
    first_token: int,
) -> Tensor:
    return torch.empty_like(qkv)


def register(
    name: str, forward: Forward, backward: Backward, leaves_rows_unwritten: bool = True
) -> Callable[..., Tensor]:
    """`(qkv, places, cu_seqlens_q, cu_seqlens_k, max_seqlen, window, short) -> out` of two.

    forward (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen, window) returns out, contiguous, and
    the (H, M) fp32 log-sum-exp. backward (grad, q, k, v, out, logsumexp, dq, dk, dv, cu_seqlens_q,
    cu_seqlens_k, max_seqlen, window) writes the gradients into dq, dk and dv. Of q, k, v, dq, dk
    and dv the rows, (H, D), are contiguous, but may lie apart. Neither is called without queries,
    nor where all documents are empty or short. They run with the tensors' GPU as the current one.
    leaves_rows_unwritten: rows behind the last document have to be cleared.
    """

    @torch.library.custom_op(f"clinical_modernbert::{name}", mutates_args=())
    def attend(
        qkv: Tensor,
        places: Tensor | None,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        bounds: Tensor | None,
        max_seqlen: int,
        window: int,
        first_document: int,
        first_token: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = _queries(qkv, places), qkv[:, 1], qkv[:, 2]
        # Those before the short ones.
        ends = (cu_seqlens_q[: first_document + 1], cu_seqlens_k[: first_document + 1])
        with torch.cuda.device_of(q):
            if 0 in (q.shape[0], max_seqlen, first_document):
                # Where no document is long, every row is written below.
                written = first_token == 0 and places is None
                out = q.new_empty(q.shape) if written else q.new_zeros(q.shape)
                logsumexp = q.new_zeros((q.shape[1], q.shape[0]), dtype=torch.float32)
            else:
                out, logsumexp = forward(q, k, v, *ends, max_seqlen, window)
                if leaves_rows_unwritten:
                    clear_behind_documents(out, cu_seqlens_q)
            short_sums = room_for_sums(qkv, bounds)
            if first_token < qkv.shape[0]:
                assert bounds is not None
                every = out if places is None else qkv.new_empty((qkv.shape[0], *qkv.shape[2:]))
                forward_short(qkv, bounds, first_token, every, short_sums)
                if places is not None:
                    is_short_M = _is_real(places, cu_seqlens_q) & (places >= first_token)
                    out = torch.where(is_short_M[:, None, None], every.index_select(0, places), out)
        return out, logsumexp, short_sums

    @torch.library.custom_op(f"clinical_modernbert::{name}_backward", mutates_args=())
    def attend_backward(
        grad: Tensor,
        qkv: Tensor,
        places: Tensor | None,
        out: Tensor,
        logsumexp: Tensor,
        short_sums: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        bounds: Tensor | None,
        max_seqlen: int,
        window: int,
        first_document: int,
        first_token: int,
    ) -> Tensor:
        q, k, v = _queries(qkv, places), qkv[:, 1], qkv[:, 2]
        ends = (cu_seqlens_q[: first_document + 1], cu_seqlens_k[: first_document + 1])
        with torch.cuda.device_of(q):
            if 0 in (q.shape[0], max_seqlen, first_document):
                # As in the forward; with places, too.
                grad_qkv = torch.zeros_like(qkv) if first_token else torch.empty_like(qkv)
            else:
                grad_qkv = torch.empty_like(qkv)
                dq = grad_qkv[:, 0] if places is None else torch.empty_like(q)
                dk, dv = grad_qkv[:, 1], grad_qkv[:, 2]
                saved = (q, k, v, out, logsumexp)
                backward(grad, *saved, dq, dk, dv, *ends, max_seqlen, window)
                if leaves_rows_unwritten:
                    clear_behind_documents(grad_qkv, cu_seqlens_k)
                if places is not None:
                    put_rows(grad_qkv[:, 0], dq, places, ends[0])
            if first_token < qkv.shape[0]:
                assert bounds is not None
                if places is not None:
                    grad, out = (_at_places(x, places, cu_seqlens_q, qkv) for x in (grad, out))
                backward_short(grad, qkv, bounds, first_token, out, short_sums, grad_qkv)
        return grad_qkv

    attend.register_fake(_shapes)
    attend_backward.register_fake(_shapes_backward)

    def save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        qkv, places, cu_seqlens_q, cu_seqlens_k, bounds, *ctx.sizes = inputs
        ctx.save_for_backward(qkv, places, *output, cu_seqlens_q, cu_seqlens_k, bounds)
        ctx.mark_non_differentiable(*output[1:])

    def run_backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        grad_qkv = attend_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.sizes)
        return grad_qkv, *[None] * (4 + len(ctx.sizes))

    attend.register_autograd(run_backward, setup_context=save_for_backward)

    def call(
        qkv_T3HD: Tensor,
        places_M: Tensor | None,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen: int,
        window: int | None,
        short: ShortDocuments | None = None,
    ) -> Tensor:
        assert short is None or window is None
        if short is None:
            short = ShortDocuments(None, cu_seqlens_k.shape[0] - 1, qkv_T3HD.shape[0])
        out, *_ = attend(
            qkv_T3HD.contiguous(),
            places_M,
            cu_seqlens_q.contiguous(),
            cu_seqlens_k.contiguous(),
            short.bounds_2T,
            max_seqlen,
            -1 if window is None else window,
            short.first_document,
            short.first_token,
        )
        return out

    call.__doc__ = f"`model.attention`'s interface to {name}."
    return call


def _at_places(values: Tensor, places_M: Tensor, cu_seqlens_q: Tensor, qkv: Tensor) -> Tensor:
    """(M, H, D) `values` at their places among (T, H, D) zeros."""
    rows = qkv.new_empty((qkv.shape[0], *qkv.shape[2:]))
    put_rows(rows, values, places_M, cu_seqlens_q)
    return rows


def _is_real(places_M: Tensor, cu_seqlens_q: Tensor) -> Tensor:
    """Which of the places lie in a document, (M,) bool: not filler."""
    return torch.arange(places_M.shape[0], device=places_M.device) < cu_seqlens_q[-1]


def put_rows(rows: Tensor, values: Tensor, places_M: Tensor, cu_seqlens: Tensor) -> None:
    """Write (M, …) `values` to their places among (T, …) `rows`, zeros to all others.

    places_M and cu_seqlens are those of `model.attention.Queries`: what lies behind cu_seqlens[-1]
    is filler, and may hold anything. Each place is written by one value, or by equal ones: filler,
    whose own place may be somebody's, says again what the first value says, or zero where there is
    nothing but filler.
    """
    is_real_M = _is_real(places_M, cu_seqlens)
    is_real = is_real_M.view(-1, *[1] * (values.dim() - 1))
    first = torch.where(is_real[:1], values[:1], 0)
    to = torch.where(is_real_M, places_M, places_M[:1])
    rows.zero_()
    rows.index_put_((to,), torch.where(is_real, values, first))


def _fa4_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    side = None if window < 0 else window
    out, logsumexp, *_ = _flash_attn_fwd(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        window_size_left=side,
        window_size_right=side,
        return_lse=True,
    )
    return out, logsumexp


def _fa4_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen: int,
    window: int,
) -> None:
    from flash_attn.cute.interface import _flash_attn_bwd

    side = None if window < 0 else window
    _flash_attn_bwd(
        q,
        k,
        v,
        out,
        grad,
        logsumexp,
        window_size_left=side,
        window_size_right=side,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        dq=dq,
        dk=dk,
        dv=dv,
    )


def _fa2_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _wrapped_flash_attn_varlen_forward

    out, logsumexp, *_ = _wrapped_flash_attn_varlen_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen,
        max_seqlen,
        0.0,
        q.shape[-1] ** -0.5,
        causal=False,
        window_size_left=window,
        window_size_right=window,
    )
    return out, logsumexp


def _fa2_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen: int,
    window: int,
) -> None:
    from flash_attn.flash_attn_interface import _wrapped_flash_attn_varlen_backward

    _wrapped_flash_attn_varlen_backward(
        grad,
        q,
        k,
        v,
        out,
        logsumexp,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen,
        max_seqlen,
        0.0,
        q.shape[-1] ** -0.5,
        False,
        window,
        window,
        0.0,
        None,
        torch.are_deterministic_algorithms_enabled(),
    )


def _varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    out, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen,
        max_seqlen,
        0.0,
        False,
        False,
        window_size_left=window,
        window_size_right=window,
    )
    return out, logsumexp


def _varlen_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen: int,
    window: int,
) -> None:
    # Only dropout would read the state of a generator.
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    grads = torch.ops.aten._flash_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        logsumexp,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen,
        max_seqlen,
        0.0,
        False,
        state,
        q.new_empty(0),
        window_size_left=window,
        window_size_right=window,
    )
    for place, gradient in zip((dq, dk, dv), grads, strict=True):
        place.copy_(gradient)


fa4_attention = register("fa4_attention", _fa4_forward, _fa4_backward)
fa2_attention = register("fa2_attention", _fa2_forward, _fa2_backward)
# What torch.nn.attention.varlen.varlen_attn calls.
varlen_attention = register("varlen_attention", _varlen_forward, _varlen_backward)
