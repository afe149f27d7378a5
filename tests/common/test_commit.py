"""The commit that records and runs are labelled with."""

import subprocess
from pathlib import Path

import pytest

from common.commit import commit


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    command = ["git", "-C", str(folder), *who, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, result = tmp_path / "code.py", tmp_path / "benchmarks" / "results" / "new.json"
    result.parent.mkdir(parents=True)
    file.write_text("1")
    result.write_text("1")
    assert commit(tmp_path) is None, "no checkout"
    git(tmp_path, "init", "--quiet")
    assert commit(tmp_path) is None, "nothing in it"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "one")
    number = git(tmp_path, "rev-parse", "--short=10", "HEAD")
    assert commit(tmp_path) == number
    result.write_text("2")
    assert commit(tmp_path) == number, "what is measured changes no code"
    file.write_text("2")
    assert commit(tmp_path) == f"{number} and changes"
    assert commit(tmp_path / "benchmarks") is None, "a folder in a checkout"
    monkeypatch.setenv("PROJECT_COMMIT", "another")
    assert commit(tmp_path) == "another", "whoever copied the files knows"
    monkeypatch.delenv("PROJECT_COMMIT")
    monkeypatch.setenv("PATH", "")
    assert commit(tmp_path) is None, "no git"
