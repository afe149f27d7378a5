"""What the rule for kernels, `assert_close` of conftest.py, lets pass and what it does not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

TYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The truth, it rounded once, and half a unit in the last place of each number."""
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return exact, exact.to(dtype), torch.finfo(dtype).eps * 2.0 ** (exact.abs().log2().floor() - 1)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_one_error_is_seen_by_its_size(
    dtype: torch.dtype, assert_close: Callable[..., None]
) -> None:
    exact, plain, half = make_case(dtype)
    assert_close("as PyTorch", plain, plain, exact)
    one = plain.double()
    one[7] = exact[7] + 1.5 * (plain.double() - exact).abs().max() + 9 * half[7]
    with pytest.raises(AssertionError, match="one: off by"):
        assert_close("one", one.to(dtype), plain, exact)
    # Of larger numbers that cancelled 2 units in the last place of fp32 may be left.
    terms = 9 * float(half[7]) / torch.finfo(torch.float32).eps
    assert_close("cancelled", one.to(dtype), plain, exact, terms)


def test_elements_are_held_to_the_formula_and_the_norm_to_pytorch(
    assert_close: Callable[..., None],
) -> None:
    exact, plain, half = make_case(torch.float32)
    formula, more = plain.clone(), plain.clone()
    formula[3] = exact[3] + 20 * half[3]
    assert_close("as it", formula, plain, exact, formula=formula)
    more[3] = exact[3] + 50 * half[3]
    with pytest.raises(AssertionError, match="more: off by"):
        assert_close("more", more, plain, exact, formula=formula)
    many = (exact * (1 + 19 * torch.finfo(torch.float32).eps)).float()
    with pytest.raises(AssertionError, match=r"many: off by .* of all of it"):
        assert_close("many", many, plain, exact, formula=many)


@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
def test_many_small_errors_are_seen_together(
    dtype: torch.dtype, assert_close: Callable[..., None]
) -> None:
    """Each number rounded away from the truth instead of to it, by less than a unit."""
    exact, plain, half = make_case(dtype)
    away = plain.double() + 2 * half * torch.where(plain.double() > exact, -1.0, 1.0)
    assert bool(((away - exact).abs() <= 2 * half).all())
    with pytest.raises(AssertionError, match=r"many: off by .* of all of it"):
        assert_close("many", away.to(dtype), plain, exact)


def test_fp32_is_allowed_two_units_of_all_of_it(assert_close: Callable[..., None]) -> None:
    exact, plain, _ = make_case(torch.float32)
    eps = torch.finfo(torch.float32).eps
    assert_close("2 units", (exact * (1 + 1.9 * eps)).float(), plain, exact)
    with pytest.raises(AssertionError, match="3 units: off by"):
        assert_close("3 units", (exact * (1 + 3 * eps)).float(), plain, exact)


def test_what_is_no_number_is_seen(assert_close: Callable[..., None]) -> None:
    exact, plain, _ = make_case(torch.float32)
    wrong = plain.clone()
    wrong[0] = float("nan")
    with pytest.raises(AssertionError, match="off by nan"):
        assert_close("no number", wrong, plain, exact)
