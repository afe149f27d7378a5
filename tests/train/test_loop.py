"""The model that a run starts from."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from common.config import ConfigError
from model.config import to_hugging_face
from model.modernbert import ModernBertForMaskedLM
from train.loop import MOST_SKIPPED_IN_A_ROW, TrainingError, check_finite, make_model
from train.optimizer_step import Norms


def save_start(
    model: ModernBertForMaskedLM, folder: Path, left_out: str = "decoder.weight"
) -> Path:
    """The weights and config.json of a Hugging Face folder; the tied decoder may be left out."""
    folder.mkdir()
    tensors = {k: v.contiguous() for k, v in model.state_dict().items() if k not in left_out}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(to_hugging_face(model.config)))
    return folder


def test_every_process_draws_the_same_model_from_the_seed(resolved: Callable[..., Any]) -> None:
    first, again, other = (make_model(resolved(seed=seed)).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "model.layers.0.attn.Wqkv.weight"
    assert not torch.equal(first[name], other[name])


def test_init_from_takes_every_weight(resolved: Callable[..., Any], tmp_path: Path) -> None:
    model = ModernBertForMaskedLM(resolved().model_config, torch.Generator().manual_seed(3))
    start = save_start(model, tmp_path / "start")
    run = resolved(init_from=start, model={})
    assert run.model_config == model.config
    taken = make_model(run).state_dict()
    assert taken.keys() == model.state_dict().keys()
    assert all(torch.equal(taken[name], value) for name, value in model.state_dict().items())


def test_init_from_with_a_key_missing_is_refused(
    resolved: Callable[..., Any], tmp_path: Path
) -> None:
    model = ModernBertForMaskedLM(resolved().model_config)
    start = save_start(model, tmp_path / "start", "decoder.weight head.norm.weight")
    with pytest.raises(ConfigError, match=r"init_from: .*head\.norm\.weight"):
        make_model(resolved(init_from=start, model={}))


@pytest.mark.parametrize(
    ("loss", "norms", "message"),
    [
        (1.0, Norms(gradient=1.0, update=0.1, skipped_in_a_row=0), None),
        (1.0, Norms(gradient=math.inf, update=0.0, skipped_in_a_row=1), None),
        (math.nan, Norms(gradient=1.0, update=0.1, skipped_in_a_row=0), "the loss is nan"),
        (1.0, Norms(gradient=1.0, update=math.inf, skipped_in_a_row=0), "the update inf"),
        (1.0, Norms(math.inf, 0.0, MOST_SKIPPED_IN_A_ROW), "gradients of 20 steps in a row"),
    ],
)
def test_a_run_ends_where_its_weights_are_spoilt(
    loss: float, norms: Norms, message: str | None
) -> None:
    """A step that was left out spoils nothing, but many in a row never end."""
    if message is None:
        check_finite(7, loss, norms)
    else:
        with pytest.raises(TrainingError, match=f"at step 7 .*{message}.*lower optimizer"):
            check_finite(7, loss, norms)
