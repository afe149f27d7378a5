"""Bounds and places of tokens, on every shape of row, and the clearing of what lies behind."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.documents import (
    _document_bounds,
    clear_behind_documents,
    document_bounds,
    document_bounds_reference,
    positions_from,
    positions_from_reference,
)

LAYOUTS = {
    "even": [16] * 4,
    "skewed": [97, *[3] * 11],
    "code titles": [4] * 80,
    "empty documents": [0, 5, 0, 0, 9, 0],
    "length 1": [1] * 7,
    "one document": [37],
    "no token": [0],
}


def ends_of(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)


@pytest.mark.parametrize("behind", [0, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bounds_and_places(layout: str, behind: int, device: torch.device) -> None:
    lengths = LAYOUTS[layout]
    covered = sum(lengths)
    starts = [sum(lengths[:i]) for i, length in enumerate(lengths) for _ in range(length)]
    ends = [sum(lengths[: i + 1]) for i, length in enumerate(lengths) for _ in range(length)]
    places = [place for length in lengths for place in range(length)]
    cu_seqlens = ends_of(lengths, device)
    for function in (document_bounds, document_bounds_reference):
        bounds = function(cu_seqlens, covered + behind)
        assert bounds.dtype == torch.int32
        assert bounds.tolist() == [starts + [covered] * behind, ends + [covered] * behind]
    for function in (positions_from, positions_from_reference):
        positions = function(cu_seqlens, covered + behind)
        assert positions.dtype == torch.int32
        assert positions.tolist() == places + [0] * behind


@pytest.mark.parametrize("covered", [0, 5, 7])
def test_only_what_lies_behind_is_cleared(covered: int, device: torch.device) -> None:
    rows = torch.full((7, 3, 500), float("nan"), dtype=torch.float16, device=device)
    rows[:covered] = 2
    clear_behind_documents(rows, ends_of([2, 0, covered - 2] if covered else [0], device))
    assert bool((rows[:covered] == 2).all())
    assert not bool(rows[covered:].any())
    clear_behind_documents(rows[:0], ends_of([0], device))
    with pytest.raises(ValueError, match="contiguous"):
        clear_behind_documents(rows[:, 0], ends_of([2], device))


def test_registration(device: torch.device, opcheck: Callable[..., None]) -> None:
    opcheck(_document_bounds, (ends_of([6, 3], device), 9))
