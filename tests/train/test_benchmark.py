"""The benchmark of training: its layouts, its arithmetic, its records, and whole small runs."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.config import ConfigError
from model.config import ModernBertConfig
from train.benchmark import __main__ as command
from train.benchmark import cases, interruptions, measure, peers, results
from train.benchmark.measure import Measurement
from train.benchmark.parts import PARTS, Breakdown
from train.flops import training_flops
from train.loader import StepMaker
from train.resolve import Run
from train.schedule import Progress

SMALL = [
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
]
CPU = torch.device("cpu")
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
UNDISTURBED = dict.fromkeys(interruptions.NAMES, 0)


@pytest.fixture
def environment() -> Iterator[None]:
    """What a command sets in the environment, taken back."""
    before = dict(os.environ)
    os.environ["DS_ACCELERATOR"] = "cpu"
    yield
    os.environ.clear()
    os.environ.update(before)


def tiny_run(*words: str) -> Run:
    return cases.resolve_case(cases.TINY, None, [*SMALL, *words], 1, on_gpu=False)


# Layouts.


@pytest.mark.parametrize("case", cases.GPU_CASES, ids=lambda case: case.name)
def test_rows_hold_the_documents_of_the_layout(case: cases.Case) -> None:
    assert isinstance(case.layout, cases.Layout)
    layout = dataclasses.replace(case.layout, rows=32)
    data = cases.SyntheticData(layout)
    tokens, documents = data.counts("train", "synthetic")
    lengths = []
    for number in range(data.sources("train")["synthetic"]):
        row = data.read("train", "synthetic", number)
        data._check(row.input_ids, row.cu_seqlens, row.documents, record(tokens, documents, number))
        bounds = row.cu_seqlens[: len(row.documents) + 1]
        lengths.append(np.diff(bounds))
        special = data.tokenizer["special_ids"]
        assert (row.input_ids[bounds[:-1]] == special["cls"]).all()
        assert (row.input_ids[bounds[1:] - 1] == special["sep"]).all()
        assert (row.input_ids[bounds[-1] :] == special["pad"]).all()
    everything = np.concatenate(lengths)
    assert everything.sum() == tokens.sum()
    assert len(everything) == documents.sum()
    assert everything.max() <= layout.max_length
    assert tokens.sum() > 0.95 * len(tokens) * layout.row_tokens
    if layout.median is None:
        assert (everything == layout.max_length).all()
    else:
        assert np.median(everything) == pytest.approx(layout.median, rel=0.15)


def record(tokens: np.ndarray, documents: np.ndarray, row: int) -> Any:
    """What an index says of a row."""
    return {"tokens": tokens[row], "documents": documents[row]}


def test_lengths_are_log_normal_and_cut() -> None:
    layout = cases.Layout(median=250, max_length=1024, rows=32)
    lengths = layout.lengths(np.random.default_rng(0))
    slots = 16 * layout.rows * layout.row_tokens
    assert slots - 1024 <= lengths.sum() <= slots
    # Quartiles of a normal variable lie 0.6745 standard deviations from its mean.
    logarithms = np.log(np.quantile(lengths, [0.25, 0.5, 0.75]))
    expected = np.log(250) + 0.7 * 0.6745 * np.array([-1, 0, 1])
    np.testing.assert_allclose(logarithms, expected, atol=0.03)
    assert (lengths == 1024).mean() == pytest.approx(0.022, abs=0.005)


def test_packing_keeps_every_document_but_those_of_the_emptiest_row() -> None:
    lengths = np.random.default_rng(1).integers(3, 200, 500)
    rows = cases.pack_rows(lengths, 512)
    assert all(sum(row) <= 512 for row in rows)
    left = list(lengths)
    for length in itertools.chain(*rows):
        left.remove(length)
    assert sum(left) <= min(sum(row) for row in rows)
    (only,) = cases.pack_rows(np.array([5, 6]), 512)
    assert sorted(only) == [5, 6]


@pytest.mark.parametrize("case", cases.GPU_CASES[:2], ids=lambda case: case.name)
def test_rows_stand_for_all_that_are_packed(case: cases.Case) -> None:
    """In tokens and in pairs of tokens, which attention pays for."""
    assert isinstance(case.layout, cases.Layout)
    lengths = case.layout.lengths(np.random.default_rng(3))
    data = cases.SyntheticData(case.layout)
    rows = [data.read("train", "synthetic", row) for row in range(256)]
    chosen = np.concatenate([np.diff(row.cu_seqlens)[: len(row.documents)] for row in rows])
    chosen = chosen.astype(np.int64)
    expected = (lengths**2).sum() / lengths.sum()
    assert (chosen**2).sum() / chosen.sum() == pytest.approx(expected, rel=0.01)


def test_of_few_rows_all_stand_for_all() -> None:
    rows = [np.array([length]) for length in (5, 1, 9)]
    for number in (3, 4):
        assert [int(row[0]) for row in cases.stand_for(rows, number)] == [1, 5, 9]
    assert [int(row[0]) for row in cases.stand_for(rows, 1)] == [5]


@pytest.mark.parametrize("case", cases.GPU_CASES[:3], ids=lambda case: case.name)
def test_made_up_rows_are_as_full_as_real_ones(case: cases.Case) -> None:
    """The real sample's notes fill 99.95 % of their rows of 8,192."""
    assert isinstance(case.layout, cases.Layout)
    tokens, _ = cases.SyntheticData(case.layout).counts("train", "synthetic")
    assert len(tokens) == 256
    assert tokens.mean() >= 0.9985 * 8192


def test_a_step_of_a_case_has_its_micro_batch_and_its_sums() -> None:
    run = cases.resolve_case(cases.GPU_CASES[-1], None, [], 2, on_gpu=True)
    phase = run.phases["main"]
    assert phase.shape.tokens == 65_536
    assert phase.micro_steps == 8
    assert run.precision == "bf16"
    plan = next(run.plans(Progress()))
    assert plan.rows == 2 * 8 * 8
    lengths = measure.document_lengths(phase, plan)
    assert lengths.sum() == StepMaker(run, 0).counts(plan).tokens


def test_a_run_that_ends_before_it_is_measured_is_refused() -> None:
    steps: Any = ["one", "two"]
    assert list(measure._exactly(2, iter(steps))) == steps
    with pytest.raises(ConfigError, match="1 steps too early to be measured"):
        list(measure._exactly(3, iter(steps)))


# Arithmetic.


def test_speed_and_mfu_are_those_of_all_steps_together_for_a_gpu() -> None:
    """Of steps that differ in work: a median would leave out what the long ones cost."""
    run = tiny_run()
    flops = training_flops(ModernBertConfig(), [1024] * 64, 19_648)
    found = Measurement(
        seconds=[0.25, 0.625, 0.25],
        # The slowest rank of a step need not be that of the next.
        elapsed=1.0,
        tokens=[65_536, 131_072, 65_536],
        flops=[flops, 2 * flops, flops],
        memory_gib=21.456,
        data_wait_share=0.001,
        breakdown=Breakdown(dict.fromkeys(PARTS, 0.12345), 3, [(1.23456, 22.0, "gemm", "nvjet")]),
        interruptions=UNDISTURBED,
        note="",
    )
    machine = results.Machine("NVIDIA H200", 989.4e12, (780e12, 800e12))
    one = results.make_record(cases.TINY, "ours", 2, run, machine, found)
    assert one["tok_per_s_per_gpu"] == 4 * 65_536 / 1.0 / 2
    assert one["spread"] == [round(131_072 / 0.625 / 2, 1), 65_536 / 0.25 / 2]
    assert one["mfu"] == pytest.approx(4 * flops / 2 / 989.4e12, abs=1e-4)
    assert one["mfu_of_measured_peak"] == pytest.approx(4 * flops / 2 / 800e12, abs=1e-4)
    # By hand: 0.80 GFLOP a token at 1,024 with the last layer on 30 %, 131,072 tokens a second.
    assert one["mfu"] == pytest.approx(0.80e9 * 131_072 / 989.4e12, rel=0.02)
    assert "800 TFLOP/s" in one["peak_source"]
    assert one["seconds"] == [0.25, 0.625, 0.25]
    assert one["interruptions"] == UNDISTURBED
    assert (one["parts"], one["parts_steps"]) == (dict.fromkeys(PARTS, 0.123), 3)
    assert one["kernels"] == [{"ms": 1.235, "launches": 22.0, "part": "gemm", "name": "nvjet"}]
    assert "MFU" in results.line(one)
    unknown = results.Machine("NVIDIA A30", None, (150e12, 150e12))
    assert results.make_record(cases.TINY, "ours", 1, run, unknown, found)["mfu"] is None


@pytest.mark.usefixtures("joined")
def test_mfu_is_the_same_share_in_records_of_training_and_of_the_benchmark() -> None:
    """Both are of the datasheet's peak."""
    from train.interval import peak_of

    device = torch.device("cuda", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
        run = cases.resolve_case(cases.GPU_CASES[0], None, [], 1, on_gpu=True)
        assert command.Peak(run, device).machine.datasheet == peak_of(device, run.precision)


# Records.


def made(
    case: str, who: str, gpus: int, speed: float | None, error: str | None = None
) -> dict[str, Any]:
    shares = {"mfu": None, "mfu_of_measured_peak": None}
    figures = {"device": "cpu", "tok_per_s_per_gpu": speed, **shares, "error": error}
    return {"case": case, "who": who, "gpus": gpus, **figures, "versions": {"torch": "2.11.0"}}


def test_new_records_replace_old_ones_of_the_same_case_who_and_gpus() -> None:
    old = [made("shards-1024", "ours", 1, 1.0), made("notes-8192", "ours", 1, 1.0)]
    new = [made("notes-8192", "ours", 1, 2.0), made("notes-8192", "ours", 2, 3.0)]
    new += [made("abstracts-1024", "A peer", 1, 4.0), made("abstracts-1024", "ours", 1, 5.0)]
    merged = results.merge(old, new)
    assert [(r["case"], r["who"], r["gpus"], r["tok_per_s_per_gpu"]) for r in merged] == [
        ("abstracts-1024", "ours", 1, 5.0),
        ("abstracts-1024", "A peer", 1, 4.0),
        ("notes-8192", "ours", 1, 2.0),
        ("notes-8192", "ours", 2, 3.0),
        ("shards-1024", "ours", 1, 1.0),
    ]


def test_a_failure_replaces_no_figures() -> None:
    good, failed = made("tiny", "ours", 1, 1.0), made("tiny", "ours", 1, None, error="no room")
    assert results.merge([good], [failed]) == [good]
    assert results.merge([failed], [good]) == [good]
    later = {**failed, "error": "another reason"}
    assert results.merge([failed], [later]) == [later]


def test_data_sets_of_one_length_have_names_of_their_own(
    data_folder: Path, long_folder: Path, data_maker: Callable[..., Path], tmp_path: Path
) -> None:
    rows = {"train": {"notes": 4}, "validation": {"notes": 1}}
    other, same = (data_maker(tmp_path / name / "mimic", rows) for name in ("a", "b"))
    assert [case.name for case in cases.shard_cases([data_folder, long_folder])] == [
        "shards-32",
        "shards-64",
    ]
    folders = [data_folder, other, long_folder, same]
    found = command.chosen_cases(["shards"], folders, on_gpu=False)
    around = data_folder.parent.name
    assert [case.name for case in found] == [
        f"shards-32-{around}",
        "shards-32-mimic-2",
        "shards-64",
        "shards-32-mimic-4",
    ]
    assert [case.layout for case in found] == folders
    (one,) = command.chosen_cases(["shards-32-mimic-4"], folders, on_gpu=False)
    assert one.layout == same


def test_comparisons_with_and_without_engine_and_of_several_gpus() -> None:
    lines = results.comparisons(
        [
            made("accumulate-8", results.OURS, 1, 980.0),
            made("accumulate-8", results.PLAIN, 1, 1000.0),
            made("accumulate-8", results.OURS, 2, 931.0),
            made("notes-8192", results.OURS, 1, 600.0),
            made("notes-8192", "A peer", 1, 200.0),
            made("notes-8192", "A slow peer", 1, 100.0),
            made("full-8192", "A peer", 1, None),
        ]
    )
    assert lines == [
        "accumulate-8: 98.0% of the step without the engine (aim 97%)",
        "accumulate-8: a GPU of 2 does 95.0% of one alone (aim 97%)",
        "notes-8192: 3.00 × A peer",
    ]


def test_comparisons_say_what_else_differs() -> None:
    alone, of_two = (made("accumulate-8", results.OURS, gpus, 100.0) for gpus in (1, 2))
    alone["versions"] = {"commit": "one"}
    of_two |= {"versions": {"commit": "two"}, "device": "another", "words": ["zero_stage=2"]}
    (line,) = results.comparisons([alone, of_two])
    assert line.endswith(
        "(aim 97%); but device another against cpu, commit two against one, "
        "words zero_stage=2 against none"
    )


@pytest.mark.usefixtures("environment")
def test_without_a_gpu_its_cases_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """They would fill the memory, and measure nothing."""
    assert command.main(["--case", "abstracts-1024"]) == 2
    assert "--case abstracts-1024 needs a GPU" in capsys.readouterr().err


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("who", "label"),
    [("ours", []), ("ours, x", ["--label", "x"]), (results.PLAIN, ["--label", "x"])],
)
def test_no_record_takes_the_place_of_one_with_other_words(
    who: str, label: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "records.json"
    file.write_text(json.dumps([{**made("tiny", who, 1, 1.0), "words": []}]))
    before = file.read_text()
    assert command.main(["--case", "tiny", "--json", str(file), *label, "seed=3"]) == 2
    assert f"tiny, {who}, that was measured with no words; give another --label" in (
        capsys.readouterr().err
    )
    assert file.read_text() == before


def test_what_is_not_asked_for_is_in_nobodys_way() -> None:
    records = [made("tiny", results.PLAIN, 1, 1.0), made("tiny", "ours", 1, 1.0)]
    asked = command.parse(["--who", "ours", "--label", "x", "--json", "f", "seed=3"])
    command._check_words(asked, {"tiny"}, 1, records)
    with pytest.raises(ConfigError, match="has a record of tiny, ours"):
        command._check_words(command.parse(["--json", "f", "seed=3"]), {"tiny"}, 1, records[1:])


def test_a_line_warns_of_what_came_between_timed_steps() -> None:
    one = made("tiny", "ours", 1, 1.0)
    assert results.warning(one) is None, "as older records, which do not say"
    assert results.warning({**one, "interruptions": UNDISTURBED}) is None
    happened = UNDISTURBED | {"device_allocations": 2}
    said = results.warning({**one, "interruptions": happened})
    assert said is not None
    assert "tiny, ours: while steps were timed there were 2 device allocations" in said


def test_records_of_older_runs_are_read_compared_and_drawn(tmp_path: Path) -> None:
    records = results.read(ROOT / "benchmarks" / "results" / "train_h200.json")
    needed = {"case", "who", "gpus", "tok_per_s_per_gpu", "mfu", "memory_gib", "data_wait_share"}
    assert all(needed | {"versions"} <= one.keys() for one in records)
    assert all("tok/s" in results.line(one) for one in records)
    everything = results.merge(records, [made("notes-8192", "A peer", 1, 1.0)])
    assert len(everything) == len(records) + 1
    assert any("without the engine" in text for text in results.comparisons(everything))
    results.plot(tmp_path / "drawn.png", everything)


# Peers.


def test_a_peer_gets_our_documents_masks_and_labels() -> None:
    run = tiny_run()
    documents = peers.run_documents(run)
    batch = next(StepMaker(run, 0).micro_batches(next(run.plans(Progress()))))
    ids = torch.cat([torch.from_numpy(document.input_ids) for document in documents])
    labels = torch.cat([torch.from_numpy(document.labels) for document in documents])
    real = batch.input_ids[batch.input_ids != run.start.pad_token_id]
    assert torch.equal(ids[: len(real)], real)
    assert int((labels[: len(real)] != -100).sum()) == batch.masked_tokens

    padded = peers.padded_batches(documents, 2, 128, run.start.pad_token_id, CPU)
    packed = peers.packed_batches(documents, 256, CPU)
    for found in (padded, packed):
        taken = sum(len(one.lengths) for one in found)
        wanted = documents[:taken]
        lengths = [length for one in found for length in one.lengths]
        assert lengths == [len(d.input_ids) for d in wanted]
        assert sum(one.masked for one in found) == sum((d.labels >= 0).sum() for d in wanted)
    for one in padded:
        mask = one.inputs["attention_mask"]
        assert mask.shape[1] % 32 == 0
        assert mask.sum(1).tolist() == one.lengths
        assert one.slots == mask.numel()
        assert (one.inputs["input_ids"][mask == 0] == run.start.pad_token_id).all()
    for one in packed:
        assert one.slots == sum(one.lengths) <= 256
        assert one.inputs["cu_seq_lens_q"].diff().tolist() == one.lengths
        assert one.inputs["max_length_k"] == max(one.lengths)


# Whole runs, all in one process, see benchmarked.py.


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> dict[str, Any]:
    """What benchmarked.py found."""
    folder = tmp_path_factory.mktemp("benchmark")
    stale = made("tiny", "ours", 1, 1.0) | {"words": SMALL}
    (folder / "first.json").write_text(json.dumps([stale, {**stale, "gpus": 3}]))
    environment = dict(os.environ, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, str(HERE / "benchmarked.py"), str(folder), str(data_folder), *SMALL],
        env=environment | {"PYTHONPATH": str(HERE.parent.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    files = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert (folder / "first.png").stat().st_size > 1000
    return found | files | {"out": done.stdout}


def test_a_whole_run_on_a_cpu(measured: dict[str, Any]) -> None:
    assert measured["first_code"] == 0
    records = {results.key_of(one): one for one in measured["first"]}
    assert records.pop(("tiny", "ours", 3))["tok_per_s_per_gpu"] == 1.0
    expected = {("tiny", name, 1) for name in (results.OURS, results.PLAIN, "Hugging Face sdpa")}
    expected |= {("shards-32", "ours", 1), ("shards-32", "Hugging Face sdpa", 1)}
    assert set(records) == expected
    for (_, name, _), one in records.items():
        assert one["device"] == "cpu"
        assert one["error"] is None
        assert one["mfu"] is None
        assert one["parts"] is None
        assert one["compiled"] is (False if name.startswith("ours") else None)
        assert one["memory_gib"] is None
        assert 1 < one["spread"][0] <= one["tok_per_s_per_gpu"] <= one["spread"][1]
        assert one["versions"]["torch"] == torch.__version__
        assert "commit" in one["versions"]
        assert len(one["seconds"]) == one["steps"] >= 2
        assert one["interruptions"]["recompilations"] == 0
        if name.startswith("ours"):
            assert 0 <= one["data_wait_share"] < 1
        else:
            assert one["data_wait_share"] is None
        assert results.line(one) in measured["out"]


def test_what_cannot_be_measured_is_recorded_and_the_rest_goes_on(measured: dict[str, Any]) -> None:
    assert measured["second_code"] == 1
    bad, good = measured["second"]
    assert bad["error"] == "OutOfMemoryError: no room"
    assert bad["tok_per_s_per_gpu"] is None
    assert good["error"] is None
    assert good["tok_per_s_per_gpu"] > 1
    assert "not measured: OutOfMemoryError: no room" in measured["out"]


def test_a_peer_that_runs_out_of_memory_gets_smaller_batches(measured: dict[str, Any]) -> None:
    # Two documents of at most 128 fill a micro-batch of 256.
    assert measured["asked_for"] == [2, 1]


@pytest.mark.parametrize("rule", ["stable_adamw", "adamw in bf16"])
def test_the_step_without_engine_is_the_engines_step(measured: dict[str, Any], rule: str) -> None:
    figures = measured["weights"][rule]
    assert figures["moved"] > 1e-4
    assert figures["apart"] < 1e-3 * figures["moved"]


def test_a_measured_model_leaves_the_memory(measured: dict[str, Any]) -> None:
    assert measured["steps"] == 2
    assert measured["freed"]


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--case", "shards"], "give --data DIR"),
        (["--case", "note-8192"], "there is no such case; one of"),
        (["--case", "tiny", "zero_stag=1"], "did you mean 'zero_stage'"),
        (["--case", "--plot", "new.png"], "nothing to draw"),
    ],
    ids=["shards", "case", "key", "plot"],
)
def test_what_the_user_can_put_right(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("environment")
def test_a_file_of_something_else_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "other.json"
    file.write_text('[{"op": "rope"}]')
    assert command.main(["--json", str(file)]) == 2
    assert "not a list of records" in capsys.readouterr().err
    assert file.read_text() == '[{"op": "rope"}]'


@pytest.mark.slow
def test_two_processes_share_a_case(launcher: Any, tmp_path: Path) -> None:
    script = tmp_path / "start.py"
    root = str(Path(command.__file__).parents[2])
    script.write_text(
        f"import sys\nsys.path.insert(0, {root!r})\n"
        # By the clock, as on GPUs: how many steps that is, the two must agree.
        "from train.benchmark import __main__ as command\n"
        "from train.benchmark.measure import Effort\n"
        "command.usual_effort = lambda steps, on_gpu: Effort(steps, seconds=1, warm_up_s=1)\n"
        "from train.benchmark.__main__ import main\nsys.exit(main())\n"
    )
    file = tmp_path / "new.json"
    words = ["--case", "tiny", "--repeats", "2", "--json", str(file), *SMALL]
    done = launcher.run(2, *words, script=script)
    assert done.code == 0, done.out + done.err
    (one,) = json.loads(file.read_text())
    assert results.key_of(one) == ("tiny", "ours", 2)
    before = file.read_text()

    # The second process fails, and the first would wait for it for ever.
    failing = tmp_path / "failing.py"
    fails = (
        "import os\n"
        "from train.benchmark import measure\n"
        "def no_room(*arguments):\n"
        "    raise MemoryError('no room')\n"
        "if os.environ['RANK'] == '1':\n"
        "    measure.accumulate = no_room\n"
    )
    failing.write_text(
        script.read_text().replace(
            "from train.benchmark import", fails + "from train.benchmark import", 1
        )
    )
    done = launcher.run(2, *words, script=failing)
    assert done.code != 0
    assert "error: rank 1, tiny: MemoryError: no room; with several processes" in done.err
    assert file.read_text() == before, "figures stay"
