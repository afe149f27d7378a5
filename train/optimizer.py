"""The optimizer a run configures; its rates are set before every step by the schedule."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from train.config import Optimizer
from train.schedule import Rates
from train.stable_adamw import StableAdamW

Groups = list[dict[str, Any]]

MUON_LR_FACTOR = 25.0
"""Muon's own rate of 0.02 at ModernBERT's peak of 8e-4"""
MUON_MOMENTUM = 0.95


def make_optimizer(model: nn.Module, config: Optimizer) -> torch.optim.Optimizer:
    """The optimizer that `config.name` names, for `model`'s parameters.

    adamw is AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019),
    `fused`, so one kernel over all parameters. muon is DeepSpeed's Muon (Jordan et al. 2024,
    "Muon: an optimizer for hidden layers in neural networks") with its AdamW for the rest.

    Rates are 0 until `set_rates`: DeepSpeed may take a step, without gradients, as it starts, and
    that must not decay the weights.
    """
    if config.name == "muon":
        return _muon(model, config)
    groups = parameter_groups(model)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, 0.0, config.betas, config.eps, fused=True)
    return StableAdamW(groups, config.betas, config.eps)


def parameter_groups(model: nn.Module) -> Groups:
    """Matrices, which decay, and norms and biases (one dimension or none), which do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "decays": True, "weight_decay": 0.0},
        {"params": [p for p in parameters if p.ndim < 2], "decays": False, "weight_decay": 0.0},
    ]


def set_rates(groups: Iterable[dict[str, Any]], rates: Rates, config: Optimizer) -> None:
    """Take the next step at `rates`.

    Sets what else the configuration says too, for a checkpoint brings what it was written with.
    Rules multiply a group's `weight_decay` by its rate; so that a step at the peak rate decays by
    `rates.weight_decay`, whatever the rate, it is divided by the peak.
    """
    for group in groups:
        scale = (config.muon_lr_factor or MUON_LR_FACTOR) if group.get("use_muon") else 1.0
        group["lr"] = rates.lr * scale
        decay = rates.weight_decay if group["decays"] else 0.0
        group["weight_decay"] = decay / (rates.peak * scale)
        group |= _constants(config, is_muon=bool(group.get("use_muon")))


def _constants(config: Optimizer, is_muon: bool) -> dict[str, Any]:
    if is_muon:
        return {"momentum": config.muon_momentum or MUON_MOMENTUM}
    return {"betas": config.betas, "eps": config.eps}


def _muon(model: nn.Module, config: Optimizer) -> torch.optim.Optimizer:
    """Muon for the matrices of layers and head; embeddings, norms and biases are AdamW's."""
    # Only here: importing it compiles functions.
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: Groups = []
    for group in parameter_groups(model):
        by_rule: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for parameter in group["params"]:
            # DeepSpeed's wrappers look at the mark on the parameter too.
            parameter.use_muon = group["decays"] and id(parameter) not in embeddings
            by_rule[parameter.use_muon].append(parameter)
        for use_muon, parameters in by_rule.items():
            if parameters:
                keys = {"params": parameters, "use_muon": use_muon, "lr": 0.0}
                groups.append(group | keys | _constants(config, use_muon))
    optimizer: torch.optim.Optimizer = MuonWithAuxAdam(groups)
    return optimizer
