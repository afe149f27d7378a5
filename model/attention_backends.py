"""Attention of others over packed documents, each as an operation that a compiler takes whole.

Each kernel is wrapped in a custom operation for its forward and one for its backward, with shapes
for the compiler and autograd registered between them, so that a compiled layer has no graph break.
What they share: q (M, H, D), k and v (T, H, D) contiguous, bf16 or fp16; cu_seqlens_q and
cu_seqlens_k (N + 1,) int32, where each document's queries and its keys lie; no document has more
than max_seqlen of either; window tokens to either side, −1 for the whole document. They leave the
results behind the last entry of each unwritten: here these become zeros, in the output and in all
gradients. A document without queries gives its keys and values gradients of zero.

Where `torch.use_deterministic_algorithms` is set, their backward sums in a fixed order.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.documents import clear_behind_documents

Forward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


def _shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _shapes_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen: int,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def register(
    name: str, forward: Forward, backward: Backward, leaves_rows_unwritten: bool = True
) -> Callable[..., Tensor]:
    """An operation `(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen, window) -> out` from a pair.

    forward returns out and the (H, M) fp32 log-sum-exp; backward takes (grad, q, k, v, out,
    logsumexp, cu_seqlens_q, cu_seqlens_k, max_seqlen, window) and returns the gradients by q, k and
    v. Neither is called without queries, nor where all documents are empty. They run with the
    tensors' GPU as the current one. leaves_rows_unwritten: rows behind the last document have to be
    cleared.
    """

    @torch.library.custom_op(f"clinical_modernbert::{name}", mutates_args=())
    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen: int,
        window: int,
    ) -> tuple[Tensor, Tensor]:
        if 0 in (q.shape[0], max_seqlen):
            return torch.zeros_like(q), q.new_zeros((q.shape[1], q.shape[0]), dtype=torch.float32)
        with torch.cuda.device_of(q):
            out, logsumexp = forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen, window)
        if leaves_rows_unwritten:
            clear_behind_documents(out, cu_seqlens_q)
        return out, logsumexp

    @torch.library.custom_op(f"clinical_modernbert::{name}_backward", mutates_args=())
    def attend_backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen: int,
        window: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if 0 in (q.shape[0], max_seqlen):
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        with torch.cuda.device_of(q):
            where = cu_seqlens_q, cu_seqlens_k
            grads = backward(grad, q, k, v, out, logsumexp, *where, max_seqlen, window)
        if leaves_rows_unwritten:
            for one, ends in zip(grads, (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k), strict=True):
                clear_behind_documents(one, ends)
        return grads

    attend.register_fake(_shapes)
    attend_backward.register_fake(_shapes_backward)

    def save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        q, k, v, cu_seqlens_q, cu_seqlens_k, ctx.max_seqlen, ctx.window = inputs
        out, logsumexp = output
        ctx.save_for_backward(q, k, v, out, logsumexp, cu_seqlens_q, cu_seqlens_k)
        ctx.mark_non_differentiable(logsumexp)

    def run_backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        saved = ctx.saved_tensors
        grads = attend_backward(grad.contiguous(), *saved, ctx.max_seqlen, ctx.window)
        return *grads, None, None, None, None

    attend.register_autograd(run_backward, setup_context=save_for_backward)

    def call(
        q_MHD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen: int,
        window: int | None,
    ) -> Tensor:
        q, k, v = q_MHD.contiguous(), k_THD.contiguous(), v_THD.contiguous()
        where = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        out, _ = attend(q, k, v, *where, max_seqlen, -1 if window is None else window)
        return out

    call.__doc__ = f"`model.attention`'s interface to {name}."
    return call


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
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen: int,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    side = None if window < 0 else window
    dq, dk, dv, *_ = _flash_attn_bwd(
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
    )
    return dq, dk, dv


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
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen: int,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _wrapped_flash_attn_varlen_backward

    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _wrapped_flash_attn_varlen_backward(
        grad,
        q,
        k,
        v,
        out,
        logsumexp,
        *grads,
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
    return grads


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
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen: int,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    # Only dropout would read the state of a generator.
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._flash_attention_backward(
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


fa4_attention = register("fa4_attention", _fa4_forward, _fa4_backward)
fa2_attention = register("fa2_attention", _fa2_forward, _fa2_backward)
# What torch.nn.attention.varlen.varlen_attn calls.
varlen_attention = register("varlen_attention", _varlen_forward, _varlen_backward)
