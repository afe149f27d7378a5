"""StableAdamW's two passes: the kernels against fp64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.stable_adamw import (
    Pieces,
    apply_update,
    apply_update_reference,
    update_moments,
    update_moments_reference,
)

# Many chunks, one element, none, and padding before, between and after pieces.
PIECES: Pieces = ((3, 203), (203, 204), (204, 204), (210, 310), (310, 331))
# All begin and end on fours, and are so loaded, or on twos; an empty one may begin anywhere.
ALIGNED: Pieces = ((4, 204), (207, 207), (208, 308), (308, 332))
HALF_ALIGNED: Pieces = ((2, 206), (206, 302), (302, 332))
LENGTH, EPS, DECAY = 340, 1e-3, 0.2


def make_case(device: torch.device, length: int = LENGTH) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(2)
    values = torch.randn(4, length, generator=draw)
    gradient, mean, square, weights = values[0], 0.1 * values[1], values[2] ** 2, values[3]
    # Squares below ε², and none at all.
    square[50:60], square[60:70], gradient[60:65] = 1e-9, 0.0, 0.0
    case = {"gradient": 3 * gradient, "mean": mean, "square": square, "weights": weights}
    return {name: value.to(device) for name, value in case.items()}


def run(
    functions: tuple[Callable, Callable],
    case: dict[str, Tensor],
    dtype: torch.dtype,
    skip: float,
    pieces: Pieces = PIECES,
) -> dict[str, Tensor]:
    """What is left after both passes, and the sums."""
    case = {name: value.to(dtype, copy=True) for name, value in case.items()}
    moments, update = functions
    gradient, mean, square, weights = case.values()
    scalars = [
        torch.tensor(value, dtype=dtype).to(mean.device) for value in ([0.1, 0.7], 2.0, skip)
    ]
    sums = moments(gradient, mean, square, *scalars, EPS, pieces)
    rates = torch.linspace(0.1, 0.5, len(pieces), dtype=dtype).to(mean.device)
    update(weights, mean, square, rates, DECAY, EPS, pieces)
    return {"mean": mean, "square": square, "weights": weights, "sums": sums}


KERNELS = (update_moments, apply_update)
REFERENCES = (update_moments_reference, apply_update_reference)


@pytest.mark.parametrize("pieces", [PIECES, ALIGNED, HALF_ALIGNED], ids=["odd", "fours", "twos"])
def test_both_passes_are_as_exact_as_pytorch(
    pieces: Pieces, device: torch.device, assert_close: Callable[..., None], poisoned: object
) -> None:
    check(make_case(device), pieces, assert_close)


@pytest.mark.gpu
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_gpu_many_chunks(shift: int, assert_close: Callable[..., None]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pieces = tuple((shift + a, shift + b) for a, b in ((0, 5_000_000), (5_000_000, 5_000_768)))
    check(make_case(torch.device("cuda"), 5_001_000), pieces, assert_close)


@pytest.mark.gpu
def test_offsets_beyond_31_bits() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device, start = torch.device("cuda"), 2**31
    case = make_case(device)
    far = {name: torch.zeros(start + LENGTH, device=device) for name in case}
    for name, value in far.items():
        value[start:] = case[name]
    shares, one = torch.tensor([0.1, 0.7], device=device), torch.ones((), device=device)
    rates = torch.full((len(PIECES),), 0.1, device=device)
    found = []
    for values, shift in ((case, 0), (far, start)):
        pieces = tuple((shift + a, shift + b) for a, b in PIECES)
        gradient, mean, square, weights = values.values()
        sums = update_moments(gradient, mean, square, shares, one, one - 1, EPS, pieces)
        apply_update(weights, mean, square, rates, DECAY, EPS, pieces)
        found.append([sums, *(value[shift:] for value in (mean, square, weights))])
    for near, distant in zip(*found, strict=True):
        assert torch.equal(near, distant)


def check(case: dict[str, Tensor], pieces: Pieces, assert_close: Callable[..., None]) -> None:
    """The kernels against both references, and what lies between pieces as it was."""
    ours = run(KERNELS, case, torch.float32, 0.0, pieces)
    plain = run(REFERENCES, case, torch.float32, 0.0, pieces)
    exact = run(REFERENCES, case, torch.float64, 0.0, pieces)
    held = torch.zeros_like(case["mean"], dtype=torch.bool)
    for start, stop in pieces:
        held[start:stop] = True
    assert_close("sums", ours["sums"], plain["sums"], exact["sums"])
    for name in ("mean", "square", "weights"):
        assert_close(name, ours[name][held], plain[name][held], exact[name][held])
        assert torch.equal(ours[name][~held], case[name][~held]), "padding is left alone"
    for i, (start, stop) in enumerate(pieces):
        assert start < stop or ours["sums"][i] == 0


def test_a_skipped_step_takes_nothing_of_its_gradient(device: torch.device) -> None:
    case = make_case(device)
    case["gradient"][:100] = torch.inf
    case["gradient"][100:] = torch.nan
    found = run(KERNELS, case, torch.float32, 1.0)
    exact = run(REFERENCES, case, torch.float64, 1.0)
    for name, value in found.items():
        assert value.isfinite().all(), name
        held = slice(PIECES[0][0], PIECES[0][1])
        torch.testing.assert_close(value[held].double(), exact[name][held], rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    flat = torch.zeros(8, device=device)
    shares, one = torch.ones(2, device=device), torch.ones((), device=device)
    with pytest.raises(TypeError, match="fp32"):
        update_moments(flat.double(), flat, flat, shares, one, one, EPS, ((0, 8),))
    with pytest.raises(ValueError, match="one length"):
        update_moments(flat[:4], flat, flat, shares, one, one, EPS, ((0, 8),))
    with pytest.raises(ValueError, match="contiguous"):
        apply_update(flat[::2], flat[::2], flat[::2], one[None], 0.0, EPS, ((0, 4),))
