"""What a configuration, a data set and a number of ranks make together."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.config import ConfigError
from data_prep.shards import DataError
from model.config import BASE, LARGE
from model.modernbert import ModernBertForMaskedLM
from train.describe import parameter_count


def test_sizes_come_from_the_configuration_and_ids_from_the_tokenizer(
    resolved: Callable[..., Any],
) -> None:
    model = resolved().start
    assert (model.hidden_size, model.num_hidden_layers) == (32, 2)
    assert (model.vocab_size, model.pad_token_id, model.cls_token_id) == (64, 2, 0)
    large = resolved(model={"geometry": "large"}).start
    assert large == dataclasses.replace(
        LARGE, vocab_size=64, pad_token_id=2, cls_token_id=0, sep_token_id=1
    )


def test_parameters_are_counted_without_building_the_model(resolved: Callable[..., Any]) -> None:
    config = resolved().start
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
    assert resolved(phase={"data": {"dir": data}}).phases["main"].data.folder == data
    (tmp_path / "data" / "tokenizer" / "tokenizer.json").write_text("[]")
    with pytest.raises(DataError, match=r"tokenizer\.json is not the tokenizer"):
        resolved(phase={"data": {"dir": data}})


def test_validation_rows_are_shared_out(resolved: Callable[..., Any]) -> None:
    assert resolved().phases["main"].validation_rows == {"notes": 2, "papers": 3}
    whole = resolved(validation={"every_steps": 6, "rows": 100})
    assert whole.phases["main"].validation_rows == {"notes": 3, "papers": 6}


def test_without_validation_rows_the_key_that_makes_some_is_named(
    resolved: Callable[..., Any], data_maker: Callable[..., Path], tmp_path: Path
) -> None:
    data = data_maker(tmp_path / "data", {"train": {"notes": 8}, "validation": {}})
    with pytest.raises(DataError, match="a larger validation_share"):
        resolved(phase={"data": {"dir": data}})


def test_deepspeed_gets_what_the_run_says_and_its_own_keys(resolved: Callable[..., Any]) -> None:
    extra = {"zero_optimization": {"overlap_comm": True}, "memory_breakdown": False}
    settings = resolved(2, zero_stage=2, deepspeed=extra).deepspeed
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert settings["memory_breakdown"] is False
    assert "bf16" not in settings
    half = resolved(precision="bf16").deepspeed
    assert half["bf16"]["enabled"]
    assert half["data_types"] == {"grad_accum_dtype": "fp32"}
