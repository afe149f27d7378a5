"""Every kernel compiles for sm_90, without a GPU, and takes no more than there is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
# A multiprocessor's shared memory, of which a program may have 227 KiB, and its registers.
SHARED, REGISTERS = 227 * 1024, 65_536
# Bytes of registers spilled that are let pass: the backward is held to a number of registers.
SPILLED = {
    "local_attention_tiles._local_attention_queries_kernel": 64,
    "local_attention_tiles._local_attention_keys_kernel": 64,
    "local_attention_hopper._local_attention_walk_backward_kernel": 64,
}
# Of local attention, and how many programs the walks' stretches reckon with.
PROGRAMS = {
    "local_attention_hopper._local_attention_walk_backward_kernel": 2,
    "local_attention_hopper._local_attention_walk_forward_kernel": 3,
}


def compile_for_gpu(which: str, cache: Path) -> list[dict[str, Any]]:
    """What `compile_worker` prints; a process of its own, as kernels here are interpreted."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, ROOT / "tests" / "kernels" / "compile_worker.py", which]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for line in found:
        print(line)
    return found


def programs(line: dict[str, Any]) -> int:
    """Programs that fit on a multiprocessor, by registers (handed out by eights) and memory."""
    registers = -(-line["registers"] // 8) * 8 * 32 * line["warps"]
    return min(REGISTERS // registers, SHARED // (line["shared"] + 1024))


def test_what_a_run_launches(tmp_path: Path) -> None:
    """Base sizes in bf16: next to nothing spilled, full loads, tensor cores, several programs."""
    found = compile_for_gpu("usual", tmp_path)
    for line in found:
        assert line["stack"] <= SPILLED.get(line["kernel"], 0), line
        # Four elements of fp32 or eight of bf16; scalars alone are read narrower.
        narrow = line["kernel"] in (
            "documents._bounds_kernel",
            "documents._clear_kernel",
            "stable_adamw._sum_kernel",
        )
        assert line["widest_load"] == 16 or narrow, line
        if line["kernel"].startswith("local_attention"):
            assert line["products"] > 0, line
            assert programs(line) >= PROGRAMS.get(line["kernel"], 3), line
            # Walks begin products while others run, as long as the assembler lets them.
            assert line["added_waits"] <= 0 or "walk" not in line["kernel"], line
        else:
            # Few warps are enough where a program loads ahead.
            least = 8 if line["kernel"] == "layer_norm._backward_kernel" else 16
            assert programs(line) * line["warps"] >= least, line
    assert {line["kernel"] for line in found} == set(kernels_in_source())


def kernels_in_source() -> list[str]:
    """`module.kernel` of every kernel that is launched."""
    return [
        f"{file.stem}.{line.removeprefix('def ').partition('(')[0]}"
        for file in sorted((ROOT / "kernels").glob("*.py"))
        for before, line in zip(
            ["", *file.read_text().splitlines()], file.read_text().splitlines(), strict=False
        )
        if before.startswith(("@triton.jit", "@gluon.jit"))
        and line.partition("(")[0].endswith("_kernel")
    ]


@pytest.mark.slow
def test_every_type_and_the_large_model(tmp_path: Path) -> None:
    """Heads of 64 in full fp32, whose products take no tensor cores, may spill more."""
    for line in compile_for_gpu("types", tmp_path):
        spilled = 256 if "float32" in line["case"] else 64
        spilled = max(spilled, SPILLED.get(line["kernel"], 0))
        assert line["stack"] <= (spilled if line["kernel"] in SPILLED else 0), line
        assert line["added_waits"] <= 0 or "walk" not in line["kernel"], line
        assert programs(line) >= (1 if "float32" in line["case"] else 2), line


@pytest.mark.slow
def test_odd_sizes_and_ones(tmp_path: Path) -> None:
    """That they compile and fit; their speed matters to nobody."""
    for line in compile_for_gpu("odd", tmp_path):
        assert programs(line) >= 1, line


@pytest.mark.slow
def test_every_candidate_of_the_tuning(tmp_path: Path) -> None:
    """None that spills much or fills a multiprocessor by itself is worth a GPU's time."""
    for line in compile_for_gpu("tune", tmp_path):
        assert line["stack"] <= 64, line
        assert programs(line) >= 2, line
