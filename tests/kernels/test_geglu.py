"""GeGLU, alone and with the linear map behind it: the kernels against fp64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.geglu import (
    _geglu,
    _geglu_backward,
    _geglu_linear,
    geglu,
    geglu_linear,
    geglu_linear_reference,
    geglu_reference,
)

# Rows and half a row: no multiple of a tile, one element, the base and large widths, none.
SHAPES = [(5, 24), (37, 130), (1, 1), (3, 1152), (2, 2624), (9, 300), (0, 24)]
ROWS = [7, 300, 64, 2, 129, 1000, 31, 512, 77, 78, *range(3, 120, 12)]


def run(function: Callable, x: Tensor, grad: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    out = function(leaf)
    return [out, *torch.autograd.grad(out, leaf, grad.to(out.dtype))]


def check(
    what: str, a: Tensor, results: list[list[Tensor]], assert_close: Callable[..., None]
) -> None:
    """Ours, PyTorch's and the truth; what is small, below 0, apart from what would hide it."""
    for name, *values in zip(("forward", "gradient"), *results, strict=True):
        below = (a < 0).repeat(1, values[0].shape[1] // a.shape[1])
        for side, where in (("above", ~below), ("below", below)):
            assert_close(f"geglu {what} {name} {side} 0", *(value[where] for value in values))


def make_case(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows + width)
    x = 2 * torch.randn(rows, 2 * width, generator=generator)
    grad = torch.randn(rows, width, generator=generator)
    return [x.to(device, dtype), grad.to(device, dtype)]


def run_linear(function: Callable, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = [value.clone().requires_grad_() for value in (x, weight)]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def make_linear_case(
    rows: int, width: int, dtype: torch.dtype, device: torch.device, features: int = 17
) -> list[Tensor]:
    """x, a weight to so many features, and a gradient."""
    x, _ = make_case(rows, width, dtype, device)
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(features, width, generator=generator) / width**0.5
    grad = torch.randn(rows, features, generator=generator)
    return [x, weight.to(device, dtype), grad.to(device, dtype)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradient_are_as_exact_as_pytorch(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    assert_close: Callable[..., None],
) -> None:
    x, grad = make_case(*shape, dtype, device)
    results = [run(geglu, x, grad), run(geglu_reference, x, grad)]
    results.append(run(geglu_reference, x.double(), grad))
    check(f"{shape}", x.chunk(2, dim=-1)[0], results, assert_close)


@pytest.mark.parametrize("kind", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(5, 24), (37, 130), (3, 1152)], ids=str)
def test_the_form_with_tanh_would_be_seen(
    shape: tuple[int, int], kind: torch.dtype, assert_close: Callable[..., None]
) -> None:
    def with_tanh(x: Tensor) -> Tensor:
        a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
        return (F.gelu(a, approximate="tanh") * b).to(x.dtype)

    x, grad = make_case(*shape, kind, torch.device("cpu"))
    plain, exact = run(geglu_reference, x, grad), run(geglu_reference, x.double(), grad)
    for wrong in ([run(with_tanh, x, grad)[0], plain[1]], [plain[0], run(with_tanh, x, grad)[1]]):
        with pytest.raises(AssertionError, match=" 0: off by"):
            check("with tanh", x.chunk(2, dim=-1)[0], [wrong, plain, exact], assert_close)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_backward_makes_again_what_the_forward_made_to_the_bit(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    x, grad = make_case(*shape, dtype, device)
    alone, nothing = _geglu_backward(x, grad, False)
    beside, again = _geglu_backward(x, grad, True)
    assert torch.equal(beside, alone)
    assert torch.equal(again, _geglu(x))
    assert nothing.numel() == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_its_linear_map_it_is_as_exact_as_pytorch(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    assert_close: Callable[..., None],
) -> None:
    x, weight, grad = make_linear_case(*shape, dtype, device)
    ours = run_linear(geglu_linear, x, weight, grad)
    plain = run_linear(geglu_linear_reference, x, weight, grad)
    exact = run_linear(geglu_linear_reference, x.double(), weight.double(), grad)
    names = ("forward", "gradient", "gradient of the weight")
    for what, *values in zip(names, ours, plain, exact, strict=True):
        assert_close(f"geglu_linear {shape} {what}", *values)


def test_with_its_linear_map_it_keeps_its_input_alone(device: torch.device) -> None:
    x, weight, _ = make_linear_case(37, 130, torch.float32, device)
    leaves = [value.clone().requires_grad_() for value in (x, weight)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        geglu_linear(*leaves)
    assert {t.data_ptr() for t in kept} == {leaf.data_ptr() for leaf in leaves}


def test_the_whole_range_of_the_error_function(
    dtype: torch.dtype, device: torch.device, assert_close: Callable[..., None]
) -> None:
    """Both tails, around zero, and numbers whose powers overflow fp32."""
    a = torch.cat([torch.linspace(-15, 15, 3001), torch.logspace(-30, 30, 61)]).to(dtype)
    a = torch.cat([a, -a])
    a = a[a.isfinite()]
    x = torch.cat([a, torch.ones_like(a)])[None].to(device)
    grad = torch.ones(1, len(a), dtype=dtype, device=device)
    results = [run(geglu, x, grad), run(geglu_reference, x, grad)]
    results.append(run(geglu_reference, x.double(), grad))
    moderate = (a.abs() < 20).to(device)
    within = [moderate, moderate.repeat(2)]
    for ours, plain, where in zip(*results[:2], within, strict=True):
        assert bool(ours.isfinite().all())
        assert torch.equal(ours[:, ~where], plain[:, ~where])
    results = [
        [value[:, where] for value, where in zip(values, within, strict=True)] for values in results
    ]
    check("range", a.to(device)[None, moderate], results, assert_close)


def test_not_a_number_stays_one(device: torch.device) -> None:
    x = torch.tensor([[float("nan"), 1.0], [1.0, float("nan")], [1.0, 1.0]], device=device)
    assert geglu(x).isnan().flatten().tolist() == [True, True, False]


def test_every_output_is_written(device: torch.device, poisoned: None) -> None:
    x, grad = make_case(37, 130, torch.float32, device)
    assert all(bool(value.isfinite().all()) for value in run(geglu, x, grad))
    found = run_linear(geglu_linear, *make_linear_case(37, 130, torch.float32, device))
    assert all(bool(value.isfinite().all()) for value in found)


def test_leading_dimensions_and_non_contiguous_input(device: torch.device) -> None:
    x, grad = make_case(6, 20, torch.float32, device)
    expected = run(geglu, x, grad)
    twice = x.repeat_interleave(2, dim=0)[::2]
    assert not twice.is_contiguous()
    assert torch.equal(geglu(twice), expected[0])
    folded = run(geglu, x.view(2, 3, 40), grad.view(2, 3, 20))
    assert torch.equal(folded[0].flatten(0, 1), expected[0])
    assert torch.equal(folded[1].flatten(0, 1), expected[1])
    leaf = x.clone().requires_grad_()
    geglu(leaf).sum().backward()  # its gradient has strides of zero
    assert torch.equal(leaf.grad, run(geglu, x, torch.ones_like(grad))[1])


def test_leading_dimensions_and_non_contiguous_input_of_the_linear_map(
    device: torch.device,
) -> None:
    x, weight, grad = make_linear_case(6, 20, torch.float32, device)
    expected = run_linear(geglu_linear, x, weight, grad)
    twice = x.repeat_interleave(2, dim=0)[::2]
    standing = weight.T.contiguous().T
    assert not twice.is_contiguous()
    assert not standing.is_contiguous()
    torch.testing.assert_close(geglu_linear(twice, standing), expected[0])
    folded = run_linear(geglu_linear, x.view(2, 3, 40), weight, grad.view(2, 3, 17))
    for ours, theirs in zip(folded, expected, strict=True):
        assert torch.equal(ours.reshape(theirs.shape), theirs)
    leaves = [value.clone().requires_grad_() for value in (x, weight)]
    geglu_linear(*leaves).sum().backward()  # its gradient has strides of zero
    ones = run_linear(geglu_linear, x, weight, torch.ones_like(grad))
    for leaf, theirs in zip(leaves, ones[1:], strict=True):
        torch.testing.assert_close(leaf.grad, theirs)


def test_twice_the_same_bits(device: torch.device) -> None:
    x, grad = make_case(37, 130, torch.float32, device)
    for one, two in zip(run(geglu, x, grad), run(geglu, x, grad), strict=True):
        assert torch.equal(one, two)


def test_wrong_input_is_refused(device: torch.device) -> None:
    with pytest.raises(TypeError, match=r"not torch\.float64"):
        geglu(torch.zeros(2, 4, dtype=torch.float64, device=device))
    for shape in ((2, 3), (2, 0), (0,), ()):
        with pytest.raises(ValueError, match=r"takes \(…, 2 I\), I at least 1, not \("):
            geglu(torch.zeros(shape, device=device))
    with pytest.raises(ValueError, match="I at least 1"):
        geglu_linear(torch.zeros(2, 0, device=device), torch.zeros(3, 0, device=device))
    x = torch.zeros(2, 4, device=device)
    with pytest.raises(TypeError, match=r"one dtype, not torch\.float32, torch\.float16"):
        geglu_linear(x, torch.zeros(3, 2, device=device, dtype=torch.float16))
    for shape in ((3, 4), (3,), (3, 2, 1)):
        with pytest.raises(ValueError, match=r"takes \(…, 2 I\) and \(D, I\), not \(2, 4\)"):
            geglu_linear(x, torch.zeros(*shape, device=device))


def test_registration(device: torch.device, opcheck: Callable[..., None]) -> None:
    x, grad = make_case(5, 24, torch.float32, device)
    opcheck(_geglu, (x,))
    opcheck(_geglu, (x.clone().requires_grad_(),))
    for again in (False, True):
        opcheck(_geglu_backward, (x, grad, again))
    weight = torch.randn(7, 24, device=device)
    opcheck(_geglu_linear, (x, weight))
    opcheck(_geglu_linear, (x.clone().requires_grad_(), weight.requires_grad_()))


@pytest.mark.gpu
def test_one_graph_for_every_number_of_rows(compiles_twice: Callable[..., None]) -> None:
    compiles_twice(
        geglu, [make_case(rows, 96, torch.bfloat16, torch.device("cuda"))[:1] for rows in ROWS]
    )


@pytest.mark.gpu
def test_one_graph_for_every_number_of_rows_of_the_linear_map(
    compiles_twice: Callable[..., None],
) -> None:
    gpu = torch.device("cuda")
    # 24 features, a multiple of 8 as a model's widths are. Any other count inductor may pad, and in
    # torch 2.11 it decides by the rows, with a guard on them (below 17, up to 96, above).
    cases = [make_linear_case(rows, 96, torch.bfloat16, gpu, 24)[:2] for rows in ROWS]
    compiles_twice(geglu_linear, cases)


@pytest.mark.gpu
def test_offsets_beyond_31_bits() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    rows = 2**31 // 2304 + 100
    x = torch.zeros(rows, 2304, dtype=torch.bfloat16, device="cuda")
    x[-100:] = torch.randn(100, 2304, device="cuda")
    leaf = x.requires_grad_()
    out = geglu(leaf)
    (gradient,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    end = x[-100:].detach().clone().requires_grad_()
    expected = geglu(end)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), end)
    assert torch.equal(out[-100:], expected)
    assert torch.equal(gradient[-100:], expected_gradient)
    assert not bool(out[:-100].any())
