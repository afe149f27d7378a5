"""Compile kernels for sm_90 on a machine without a GPU, and print what each takes.

    TRITON_INTERPRET=0 python tests/kernels/hopper_worker.py

A line a kernel: name, registers a thread, bytes of stack (spilled registers), shared memory, and
how many of its products run on the tensor cores' warp-group instructions.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import documents, local_attention, rope, unpad
from kernels.benchmark_attention import candidates

BF16, FP32, I32, I64 = "*bf16", "*fp32", "*i32", "*i64"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_for_hopper(name: str, kernel: Any, types: dict[str, str], options: dict) -> None:
    options = dict(options)
    compiled_for = {key: options.pop(key) for key in ("num_warps", "maxnreg") if key in options}
    signature, constants, attributes = {}, {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in options:
            signature[argument] = "constexpr"
            constants[(place,)] = options[argument]
            continue
        signature[argument] = types[argument]
        if types[argument].startswith("*") or argument == "tokens":
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options=compiled_for)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        used = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", used)[1]) for key in ("REG", "STACK"))
    products = compiled.asm["ptx"].count("wgmma.mma_async")
    print(f"{name}: {registers} registers, {stack} bytes of stack, "
          f"{compiled.metadata.shared} of shared memory, {products} wgmma", flush=True)  # fmt: skip


def attention_types(element: str) -> dict[str, str]:
    names = ("qkv", "turned", "out", "grad", "grad_qkv")
    types = dict.fromkeys(names, element)
    types |= dict.fromkeys(("logsumexp", "pairs", "cos", "sin"), FP32)
    types |= {"bounds": I32, "position_ids": I32, "tokens": "i32"}
    return types | {"scale": "fp32", "scale_log2": "fp32"}


def main() -> None:
    shapes = [(BF16, 2, 12, 64), (BF16, 2, 2, 256), (FP32, 4, 12, 64), (FP32, 4, 2, 256)]
    for element, size, heads, width in shapes:
        tunings = [local_attention.tuning(size, width)]
        if (element, width) == (BF16, 64):
            tunings += candidates()
        seen = set()
        for tuning in tunings:
            halves = [("queries", tuning.queries, True, False), ("keys", tuning.keys, False, True)]
            if tuning.together:
                halves = [("both", tuning.keys, True, True)]
            for half, tiles, queries, keys in [("forward", tuning.forward, False, False), *halves]:
                if (half, tiles) in seen:
                    continue
                seen.add((half, tiles))
                options = local_attention.launch_options(tiles, heads, width, 64)
                kernel = local_attention._local_attention_forward_kernel
                if half != "forward":
                    kernel = local_attention._local_attention_backward_kernel
                    options |= {"QUERIES": queries, "KEYS": keys}
                name = f"local_attention {half} {element[1:]} {heads}x{width} {tiles}"
                compile_for_hopper(name, kernel, attention_types(element), options)
    turn = {
        "qkv": BF16,
        "out": BF16,
        "cos": FP32,
        "sin": FP32,
        "position_ids": I32,
        "tokens": "i32",
    }
    compile_for_hopper("turn", rope._queries_and_keys_kernel, turn, rope._sizes(12, 64))
    ends = {"cu_seqlens": I32, "bounds": I32, "documents": "i32", "tokens": "i32"}
    compile_for_hopper("bounds", documents._bounds_kernel, ends, {"BLOCK": 256})
    rows = {"rows": BF16, "cu_seqlens": I32, "documents": "i32", "elements": "i32", "width": "i32"}
    compile_for_hopper("clear", documents._clear_kernel, rows, {"BLOCK": 4096, "num_warps": 4})
    maps = dict.fromkeys(("lengths", "index", "slot", "cu_seqlens"), I32)
    maps |= {"mask": I64, "fits": "*i1"} | dict.fromkeys(
        ("rows", "columns", "capacity", "fillers"), "i32"
    )
    scan = {"BLOCK": 1024, "BLOCK_B": 1024, "num_warps": 8}
    compile_for_hopper("unpad maps", unpad._maps_kernel, maps, scan)


if __name__ == "__main__":
    main()
