"""Executors: as many workers as wanted, the same bytes; errors in one line; no text, no network."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from common.config import config_to_yaml
from common.files import wait_for_workers, working_in
from data_prep.config import DataPrep, Decontaminate, EvaluationSet, Sources, Tokenizer
from data_prep.synthetic.corpus import write_corpus

ROOT = Path(__file__).parent.parent.parent
CANARY = "canary-7Q"
# In a file of documents or of tokens a text is where it belongs.
HOLD_TEXT = ("documents", "kept", "sample", "tokens", "tokenizer", "rows-128")

# A module that every Python process of a run executes when it starts.
NO_NETWORK = """
import socket
def refuse(*arguments, **keywords):
    raise RuntimeError("a connection was asked for")
connect = socket.socket.connect
def only_local(self, address):
    # Processes of one machine talk by files.
    return connect(self, address) if self.family == socket.AF_UNIX else refuse()
socket.socket.connect = only_local
socket.create_connection = socket.getaddrinfo = refuse
"""
# A step that fails with a text in its variables, in its message and in the cause.
FAILING = """
import data_prep.{module}
def failing(documents, *arguments):
    text = "{canary} in a variable"
    try:
        raise ValueError("{canary} in the cause")
    except ValueError as error:
        raise {error}("{canary} in the message") from error
data_prep.{module}.{step} = failing
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus with the canary in a note, in an article and in an evaluation set."""
    folder = tmp_path_factory.mktemp("raw")
    write_corpus(folder, documents=30)
    note = folder / "mimic-iv-note/note/canary.csv"
    note.write_text(
        "note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text\n"
        f'1-DS-1,1,,DS,1,,,"{CANARY} was seen in the clinic, and then seen again. "\n'
    )
    (folder / "pubmed/canary.xml").write_text(
        "<PubmedArticleSet><PubmedArticle><MedlineCitation><PMID Version='1'>9</PMID><Article>"
        f"<ArticleTitle>The {CANARY} of the patients with disease.</ArticleTitle></Article>"
        "</MedlineCitation></PubmedArticle></PubmedArticleSet>"
    )
    (folder / "set.txt").write_text(f"{CANARY} is a text of an evaluation set\n")
    return folder


def configuration(raw: Path, out: Path, workers: int = 1) -> DataPrep:
    return DataPrep(
        raw_dir=raw,
        out_dir=out,
        sources=Sources(
            pubmed=["pubmed/**/*.xml*"],
            discharge=["mimic-iv-note/note/canary.csv", "mimic-iv-note/note/discharge.csv.gz"],
            radiology=["mimic-iv-note/note/radiology.csv.gz"],
        ),
        decontaminate=Decontaminate(
            sets=[EvaluationSet(name="QA", files=["set.txt"], format="lines")]
        ),
        tokenizer=Tokenizer(vocab_size=448),
        row_tokens=512,
        max_lengths=[128],
        rows_per_shard=8,
        part_characters=10_000,
        workers=workers,
    )


def run(
    config: DataPrep, folder: Path, at_start: str = "", *words: str
) -> subprocess.CompletedProcess[str]:
    """The command line, with `at_start` executed by each of its processes."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(at_start)
    lines = config_to_yaml(config).splitlines()
    (folder / "run.yaml").write_text("data_prep:\n" + "".join(f"  {line}\n" for line in lines))
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "data_prep", "--config", str(folder / "run.yaml"), *words],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        cwd=ROOT,
        timeout=300,
    )


@pytest.fixture(scope="module")
def made(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An out_dir made with one worker and without a network."""
    folder = tmp_path_factory.mktemp("made")
    done = run(configuration(raw, folder / "out"), folder / "start", NO_NETWORK)
    assert done.returncode == 0, done.stderr
    return folder / "out"


def data_set(out: Path) -> dict[str, bytes]:
    paths = [path for part in ("rows-128", "tokenizer") for path in (out / part).rglob("*")]
    assert len(paths) > 10
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def places_with_canary(out: Path) -> set[str]:
    """The folders below `out` that have a file with the canary in it or in its name."""
    found = set()
    for path in (path for path in out.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.suffix == ".parquet":
            content += str(pq.read_table(path).to_pylist()).encode()
        if CANARY.encode() in content or CANARY in path.name:
            found.add(path.relative_to(out).parts[0])
    return found


def assert_private(out: Path) -> None:
    readable = [path for path in out.rglob("*") if path.lstat().st_mode & 0o077]
    assert readable == []


def test_two_workers_make_the_same_bytes_as_one_and_ask_for_no_network(
    raw: Path, made: Path, tmp_path: Path
) -> None:
    done = run(configuration(raw, tmp_path / "out", 2), tmp_path / "start", NO_NETWORK)
    assert done.returncode == 0, done.stderr
    assert data_set(tmp_path / "out") == data_set(made)
    for out in (made, tmp_path / "out"):
        assert places_with_canary(out) == {"documents", "kept", "sample"}
        assert_private(out)
    assert CANARY not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("workers", "module", "step", "error"),
    [
        (1, "cleaning_tasks", "check", "RuntimeError"),
        (2, "cleaning_tasks", "check", "OSError"),
        (2, "tasks", "tokens", "MemoryError"),
    ],
)
def test_a_failing_step_shows_no_text_anywhere(
    raw: Path, made: Path, tmp_path: Path, workers: int, module: str, step: str, error: str
) -> None:
    out = Path(shutil.copytree(made, tmp_path / "out"))
    stage = {"check": "checks", "tokens": "tokens"}[step]
    shutil.rmtree(out / stage)
    failing = FAILING.format(module=module, step=step, error=error, canary=CANARY)
    done = run(configuration(raw, out, workers), tmp_path / "start", failing)
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: stage {stage}, task ")
    assert error in last
    assert "Traceback" not in done.stderr
    assert CANARY not in done.stdout + done.stderr
    assert places_with_canary(out) <= set(HOLD_TEXT)
    assert_private(out)


@pytest.mark.parametrize("kind", ["note", "article"])
def test_a_broken_record_shows_no_text_anywhere(raw: Path, tmp_path: Path, kind: str) -> None:
    broken = Path(shutil.copytree(raw, tmp_path / "raw"))
    if kind == "note":
        path = broken / "mimic-iv-note/note/canary.csv"
        path.write_text(path.read_text() + f'2-DS-1,1,,DS,2,,,"{CANARY} is cut of\n')
    else:
        path = broken / "pubmed/canary.xml"
        path.write_text(path.read_text().replace("disease", f"disease & {CANARY} <"))
    done = run(configuration(broken, tmp_path / "out"), tmp_path / "start")
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert path.name in last
    said = (done.stdout + done.stderr).replace(str(path), "")
    assert CANARY not in said
    assert places_with_canary(tmp_path / "out") <= {"documents"}
    assert_private(tmp_path / "out")


KILLED = """
import os, signal, sys
if "multiprocess.forkserver" in " ".join(sys.orig_argv):
    import data_prep.cleaning_tasks
    data_prep.cleaning_tasks.check = lambda *_: os.kill(os.getpid(), signal.{name})
"""
# At the start of a worker, before it takes a task; the forkserver imports this before it forks.
KILLED_AT_START = """
import os, signal, sys
if "multiprocess.forkserver" in " ".join(sys.orig_argv):
    import multiprocess.pool
    multiprocess.pool.worker = lambda *_, **__: os.kill(os.getpid(), signal.{name})
"""


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SIGKILL", KILLED),
        ("SIGSEGV", KILLED),
        pytest.param("SIGBUS", KILLED, marks=pytest.mark.slow),
        ("SIGBUS", KILLED_AT_START),
    ],
)
def test_a_worker_that_dies_ends_the_run_with_an_error(
    raw: Path, made: Path, tmp_path: Path, name: str, code: str
) -> None:
    """As the kernel kills it when memory is short; the pool of workers would wait for ever."""
    out = Path(shutil.copytree(made, tmp_path / "out"))
    shutil.rmtree(out / "checks")
    done = run(configuration(raw, out, 2), tmp_path / "start", code.format(name=name))
    assert done.returncode == 2
    # Not always the last line: a worker that was just being started may end after the command.
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("error: a worker of stage checks ")
    assert f"({name}); " in errors[0]
    if name != "SIGKILL":
        return
    again = run(configuration(raw, out, 2), tmp_path / "start")
    assert again.returncode == 0, again.stderr
    assert data_set(out) == data_set(made)


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that works on a task in `tmp_path`, as one whose command was killed."""
    code = (
        "import pathlib, sys; from common.files import working_in\n"
        "with working_in(pathlib.Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_a_run_waits_for_the_tasks_that_another_has_left(
    busy: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    waited = []

    def notice() -> None:
        waited.append(busy.poll())
        assert busy.stdin is not None
        busy.stdin.close()

    wait_for_workers(tmp_path, notice)
    assert waited == [None]
    with working_in(tmp_path), working_in(tmp_path):
        pass
    wait_for_workers(tmp_path, lambda: pytest.fail("nobody works here"))
