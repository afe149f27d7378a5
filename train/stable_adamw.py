"""StableAdamW, also where a parameter is cut into pieces that lie on several ranks.

With gradient g, moments m and v, and t counting the steps taken:

    β̂ᵢ = 1 − (1 − βᵢ) / (1 − βᵢᵗ)                       (bias correction put into the rates)
    m  ← β̂₁ m + (1 − β̂₁) g,      v ← β̂₂ v + (1 − β̂₂) g²
    R  = sqrt(mean over the parameter of g² / max(v, ε²))
    θ  ← θ − lr / max(1, R) · (m / (sqrt(v) + ε) + decay · θ)

Wortsman et al. 2023, "Stable and low-precision training for large-scale vision-language models",
arXiv 2304.13013, algorithm 2: AdamW with the update clipping of AdaFactor (Shazeer and Stern 2018,
arXiv 1804.04235, section 6). With decay = (decay a step at the peak rate) / (peak rate) it is what
trained ModernBERT, whose steps decay weights by a constant times lr / max_lr.

R belongs to a whole parameter. ZeRO flattens parameters and gives each rank a stretch of the
whole, so each rank sums g² / max(v, ε²) over its pieces and one all-reduce of as many numbers as
there are parameters completes the sums. Nothing here waits for the device.

A step is two passes over memory (kernels/stable_adamw.py), 36 bytes a parameter; torch's fused
AdamW, which needs no R and so one pass, takes 28. Without a GPU the same is done by PyTorch.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.stable_adamw import (
    Pieces,
    apply_update,
    apply_update_reference,
    update_moments,
    update_moments_reference,
)

Passes = tuple[Callable[..., Tensor], Callable[..., None]]
KERNELS: Passes = (update_moments, apply_update)
REFERENCES: Passes = (update_moments_reference, apply_update_reference)


@dataclass(frozen=True)
class Layout:
    """Which parameters a flat tensor of this rank holds pieces of.

    pieces: (start, stop) in the flat tensor for each parameter, the same parameters in the same
    order on every rank; start == stop where this rank has none of it. What no piece covers is
    padding. sizes: elements of each parameter over all ranks. group: the ranks that hold pieces
    (None: all ranks of the run); whole: this rank holds all of every parameter.
    """

    pieces: Pieces
    sizes: tuple[int, ...]
    group: dist.ProcessGroup | None = None
    whole: bool = False


def whole(tensor: Tensor) -> Layout:
    """The layout of a tensor that is a parameter."""
    return Layout(((0, tensor.numel()),), (tensor.numel(),), whole=True)


class StableAdamW(torch.optim.Optimizer):
    """StableAdamW of fp32 tensors, each a parameter or flat pieces of several (`set_layouts`).

    groups: parameter groups with `params` and `weight_decay`, the decay at a rate of 1. Their `lr`
    is 0 until it is set. As with torch's fused optimizers, scalars on the device may be set before
    a step: `grad_scale`, what gradients are divided by, and `found_inf`, 1 to leave weights,
    moments and the count of steps as they are.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float
    ) -> None:
        # `capturable` tells torch that the count of steps belongs on the device when it is loaded.
        defaults = {"lr": 0.0, "betas": betas, "eps": eps, "capturable": True}
        super().__init__(groups, defaults)
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self._layouts: dict[Tensor, Layout] = {}

    def set_layouts(self, layouts: dict[Tensor, Layout]) -> None:
        """Say what the tensors hold that are no whole parameter."""
        self._layouts = layouts

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take a step with the gradients that are there, which it may overwrite."""
        if closure is not None:
            raise ValueError("StableAdamW takes no closure")
        for group in self.param_groups:
            for weights in group["params"]:
                if weights.grad is not None:
                    self._update(weights, weights.grad, group)

    def _update(self, weights: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weights]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weights.device)
            state["exp_avg"] = torch.zeros_like(weights)
            state["exp_avg_sq"] = torch.zeros_like(weights)
        scale, skip = self._scalars(weights.device)
        taken = 1 - skip
        state["step"] += taken
        # In fp64: 1 − βᵗ would lose digits. A step that is left out mixes nothing in.
        steps = state["step"].double().clamp(min=1)
        shares = torch.stack([taken * (1 - b) / (1 - b**steps) for b in group["betas"]]).float()

        layout = self._layouts.get(weights) or whole(weights)
        moments, update = KERNELS if weights.is_cuda else REFERENCES
        flat = [state[name].view(-1) for name in ("exp_avg", "exp_avg_sq")]
        pieces, eps = layout.pieces, group["eps"]
        sums = moments(gradient.reshape(-1), *flat, shares, scale, skip, eps, pieces)
        if not layout.whole:
            dist.all_reduce(sums, group=layout.group)
        ratios = (sums / _on(sums.device, layout.sizes)).sqrt()
        rates = taken * group["lr"] / ratios.clamp(min=1)
        update(weights.detach().view(-1), *flat, rates, group["weight_decay"], eps, pieces)

    def _scalars(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """What gradients are divided by, and 1 if the step is to be left out."""
        scale, skip = self.grad_scale, self.found_inf
        scale = torch.ones((), device=device) if scale is None else scale
        return scale, torch.zeros((), device=device) if skip is None else skip


@functools.cache
def _on(device: torch.device, numbers: tuple[int, ...]) -> Tensor:
    """`numbers` as a tensor on the device, copied there once, for the copy waits for the device."""
    return torch.tensor(numbers, device=device)
