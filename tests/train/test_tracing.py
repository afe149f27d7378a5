"""A profiler's trace of the steps asked for, and of nothing else."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from train.config import Profile
from train.tracing import Tracer, no_trace


def train(folder: Path, settings: Profile | None, last: int) -> list[Path]:
    """Five kinds of steps; the files of the trace."""
    with Tracer(settings, folder, rank=1) as tracer:
        for step in range(1, last + 1):
            tracer.begin_step(step)
            torch.ones(3).cos().sum()
    return sorted((folder / "profile").glob("*"))


def events(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return found


def test_the_steps_asked_for_are_in_the_trace(tmp_path: Path) -> None:
    (path,) = train(tmp_path, Profile(first_step=3, steps=2, rank=1), last=8)
    assert path.name == "rank_1_steps_3_to_4.json.gz"
    names = [event["name"] for event in events(path)]
    spans = {name for name in names if str(name).startswith("step ")}
    assert spans == {"step 3", "step 4"}
    assert names.count("aten::cos") == 2


def test_the_trace_holds_no_content(tmp_path: Path) -> None:
    (path,) = train(tmp_path, Profile(first_step=1, steps=1, rank=1), last=2)
    keys = {key for event in events(path) for key in event.get("args", {})}
    assert not [key for key in keys if "Concrete" in key or "stack" in key.lower()]


def test_a_run_that_ends_leaves_what_it_has(tmp_path: Path) -> None:
    (path,) = train(tmp_path, Profile(first_step=3, steps=9, rank=1), last=4)
    assert path.name == "rank_1_steps_3_to_4.json.gz"


@pytest.mark.parametrize("settings", [None, Profile(first_step=1), Profile(first_step=9, rank=1)])
def test_nobody_else_makes_one(tmp_path: Path, settings: Profile | None) -> None:
    assert train(tmp_path, settings, last=4) == []


def test_steps_begin_at_1() -> None:
    with pytest.raises(ValidationError, match=r"profile\.first_step is 0, not above 0"):
        Profile(first_step=0)


@pytest.mark.parametrize(
    ("first_step", "step", "ahead"),
    [
        (7, 0, None),
        (20, 0, None),
        (7, 8, None),
        (21, 0, "steps 21 to 23 are asked for, steps 1 to 20 are ahead"),
        (7, 9, "steps 7 to 9 are asked for, steps 10 to 20 are ahead"),
        (7, 20, "steps 7 to 9 are asked for, none is ahead"),
        (19, 20, "steps 19 to 21 are asked for, none is ahead"),
    ],
)
def test_a_trace_of_no_step_that_is_left_is_said(
    first_step: int, step: int, ahead: str | None
) -> None:
    said = no_trace(Profile(first_step=first_step, steps=3), step, last_step=20)
    if ahead is None:
        assert said is None
    else:
        assert said == f"profile: no trace is made: {ahead}; set profile.first_step"
