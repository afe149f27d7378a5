"""What an interruption leaves: nothing half, nothing to do twice, and the same bytes in the end."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.config import config_to_yaml
from data_prep import pipeline
from data_prep.config import DataPrep, Sources, Tokenizer
from data_prep.synthetic.corpus import write_corpus

ROOT = Path(__file__).parent.parent.parent
SCRIPT = Path(__file__).parent / "killed_run.py"
# What an executor keeps, and what says when a run was: not part of the result.
RECORDS = ("executor", "run.json", "settings.json", "md5.json", ".lock", ".lock-tasks")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_corpus(folder, documents=40)
    return folder


def configuration(raw: Path, out: Path, **changes: Any) -> DataPrep:
    values: dict[str, Any] = {
        "sources": Sources(
            pubmed=["pubmed/baseline/*.xml.gz", "pubmed/updatefiles/*.xml.gz"],
            discharge=["mimic-iv-note/note/discharge.csv.gz"],
            radiology=["mimic-iv-note/note/radiology.csv.gz"],
            icd9cm_sg=["codes/CMS*_DESC_LONG_SG.txt"],
        ),
        "validation_share": 0.2,
        "tokenizer": Tokenizer(vocab_size=448),
        "row_tokens": 512,
        "max_lengths": [128],
        "rows_per_shard": 8,
        "part_characters": 10_000,
        "plan_documents": 40,
    }
    return DataPrep(raw_dir=raw, out_dir=out, **(values | changes))


@pytest.fixture(scope="module")
def undisturbed(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    pipeline.run(configuration(raw, out))
    return out


def content(out: Path) -> dict[str, bytes]:
    """Every file below `out` that is a result, markers and summaries included."""
    names = {path: path.relative_to(out) for path in sorted(out.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): path.read_bytes()
        for path, name in names.items()
        if not set(RECORDS) & set(name.parts)
    }


def assert_same(out: Path, expected: Path) -> None:
    found, wanted = content(out), content(expected)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert list(out.rglob("*.tmp")) == []


def kill_and_continue(config: DataPrep, folder: Path, workers: int, kills: list[str]) -> Any:
    path = folder / "run.yaml"
    lines = config_to_yaml(config).splitlines()
    path.write_text("data_prep:\n" + "".join(f"  {line}\n" for line in lines))
    command = [sys.executable, str(SCRIPT), str(path), str(workers), str(folder), *kills]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_in_every_stage_it_goes_on_to_the_same_bytes(
    raw: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Now before the list of a stage's tasks is there, now before a file, a marker, or later."""
    config = configuration(raw, tmp_path / "out")
    stages = pipeline.Pipeline(pipeline.find_run(config)[0]).stage_names()
    assert {path.name for path in (undisturbed / "completions").iterdir()} == set(stages)
    kills = [f"{stage}:{1 + number % 3}" for number, stage in enumerate(stages)]
    found = kill_and_continue(config, tmp_path, 1, kills)
    assert found["again"] == []
    assert found["done_before"] > 50
    assert_same(tmp_path / "out", undisturbed)


@pytest.mark.slow
def test_two_workers_killed_in_the_middle_go_on_to_the_same_bytes(
    raw: Path, undisturbed: Path, tmp_path: Path
) -> None:
    kills = ["documents:2", "pairs:3", "clusters:1", "kept:2", "tokens:1", "rows-128:2"]
    config = configuration(raw, tmp_path / "out")
    found = kill_and_continue(config, tmp_path, 2, kills)
    assert found["again"] == []
    assert found["done_before"] > 50
    assert_same(tmp_path / "out", undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk, and not in every container")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_an_error_that_names_the_file_and_goes_on_with_room(
    raw: Path, undisturbed: Path, small_disk: Path
) -> None:
    """The disk holds ever more of the stages until it holds all of them."""
    out = small_disk / "out"
    config = configuration(raw, out)
    failed_in = []
    for kilobytes in range(600, 6000, 600):
        remount = ["mount", "-o", f"remount,size={kilobytes}k", str(small_disk)]
        subprocess.run(remount, check=True)
        try:
            pipeline.run(config)
            break
        except OSError as error:
            message = str(error)
        assert os.strerror(errno.ENOSPC) in message or "is the disk full?" in message
        assert str(out) in message
        failed_in.append(message)
        assert list(out.rglob("manifest.json")) == []
        assert list(out.rglob("*.tmp")) == []
    assert len(failed_in) > 1
    assert_same(out, undisturbed)


def test_leftovers_of_a_killed_run_are_removed(
    raw: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Also those of files that are whole by now."""
    out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    (out / "documents/pubmed/.00000.parquet.tmp").write_text("half")
    (out / "tokens/train/pubmed/.00000.tmp").mkdir()
    (out / "tokens/train/pubmed/.00000.tmp/tokens.bin").write_text("half")
    pipeline.run(configuration(raw, out))
    assert_same(out, undisturbed)
