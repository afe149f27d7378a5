"""The kernels that have no measured run yet compile for sm_90, without a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_kernels_compile_for_hopper() -> None:
    """Every candidate of --tune too; what is used at base sizes spills next to nothing."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "kernels" / "hopper_worker.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    used = re.findall(
        r"local_attention (\w+) bf16 12x64 .*: (\d+) registers, (\d+) bytes of stack, (\d+) of "
        r"shared memory, (\d+) wgmma",
        done.stdout,
    )
    chosen = {half: list(map(int, numbers)) for half, *numbers in reversed(used)}
    for half, (registers, stack, shared, products) in chosen.items():
        if half == "both":
            continue
        assert products > 0, half
        assert stack <= 128, half
        # At least three programs on a multiprocessor: 65,536 registers, 227 KiB.
        assert 3 * 128 * registers <= 65_536, half
        assert 3 * (shared + 1024) <= 227 * 1024, half
    assert {"forward", "queries", "keys"} <= set(chosen)
