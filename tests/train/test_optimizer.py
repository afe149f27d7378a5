"""Which parameters which rule steps, and at what rates."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from model.modernbert import ModernBertForMaskedLM
from train.config import Optimizer
from train.optimizer import make_optimizer, parameter_groups, set_rates
from train.schedule import Rates


def test_norms_and_biases_do_not_decay(resolved: Callable[..., Any]) -> None:
    model = ModernBertForMaskedLM(resolved().start)
    groups = parameter_groups(model)
    set_rates(groups, Rates(lr=0.1, peak=0.5, weight_decay=1e-4), Optimizer())
    decayed, plain = groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (1e-4 / 0.5, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    undecayed = {names[id(p)] for p in plain["params"]}
    assert all("norm" in name or name == "decoder.bias" for name in undecayed)
    assert len(decayed["params"]) + len(undecayed) == len(names)


@pytest.mark.parametrize("name", ["adamw", "stable_adamw"])
def test_one_step_by_hand(name: Any) -> None:
    layer = torch.nn.Linear(3, 2)
    config = Optimizer(name=name, betas=(0.9, 0.98), eps=1e-6)
    optimizer = make_optimizer(layer, config)
    set_rates(optimizer.param_groups, Rates(lr=0.25, peak=0.5, weight_decay=5e-4), config)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for p in layer.parameters():
        p.grad = torch.full_like(p, 0.3)
    optimizer.step()
    # After one step both moments, bias-corrected, are the gradient and its square; nothing to clip.
    update = 0.25 * 0.3 / (0.3 + 1e-6)
    # At half the peak rate half the decay.
    expected = before["weight"] * (1 - 5e-4 / 2) - update
    torch.testing.assert_close(layer.weight.detach(), expected)
    torch.testing.assert_close(layer.bias.detach(), before["bias"] - update)


def test_muon_gets_the_matrices_of_layers_and_head(resolved: Callable[..., Any]) -> None:
    model = ModernBertForMaskedLM(resolved().start)
    config = Optimizer(name="muon", muon_lr_factor=20)
    optimizer = make_optimizer(model, config)
    set_rates(optimizer.param_groups, Rates(lr=5e-4, peak=1e-3, weight_decay=1e-5), config)
    names = {id(p): name for name, p in model.named_parameters()}
    rules = {
        names[id(p)]: (group["use_muon"], group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert rules.keys() == set(names.values())
    for name, rule in rules.items():
        if "norm" in name or name == "decoder.bias":
            assert rule == (False, 5e-4, 0.0)
        elif "embeddings" in name:
            assert rule == (False, 5e-4, 1e-5 / 1e-3)
        else:
            assert rule == (True, 0.02 / 2, 1e-5 / 0.02), name
