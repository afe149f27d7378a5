"""Residual add and LayerNorm without bias in one pass, and their backward in another.

    s = x + r                      (rounded to the dtype of x, as the sum that is carried on)
    μ = mean(s),  σ = sqrt(mean((s − μ)²) + ε),  n = (s − μ) / σ
    y = w n

Both s and y are written, each once: s runs on along the residual stream, y goes into the branch.
With gradients dy and ds of the two (Ba et al. 2016, arXiv 1607.06450, without its bias):

    g       = w dy
    dx = dr = ds + (g − mean(g) − n mean(n g)) / σ,  where n g = y dy
    dw      = Σ over tokens of n dy

The backward keeps y, which the branch keeps anyway for its linear map, and 1 / σ, a number a token;
not s, x or μ. Without a bias n = y / w. So n has the rounding of y, u n with u up to half a unit in
the last place. In a row's mean square that moves dx by no more than rounding dy to the same dtype
does (u g / σ); dw is moved by Σ u n dy, so that a dw in fp32 from y in half precision is as exact
as half precision.

In fp16 that holds for weights from about 0.01 on, whose results are no subnormal numbers. In bf16
and fp32, of one range, it holds down to 1e-36, but that dw is the sum of y dy divided by w, and
loses digits where that product is subnormal: for gradients of 1e-6 below 1e-32. A weight of 0 hides
n, and one below 2⁻¹²⁶, the smallest normal number, counts as 0, as 1 / w may be infinite. There n
is taken as 0: that weight gets a gradient of 0, and its column of dx lacks n mean(n g) / σ. All
other columns and weights stay right. Whether a weight is such is not asked when it runs.

Arithmetic, 1 / σ and the weight's gradient are fp32. That gradient is summed in a fixed order: each
program over the rows it walks through, then over programs; no atomics, so two runs on one kind of
GPU give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton
from torch.nn import functional as F

SMALLEST_WEIGHT = 2.0**-126
"""in absolute value, that the backward can divide by; below it a weight counts as 0"""

# Measured on one H200 (docs/kernels.md): rows of a tile and warps; backward also how many programs
# walk over the rows on each multiprocessor, and how many tiles of a walk are under way at once.
_FORWARD_TILE = (4, 4)
_BACKWARD_TILE = (2, 2)
_PROGRAMS_A_MULTIPROCESSOR, _STAGES = 8, 3
# Without a GPU, where Triton interprets.
_PROGRAMS_INTERPRETED = 3


def layer_norm_reference(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """What `layer_norm` computes, in plain PyTorch, for any floating dtype."""
    return F.layer_norm(x_TD, weight_D.shape, weight_D, None, eps)


def add_layer_norm_reference(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """What `add_layer_norm` computes, in plain PyTorch, for any floating dtype."""
    sum_TD = x_TD + residual_TD
    return F.layer_norm(sum_TD, weight_D.shape, weight_D, None, eps), sum_TD


def layer_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """LayerNorm without bias of (…, D), differentiable in x and weight.

    x: bf16, fp16 or fp32, copied first if it is not contiguous. weight: (D,), any of these; its
    gradient is summed in fp32 and rounded once. Where the weight is 0 it gets no gradient, and x in
    its column not all of it (see the module's text). Raises TypeError or ValueError otherwise.
    """
    (rows_TD,) = _rows(weight_D, x_TD)
    normed_TD, _ = _layer_norm(rows_TD, weight_D, eps)
    return normed_TD.view(x_TD.shape)


def add_layer_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(LayerNorm of x + residual, x + residual), both (…, D), differentiable.

    As `layer_norm`; residual has the shape and dtype of x.
    """
    rows_TD, residual_rows_TD = _rows(weight_D, x_TD, residual_TD)
    normed_TD, sum_TD, _ = _add_layer_norm(rows_TD, residual_rows_TD, weight_D, eps)
    return normed_TD.view(x_TD.shape), sum_TD.view(x_TD.shape)


def _rows(weight: Tensor, *inputs: Tensor) -> list[Tensor]:
    """One or two inputs as contiguous (rows, D), once they are found to fit the weight."""
    x, other = inputs[0], inputs[-1]
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    if x.dtype not in kinds or weight.dtype not in kinds:
        raise TypeError(
            f"layer_norm takes bf16, fp16 or fp32, not {x.dtype} with a weight of {weight.dtype}"
        )
    if weight.dim() != 1 or x.dim() < 1 or x.shape[-1] != weight.shape[0] or x.shape[-1] == 0:
        raise ValueError(
            f"a weight of {tuple(weight.shape)} does not fit an input of {tuple(x.shape)}: "
            "they need one width, at least 1"
        )
    if other.shape != x.shape or other.dtype != x.dtype:
        raise ValueError(
            f"the residual is {tuple(other.shape)} {other.dtype}, "
            f"the input {tuple(x.shape)} {x.dtype}; they must be alike"
        )
    return [value.reshape(-1, x.shape[-1]).contiguous() for value in inputs]


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x,
    residual,  # with ADD only, like total
    weight,
    normed,
    total,
    rstd,
    rows,
    eps,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,  # WIDTH rounded up to a power of two
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_W)
    filled = (column < WIDTH)[None, :]
    inside = (row < rows)[:, None] & filled
    offset = row[:, None] * WIDTH + column[None, :]
    s = tl.load(x + offset, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if ADD:
        r = tl.load(residual + offset, mask=inside, other=0.0, eviction_policy="evict_first")
        rounded = (s + r.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + offset, rounded, mask=inside)
        s = rounded.to(tl.float32)
    mean = tl.sum(s, 1) / WIDTH
    centred = tl.where(filled, s - mean[:, None], 0.0)
    # Once more, because the mean of large numbers has lost digits.
    rest = tl.sum(centred, 1) / WIDTH
    centred = tl.where(filled, centred - rest[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    result = centred * inverse[:, None] * w[None, :]
    tl.store(normed + offset, result.to(normed.dtype.element_ty), mask=inside)
    tl.store(rstd + row, inverse, mask=row < rows)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    normed,
    weight,
    rstd,
    grad_normed,
    grad_total,  # with ADD only
    grad_x,
    partial,  # (programs, WIDTH) fp32
    rows,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_W)
    filled = column < WIDTH
    divisor = tl.load(weight + column, mask=filled, other=0.0).to(tl.float32)
    # So n is 0 in the columns behind the last one, too.
    hidden = tl.abs(divisor) < SMALLEST
    inverse_w = tl.where(hidden, 0.0, 1.0 / tl.where(hidden, 1.0, divisor))
    grad_w = tl.zeros((BLOCK_R, BLOCK_W), dtype=tl.float32)
    tiles = tl.cdiv(rows, BLOCK_R)
    for tile in tl.range(program, tiles, tl.num_programs(0), num_stages=STAGES):
        row = (tile * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        live = row < rows
        inside = live[:, None] & filled[None, :]
        offset = row[:, None] * WIDTH + column[None, :]
        y = tl.load(normed + offset, mask=inside, other=0.0, eviction_policy="evict_first")
        dy = tl.load(grad_normed + offset, mask=inside, other=0.0, eviction_policy="evict_first")
        if ADD:
            ds = tl.load(grad_total + offset, mask=inside, other=0.0, eviction_policy="evict_first")
        inverse = tl.load(rstd + row, mask=live, other=0.0)
        y = y.to(tl.float32)
        dy = dy.to(tl.float32)
        along = y * dy
        grad_w += along
        # Read again for every row, from the cache: kept beside 1 / w it would take the registers of
        # a quarter of the programs, and dividing every element half as many instructions again.
        w = tl.load(weight + column, mask=filled, other=0.0)
        g = dy * w.to(tl.float32)[None, :]
        along_one = tl.sum(g, 1) / WIDTH
        along_n = tl.sum(along, 1) / WIDTH
        n = y * inverse_w[None, :]
        dx = (g - along_one[:, None] - n * along_n[:, None]) * inverse[:, None]
        if ADD:
            dx += ds.to(tl.float32)
        tl.store(grad_x + offset, dx.to(grad_x.dtype.element_ty), mask=inside)
    # Σ n dy, as w is the same in every row.
    tl.store(partial + program * WIDTH + column, tl.sum(grad_w, 0) * inverse_w, mask=filled)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm, sum (x itself without a residual) and 1 / σ of each row."""
    rows, width = x.shape
    normed = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    rstd = x.new_empty(rows, dtype=torch.float32)
    if x.numel() > 0:
        block_r, warps = _FORWARD_TILE
        with torch.cuda.device_of(x):
            wrap_triton(_forward_kernel)[(triton.cdiv(rows, block_r),)](
                x,
                residual,
                weight.contiguous(),
                normed,
                None if residual is None else total,
                rstd,
                rows,
                eps,
                WIDTH=width,
                ADD=residual is not None,
                BLOCK_R=block_r,
                BLOCK_W=triton.next_power_of_2(width),
                num_warps=warps,
            )
    return normed, total, rstd


@triton_op("clinical_modernbert::layer_norm", mutates_args={})
def _layer_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed, _, rstd = _forward(x, None, weight, eps)
    return normed, rstd


@triton_op("clinical_modernbert::add_layer_norm", mutates_args={})
def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, residual, weight, eps)


@triton_op("clinical_modernbert::layer_norm_backward", mutates_args={})
def _layer_norm_backward(
    normed: Tensor,
    weight: Tensor,
    rstd: Tensor,
    grad_normed: Tensor,
    grad_total: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradient by the sum (hence by x and residual) and, in fp32, by the weight."""
    rows, width = normed.shape
    grad_x = torch.empty_like(normed)
    if normed.numel() == 0:
        return grad_x, weight.new_zeros(weight.shape, dtype=torch.float32)
    block_r, warps = _BACKWARD_TILE
    programs = min(_programs(normed.device), triton.cdiv(rows, block_r))
    partial = normed.new_empty((programs, width), dtype=torch.float32)
    with torch.cuda.device_of(normed):
        wrap_triton(_backward_kernel)[(programs,)](
            normed,
            weight.contiguous(),
            rstd,
            grad_normed,
            grad_total,
            grad_x,
            partial,
            rows,
            WIDTH=width,
            ADD=grad_total is not None,
            SMALLEST=SMALLEST_WEIGHT,
            BLOCK_R=block_r,
            BLOCK_W=triton.next_power_of_2(width),
            STAGES=_STAGES,
            num_warps=warps,
        )
    return grad_x, partial.sum(0)


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROGRAMS_INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count * _PROGRAMS_A_MULTIPROCESSOR


@_layer_norm.register_fake
def _layer_norm_fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)


@_add_layer_norm.register_fake
def _add_layer_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rstd = x.new_empty(x.shape[0], dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(x), rstd


@_layer_norm_backward.register_fake
def _layer_norm_backward_fake(
    normed: Tensor,
    weight: Tensor,
    rstd: Tensor,
    grad_normed: Tensor,
    grad_total: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(normed), weight.new_empty(weight.shape, dtype=torch.float32)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, weight, _ = inputs
    normed, rstd = output
    ctx.save_for_backward(normed, weight, rstd)
    ctx.mark_non_differentiable(rstd)


def _backward(ctx, grad_normed: Tensor, *_: Tensor):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors
    grad_x, grad_weight = _layer_norm_backward(*saved, grad_normed.contiguous(), None)
    return grad_x, grad_weight.to(saved[1].dtype), None


def _save_for_backward_of_sum(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, _, weight, _ = inputs
    normed, _, rstd = output
    ctx.save_for_backward(normed, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _backward_of_sum(ctx, grad_normed: Tensor | None, grad_total: Tensor | None, *_: Tensor):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors
    if grad_normed is None:
        return grad_total, grad_total, None, None
    # No gradient by the sum where nothing reads it, as behind the last layer.
    along_sum = None if grad_total is None else grad_total.contiguous()
    grad_x, grad_weight = _layer_norm_backward(*saved, grad_normed.contiguous(), along_sum)
    return grad_x, grad_x, grad_weight.to(saved[1].dtype), None


_layer_norm.register_autograd(_backward, setup_context=_save_for_backward)
_add_layer_norm.register_autograd(_backward_of_sum, setup_context=_save_for_backward_of_sum)
