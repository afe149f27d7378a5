"""Small data sets of learnable structure, and launches of real runs on them."""

import contextlib
import functools
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from pydantic import TypeAdapter

from common.files import file_hash, write_json
from data_prep.shard_writer import shard_name, write_shard
from data_prep.shards import FORMAT_VERSION, TOKEN_COUNTS_NAME, Row, row_key
from train.config import Train
from train.loader import StepMaker
from train.optimizer import make_optimizer, set_rates
from train.ranks import Ranks, join
from train.resolve import Run, resolve
from train.schedule import Progress
from train.start import make_model

ROOT = Path(__file__).parent.parent.parent
CLS, SEP, PAD, MASK, UNK = 0, 1, 2, 3, 4
HANGS_AFTER_S = 1200
"""far longer than any run of these takes on a slow and busy machine"""
MEASURED = {
    "time",
    "eta_s",
    "tok_per_s",
    "padded_tok_per_s",
    "tflop_per_s",
    "mfu",
    "step_s",
    "step_parts_s",
    "data_wait_s",
    "data_wait_rank",
    "pause_s",
    "memory_allocated_gib",
    "memory_reserved_gib",
    "memory_resident_gib",
}
"""keys of records that are of the machine, not of the run"""
UNUSED = 9
"""an ordinary-looking id that the tokenizer excludes from random replacement"""
REAL_VOCABULARY, VOCABULARY = 61, 64
SPECIAL = ["[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]"]
# In every three ids one token begins a word and two go on with it.
PIECES = SPECIAL + [f"{'##' if i % 3 else ''}word{'abcdefghij'[i % 10]}" for i in range(5, 61)]
TOKENIZER_JSON = json.dumps(
    {
        "model": {
            "type": "WordPiece",
            "continuing_subword_prefix": "##",
            "vocab": {f"{piece}{'x' * i}": i for i, piece in enumerate(PIECES)},
        }
    }
).encode()
TOKENIZER = {
    "sha256": "0" * 64,
    "file_sha256": hashlib.sha256(TOKENIZER_JSON).hexdigest(),
    "vocab_size": VOCABULARY,
    "real_vocab_size": REAL_VOCABULARY,
    "special_ids": {"cls": CLS, "sep": SEP, "pad": PAD, "mask": MASK, "unk": UNK},
    "excluded_ids": [CLS, SEP, PAD, MASK, UNK, UNUSED],
}


def make_document(random: np.random.Generator, length: int) -> list[int]:
    """[CLS], an arithmetic progression modulo 50 from 10 on, [SEP]: a neighbour tells the next."""
    start, stride = random.integers(50), random.integers(1, 4)
    return [CLS, *(10 + (start + stride * np.arange(length - 2)) % 50), SEP]


def make_row(
    random: np.random.Generator, key: str, source: str, row_tokens: int, max_length: int
) -> Row:
    """A row of documents of random lengths, rarely full."""
    ids: list[int] = []
    bounds = [0]
    fill = row_tokens - int(random.integers(max_length))
    while (room := fill - len(ids)) >= 5:
        ids += make_document(random, int(random.integers(5, min(room, max_length) + 1)))
        bounds.append(len(ids))
    documents = [f"{source}-{key[-4:]}-{number}" for number in range(len(bounds) - 1)]
    if len(ids) < row_tokens:
        ids += [PAD] * (row_tokens - len(ids))
        bounds.append(row_tokens)
    return Row(np.array(ids, np.uint16), np.array(bounds, np.int32), documents, source, key)


def make_data(
    folder: Path,
    rows: dict[str, dict[str, int]],
    row_tokens: int = 64,
    max_length: int = 32,
    seed: int = 0,
) -> Path:
    """Write a data set of `rows` (split -> source -> rows) and a tokenizer beside it."""
    out = folder / f"rows-{max_length}"
    out.mkdir(parents=True)
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "tokenizer.json").write_bytes(TOKENIZER_JSON)
    random = np.random.default_rng(seed)
    splits: dict[str, Any] = {}
    counts = np.zeros((len(rows["train"]), VOCABULARY), np.int64)
    for split, sources in rows.items():
        entries = {}
        for source, number in sources.items():
            made = [
                make_row(random, row_key(source, split, row), source, row_tokens, max_length)
                for row in range(number)
            ]
            half = (number + 1) // 2
            shards = [
                write_shard(out / shard_name(source, split, at), part).to_dict()
                for at, part in enumerate((made[:half], made[half:]))
                if part
            ]
            if split == "train":
                ids = np.concatenate([row.input_ids for row in made])
                counts[list(sources).index(source)] = np.bincount(
                    ids[ids > UNK], minlength=VOCABULARY
                )
            tokens = sum(shard["tokens"] for shard in shards)
            documents = sum(shard["documents"] for shard in shards)
            entries[source] = {
                "rows": number,
                "tokens": tokens,
                "documents": documents,
                "fill": tokens / (number * row_tokens),
                "shards": shards,
            }
        splits[split] = {"unigram_entropy": float(np.log(50)), "sources": entries}
    np.save(out / TOKEN_COUNTS_NAME, counts)
    manifest = {
        "format": FORMAT_VERSION,
        "token_counts": {
            "sha256": file_hash(out / TOKEN_COUNTS_NAME),
            "sources": list(rows["train"]),
        },
        "row_tokens": row_tokens,
        "max_length": max_length,
        "max_documents": 16,
        "tokenizer": TOKENIZER,
        "splits": splits,
    }
    write_json(out / "manifest.json", manifest)
    return out


ROWS = {"train": {"notes": 40, "papers": 90}, "validation": {"notes": 3, "papers": 6}}


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two sources, rows of 64 tokens, documents of at most 32."""
    return make_data(tmp_path_factory.mktemp("data"), ROWS)


@pytest.fixture(scope="session")
def long_folder(data_folder: Path) -> Path:
    """A data set of the same sources and tokenizer: rows of 128 tokens, documents of up to 64."""
    rows = {"train": {"notes": 15, "papers": 24}, "validation": {"notes": 2, "papers": 3}}
    return make_data(data_folder.parent, rows, row_tokens=128, max_length=64)


@pytest.fixture(scope="session")
def data_maker() -> Callable[..., Path]:
    """`make_data`, for tests that need another data set."""
    return make_data


@pytest.fixture(scope="session")
def phases(data_folder: Path, long_folder: Path) -> Callable[..., Any]:
    """`two_phases` on the session's data sets, of so many times 8 and 4 steps."""
    return functools.partial(two_phases, data_folder, long_folder)


@pytest.fixture
def resolved(data_folder: Path, tmp_path: Path) -> Callable[..., Run]:
    """Works out the tiny run for so many ranks, sections replaced by `changes`, untrained.

    `phase` in `changes` replaces sections of the run's only phase, "main".
    """

    def resolve_it(ranks: int = 1, **changes: Any) -> Run:
        values = changed(run_config(data_folder, tmp_path / "run"), changes)
        return resolve(TypeAdapter(Train).validate_python(values), ranks, on_gpu=False)

    return resolve_it


def run_config(data: Path, run_dir: Path) -> dict[str, Any]:
    """A `train:` section for a tiny run: 12 steps of 8 rows."""
    return {
        "run_dir": str(run_dir),
        "zero_stage": 1,
        "phases": {
            "main": {
                "data": {"dir": str(data)},
                "tokens": 12 * 8 * 64,
                "batch": {"rows": 8, "micro_rows": 2},
                "lr": {
                    "peak": 5e-3,
                    "warmup_tokens": 1024,
                    "decay": "sqrt",
                    "decay_tokens": 2048,
                },
            },
        },
        "model": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        "validation": {"every_steps": 6, "rows": 5},
        "checkpoint": {"every_steps": 4},
        "log": {"every_steps": 1},
    }


def two_phases(short: Path, long: Path, scale: int = 1) -> dict[str, Any]:
    """Phases of 8 and 4 steps times `scale`: the batch grows in the first, which reads rows of 64
    tokens; the second reads rows of 128, with another mixture, another base and fewer masks."""
    warmup = {"rows": 2, "increment": 2, "tokens": scale * 2 * (2 + 4 + 6) * 64}
    return {
        "short": {
            "data": {"dir": str(short)},
            "tokens": scale * 2 * (2 + 4 + 6 + 8) * 64,
            "batch": {"rows": 8, "micro_rows": 1, "warmup": warmup},
            "lr": {"peak": 5e-3, "warmup_tokens": 512},
            "global_rope_theta": 10_000,
        },
        "long": {
            "data": {"dir": str(long), "weights": {"notes": 1, "papers": 1}},
            "tokens": scale * 4 * 4 * 128,
            "batch": {"rows": 4, "micro_rows": 2},
            "masking": {"rate": 0.3, "final_rate": 0.15},
            "lr": {"peak": 3e-3, "decay": "sqrt"},
            "global_rope_theta": 160_000,
        },
    }


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A configuration with sections replaced, those under `phase` in its phase "main"."""
    top = {key: value for key, value in changes.items() if key != "phase"}
    main = values["phases"]["main"] | changes.get("phase", {})
    return values | {"phases": {"main": main}} | top


@dataclass(frozen=True)
class Finished:
    """A process that ended."""

    code: int
    out: str
    err: str


class Launcher:
    """Writes configurations and starts `train/main.py` or another script, as a user would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.accelerator = "cpu"

    def write(self, name: str, data: Path, **changes: Any) -> Path:
        """A configuration file of a run in `folder/name`; for `changes` see `resolved`."""
        values = changed(run_config(data, self.folder / name), changes)
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"train": values}, sort_keys=False))
        return path

    def write_long(self, name: str, data: Path, phases: dict[str, Any]) -> Path:
        """A run whose checkpoints, validations and log lines are out of step."""
        return self.write(
            name,
            data,
            phases=phases,
            checkpoint={"every_steps": 8},
            validation={"every_steps": 7, "rows": 5},
            log={"every_steps": 3},
        )

    def command(self, ranks: int, script: Path, *words: str) -> list[str]:
        """What starts `script` with so many processes."""
        if ranks == 1:
            return [sys.executable, str(script), *words]
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]  # what `deepspeed` starts
        ports = ["--master_port", str(free_port())]
        return [*launcher, "--num_accelerators", str(ranks), *ports, str(script), *words]

    def start(self, ranks: int, *words: str, script: Path | None = None) -> subprocess.Popen[str]:
        """Start it; stdout and stderr are pipes, and the process leads a group of its own."""
        environment = dict(os.environ, DS_ACCELERATOR=self.accelerator, OMP_NUM_THREADS="1")
        return subprocess.Popen(
            self.command(ranks, script or ROOT / "train" / "main.py", *words),
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, ranks: int, *words: str, script: Path | None = None) -> Finished:
        """Start it and wait for its end."""
        with self.start(ranks, *words, script=script) as process:
            try:
                out, err = process.communicate(timeout=HANGS_AFTER_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return Finished(process.returncode, out, err)

    def records(self, name: str, kind: str) -> list[dict[str, Any]]:
        """The records of a kind in the metrics.jsonl of the run `name`, times left out."""
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return [
            {key: value for key, value in record.items() if key not in MEASURED}
            for record in records
            if record["kind"] == kind
        ]

    def losses(self, name: str) -> list[float]:
        """The training losses of the run `name`, in order."""
        return [record["loss"] for record in self.records(name, "train")]


@pytest.fixture(scope="session")
def launcher_in() -> Callable[[Path], Launcher]:
    """Makes a launcher whose runs lie in a folder, for what several tests look at."""
    return Launcher


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    """Starts runs whose folders lie in the test's own."""
    return Launcher(tmp_path)


@pytest.fixture(scope="session")
def two_ranks(
    tmp_path_factory: pytest.TempPathFactory, data_folder: Path, phases: Callable[..., Any]
) -> Launcher:
    """What several tests look at, in one start: runs, gradients, and steps of an optimizer."""
    launcher = Launcher(tmp_path_factory.mktemp("two_ranks"))
    # Without this every parameter of a tiny model is kept whole on every rank, tied decoder too.
    settings = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    both = phases()
    runs: dict[str, dict[str, Any]] = {
        f"zero{stage}": {"zero_stage": stage, "deepspeed": settings, "phases": both}
        for stage in range(4)
    }
    runs |= {
        f"half{stage}": {"zero_stage": stage, "precision": "bf16", "phases": both}
        for stage in (0, 1)
    }
    runs["muon"] = {
        "zero_stage": 2,
        "optimizer": {"name": "muon"},
        "profile": {"first_step": 3, "steps": 2, "rank": 1},
    }
    # The two phases as two runs, the second from where the first ended.
    runs["first"] = {"phases": {"short": both["short"]}}
    start = str(launcher.folder / "first" / "checkpoints" / "step_00000008")
    for optimizer in ("kept", "fresh"):
        runs[optimizer] = {
            "phases": {"long": both["long"]},
            "init_from": start,
            "init_optimizer": optimizer,
            "model": {},
        }
    tasks = [f"train:{launcher.write(name, data_folder, **run)}" for name, run in runs.items()]
    tasks.append(f"train:{launcher.write_long('whole', data_folder, phases(3))}")
    split = launcher.write("split", data_folder, zero_stage=0)
    tasks.append(f"gradients:{split}:{launcher.folder / 'gradients.npz'}")
    tasks.append(f"steps:some:{launcher.folder / 'steps'}")
    done = launcher.run(2, *tasks, script=ROOT / "tests" / "train" / "launched.py")
    assert done.code == 0, done.out + done.err
    return launcher


def free_port() -> int:
    """A port nobody listens on, and which the system gives nobody who asks for any port."""
    # Linux gives out ports from 32768 on; what it gives could be taken before the run is up.
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("0.0.0.0", port))
            return port
    raise RuntimeError("no port from 20000 to 31999 is free")


@pytest.fixture(scope="session")
def plain_losses() -> Callable[[Run], list[float]]:
    """The losses of a run by a loop of PyTorch's own, one process, without an engine."""

    def losses(run: Run) -> list[float]:
        # Tensors so small gain nothing by threads, which on a busy machine wait for each other.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return _plain_losses(run)
        finally:
            torch.set_num_threads(threads)

    return losses


def _plain_losses(run: Run) -> list[float]:
    model = make_model(run.config, run.start)
    config = run.config.optimizer
    optimizer = make_optimizer(model, config)
    maker, losses = StepMaker(run, rank=0), []
    for plan in run.plans(Progress()):
        model.set_global_rope_theta(run.phases[plan.phase].model_config.global_rope_theta)
        batches = list(maker.micro_batches(plan))
        masked = sum(batch.masked_tokens for batch in batches)
        total = 0.0
        for batch in batches:
            documents = (batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
            loss = model(*documents, batch.masked_indices, batch.labels)
            (loss / masked).backward()
            total += loss.item()
        set_rates(optimizer.param_groups, plan.rates, config)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / masked)
    return losses


@pytest.fixture
def joined() -> Iterator[None]:
    """This process as the only rank of a process group, and the environment put back."""
    before = dict(os.environ)
    join(Ranks(), torch.device("cpu"))
    yield
    dist.destroy_process_group()
    for name in set(os.environ) - set(before):
        del os.environ[name]
