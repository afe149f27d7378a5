"""The model that a run starts from: geometry and weights."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from common.checkpoint_manifest import CheckpointError
from common.config import ConfigError
from model.config import BASE, to_hugging_face
from model.modernbert import ModernBertForMaskedLM
from model.tiling import tile
from train import checkpoint
from train.ranks import Ranks
from train.schedule import Progress
from train.start import make_model

pytestmark = pytest.mark.usefixtures("joined")


def write_start(folder: Path, **changes: Any) -> Path:
    """A Hugging Face folder of the right vocabulary, its config.json alone."""
    config = dataclasses.replace(
        BASE, vocab_size=64, pad_token_id=2, cls_token_id=0, sep_token_id=1, hidden_size=48
    )
    folder.mkdir()
    path = folder / "config.json"
    path.write_text(json.dumps(to_hugging_face(dataclasses.replace(config, **changes))))
    return folder


def save_start(
    model: ModernBertForMaskedLM, folder: Path, left_out: str = "decoder.weight"
) -> Path:
    """The weights and config.json of a Hugging Face folder; the tied decoder may be left out."""
    folder.mkdir()
    tensors = {k: v.contiguous() for k, v in model.state_dict().items() if k not in left_out}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(to_hugging_face(model.config)))
    return folder


def write_tokenizer(data: Path, folder: Path, other: Sequence[int] = (), **keys: str) -> None:
    """The tokenizer.json of a data set, with more keys, and other tokens for some ids."""
    content = json.loads((data.parent / "tokenizer" / "tokenizer.json").read_text())
    tokens = content["model"]["vocab"]
    content["model"]["vocab"] = {
        f"other{number}" if number in other else token: number for token, number in tokens.items()
    }
    (folder / "tokenizer.json").write_text(json.dumps(content | keys))


def start_of(run: Any) -> ModernBertForMaskedLM:
    return make_model(run.config, run.start)


def test_every_process_draws_the_same_model_from_the_seed(resolved: Callable[..., Any]) -> None:
    first, again, other = (start_of(resolved(seed=seed)).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "model.layers.0.attn.Wqkv.weight"
    assert not torch.equal(first[name], other[name])


def test_init_from_brings_the_sizes(resolved: Callable[..., Any], tmp_path: Path) -> None:
    start = write_start(tmp_path / "start", global_rope_theta=10_000.0)
    model = resolved(init_from=start, model={}).start
    assert (model.hidden_size, model.num_hidden_layers) == (48, 22)
    assert model.global_rope_theta == 10_000


def test_init_from_takes_every_weight(resolved: Callable[..., Any], tmp_path: Path) -> None:
    model = ModernBertForMaskedLM(resolved().start, torch.Generator().manual_seed(3))
    start = save_start(model, tmp_path / "start")
    run = resolved(init_from=start, model={})
    assert run.start == model.config
    taken = start_of(run).state_dict()
    assert taken.keys() == model.state_dict().keys()
    assert all(torch.equal(taken[name], value) for name, value in model.state_dict().items())


def test_a_larger_model_is_tiled_from_init_from(
    resolved: Callable[..., Any], tmp_path: Path
) -> None:
    model = ModernBertForMaskedLM(resolved().start, torch.Generator().manual_seed(3))
    start = save_start(model, tmp_path / "start")
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    run = resolved(init_from=start, model=sizes)
    assert run.start == dataclasses.replace(model.config, **sizes)
    taken, expected = start_of(run).state_dict(), tile(model, run.start).state_dict()
    assert all(torch.equal(taken[name], value) for name, value in expected.items())


def test_geometry_large_asks_for_larges_sizes(resolved: Callable[..., Any], tmp_path: Path) -> None:
    sizes = {"hidden_size": 768, "local_attention": 64}
    start = write_start(tmp_path / "start", **sizes)
    model = resolved(init_from=start, model={"geometry": "large"}).start
    assert (model.hidden_size, model.num_hidden_layers, model.intermediate_size) == (1024, 28, 2624)
    assert model.local_attention == 64, "constants stay those of init_from"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hidden_size": 24}, r"model\.hidden_size is 24, .* has 48: .* not cut"),
        ({"hidden_size": 96}, "heads are 8 wide, those of init_from = .* 4"),
    ],
)
def test_what_cannot_be_tiled_is_refused(
    resolved: Callable[..., Any], tmp_path: Path, model: dict[str, int], message: str
) -> None:
    start = write_start(tmp_path / "start")
    with pytest.raises(ConfigError, match=message):
        resolved(init_from=start, model=model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 128}, "vocabulary of 128, the tokenizer of .* one of 64; make the data"),
        ({"cls_token_id": 7}, r"its cls token is 7, not 0; .* tokenizer\.existing="),
        ({"max_position_embeddings": 16}, "16 positions, the longest documents have 32 tokens"),
    ],
)
def test_a_start_that_does_not_fit_the_data_is_refused(
    resolved: Callable[..., Any], tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    start = write_start(tmp_path / "start", **changes)
    with pytest.raises(ConfigError, match=message):
        resolved(init_from=start, model={})


def test_a_tokenizer_of_the_same_size_but_other_tokens_is_refused(
    resolved: Callable[..., Any], data_folder: Path, tmp_path: Path
) -> None:
    start = write_start(tmp_path / "start")
    write_tokenizer(data_folder, start, version="1.0")
    assert resolved(init_from=start, model={}).start.hidden_size == 48
    write_tokenizer(data_folder, start, other=[6, 8])
    with pytest.raises(ConfigError, match="2 ids stand for other tokens, the first is 6"):
        resolved(init_from=start, model={})


def test_init_from_with_a_key_missing_is_refused(
    resolved: Callable[..., Any], tmp_path: Path
) -> None:
    model = ModernBertForMaskedLM(resolved().start)
    start = save_start(model, tmp_path / "start", "decoder.weight head.norm.weight")
    with pytest.raises(ConfigError, match=r"init_from: .*head\.norm\.weight"):
        start_of(resolved(init_from=start, model={}))


@pytest.mark.parametrize("name", ["model.layers.1.attn_norm.weight", "head.norm.weight"])
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-39])
def test_a_norm_with_a_weight_of_zero_is_refused(
    resolved: Callable[..., Any], tmp_path: Path, name: str, value: float
) -> None:
    """Also where the model is tiled from it; a small weight, or a 0 elsewhere, is taken."""
    model = ModernBertForMaskedLM(resolved().start)
    model.decoder.bias.data.zero_()
    weight = model.get_parameter(name).data
    weight[3] = -1e-6
    taken = save_start(model, tmp_path / "taken")
    assert torch.equal(start_of(resolved(init_from=taken, model={})).get_parameter(name), weight)
    weight[5] = value
    start = save_start(model, tmp_path / "start")
    larger = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    for sizes in ({}, larger):
        with pytest.raises(ConfigError, match=rf"init_from: .*{name} holds 1 zeros"):
            start_of(resolved(init_from=start, model=sizes))


def test_a_hugging_face_folder_has_no_optimizer_to_keep(
    resolved: Callable[..., Any], tmp_path: Path
) -> None:
    start = write_start(tmp_path / "start")
    run = resolved(init_from=start, model={}, init_optimizer="kept")
    with pytest.raises(CheckpointError, match="holds no optimizer to keep"):
        checkpoint.find(run, Ranks())


class Saved:
    """An engine's files, as DeepSpeed writes them without ZeRO."""

    def __init__(self, model: ModernBertForMaskedLM) -> None:
        self.model = model

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        state = Path(folder) / tag
        state.mkdir(parents=True)
        torch.save({"module": self.model.state_dict()}, state / "mp_rank_00_model_states.pt")


def write_checkpoint(run: Any, norm: float = 1.0) -> tuple[Path, ModernBertForMaskedLM]:
    """norm: a weight of the last norm."""
    model = ModernBertForMaskedLM(run.start, torch.Generator().manual_seed(3))
    model.model.final_norm.weight.data[2] = norm
    path = checkpoint.save(Saved(model), run, Ranks(), Progress(4, {"main": {"notes": 32}}))
    return path, model


def test_a_checkpoint_brings_its_sizes_and_weights(resolved: Callable[..., Any]) -> None:
    path, model = write_checkpoint(resolved(zero_stage=0))
    run = resolved(init_from=path, model={})
    assert run.start == model.config
    taken = start_of(run).state_dict()
    assert all(torch.equal(taken[name], value) for name, value in model.state_dict().items())


def test_a_kept_optimizer_is_that_of_the_checkpoint_and_counters_start_anew(
    resolved: Callable[..., Any], data_folder: Path, tmp_path: Path
) -> None:
    path, _ = write_checkpoint(resolved(zero_stage=0))
    kept = {"init_from": path, "model": {}, "init_optimizer": "kept", "zero_stage": 0}
    run = resolved(run_dir=tmp_path / "other", **kept)
    assert checkpoint.find(run, Ranks()) == checkpoint.Found(path, {}, [], Progress())
    with pytest.raises(CheckpointError, match="cannot be kept: its zero_stage is 0, this run's is"):
        checkpoint.find(resolved(run_dir=tmp_path / "other", **{**kept, "zero_stage": 1}), Ranks())
    with pytest.raises(ConfigError, match="init_optimizer is kept, but `model` asks"):
        resolved(**{**kept, "model": {"intermediate_size": 96}})
    write_tokenizer(data_folder, path / "tokenizer", other=[9])
    with pytest.raises(ConfigError, match="1 ids stand for other tokens, the first is 9"):
        resolved(**kept)


def test_a_checkpoint_with_a_norm_weight_of_zero_is_refused(
    resolved: Callable[..., Any], tmp_path: Path
) -> None:
    """Whether its optimizer is kept or not; a run that goes on with its own is not stopped."""
    own = resolved(zero_stage=0)
    path, _ = write_checkpoint(own, norm=0.0)
    start = {"init_from": path, "model": {}, "zero_stage": 0, "run_dir": tmp_path / "other"}
    with pytest.raises(ConfigError, match=r"init_from: model\.final_norm\.weight holds 1 zeros"):
        start_of(resolved(**start))
    with pytest.raises(CheckpointError, match=r"cannot be kept: model\.final_norm\.weight holds 1"):
        checkpoint.find(resolved(**start, init_optimizer="kept"), Ranks())
    assert checkpoint.find(own, Ranks()).path == path


def test_what_is_no_model_is_named(resolved: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty/config\.json.*or a checkpoint RUN/checkpoints"):
        resolved(init_from=tmp_path / "empty", model={})
