"""The chunked loss against the plain one."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model import masked_loss
from model.masked_loss import masked_cross_entropy


def make_case(rows: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(rows, 16), (50, 16), (50,)]
    leaves = [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]
    labels = torch.randint(0, 50, (rows,), generator=generator)
    labels[::3] = -100
    return leaves, labels


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_equals_the_plain_loss(rows: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked_loss, "_ELEMENTS_A_CHUNK", chunk * 50)
    leaves, labels = make_case(rows)
    hidden, weight, bias = leaves
    plain = F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="sum")
    ours = masked_cross_entropy(hidden, weight, bias, labels)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    expected = torch.autograd.grad(plain / 3, leaves)
    for ours_, theirs in zip(torch.autograd.grad(ours / 3, leaves), expected, strict=True):
        assert torch.allclose(ours_, theirs, rtol=1e-7, atol=1e-9)


def test_large_logits_do_not_overflow() -> None:
    hidden = torch.full((1, 1), 1e4)
    weight = torch.tensor([[1.0], [-1.0]])
    loss = masked_cross_entropy(hidden, weight, torch.zeros(2), torch.tensor([1]))
    assert loss.item() == pytest.approx(2e4)


def test_weight_gradient_is_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, adding chunk after chunk to a large sum would lose what the later ones bring."""
    monkeypatch.setattr(masked_loss, "_ELEMENTS_A_CHUNK", 50)
    leaves, labels = make_case(600, torch.bfloat16)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    ours = torch.autograd.grad(masked_cross_entropy(*leaves, labels), leaves)
    exact = torch.autograd.grad(masked_cross_entropy(*exact_leaves, labels), exact_leaves)
    for gradient, truth in zip(ours[1:], exact[1:], strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.double() - truth).norm() < 0.006 * truth.norm()


def test_all_logits_are_never_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked_loss, "_ELEMENTS_A_CHUNK", 2**16)
    hidden, weight = torch.randn(4096, 8, requires_grad=True), torch.randn(1024, 8)
    labels = torch.zeros(4096, dtype=torch.int64)
    with torch.profiler.profile(profile_memory=True) as profile:
        masked_cross_entropy(hidden, weight, torch.zeros(1024), labels).backward()
    assert max(event.cpu_memory_usage for event in profile.events()) < 4 * 2**20


def test_validation_makes_no_gradients() -> None:
    leaves, labels = make_case(7)
    with torch.no_grad():
        loss = masked_cross_entropy(*leaves, labels)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(masked_cross_entropy(*leaves, labels).item())
