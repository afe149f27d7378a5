"""AdamW's groups and rule."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from model.modernbert import ModernBertForMaskedLM
from train.config import Optimizer
from train.optimizer import make_optimizer, parameter_groups, set_lr


def test_norms_and_biases_do_not_decay(resolved: Callable[..., Any]) -> None:
    model = ModernBertForMaskedLM(resolved().start)
    decayed, plain = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    undecayed = {names[id(p)] for p in plain["params"]}
    assert all("norm" in name or name == "decoder.bias" for name in undecayed)
    assert len(decayed["params"]) + len(undecayed) == len(names)


def test_one_step_is_adamw_by_hand() -> None:
    layer = torch.nn.Linear(3, 2)
    config = Optimizer(betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    optimizer = make_optimizer(layer, config)
    set_lr(optimizer.param_groups, 0.25)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for p in layer.parameters():
        p.grad = torch.full_like(p, 0.3)
    optimizer.step()
    # After one step both moments, bias-corrected, are the gradient and its square.
    update = 0.25 * 0.3 / (0.3 + 1e-6)
    expected = before["weight"] * (1 - 0.25 * 0.1) - update
    torch.testing.assert_close(layer.weight.detach(), expected)
    torch.testing.assert_close(layer.bias.detach(), before["bias"] - update)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25)
