"""What a forward keeps for its backward at full size, from shapes alone: nothing is computed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).parent / "saved_activations_worker.py"


def kept_gib(recompute: str, layers: int, how: str) -> float:
    """GiB that ModernBERT-base of so many layers keeps of 65,536 tokens on a GPU."""
    done = subprocess.run(
        [sys.executable, str(WORKER), recompute, str(layers), how],
        env=dict(os.environ, TRITON_INTERPRET="0", PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recompute", "gib"),
    [("none", 19.0), ("mlp", 12.8), ("layer", 4.4)],
)
def test_what_base_keeps_of_65_536_tokens(recompute: str, gib: float) -> None:
    assert kept_gib(recompute, 22, "eager") == pytest.approx(gib, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "mlp"])
def test_compiled_it_keeps_no_more(recompute: str) -> None:
    """And a layer with a GPU's operations is one graph: traced on shapes, for want of a GPU."""
    assert kept_gib(recompute, 4, "compiled") <= 1.01 * kept_gib(recompute, 4, "eager")
