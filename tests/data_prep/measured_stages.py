"""Runs every stage in a process of its own and prints the peak memory of each, in kB, as JSON.

    python measured_stages.py RUN.YAML

`baseline` is a process that does nothing: what Python and the imports take. `inputs` is what finds
the run. All are forked from one process that does nothing else, for what that one holds they have
too: the buffers of the threads that hash the inputs alone are more for more files.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common.config import load_config
from data_prep import (
    clusters,
    components,
    copy_forward,
    dedup,
    document,
    encoding,
    minhash,
    near_duplicates,
    packing,
    split,
    tasks,
    token_files,
)
from data_prep.config import DataPrep
from data_prep.pipeline import Pipeline, find_run
from data_prep.run_file import RUN_FILE, read_run, write_run
from data_prep.stages import Stage


def make_parts_small() -> None:
    """Of all that is done part by part a part is so small that a thousand documents fill one.

    One that is not full grows with the input until it is, as it should.
    """
    for module in (components, split):
        module._BLOCK = 256
    clusters._TABLE_ROWS = 256
    components.SHARD_MEMBERS = 512
    copy_forward.PART_RECORDS = 512
    dedup.PART_DIGESTS = 512
    document._ROW_GROUP_DOCUMENTS = 256
    encoding._MOST_WORDS = 1 << 15
    near_duplicates.PART_PAIRS = 2048
    near_duplicates._KEY_BLOCK = 256
    near_duplicates.candidate_pairs = partial(minhash.candidate_pairs, part_keys=1024)
    packing.LOOK_AHEAD = 256
    tasks.FOLD_RECORDS = 512
    token_files._BATCH_DOCUMENTS = 256


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
    make_parts_small()
    config = load_config(DataPrep, "data_prep", Path(sys.argv[1]))
    config.out_dir.mkdir()
    peaks = {
        "baseline": peak_of(lambda: None),
        "inputs": peak_of(lambda: write_run(find_run(config)[0])),
    }
    described = json.loads((config.out_dir / RUN_FILE).read_text())
    run = read_run(config.out_dir, described["name"])
    for name in Pipeline(run).stage_names():
        peaks[name] = peak_of(lambda name=name: do(lambda: Pipeline(run).stage(name)))
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
