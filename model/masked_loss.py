"""Cross-entropy of a linear decoder over a large vocabulary, without all logits at once.

    loss = Σ_m  logsumexp_v(z_mv) − z_{m, label_m},   z = h Wᵀ + b,   over labels ≠ −100
    ∂loss/∂z_mv = softmax(z_m)_v − [v = label_m]

At base size 19,660 masked tokens have 4 GB of fp32 logits. They are made a chunk of rows at a
time, and the gradients are computed there and then, while a chunk's logits exist: three matrix
products in all, where recomputing the logits in the backward would take four. The gradients of the
weight and the bias are summed over chunks in fp32, whatever the weight's dtype.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
# Rows of a chunk × vocabulary: 64 Mi fp32 logits are 256 MiB.
_ELEMENTS_A_CHUNK = 64 * 2**20


def masked_cross_entropy(
    hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_M: Tensor
) -> Tensor:
    """Sum of the cross-entropy over labels other than −100, an fp32 scalar.

    hidden (M, D), weight (V, D) and bias (V,) of one floating dtype; labels (M,) int64. Logits are
    computed in that dtype, everything after them in fp32 (fp64 inputs: in fp64). M may be 0.
    """
    loss, *_ = _masked_cross_entropy(
        hidden_MD, weight_VD, bias_V, labels_M, torch.is_grad_enabled()
    )
    return loss.float()


# An operation of its own, because a compiler that traced the loop over chunks would unroll it, and
# torch 2.11's returned no gradient for the weight.
@torch.library.custom_op("clinical_modernbert::masked_cross_entropy", mutates_args=())
def _masked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and its gradients by hidden, weight and bias, all of them fp32 (or fp64).

    Without gradients these are empty.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    gradients = _empty_gradients(hidden, weight, bias, with_gradients)
    grad_hidden, grad_weight, grad_bias = gradients
    grad_weight.zero_()
    grad_bias.zero_()
    chunk = max(1, _ELEMENTS_A_CHUNK // weight.shape[0])
    for start in range(0, hidden.shape[0], chunk):
        rows = slice(start, start + chunk)
        logits = F.linear(hidden[rows], weight, bias).to(wide)
        live = (labels[rows, None] != IGNORED).to(wide)
        target = labels[rows, None].clamp(min=0)
        at_target = logits.gather(-1, target)
        top = logits.amax(-1, keepdim=True)
        weights = logits.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        loss += (live * (total.log() + top - at_target)).sum()
        if with_gradients:
            slope = weights.mul_(live / total).scatter_add_(-1, target, -live)
            grad_bias += slope.sum(0)
            slope = slope.to(weight.dtype)
            grad_hidden[rows] = slope @ weight
            grad_weight += slope.T @ hidden[rows]
    return loss, *gradients


@_masked_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss = hidden.new_empty((), dtype=wide)
    return loss, *_empty_gradients(hidden, weight, bias, with_gradients)


def _empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    of_hidden, of_weight, of_bias = (
        tensor.new_empty(tensor.shape if with_gradients else (0,), dtype=wide)
        for tensor in (hidden, weight, bias)
    )
    return of_hidden, of_weight, of_bias


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, bias, *_ = inputs
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype


def _backward(ctx, grad_loss: Tensor, *_: Tensor):  # type: ignore[no-untyped-def]
    # Scaled before they are rounded: a loss scaled for fp16 keeps its small gradients.
    scaled = [
        (gradient * grad_loss).to(dtype)
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    ]
    return *scaled, None, None


_masked_cross_entropy.register_autograd(_backward, setup_context=_save_for_backward)
