"""What a forward of ModernBERT-base keeps for its backward, from shapes: nothing is computed.

    python saved_activations_worker.py RECOMPUTE:LAYERS:eager|compiled …

prints the GiB of each case as a list in JSON. A process of its own because Triton reads
TRITON_INTERPRET once: interpreted kernels cannot be traced into a graph. compiled: each layer is
traced with its backward as one graph, with the operations of a GPU, and cut into the two as the
compiler cuts it.
"""

import json
import sys
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from model import modernbert, rotary
from model.attention import Choice
from model.config import BASE
from model.modernbert import ModernBertForMaskedLM

TOKENS, MASKED = 65_536, 19_660


class NoDevice:
    """Of a Triton driver, what torch asks for to see which of its arguments a kernel writes to.

    Without, it copies every argument before the launch, and a copy would be kept for the original.
    """

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def make_model(recompute: Any, layers: int, compiled: bool) -> ModernBertForMaskedLM:
    """As on a GPU, in bf16."""
    for module in (modernbert, rotary):
        module.runs_in_triton = lambda tensor: True
    modernbert.initialize = lambda *_: None
    torch.set_default_dtype(torch.bfloat16)
    model = ModernBertForMaskedLM(replace(BASE, num_hidden_layers=layers))
    torch.set_default_dtype(torch.float32)
    model.attention = Choice("fa4", "kernel")
    model.set_recompute(recompute)
    for module in (*model.model.layers, model.head) if compiled else ():
        module.compile(fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")
    return model


def kept_gib(recompute: str, layers: int, compiled: bool) -> float:
    torch._dynamo.reset()
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = make_model(recompute, layers, compiled)
        ids = torch.zeros(TOKENS, dtype=torch.int64)
        bounds = torch.zeros(257, dtype=torch.int32)
        torch._dynamo.maybe_mark_dynamic(bounds, 0)
        masked = torch.zeros(MASKED, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(
                ids, ids, bounds, 8192, masked, masked, MASKED, masked_cu_seqlens=bounds.clone()
            )
        loss.backward()
    owned = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    sizes = [t.untyped_storage().nbytes() for at, t in kept.items() if at not in owned]
    return sum(sizes) / 2**30


def main() -> None:
    triton.runtime.driver.set_active(NoDevice())
    cases = [case.split(":") for case in sys.argv[1:]]
    print(
        json.dumps([kept_gib(part, int(layers), how == "compiled") for part, layers, how in cases])
    )


main()
