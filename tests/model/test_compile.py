"""`torch.compile` takes the model as one graph, and at most twice whatever the documents."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from model.attention import BACKENDS
from model.config import ModernBertConfig
from model.modernbert import ModernBertForMaskedLM

# Twenty, all of 512 tokens.
LAYOUTS = [
    [512], [256, 256], [500, 3, 9], [64] * 8, [16] * 32, [1] * 12 + [500], [300, 212],
    *([512 - 5 * short, *[5] * short] for short in range(1, 100, 8)),
]  # fmt: skip


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int | None
) -> Tensor:
    """Stands in on a CPU for the reference, which is one opaque operation to a compiler."""
    place = torch.arange(q.shape[0])
    document = torch.bucketize(place, cu_seqlens[1:], right=True)
    distance = (place[:, None] - place[None, :]).abs()
    seen = (document[:, None] == document[None, :]) & (distance <= (window or max_seqlen))
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def check(
    model: ModernBertForMaskedLM, compiler: str, device: str, packed_row: Callable, tolerance: float
) -> None:
    """Compiled and eager give the same losses and gradients on every layout."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    places = torch.arange(0, 512, 4, device=device)
    labels = torch.randint(3, 320, places.shape).to(device)
    names = [name for name, _ in model.named_parameters()]
    assert len(LAYOUTS) == 20
    for lengths in LAYOUTS:
        row = packed_row(lengths).to(device)
        counted = 128 - len(lengths)
        labels[counted:] = -100
        results = []
        for function in (compiled, model):
            loss = function(*row.arguments(), places, labels, counted)
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


@pytest.mark.gpu
def test_gpu_one_graph(
    cuda: str, small: ModernBertConfig, lively_model: Callable, packed_row: Callable
) -> None:
    model = lively_model(replace(small, num_attention_heads=2)).to(cuda, torch.bfloat16)
    check(model, "inductor", cuda, packed_row, 1e-2)
