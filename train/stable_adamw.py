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

A step costs 29 reads or writes of fp32 numbers a parameter (27 without decay), 116 bytes, in
passes over whole flat tensors; only the last one is launched piece by piece. torch's fused AdamW,
which needs no R and so no second pass, costs 28 bytes.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Which parameters a flat tensor of this rank holds pieces of.

    pieces: (start, stop) in the flat tensor for each parameter, the same parameters in the same
    order on every rank; start == stop where this rank has none of it. What no piece covers is
    padding. sizes: elements of each parameter over all ranks. group: the ranks that hold pieces
    (None: all ranks of the run); whole: this rank holds all of every parameter.
    """

    pieces: tuple[tuple[int, int], ...]
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
        """Take a step with the gradients that are there; they serve as working memory."""
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
        mean, square, eps = state["exp_avg"], state["exp_avg_sq"], group["eps"]
        taken = self._prepare(gradient)
        state["step"] += taken
        # In fp64: 1 − βᵗ would lose digits. A step that is not taken mixes nothing in.
        steps = state["step"].double().clamp(min=1)
        shares = [(taken * (1 - b) / (1 - b**steps)).float() for b in group["betas"]]

        mean.lerp_(gradient, shares[0])
        ratio = gradient * gradient
        square.lerp_(ratio, shares[1])
        scratch = square.clamp(min=eps * eps)
        ratio.div_(scratch)
        layout = self._layouts.get(weights) or whole(weights)
        rates = (taken * group["lr"]) / root_mean(ratio, layout).clamp(min=1)

        torch.sqrt(square, out=scratch).add_(eps)
        update = torch.div(mean, scratch, out=ratio)
        if group["weight_decay"]:
            update.add_(weights.detach().view_as(update), alpha=group["weight_decay"])
        flat_weights, flat_update = weights.detach().view(-1), update.view(-1)
        for (start, stop), rate in zip(layout.pieces, rates.unbind(), strict=True):
            if start < stop:
                flat_weights[start:stop].addcmul_(flat_update[start:stop], rate, value=-1)

    def _prepare(self, gradient: Tensor) -> Tensor:
        """Scale `gradient` in place, to zero if the step is to be left out; 1 if it is not."""
        if self.grad_scale is not None:
            gradient.div_(self.grad_scale)
        if self.found_inf is None:
            return torch.ones((), device=gradient.device)
        gradient.masked_fill_(self.found_inf.bool(), 0)
        return 1 - self.found_inf


def root_mean(ratio: Tensor, layout: Layout) -> Tensor:
    """(parameters,) fp32: the square root of the mean over each whole parameter of `ratio` ≥ 0."""
    flat = ratio.view(-1)
    held = [index for index, (start, stop) in enumerate(layout.pieces) if start < stop]
    sums = torch.zeros(len(layout.sizes), dtype=torch.float32, device=flat.device)
    if held:
        # The 1-norm of what is not negative: one launch for all, summed in a fixed order.
        norms = torch._foreach_norm([flat[slice(*layout.pieces[index])] for index in held], 1)
        sums[_on(flat.device, tuple(held))] = torch.stack(norms)
    if not layout.whole:
        dist.all_reduce(sums, group=layout.group)
    return (sums / _on(flat.device, layout.sizes)).sqrt()


@functools.cache
def _on(device: torch.device, numbers: tuple[int, ...]) -> Tensor:
    """`numbers` as a tensor on the device, copied there once, for the copy waits for the device."""
    return torch.tensor(numbers, device=device)
