"""What computes attention: how it is chosen, tried out before a run, and what would be faster."""

from collections.abc import Callable

import pytest
import torch
import triton
from torch import Tensor

from model import attention_backends, attention_choice
from model.attention import BACKENDS, Choice, reference_attention
from model.attention_choice import (
    AttentionError,
    check_attention,
    choose_attention,
    what_to_install,
)
from model.config import Local

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that there is a GPU of this capability, with these packages."""

    def pretend(capability: tuple[int, int], *packages: str) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(attention_choice, "_installed", lambda name: name in packages)

    return pretend


def test_choice(machine: Callable[..., None]) -> None:
    bf16 = torch.bfloat16
    assert choose_attention(CPU, bf16, 64) == ("reference", "backend")
    machine((9, 0))
    assert choose_attention(GPU, bf16, 64) == ("varlen", "kernel")
    assert choose_attention(GPU, bf16, 64, local="backend") == ("varlen", "backend")
    assert choose_attention(GPU, torch.float32, 64) == ("reference", "kernel")
    assert choose_attention(GPU, torch.float64, 64) == ("reference", "backend")
    assert choose_attention(GPU, bf16, 12) == ("reference", "kernel")
    machine((9, 0), "flash-attn", "flash-attn-4")
    assert choose_attention(GPU, bf16, 64) == ("fa4", "kernel")
    assert choose_attention(GPU, bf16, 256) == ("fa2", "kernel")
    assert choose_attention(GPU, bf16, 64, backend="varlen") == ("varlen", "kernel")
    machine((8, 0), "flash-attn", "flash-attn-4")
    assert choose_attention(GPU, bf16, 64) == ("fa2", "kernel")
    machine((7, 5), "flash-attn")
    assert choose_attention(GPU, bf16, 64) == ("reference", "kernel")
    assert str(Choice("fa4", "kernel")) == (
        "fa4, in layers with a window and for many documents up to 128 tokens "
        "kernels.local_attention"
    )
    assert str(Choice("fa4", "backend")) == "fa4, in layers with a window fa4"


def test_what_is_asked_for_by_name_is_not_replaced(machine: Callable[..., None]) -> None:
    with pytest.raises(ValueError, match="attention: varlen cannot be used here: it needs a CUDA"):
        choose_attention(CPU, torch.bfloat16, 64, "varlen")
    with pytest.raises(ValueError, match="local_attention: kernel needs a CUDA device"):
        choose_attention(CPU, torch.bfloat16, 64, local="kernel")
    machine((9, 0))
    with pytest.raises(ValueError, match="flash-attn-4 is not installed; pip install"):
        choose_attention(GPU, torch.bfloat16, 64, "fa4")
    machine((8, 6), "flash-attn-4")
    with pytest.raises(ValueError, match=r"capability 9\.0, and this GPU has 8\.6"):
        choose_attention(GPU, torch.bfloat16, 64, "fa4")
    with pytest.raises(ValueError, match="bf16 and fp16, not"):
        choose_attention(GPU, torch.float32, 64, "fa2")
    with pytest.raises(ValueError, match="multiples of 8"):
        choose_attention(GPU, torch.float16, 20, "varlen")


def test_a_line_each_says_what_to_install(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def advice(device: torch.device, window: int = 64, local: Local = "auto") -> list[str]:
        choice = choose_attention(device, torch.bfloat16, 64, local=local)
        return what_to_install(choice, device, torch.bfloat16, 64, window)

    monkeypatch.setattr(triton, "__version__", "3.6.0")
    assert advice(CPU) == []
    machine((9, 0))
    (line,) = advice(GPU)
    assert "FlashAttention-4" in line
    machine((9, 0), "flash-attn")
    (line,) = advice(GPU)
    assert "FlashAttention-4" in line
    machine((8, 0))
    (line,) = advice(GPU)
    assert "FlashAttention-2" in line
    for capability, package in (((9, 0), "flash-attn-4"), ((8, 0), "flash-attn")):
        machine(capability, package)
        for number in ("3.6.0", "3.7.1"):
            monkeypatch.setattr(triton, "__version__", number)
            assert advice(GPU) == []
    monkeypatch.setattr(triton, "__version__", "3.8.0")
    assert advice(GPU) == []
    machine((9, 0))
    fa4, line = advice(GPU)
    assert "FlashAttention-4" in fa4
    assert "triton 3.6 or 3.7" in line
    assert line.endswith("this is 3.8.0")
    machine((9, 0), "flash-attn-4")
    assert advice(GPU) == [line]
    assert advice(GPU, window=65) == []
    assert advice(GPU, local="backend") == []


def test_a_gpu_with_nothing_but_the_reference_says_why(machine: Callable[..., None]) -> None:
    machine((7, 5))
    choice = choose_attention(GPU, torch.bfloat16, 64)
    assert choice.backend == "reference"
    (line,) = what_to_install(choice, GPU, torch.bfloat16, 64, 64)
    assert line.startswith("attention is plain PyTorch's, which is slow: of any other, it needs")
    assert line.endswith("compute capability 8.0, and this GPU has 7.5")
    machine((9, 0), "flash-attn-4")
    choice = choose_attention(GPU, torch.float32, 64)
    (line,) = what_to_install(choice, GPU, torch.float32, 64, 64)
    assert line.endswith("of any other, it takes bf16 and fp16, not torch.float32")


def test_a_choice_is_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (CPU, torch.float32, 2, 16, 8)
    check_attention(Choice("reference", "backend"), *arguments)

    def wrong(*values: Tensor) -> Tensor:
        return 1.01 * reference_attention(*values)

    monkeypatch.setitem(BACKENDS, "fa4", wrong)
    with pytest.raises(
        AttentionError, match="attention fa4, window None, queries at all tokens, is off by 1"
    ):
        check_attention(Choice("fa4", "backend"), *arguments)

    def missing(*values: Tensor) -> Tensor:
        raise ImportError("no kernel\nand much more")

    monkeypatch.setitem(BACKENDS, "fa4", missing)
    said = r"^attention fa4 does not run \(ImportError: no kernel\)\. Set `attention` to .*\.$"
    with pytest.raises(AttentionError, match=said):
        check_attention(Choice("fa4", "backend"), *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are compiled")
@pytest.mark.parametrize(
    ("spoilt", "case"),
    [
        (0, "kernel, window None, queries at all tokens,"),
        (300, "reference and kernel, window None, queries at all tokens, short documents apart,"),
        (None, "reference and kernel, window None, queries at some tokens, short documents apart,"),
    ],
)
def test_the_kernel_is_tried_out_on_short_documents_too(
    spoilt: int | None, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those from a token on, or the gradients of some rows."""
    forward, at_places = attention_backends.forward_short, attention_backends._at_places

    def wrong(qkv: Tensor, bounds: Tensor, first_token: int, out: Tensor, sums: Tensor) -> None:
        forward(qkv, bounds, first_token, out, sums)
        if first_token == spoilt:
            out *= 1.01

    def wrong_places(*values: Tensor) -> Tensor:
        return at_places(*values) * (1.01 if spoilt is None else 1)

    monkeypatch.setattr(attention_backends, "forward_short", wrong)
    monkeypatch.setattr(attention_backends, "_at_places", wrong_places)
    with pytest.raises(AttentionError, match=f"attention {case} is off by"):
        check_attention(Choice("reference", "kernel"), CPU, torch.float32, 1, 16, 8)
