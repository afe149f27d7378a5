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
LENGTH, EPS, DECAY = 340, 1e-3, 0.2


def make_case(device: torch.device) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(2)
    values = torch.randn(4, LENGTH, generator=draw)
    gradient, mean, square, weights = values[0], 0.1 * values[1], values[2] ** 2, values[3]
    # Squares below ε², and none at all.
    square[50:60], square[60:70], gradient[60:65] = 1e-9, 0.0, 0.0
    case = {"gradient": 3 * gradient, "mean": mean, "square": square, "weights": weights}
    return {name: value.to(device) for name, value in case.items()}


def run(
    functions: tuple[Callable, Callable], case: dict[str, Tensor], dtype: torch.dtype, skip: float
) -> dict[str, Tensor]:
    """What is left after both passes, and the sums."""
    case = {name: value.to(dtype, copy=True) for name, value in case.items()}
    moments, update = functions
    gradient, mean, square, weights = case.values()
    scalars = [
        torch.tensor(value, dtype=dtype).to(mean.device) for value in ([0.1, 0.7], 2.0, skip)
    ]
    sums = moments(gradient, mean, square, *scalars, EPS, PIECES)
    rates = torch.linspace(0.1, 0.5, len(PIECES), dtype=dtype).to(mean.device)
    update(weights, mean, square, rates, DECAY, EPS, PIECES)
    return {"mean": mean, "square": square, "weights": weights, "sums": sums}


KERNELS = (update_moments, apply_update)
REFERENCES = (update_moments_reference, apply_update_reference)


def test_both_passes_are_as_exact_as_pytorch(
    device: torch.device, assert_close: Callable[..., None], poisoned: object
) -> None:
    case = make_case(device)
    ours = run(KERNELS, case, torch.float32, 0.0)
    plain = run(REFERENCES, case, torch.float32, 0.0)
    exact = run(REFERENCES, case, torch.float64, 0.0)
    inside = torch.zeros(LENGTH, dtype=torch.bool)
    for start, stop in PIECES:
        inside[start:stop] = True
    for name in exact:
        held = slice(None) if name == "sums" else inside.to(device)
        assert_close(name, ours[name][held], plain[name][held], exact[name][held])
        if name != "sums":
            assert torch.equal(ours[name][~held], case[name][~held]), "padding is left alone"
    assert ours["sums"][2] == 0


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
