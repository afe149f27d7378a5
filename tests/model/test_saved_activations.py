"""What a forward keeps for its backward at full size, from shapes alone: nothing is computed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).parent / "saved_activations_worker.py"
GIB = {"none": 18.6, "mlp": 12.6, "layer": 4.3}
COMPILED = ("none", "mlp")


@pytest.fixture(scope="module")
def kept_gib() -> dict[str, float]:
    """GiB that ModernBERT-base keeps of 65,536 tokens on a GPU, by `recompute:layers:how`."""
    cases = [f"{recompute}:22:eager" for recompute in GIB]
    cases += [f"{recompute}:4:{how}" for recompute in COMPILED for how in ("eager", "compiled")]
    done = subprocess.run(
        [sys.executable, str(WORKER), *cases],
        env=dict(os.environ, TRITON_INTERPRET="0", PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, json.loads(done.stdout), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("recompute", GIB)
def test_what_base_keeps_of_65_536_tokens(recompute: str, kept_gib: dict[str, float]) -> None:
    assert kept_gib[f"{recompute}:22:eager"] == pytest.approx(GIB[recompute], abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", COMPILED)
def test_compiled_it_keeps_no_more(recompute: str, kept_gib: dict[str, float]) -> None:
    """And a layer with a GPU's operations is one graph: traced on shapes, for want of a GPU."""
    assert kept_gib[f"{recompute}:4:compiled"] <= 1.01 * kept_gib[f"{recompute}:4:eager"]
