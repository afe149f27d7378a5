"""Folders in and out, to the last key, and what is refused."""

import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer
from transformers import ModernBertForMaskedLM as TheirModel

from model.config import ModernBertConfig
from model.huggingface import ModelError, load_pretrained, save_pretrained
from model.modernbert import ModernBertForMaskedLM

WEIGHTS = "model.safetensors"


@pytest.fixture
def exported(
    small: ModernBertConfig, lively_model: Callable, tokenizer_folder: Path, tmp_path: Path
) -> tuple[ModernBertForMaskedLM, Path]:
    model = lively_model(small)
    out = tmp_path / "runs" / "model"
    save_pretrained(model, tokenizer_folder=tokenizer_folder, out=out)
    return model, out


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@torch.no_grad()
def test_transformers_loads_what_we_save(
    exported: tuple[ModernBertForMaskedLM, Path], packed_row: Callable
) -> None:
    model, out = exported
    theirs, info = AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert isinstance(theirs, TheirModel)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], kind
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (theirs.config.pad_token_id, tokenizer.pad_token_id) == (3, 3)
    assert (theirs.config.cls_token_id, theirs.config.sep_token_id) == (1, 2)
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (1, 2)
    row = packed_row([200])
    expected = theirs(row.input_ids_T[None]).logits[0]
    assert (model.logits(model.encode(*row.arguments())) - expected).abs().max() < 1e-4
    encoded = tokenizer("w7 [MASK] w9")["input_ids"]
    assert encoded == [1, 7, 4, 9, 2]


def test_only_the_owner_can_read_it(exported: tuple[ModernBertForMaskedLM, Path]) -> None:
    for path in (exported[1], *exported[1].iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_we_load_what_we_save(exported: tuple[ModernBertForMaskedLM, Path]) -> None:
    model, out = exported
    again = load_pretrained(out)
    assert again.config == replace(model.config, pad_token_id=3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.decoder.weight is again.model.embeddings.tok_embeddings.weight


@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
def test_we_load_what_transformers_saves(
    shard_size: str, exported: tuple[ModernBertForMaskedLM, Path], tmp_path: Path
) -> None:
    model, out = exported
    folder = tmp_path / "theirs"
    theirs = AutoModelForMaskedLM.from_pretrained(out, dtype=torch.bfloat16)
    theirs.save_pretrained(folder, max_shard_size=shard_size)
    assert (folder / WEIGHTS).exists() == (shard_size == "5GB")
    again = load_pretrained(folder)
    for name, tensor in model.state_dict().items():
        loaded = again.state_dict()[name]
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded, tensor.bfloat16().float()), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("head.dense.weight"), r"missing: \['head.dense.weight'\]"),
        (lambda t: t.update(extra=torch.ones(1)), r"unexpected: \['extra'\]"),
        (lambda t: t.update({"head.norm.weight": torch.ones(3)}), r"head.norm.weight .*\(3,\)"),
        (lambda t: t.update({"decoder.weight": torch.ones(320, 64)}), "untied"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    change: Callable, message: str, exported: tuple[ModernBertForMaskedLM, Path]
) -> None:
    change_weights(exported[1], change)
    with pytest.raises(ModelError, match=message):
        load_pretrained(exported[1])


def test_a_tied_decoder_in_the_file_is_fine(exported: tuple[ModernBertForMaskedLM, Path]) -> None:
    source = "model.embeddings.tok_embeddings.weight"
    change_weights(exported[1], lambda t: t.update({"decoder.weight": t[source].clone()}))
    assert torch.equal(load_pretrained(exported[1]).decoder.weight, exported[0].decoder.weight)


def test_other_folders_are_refused(
    exported: tuple[ModernBertForMaskedLM, Path], tmp_path: Path
) -> None:
    out = exported[1]
    with pytest.raises(ModelError, match=r"absent/config\.json.*model folder is needed"):
        load_pretrained(tmp_path / "absent")
    values = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**values, "mlp_bias": True}))
    with pytest.raises(ModelError, match=r"config\.json: mlp_bias is True"):
        load_pretrained(out)
    (out / "config.json").write_text(json.dumps({**values, "intermediate_size": 97}))
    with pytest.raises(ModelError, match=r"mlp\..*the configuration asks for"):
        load_pretrained(out)
    (out / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        load_pretrained(out)
    (out / "config.json").write_text(json.dumps(values))
    (out / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="has neither model"):
        load_pretrained(out)


@pytest.mark.parametrize(("words", "vocab_size"), [(321, 320), (1000, 320), (512, 1024)])
def test_a_tokenizer_that_does_not_fit_is_refused(
    words: int, vocab_size: int, small: ModernBertConfig, tokenizer_of: Callable, tmp_path: Path
) -> None:
    model = ModernBertForMaskedLM(replace(small, vocab_size=vocab_size))
    folder = tokenizer_of(tmp_path / "other", words)
    expected = f"has {words} tokens .* vocab_size is {vocab_size}"
    with pytest.raises(ModelError, match=expected):
        save_pretrained(model, tokenizer_folder=folder, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_half_written_stays_and_nothing_foreign_is_replaced(
    small: ModernBertConfig,
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, out = ModernBertForMaskedLM(small), tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "precious").write_text("x")
    with pytest.raises(ModelError, match="holds precious, which no export writes"):
        save_pretrained(model, tokenizer_folder=tokenizer_folder, out=out)
    assert (out / "precious").exists()
    for name in ("file", "link"):
        place = tmp_path / name
        place.write_text("x") if name == "file" else place.symlink_to(out)
        with pytest.raises(ModelError, match=f"{name} is not a folder"):
            save_pretrained(model, tokenizer_folder=tokenizer_folder, out=place)

    def fail(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("model.huggingface.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        save_pretrained(model, tokenizer_folder=tokenizer_folder, out=tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "out", "tokenizer"]


def test_an_earlier_export_is_replaced(
    exported: tuple[ModernBertForMaskedLM, Path], tokenizer_folder: Path, small: ModernBertConfig
) -> None:
    (exported[1] / "vocab.txt").write_text("of another tokenizer")
    other = ModernBertForMaskedLM(small)
    save_pretrained(other, tokenizer_folder=tokenizer_folder, out=exported[1])
    assert torch.equal(load_pretrained(exported[1]).head.dense.weight, other.head.dense.weight)
    assert not (exported[1] / "vocab.txt").exists()
