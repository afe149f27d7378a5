"""Files and folders appear whole or not at all, for their owner alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from common.files import (
    FolderInUse,
    file_hash,
    only_user_of,
    whole_file,
    whole_folder,
    write_json,
)


def test_whole_file_appears_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with whole_file(path) as file:
        file.write(b"abc")
        assert not path.exists()
    assert path.read_bytes() == b"abc"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="full"), whole_file(path) as file:
        file.write(b"new")
        raise OSError("full")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_whole_folder_replaces_or_leaves(tmp_path: Path) -> None:
    path = tmp_path / "step"
    with whole_folder(path) as folder:
        (folder / "one").write_text("1")
        assert not path.exists()
    with pytest.raises(RuntimeError), whole_folder(path) as folder:
        (folder / "two").write_text("2")
        raise RuntimeError
    assert [p.name for p in path.iterdir()] == ["one"]
    assert (path / "one").stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["step"]
    with whole_folder(path) as folder:
        (folder / "three").write_text("3")
    assert [p.name for p in path.iterdir()] == ["three"]


def test_json_bytes_do_not_depend_on_key_order(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"x": 1, "y": [2]})
    write_json(tmp_path / "b", {"y": [2], "x": 1})
    assert file_hash(tmp_path / "a") == file_hash(tmp_path / "b")


def test_a_folder_has_one_user_at_a_time(tmp_path: Path) -> None:
    """Another process is refused with our name, and the lock of one that is killed is gone."""
    folder = tmp_path / "new" / "out"
    script = (
        "import pathlib, sys, time; from common.files import only_user_of\n"
        "with only_user_of(pathlib.Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(FolderInUse, match=rf"new/out is in use by process {other.pid} on"):
            with only_user_of(folder):
                pytest.fail("both were let in")
        other.kill()
    with only_user_of(folder):
        assert (folder / ".lock").stat().st_mode & 0o777 == 0o600
    with only_user_of(folder):
        pass
