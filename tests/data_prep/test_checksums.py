"""Checksums of inputs: right, read once, and read again when a file changed."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from data_prep import checksums
from data_prep.checksums import md5s
from data_prep.document import InputError


def write(path: Path, content: bytes, seconds: int) -> str:
    path.write_bytes(content)
    os.utime(path, (seconds, seconds))
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def must_not_read(*arguments: object) -> str:
    raise AssertionError("this was read already")


def test_a_file_is_read_once_while_size_and_time_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = tmp_path / "out" / "md5.json"
    one, two = tmp_path / "one", tmp_path / "two"
    hashes = [write(one, b"one" * 1_000_000, 1000), write(two, b"", 1000)]
    assert md5s([one, two, one], memory) == [*hashes, hashes[0]]
    assert "3.00M/3.00M" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(checksums, "_md5", must_not_read)
        assert md5s([two, one], memory) == [hashes[1], hashes[0]]
    assert capsys.readouterr().err == ""
    for content, seconds in ((b"oNe" * 1_000_000, 1001), (b"longer" * 1_000_000, 1001)):
        changed = write(one, content, seconds)
        assert md5s([one, two], memory) == [changed, hashes[1]]


def test_a_file_changed_just_now_is_not_remembered(tmp_path: Path) -> None:
    """Its next change may leave the same time stamp."""
    (tmp_path / "new").write_bytes(b"a")
    first = md5s([tmp_path / "new"], tmp_path / "md5.json")
    assert json.loads((tmp_path / "md5.json").read_text()) == {}
    (tmp_path / "new").write_bytes(b"b")
    assert md5s([tmp_path / "new"], tmp_path / "md5.json") != first


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(InputError, match=rf"cannot read {path}: "):
            md5s([path], tmp_path / "md5.json")
