"""Checkpoints of every ZeRO stage, from two ranks, as Hugging Face folders."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM

from model.config import ModernBertConfig
from model.export import main
from model.huggingface import load_pretrained

ROOT = Path(__file__).parent.parent.parent
WORKER = Path(__file__).with_name("export_worker.py")
DTYPES = ("fp32", "bf16")


def write_manifest(folder: Path, config: ModernBertConfig) -> None:
    files = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for part in ("deepspeed", "tokenizer")
        for path in sorted((folder / part).rglob("*"))
        if path.is_file()
    }
    manifest = {"format": 2, "model": dataclasses.asdict(config), "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the worker left, one folder a ZeRO stage and dtype."""
    folder = tmp_path_factory.mktemp("trained")
    config = ModernBertConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=3,
        cls_token_id=1,
        sep_token_id=2,
    )
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "DS_IGNORE_CUDA_DETECTION": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), str(rank), "2"],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=1200)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    return folder


@pytest.fixture
def checkpoint(trained: Path, tokenizer_of: Callable, tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint folder as training writes it."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(trained / name / "deepspeed", folder / "deepspeed")
        tokenizer_of(folder / "tokenizer", 300)
        config = ModernBertConfig(**json.loads((trained / "config.json").read_text()))
        write_manifest(folder, config)
        return folder

    return make


@pytest.mark.parametrize("name", [f"{stage}-{dtype}" for stage in range(4) for dtype in DTYPES])
def test_every_stage_exports_its_weights(
    name: str, checkpoint: Callable, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "model"
    assert main([str(checkpoint(name)), str(out)]) == 0
    assert capsys.readouterr().out == f"model: {out}\n"
    _, info = AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    exported = load_pretrained(out).state_dict()
    for key, weight in torch.load(trained / name / "weights.pt").items():
        assert torch.equal(exported[key].to(weight.dtype), weight), key
    if name in (
        "1-bf16",
        "2-bf16",
        "3-bf16",
    ):  # the fp32 weights that the optimizer keeps, not their bf16 copies
        matrix = exported["head.dense.weight"]
        assert not torch.equal(matrix.bfloat16().float(), matrix)


def test_every_stage_trains_alike(trained: Path) -> None:
    """One tied parameter used at both ends, and a loss that is one call of the decoder."""
    losses = [json.loads((trained / f"{s}-fp32" / "losses.json").read_text()) for s in range(4)]
    for stage in range(1, 4):
        assert losses[stage] == pytest.approx(losses[0], rel=1e-5)
    assert len(set(losses[0])) == 3


def test_what_is_no_whole_checkpoint_is_refused(
    checkpoint: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "model"

    def message(folder: Path) -> str:
        assert main([str(folder), str(out)]) == 1
        assert not out.exists()
        return capsys.readouterr().err

    assert "is not a checkpoint: its manifest.json cannot be read" in message(tmp_path)
    folder = checkpoint("1-fp32")
    optimizer = next(folder.glob("deepspeed/state/*rank_1*optim_states.pt"))
    content = optimizer.read_bytes()
    optimizer.write_bytes(content[:-1] + b"x")
    assert f"{optimizer} is damaged" in message(folder)
    optimizer.unlink()
    assert f"{optimizer} cannot be read (No such file or directory); give another" in message(
        folder
    )
    optimizer.write_bytes(content)
    (folder / "manifest.json").write_text("{}")
    assert "manifest.json is damaged" in message(folder)


def test_a_tokenizer_of_another_model_is_refused(
    checkpoint: Callable, tokenizer_of: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = checkpoint("0-fp32")
    shutil.rmtree(folder / "tokenizer")
    tokenizer_of(folder / "tokenizer", 400)
    manifest = json.loads((folder / "manifest.json").read_text())
    write_manifest(folder, ModernBertConfig(**manifest["model"]))
    assert main([str(folder), str(tmp_path / "model")]) == 1
    assert "has 400 tokens and the model's vocab_size is 320" in capsys.readouterr().err
