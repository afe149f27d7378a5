"""AdamW as a run configures it; its learning rate is set before every step by the schedule."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from train.config import Optimizer


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with `weight_decay`, norms and biases (one dimension or none) without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: Optimizer) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019).

    Its learning rate is 0 until `set_lr`: DeepSpeed may take a step, without gradients, as it
    starts, and that must not decay the weights. `fused` is one kernel over all parameters.
    """
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, 0.0, config.betas, config.eps, fused=True)


def set_lr(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Take the next step at `lr`."""
    for group in groups:
        group["lr"] = lr
