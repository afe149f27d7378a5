"""What a configuration, a data set and a number of ranks make together."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.config import ConfigError
from data_prep.shards import DataError
from model.config import BASE, LARGE, to_hugging_face
from model.modernbert import ModernBertForMaskedLM
from train.resolve import parameter_count


def test_sizes_come_from_the_configuration_and_ids_from_the_tokenizer(
    resolved: Callable[..., Any],
) -> None:
    model = resolved().model_config
    assert (model.hidden_size, model.num_hidden_layers) == (32, 2)
    assert (model.vocab_size, model.pad_token_id, model.cls_token_id) == (64, 2, 0)
    large = resolved(model={"geometry": "large"}).model_config
    assert large == dataclasses.replace(
        LARGE, vocab_size=64, pad_token_id=2, cls_token_id=0, sep_token_id=1
    )


def test_parameters_are_counted_without_building_the_model(resolved: Callable[..., Any]) -> None:
    config = resolved().model_config
    built = sum(p.numel() for p in ModernBertForMaskedLM(config).parameters())
    assert parameter_count(config) == built
    assert parameter_count(BASE) == 149_655_232
    assert parameter_count(LARGE) == 395_881_664


def test_sizes_that_cannot_be_built_name_the_key(resolved: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="hidden_size 30"):
        resolved(model={"hidden_size": 30, "num_attention_heads": 4})


def test_a_tokenizer_that_is_not_the_data_sets_is_refused(
    resolved: Callable[..., Any], data_maker: Callable[..., Path], tmp_path: Path
) -> None:
    rows = {"train": {"notes": 8}, "validation": {"notes": 2}}
    data = data_maker(tmp_path / "data", rows)
    assert resolved(data={"dir": data}).data.folder == data
    (tmp_path / "data" / "tokenizer" / "tokenizer.json").write_text("[]")
    with pytest.raises(DataError, match=r"tokenizer\.json is not the tokenizer"):
        resolved(data={"dir": data})


def write_start(folder: Path, **changes: Any) -> Path:
    """A Hugging Face folder of the right vocabulary, its config.json alone."""
    config = dataclasses.replace(
        BASE, vocab_size=64, pad_token_id=2, cls_token_id=0, sep_token_id=1, hidden_size=48
    )
    folder.mkdir()
    path = folder / "config.json"
    path.write_text(json.dumps(to_hugging_face(dataclasses.replace(config, **changes))))
    return folder


def test_init_from_brings_the_sizes(resolved: Callable[..., Any], tmp_path: Path) -> None:
    start = write_start(tmp_path / "start")
    model = resolved(init_from=start, model={}).model_config
    assert (model.hidden_size, model.num_hidden_layers) == (48, 22)
    with pytest.raises(ConfigError, match=r"model\.hidden_size cannot be set"):
        resolved(init_from=start, model={"hidden_size": 32})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 128}, "vocabulary of 128, the tokenizer of .* one of 64"),
        ({"cls_token_id": 7}, "its cls token is 7, not 0"),
        ({"max_position_embeddings": 16}, "16 positions, .* documents of 32 tokens"),
    ],
)
def test_a_start_that_does_not_fit_the_data_is_refused(
    resolved: Callable[..., Any], tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    start = write_start(tmp_path / "start", **changes)
    with pytest.raises(ConfigError, match=message):
        resolved(init_from=start, model={})


def test_validation_rows_are_shared_out(resolved: Callable[..., Any]) -> None:
    assert resolved().validation_rows == {"notes": 2, "papers": 3}
    whole = resolved(validation={"every_steps": 6, "rows": 100})
    assert whole.validation_rows == {"notes": 3, "papers": 6}


def test_without_validation_rows_the_key_that_makes_some_is_named(
    resolved: Callable[..., Any], data_maker: Callable[..., Path], tmp_path: Path
) -> None:
    data = data_maker(tmp_path / "data", {"train": {"notes": 8}, "validation": {}})
    with pytest.raises(DataError, match="a larger validation_share"):
        resolved(data={"dir": data})


def test_deepspeed_gets_what_the_run_says_and_its_own_keys(resolved: Callable[..., Any]) -> None:
    assert resolved(zero_stage=1).deepspeed["zero_optimization"]["overlap_comm"] is True
    extra = {"zero_optimization": {"overlap_comm": False}, "memory_breakdown": False}
    settings = resolved(2, zero_stage=2, deepspeed=extra).deepspeed
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["zero_optimization"] == {
        "stage": 2,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": 25_000_000,
        "compute_grad_norm": False,
    }
    assert settings["memory_breakdown"] is False
    assert "bf16" not in settings
    half = resolved(precision="bf16").deepspeed
    assert half["bf16"]["enabled"]
    assert half["data_types"] == {"grad_accum_dtype": "fp32"}
    assert half["communication_data_type"] == "fp32"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_stage": 0, "precision": "bf16", "grad_accum_dtype": "fp32"}, "set zero_stage=1"),
        ({"precision": "fp32", "grad_accum_dtype": "bf16"}, "weights are fp32"),
    ],
)
def test_sums_that_deepspeed_has_no_place_for_are_refused(
    resolved: Callable[..., Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"grad_accum_dtype is .*{message}"):
        resolved(**changes)
