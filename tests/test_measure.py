"""benchmarks/measure.sh: its commands can be parsed, and a piece that is cut off goes on."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kernels.benchmark_cases import OPERATIONS
from train.benchmark import __main__ as benchmark
from train.benchmark import peers, results
from train.benchmark.cases import GPU_CASES, resolve_case

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "measure.sh"
TINY = ["model.hidden_size=32", "model.intermediate_size=48", "model.num_attention_heads=2"]

# In place of python and deepspeed: says what it is called with, fails where $FAIL and hangs where
# $HANG is in it. For `python -`: the script asks for the machine.
STUB = """#!/bin/bash
if [[ $1 == - ]]; then
  printf '%s\\n' h200 2 "$COMMIT" "NVIDIA H200, commit $COMMIT"
  exit
fi
echo "$(basename "$0") $*" | tee -a "$LOG"
[[ "$*" != *"$FAIL"* ]] || exit 1
[[ "$*" != *"$HANG"* ]] || exec sleep 60
"""


class Machine:
    """Calls the script on a machine where the stub is all there is."""

    def __init__(self, folder: Path) -> None:
        self.results, self.log = folder / "results", folder / "log"
        for name in ("python", "deepspeed"):
            stub = folder / "bin" / name
            stub.parent.mkdir(exist_ok=True)
            stub.write_text(STUB)
            stub.chmod(0o700)
        self.environment = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "RESULTS": str(self.results),
            "LOG": str(self.log),
            "COMMIT": "abc",
            "FAIL": "no such word",
            "HANG": "no such word",
        }

    def __call__(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(SCRIPT), *words],
            env=self.environment | environment,
            capture_output=True,
            text=True,
        )

    def called(self) -> list[str]:
        """The commands since this was asked last."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def listed(machine: Machine) -> Callable[[str], list[list[str]]]:
    """The commands of a piece, in words."""

    def commands(piece: str) -> list[list[str]]:
        done = machine("--list", piece)
        assert done.returncode == 0, done.stderr
        return [shlex.split(line) for line in done.stdout.splitlines() if line[0] != "#"]

    return commands


Listed = Callable[[str], list[list[str]]]


def test_the_shell_can_read_it() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_every_piece_is_listed_and_said(machine: Machine) -> None:
    listed = machine("--list").stdout.splitlines()
    pieces = [line.removeprefix("# ") for line in listed if line.startswith("#")]
    assert len(pieces) == 12
    usage = machine()
    assert usage.returncode == 2
    for piece in pieces:
        assert f"\n  {piece} " in usage.stderr
    unknown = machine("everything")
    assert unknown.returncode == 2
    assert unknown.stderr == usage.stderr
    assert machine.called() == []


def test_the_kernels_are_all_of_them(listed: Listed) -> None:
    words = listed("kernels")
    assert all(line[:4] == ["python", "-m", "kernels.benchmark", "--op"] for line in words)
    assert {line[4] for line in words} == set(OPERATIONS)
    assert listed("tune")[0][3] == "--tune"


PIECES = ("tiny", "steps", "large", "accumulate", "options", "peers", "several")


def test_what_is_asked_of_training_can_be_had(
    listed: Listed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cases, who, and keys; of these steps all, of peers all that may be installed."""
    monkeypatch.setattr(peers, "version_of", lambda package: "1")
    everybody = {results.OURS, results.PLAIN, *peers.peers(on_gpu=True)}
    measured = set()
    for piece in PIECES:
        for line in listed(piece):
            start = line.index("train.benchmark") + 1
            asked = benchmark.parse(line[start:])
            ranks = int(line[2]) if line[0] == "deepspeed" else 1
            (case,) = benchmark.chosen_cases(asked.case, [], on_gpu=True)
            resolve_case(case, None, asked.overrides, ranks, on_gpu=True)
            assert bool(asked.overrides) == (asked.label is not None)
            who = asked.who or [results.OURS]
            assert set(who) <= everybody
            measured |= {(case.name, name, ranks, asked.label) for name in who}
    for case in GPU_CASES:
        wanted = {results.OURS}
        wanted |= {results.PLAIN} if case.without_engine else set()
        wanted |= set(peers.peers(on_gpu=True)) if case.with_peers else set()
        for name in wanted:
            assert (case.name, name, 1, None) in measured
    for ranks in (2, 4, 8):
        assert ("accumulate-8", results.OURS, ranks, None) in measured


def test_several_gpus_are_those_there_are(machine: Machine) -> None:
    assert machine("several").returncode == 0
    assert {line.split()[2] for line in machine.called()} == {"2"}
    alone = machine("several", GPUS="1")
    assert alone.returncode == 2
    assert "this one has 1" in alone.stderr


def test_a_piece_that_is_cut_off_goes_on(machine: Machine) -> None:
    done = machine("steps", HANG="notes-8192", LIMIT_S="6")
    assert done.returncode == 124
    assert "goes on with python -m train.benchmark" in done.stderr
    assert [line.split()[6] for line in machine.called()] == ["abstracts-1024", "notes-8192"]
    again = machine("steps")
    assert again.returncode == 0
    assert [line.split()[6] for line in machine.called()] == ["notes-8192", "full-8192"]
    assert "done before: python -m train.benchmark --json RESULTS/train_h200.json" in again.stdout
    assert machine("steps").returncode == 0
    assert machine.called() == []
    # Another commit, or other words, are something else.
    assert machine("steps", COMMIT="def").returncode == 0
    assert len(machine.called()) == 3
    assert machine("steps", "--repeats", "40").returncode == 0
    assert [line.split()[-2:] for line in machine.called()] == [["--repeats", "40"]] * 3


def test_what_fails_is_said_and_tried_again(machine: Machine) -> None:
    done = machine("large", FAIL="large-1024")
    assert done.returncode == 1
    assert "failed: python -m train.benchmark" in done.stderr
    assert len(machine.called()) == 2, "the rest goes on"
    assert machine("large").returncode == 0
    (line,) = machine.called()
    assert "large-1024" in line


def test_plots_are_drawn_again(machine: Machine) -> None:
    for _ in range(2):
        assert machine("plot").returncode == 0
        assert len(machine.called()) == 1


def test_tests_on_a_gpu_are_few_at_once_and_say_what_they_tested(machine: Machine) -> None:
    assert machine("tests", FAIL="test_rope.py").returncode == 1
    called = machine.called()
    assert all(line.startswith("python -m pytest -v -rA -n 4 -m gpu tests/") for line in called)
    text = (machine.results / "gpu_tests_h200.txt").read_text()
    # Each part says it, and holds what was printed, failed or not.
    rope = "python -m pytest -v -rA -n 4 -m gpu tests/kernels/test_rope.py"
    assert f"{rope}\nNVIDIA H200, commit abc\n\n{rope}\n" in text
    for file in (line.split()[-1] for line in called):
        assert f"-m gpu {file}\nNVIDIA H200" in text
        assert "gpu" in (ROOT / file).read_text()
    assert machine("tests").returncode == 0
    assert machine.called() == [rope]
    assert (machine.results / "gpu_tests_h200.txt").read_text() == text


def test_the_tiny_case_is_measured_on_a_cpu(tmp_path: Path) -> None:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "RESULTS": str(tmp_path),
        "LIMIT_S": "1200",
    }
    words = ["tiny", "--who", "ours", "--repeats", "2", *TINY]
    done = subprocess.run(
        [str(SCRIPT), *words], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (one,) = json.loads((tmp_path / "tiny_cpu.json").read_text())
    assert one["error"] is None
    assert one["who"] == "ours"
    line = (tmp_path / "measured_cpu.txt").read_text()
    assert line.startswith(f"{one['versions']['commit'] or 'not known'}: python -m train.benchmark")
