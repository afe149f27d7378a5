"""Starting weights: their measured widths, and that a seed decides them."""

from dataclasses import replace

import pytest
import torch

from model.config import ModernBertConfig
from model.modernbert import ModernBertForMaskedLM

# A normal distribution cut at two standard deviations has this share of its own.
CUT = 0.8796


def make_model(config: ModernBertConfig, seed: int) -> ModernBertForMaskedLM:
    return ModernBertForMaskedLM(config, torch.Generator().manual_seed(seed))


def test_measured_standard_deviations(small: ModernBertConfig) -> None:
    config = replace(small, hidden_size=256, intermediate_size=384, num_hidden_layers=8)
    weights = make_model(config, 0).state_dict()
    wide, narrow = 0.02, 0.02 / 4  # sqrt(2 · 8 layers) is 4
    expected = {
        "model.embeddings.tok_embeddings.weight": wide,
        "model.layers.0.attn.Wqkv.weight": wide,
        "model.layers.7.mlp.Wi.weight": wide,
        "model.layers.0.attn.Wo.weight": narrow,
        "model.layers.7.mlp.Wo.weight": narrow,
        "head.dense.weight": wide,
    }
    for name, std in expected.items():
        assert weights[name].std().item() == pytest.approx(CUT * std, rel=0.02), name
        assert weights[name].abs().max() <= 2 * std + 1e-7, name
        assert abs(weights[name].mean().item()) < 0.02 * std, name
    assert torch.equal(weights["decoder.weight"], weights["model.embeddings.tok_embeddings.weight"])
    assert bool((weights["model.layers.3.mlp_norm.weight"] == 1).all())
    assert not bool(weights["decoder.bias"].any())
    assert bool(weights["decoder.weight"][config.pad_token_id].any())


def test_the_seed_decides_and_the_global_generator_does_not(small: ModernBertConfig) -> None:
    torch.manual_seed(1)
    first = make_model(small, 5).state_dict()
    torch.manual_seed(2)
    again, other = make_model(small, 5).state_dict(), make_model(small, 6).state_dict()
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        if weight.dim() == 2:
            assert not torch.equal(weight, other[name])
