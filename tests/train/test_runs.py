"""Real runs under the launcher: equal splits, equal ZeRO stages, killed and taken up again."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.files import only_user_of
from model.config import to_hugging_face
from model.export import load_checkpoint
from train.loader import StepMaker
from train.schedule import Progress
from train.start import make_model

sys.path.insert(0, str(Path(__file__).parent))
from gpus import ON_ONE_AND_TWO_GPUS

ROOT = Path(__file__).parent.parent.parent
SCRIPT = Path(__file__).parent / "launched.py"


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Look often; a process that ends first is a failure."""
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)


def steps_logged(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count('"kind": "train"') if path.exists() else 0


# Readers of metrics.jsonl depend on these; NAME stands for a source.
KEYS = {
    "start": """kind time step slots last_step ranks device peak_flops precision zero_stage
        attention compiled recompute fp8 parameters commit torch deepspeed""",
    "train": """kind time step phase slots tokens phase_tokens rows_per_step sources/NAME/tokens
        sources/NAME/epochs lr mask_rate loss accuracy masked_tokens
        by_source/NAME/loss by_source/NAME/accuracy by_source/NAME/masked_tokens grad_norm
        update_norm skipped_steps tok_per_s padded_tok_per_s tflop_per_s mfu step_s
        step_parts_s/data step_parts_s/forward_backward step_parts_s/optimizer data_wait_s
        data_wait_rank pause_s eta_s memory_allocated_gib memory_reserved_gib
        memory_resident_gib""",
    "validation": """kind time step phase loss accuracy masked_tokens by_source/NAME/loss
        by_source/NAME/accuracy by_source/NAME/masked_tokens""",
}


def keys_of(record: dict[str, Any], prefix: str = "") -> set[str]:
    """The keys of a record, those of inner ones behind theirs."""
    keys: set[str] = set()
    for name, value in record.items():
        key = prefix + ("NAME" if name in ("notes", "papers") else name)
        keys |= keys_of(value, f"{key}/") if isinstance(value, dict) else {key}
    return keys


@pytest.mark.parametrize("kind", ["start", "train", "validation"])
def test_the_keys_of_records_are_those_documented(two_ranks: Any, kind: str) -> None:
    """The records of a run, the table of the page, and the list above."""
    path = two_ranks.folder / "zero1" / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert {record["kind"] for record in records} == set(KEYS)
    for record in records:
        if record["kind"] == kind:
            assert keys_of(record) == set(KEYS[kind].split())
    page = (ROOT / "docs" / "training.md").read_text()
    section = page.partition("## What a run shows")[2].partition("\n## ")[0]
    table = re.findall(r"^\| (`[^|]+) \| ([^|]+) \|", section, re.M)
    listed = {
        key
        for names, kinds in table
        if kind in kinds.split(", ")
        for key in re.findall("`([^`]+)`", names)
    }
    assert listed == set(KEYS[kind].split())


def test_the_loss_of_a_step_is_that_of_its_sources(
    two_ranks: Any, resolved: Callable[..., Any], phases: Callable[..., Any]
) -> None:
    """On every ZeRO stage; the first step's against the model's own loss on a source's rows."""
    for stage in range(4):
        for record in two_ranks.records(f"zero{stage}", "train"):
            parts = record["by_source"].values()
            total = sum(part["loss"] * part["masked_tokens"] for part in parts)
            assert total / record["masked_tokens"] == pytest.approx(record["loss"], rel=1e-6)
            assert sum(part["masked_tokens"] for part in parts) == record["masked_tokens"]
    run = resolved(1, phases=phases())
    model = make_model(run.config, run.start)
    model.set_global_rope_theta(run.phases["short"].model_config.global_rope_theta)
    maker, plan = StepMaker(run, 0), next(run.plans(Progress()))
    sums: Counter[str] = Counter()
    for number, batch in enumerate(maker.micro_batches(plan)):
        source = run.phases["short"].order[number].source  # one row each
        inputs = (batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
        with torch.no_grad():
            sums[source] += model(*inputs, batch.masked_indices, batch.labels).item()
    first = two_ranks.records("zero1", "train")[0]
    assert set(first["by_source"]) == set(sums)
    for source, part in first["by_source"].items():
        assert part["loss"] == pytest.approx(sums[source] / part["masked_tokens"], rel=1e-5)


def test_a_trace_is_made_where_the_key_asks_for_it(two_ranks: Any) -> None:
    """Of the run `muon` alone, by rank 1."""
    traces = [path.relative_to(two_ranks.folder) for path in two_ranks.folder.glob("*/profile/*")]
    assert [str(path) for path in traces] == ["muon/profile/rank_1_steps_3_to_4.json.gz"]


def test_gradients_are_the_same_however_rows_are_split(
    two_ranks: Any, launcher: Any, data_folder: Path
) -> None:
    """(ranks, accumulation) = (1, 4), (2, 2), (4, 1), masked tokens unequal over ranks."""
    outs = {2: two_ranks.folder / "gradients.npz"}
    for ranks in (1, 4):
        config = launcher.write("split", data_folder, zero_stage=0)
        outs[ranks] = launcher.folder / f"{ranks}.npz"
        done = launcher.run(ranks, f"gradients:{config}:{outs[ranks]}", script=SCRIPT)
        assert done.code == 0, done.out + done.err
    first, *others = (dict(np.load(outs[ranks])) for ranks in (1, 2, 4))
    assert len(set(first["counts"].tolist())) > 1, "every micro-batch masks as many tokens"
    assert first["loss"] == pytest.approx(np.log(64), abs=0.5)
    for other in others:
        assert other["loss"] == pytest.approx(first["loss"], rel=1e-5)
        assert other["mine"] < 0.9 * first["mine"]
        for name in first.keys() - {"loss", "mine", "counts"}:
            scale = np.abs(first[name]).max()
            np.testing.assert_allclose(other[name], first[name], rtol=1e-5, atol=1e-5 * scale)


def test_zero_stages_follow_the_same_curve(two_ranks: Any) -> None:
    reference = two_ranks.losses("zero0")
    assert len(reference) == 12
    assert reference[-1] < reference[0] - 0.1
    validations = two_ranks.records("zero0", "validation")
    assert [(record["step"], record["phase"]) for record in validations] == [
        (6, "short"),
        (8, "short"),
        (12, "long"),
    ]
    for stage in (1, 2, 3):
        np.testing.assert_allclose(two_ranks.losses(f"zero{stage}"), reference, rtol=1e-5)
        ours = two_ranks.records(f"zero{stage}", "validation")
        for record, expected in zip(ours, validations, strict=True):
            assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert record["masked_tokens"] == expected["masked_tokens"]


@pytest.mark.parametrize("name", ["half0", "half1"])
def test_bf16_follows_the_curve_of_fp32_from_the_first_step(two_ranks: Any, name: str) -> None:
    """DeepSpeed's wrappers of bf16 take steps of their own as they start, which must not count."""
    np.testing.assert_allclose(two_ranks.losses(name), two_ranks.losses("zero0"), rtol=5e-4)


def test_growing_batches_and_phases_are_those_of_a_plain_loop(
    two_ranks: Any,
    resolved: Callable[..., Any],
    phases: Callable[..., Any],
    plain_losses: Callable[..., list[float]],
) -> None:
    """On every ZeRO stage, the number of micro-steps changing from step to step."""
    run = resolved(1, phases=phases())
    maker = StepMaker(resolved(2, phases=phases()), rank=0)
    counts = [maker.micro_steps(plan) for plan in run.plans(Progress())]
    assert counts == [1, 1, 2, 2, 3, 3, 4, 4, 1, 1, 1, 1]
    expected = plain_losses(run)
    for stage in range(4):
        np.testing.assert_allclose(two_ranks.losses(f"zero{stage}"), expected, rtol=1e-5)


def test_what_was_read_of_each_source_is_counted(
    two_ranks: Any, resolved: Callable[..., Any], phases: Callable[..., Any]
) -> None:
    """Over all ranks, without padding, against the rows themselves."""
    run = resolved(1, phases=phases())
    tokens = {"short": Counter(), "long": Counter()}
    epochs: Counter[str] = Counter()
    for plan in run.plans(Progress()):
        phase = run.phases[plan.phase]
        for number in range(plan.first_row, plan.first_row + plan.rows):
            at = phase.order[number]
            ids = phase.data.read("train", at.source, at.row).input_ids
            tokens[plan.phase][at.source] += int((ids != 2).sum())
            epochs[at.source] += 1 / phase.data.sources("train")[at.source]
    last = two_ranks.records("zero1", "train")[-1]
    both = tokens["short"] + tokens["long"]
    assert (last["phase"], last["phase_tokens"]) == ("long", sum(tokens["long"].values()))
    assert last["tokens"] == sum(both.values())
    assert last["slots"] == 8 * 5 * 64 + 4 * 4 * 128
    for source, figures in last["sources"].items():
        assert figures["tokens"] == both[source]
        assert figures["epochs"] == pytest.approx(epochs[source])


def test_a_run_of_two_phases_is_two_runs_the_optimizer_kept(two_ranks: Any) -> None:
    whole = two_ranks.losses("zero1")
    assert two_ranks.losses("first") == whole[:8]
    assert two_ranks.losses("kept") == whole[8:]
    fresh = two_ranks.losses("fresh")
    assert fresh[0] == pytest.approx(whole[8], rel=1e-5), "the weights are the same"
    assert fresh[2] != pytest.approx(whole[10], rel=1e-5), "the moments are not"


def test_a_checkpoint_has_the_base_of_its_phase(two_ranks: Any) -> None:
    """What is exported from it is the model as it was trained."""
    folder = two_ranks.folder / "zero1" / "checkpoints"
    thetas = [
        to_hugging_face(load_checkpoint(folder / name).config)["global_rope_theta"]
        for name in ("step_00000008", "step_00000012")
    ]
    assert thetas == [10_000, 160_000]


def test_muon_trains(two_ranks: Any) -> None:
    losses = two_ranks.losses("muon")
    assert losses[-1] < losses[0] - 0.1


def test_a_killed_run_goes_on_bit_for_bit(
    two_ranks: Any, launcher: Any, data_folder: Path, phases: Callable[..., Any]
) -> None:
    """Killed while the batch grows; what follows is the rest of that, and another phase."""
    config = launcher.write_long("killed", data_folder, phases(3))
    run_dir = launcher.folder / "killed"
    with launcher.start(2, "--config", str(config)) as process:
        # Two more lines than there are up to the first checkpoint: steps 1, 3, 6, 7 and 8.
        wait_until(lambda: steps_logged(run_dir) >= 7, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()  # until every rank has closed its end
    assert (run_dir / "checkpoints" / "step_00000008").is_dir()
    assert not (run_dir / "checkpoints" / "step_00000024").exists()
    done = launcher.run(2, "--config", str(config))
    assert done.code == 0, done.out + done.err
    assert "continues from" in done.out

    for kind in ("train", "validation"):
        assert launcher.records("killed", kind) == two_ranks.records("whole", kind)
    steps = [record["step"] for record in launcher.records("killed", "validation")]
    assert steps == [7, 14, 21, 24, 28, 35, 36]
    assert len(list((run_dir / "tensorboard").iterdir())) == 2
    starts = launcher.records("killed", "start")
    assert starts[0]["step"] == 0
    assert len(starts) == 2
    assert starts[1]["step"] >= 8


@pytest.mark.slow
def test_a_run_dir_in_use_is_refused_on_every_rank(launcher: Any, data_folder: Path) -> None:
    """While another run has it; afterwards the same command runs."""
    config = launcher.write("busy", data_folder)
    run_dir = launcher.folder / "busy"
    with only_user_of(run_dir):
        done = launcher.run(2, "--config", str(config))
    assert done.code == 2
    text = done.out + done.err
    assert text.count(f"error: run_dir: {run_dir} is in use by process {os.getpid()} on") == 1
    assert "choose another folder" in text
    assert "Traceback" not in text
    assert not (run_dir / "metrics.jsonl").exists()
    assert launcher.run(2, "--config", str(config)).code == 0


@pytest.fixture(scope="module")
def taken_up(
    tmp_path_factory: pytest.TempPathFactory,
    launcher_in: Callable[[Path], Any],
    data_folder: Path,
    phases: Callable[..., Any],
) -> Any:
    """Runs of the stages that no other test takes up: whole, and taken up again.

    All in one start and then in another one. `whole0` is what `stage0` was before that, and so on.
    """
    launcher = launcher_in(tmp_path_factory.mktemp("taken_up"))
    settings = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    tasks = []
    for stage in (0, 2, 3):
        changes = {"zero_stage": stage, "deepspeed": settings, "phases": phases()}
        tasks.append(f"train:{launcher.write(f'stage{stage}', data_folder, **changes)}")
    for start in range(2):
        done = launcher.run(2, *tasks, script=SCRIPT)
        assert done.code == 0, done.out + done.err
        for stage in (0, 2, 3) if start == 0 else ():
            # As if killed after step 8, where the phase ends: the last one is not there yet.
            run_dir = launcher.folder / f"stage{stage}"
            shutil.copytree(run_dir, launcher.folder / f"whole{stage}")
            shutil.rmtree(run_dir / "checkpoints" / "step_00000012")
    assert done.out.count("continues from") == 3
    return launcher


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_other_zero_stages_go_on_bit_for_bit(taken_up: Any, stage: int) -> None:
    last = taken_up.folder / f"stage{stage}" / "checkpoints" / "step_00000012"
    assert last.is_dir(), "made anew"
    for kind in ("train", "validation"):
        assert taken_up.records(f"stage{stage}", kind) == taken_up.records(f"whole{stage}", kind)


@ON_ONE_AND_TWO_GPUS
def test_on_gpus_every_zero_stage_follows_the_curve_of_the_cpu(
    gpus: int, launcher: Any, data_folder: Path
) -> None:
    """bf16 and the GPU's attention against fp32 and the reference; then one goes on."""
    changes = {"model": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 1}}
    cpu = launcher.write("cpu", data_folder, **changes)
    assert launcher.run(1, "--config", str(cpu)).code == 0
    launcher.accelerator = "cuda"
    configs = [
        launcher.write(f"zero{stage}", data_folder, zero_stage=stage, **changes)
        for stage in range(4)
    ]
    done = launcher.run(gpus, *(f"train:{config}" for config in configs), script=SCRIPT)
    assert done.code == 0, done.out + done.err
    assert done.out.count("on cuda, bf16") == 4
    for stage in range(4):
        np.testing.assert_allclose(
            launcher.losses(f"zero{stage}"), launcher.losses("cpu"), rtol=5e-3
        )
    last = launcher.folder / "zero1" / "checkpoints" / "step_00000012"
    before = launcher.losses("zero1")
    last.rename(launcher.folder / "away")
    assert launcher.run(gpus, "--config", str(configs[1])).code == 0
    np.testing.assert_allclose(launcher.losses("zero1"), before, rtol=1e-3)
