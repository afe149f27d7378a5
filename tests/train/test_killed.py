"""Runs that are killed while they save a checkpoint go on as if they had not been, bit for bit.

By copies of a run's folder, made by watched.py at every point; test_runs.py kills one for real.
"""

from pathlib import Path
from typing import Any

import pytest

from train.checkpoint import checkpoints

SCRIPT = Path(__file__).parent / "launched.py"

# For each point of saving step 6's checkpoint the step of the newest whole one. The log is ahead of
# it by two steps at first.
POINTS = {
    "begun": 4,
    "saved by DeepSpeed": 4,
    "flushed": 4,
    "completed": 4,
    "renamed": 6,
    # Of those that do not stay, step 2's.
    "one half removed": 6,
    "one removed": 6,
    "over": 6,
    "a step logged since": 6,
    # In a run that is taken up at step 4, because step 6's is damaged.
    "again one put aside": 4,
    "again begun": 4,
    "again completed": 4,
    "again renamed": 6,
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, launcher_in: Any, data_folder: Path) -> Any:
    """Runs of seven steps, checkpoints after 2, 4, 6 and 7 of which two stay: `whole`, which was
    watched, and one taken up from each point."""
    launcher = launcher_in(tmp_path_factory.mktemp("killed"))
    changes = {"phase": {"tokens": 7 * 8 * 64}, "checkpoint": {"every_steps": 2}}
    configs = {name: launcher.write(name, data_folder, **changes) for name in ("whole", *POINTS)}
    tasks = [f"watched:{configs['whole']}", *(f"train:{configs[point]}" for point in POINTS)]
    done = launcher.run(1, *tasks, script=SCRIPT)
    assert done.code == 0, done.out + done.err
    return launcher


@pytest.mark.parametrize("point", POINTS)
def test_a_run_goes_on_from_the_newest_whole_checkpoint(killed: Any, point: str) -> None:
    *_, start = killed.records(point, "start")
    assert start["step"] == POINTS[point]
    for kind in ("train", "validation"):
        assert killed.records(point, kind) == killed.records("whole", kind)
    assert [record["step"] for record in killed.records(point, "train")] == [*range(1, 8)]
    folder = killed.folder / point / "checkpoints"
    assert [path.name for path in checkpoints(folder)] == ["step_00000007", "step_00000006"]
    hidden = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert hidden == ([".step_00000006.damaged"] if point.startswith("again") else [])
