"""`sbatch slurm/pretrain.sh` on a real SLURM: one node, two CPU ranks, from start to end."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
DEADLINE_S = 900

RUN = """
data_prep:
  raw_dir: {folder}/raw
  out_dir: {folder}/data
  sources:
    discharge: [mimic-iv-note/note/discharge.csv.gz]
    radiology: [mimic-iv-note/note/radiology.csv.gz]
  tokenizer: {{vocab_size: 1024}}
  row_tokens: 512
  max_lengths: [256]
  validation_share: 0.05
train:
  run_dir: {folder}/run
  model: {{hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2}}
  phases:
    main:
      data: {{dir: {folder}/data/rows-256}}
      tokens: 12288
      batch: {{rows: 4, micro_rows: 1}}
      lr: {{warmup_tokens: 2048, decay: sqrt, decay_tokens: 2048}}
  validation: {{every_steps: 100, rows: 4}}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(folder=tmp_path))
    for words in (
        ["data_prep.synthetic", str(tmp_path / "raw"), "--documents", "200"],
        ["data_prep", "--config", str(path)],
    ):
        subprocess.run([sys.executable, "-m", *words], check=True, cwd=ROOT)
    return path


def submit(log: Path, *words: str) -> str:
    """Submit slurm/pretrain.sh for two CPU ranks; the job's id."""
    options = ["--parsable", f"--output={log}", "--ntasks-per-node=2", "--cpus-per-task=1"]
    command = ["sbatch", *options, "--gpus-per-node=0", "slurm/pretrain.sh", *words]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def wait(job: str) -> str:
    """The state in which a job ended."""
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        show = ["scontrol", "show", "job", job, "--oneliner"]
        fields = subprocess.run(show, check=True, capture_output=True, text=True).stdout.split()
        state = next(field for field in fields if field.startswith("JobState="))[9:]
        if state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            return state
        time.sleep(1)
    subprocess.run(["scancel", job], check=True)
    pytest.fail(f"job {job} did not end within {DEADLINE_S} s")


@pytest.mark.usefixtures("cluster")
def test_a_job_trains_to_the_end(run_file: Path, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    state = wait(submit(log, "--config", str(run_file)))
    assert state == "COMPLETED", log.read_text()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["step"] for r in records if r["kind"] == "train"][-1] == 6
    assert [r["step"] for r in records if r["kind"] == "validation"] == [6]
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints == ["step_00000006"]
    manifest = json.loads((tmp_path / "run/checkpoints/step_00000006/manifest.json").read_text())
    assert manifest["world_size"] == 2


@pytest.mark.usefixtures("cluster")
def test_a_job_with_a_wrong_key_fails_and_says_so(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    config = tmp_path / "run.yaml"
    config.write_text("train: {optimizer: {learning_rate: 1}}\n")
    assert wait(submit(log, "--config", str(config))) == "FAILED"
    assert "did you mean" in log.read_text()
