"""Where kernels are tested, and in how many compilations."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, where Triton interprets, and a GPU, where it compiles."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        return torch.device("cuda")
    if torch.cuda.is_available():
        pytest.skip("with a GPU at hand the kernels are compiled, not interpreted")
    return torch.device("cpu")


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    if request.param == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter truncates to bf16 where a GPU rounds")
    return request.param


@pytest.fixture
def poisoned() -> object:
    """Fresh memory holds NaN (or the largest integer), so that a place left unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)


def opcheck_all(op: Callable[..., object], arguments: tuple[object, ...]) -> None:
    """`torch.library.opcheck`; tracing into a kernel needs a compiled one, hence a GPU."""
    on_gpu = any(isinstance(a, Tensor) and a.is_cuda for a in arguments)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if on_gpu:
        checks.append("test_aot_dispatch_dynamic")
    results = torch.library.opcheck(op, arguments, test_utils=checks)
    assert set(results.values()) == {"SUCCESS"}


@pytest.fixture
def opcheck() -> Callable[[Callable[..., object], tuple[object, ...]], None]:
    return opcheck_all


@pytest.fixture
def compiles_twice() -> Callable[[Callable[..., Tensor], list[list[Tensor]]], None]:
    """Compiled as one graph, forward and backward, at most twice over all of these arguments.

    The first dimension of each argument may vary. Results and gradients are those of eager.
    """
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: the interpreter cannot be traced")

    def check(function: Callable[..., Tensor], cases: list[list[Tensor]]) -> None:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("inductor")
        compiled = torch.compile(function, fullgraph=True, backend=counter)
        for case in cases:
            results = []
            for run in (compiled, function):
                leaves = [v.clone().requires_grad_(v.is_floating_point()) for v in case]
                out = run(*leaves)
                out.float().square().sum().backward()
                results.append([out, *(leaf.grad for leaf in leaves if leaf.requires_grad)])
            for ours, theirs in zip(*results, strict=True):
                difference = (ours.float() - theirs.float()).norm()
                assert difference <= 1e-2 * theirs.float().norm()
        assert counter.frame_count <= 2

    return check
