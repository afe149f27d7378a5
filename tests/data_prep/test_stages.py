"""Stages: done once, continued after an interruption, begun anew when what decides them changes."""

import json
from pathlib import Path

import pytest

from data_prep.document import InputError
from data_prep.stages import Stage, Task, stage_key


def do(stage: Stage) -> list[dict[str, int]]:
    """Do a stage's tasks one after another, in this process."""
    stage.prepare()
    for index in range(len(stage.tasks)):
        stage.run_task(index)
    return stage.finish()


class Work:
    """Tasks that write a file each, and count how often they ran."""

    def __init__(self, out: Path, number: int = 3) -> None:
        self.out = out
        self.ran: list[int] = []
        self.fails_at: int | None = None
        self.tasks = [
            Task("even" if n % 2 == 0 else "odd", (f"{n}.txt",), lambda n=n: self.do(n))
            for n in range(number)
        ]

    def do(self, number: int) -> dict[str, int]:
        if number == self.fails_at:
            raise RuntimeError("killed")
        self.ran.append(number)
        (self.out / "work" / f"{number}.txt").write_text("x" * number)
        return {"documents": number + 1}

    def stage(self, key: str = "a" * 64) -> Stage:
        return Stage(self.out, "work", key, self.tasks)


def test_counts_are_summed_by_group_and_nothing_is_done_twice(tmp_path: Path) -> None:
    work = Work(tmp_path)
    counts = do(work.stage())
    assert do(work.stage()) == counts == [{"documents": 1}, {"documents": 2}, {"documents": 3}]
    assert work.ran == [0, 1, 2]
    summary = json.loads((tmp_path / "work" / "summary.json").read_text())
    assert summary["counts"] == {"even": {"documents": 4}, "odd": {"documents": 2}}


def test_an_interrupted_stage_goes_on_with_the_tasks_that_are_left(tmp_path: Path) -> None:
    work = Work(tmp_path)
    work.fails_at = 1
    with pytest.raises(RuntimeError, match="killed"):
        do(work.stage())
    assert not (tmp_path / "work" / "summary.json").exists()
    work.fails_at = None
    do(work.stage())
    assert work.ran == [0, 1, 2]


@pytest.mark.parametrize("damage", ["removed", "cut short"])
def test_a_task_whose_file_is_gone_or_cut_is_done_again(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    work = Work(tmp_path)
    do(work.stage())
    path = tmp_path / "work" / "2.txt"
    path.unlink() if damage == "removed" else path.write_text("x")
    do(work.stage())
    assert work.ran == [0, 1, 2, 2]
    assert "work: 2.txt is not as it was left; made again\n" in capsys.readouterr().err
    assert path.read_text() == "xx"


def test_another_key_begins_anew_and_leaves_nothing_of_the_old(tmp_path: Path) -> None:
    old = Work(tmp_path, number=3)
    do(old.stage())
    (tmp_path / "work" / "manifest.json").write_text("{}")
    new = Work(tmp_path, number=2)
    assert new.stage("b" * 64).is_stale()
    do(new.stage("b" * 64))
    assert new.ran == [0, 1]
    names = sorted(path.name for path in (tmp_path / "work").iterdir())
    assert names == ["0.txt", "1.txt", "summary.json"]
    assert not new.stage("b" * 64).is_stale()


def test_another_number_of_tasks_begins_anew_under_the_same_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A marker is the number of a task: that of another division of the work says nothing."""
    do(Work(tmp_path, number=3).stage())
    (tmp_path / "work" / "manifest.json").write_text("{}")
    for number in (2, 4):
        work = Work(tmp_path, number)
        do(work.stage())
        assert work.ran == list(range(number))
        names = sorted(path.name for path in (tmp_path / "work").iterdir())
        assert names == [*(f"{n}.txt" for n in range(number)), "summary.json"]
        assert "divided otherwise than before" in capsys.readouterr().err


def test_markers_without_a_list_of_tasks_begin_anew(tmp_path: Path) -> None:
    work = Work(tmp_path)
    do(work.stage())
    next(tmp_path.glob("completions/work/*/tasks.sha256")).unlink()
    do(work.stage())
    assert work.ran == [0, 1, 2, 0, 1, 2]


def test_files_of_others_are_not_touched(tmp_path: Path) -> None:
    work = Work(tmp_path)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="choose another out_dir"):
        do(work.stage())
    assert (tmp_path / "work" / "mine.txt").read_text() == "mine"
    assert work.ran == []


def test_every_setting_changes_the_key() -> None:
    keys = {
        stage_key("rows", seed=1, length=1024),
        stage_key("rows", seed=2, length=1024),
        stage_key("rows", seed=1, length=8192),
        stage_key("plan", seed=1, length=1024),
    }
    assert len(keys) == 4
    assert stage_key("rows", length=1024, seed=1) in keys
