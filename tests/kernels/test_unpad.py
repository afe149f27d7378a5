"""Padded to packed and back: the kernels against plain PyTorch, bit by bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels.unpad
from kernels.unpad import (
    Packing,
    _gather_rows,
    _maps,
    _row_lengths,
    pad,
    pad_reference,
    unpad,
    unpad_reference,
)


def ragged(lengths: list[int], columns: int, left: bool = False) -> Tensor:
    place = torch.arange(columns)
    ends = torch.tensor(lengths)[:, None]
    return (place >= columns - ends) if left else (place < ends)


MASKS = {
    "full": ragged([12] * 3, 12),
    "skewed": ragged([200, 1, 2, 1, 3], 200),
    "empty rows": ragged([0, 5, 0, 9, 0], 9),
    "left padding": ragged([3, 7], 7, left=True),
    "holes": torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]]),
    "longer than a block": ragged([150, 65, 3], 150),
    "nothing": ragged([0, 0], 6),
    "one column": ragged([1, 0, 1], 1),
    "no column": torch.zeros(2, 0),
    "no row": torch.zeros(0, 4),
}


def make_tensors(mask: Tensor, device: torch.device) -> list[Tensor]:
    """Ids, a mask of bools, and hidden states of an awkward width, for a padded batch."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(-(2**60), 2**60, mask.shape, generator=generator)
    hidden = torch.randn(*mask.shape, 3, 7, generator=generator)
    return [ids.to(device), (ids > 0).to(device), hidden.half().to(device)]


def assert_same(actual: Packing, expected: Packing) -> None:
    for name in ("index_T", "slot_BS", "cu_seqlens"):
        ours, theirs = getattr(actual, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype == torch.int32
        assert torch.equal(ours, theirs), name
    assert actual.max_seqlen == expected.max_seqlen


@pytest.mark.parametrize("layout", MASKS)
@pytest.mark.parametrize("spare", [None, 0, 29])
def test_there_and_back(
    layout: str,
    spare: int | None,
    device: torch.device,
    poisoned: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if layout == "longer than a block":
        # In place of 8,192 columns, which the interpreter would take minutes for.
        monkeypatch.setattr(kernels.unpad, "_SCAN", (64, 4))
    mask = MASKS[layout].to(device)
    tensors = make_tensors(mask, device)
    capacity = None if spare is None else int((mask != 0).sum()) + spare
    packing, packed = unpad(mask, tensors, capacity)
    expected_packing, expected = unpad_reference(mask, tensors, capacity)
    assert_same(packing, expected_packing)
    for tensor, ours, theirs in zip(tensors, packed, expected, strict=True):
        assert torch.equal(ours, theirs)
        real = tensor[mask != 0]
        assert torch.equal(ours[: len(real)], real)
        assert not bool(ours[len(real) :].any())
    back = pad(packing, packed[:1] + packed[2:], -3)
    expected_back = pad_reference(expected_packing, expected[:1] + expected[2:], -3)
    for tensor, ours, theirs in zip(tensors[:1] + tensors[2:], back, expected_back, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours[mask != 0], tensor[mask != 0])
        assert bool((ours[mask == 0] == -3).all())


@pytest.mark.parametrize("spare", [0, 1, 29, 100])
def test_documents_cover_the_capacity_and_none_is_too_long(
    spare: int, device: torch.device
) -> None:
    mask = MASKS["empty rows"].to(device)
    packing, _ = unpad(mask, [], int(mask.sum()) + spare)
    lengths = packing.cu_seqlens.diff().tolist()
    assert lengths[:5] == [0, 5, 0, 9, 0]
    assert sum(lengths) == 14 + spare
    assert max(lengths) <= packing.max_seqlen == 9


def test_gradients_go_both_ways(device: torch.device, poisoned: None) -> None:
    mask = MASKS["skewed"].to(device)
    generator = torch.Generator().manual_seed(2)
    weight_there = torch.randn(250, 5, generator=generator).to(device)
    weight_back = torch.randn(5, 200, 5, generator=generator).to(device)
    gradients = []
    for there, back in ((unpad, pad), (unpad_reference, pad_reference)):
        padded = torch.ones(5, 200, 5, device=device, requires_grad=True)
        packing, (packed,) = there(mask, [padded], 250)
        (again,) = back(packing, [packed * weight_there], 7.0)
        gradients.append(torch.autograd.grad((again * weight_back).sum(), padded)[0])
    assert torch.equal(gradients[0], gradients[1])
    assert not bool(gradients[0][mask == 0].any())


def test_filler_gets_no_gradient_from_pad(device: torch.device) -> None:
    mask = MASKS["full"].to(device)
    packing, _ = unpad(mask, [], 40)
    packed = torch.ones(40, 2, device=device, requires_grad=True)
    (padded,) = pad(packing, [packed])
    (gradient,) = torch.autograd.grad(padded.sum(), packed)
    assert gradient.sum(1).tolist() == [2.0] * 36 + [0.0] * 4


def test_too_small_a_capacity_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("on a GPU the failed check ends the process's use of it")
    mask = MASKS["full"]
    for function in (unpad, unpad_reference):
        with pytest.raises(RuntimeError, match="capacity of 35"):
            function(mask, [mask], 35)


def test_more_places_than_int32_numbers_are_refused() -> None:
    mask = torch.empty(2**19, 4097, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match=r"batch of \(524288, 4097\).* take fewer rows"):
        unpad(mask, [])
    with pytest.raises(ValueError, match="capacity of 2147483000"):
        unpad(MASKS["skewed"].expand(5, 200), [], 2147483000)


@pytest.mark.gpu
def test_offsets_beyond_31_bits() -> None:
    """More than 2³¹ elements on both sides, and rows whose share of the filler lies far behind."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    rows, columns, width = 1100, 4097, 500
    mask = torch.ones(rows, columns, dtype=torch.bool, device="cuda")
    mask[:-1, -1] = False
    real = rows * columns - (rows - 1)
    states = torch.zeros(rows, columns, width, dtype=torch.int8, device="cuda")
    states[-1] = torch.randint(1, 100, (columns, width), device="cuda")
    packing, (packed,) = unpad(mask, [states], real + 10_000)
    assert packed.numel() > 2**31
    assert torch.equal(packed[real - columns : real], states[-1])
    assert not bool(packed[: real - columns].any())
    assert not bool(packed[real:].any())
    assert bool((packing.index_T[real:] == -1).all())
    (back,) = pad(packing, [packed])
    assert torch.equal(back, states)


def test_registration(device: torch.device, opcheck: Callable[..., None]) -> None:
    mask = MASKS["holes"].to(device)
    packing, _ = unpad(mask, [], 6)
    opcheck(_row_lengths, (mask,))
    opcheck(_maps, (mask, _row_lengths(mask), 6, 2))
    sources = [torch.randn(8, width, device=device, requires_grad=True) for width in (3, 1)]
    opcheck(_gather_rows, (sources, packing.index_T, packing.slot_BS.flatten(), 0.0))


def test_more_tensors_than_one_launch_takes(device: torch.device) -> None:
    mask = MASKS["skewed"].to(device)
    tensors = 2 * make_tensors(mask, device)
    _, packed = unpad(mask, tensors, 230)
    for ours, theirs in zip(packed, unpad_reference(mask, tensors, 230)[1], strict=True):
        assert torch.equal(ours, theirs)


def test_one_launch_for_ids_and_hidden_gives_the_hidden_a_gradient(device: torch.device) -> None:
    mask = MASKS["holes"].to(device)
    ids, _, _ = make_tensors(mask, device)
    hidden = torch.ones(*mask.shape, 3, device=device, requires_grad=True)
    _, (packed_ids, packed) = unpad(mask, [ids, hidden], 6)
    assert not packed_ids.requires_grad
    (gradient,) = torch.autograd.grad(packed.sum(), hidden)
    assert torch.equal(gradient, mask[..., None].expand_as(hidden).float())


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_when_the_capacity_is_given() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    mask = MASKS["skewed"].cuda()
    tensors = make_tensors(mask, torch.device("cuda"))
    unpad(mask, tensors, 250)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        packing, packed = unpad(mask, tensors, 250)
        pad(packing, packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(packing, unpad_reference(mask, tensors, 250)[0])


@pytest.mark.parametrize("function", [unpad, unpad_reference])
@pytest.mark.parametrize(
    ("mask", "tensor", "message"),
    [
        ((3, 6), (3, 5, 1), r"tensor 1 must be \(3, 6, …\) like the mask, not \(3, 5, 1\)"),
        ((3, 6), (2, 6), r"not \(2, 6\)"),
        ((3, 6), (6, 3), r"not \(6, 3\)"),
        ((3, 6), (18,), r"not \(18,\)"),
        ((3, 6), (), r"not \(\)"),
        ((18,), (18,), r"needs a mask \(B, S\), not \(18,\)"),
        ((3, 2, 3), (3, 2, 3), r"needs a mask \(B, S\), not \(3, 2, 3\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("capacity", [None, 18])
def test_a_batch_that_does_not_fit_its_mask_is_refused(
    function: Callable,
    mask: tuple[int, ...],
    tensor: tuple[int, ...],
    message: str,
    capacity: int | None,
    device: torch.device,
) -> None:
    ones, other = torch.ones(mask, device=device), torch.ones(tensor, device=device)
    with pytest.raises(ValueError, match=message):
        function(ones, [ones, other], capacity)


@pytest.mark.parametrize("function", [unpad, unpad_reference])
def test_a_negative_capacity_and_complex_numbers_are_refused(
    function: Callable, device: torch.device
) -> None:
    mask = MASKS["holes"].to(device)
    with pytest.raises(ValueError, match="capacity is -1, it is negative"):
        function(mask, [], -1)
    with pytest.raises(TypeError, match=r"unpad takes .* not torch\.complex64"):
        function(mask, [mask.to(torch.complex64)], 6)
    with pytest.raises(TypeError, match=r"unpad takes .* not torch\.complex64"):
        function(mask.to(torch.complex64), [], 6)


@pytest.mark.parametrize("function", [pad, pad_reference])
def test_packed_tensors_that_do_not_fit_the_packing_are_refused(
    function: Callable, device: torch.device
) -> None:
    packing, (packed,) = unpad(MASKS["holes"].to(device), [MASKS["holes"].to(device)], 12)
    for rows in (5, 11, 13, 0):
        with pytest.raises(ValueError, match=rf"tensor 1 must be \(12, …\).* not \({rows}, 2\)"):
            function(packing, [packed, torch.ones(rows, 2, device=device)])
    with pytest.raises(ValueError, match=r"not \(\)"):
        function(packing, [torch.ones((), device=device)])
    with pytest.raises(TypeError, match=r"pad takes .* not torch\.complex64"):
        function(packing, [packed.to(torch.complex64)])


@pytest.mark.parametrize("function", [pad, pad_reference])
@pytest.mark.parametrize(
    ("dtype", "fill"),
    [
        (torch.int64, 2**24 + 1),
        (torch.int64, -(2**53) - 1),
        (torch.int64, 2**63),
        (torch.int64, 0.5),
        (torch.int64, float("nan")),
        (torch.int32, float("inf")),
        (torch.uint8, 256),
        (torch.uint8, -1),
        (torch.bool, -3),
        (torch.float64, 0.1),
        (torch.float64, 1e300),
        (torch.float64, 1e-300),
        (torch.float32, 1e300),
        (torch.float16, 65536),
    ],
    ids=str,
)
def test_a_fill_that_would_become_another_number_is_refused(
    function: Callable, dtype: torch.dtype, fill: float, device: torch.device
) -> None:
    """The compiled kernel is told of it in fp32; the interpreter, which is not, would hide it."""
    packing, (packed,) = unpad(MASKS["holes"].to(device), [MASKS["holes"].to(device)], 4)
    with pytest.raises(ValueError, match=r"pad: a fill of .* in a tensor of torch\."):
        function(packing, [packed, packed.to(dtype)], fill)


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [
        (torch.int64, -(2**24)),
        (torch.int64, 2**40 + 2**20),
        (torch.int64, -100.0),
        (torch.uint8, 255),
        (torch.bool, True),
        (torch.float64, -0.375),
        (torch.float64, float("-inf")),
        (torch.float32, 0.1),
        (torch.float16, 1e-30),
        (torch.bfloat16, float("nan")),
    ],
    ids=str,
)
def test_a_fill_is_what_pytorch_makes_of_it(
    dtype: torch.dtype, fill: float, device: torch.device
) -> None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("triton 3.7's interpreter makes no constants of bf16")
    mask = MASKS["holes"].to(device)
    packing, (packed,) = unpad(mask, [mask.to(dtype)], 4)
    results = [function(packing, [packed], fill)[0] for function in (pad, pad_reference)]
    expected = torch.full((), fill, dtype=dtype, device=device)
    for result in results:
        assert result.dtype == dtype
        assert torch.equal(result[mask != 0], packed)
        torch.testing.assert_close(
            result[mask == 0], expected.expand(4), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.bool], ids=str)
def test_a_fill_is_checked_within_a_graph(dtype: torch.dtype) -> None:
    """That changes from call to call, too."""
    mask = MASKS["holes"]
    packing, (packed,) = unpad_reference(mask, [mask.to(dtype)], 4)
    torch._dynamo.reset()
    compiled = torch.compile(pad_reference, fullgraph=True, backend="eager")
    for fill in (0.0, 1.0) if dtype == torch.bool else (0.0, -100.0, 7.0):
        (expected,) = pad_reference(packing, [packed], fill)
        assert torch.equal(compiled(packing, [packed], fill)[0], expected)


def test_tensors_on_another_device_are_refused(device: torch.device) -> None:
    """A kernel would read an address of one machine as one of the other's."""
    mask, elsewhere = MASKS["holes"].to(device), torch.ones(2, 4, device="meta")
    packing, _ = unpad(mask, [], 6)
    for function in (unpad, unpad_reference):
        with pytest.raises(ValueError, match="unpad: a tensor is on meta, the mask on"):
            function(mask, [mask, elsewhere], 6)
    for function in (pad, pad_reference):
        with pytest.raises(ValueError, match="pad: a tensor is on meta, the packing on"):
            function(packing, [torch.ones(6, 4, device="meta")])


def test_non_contiguous_input(device: torch.device) -> None:
    """Masks, batches, packed rows and gradients whose elements lie anywhere."""
    mask = MASKS["empty rows"].to(device)
    hidden = torch.randn(5, 9, 6, generator=torch.Generator().manual_seed(3)).to(device)
    packing, (packed,) = unpad(mask, [hidden], 20)
    (padded,) = pad(packing, [packed])
    apart = [value.repeat_interleave(2, dim=1)[:, ::2] for value in (mask, hidden, packed)]
    turned = hidden.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not any(value.is_contiguous() for value in (*apart, turned))
    for values in (apart[1], turned):
        again, (ours,) = unpad(apart[0], [values], 20)
        assert_same(again, packing)
        assert torch.equal(ours, packed)
    assert torch.equal(pad(packing, [apart[2]])[0], padded)
    gradients = []
    for values in (hidden, turned):
        leaf = values.detach().requires_grad_()
        (rows,) = unpad(apart[0], [leaf], 20)[1]
        (out,) = pad(packing, [rows.T.contiguous().T])
        # The gradients have strides of zero, and then lie the other way round.
        gradients.append(torch.autograd.grad(out.sum() + (rows.T @ rows).sum(), leaf)[0])
    assert bool(gradients[0].any())
    assert torch.equal(*gradients)


# Twenty batches of 24 columns: one, some or no real token in a row, at either end.
BATCHES = [
    ragged([(7 * row * row + rows) % 25 for row in range(rows)], 24, left=rows % 2 == 0)
    for rows in range(2, 22)
]


@pytest.mark.gpu
def test_one_graph_for_every_batch(compiles_twice: Callable[..., None]) -> None:
    """With the capacity given: any number of rows, whatever is real in them."""

    def there_and_back(mask: Tensor, ids: Tensor, hidden: Tensor) -> Tensor:
        packing, (packed_ids, packed) = unpad(mask, [ids, hidden], 504)
        states = packed * (packed_ids[:, None] % 7) + packing.cu_seqlens.sum() % 7
        (padded,) = pad(packing, [states], 2.0)
        return padded.sum(1)

    cases = []
    for mask in BATCHES:
        assert int(mask.sum()) <= 504
        ids, _, hidden = make_tensors(mask, torch.device("cuda"))
        cases.append([mask.cuda(), ids, hidden.flatten(2).bfloat16()])
    assert len(cases) == 20
    compiles_twice(there_and_back, cases)
