"""Passes over fp32 and a narrower type give the bits that PyTorch gives."""

from collections.abc import Callable

import pytest
import torch

from kernels.mixed_precision import add_narrow, scale_narrow, write_narrow

SIZES = [(0,), (1,), (7, 3), (2048,), (2049,), (5, 1000)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_sums(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Of a stretch of a longer tensor, as of all parameters' sums, whose rest stays as it is."""
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(size, generator=draw).to(device, dtype)
    whole = torch.randn(values.numel() + 9, generator=draw).to(device)
    sums, before = whole[4 : 4 + values.numel()].view(size), whole.clone()
    expected = sums + values
    add_narrow(sums, values)
    assert torch.equal(sums, expected)
    assert torch.equal(whole[:4], before[:4])
    assert torch.equal(whole[4 + values.numel() :], before[4 + values.numel() :])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_first_of_sums(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Whatever was there before; to the bit, of which a zero's sign is one."""
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(size, generator=draw).to(device, dtype)
    values.view(-1)[::5] = -0.0
    whole = torch.full((values.numel() + 9,), torch.nan, device=device)
    sums = whole[4 : 4 + values.numel()].view(size)
    write_narrow(sums, values)
    expected = torch.zeros_like(sums).add_(values)
    assert torch.equal(sums.view(torch.int32), expected.view(torch.int32))
    assert whole[:4].isnan().all()
    assert whole[4 + values.numel() :].isnan().all()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.usefixtures("poisoned")
def test_scaled(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Numbers that only scaling brings into fp16's range too."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates to bf16 where a GPU rounds")
    values = 1e-6 * torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device)
    for factor in (65_536.0, -0.37):
        scale = torch.tensor(factor, device=device)
        out = scale_narrow(values, scale, dtype)
        assert out.dtype == dtype
        assert torch.equal(out, (values * scale).to(dtype))


def test_registration(device: torch.device, opcheck: Callable[..., None]) -> None:
    values, scale = torch.ones(5, 3, device=device), torch.tensor(2.0, device=device)
    operation = torch.ops.clinical_modernbert.scale_narrow.default
    opcheck(operation, (values, scale, torch.float16))


@pytest.mark.gpu
def test_offsets_beyond_31_bits() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    elements = 2**31 + 2**12
    sums = torch.zeros(elements, device="cuda")
    values = torch.ones(elements, dtype=torch.bfloat16, device="cuda")
    add_narrow(sums, values)
    assert bool((sums == 1).all())
    sums.fill_(torch.nan)
    write_narrow(sums, values)
    assert bool((sums == 1).all())
    out = scale_narrow(sums, torch.tensor(3.0, device="cuda"), torch.bfloat16)
    assert bool((out == 3).all())


def test_refusals() -> None:
    wide, narrow = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float16)
    scale = torch.ones(())
    for operation in (add_narrow, write_narrow):
        with pytest.raises(TypeError, match="takes fp32 sums and bf16 or fp16 values"):
            operation(wide, wide)
        with pytest.raises(TypeError, match="takes fp32 sums and bf16 or fp16 values"):
            operation(narrow, narrow)
        with pytest.raises(ValueError, match="contiguous tensors of one shape"):
            operation(wide, narrow[:1])
        with pytest.raises(ValueError, match="contiguous tensors of one shape"):
            operation(wide, narrow.T.contiguous().T)
    with pytest.raises(TypeError, match="makes bf16 or fp16 of fp32"):
        scale_narrow(narrow, scale, torch.float16)
    with pytest.raises(TypeError, match="makes bf16 or fp16 of fp32"):
        scale_narrow(wide, scale, torch.float32)
    with pytest.raises(ValueError, match="contiguous values and one number"):
        scale_narrow(wide.T, scale, torch.float16)
    with pytest.raises(ValueError, match="contiguous values and one number"):
        scale_narrow(wide, torch.ones(2), torch.float16)
