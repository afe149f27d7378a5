"""Fixtures that several test folders share."""

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

# Tests on a GPU need none of it, and a machine with one may have little more than torch.
if find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    # Examples may take any time: on a busy machine the time of one says nothing about the code. All
    # else stays as it is, above all that CI, where hypothesis sees $CI, draws the same ones always.
    settings.register_profile(
        "any_load", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("any_load")

# Without a GPU the Triton kernels run in Triton's interpreter. A kernel is bound to it or not when
# its module is imported, so this comes before any test module.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """For tests/train/test_golden_curve.py."""
    parser.addoption("--write-golden-curve", action="store_true", help="write it down anew")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real input files, `$SHARED_DATA` or ../shared/data; skips without it."""
    folder = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data")).resolve()
    if not (folder / "pubmed").is_dir():
        pytest.skip(f"the real input files are not at {folder}; set SHARED_DATA to their folder")
    return folder


@pytest.fixture(autouse=True)
def memory_given_back() -> Iterator[None]:
    """After a test on a GPU its memory is free for others: for runs that it starts, and for the
    processes of `pytest -n`, each of which would keep the most that any of its tests took."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """The rule for kernels and attention: at most 1.5 times the error of plain PyTorch, plus 2 ulp,
    in each element and, for what a few large errors would hide, in the norm over all of them.

    In an element these are ulp of its own; in the norm those of one element of size, and of fp32
    in all. terms: the size of fp32 numbers that a sum leaves an element of, 2 ulp of which may be
    left in it; not in the norm. formula: what plain PyTorch makes by the kernel's formula, where
    that errs more in an element than PyTorch's own; elements are held to it, the norm is not.
    """

    def check(
        what: str,
        actual: Tensor,
        plain: Tensor,
        exact: Tensor,
        terms: float = 0,
        formula: Tensor | None = None,
    ) -> None:
        assert actual.dtype == plain.dtype
        assert actual.shape == plain.shape == exact.shape
        if exact.numel() == 0:
            return
        actual, plain, exact = actual.detach(), plain.detach(), exact.detach()
        eps, fp32 = (torch.finfo(dtype).eps for dtype in (actual.dtype, torch.float32))
        error, error_of_plain = ((value.double() - exact).abs() for value in (actual, plain))
        in_all = [float(value.norm()) for value in (error, error_of_plain, exact)]
        relative, of_plain = (value / max(in_all[2], 1e-300) for value in in_all[:2])
        print(f"{what}: relative error {relative:.2e}, PyTorch's {of_plain:.2e}")
        largest = (error_of_plain if formula is None else (formula.double() - exact).abs()).max()
        allowed = 1.5 * largest + 2 * fp32 * terms + 2 * eps * exact.abs()
        assert bool((error <= allowed).all()), f"{what}: off by {float(error.max())}"
        slack = 2 * (eps / exact.numel() ** 0.5 + fp32) * in_all[2]
        assert in_all[0] <= 1.5 * in_all[1] + slack, (
            f"{what}: off by {relative:.2e} of all of it, PyTorch by {of_plain:.2e}"
        )

    return check
