"""Runs every stage in a process of its own and prints the peak memory of each, in kB, as JSON.

    python measured_stages.py RUN.YAML

`baseline` is a process that does nothing: what Python and the imports take.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from common.config import load_config
from data_prep.config import DataPrep
from data_prep.pipeline import Pipeline, find_run
from data_prep.stages import Stage


def peak_of(work: Callable[[], object]) -> int:
    """The peak resident memory, in kB, of a process that does `work`."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit("a stage failed")
    return usage.ru_maxrss


def do(make: Callable[[], Stage]) -> None:
    stage = make()
    if stage.tasks:
        stage.prepare()
        for index in range(len(stage.tasks)):
            stage.run_task(index)
        stage.finish()


def main() -> None:
    config = load_config(DataPrep, "data_prep", Path(sys.argv[1]))
    config.out_dir.mkdir()
    run, _ = find_run(config)
    peaks = {"baseline": peak_of(lambda: None)}
    for name in Pipeline(run).stage_names():
        peaks[name] = peak_of(lambda name=name: do(lambda: Pipeline(run).stage(name)))
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
