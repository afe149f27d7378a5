"""Bounds and places of tokens, on every shape of row, and the clearing of what lies behind."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import documents
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


@pytest.mark.parametrize("tokens", [0, 1, 5, 9])
def test_documents_end_with_the_tokens(tokens: int, device: torch.device) -> None:
    """Whatever cu_seqlens says of more: attention would read as far as it is told to."""
    cu_seqlens = ends_of([3, 0, 4, 5], device)
    cut = cu_seqlens.clamp(max=tokens)
    for function in (document_bounds, document_bounds_reference):
        bounds = function(cu_seqlens, tokens)
        assert torch.equal(bounds, document_bounds_reference(cut, tokens))
        assert bounds.numel() == 0 or int(bounds.max()) <= tokens


@pytest.mark.parametrize(
    "function", [document_bounds, document_bounds_reference, positions_from, clear_behind_documents]
)
def test_other_bounds_than_cu_seqlens_are_refused(function: Callable, device: torch.device) -> None:
    ends = ends_of([3, 2], device)
    tokens = torch.ones(5, 2, device=device) if function is clear_behind_documents else 5

    def call(cu_seqlens: Tensor) -> None:
        function(*((tokens, cu_seqlens) if function is clear_behind_documents else (cu_seqlens, 5)))

    call(ends)
    for wrong in (ends.float(), ends.long()):
        with pytest.raises(TypeError, match=r"cu_seqlens must be int32, not torch\."):
            call(wrong)
    for wrong in (ends[:0], ends[None], ends[0]):
        with pytest.raises(ValueError, match=r"cu_seqlens must be \(N \+ 1,\), not \("):
            call(wrong)


@pytest.mark.parametrize("programs", [1, 2, 264])
@pytest.mark.parametrize("covered", [0, 5, 7])
def test_only_what_lies_behind_is_cleared(
    covered: int, programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By programs of which each takes its turn again, and by more than there is to do."""
    monkeypatch.setattr(documents, "_CLEARED", (512, 4, programs))
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
