"""The step without DeepSpeed: what the engine is compared with.

The same model, loss and optimizer in plain PyTorch on one GPU: weights of the run's precision, sums
of gradients of its accumulation dtype, fp32 weights that the optimizer steps. Both are flat, as
ZeRO has them, so that the optimizer launches as few kernels as under it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from common.config import ConfigError
from train.engine import Engine, choose_dtypes
from train.optimizer import make_optimizer
from train.optimizer_step import OptimizerStep
from train.resolve import Run
from train.stable_adamw import Layout, StableAdamW
from train.zero import add_gradient, write_gradient


class PlainEngine:
    """What the training loop calls of an engine, without one."""

    def __init__(self, model: nn.Module, run: Run) -> None:
        if run.config.optimizer.name == "muon":
            raise ConfigError(
                "Muon's step is DeepSpeed's own, there is none without the engine; "
                "set optimizer.name=stable_adamw"
            )
        accumulation, _ = choose_dtypes(run.config, run.precision)
        self._sum_dtype = torch.bfloat16 if accumulation == "bf16" else torch.float32
        if run.precision == "bf16":
            model.bfloat16()
        self.optimizer = make_optimizer(model, run.config.optimizer)
        self.module = model
        self.skipped_steps = 0
        self._groups = [_Flat(group, self._sum_dtype) for group in self.optimizer.param_groups]
        self.optimizer_step = OptimizerStep(self, self.optimizer, run.config.optimizer)
        if isinstance(self.optimizer, StableAdamW):
            self.optimizer.set_layouts({flat.weights: flat.layout for flat in self._groups})
        self._is_last = False

    def __call__(self, *batch: Any, **options: Any) -> Any:
        return self.module(*batch, **options)

    def set_gradient_accumulation_boundary(self, is_last: bool) -> None:
        """Whether the next backward is the step's last."""
        self._is_last = is_last

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        """Add the gradients of a micro-batch to the sums."""
        loss.backward()
        for flat in self._groups:
            flat.add_gradients()
        if self._is_last:
            for flat in self._groups:
                flat.weights.grad = flat.sums.float()

    @torch.no_grad()
    def step(self) -> None:
        """Step the fp32 weights, and round them into the model's."""
        self.optimizer.step()
        for flat in self._groups:
            flat.write_back()

    def destroy(self) -> None:
        """Nothing is held but memory."""


class _Flat:
    """The parameters of a group as one tensor of fp32 weights and one of sums of gradients."""

    def __init__(self, group: dict[str, Any], sum_dtype: torch.dtype) -> None:
        self.parameters: list[nn.Parameter] = group["params"]
        sizes = [p.numel() for p in self.parameters]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        pieces = tuple((end - size, end) for end, size in zip(ends, sizes, strict=True))
        self.layout = Layout(pieces, tuple(sizes), whole=True)
        flat = torch.cat([p.detach().float().flatten() for p in self.parameters])
        self.weights = nn.Parameter(flat)
        self.sums = torch.empty_like(flat, dtype=sum_dtype)
        self._is_empty = True
        self._weights, self._sums = (
            [part.view_as(p) for part, p in zip(whole.split(sizes), self.parameters, strict=True)]
            for whole in (self.weights.detach(), self.sums)
        )
        group["params"] = [self.weights]

    def add_gradients(self) -> None:
        """Add the parameters' gradients to the sums, and drop them."""
        add = write_gradient if self._is_empty else add_gradient
        self._is_empty = False
        for parameter, sums in zip(self.parameters, self._sums, strict=True):
            assert parameter.grad is not None, "every parameter is used"
            add(sums, parameter.grad)
            parameter.grad = None

    def write_back(self) -> None:
        """Round the weights into the parameters, and begin the next sums."""
        torch._foreach_copy_(list(self.parameters), self._weights)
        self._is_empty = True
        self.weights.grad = None


def without_engine(model: nn.Module, run: Run) -> Engine:
    """The run's step in plain PyTorch."""
    return PlainEngine(model, run)
