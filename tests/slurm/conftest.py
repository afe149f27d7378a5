"""A SLURM to submit to."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def cluster() -> None:
    """Skips without a SLURM that answers."""
    if shutil.which("sbatch") is None:
        pytest.skip("SLURM is not installed; tests/slurm/start_cluster.sh starts one")
    if subprocess.run(["sinfo"], capture_output=True).returncode != 0:
        pytest.skip("no SLURM answers; tests/slurm/start_cluster.sh starts one")
    if not (ROOT / ".venv" / "bin" / "activate").is_file():
        pytest.skip("the scripts in slurm/ need the environment in .venv; `make install` makes it")
