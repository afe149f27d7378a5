"""What a forward keeps for its backward at full size, from shapes alone: nothing is computed."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model import modernbert, rotary
from model.attention import Choice
from model.config import BASE, Recompute
from model.modernbert import ModernBertForMaskedLM

TOKENS, MASKED = 65_536, 19_660


@pytest.fixture
def kept_gib(monkeypatch: pytest.MonkeyPatch) -> Callable[..., float]:
    """GiB that ModernBERT-base in bf16 keeps of a micro-batch with the operations of a GPU.

    With so many layers; compiled: each layer traced with its backward as one graph, and cut as the
    compiler cuts it.
    """
    for module in (modernbert, rotary):
        monkeypatch.setattr(module, "runs_in_triton", lambda tensor: True)
    monkeypatch.setattr(modernbert, "initialize", lambda *_: None)

    def measure(recompute: Recompute, layers: int = 22, compiled: bool = False) -> float:
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with FakeTensorMode(allow_non_fake_inputs=True):
            torch.set_default_dtype(torch.bfloat16)
            try:
                model = ModernBertForMaskedLM(replace(BASE, num_hidden_layers=layers))
            finally:
                torch.set_default_dtype(torch.float32)
            model.attention = Choice("fa4", "kernel")
            model.set_recompute(recompute)
            for module in (*model.model.layers, model.head) if compiled else ():
                module.compile(fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")
            ids = torch.zeros(TOKENS, dtype=torch.int64)
            bounds = torch.zeros(257, dtype=torch.int32)
            masked = torch.zeros(MASKED, dtype=torch.int64)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = model(ids, ids, bounds, 8192, masked, masked, MASKED)
            loss.backward()
        owned = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        sizes = [t.untyped_storage().nbytes() for at, t in kept.items() if at not in owned]
        return sum(sizes) / 2**30

    return measure


@pytest.mark.parametrize(
    ("recompute", "gib"),
    [("none", 28.9), ("activation", 25.8), ("mlp", 17.5), ("layer", 4.5)],
)
def test_what_base_keeps_of_65_536_tokens(
    recompute: Recompute, gib: float, kept_gib: Callable[..., float]
) -> None:
    assert kept_gib(recompute) == pytest.approx(gib, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "activation", "mlp", "layer"])
def test_compiled_it_keeps_no_more(recompute: Recompute, kept_gib: Callable[..., float]) -> None:
    """And a layer with a GPU's operations is one graph, for want of a GPU traced on shapes."""
    torch._dynamo.reset()
    eager = kept_gib(recompute, layers=4)
    assert kept_gib(recompute, layers=4, compiled=True) <= 1.01 * eager
