"""Geometries, and config.json as transformers 4 and 5 write it."""

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
from transformers import ModernBertConfig as TheirConfig

from model.config import BASE, LARGE, ModernBertConfig, from_hugging_face, to_hugging_face


@pytest.mark.parametrize("config", [BASE, LARGE, replace(BASE, global_attn_every_n_layers=2)])
def test_round_trips(config: ModernBertConfig) -> None:
    assert ModernBertConfig(**dataclasses.asdict(config)) == config
    assert from_hugging_face(to_hugging_face(config)) == config
    assert from_hugging_face(TheirConfig(**to_hugging_face(config)).to_dict()) == config


def test_defaults_are_those_of_transformers() -> None:
    assert from_hugging_face(TheirConfig().to_dict()) == BASE
    assert from_hugging_face({"model_type": "modernbert"}) == BASE


def test_keys_of_version_4() -> None:
    config = from_hugging_face(
        {
            "model_type": "modernbert",
            "num_hidden_layers": 28,
            "global_attn_every_n_layers": 4,
            "global_rope_theta": 80_000.0,
            "local_rope_theta": 20_000,
            "reference_compile": None,
        }
    )
    assert config.global_attn_every_n_layers == 4
    assert (config.rope_theta(0), config.rope_theta(1)) == (80_000.0, 20_000.0)
    assert [config.window(layer) for layer in range(5)] == [None, 64, 64, 64, None]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "bert"}, "model_type"),
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"norm_bias": True}, "norm_bias"),
        ({"decoder_bias": False}, "decoder_bias"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"local_rope_theta": -1}, "local_rope_theta"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "yarn"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries for 22 layers"),
        ({"layer_types": ["sliding_attention"] * 22}, "layer_types"),
        ({"local_attention": 127}, "local_attention"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"pad_token_id": 60_000}, "pad_token_id"),
        ({"hidden_size": 0}, "hidden_size"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        from_hugging_face({"model_type": "modernbert", **change})


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_few_layers(layers: int) -> None:
    config = replace(BASE, num_hidden_layers=layers)
    again = from_hugging_face(TheirConfig(**to_hugging_face(config)).to_dict())
    assert [again.window(i) for i in range(layers)] == [config.window(i) for i in range(layers)]
