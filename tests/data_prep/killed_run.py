"""Runs data preparation again and again, killing it at a write of every stage, until it is done.

    python killed_run.py RUN.YAML WORKERS FOLDER STAGE:WRITE …

In a stage's write number WRITE (of one process) the file is written under its temporary name, and
then the whole process group gets SIGKILL. At last nothing is killed any more. FOLDER gets a module
that does this in every process that is started, workers included.
"""

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from common.config import load_config
from data_prep import pipeline
from data_prep.config import DataPrep

KILL_AT = "TEST_KILL_AT"
PATCH = f'''
import os, pathlib, signal
wanted = os.environ.get("{KILL_AT}")
if wanted:
    out, stage, number = wanted.rsplit(":", 2)
    folders = [pathlib.Path(out, stage), pathlib.Path(out, "completions", stage)]
    seen = []
    def killing(original):
        def rename(self, target):
            if any(folder in pathlib.Path(target).absolute().parents for folder in folders):
                seen.append(target)
                if len(seen) == int(number):
                    os.killpg(0, signal.SIGKILL)
            return original(self, target)
        return rename
    pathlib.Path.replace = killing(pathlib.Path.replace)
    pathlib.Path.rename = killing(pathlib.Path.rename)
'''


def run_in_child(config: DataPrep, kill_at: str | None) -> int:
    """Run in a process group of its own; returns how it ended, as waitpid says it."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        # The others of the group are being killed too, and hold the folder's locks so long.
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.killpg(child, 0)
                time.sleep(0.01)
        return status
    os.setsid()
    status = 1
    try:
        if kill_at is not None:
            os.environ[KILL_AT] = f"{config.out_dir}:{kill_at}"
            exec(PATCH, {})
        pipeline.run(config)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def markers(out: Path) -> dict[str, int]:
    """Each task that is done, and what would be another number if it were done again."""
    found = out.glob("completions/*/*/*.json")
    return {path.relative_to(out).as_posix(): path.stat().st_ino for path in found}


def main() -> None:
    path, workers, folder, *kills = sys.argv[1:]
    Path(folder, "sitecustomize.py").write_text(PATCH)
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
    config = load_config(DataPrep, "data_prep", Path(path), [f"workers={workers}"])
    done: dict[str, int] = {}
    for kill_at in kills:
        status = run_in_child(config, kill_at)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            raise SystemExit(f"the run was not killed at {kill_at}: it ended with {status}")
        done |= markers(config.out_dir)
    if run_in_child(config, None):
        raise SystemExit("the last run failed")
    at_the_end = markers(config.out_dir)
    again = [name for name, number in done.items() if at_the_end[name] != number]
    print(json.dumps({"done_before": len(done), "again": again}))


if __name__ == "__main__":
    main()
