"""Compile kernels for sm_90 on a machine without a GPU, and print what each takes.

    TRITON_INTERPRET=0 PYTHONPATH=. python tests/kernels/compile_worker.py usual|types|odd|tune

The operations are called as a model calls them, on tensors without storage, and Triton's driver is
replaced by one that names an H200 and launches nothing. So what is compiled is what a launch would
compile: its types, its constants, its warps and stages and what Triton itself reads off the
arguments (alignment, ones).

A line of JSON a kernel: its name, the case it was first compiled for, registers a thread, bytes of
stack (spilled registers, above all), warps, shared memory, products on the tensor cores' warp-group
instructions, waits for these that the assembler added, bytes of the widest load, and CPU seconds to
compile.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kernels import (
    documents,
    embedding,
    geglu,
    layer_norm,
    linear_cross_entropy,
    local_attention,
    local_attention_hopper,
    local_attention_tiles,
    mixed_precision,
    rope,
    short_documents,
    stable_adamw,
    unpad,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TOKENS = 65_536
HALF_TYPES = (torch.bfloat16, torch.float16)
BASE, LARGE = (12, 64, 1152), (16, 64, 2624)  # heads, their width, the MLP's
# What the tests compile beside these: heads and widths that fill no tile.
ODD_HEADS = ((3, 24), (1, 2), (5, 6), (3, 80), (1, 16), (4, 2), (2, 8), (2, 128), (2, 256))


class NoDevice:
    """Of a Triton driver, what compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Report:
    """Stands in for `JITFunction.run`: compiles and prints, once a kernel."""

    def __init__(self) -> None:
        self.case = ""
        self.seen: set[str] = set()
        self.run = JITFunction.run

    def __call__(self, kernel: JITFunction, *args: Any, **options: Any) -> None:
        started = os.times()
        compiled = self.run(kernel, *args, **{**options, "warmup": True})
        seconds = sum(os.times()[:4]) - sum(started[:4])
        if compiled.hash in self.seen:
            return
        self.seen.add(compiled.hash)
        module = kernel.fn.__module__.removeprefix("kernels.")
        ptx = compiled.asm["ptx"]
        line = {
            "kernel": f"{module}.{kernel.fn.__name__}",
            "case": self.case,
            **resources(compiled.asm["cubin"]),
            "warps": compiled.metadata.num_warps,
            "shared": compiled.metadata.shared,
            "products": ptx.count("wgmma.mma_async"),
            "added_waits": waits(compiled.asm["cubin"]) - ptx.count("wgmma.wait_group"),
            "widest_load": widest_load(ptx),
            "seconds": round(seconds, 2),
        }
        print(json.dumps(line), flush=True)


def resources(cubin: bytes) -> dict[str, int]:
    used = cuobjdump(cubin, "--dump-resource-usage")
    found = {key: re.search(rf"{key}:(\d+)", used) for key in ("REG", "STACK")}
    registers, stack = (int(match[1]) for match in found.values() if match)
    return {"registers": registers, "stack": stack}


def waits(cubin: bytes) -> int:
    """Of a warp group for its products. ptxas makes each product wait for the one before where it
    thinks that a register is touched in between, and says so in nothing but a remark."""
    return cuobjdump(cubin, "--dump-sass").count("WARPGROUP.DEPBAR")


def cuobjdump(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def widest_load(ptx: str) -> int:
    """Bytes of the widest load from global memory, asynchronous copies included."""
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+) ", ptx)
    copies = re.findall(r"cp\.async\.\w+\.shared\.global \[[^]]*\], \[[^]]*\], 0x(\w+)", ptx)
    return max([int(n or 1) * int(bits) // 8 for n, bits in loads] + [int(c, 16) for c in copies])


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def rotary_case(
    tokens: int, heads: int, width: int, dtype: torch.dtype, index: torch.dtype
) -> list:
    qkv = empty(tokens, 3, heads, width, dtype=dtype)
    tables = [empty(8192, width // 2, dtype=torch.float32) for _ in range(2)]
    return [qkv, *tables, empty(tokens, dtype=index)]


def call_rope(tokens: int, heads: int, width: int, dtype: torch.dtype, index: torch.dtype) -> None:
    qkv, *turn = rotary_case(tokens, heads, width, dtype, index)
    for inverse in (False, True):
        rope._rope._init_fn(qkv, *turn, inverse)
    rope._rope_in_place._init_fn(qkv, *turn)


def call_local_attention(
    tokens: int, heads: int, width: int, dtype: torch.dtype, index: torch.dtype, window: int = 64
) -> None:
    qkv, *turn = rotary_case(tokens, heads, width, dtype, index)
    bounds = empty(2, tokens, dtype=torch.int32)
    out, logsumexp = local_attention._local_attention._init_fn(qkv, bounds, window)
    saved = (qkv, *turn, bounds, out, logsumexp)
    local_attention._local_attention_backward._init_fn(out, *saved, window)


def call_short_documents(tokens: int, heads: int, width: int) -> None:
    """So many, behind long ones where they are fewer than a micro-batch's."""
    qkv, grad_qkv = (empty(TOKENS, 3, heads, width, dtype=torch.bfloat16) for _ in range(2))
    out, grad = (empty(TOKENS, heads, width, dtype=torch.bfloat16) for _ in range(2))
    bounds, first = empty(2, TOKENS, dtype=torch.int32), TOKENS - tokens
    sums = short_documents.room_for_sums(qkv, bounds)
    short_documents.forward_short(qkv, bounds, first, out, sums)
    short_documents.backward_short(grad, qkv, bounds, first, out, sums, grad_qkv)


def call_walks(tokens: int, heads: int, index: torch.dtype, window: int = 64) -> None:
    """As `local_attention` calls them on Hopper; a tensor without storage has no GPU to ask."""
    qkv, *turn = rotary_case(tokens, heads, 64, torch.bfloat16, index)
    bounds = empty(2, tokens, dtype=torch.int32)
    out = empty(tokens, heads, 64, dtype=torch.bfloat16)
    logsumexp = empty(heads, tokens, dtype=torch.float32)
    local_attention_hopper.forward(qkv, bounds, out, logsumexp, window)
    saved = (qkv, *turn, bounds, out, logsumexp)
    local_attention_hopper.backward(out, *saved, qkv, window)


def call_documents(tokens: int, count: int, dtype: torch.dtype) -> None:
    cu_seqlens = empty(count + 1, dtype=torch.int32)
    documents._document_bounds._init_fn(cu_seqlens, tokens)
    documents.clear_behind_documents(empty(tokens, 12, 64, dtype=dtype), cu_seqlens)


def call_embedding(tokens: int, vocabulary: int, width: int, dtype: torch.dtype) -> None:
    ids = empty(tokens, dtype=torch.int64)
    grad = empty(tokens, width, dtype=dtype)
    embedding._embedding_backward._init_fn(grad, ids, vocabulary, vocabulary - 1)


def call_norms(rows: int, width: int, dtype: torch.dtype, weights: torch.dtype) -> None:
    x, weight = empty(rows, width, dtype=dtype), empty(width, dtype=weights)
    normed, rstd = layer_norm._layer_norm._init_fn(x, weight, 1e-5)
    layer_norm._add_layer_norm._init_fn(x, x, weight, 1e-5)
    for grad_sum in (None, x):
        layer_norm._layer_norm_backward._init_fn(normed, weight, rstd, x, grad_sum)


def call_geglu(rows: int, width: int, dtype: torch.dtype) -> None:
    x = empty(rows, 2 * width, dtype=dtype)
    out = geglu._geglu._init_fn(x)
    for again in (False, True):
        geglu._geglu_backward._init_fn(x, out, again)


def call_loss(rows: int, vocabulary: int, width: int, dtype: torch.dtype) -> None:
    sizes = ((rows, width), (vocabulary, width), (vocabulary,))
    leaves = [empty(*size, dtype=dtype) for size in sizes]
    labels = empty(rows, dtype=torch.int64)
    linear_cross_entropy._linear_cross_entropy._init_fn(*leaves, labels, rows, True, True)


def call_unpad(
    rows: int, columns: int, capacity: int, mask: torch.dtype, sources: list[Tensor]
) -> None:
    mask_BS = empty(rows, columns, dtype=mask)
    lengths = unpad._row_lengths._init_fn(mask_BS)
    fillers = triton.cdiv(capacity, columns)
    index, slot, _, _ = unpad._maps._init_fn(mask_BS, lengths, capacity, fillers)
    unpad._gather_rows._init_fn(sources, index, slot.flatten(), 0.0)


def call_stable_adamw(pieces: stable_adamw.Pieces) -> None:
    flat = empty(pieces[-1][1], dtype=torch.float32)
    shares, scalar = empty(2, dtype=torch.float32), empty(dtype=torch.float32)
    rates = empty(len(pieces), dtype=torch.float32)
    stable_adamw.update_moments(flat, flat, flat, shares, scalar, scalar, 1e-6, pieces)
    stable_adamw.apply_update(flat, flat, flat, rates, 0.1, 1e-6, pieces)


def call_mixed_precision(elements: int, dtype: torch.dtype) -> None:
    wide, narrow = empty(elements, dtype=torch.float32), empty(elements, dtype=dtype)
    mixed_precision.add_narrow(wide, narrow)
    mixed_precision.write_narrow(wide, narrow)
    mixed_precision._scale_narrow._init_fn(wide, empty(dtype=torch.float32), dtype)


def usual() -> Iterator[tuple[str, Any]]:
    """What a run of the base model launches, in bf16."""
    heads, width, inner = BASE
    hidden, bf16 = heads * width, torch.bfloat16
    rotary = (TOKENS, heads, width, bf16, torch.int64)
    yield "rope", partial(call_rope, *rotary)
    yield "local_attention", partial(call_local_attention, *rotary)
    # Both divisible by 16 and not, as numbers of tokens behind the long documents come.
    for tokens in (TOKENS, 40_001):
        yield (
            f"short documents, {tokens} tokens",
            partial(call_short_documents, tokens, heads, width),
        )
    yield "local_attention, walks", partial(call_walks, TOKENS, heads, torch.int64)
    yield "documents", partial(call_documents, TOKENS, 4096, bf16)
    yield "embedding", partial(call_embedding, TOKENS, 50_368, hidden, bf16)
    yield "norms", partial(call_norms, TOKENS, hidden, bf16, bf16)
    yield "geglu", partial(call_geglu, TOKENS, inner, bf16)
    yield "loss", partial(call_loss, 19_660, 50_368, hidden, bf16)
    sources = [empty(TOKENS, dtype=torch.int64), empty(TOKENS, hidden, dtype=bf16)]
    yield "unpad", partial(call_unpad, 64, 1024, 40_000, torch.int64, sources)
    yield "stable_adamw", partial(call_stable_adamw, ((0, 2**20), (2**20, 2**20 + 768)))
    yield "mixed_precision", partial(call_mixed_precision, 2304 * hidden, bf16)


def types() -> Iterator[tuple[str, Any]]:
    """Other types than bf16, other positions than int64, and the large model."""
    sizes = [(BASE, dtype) for dtype in (*HALF_TYPES, torch.float32)] + [(LARGE, torch.bfloat16)]
    for (heads, width, inner), dtype in sizes:
        name, hidden = f"{heads}×{width} {dtype}", heads * width
        rotary = (TOKENS, heads, width, dtype, torch.int32)
        yield f"rope {name}", partial(call_rope, *rotary)
        yield f"local_attention {name}", partial(call_local_attention, *rotary)
        yield f"documents {name}", partial(call_documents, TOKENS, 4096, dtype)
        yield f"embedding {name}", partial(call_embedding, TOKENS, 50_368, hidden, dtype)
        yield f"norms {name}", partial(call_norms, TOKENS, hidden, dtype, torch.float32)
        yield f"geglu {name}", partial(call_geglu, TOKENS, inner, dtype)
        yield f"loss {name}", partial(call_loss, 19_660, 50_368, hidden, dtype)
        if dtype == torch.bfloat16:
            yield f"local_attention {name}, walks", partial(call_walks, TOKENS, heads, torch.int32)
        if dtype in HALF_TYPES:
            yield f"mixed_precision {name}", partial(call_mixed_precision, 2304 * hidden, dtype)


def odd() -> Iterator[tuple[str, Any]]:
    """What fills no tile, and ones, which Triton takes for constants; GPU tests have both."""
    half = torch.float16
    for heads, width in ODD_HEADS:
        window = 0 if width == 6 else 9
        rotary = (37, heads, width, half, torch.int32)
        yield f"rope {heads}×{width}", partial(call_rope, *rotary)
        yield f"local_attention {heads}×{width}", partial(call_local_attention, *rotary, window)
    for heads, tokens, window in ((1, 37, 9), (2, 1, 0)):
        walks = partial(call_walks, tokens, heads, torch.int64, window)
        yield f"local_attention {heads}×64, walks", walks
    full = (37, 2, 256, torch.float32, torch.int64)
    yield "local_attention 2×256 fp32", partial(call_local_attention, *full)
    yield "one document", partial(call_documents, 1000, 1, half)
    yield "embedding in 32 bits", partial(call_embedding, 1000, 100_000, 100, half)
    for rows, width in ((37, 6), (1, 96)):
        yield f"embedding {rows}×{width}", partial(call_embedding, rows, 50, width, half)
        yield f"norms {rows}×{width}", partial(call_norms, rows, width, half, half)
        yield f"geglu {rows}×{width}", partial(call_geglu, rows, width, half)
        yield f"loss {rows}×{width}", partial(call_loss, rows, 50, width, half)
    sources = [empty(1000, 3, 7, dtype=half), empty(1000, dtype=torch.bool)]
    yield "unpad 5×200", partial(call_unpad, 5, 200, 229, torch.bool, sources)
    for rows, columns, capacity in ((1, 1, 1), (8, 4, 6), (8, 1100, 3000), (8, 8192, 65_536)):
        sources = [empty(capacity, 5, dtype=torch.float32)]
        call = partial(call_unpad, rows, columns, capacity, torch.int64, sources)
        yield f"unpad {rows}×{columns}", call
    for first in (2, 3):
        pieces = ((first, 204), (204, 206 + first))
        yield f"pieces from {first}", partial(call_stable_adamw, pieces)


def tune() -> Iterator[tuple[str, Any]]:
    """The candidates of --tune."""
    from kernels import benchmark_attention

    heads, width, _ = BASE

    def call(tuning: local_attention_tiles.Tuning) -> None:
        local_attention_tiles.NARROW = tuning
        call_local_attention(TOKENS, heads, width, torch.bfloat16, torch.int64)

    for tuning in benchmark_attention.candidates(local_attention_tiles.NARROW):
        yield benchmark_attention.name_of(tuning), partial(call, tuning)


def main() -> None:
    cases = {"usual": usual, "types": types, "odd": odd, "tune": tune}[sys.argv[1]]
    triton.runtime.driver.set_active(NoDevice())
    local_attention_hopper.multiprocessors = lambda device: 132
    report = Report()
    JITFunction.run = lambda kernel, *args, **options: report(kernel, *args, **options)
    with set_wrap_triton_enabled(False):
        for name, call in cases():
            report.case = name
            call()


if __name__ == "__main__":
    main()
