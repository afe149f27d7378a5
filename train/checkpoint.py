"""Checkpoints: folders that exist whole or not at all, and the choice of one to continue from.

What lies in one is said in `common.checkpoint_manifest`. A checkpoint is filled under a temporary
name by all ranks, flushed to disk, and renamed by rank 0. There is no generator's state in it: all
randomness of a run comes from its counters.
"""

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from common.checkpoint_manifest import (
    DEEPSPEED_FOLDER,
    DEEPSPEED_TAG,
    FORMAT_VERSION,
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    CheckpointError,
    read_manifest,
    verify,
)
from common.config import config_to_dict
from common.files import file_hash, sync_file, sync_folder, write_json
from train.engine import Engine, choose_dtypes, quiet
from train.ranks import Ranks, from_first, gather
from train.resolve import Run, RunPhase
from train.schedule import Progress
from train.start import check_norms, tokenizer_folder

# What a run needs of a manifest to continue.
_KEYS = ("config", *asdict(Progress()))


@dataclass(frozen=True)
class Found:
    """What is at hand to continue from: the checkpoint to take.

    skipped: what is wrong with each of the newer ones, which are passed over.
    changed: the keys whose value is another one than when the checkpoint was written, as text.
    progress: where the checkpoint stands, or the start.
    """

    path: Path | None
    skipped: dict[Path, str]
    changed: list[str]
    progress: Progress

    @property
    def starts_anew(self) -> bool:
        """Whether the run takes its first step next: `path`, if any, is another run's."""
        return self.progress == Progress()


def folder_of(run_dir: Path) -> Path:
    """Where the checkpoints of a run lie."""
    return run_dir / "checkpoints"


def save(engine: Engine, run: Run, ranks: Ranks, progress: Progress) -> Path:
    """Save a checkpoint; every rank calls this after the same step.

    The newest `checkpoint.keep` stay, and those at the end of a phase, from which other runs may
    start. Returns the checkpoint's folder.
    """
    folder = folder_of(run.config.run_dir)
    final = folder / f"step_{progress.step:08d}"
    temporary = folder / f".{final.name}.tmp"
    if ranks.is_first:
        _remove_leftovers(folder)
        temporary.mkdir(parents=True, mode=0o700)
    # Nobody may write into the folder before it is there.
    dist.barrier()
    engine.save_checkpoint(str(temporary / DEEPSPEED_FOLDER), tag=DEEPSPEED_TAG, save_latest=False)
    # The call above ended with a barrier, so every rank's files are complete here. Hashing and
    # flushing them is shared out, each rank's own to itself, whose machine may still hold them.
    mine = [path for path in _files(temporary) if _owner(path, ranks.size) == ranks.rank]
    hashes: dict[str, str] = {}
    for part in gather({_relative(path, temporary): _flush(path) for path in mine}):
        hashes |= part
    problem = ""
    if ranks.is_first:
        try:
            _complete(temporary, run, progress, hashes)
            temporary.rename(final)
            sync_folder(folder)
            for old in checkpoints(folder)[run.config.checkpoint.keep :]:
                if not _ends_phase(old):
                    _remove(old)
        except OSError as error:
            problem = f"{final} cannot be written: {error}"
    # Also a barrier: a rank that went on and ended the run would end rank 0 too, before the rename.
    problem = from_first(problem)
    if problem:
        raise CheckpointError(problem)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    return sorted(folder.glob("step_????????"), reverse=True)


def find(run: Run, ranks: Ranks) -> Found:
    """The newest checkpoint that verifies, as rank 0 sees it; every rank calls this.

    Without one, and with init_optimizer=kept, it is the checkpoint `init_from`, at the start of the
    run. Raises CheckpointError if there are checkpoints and none verifies, if the configuration
    asks for a fresh start where there are some, or if the checkpoint is of another run.
    """
    # Ranks that judged for themselves could take up different checkpoints.
    result: Found | CheckpointError | None = None
    if ranks.is_first:
        try:
            result = _find(run)
        except CheckpointError as error:
            result = error
        except OSError as error:
            result = CheckpointError(f"the checkpoints of {run.config.run_dir}: {error}")
    result = from_first(result)
    if isinstance(result, CheckpointError):
        raise result
    assert result is not None
    return result


def put_aside(path: Path) -> Path:
    """Give a checkpoint that is passed over a hidden name, and return that.

    Otherwise it would count as one of those that are kept, in place of a whole one; or stand in the
    way of the one that will be saved after its step.
    """
    aside = path.with_name(f".{path.name}.damaged")
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)
    sync_folder(path.parent)
    return aside


def load(engine: Engine, found: Found) -> None:
    """Give `engine` the weights and optimizer of a checkpoint, where one is found.

    The count of steps left out comes with them, but not to a run that starts anew.
    """
    if found.path is None:
        return
    with quiet():
        loaded, _ = engine.load_checkpoint(str(found.path / DEEPSPEED_FOLDER), tag=DEEPSPEED_TAG)
    if loaded is None:
        raise CheckpointError(f"{found.path} cannot be loaded by DeepSpeed; move it away to go on")
    if found.starts_anew:
        engine.skipped_steps = 0


def _find(run: Run) -> Found:
    folder = folder_of(run.config.run_dir)
    paths = checkpoints(folder)
    if paths and run.config.resume == "never":
        raise CheckpointError(
            f"{folder} holds checkpoints and resume is never; choose another run_dir, or "
            "resume=auto to continue that run"
        )
    skipped: dict[Path, str] = {}
    for path in paths:
        try:
            manifest = verify(path, _KEYS)
        except CheckpointError as error:
            skipped[path] = str(error)
            continue
        progress = Progress(**{name: manifest[name] for name in asdict(Progress())})
        _check_same_run(path, manifest, run, progress)
        changed = _differences(manifest["config"], config_to_dict(run.config))
        return Found(path, skipped, changed, progress)
    if paths:
        raise CheckpointError(
            f"none of the checkpoints in {folder} verifies: {'; '.join(skipped.values())}. Move "
            "the folder away to start the run anew"
        )
    if run.config.init_from is not None and run.config.init_optimizer == "kept":
        _check_can_be_kept(run.config.init_from, run)
        return Found(run.config.init_from, {}, [], Progress())
    return Found(None, {}, [], Progress())


def _check_can_be_kept(path: Path, run: Run) -> None:
    """Raise CheckpointError unless this run can take up the optimizer of another run at `path`."""
    if not (path / MANIFEST_NAME).is_file():
        raise CheckpointError(
            f"init_from = {path} holds no optimizer to keep: it is no checkpoint "
            "RUN/checkpoints/step_…; set init_optimizer to fresh"
        )
    manifest = verify(path, _layout(run))
    for key, value in _layout(run).items():
        if manifest.get(key) != value:
            raise CheckpointError(
                f"the optimizer of init_from = {path} cannot be kept: its {key} is "
                f"{manifest.get(key)}, this run's is {value}; start with the same, or set "
                "init_optimizer to fresh"
            )
    # Only here, for it brings transformers with it, which takes seconds.
    from model.export import load_checkpoint

    try:
        check_norms(load_checkpoint(path))
    except ValueError as error:
        raise CheckpointError(
            f"the weights of init_from = {path} cannot be kept: {error}"
        ) from None


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every key of two configurations whose values differ."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines


def _check_same_run(path: Path, manifest: dict[str, Any], run: Run, progress: Progress) -> None:
    """Raise CheckpointError unless `run` goes on as if the one at `path` had never stopped.

    Phases may be added at the end; the others are as they were, whether they have begun or not.
    """
    ours = _identity(run)
    phases, former = ours.pop("phases"), manifest.get("phases", [])
    _check_ranks(path, manifest.get("world_size"), ours.pop("world_size"))
    for key, value in ours.items():
        _check_same(path, key, manifest.get(key), value)
    names = [phase["name"] for phase in phases][: len(former)]
    _check_same(path, "phases", [phase["name"] for phase in former], names)
    for theirs, phase in zip(former, phases, strict=False):
        _check_rule(path, theirs.get("row_order", {}), phase["row_order"])
        data = theirs.get("data_manifest_sha256"), phase.pop("data_manifest_sha256")
        _check_data(path, phase["name"], *data)
        for key, value in phase.items():
            _check_same(path, f"phases.{phase['name']}.{key}", theirs.get(key), value)
    model = asdict(run.current_phase(progress).model_config)
    _check_same(path, "model", manifest.get("model"), model)


def _check_same(path: Path, key: str, theirs: Any, ours: Any) -> None:
    if theirs == ours:
        return
    what = f"its {key} is {theirs}, this run's is {ours}"
    if isinstance(theirs, dict) and isinstance(ours, dict):
        what = "; ".join(f"{key}.{line}" for line in _differences(theirs, ours))
    raise CheckpointError(
        f"{path} is of another run: {what}; choose another run_dir, or set back what was changed"
    )


def _check_ranks(path: Path, theirs: Any, ours: int) -> None:
    if theirs != ours:
        raise CheckpointError(
            f"{path} was written by {theirs} processes, and this run has {ours}: the optimizer's "
            f"state is divided among as many as wrote it. Start {theirs}, or begin another run_dir "
            f"with init_from={path}, which takes its weights alone"
        )


def _check_data(path: Path, phase: str, theirs: Any, ours: str) -> None:
    """The hashes of two manifests, which tell a reader nothing."""
    if theirs != ours:
        raise CheckpointError(
            f"{path} is of another run: the data set of phases.{phase}.data.dir is not the one it "
            "has read; choose another run_dir, or give the same data"
        )


def _check_rule(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise CheckpointError where a program that orders rows otherwise wrote the checkpoint."""
    # Before there was another, no rule was written down.
    rule = theirs.get("rule", 1)
    if rule != ours["rule"]:
        raise CheckpointError(
            f"{path} was written by a program that orders rows by rule {rule}; this one does by "
            f"rule {ours['rule']}, and would read some rows twice and others never. Go on with "
            f"that program, or begin another run_dir with init_from={path} and init_optimizer=kept"
        )


def _identity(run: Run) -> dict[str, Any]:
    """What must not change for a run to go on as if it had never stopped."""
    phases = [_phase_identity(phase) for phase in run.phases.values()]
    return {"seed": run.config.seed, **_layout(run), "phases": phases}


def _phase_identity(phase: RunPhase) -> dict[str, Any]:
    return {
        "name": phase.name,
        "data_manifest_sha256": phase.data.manifest_sha256,
        "row_order": phase.order.identity,
        "global_rope_theta": phase.model_config.global_rope_theta,
    }


def _layout(run: Run) -> dict[str, Any]:
    """What decides how DeepSpeed's files are divided, and what is in them."""
    return {
        "world_size": run.ranks,
        "zero_stage": run.config.zero_stage,
        "dtype": run.precision,
        "grad_accum_dtype": choose_dtypes(run.config, run.precision)[0],
        "optimizer": run.config.optimizer.name,
    }


def _complete(temporary: Path, run: Run, progress: Progress, hashes: dict[str, str]) -> None:
    """Add the tokenizer and, last, the manifest; all of it on disk when this returns."""
    phase = run.current_phase(progress)
    for path in _files(source := tokenizer_folder(phase.data)):
        copy = temporary / TOKENIZER_FOLDER / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        # The content alone: the copy is its owner's, whoever may read the original.
        shutil.copyfile(path, copy)
        hashes[_relative(copy, temporary)] = _flush(copy)
    for name in hashes:
        # Asked for by name: a listing may be late with what another machine has written.
        (temporary / name).stat()
    manifest = {
        "format": FORMAT_VERSION,
        **asdict(progress),
        **_identity(run),
        "model": asdict(phase.model_config),
        "ends_phase": progress.rows_of(phase.name) * phase.schedule.row_tokens
        >= phase.schedule.tokens,
        "config": config_to_dict(run.config),
        "files": hashes,
    }
    write_json(temporary / MANIFEST_NAME, manifest)
    for path in (*temporary.rglob("*"), temporary):
        if path.is_dir():
            sync_folder(path)


def _ends_phase(path: Path) -> bool:
    """Whether a checkpoint was made at the end of a phase, as far as its manifest can be read."""
    try:
        return bool(read_manifest(path, _KEYS).get("ends_phase"))
    except CheckpointError:
        return False


def _owner(path: Path, ranks: int) -> int:
    """The rank that wrote a file of DeepSpeed's: it names its files after itself, or rank 0 did."""
    for rank in range(ranks):
        if f"zero_pp_rank_{rank}_" in path.name:
            return rank
    return 0


def _flush(path: Path) -> str:
    """The hash of a file that is on disk."""
    sync_file(path)
    return file_hash(path)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _remove(path: Path) -> None:
    """Delete a checkpoint so that it is never seen half deleted."""
    hidden = path.with_name(f".{path.name}.old")
    path.rename(hidden)
    shutil.rmtree(hidden)


def _remove_leftovers(folder: Path) -> None:
    """Delete what killed runs left: half-written and half-deleted checkpoints."""
    for pattern in (".step_*.tmp", ".step_*.old"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)
