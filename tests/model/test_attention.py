"""Attention backends against an fp64 softmax written out, document by document."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.attention import BACKENDS, choose_attention, reference_attention

LAYOUTS = {
    "even": [64, 64, 64],
    "abstracts": [250, 181, 322, 260],
    "skewed": [900, *[3] * 40, 450],
    "empty documents": [0, 0, 130, 0, 66, 65, 0, 0],
    "length 1": [1] * 9,
    "whole tiles": [448, 512, 448],
    "one long document": [777],
    "no token": [0, 0],
}
HEADS, WIDTH = 2, 16


def make_row(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3, HEADS, WIDTH, generator=generator)
    return 1.5 * qkv, torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def written_out(qkv: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v over all T × T pairs, others' documents masked out."""
    q, k, v = qkv.double().unbind(1)
    place = torch.arange(qkv.shape[0])
    document = torch.bucketize(place, cu_seqlens[1:].long(), right=True)
    seen = document[:, None] == document[None, :]
    if window is not None:
        seen &= (place[:, None] - place[None, :]).abs() <= window
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 64, 8, 0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_reference_is_the_formula(layout: str, window: int | None, dtype: torch.dtype) -> None:
    qkv, cu_seqlens = make_row(LAYOUTS[layout])
    leaf = qkv.to(dtype).requires_grad_()
    exact_leaf = leaf.detach().double().requires_grad_()
    out = reference_attention(*leaf.unbind(1), cu_seqlens, max(LAYOUTS[layout]), window)
    exact = written_out(exact_leaf, cu_seqlens, window)
    assert out.dtype == dtype
    assert out.shape == exact.shape
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (gradient,) = torch.autograd.grad((out * weight).sum(), leaf)
    (exact_gradient,) = torch.autograd.grad((exact * weight.double()).sum(), exact_leaf)
    for actual, truth in ((out, exact), (gradient, exact_gradient)):
        difference = (actual.double() - truth).norm()
        assert difference <= 10 * torch.finfo(dtype).eps * truth.norm()


@pytest.mark.parametrize("window", [None, 64])
def test_a_document_does_not_see_its_neighbours(window: int | None) -> None:
    lengths = LAYOUTS["skewed"]
    qkv, cu_seqlens = make_row(lengths)
    changed = qkv.clone()
    changed[:900] = float("nan")
    leaves = [values.requires_grad_() for values in (qkv, changed)]
    outs = [reference_attention(*leaf.unbind(1), cu_seqlens, 900, window) for leaf in leaves]
    assert torch.equal(outs[0][900:], outs[1][900:])
    gradients = [
        torch.autograd.grad(out.sum(), leaf)[0] for out, leaf in zip(outs, leaves, strict=True)
    ]
    assert torch.equal(gradients[0][900:], gradients[1][900:])
    assert not bool(gradients[0].isnan().any())


@pytest.mark.parametrize("window", [None, 64])
def test_the_place_in_the_row_changes_no_bit(window: int | None) -> None:
    document, _ = make_row([450], seed=3)
    outs = []
    for before, behind in ((0, 0), (37, 450), (450, 3)):
        row, _ = make_row([before + behind])
        qkv = torch.cat([row[:before], document, row[before:]])
        cu_seqlens = torch.tensor([0, before, before + 450, before + 450 + behind]).int()
        outs.append(
            reference_attention(*qkv.unbind(1), cu_seqlens, 450, window)[before : before + 450]
        )
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_a_local_layer_does_not_make_all_scores() -> None:
    """Were they made, the largest intermediate would be 4096² × 2 heads, 134 MB."""
    qkv, cu_seqlens = make_row([4096])
    with torch.profiler.profile(profile_memory=True) as profile:
        reference_attention(*qkv.unbind(1), cu_seqlens, 4096, 64)
    assert max(event.cpu_memory_usage for event in profile.events()) < 32 * 2**20


@pytest.mark.parametrize("window", [None, 3])
def test_tokens_behind_all_documents_get_and_give_nothing(window: int | None) -> None:
    qkv, cu_seqlens = make_row([5, 4, 3])
    qkv[9:] = float("nan")
    leaf = qkv.requires_grad_()
    out = reference_attention(*leaf.unbind(1), cu_seqlens[:3], 5, window)
    (gradient,) = torch.autograd.grad(out.sum(), leaf)
    assert torch.equal(
        out[:9], reference_attention(*qkv.detach()[:9].unbind(1), cu_seqlens[:3], 5, window)
    )
    assert bool(gradient[:9].any())
    assert not bool(out[9:].any())
    assert not bool(gradient[9:].any())


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "no token"])
@pytest.mark.parametrize("window", [None, 64, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gpu_backends_agree_with_the_reference(
    layout: str, window: int | None, dtype: torch.dtype, cuda: str
) -> None:
    lengths = LAYOUTS[layout]
    qkv, cu_seqlens = (tensor.to(cuda) for tensor in make_row(lengths))
    weight = torch.randn(qkv[:, 0].shape, device=cuda).to(dtype)

    def run(attend: Callable[..., Tensor], values: Tensor) -> tuple[Tensor, Tensor]:
        leaf = values.requires_grad_()
        out = attend(*leaf.unbind(1), cu_seqlens, max(lengths), window)
        (gradient,) = torch.autograd.grad(out, leaf, weight.to(out.dtype))
        return out.detach().double(), gradient.double()

    rounded = qkv.to(dtype)
    exact = run(reference_attention, rounded.double())
    plain = run(reference_attention, rounded.clone())
    fast = run(BACKENDS[choose_attention(rounded.device, dtype)], rounded.clone())
    for what, a, b, c in zip(("forward", "gradient"), fast, plain, exact, strict=True):
        errors = [float((values - c).norm() / c.norm()) for values in (a, b)]
        print(f"{layout} window {window} {what}: {errors[0]:.1e}, plain PyTorch {errors[1]:.1e}")
        assert errors[0] < 2 * errors[1] + 2 * torch.finfo(dtype).eps
