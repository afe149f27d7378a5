"""Kernels run on the GPU that holds their tensors, whichever is the current one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from kernels.documents import clear_behind_documents, document_bounds, positions_from
from kernels.embedding import embedding
from kernels.geglu import geglu_linear
from kernels.layer_norm import add_layer_norm, layer_norm
from kernels.linear_cross_entropy import _linear_cross_entropy
from kernels.local_attention import local_attention
from kernels.rope import rope, rope_in_place, rope_tables
from kernels.stable_adamw import apply_update, update_moments
from kernels.unpad import pad, unpad


def call_rope(device: torch.device) -> list[Tensor]:
    qkv = torch.ones(3, 3, 1, 4, device=device, requires_grad=True)
    turn = [*(table.to(device) for table in rope_tables(8, 4, 1e4)), torch.arange(3, device=device)]
    turned = rope(qkv, *turn)
    (gradient,) = torch.autograd.grad(turned.prod(1).sum(), qkv)
    return [turned, gradient, rope_in_place(qkv.detach().clone(), *turn)]


def call_local_attention(device: torch.device) -> list[Tensor]:
    qkv = torch.ones(3, 3, 1, 4, device=device, requires_grad=True)
    ends = torch.tensor([0, 3], dtype=torch.int32, device=device)
    tables = [table.to(device) for table in rope_tables(8, 4, 1e4)]
    bounds = document_bounds(ends, 3)
    out = local_attention(qkv, *tables, positions_from(ends, 3), bounds, 1)
    return [bounds, out, *torch.autograd.grad(out.sum(), qkv)]


def call_documents(device: torch.device) -> list[Tensor]:
    rows = torch.ones(3, 4, device=device)
    clear_behind_documents(rows, torch.tensor([0, 2], dtype=torch.int32, device=device))
    return [rows]


def call_embedding(device: torch.device) -> list[Tensor]:
    weight = torch.ones(5, 4, device=device, requires_grad=True)
    out = embedding(torch.tensor([1, 3, 1], device=device), weight, 3)
    return [out, *torch.autograd.grad(out.sum(), weight)]


def call_norms(device: torch.device) -> list[Tensor]:
    x = torch.arange(8.0, device=device).view(2, 4).requires_grad_()
    weight = torch.ones(4, device=device, requires_grad=True)
    normed, total = add_layer_norm(x, x, weight, 1e-5)
    out = layer_norm(normed + total, weight, 1e-5)
    return [out, *torch.autograd.grad(out.square().sum(), [x, weight])]


def call_geglu(device: torch.device) -> list[Tensor]:
    x = torch.ones(2, 4, device=device, requires_grad=True)
    out = geglu_linear(x, torch.ones(3, 2, device=device))
    return [out, *torch.autograd.grad(out.sum(), x)]


def call_loss(device: torch.device) -> list[Tensor]:
    leaves = [torch.ones(2, 4), torch.ones(8, 4), torch.ones(8)]
    labels = torch.zeros(2, dtype=torch.int64, device=device)
    return list(_linear_cross_entropy(*(x.to(device) for x in leaves), labels, 2, True, True))


def call_stable_adamw(device: torch.device) -> list[Tensor]:
    flat, mean, square, weights = torch.ones(4, 8, device=device).unbind()
    shares, scale = torch.ones(2, device=device), torch.ones((), device=device)
    sums = update_moments(flat, mean, square, shares, scale, scale - 1, 1e-6, ((0, 8),))
    apply_update(weights, mean, square, shares[:1], 0.1, 1e-6, ((0, 8),))
    return [sums, mean, square, weights]


def call_unpad(device: torch.device) -> list[Tensor]:
    mask = torch.tensor([[1, 1], [1, 0]], device=device)
    packing, packed = unpad(mask, [mask], 4)
    return [packing.index_T, packing.slot_BS, *packed, *pad(packing, packed)]


CALLS = [
    call_rope,
    call_local_attention,
    call_documents,
    call_embedding,
    call_norms,
    call_geglu,
    call_loss,
    call_stable_adamw,
    call_unpad,
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's launches are watched")
@pytest.mark.parametrize("call", CALLS)
def test_every_launch_is_made_with_its_tensors_device_current(
    call: Callable[[torch.device], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.interpreter import GridExecutor

    current: list[Tensor] = []
    launched: list[bool] = []
    launch = GridExecutor.__call__

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    def watched(self: GridExecutor, *arguments: object, **options: object) -> None:
        launched.append(any(a is b for a in (*arguments, *options.values()) for b in current))
        launch(self, *arguments, **options)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(GridExecutor, "__call__", watched)
    call(torch.device("cpu"))
    assert launched
    assert all(launched)


@pytest.mark.gpu
@pytest.mark.parametrize("call", CALLS)
def test_gpu_another_than_the_current_one(
    call: Callable[[torch.device], list[Tensor]],
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    with torch.cuda.device(0):
        expected, ours = call(torch.device("cuda", 0)), call(torch.device("cuda", 1))
    for one, two in zip(ours, expected, strict=True):
        assert one.device.index == 1
        assert torch.equal(one.cpu(), two.cpu())
