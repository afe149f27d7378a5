"""`sbatch slurm/preprocess.sh` on a real SLURM of two nodes: killed, submitted again, compared."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.synthetic.corpus import write_corpus

ROOT = Path(__file__).parent.parent.parent
DEADLINE_S = 600
CANARY = "canary-7Q"

RUN = """
data_prep:
  raw_dir: {folder}/raw
  out_dir: {folder}/{out}
  sources:
    discharge: [canary.csv]
    icd10cm: [codes/icd10cm_order_*.txt]
    icd9cm_sg: [codes/CMS*_DESC_LONG_SG.txt]
  tokenizer: {{vocab_size: 512}}
  row_tokens: 512
  max_lengths: [128]
  rows_per_shard: 40
  slurm: {{mem_per_cpu_gb: 1, tasks_per_job: 2}}
"""


# Of many small tasks, so that a stage is several arrays.
SMALL_TASKS = """
data_prep:
  raw_dir: {folder}/raw
  out_dir: {folder}/{out}
  sources: {{discharge: [canary.csv, mimic-iv-note/note/discharge.csv.gz]}}
  part_characters: 5000
  near_duplicates: {{bands: 2}}
  tokenizer: {{vocab_size: 448}}
  row_tokens: 512
  max_lengths: [128]
  slurm: {{mem_per_cpu_gb: 1}}
"""
# What every Python process of a job executes when it starts.
SHORT_ARRAYS = """
import data_prep.slurm
data_prep.slurm._largest_array = lambda: 3
"""
# A step that fails with a note in its variables, in its message and in the cause.
FAILING = """
import data_prep.cleaning_tasks
def failing(texts, *arguments):
    try:
        raise ValueError(texts[0])
    except ValueError as error:
        raise KeyError(f"{texts[0]} in the message") from error
data_prep.cleaning_tasks.broken_rules = failing
"""


def submit(run_file: Path, log: Path, *words: str) -> str:
    options = ["--parsable", f"--output={log}", "--mem=1G"]
    command = ["sbatch", *options, "slurm/preprocess.sh", "--config", str(run_file), *words]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def jobs() -> list[list[str]]:
    """(id, name, node) of all jobs."""
    command = ["squeue", "--noheader", "--format=%F|%j|%N"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [line.split("|") for line in lines.splitlines()]


def wait(job: str, until: Path | None = None) -> None:
    """Return when a job has ended, or when the pattern `until` matches a file."""
    end = time.monotonic() + DEADLINE_S
    while any(found[0] == job for found in jobs()):
        if until is not None and any(until.parent.parent.glob(f"*/{until.name}")):
            return
        if time.monotonic() > end:
            subprocess.run(["scancel", job], check=True)
            pytest.fail(f"job {job} did not end within {DEADLINE_S} s")
        time.sleep(0.2)
    assert until is None, f"job {job} ended too early"


def data_set(out: Path) -> dict[str, bytes]:
    paths = [path for part in ("rows-128", "tokenizer") for path in (out / part).rglob("*")]
    assert len(paths) > 8
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def write_canary(path: Path) -> None:
    path.write_text(
        "note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text\n"
        f'1-DS-1,1,,DS,1,,,"{CANARY} was seen by the physician {"and seen " * 20}"\n'
    )


def run_here(run_file: Path) -> None:
    command = [sys.executable, "-m", "data_prep", "--config", str(run_file), "executor=local"]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)


def assert_logs_hold_no_text(out: Path, log: Path) -> None:
    for path in [log, *out.glob("completions/*/*/executor/**/*")]:
        assert not path.is_file() or CANARY not in path.read_bytes().decode(errors="replace")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_step_that_fails_is_named_without_a_text_and_a_rerun_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With arrays of three tasks at most, so that each stage is several."""
    write_corpus(tmp_path / "raw", documents=40)
    write_canary(tmp_path / "raw" / "canary.csv")
    for out in ("local", "slurm"):
        (tmp_path / f"{out}.yaml").write_text(SMALL_TASKS.format(folder=tmp_path, out=out))
    run_file, out, log = tmp_path / "slurm.yaml", tmp_path / "slurm", tmp_path / "job.log"
    at_start = tmp_path / "sitecustomize.py"
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")

    at_start.write_text(SHORT_ARRAYS + FAILING)
    wait(submit(run_file, log))
    last = log.read_text().strip().splitlines()[-1]
    assert last.startswith("error: stage checks, task 0: KeyError at ")
    assert re.search(r"cleaning_tasks\.py:\d+ in _look_at; its message is not shown because", last)
    assert_logs_hold_no_text(out, log)
    tasks = len(list((out / "documents").rglob("*.parquet")))
    assert tasks > 4
    assert len(list(out.glob("completions/checks/*/executor/failures/*.json"))) == tasks
    logs = out.glob("completions/checks/*/executor/slurm_logs/*")
    assert len({path.name.partition("_")[0] for path in logs}) == -(-tasks // 3)
    done = {path: path.stat().st_ino for path in out.glob("completions/documents/*/*.json")}

    at_start.write_text(SHORT_ARRAYS)
    wait(submit(run_file, log, "slurm.tasks_per_job=3"))
    assert (out / "rows-128" / "manifest.json").is_file(), log.read_text()
    assert {path: path.stat().st_ino for path in done} == done
    assert_logs_hold_no_text(out, log)
    at_start.unlink()
    run_here(tmp_path / "local.yaml")
    assert data_set(out) == data_set(tmp_path / "local")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_cancelled_job_is_continued_to_the_bytes_of_one_machine(tmp_path: Path) -> None:
    write_corpus(tmp_path / "raw", documents=40)
    notes = tmp_path / "raw" / "canary.csv"
    write_canary(notes)
    for out in ("local", "slurm"):
        (tmp_path / f"{out}.yaml").write_text(RUN.format(folder=tmp_path, out=out))
    run_file, out, log = tmp_path / "slurm.yaml", tmp_path / "slurm", tmp_path / "job.log"

    # The job that submits is killed with no time to end its array, and is submitted again.
    first = submit(run_file, log)
    wait(first, until=out / "completions" / "checks" / "*" / "000000.json")
    subprocess.run(["scancel", "--signal=KILL", "--full", first], check=True)
    wait(first)
    done = {path: path.stat().st_ino for path in out.glob("completions/*/*/*.json")}
    assert done
    second = submit(run_file, log)
    wait(second)
    assert (out / "rows-128" / "manifest.json").is_file(), log.read_text()
    assert {path: path.stat().st_ino for path in done} == done
    run_here(tmp_path / "local.yaml")
    assert data_set(out) == data_set(tmp_path / "local")

    logs = list(out.glob("completions/*/*/executor/slurm_logs/*"))
    assert len(logs) > 10
    for path in [*logs, log]:
        assert CANARY not in path.read_text()
    assert [path for path in out.rglob("*") if path.lstat().st_mode & 0o077] == []

    # A task that fails is named, with what to do, in the log of the job that was submitted.
    notes.write_text(notes.read_text() + f'2-DS-1,1,,DS,2,,,"{CANARY} is cut of\n')
    log.unlink()
    third = submit(run_file, log)
    wait(third)
    last = log.read_text().strip().splitlines()[-1]
    assert last.startswith(f"error: {notes}")
    assert "fetch it again" in last
    failures = list(out.glob("completions/documents/*/executor/failures/*.json"))
    assert [json.loads(path.read_text())["kind"] for path in failures] == ["input"]
    assert_logs_hold_no_text(out, log)
    assert list(out.rglob("manifest.json")) == []
