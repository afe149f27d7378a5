"""Residual add and LayerNorm: the kernels against fp64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.layer_norm import (
    SMALLEST_WEIGHT,
    _add_layer_norm,
    _layer_norm,
    _layer_norm_backward,
    add_layer_norm,
    add_layer_norm_reference,
    layer_norm,
    layer_norm_reference,
)

# Rows and width: no multiple of a tile, one row, the base and large widths, none.
SHAPES = [(37, 24), (1, 96), (5, 6), (13, 768), (3, 1024), (0, 24)]
EPS = 1e-5


def make_case(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x, residual, weight and the gradients of both results."""
    generator = torch.Generator().manual_seed(rows + width)
    x, residual, *grads = torch.randn(4, rows, width, generator=generator)
    weight = 1 + 0.3 * torch.randn(width, generator=generator)
    return [value.to(device, dtype) for value in (x, 2 * residual + 0.5, weight, *grads)]


def run(function: Callable, values: list[Tensor], wide: bool = False) -> list[Tensor]:
    """Both results and the gradients by x, residual and weight."""
    x, residual, weight, *grads = [value.double() if wide else value for value in values]
    leaves = [value.clone().requires_grad_() for value in (x, residual, weight)]
    results = function(*leaves, EPS)
    return [*results, *torch.autograd.grad(results, leaves, grads)]


def run_alone(function: Callable, values: list[Tensor], wide: bool = False) -> list[Tensor]:
    """The result without a residual and the gradients by x and weight."""
    x, _, weight, grad, _ = [value.double() if wide else value for value in values]
    leaves = [value.clone().requires_grad_() for value in (x, weight)]
    out = function(*leaves, EPS)
    return [out, *torch.autograd.grad(out, leaves, grad)]


def check_sum_norm(what: str, values: list[Tensor], assert_close: Callable[..., None]) -> None:
    """Both results of `add_layer_norm`, and its gradients, by the rule for kernels."""
    ours, plain = run(add_layer_norm, values), run(add_layer_norm_reference, values)
    exact = run(add_layer_norm_reference, values, wide=True)
    names = ("normed", "sum", "gradient by x", "gradient by residual", "gradient by weight")
    for name, *results in zip(names, ours, plain, exact, strict=True):
        assert_close(f"{what} {name}", *results)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_layer_norm_is_as_exact_as_pytorch(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    assert_close: Callable[..., None],
) -> None:
    values = make_case(*shape, dtype, device)
    check_sum_norm(f"add_layer_norm {shape}", values, assert_close)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm_is_as_exact_as_pytorch(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    assert_close: Callable[..., None],
) -> None:
    values = make_case(*shape, dtype, device)
    ours, plain = run_alone(layer_norm, values), run_alone(layer_norm_reference, values)
    exact = run_alone(layer_norm_reference, values, wide=True)
    for name, *results in zip(("normed", "by x", "by weight"), ours, plain, exact, strict=True):
        assert_close(f"layer_norm {shape} {name}", *results)


def test_sum_is_rounded_once_and_what_is_normed(device: torch.device) -> None:
    x, residual, weight, *_ = make_case(13, 48, torch.float16, device)
    normed, total = add_layer_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, layer_norm(total, weight, EPS))


def test_a_large_mean_does_not_drown_the_rest(
    device: torch.device, assert_close: Callable[..., None]
) -> None:
    values = make_case(5, 96, torch.float32, device)
    values[0] += 1000
    ours, plain = run_alone(layer_norm, values), run_alone(layer_norm_reference, values)
    exact = run_alone(layer_norm_reference, values, wide=True)
    for results in zip(ours, plain, exact, strict=True):
        assert_close("large mean", *results)


@pytest.mark.parametrize("used", ["normed", "sum"])
def test_one_result_alone_may_be_used(used: str, device: torch.device) -> None:
    values = make_case(7, 48, torch.float32, device)
    which = ("normed", "sum").index(used)
    gradients = []
    for function in (add_layer_norm, add_layer_norm_reference):
        leaves = [value.clone().requires_grad_() for value in values[:3]]
        out = function(*leaves, EPS)[which]
        gradients.append(torch.autograd.grad(out, leaves, values[3], allow_unused=True))
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_fp32_weight_beside_half_precision(device: torch.device) -> None:
    """Its gradient is not rounded, but made from y, which is: a quarter of a unit of fp16 is left.

    PyTorch, which keeps the input instead, is closer here.
    """
    values = make_case(300, 48, torch.float16, device)
    values[2] = values[2].float()
    ours = run_alone(layer_norm, values)
    exact = run_alone(layer_norm_reference, values, wide=True)
    assert ours[2].dtype == torch.float32
    error = (ours[2].double() - exact[2]).norm()
    assert error < 0.25 * torch.finfo(torch.float16).eps * exact[2].norm()


def draw_weight(kind: str, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    weight = 1 + 0.3 * torch.randn(width, generator=generator)
    signs = torch.where(torch.rand(width, generator=generator) < 0.5, -1.0, 1.0)
    scale = {
        "negative": -torch.ones(width),
        # With 1e-3, results are subnormal in fp16, and n is not to be had from them.
        "tiny": torch.full((width,), 1e-2 if dtype == torch.float16 else 1e-3),
        "large": torch.full((width,), 50.0),
        "mixed": signs * 10 ** torch.empty(width).uniform_(-3, 1.5, generator=generator),
    }
    return weight * scale[kind]


@pytest.mark.parametrize("kind", ["negative", "tiny", "large", "mixed"])
@pytest.mark.parametrize("shape", [(37, 24), (13, 768)], ids=str)
def test_weights_of_every_sign_and_size(
    kind: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    assert_close: Callable[..., None],
) -> None:
    values = make_case(*shape, dtype, device)
    values[2] = draw_weight(kind, shape[1], dtype).to(device, dtype)
    check_sum_norm(f"weights {kind} {shape}", values, assert_close)


@pytest.mark.parametrize("zero", [0.0, -0.0, SMALLEST_WEIGHT / 2])
def test_a_weight_of_zero_hides_what_was_normed(
    zero: float, device: torch.device, assert_close: Callable[..., None]
) -> None:
    """It gets no gradient, its column lacks one term, and nothing else changes."""
    values = make_case(37, 24, torch.float32, device)
    hidden = torch.arange(24, device=device) % 5 == 2
    values[2][hidden] = zero
    ours, plain = run(add_layer_norm, values), run(add_layer_norm_reference, values)
    exact = run(add_layer_norm_reference, values, wide=True)
    for *results, of_weight in zip(ours, plain, exact, [False] * 4 + [True], strict=True):
        rows = [value[None] if of_weight else value for value in results]
        assert_close("other columns", *(value[:, ~hidden] for value in rows))
    assert not bool(ours[4][hidden].any())
    x, residual, weight, grad, grad_sum = (value.double() for value in values)
    rstd = ((x + residual).var(1, correction=0) + EPS).rsqrt()
    expected = grad_sum - (grad * weight).mean(1, keepdim=True) * rstd[:, None]
    for gradient in ours[2:4]:
        assert torch.allclose(gradient[:, hidden].double(), expected[:, hidden], atol=1e-5)


def test_a_minute_weight_is_as_good_as_any(
    dtype: torch.dtype, device: torch.device, assert_close: Callable[..., None]
) -> None:
    """In the range of fp32, which bf16 has too; columns apart, as their sizes are far apart."""
    if dtype == torch.float16:
        pytest.skip("in fp16 results of such a weight are 0")
    values = make_case(37, 40, dtype, device)
    minute = torch.arange(40, device=device) % 5 == 2
    values[2][minute] *= 2.0**-100
    ours, plain = run_alone(layer_norm, values), run_alone(layer_norm_reference, values)
    exact = run_alone(layer_norm_reference, values, wide=True)
    for name, *results in zip(("normed", "by x", "by weight"), ours, plain, exact, strict=True):
        assert_close(f"minute {name}", *(value[..., minute] for value in results))
        assert_close(f"beside minute {name}", *(value[..., ~minute] for value in results))


def test_of_small_gradients_a_minute_weight_loses_digits(device: torch.device) -> None:
    """Of its own gradient alone, where y dy is subnormal; half a percent at 1e-36, by 1e-6."""
    values = make_case(37, 40, torch.float32, device)
    values[2][::5], values[3] = 1e-36, 1e-6 * values[3]
    _, by_x, by_weight = run_alone(layer_norm, values)
    _, exact_by_x, exact_by_weight = run_alone(layer_norm_reference, values, wide=True)
    for ours, exact, most in (
        (by_x[:, ::5], exact_by_x[:, ::5], 1e-6),
        (by_weight[::5], exact_by_weight[::5], 1e-2),
        (by_weight[1::5], exact_by_weight[1::5], 1e-6),
    ):
        assert (ours.double() - exact).norm() < most * exact.norm()


def test_the_smallest_weight_and_the_largest_leave_everything_finite(device: torch.device) -> None:
    values = make_case(37, 24, torch.float32, device)
    values[2][::2] = SMALLEST_WEIGHT
    values[2][1::4] = torch.finfo(torch.float32).max / 64
    for value in run_alone(layer_norm, [*values[:3], values[3] / 64, values[4]]):
        assert bool(value.isfinite().all())


def test_a_gradient_that_the_norm_takes_away_is_as_exact_as_its_own_rounding(
    dtype: torch.dtype, device: torch.device
) -> None:
    """Along n nothing passes back. What is left in its stead is at most what rounding dy leaves."""
    values = make_case(37, 96, torch.float32, device)
    weight, scale = values[2].double(), values[0].double().std(1, correction=0)
    along_n = torch.nn.functional.layer_norm(values[0].double(), (96,), eps=EPS) / weight
    values = [value.to(dtype) for value in (*values[:3], along_n, values[4])]
    ours = run_alone(layer_norm, values)[1].double()
    exact = run_alone(layer_norm_reference, values, wide=True)[1]
    error = ((ours - exact) * scale[:, None]).square().mean().sqrt()
    arithmetic = 2 * torch.finfo(torch.float32).eps
    assert error <= 0.5 * torch.finfo(dtype).eps + arithmetic


def test_what_is_kept_for_the_backward_is_the_result(device: torch.device) -> None:
    """y, the weight and a number a row: neither the sum nor an input."""
    values = make_case(37, 24, torch.float32, device)
    x, residual, weight = (value.requires_grad_() for value in values[:3])
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    for function, inputs in ((add_layer_norm, (x, residual)), (layer_norm, (x,))):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            results = function(*inputs, weight, EPS)
        normed = results[0] if isinstance(results, tuple) else results
        large = {tensor.data_ptr() for tensor in kept if tensor.numel() > 37}
        assert large == {normed.data_ptr()}


def test_every_output_is_written(device: torch.device, poisoned: None) -> None:
    values = make_case(37, 24, torch.float32, device)
    for value in (*run(add_layer_norm, values), *run_alone(layer_norm, values)):
        assert bool(value.isfinite().all())


def test_leading_dimensions_and_non_contiguous_input(device: torch.device) -> None:
    x, residual, weight, *_ = make_case(6, 20, torch.float32, device)
    expected = add_layer_norm(x, residual, weight, EPS)
    twice = x.repeat_interleave(2, dim=0)[::2]
    assert not twice.is_contiguous()
    for one, two in zip(add_layer_norm(twice, residual, weight, EPS), expected, strict=True):
        assert torch.equal(one, two)
    folded = add_layer_norm(x.view(2, 3, 20), residual.view(2, 3, 20), weight, EPS)
    assert folded[0].shape == folded[1].shape == (2, 3, 20)
    assert torch.equal(folded[0].flatten(0, 1), expected[0])
    leaves = [value.clone().requires_grad_() for value in (x, residual, weight)]
    grads = [torch.randn_like(value) for value in expected]
    apart = [grad.repeat_interleave(2, dim=0)[::2] for grad in grads]
    assert not any(grad.is_contiguous() for grad in apart)
    results = [
        torch.autograd.grad(add_layer_norm(*leaves, EPS), leaves, given) for given in (grads, apart)
    ]
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_twice_the_same_bits(device: torch.device) -> None:
    values = make_case(37, 24, torch.float32, device)
    for one, two in zip(run(add_layer_norm, values), run(add_layer_norm, values), strict=True):
        assert torch.equal(one, two)


def test_wrong_input_is_refused(device: torch.device) -> None:
    x, residual, weight, *_ = make_case(6, 20, torch.float32, device)
    with pytest.raises(TypeError, match=r"not torch\.float64"):
        layer_norm(x.double(), weight, EPS)
    with pytest.raises(ValueError, match="does not fit"):
        layer_norm(x, weight[:3], EPS)
    with pytest.raises(ValueError, match=r"weight of \(0,\) does not fit .* at least 1"):
        layer_norm(x[:, :0], weight[:0], EPS)
    with pytest.raises(ValueError, match="must be alike"):
        add_layer_norm(x, residual.half(), weight, EPS)


def test_registration(device: torch.device, opcheck: Callable[..., None]) -> None:
    x, residual, weight, grad, other = make_case(5, 24, torch.float32, device)
    leaves = [value.clone().requires_grad_() for value in (x, residual, weight)]
    opcheck(_layer_norm, (x, weight, EPS))
    opcheck(_layer_norm, (leaves[0], leaves[2], EPS))
    opcheck(_add_layer_norm, (*leaves, EPS))
    normed, rstd = _layer_norm(x, weight, EPS)
    opcheck(_layer_norm_backward, (normed, weight, rstd, grad, other))
    opcheck(_layer_norm_backward, (normed, weight, rstd, grad, None))


@pytest.mark.gpu
def test_one_graph_for_every_number_of_rows(compiles_twice: Callable[..., None]) -> None:
    def block(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        normed, total = add_layer_norm(x, residual, weight, EPS)
        return layer_norm(total + normed, weight, EPS)

    # From 3 on: of one program a compiler makes another graph, as of one row.
    rows = [7, 300, 64, 4, 129, 1000, 31, 512, 77, 78, *range(3, 120, 12)]
    device = torch.device("cuda")
    compiles_twice(block, [make_case(n, 96, torch.bfloat16, device)[:3] for n in rows])


@pytest.mark.gpu
def test_offsets_beyond_31_bits() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    rows = 2**31 // 1024 + 100
    leaf = torch.zeros(rows, 1024, dtype=torch.bfloat16, device="cuda")
    leaf[-100:] = torch.randn(100, 1024, device="cuda")
    end = leaf[-100:].clone().requires_grad_()
    leaf.requires_grad_()
    weight = torch.ones(1024, dtype=torch.bfloat16, device="cuda")
    grad = torch.randn(100, 1024, device="cuda").bfloat16()
    out = layer_norm(leaf, weight, EPS)
    (gradient,) = torch.autograd.grad(out[-100:], leaf, grad)
    expected = layer_norm(end, weight, EPS)
    assert torch.equal(out[-100:], expected)
    assert torch.equal(gradient[-100:], torch.autograd.grad(expected, end, grad)[0])
    assert not bool(gradient[:-100].any())
