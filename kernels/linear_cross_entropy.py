"""Cross-entropy of a linear decoder over a large vocabulary, without all logits at once.

    loss = Σ_m  logsumexp_v(z_mv) − z_{m, label_m},   z = h Wᵀ + b,   over labels ≠ −100
    ∂loss/∂z_mv = softmax(z_m)_v − [v = label_m] =: d_mv
    ∂loss/∂h = d W,   ∂loss/∂W = dᵀ h,   ∂loss/∂b = Σ_m d_m

At base size 19,660 masked tokens have 2 GB of bf16 logits. They are made a chunk of rows at a time
and turned into d in place while they exist, so that there are three matrix products in all, where
recomputing the logits in the backward would take four. The products are the vendor library's. What
is between them is two passes over the chunk, which memory limits: one reads it for the maximum and
the sum of each row, one reads it again, writes d and sums its columns for the bias.

The gradients of weight and bias are summed over chunks in fp32, whatever the weight's dtype. Sums
have a fixed order, without atomics. Rows whose label is −100 are not read in either pass; their d
is zero. The products do not know them, and a device's count of them could not shape a call of the
library without being waited for. So whoever fills a list of labels up to a constant length puts the
filler last and says how many entries are not filler: the rest take part in nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.mixed_precision import scale_narrow

IGNORED = -100
_IGNORED, _LOG2_E = tl.constexpr(IGNORED), tl.constexpr(1.4426950408889634)
# Rows that count, and those of a chunk, are rounded up to these, which the compiler of the passes
# makes use of. Chunks that are more even than with 64 save the library part of a wave of tiles.
_ROWS_MULTIPLE = 16
# At most so many rows of a chunk × vocabulary: 6,656 rows of 50,368 logits, 640 MiB in bf16. Fewer
# rows leave the product that makes the gradient of `hidden` with too few tiles for the chip, and
# add up the weight's gradient more often. Nor can an offset reach 2³¹, however many rows there
# are: a chunk's logits and its rows of `hidden` end here, or it is one row. In a pass that would
# wrap around, and the library's product over 2.8 million rows of 768 was wrong.
_ELEMENTS_A_CHUNK = 6656 * 50368
# In PyTorch logits are fp32 and have temporaries of their size.
_ELEMENTS_A_PLAIN_CHUNK = 64 * 2**20

# Measured on one H200 (docs/kernels.md). First pass: lanes of eight logits in a program, and its
# warps. Second: rows and columns of a tile, warps, tiles that are under way at once, and the rows
# that a program walks through.
_FIRST_PASS = (256, 4)
_SECOND_PASS = (2, 2048, 8, 3)
_ROWS_A_PROGRAM = 64
# A grid's second dimension ends here, which a small vocabulary's chunk could exceed.
_MOST_ROWS = 65_535 * _ROWS_A_PROGRAM


def linear_cross_entropy_reference(
    hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_M: Tensor
) -> Tensor:
    """What `linear_cross_entropy` computes, in plain PyTorch, with all logits at once."""
    logits_MV = F.linear(hidden_MD, weight_VD, bias_V)
    wide = torch.promote_types(logits_MV.dtype, torch.float32)
    return F.cross_entropy(logits_MV.to(wide), labels_M, ignore_index=IGNORED, reduction="sum")


def linear_cross_entropy(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    labels_M: Tensor,
    counted: int | None = None,
) -> Tensor:
    """Sum of the cross-entropy over labels other than −100, an fp32 scalar.

    hidden (M, D), weight (V, D) and bias (V,) of one floating dtype; labels (M,) int64, −100 or
    below V (not checked: that would wait for the GPU). counted, at most M: labels from this place
    on are all −100 (not checked either), and their rows cost nothing. Logits are computed in that
    dtype, everything after them in fp32 (fp64 inputs: in fp64). M may be 0. Differentiable once in
    all but the labels. On a GPU the two passes are Triton kernels, elsewhere and in fp64 PyTorch.
    Raises TypeError or ValueError for other dtypes, shapes and counts.
    """
    return linear_cross_entropy_each(hidden_MD, weight_VD, bias_V, labels_M, counted)[0]


def linear_cross_entropy_each(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    labels_M: Tensor,
    counted: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The same sum and, for each label, (2, M) fp32: its cross-entropy, and 1 if no token is
    likelier, otherwise 0; both 0 where it is −100.

    The sum alone is differentiable: the gradients are made for it, and the others have none.
    """
    _check(hidden_MD, weight_VD, bias_V, labels_M)
    rows = hidden_MD.shape[0]
    if counted is not None and not 0 <= counted <= rows:
        raise ValueError(f"counted must be between 0 and {rows}, not {counted}")
    in_triton = hidden_MD.is_cuda and hidden_MD.dtype != torch.float64
    needed = any(value.requires_grad for value in (hidden_MD, weight_VD, bias_V))
    loss, *_, each_2M = _linear_cross_entropy(
        hidden_MD,
        weight_VD,
        bias_V,
        labels_M,
        rows if counted is None else counted,
        needed and torch.is_grad_enabled(),
        in_triton,
    )
    return loss.float(), each_2M.detach().float()


def _check(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> None:
    if not hidden.dtype == weight.dtype == bias.dtype:
        raise TypeError(
            f"hidden, weight and bias must have one dtype, not {hidden.dtype}, {weight.dtype} and "
            f"{bias.dtype}"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, not {labels.dtype}")
    sizes = [tuple(tensor.shape) for tensor in (hidden, weight, bias, labels)]
    if (
        [len(size) for size in sizes] != [2, 2, 1, 1]
        or sizes[0][1] != sizes[1][1]
        or sizes[1][0] != sizes[2][0]
        or sizes[0][0] != sizes[3][0]
    ):
        raise ValueError(f"need hidden (M, D), weight (V, D), bias (V,), labels (M,), not {sizes}")


@triton.jit
def _first_pass_kernel(  # type: ignore[no-untyped-def]
    logits, labels, top, total, loss, is_top, VOCABULARY: tl.constexpr, LANES: tl.constexpr
):
    """The highest logit of each row, Σ exp(z − highest), its loss, and whether the label's is the
    highest; 0, 1, 0, 0 if ignored."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    if label == _IGNORED:
        tl.store(top + row, 0.0)
        tl.store(total + row, 1.0)
        tl.store(loss + row, 0.0)
        tl.store(is_top + row, 0.0)
    else:
        # Each lane keeps a maximum and a sum of its own: eight logits share one correction of the
        # sum, and lanes meet only once, at the end.
        start = logits + row * VOCABULARY
        lane = tl.arange(0, LANES)[:, None] * 8 + tl.arange(0, 8)[None, :]
        high = tl.full((LANES,), float("-inf"), tl.float32)
        sums = tl.zeros((LANES,), tl.float32)
        for at in range(0, VOCABULARY, LANES * 8):
            z = tl.load(start + at + lane, mask=at + lane < VOCABULARY, other=float("-inf"))
            z = z.to(tl.float32)
            higher = tl.maximum(high, tl.max(z, 1))
            # −∞ still, where a lane lies behind the end of a small vocabulary.
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            terms = tl.exp2((z - shift[:, None]) * _LOG2_E)
            sums = sums * tl.exp2((high - shift) * _LOG2_E) + tl.sum(terms, 1)
            high = higher
        highest = tl.max(high, 0)
        sum_of_all = tl.sum(sums * tl.exp2((high - highest) * _LOG2_E), 0)
        tl.store(top + row, highest)
        tl.store(total + row, sum_of_all)
        at_label = tl.load(start + label).to(tl.float32)
        tl.store(loss + row, tl.log(sum_of_all) + (highest - at_label))
        tl.store(is_top + row, (at_label >= highest).to(tl.float32))


@triton.jit
def _second_pass_kernel(  # type: ignore[no-untyped-def]
    logits,
    labels,
    top,
    total,
    partial,  # (row groups, VOCABULARY) fp32: sums of the columns
    rows,
    VOCABULARY: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Logits to d, in place."""
    column = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (column < VOCABULARY)[None, :]
    sums = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for step in tl.range(0, GROUP, BLOCK_R, num_stages=STAGES):
        row = tl.program_id(1) * GROUP + step + tl.arange(0, BLOCK_R)
        label = tl.load(labels + row, mask=row < rows, other=_IGNORED)
        counts = (label != _IGNORED)[:, None] & inside
        shift = tl.load(top + row, mask=row < rows, other=0.0)
        scale = 1.0 / tl.load(total + row, mask=row < rows, other=1.0)
        at = logits + row.to(tl.int64)[:, None] * VOCABULARY + column[None, :]
        z = tl.load(at, mask=counts, other=float("-inf")).to(tl.float32)
        d = tl.exp2((z - shift[:, None]) * _LOG2_E) * scale[:, None]
        d = tl.where(counts, d - (column[None, :] == label[:, None]).to(tl.float32), 0.0)
        sums += d
        tl.store(at, d.to(logits.dtype.element_ty), mask=(row < rows)[:, None] & inside)
    to = partial + tl.program_id(1).to(tl.int64) * VOCABULARY + column
    tl.store(to, tl.sum(sums, 0), mask=column < VOCABULARY)


def _turn(logits: Tensor, labels: Tensor, with_gradients: bool) -> tuple[Tensor, Tensor | None]:
    """The loss of each row and whether its label is on top, (2, rows); with gradients, logits
    become d, whose column sums are returned."""
    rows, vocabulary = logits.shape
    values = torch.empty(4, rows, dtype=torch.float32, device=logits.device)
    top, total, loss, is_top = values.unbind()
    lanes, warps = _FIRST_PASS
    lanes = min(lanes, triton.next_power_of_2(triton.cdiv(vocabulary, 8)))
    with torch.cuda.device_of(logits):
        _first_pass_kernel[(rows,)](
            logits,
            labels,
            top,
            total,
            loss,
            is_top,
            VOCABULARY=vocabulary,
            LANES=lanes,
            num_warps=warps,
        )
    if not with_gradients:
        return values[2:], None
    block_r, block_v, warps, stages = _SECOND_PASS
    groups = triton.cdiv(rows, _ROWS_A_PROGRAM)
    partial = torch.empty(groups, vocabulary, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _second_pass_kernel[(triton.cdiv(vocabulary, block_v), groups)](
            logits,
            labels,
            top,
            total,
            partial,
            rows,
            VOCABULARY=vocabulary,
            GROUP=_ROWS_A_PROGRAM,
            BLOCK_R=block_r,
            BLOCK_V=block_v,
            STAGES=stages,
            num_warps=warps,
        )
    return values[2:], partial.sum(0)


def _turn_plain(
    logits: Tensor, labels: Tensor, with_gradients: bool
) -> tuple[Tensor, Tensor | None]:
    """What `_turn` does, in PyTorch."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    live = (labels[:, None] != IGNORED).to(wide)
    target = labels[:, None].clamp(min=0)
    log_sum = wide.logsumexp(-1, keepdim=True)
    at_label = wide.gather(-1, target)
    is_top = at_label >= wide.amax(-1, keepdim=True)
    each = torch.cat([log_sum - at_label, is_top.to(wide)], dim=-1).mul_(live).T
    if not with_gradients:
        return each, None
    slope = wide.sub_(log_sum).exp_().mul_(live).scatter_add_(-1, target, -live)
    logits.copy_(slope)
    return each, slope.sum(0)


# An operation of its own, opaque to the compiler, which would unroll the loop over chunks.
@torch.library.custom_op("clinical_modernbert::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    counted: int,
    with_gradients: bool,
    in_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, its gradients by hidden, weight and bias, and what `linear_cross_entropy_each` says
    of each row.

    All of them are fp32 (or fp64). Without gradients these are empty.
    """
    gradients = _empty_gradients(hidden, weight, bias, with_gradients)
    each = gradients[0].new_zeros((2, *labels.shape))
    grad_hidden, grad_weight, grad_bias = gradients
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    elements = _ELEMENTS_A_CHUNK if in_triton else _ELEMENTS_A_PLAIN_CHUNK
    most = min(max(1, elements // max(vocabulary, hidden.shape[1])), _MOST_ROWS)
    rows = min(rows, -(-counted // _ROWS_MULTIPLE) * _ROWS_MULTIPLE)
    buffer = hidden.new_empty((min(rows, most), vocabulary))
    grad_hidden[rows:] = 0
    grad_bias.zero_()
    if rows == 0:
        grad_weight.zero_()
    # As even as can be, and of whole multiples, for the library and for the passes' compiler.
    chunk = -(-rows // max(1, -(-rows // most)))
    chunk = min(-(-chunk // _ROWS_MULTIPLE) * _ROWS_MULTIPLE, most)
    for start in range(0, rows, max(1, chunk)):
        part = slice(start, min(start + chunk, rows))
        logits = buffer[: part.stop - part.start]
        torch.addmm(bias, hidden[part], weight.T, out=logits)
        turn = _turn if in_triton else _turn_plain
        each[:, part], column_sums = turn(logits, labels[part].contiguous(), with_gradients)
        if column_sums is not None:
            grad_bias += column_sums
            _product(grad_hidden[part], logits, weight, accumulate=False)
            _product(grad_weight, logits.T, hidden[part], accumulate=start > 0)
    return each[0, :rows].sum(), *gradients, each


def _product(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """out = a b, or out += a b, in fp32 though a and b are narrower."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=float(accumulate), out=out)
    elif a.is_cuda and accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # a CPU has no product of narrow numbers with a wide result
        out.copy_(out + a @ b if accumulate else a @ b)


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    counted: int,
    with_gradients: bool,
    in_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss, each = (hidden.new_empty(shape, dtype=wide) for shape in ((), (2, *labels.shape)))
    return loss, *_empty_gradients(hidden, weight, bias, with_gradients), each


def _empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    of_hidden, of_weight, of_bias = (
        tensor.new_empty(tensor.shape if with_gradients else (0,), dtype=wide)
        for tensor in (hidden, weight, bias)
    )
    return of_hidden, of_weight, of_bias


def _scale(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if gradient.is_cuda and dtype != gradient.dtype:
        return scale_narrow(gradient, scale, dtype)
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, *_ = inputs
    ctx.save_for_backward(*output[1:4])
    # Without it, zeros as large as the saved gradients would be made for these outputs' own.
    ctx.set_materialize_grads(False)
    ctx.dtype = hidden.dtype


def _backward(ctx, grad_loss: Tensor, *_: Tensor):  # type: ignore[no-untyped-def]
    # Scaled before they are rounded: a loss scaled for fp16 keeps its small gradients. In one step
    # each, without a temporary as large as the fp32 gradient of the weight.
    scaled = [_scale(gradient, grad_loss, ctx.dtype) for gradient in ctx.saved_tensors]
    return *scaled, None, None, None, None


_linear_cross_entropy.register_autograd(_backward, setup_context=_save_for_backward)
