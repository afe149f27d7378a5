"""What computes attention on a device: chosen once at start, tried out, and what would be faster.

A choice that was asked for by name and cannot be had is an error, and so is one that does not agree
with the reference on this machine: nothing else is taken in its place.
"""

import itertools
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
import triton

from kernels.local_attention import WALKING_TRITONS, pipelined, walkable
from model.attention import (
    BACKENDS,
    SHORT_DOCUMENTS,
    Choice,
    LongDocuments,
    Queries,
    attend,
    describe_documents,
)
from model.config import Backend, Local
from model.rotary import RotaryTables

_INSTALL = {
    "fa4": "pip install -r requirements-gpu.txt (FlashAttention-4, for Hopper and Blackwell)",
    "fa2": "pip install --no-build-isolation flash-attn==2.8.3.post2 "
    "(FlashAttention-2; needs nvcc)",
}


class AttentionError(ValueError):
    """Attention that cannot be had, or does not work here; the message names the keys to change."""


def choose_attention(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    backend: Backend = "auto",
    local: Local = "auto",
) -> Choice:
    """What computes attention for `qkv` of this dtype and width on this device.

    auto: the first of BACKENDS that can, and the kernel beside it on a GPU. Raises AttentionError,
    with the reason, where something else is asked for by name and cannot.
    """
    found = backend
    if backend == "auto":
        found = _best_backend(device.type, device.index, dtype, head_dim)
    elif reason := why_not(backend, device.type, device.index, dtype, head_dim):
        raise AttentionError(f"attention: {backend} cannot be used here: {reason}")
    in_triton = device.type == "cuda" and dtype != torch.float64 and head_dim <= 256
    if local == "kernel" and not in_triton:
        raise AttentionError(
            f"local_attention: kernel needs a CUDA device, bf16, fp16 or fp32 and heads up to 256; "
            f"here are {device.type}, {dtype} and {head_dim}"
        )
    if local == "auto":
        local = "kernel" if in_triton else "backend"
    return Choice(found, local)


@torch.compiler.assume_constant_result
def _best_backend(device: str, index: int | None, dtype: torch.dtype, head_dim: int) -> str:
    return next(name for name in BACKENDS if not why_not(name, device, index, dtype, head_dim))


def why_not(
    backend: str, device: str, index: int | None, dtype: torch.dtype, head_dim: int
) -> str | None:
    """Why a backend cannot be used; None where it can."""
    if backend == "reference":
        return None
    if device != "cuda":
        return f"it needs a CUDA device, and this is {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bf16 and fp16, not {dtype}"
    widest, oldest = (128, 9) if backend == "fa4" else (256, 8)
    if head_dim % 8 or head_dim > widest:
        return f"its heads are multiples of 8 up to {widest} wide, not {head_dim}"
    major, minor = torch.cuda.get_device_capability(index)
    if major < oldest:
        return f"it needs compute capability {oldest}.0, and this GPU has {major}.{minor}"
    package = {"fa4": "flash-attn-4", "fa2": "flash-attn"}.get(backend)
    if package and not _installed(package):
        return f"{package} is not installed; {_INSTALL[backend]}"
    return None


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def what_to_install(
    choice: Choice, device: torch.device, dtype: torch.dtype, head_dim: int, window: int
) -> list[str]:
    """A line on the fastest backend that this GPU could have, if there is a faster one than the
    choice's, or, where a GPU is left with the reference, on why; and one on what layers with a
    window would be faster with."""
    lines = []
    for name in itertools.takewhile(lambda name: name != choice.backend, BACKENDS):
        reason = why_not(name, device.type, device.index, dtype, head_dim)
        if reason and "not installed" in reason:
            lines.append(f"attention would be faster with: {_INSTALL[name]}")
            break
    if choice.backend == "reference" and device.type == "cuda":
        reason = why_not("varlen", device.type, device.index, dtype, head_dim)
        if reason:
            lines.append(f"attention is plain PyTorch's, which is slow: of any other, {reason}")
    layer = dtype, head_dim, window, device
    if choice.local == "kernel" and walkable(*layer) and not pipelined(*layer):
        lines.append(
            f"layers with a window would be faster with: triton {' or '.join(WALKING_TRITONS)}, as "
            "torch 2.11 and 2.13 for CUDA have it (kernels.local_attention_hopper); this is "
            f"{triton.__version__}"
        )
    return lines


class _Case(NamedTuple):
    """What `check_attention` compares: the name of what computes it, and how."""

    name: str
    longest: int
    window: int | None = None
    some_queries: bool = False
    short_apart: bool = False
    behind: int = 5

    def __str__(self) -> str:
        asked = "some" if self.some_queries else "all"
        apart = " short documents apart," if self.short_apart else ""
        return f"{self.name}, window {self.window}, queries at {asked} tokens,{apart}"


def check_attention(
    choice: Choice,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    head_dim: int,
    window: int,
) -> None:
    """Compare a choice with the reference on a few documents, gradients included, before a run.

    A vendor's package can be installed and not work: for another CUDA, or compiled on first use.
    Raises AttentionError in one line; nothing else is chosen in its place.
    """
    tables = RotaryTables(512, head_dim, 10_000.0).to(device)

    def run(which: Choice, wide: torch.dtype, case: _Case) -> list[torch.Tensor]:
        lengths, behind = [case.longest, *[16] * 8, 1, 0, 77], case.behind
        generator = torch.Generator().manual_seed(0)
        qkv = torch.randn(sum(lengths) + behind, 3, heads, head_dim, generator=generator)
        grad = torch.randn(qkv[:, 0].shape, generator=generator).to(device, dtype)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        places = torch.cat([torch.arange(n) for n in [*lengths, behind]]).to(device)
        long = LongDocuments(1, case.longest) if case.short_apart else None
        documents = describe_documents(places, cu_seqlens.to(device), case.longest, which, long)
        queries = None
        if case.some_queries:
            places_M = torch.arange(0, sum(lengths), 3)
            of_each = torch.searchsorted(places_M, cu_seqlens.long()).int()
            filled_up = torch.cat([places_M, torch.zeros(behind, dtype=torch.int64)])
            queries = Queries(filled_up.to(device), of_each.to(device))
            grad = grad[: len(filled_up)]
            grad[len(places_M) :] = 0
        leaf = qkv.to(device, dtype).to(wide).requires_grad_()
        out = attend(leaf, tables, documents, case.window, which, queries)
        return [out.detach().float(), torch.autograd.grad(out, leaf, grad.to(wide))[0].float()]

    in_kernel = choice.local == "kernel"
    cases = [
        _Case(choice.backend, 300),
        _Case(choice.backend, 300, some_queries=True),
        _Case("kernel" if in_kernel else choice.backend, 300, window),
    ]
    if in_kernel:
        cases.append(_Case("kernel", SHORT_DOCUMENTS))
        # Of 211 tokens and of 208, a multiple of 16, for which Triton compiles a kernel of its own:
        # not in the middle of a run.
        both = f"{choice.backend} and kernel"
        cases.append(_Case(both, 300, short_apart=True))
        cases.append(_Case(both, 300, some_queries=True, short_apart=True, behind=2))
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-4)
    for case in cases:
        try:
            ours = run(choice, dtype, case)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            raise AttentionError(
                f"attention {case.name} does not run ({reason}). {_CHANGE}"
            ) from error
        truth = run(Choice("reference", "backend"), torch.float32, case)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(ours, truth, strict=True)]
        if not max(errors) < tolerance:  # NaN too
            raise AttentionError(
                f"attention {case} is off by {errors[0]:.1e} of its result and {errors[1]:.1e} of "
                f"its gradient, where {tolerance:.1e} is allowed. {_CHANGE}"
            )


_CHANGE = (
    "Set `attention` to another backend, or where it is the kernel `local_attention: backend`."
)
