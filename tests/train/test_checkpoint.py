"""Checkpoints are whole or absent, and only one that verifies and fits is taken up."""

import dataclasses
import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint_manifest import CheckpointError, verify
from train import checkpoint
from train.ranks import Ranks
from train.schedule import Progress

pytestmark = pytest.mark.usefixtures("joined")


class FakeEngine:
    """Saves and loads as DeepSpeed does with ZeRO, a few bytes instead of weights."""

    def __init__(self) -> None:
        self.loaded = ""
        self.skipped_steps = 0

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert not save_latest
        state = Path(folder) / tag
        state.mkdir(parents=True)
        (state / "mp_rank_00_model_states.pt").write_bytes(b"weights")
        (state / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"moments")

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, None]:
        self.loaded = folder
        # DeepSpeed brings its count back.
        self.skipped_steps = 3
        return folder, None


def save(run: Any, step: int) -> Path:
    return checkpoint.save(FakeEngine(), run, Ranks(), at(step))


def at(step: int, phase: str = "main") -> Progress:
    return Progress(step, {phase: {"notes": 8 * step}}, {phase: {"notes": 500 * step}})


def names(run: Any) -> list[str]:
    return sorted(path.name for path in (run.config.run_dir / "checkpoints").iterdir())


def test_a_checkpoint_names_and_hashes_every_file(resolved: Callable[..., Any]) -> None:
    run = resolved()
    path = save(run, 4)
    manifest = verify(path, ["step", "model"])
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert files == {*manifest["files"], "manifest.json"}
    assert "tokenizer/tokenizer.json" in files
    assert manifest["step"] == 4
    assert manifest["rows"] == {"main": {"notes": 32}}
    assert manifest["tokens"] == {"main": {"notes": 2000}}
    assert manifest["model"] == dataclasses.asdict(run.start)
    assert manifest["config"]["phases"]["main"]["batch"]["rows"] == 8
    (phase,) = manifest["phases"]
    assert phase["data_manifest_sha256"] == run.phases["main"].data.manifest_sha256
    assert (manifest["world_size"], manifest["zero_stage"], manifest["dtype"]) == (1, 1, "fp32")
    assert all((path / name).stat().st_mode & 0o077 == 0 for name in ("manifest.json", "."))


def test_the_newest_is_found_and_brings_the_counters_back(resolved: Callable[..., Any]) -> None:
    run = resolved()
    assert checkpoint.find(run, Ranks()) == checkpoint.Found(None, {}, [], Progress())
    save(run, 4)
    newest = save(run, 8)
    assert checkpoint.find(run, Ranks()) == checkpoint.Found(newest, {}, [], at(8))
    engine = FakeEngine()
    checkpoint.load(engine, checkpoint.find(run, Ranks()))
    assert engine.loaded == str(newest / "deepspeed")
    assert engine.skipped_steps == 3


def test_what_starts_anew_has_left_no_step_out(resolved: Callable[..., Any]) -> None:
    """From another run's checkpoint come weights and moments, no counts."""
    engine = FakeEngine()
    checkpoint.load(engine, checkpoint.Found(None, {}, [], Progress()))
    assert (engine.loaded, engine.skipped_steps) == ("", 0)
    other = save(resolved(), 4)
    checkpoint.load(engine, checkpoint.Found(other, {}, [], Progress()))
    assert (engine.loaded, engine.skipped_steps) == (str(other / "deepspeed"), 0)


def test_only_the_newest_stay(resolved: Callable[..., Any]) -> None:
    run = resolved(checkpoint={"every_steps": 4, "keep": 2})
    for step in (4, 8, 10):
        save(run, step)
    assert names(run) == ["step_00000008", "step_00000010"]


def test_the_end_of_a_phase_stays(resolved: Callable[..., Any], phases: Callable[..., Any]) -> None:
    run = resolved(phases=phases(), checkpoint={"keep": 2})
    for step in (4, 5, 6, 7, 8):
        rows = {"short": {"notes": min(40, 8 * step)}, "long": {"notes": 2 * max(0, step - 5)}}
        checkpoint.save(FakeEngine(), run, Ranks(), Progress(step, rows, rows))
    # 40 rows of the phase short: all.
    assert names(run) == ["step_00000005", "step_00000007", "step_00000008"]


@pytest.mark.parametrize(
    "file", ["deepspeed/state/mp_rank_00_model_states.pt", "tokenizer/tokenizer.json"]
)
def test_a_damaged_checkpoint_is_passed_over_with_its_name(
    resolved: Callable[..., Any], file: str
) -> None:
    run = resolved()
    older, newest = save(run, 4), save(run, 8)
    (newest / file).write_bytes(b"wrong")
    found = checkpoint.find(run, Ranks())
    assert found.path == older
    assert found.skipped == {
        newest: f"{newest / file} is damaged: its sha256 is not the manifest's"
    }
    (older / file).unlink()
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        checkpoint.find(run, Ranks())


def test_damaged_ones_push_no_whole_one_out(resolved: Callable[..., Any]) -> None:
    """As many as are kept, and newer than what is saved next."""
    run = resolved(checkpoint={"keep": 3})
    older, *newer = (save(run, step) for step in (4, 8, 12))
    for path in newer:
        (path / "manifest.json").unlink()
    run = resolved(checkpoint={"keep": 2})
    found = checkpoint.find(run, Ranks())
    assert found.path == older
    assert set(found.skipped) == set(newer)
    aside = [checkpoint.put_aside(path).name for path in found.skipped]
    assert [name for name in names(run) if name.startswith(".")] == sorted(aside)
    next_one = save(run, 6)
    assert checkpoint.find(run, Ranks()).path == next_one
    assert older.exists()
    # Once more with one of the same name.
    (save(run, 8) / "manifest.json").unlink()
    (again,) = checkpoint.find(run, Ranks()).skipped
    assert checkpoint.put_aside(again).name == aside[-1]
    assert checkpoint.find(run, Ranks()).path == next_one


def test_a_checkpoint_without_a_readable_manifest_is_passed_over(
    resolved: Callable[..., Any],
) -> None:
    run = resolved()
    older, newest = save(run, 4), save(run, 8)
    content = (newest / "manifest.json").read_text()
    without_files = {key: value for key, value in json.loads(content).items() if key != "files"}
    unusable = ([], json.loads(content) | {"format": 99}, without_files)
    for broken in (content[:-20], *map(json.dumps, unusable)):
        (newest / "manifest.json").write_text(broken)
        found = checkpoint.find(run, Ranks())
        assert found.path == older
        assert str(newest / "manifest.json") in found.skipped[newest]
    (newest / "manifest.json").unlink()
    assert f"{newest} is not a checkpoint" in checkpoint.find(run, Ranks()).skipped[newest]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model": {"hidden_size": 64, "num_attention_heads": 2}}, r"model\.hidden_size: 32 -> 64"),
        ({"phase": {"data": {"weights": {"notes": 1.0}}}}, r"phases\.main\.row_order\.\w+"),
        ({"phase": {"global_rope_theta": 1e4}}, r"its phases\.main\.global_rope_theta is"),
        ({"seed": 18}, "its seed is"),
        ({"zero_stage": 2}, "its zero_stage is"),
        ({"optimizer": {"name": "adamw"}}, "its optimizer is"),
        ({"precision": "bf16"}, "its dtype is"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    resolved: Callable[..., Any], changes: dict[str, Any], key: str
) -> None:
    run = resolved()
    path = save(run, 4)
    if "data" in changes.get("phase", {}):
        changes["phase"]["data"]["dir"] = str(run.phases["main"].data.folder)
    with pytest.raises(CheckpointError, match=f"{path} is of another run: {key}"):
        checkpoint.find(resolved(**changes), Ranks())


def test_a_checkpoint_of_another_order_of_rows_is_refused(resolved: Callable[..., Any]) -> None:
    """As programs wrote it that shared out blocks of rows, without the name of a rule."""
    run = resolved()
    path = save(run, 4)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["phases"][0]["row_order"]["rule"] == 2
    order = {"quotas": {"notes": 5041, "papers": 11343}, "start": {"notes": 0, "papers": 0}}
    manifest["phases"][0]["row_order"] = order
    (path / "manifest.json").write_text(json.dumps(manifest))
    message = f"{path} was written by .* by rule 1; this one does by rule 2, .* init_from={path}"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.find(run, Ranks())


def test_a_checkpoint_of_other_data_is_refused(
    resolved: Callable[..., Any], data_maker: Callable[..., Path], tmp_path: Path
) -> None:
    run = resolved()
    save(run, 4)
    data = run.phases["main"].data
    rows = {split: data.sources(split) for split in ("train", "validation")}
    other = resolved(phase={"data": {"dir": str(data_maker(tmp_path / "other", rows, seed=1))}})
    with pytest.raises(CheckpointError, match=r"phases\.main\.data\.dir is not the one"):
        checkpoint.find(other, Ranks())


def test_a_checkpoint_of_another_number_of_processes_is_refused(
    resolved: Callable[..., Any],
) -> None:
    """With what can be done: as many as before, or another run with these weights."""
    path = save(resolved(), 4)
    said = rf"{path} was written by 1 processes, and this run has 2.*Start 1, or.*init_from={path}"
    with pytest.raises(CheckpointError, match=said):
        checkpoint.find(resolved(2), Ranks())


def test_resume_never_refuses_a_folder_with_checkpoints(resolved: Callable[..., Any]) -> None:
    save(resolved(), 4)
    with pytest.raises(CheckpointError, match="resume is never"):
        checkpoint.find(resolved(resume="never"), Ranks())


class Operations:
    """Calls `seen` before every operation that changes a file or a folder, while it is entered."""

    def __init__(self, seen: Callable[[], None]) -> None:
        self._seen, self._watching = seen, False
        # Never taken away again: Python has no way to.
        sys.addaudithook(self._hear)

    def __enter__(self) -> None:
        self._watching = True

    def __exit__(self, *error: object) -> None:
        self._watching = False

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._watching:
            return
        if event == "open":
            changes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        else:
            changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod")
        if changes:
            self._watching = False
            self._seen()
            self._watching = True


@pytest.mark.parametrize("damaged", [False, True], ids=["whole ones", "a damaged one"])
def test_killed_before_any_operation_the_newest_whole_one_is_found(
    resolved: Callable[..., Any], tmp_path: Path, damaged: bool
) -> None:
    """By a copy of the folder before each: it holds the one before, then the one that is saved,
    and what else is in it hinders no later save."""
    run = resolved(checkpoint={"keep": 2})
    for step in (2, 4, 8) if damaged else (2, 4):
        path = save(run, step)
    if damaged:
        (path / "deepspeed/state/mp_rank_00_model_states.pt").write_bytes(b"wrong")
    copies: list[Path] = []

    def copy() -> None:
        copies.append(tmp_path / f"copy{len(copies)}")
        shutil.copytree(run.config.run_dir, copies[-1])

    with Operations(copy):
        begin_and_save(run, 8)
    copy()
    found = []
    for folder in copies:
        killed = resolved(run_dir=folder, checkpoint={"keep": 2})
        found.append(begin_and_save(killed, 12))
        seen = [name for name in names(killed) if not name.endswith(".damaged")]
        assert seen == [f"step_{found[-1]:08d}", "step_00000012"]
    assert set(found) == {4, 8}
    assert found == sorted(found)
    assert len(found) > 10


def begin_and_save(run: Any, step: int) -> int:
    """What a run does with its checkpoints from its start to the next one; where it started."""
    found = checkpoint.find(run, Ranks())
    for path in found.skipped:
        checkpoint.put_aside(path)
    save(run, step)
    return int(found.progress.step)


def test_a_missing_tokenizer_is_said_before_training(
    resolved: Callable[..., Any], data_maker: Callable[..., Path], tmp_path: Path
) -> None:
    rows = {"train": {"notes": 9}, "validation": {"notes": 2}}
    data = data_maker(tmp_path / "alone", rows)
    (data.parent / "tokenizer" / "tokenizer.json").unlink()
    (data.parent / "tokenizer").rmdir()
    with pytest.raises(ValueError, match="tokenizer"):
        resolved(phase={"data": {"dir": str(data)}})


def test_what_was_changed_since_a_checkpoint_is_said(resolved: Callable[..., Any]) -> None:
    path = save(resolved(), 4)
    found = checkpoint.find(resolved(phase={"masking": {"rate": 0.2}}), Ranks())
    assert found.path == path
    assert found.changed == ["phases.main.masking.rate: 0.3 -> 0.2"]


def test_a_full_disk_is_an_error_and_leaves_no_checkpoint(
    resolved: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = resolved()
    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(CheckpointError, match=r"step_00000004 cannot be written: .*No space left"):
        save(run, 4)
    assert checkpoint.checkpoints(run.config.run_dir / "checkpoints") == []


def test_phases_may_be_added_and_the_others_stay(
    resolved: Callable[..., Any], phases: Callable[..., Any]
) -> None:
    """Those to come are checked like those that have begun."""
    parts = phases()
    run = resolved(phases=parts)
    path = checkpoint.save(FakeEngine(), run, Ranks(), at(3, "short"))
    decay = {**parts["long"], "tokens": 512}
    longer = resolved(phases={**parts, "decay": decay})
    assert checkpoint.find(longer, Ranks()).path == path
    for changed, key in (
        ({"short": parts["short"]}, "its phases"),
        ({"long": parts["long"], "short": parts["short"]}, "its phases"),
        (
            {**parts, "long": {**decay, "data": parts["short"]["data"]}},
            r".*long\.data\.dir is not",
        ),
        ({**parts, "long": {**decay, "global_rope_theta": 1e6}}, r"its phases\.long\.global_rope"),
    ):
        with pytest.raises(CheckpointError, match=f"{path} is of another run: {key}"):
            checkpoint.find(resolved(phases=changed), Ranks())


def test_a_length_that_moves_what_a_later_phase_reads_is_refused(
    resolved: Callable[..., Any], phases: Callable[..., Any]
) -> None:
    parts = phases()
    twice = {"one": parts["short"], "two": parts["short"]}
    path = checkpoint.save(FakeEngine(), resolved(phases=twice), Ranks(), at(3, "one"))
    longer = {"one": {**parts["short"], "tokens": 5120}, "two": parts["short"]}
    with pytest.raises(CheckpointError, match=rf"{path} .* phases\.two\.row_order\.\w+"):
        checkpoint.find(resolved(phases=longer), Ranks())
    last = {"one": parts["short"], "two": {**parts["short"], "tokens": 5120}}
    found = checkpoint.find(resolved(phases=last), Ranks())
    assert found.changed == ["phases.two.tokens: 2560 -> 5120"]


def test_lengths_and_batches_may_be_changed_where_the_shares_stay(
    resolved: Callable[..., Any], data_folder: Path
) -> None:
    """Not the length that sources without `epochs` fill up: it is what says how much is theirs."""
    part = {"data": {"dir": str(data_folder), "epochs": {"notes": 2}}, "tokens": 158 * 64}
    path = save(resolved(phase=part), 4)
    # Another number of rows in all, for the last step is another one.
    other = resolved(phase={**part, "batch": {"rows": 20, "micro_rows": 2}})
    assert other.phases["main"].schedule.rows() == 160
    assert checkpoint.find(other, Ranks()).path == path
    with pytest.raises(CheckpointError, match=r"main\.row_order\.weights\.notes: \d+ -> \d+"):
        checkpoint.find(resolved(phase={**part, "tokens": 200 * 64}), Ranks())


def test_the_base_of_the_phase_is_the_models(
    resolved: Callable[..., Any], phases: Callable[..., Any]
) -> None:
    run = resolved(phases=phases())
    for step, phase, theta in ((4, "short", 10_000.0), (12, "long", 160_000.0)):
        path = checkpoint.save(FakeEngine(), run, Ranks(), at(step, phase))
        assert verify(path, ["model"])["model"]["global_rope_theta"] == theta
