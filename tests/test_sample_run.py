"""The main job on real input: from raw files to a model that has learned, and its report."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIMIT_S = 20 * 60
CORES = 2


def cpu_seconds() -> float:
    """What the processes that this one started and waited for have computed, on all cores.

    Unlike the time on a clock it does not grow with what else the machine does.
    """
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.slow
def test_a_small_model_learns_from_the_real_sample(shared_data: Path, tmp_path: Path) -> None:
    """2 nats below the unigram entropy of the validation tokens, in 20 minutes of two cores."""
    data, run_dir = tmp_path / "data", tmp_path / "run"
    config = ["--config", "configs/sample.yaml"]
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }

    def call(*words: str) -> None:
        subprocess.run(words, check=True, cwd=ROOT, env=environment)

    call(sys.executable, "-m", "data_prep", *config, f"raw_dir={shared_data}", f"out_dir={data}")
    before = cpu_seconds()
    launch = ("deepspeed", "--num_accelerators", "2", "train/main.py", *config)
    call(*launch, f"phases.main.data.dir={data / 'rows-1024'}", f"run_dir={run_dir}")
    assert cpu_seconds() - before < CORES * LIMIT_S
    call(sys.executable, "-m", "train.report", str(run_dir))

    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    loss = [record["loss"] for record in records if record["kind"] == "validation"][-1]
    manifest = json.loads((data / "rows-1024" / "manifest.json").read_text())
    entropy = manifest["splits"]["validation"]["unigram_entropy"]
    assert loss < entropy - 2
    page = (run_dir / "report.html").read_text()
    for figure in (loss, entropy, entropy - loss):
        assert f"{figure:.4f}" in page
