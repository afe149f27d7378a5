"""datatrove's executor for SLURM: each stage is a job array, and its tasks are the array's.

A stage of more tasks than the cluster's arrays may have (MaxArraySize) is several arrays, one after
another.

The command that submits the arrays waits for each, because what tasks a stage has is known only
once the stages before are done; a chain of jobs that depend on each other cannot be made in
advance. So that it does not end with a login session, it is itself a job: `slurm/preprocess.sh`.
When its node fails, SLURM starts it again, and it ends the arrays that are left and goes on.

Jobs bear a name made of the out_dir, by which a later run finds what an earlier one has left.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.utils.stats import PipelineStats

from common.files import write_json
from data_prep.config import DataPrep
from data_prep.executors import StageExecutor, TaskFailed, Work, perform
from data_prep.stages import Stage

_LONGEST_WAIT_S = 15.0
# How often SLURM's controller is asked that does not answer: for an hour.
_MOST_QUESTIONS = 240
# Failed tasks that are named; the others are counted.
_NAMED = 3


class SlurmStageExecutor(StageExecutor, SlurmPipelineExecutor):
    """A job array for what is not done of a stage."""

    def __init__(self, stage: Stage, work: Work, config: DataPrep) -> None:
        slurm = config.slurm
        folder = stage.executor_folder.absolute()
        self.failures = folder / "failures"
        super().__init__(
            pipeline=[work],
            tasks=len(stage.tasks),
            time=slurm.time,
            partition=slurm.partition or "",
            cpus_per_task=slurm.cpus_per_task,
            mem_per_cpu_gb=slurm.mem_per_cpu_gb,
            tasks_per_job=slurm.tasks_per_job,
            workers=config.workers or -1,
            job_name=f"{_job_prefix(config.out_dir)}{stage.name}",
            qos="",
            sbatch_args=dict(slurm.options),
            env_command=_environment(slurm.cpus_per_task),
            logging_dir=str(folder),
        )

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, object]:
        arguments = super().get_sbatch_args(max_array)
        # The executor wants a partition; the cluster has a default.
        return {k: v for k, v in arguments.items() if k != "partition" or v}

    def launch_merge_stats(self) -> None:
        """datatrove would submit a job for its statistics; a stage has its own summary."""

    def run(self) -> None:
        """Submit what is not done, wait for it, and raise TaskFailed for what is not done then.

        In a job of the array: do its tasks.
        """
        if "SLURM_ARRAY_TASK_ID" in os.environ:
            super().run()
            return
        if shutil.which("sbatch") is None:
            raise TaskFailed(
                "executor = slurm, but there is no sbatch here; start slurm/preprocess.sh on a "
                "machine of the cluster, or set executor = local",
                "input",
            )
        self.max_array_size = _largest_array()
        shutil.rmtree(self.failures, ignore_errors=True)
        self.failures.mkdir(parents=True)
        with _ending_jobs(self.job_name):
            with _outside_of_jobs():
                self._submit()
            _wait_for_jobs(self.job_name)
        self._explain(self.get_incomplete_ranks())

    def _submit(self) -> None:
        try:
            super().run()
        except subprocess.CalledProcessError as error:
            raise TaskFailed(
                f"sbatch refused the jobs of stage {self.pipeline[0].stage} (exit status "
                f"{error.returncode}; its message is above); see the keys of `slurm:`",
                "input",
            ) from None

    def _explain(self, missing: list[int]) -> None:
        """Raise TaskFailed for the tasks that are not done, if there are any."""
        if not missing:
            return
        records = [json.loads(path.read_text()) for path in sorted(self.failures.glob("*.json"))]
        if records:
            others = f" (and {len(records) - _NAMED} more)" if len(records) > _NAMED else ""
            messages = list(dict.fromkeys(record["message"] for record in records[:_NAMED]))
            raise TaskFailed("; ".join(messages) + others, records[0]["kind"])
        states = _states_of(self.job_id)
        raise TaskFailed(
            f"{len(missing)} tasks of stage {self.pipeline[0].stage} ended without a result"
            + (f" ({', '.join(states)})" if states else "")
            + f"; SLURM's logs are in {self.slurm_logs_folder}. Mend this (slurm.time, "
            "slurm.mem_per_cpu_gb, …) and submit again: what is done is not done again",
            "system",
        )

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        try:
            perform(self.pipeline[0], rank)
        except TaskFailed as error:
            problem = error
        else:
            return PipelineStats()
        print(f"error: {problem}", file=sys.stderr)
        record = {"message": problem.message, "kind": problem.kind}
        write_json(self.failures / f"{rank:06d}.json", record)
        raise SystemExit(1)


def end_leftover_jobs(out_dir: Path) -> None:
    """Cancel the jobs that an earlier run in `out_dir` has left, and wait for their end."""
    used_slurm = any(out_dir.glob("completions/*/*/executor/launch_script.slurm"))
    if used_slurm and shutil.which("squeue"):
        prefix = _job_prefix(out_dir)
        jobs = [job for job, name in _jobs() if name.startswith(prefix)]
        if jobs:
            print(f"data_prep: ending jobs of an earlier run: {', '.join(jobs)}", file=sys.stderr)
            subprocess.run(["scancel", *jobs], check=True)
            _wait_for_jobs(prefix)


def _largest_array() -> int:
    """How many tasks a job array of this cluster may have; a stage of more is several arrays.

    Raises TaskFailed where SLURM does not say.
    """
    done = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True)
    found = re.search(r"(?m)^MaxArraySize\s*=\s*(\d+)", done.stdout)
    # 0 switches arrays off.
    if found is None or int(found[1]) == 0:
        raise TaskFailed(
            "`scontrol show config` names no MaxArraySize above 0, and each stage is a job array; "
            "see whether SLURM's controller works (`scontrol ping`) and allows arrays: "
            f"{done.stderr.strip() or 'MaxArraySize is 0 or missing'}",
            "system",
        )
    return int(found[1])


def _job_prefix(out_dir: Path) -> str:
    digest = hashlib.sha256(str(out_dir.resolve()).encode()).hexdigest()
    return f"data_prep.{digest[:12]}."


def _environment(cores: int) -> str:
    """What a job does first: find this environment's programs, keep files private."""
    programs = shlex.quote(str(Path(sys.executable).parent))
    return (
        f"umask 077\nexport PATH={programs}:$PATH RAYON_NUM_THREADS={cores} OMP_NUM_THREADS={cores}"
    )


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Without what SLURM tells the job this runs in: sbatch would take it for its options."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("SLURM_")}
    conf = hidden.get("SLURM_CONF")
    if conf is not None:
        os.environ["SLURM_CONF"] = conf
    try:
        yield
    finally:
        os.environ |= hidden


@contextmanager
def _ending_jobs(name: str) -> Iterator[None]:
    """Cancel the jobs of a name when the block is left by an error, such as a signal to end."""
    try:
        yield
    except BaseException:
        subprocess.run(["scancel", f"--name={name}", f"--user={os.getuid()}"], check=False)
        raise


def _wait_for_jobs(prefix: str) -> None:
    """Return once no job has a name that begins with `prefix`."""
    wait_s = 0.5
    while any(name.startswith(prefix) for _, name in _jobs()):
        time.sleep(wait_s)
        wait_s = min(1.2 * wait_s, _LONGEST_WAIT_S)


def _jobs() -> list[tuple[str, str]]:
    """The (id, name) of this user's jobs.

    Asks again while SLURM's controller does not answer; OSError when it does not for an hour.
    """
    command = ["squeue", "--noheader", f"--user={os.getuid()}", "--format=%F %j"]
    for _ in range(_MOST_QUESTIONS):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
            return sorted({(job, name) for job, name in lines})
        print(f"data_prep: squeue fails, asking again: {done.stderr.strip()}", file=sys.stderr)
        time.sleep(_LONGEST_WAIT_S)
    raise OSError(
        f"squeue has failed {_MOST_QUESTIONS} times in a row (its message is above); see with "
        "`scontrol ping` whether SLURM's controller works, and submit again when it does: what is "
        "done is not done again"
    )


def _states_of(job: str) -> list[str]:
    """In which states the tasks of a job array ended, as far as SLURM still knows."""
    command = ["scontrol", "show", "job", str(job), "--oneliner"]
    shown = subprocess.run(command, capture_output=True, text=True).stdout
    words = [word.partition("=") for word in shown.split()]
    return sorted({value for key, _, value in words if key == "JobState"} - {"COMPLETED"})
