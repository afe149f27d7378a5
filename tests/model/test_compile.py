"""`torch.compile` takes the model as one graph, and at most twice whatever the documents."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from kernels.documents import positions_from
from kernels.rope import rope_reference
from model import attention
from model.attention import (
    BACKENDS,
    SHORT_DOCUMENTS,
    Choice,
    Documents,
    LongDocuments,
    Queries,
    attend,
    describe_documents,
)
from model.attention_backends import ShortDocuments
from model.attention_choice import choose_attention, why_not
from model.config import Backend, ModernBertConfig
from model.modernbert import ModernBertForMaskedLM
from model.rotary import RotaryTables

# Twenty, all of 512 tokens.
LAYOUTS = [
    [512], [256, 256], [500, 3, 9], [64] * 8, [16] * 32, [1] * 12 + [500], [300, 212],
    *([512 - 5 * short, *[5] * short] for short in range(1, 100, 8)),
]  # fmt: skip


def dense_attention(
    qkv: Tensor,
    places: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen: int,
    window: int | None,
    short: ShortDocuments | None = None,
) -> Tensor:
    """Stands in on a CPU for the reference, which is one opaque operation to a compiler."""
    q, k, v = qkv.unbind(1)
    if places is not None:
        q = q[places]
    place_q, place_k = torch.arange(q.shape[0]), torch.arange(k.shape[0])
    document_q = torch.bucketize(place_q, cu_seqlens_q[1:], right=True)
    document_k = torch.bucketize(place_k, cu_seqlens_k[1:], right=True)
    seen = document_q[:, None] == document_k[None, :]
    if window is not None:
        seen &= (place_q[:, None] - place_k[None, :]).abs() <= window
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def check(
    model: ModernBertForMaskedLM, compiler: str, device: str, packed_row: Callable, tolerance: float
) -> None:
    """Compiled and eager give the same losses and gradients on every layout."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    places = torch.arange(0, 512, 4)
    given = places.to(device)
    labels = torch.randint(3, 320, places.shape).to(device)
    names = [name for name, _ in model.named_parameters()]
    assert len(LAYOUTS) == 20
    for lengths in LAYOUTS:
        row = packed_row(lengths)
        of_each = torch.searchsorted(places, row.cu_seqlens.long()).int().to(device)
        row = row.to(device)
        counted = 128 - len(lengths)
        labels[counted:] = -100
        results = []
        for function in (compiled, model):
            loss = function(*row.arguments(), given, labels, counted, masked_cu_seqlens=of_each)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            results.append((loss.item(), gradients))
        (loss, gradients), (expected_loss, expected) = results
        assert loss == pytest.approx(expected_loss, rel=tolerance)
        for name, ours, theirs in zip(names, gradients, expected, strict=True):
            difference = (ours.float() - theirs.float()).norm()
            assert difference <= 10 * tolerance * theirs.float().norm(), (lengths, name)
    assert counter.frame_count <= 2


def test_one_graph(
    small: ModernBertConfig,
    lively_model: Callable,
    packed_row: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The choice is made while tracing, as on a GPU.
    monkeypatch.setitem(BACKENDS, "reference", dense_attention)
    model = lively_model(replace(small, num_hidden_layers=2))
    check(model, "aot_eager", "cpu", packed_row, 1e-5)


def dense_local_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, bounds: Tensor, window: int
) -> Tensor:
    """Stands in for the kernel, which a CPU's Triton could not be traced into."""
    turned = rope_reference(qkv, cos, sin, position_ids)
    return dense_attention(turned, None, bounds, bounds, 0, window)


@pytest.fixture
def with_kernel(
    small: ModernBertConfig, lively_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> ModernBertForMaskedLM:
    """A model whose attention is the kernel's where that can be; stand-ins compute it."""
    monkeypatch.setitem(BACKENDS, "reference", dense_attention)
    monkeypatch.setattr(attention, "local_attention", dense_local_attention)
    monkeypatch.setattr(attention, "document_bounds", lambda cu_seqlens, tokens: cu_seqlens)
    model = lively_model(replace(small, num_hidden_layers=2))
    model.attention = Choice("reference", "kernel")
    return model


def test_one_graph_beside_the_kernel(
    with_kernel: ModernBertForMaskedLM, packed_row: Callable
) -> None:
    check(with_kernel, "aot_eager", "cpu", packed_row, 1e-5)


# Twenty of 320 tokens: long documents alone, these beside short ones, and short ones alone.
KINDS = [
    *([long, 320 - long] for long in (135, 145, 155, 165)),
    *([[128, 128, 64], [16] * 20, [64] * 5, [100] * 3 + [20]]),
    *([140] * long + [4] * (80 - 35 * long) for long in (1, 2)), [140] + [1] * 180,
    *([320 - 4 * short, *[4] * short] for short in range(2, 47, 5)),
]  # fmt: skip


def check_layer(choice: Choice, compiler: str, device: str, dtype: torch.dtype) -> int:
    """A layer without a window, as training compiles it, and the last one, on twenty layouts: the
    same as eager. The number of graphs of either."""
    tables = RotaryTables(320, 64, 10_000.0).to(device)

    def layer(qkv: Tensor, documents: Documents, queries: Queries | None) -> Tensor:
        return attend(qkv, tables, documents, None, choice, queries)

    assert [sum(lengths) for lengths in KINDS] == [320] * 20
    generator, most = torch.Generator().manual_seed(0), 0
    places = torch.arange(0, 320, 4)
    for some in (False, True):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(compiler)
        compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend=counter)
        for lengths in KINDS:
            ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
            long = [length for length in lengths if length > SHORT_DOCUMENTS]
            of_long = LongDocuments(len(long), sum(long))
            if len(lengths) - len(long) < 3:
                of_long = LongDocuments(len(lengths), 320)
            of_each = torch.searchsorted(places, ends.long()).int().to(device)
            ends = ends.to(device)
            for bounds in (ends, of_each):
                torch._dynamo.maybe_mark_dynamic(bounds, 0)
            bound = 128 if max(lengths) <= 128 else 512
            positions = positions_from(ends, 320)
            documents = describe_documents(positions, ends, bound, choice, of_long)
            qkv = torch.randn(320, 3, 1, 64, generator=generator).to(device, dtype).requires_grad_()
            queries = Queries(places.to(device), of_each) if some else None
            grad = torch.randn(80 if some else 320, 1, 64, generator=generator).to(device, dtype)
            results = []
            for function in (compiled, layer):
                out = function(qkv, documents, queries)
                results.append((out.detach(), *torch.autograd.grad(out, qkv, grad)))
            for ours, theirs in zip(*results, strict=True):
                difference = (ours.float() - theirs.float()).norm()
                assert difference <= 2 * torch.finfo(dtype).eps * theirs.float().norm(), lengths
        most = max(most, counter.frame_count)
    return most


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are compiled")
def test_one_graph_for_long_documents_and_short_ones() -> None:
    choice = Choice("reference", "kernel")
    assert check_layer(choice, "aot_eager", "cpu", torch.float32) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["fa4", "fa2", "varlen"])
def test_gpu_one_graph_for_long_documents_and_short_ones(backend: Backend, cuda: str) -> None:
    device = torch.device(cuda)
    if reason := why_not(backend, device.type, device.index, torch.bfloat16, 64):
        pytest.skip(reason)
    choice = choose_attention(device, torch.bfloat16, 64, backend)
    assert check_layer(choice, "inductor", cuda, torch.bfloat16) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["fa4", "fa2", "varlen"])
def test_gpu_one_graph(
    backend: Backend,
    cuda: str,
    small: ModernBertConfig,
    lively_model: Callable,
    packed_row: Callable,
) -> None:
    device = torch.device(cuda)
    if reason := why_not(backend, device.type, device.index, torch.bfloat16, 64):
        pytest.skip(reason)
    model = lively_model(replace(small, num_attention_heads=2)).to(cuda, torch.bfloat16)
    model.attention = choose_attention(device, torch.bfloat16, 64, backend)
    check(model, "inductor", cuda, packed_row, 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 64])
def test_gpu_a_compiled_layer_turns_its_product_where_it_lies(
    window: int | None, cuda: str
) -> None:
    """No pass beside: neither a copy of the product, nor one of its gradient."""
    torch._dynamo.reset()
    tables = RotaryTables(1024, 64, 10_000.0).to(cuda)
    project = torch.nn.Linear(128, 3 * 128, bias=False).to(cuda, torch.bfloat16)
    choice = choose_attention(torch.device(cuda), torch.bfloat16, 64)
    cu_seqlens = torch.tensor([0, 500, 1024], dtype=torch.int32, device=cuda)
    positions = positions_from(cu_seqlens, 1024)
    documents = describe_documents(positions, cu_seqlens, 1024, choice)
    hidden = torch.randn(1024, 128, device=cuda, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(1024, 2, 64, device=cuda, dtype=torch.bfloat16)

    def layer(hidden: Tensor) -> Tensor:
        qkv = project(hidden).unflatten(-1, (3, 2, 64))
        return attend(qkv, tables, documents, window, choice)

    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    results = []
    for function in (layer, compiled):
        torch.autograd.grad(function(hidden), hidden, grad)  # compiles, and wakes the library
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            out = function(hidden)
            (gradient,) = torch.autograd.grad(out, hidden, grad)
            torch.cuda.synchronize()
        results.append((out, gradient))
    for ours, theirs in zip(*results, strict=True):
        assert (ours.float() - theirs.float()).norm() <= 1e-2 * theirs.float().norm()
    names = [event.name for event in profile.events()]
    turns = sum("rope_in_place" in name for name in names)
    assert turns == (2 if window is None else 1), names
    assert not [name for name in names if "_rope_kernel" in name], names
    assert not [name for name in names if re.search("copy|clone|triton_poi", name, re.I)], names
