"""The optimizer step: norms, clipping and steps left out, without waiting for the device."""

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.config import Optimizer
from train.optimizer import set_rates
from train.ranks import sum_over_ranks
from train.schedule import Rates
from train.stable_adamw import StableAdamW
from train.zero import held, without_waits


@dataclass(frozen=True)
class Norms:
    """What is known of a step that is logged; over all ranks.

    gradient: before clipping (of Muon's matrices: of what Muon makes of it). update: of the change
    of the fp32 weights. skipped_in_a_row: the most steps in a row whose gradients were not
    finite, so that they were left out, with at least one of them since the last that was logged.
    """

    gradient: float
    update: float
    skipped_in_a_row: int


class SkippedInARow:
    """How many steps in a row were left out."""

    def __init__(self) -> None:
        self._now = self._most = 0

    def add(self, skipped: bool) -> None:
        """A step that was left out, or one that was not."""
        self._now = self._now + 1 if skipped else 0
        self._most = max(self._most, self._now)

    def take(self) -> int:
        """The longest row that was added to since the last call, counted from its beginning."""
        most, self._most = self._most, 0
        return most


class OptimizerStep:
    """Takes the steps of an engine; the norm, clipping and check for infinities on the device.

    Whether a step was left out is known to the host when its flag, sent behind the step, has come:
    one step late, or at a step that is logged.
    """

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, config: Optimizer) -> None:
        self.config = config
        self._skipped = SkippedInARow()
        self._engine, self._optimizer = engine, optimizer
        self.held = held(engine.optimizer)
        self._flags: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        # Muon's work is done by DeepSpeed's wrappers before its optimizer is asked for a step, so
        # it is they who must see to it that infinities do no harm. They wait for it.
        self._checks = config.name != "muon"
        if self._checks:
            without_waits(engine.optimizer)
        if isinstance(optimizer, StableAdamW):
            optimizer.set_layouts(self.held.layouts)

    def __call__(self, rates: Rates, want_norms: bool) -> Norms | None:
        """Take a step at `rates`; if `want_norms`, wait for the device and say what to log."""
        self._read_flags(wait=False)
        set_rates(self._engine.optimizer.param_groups, rates, self.config)
        before = [weights.clone() for weights in self.held.weights()] if want_norms else []
        norm: Tensor | None = self._guard() if self._checks else None
        counted = self._engine.skipped_steps
        self._engine.step()
        if self._checks:
            # Counted by its flag, once, also where DeepSpeed has been told to check as well.
            self._engine.skipped_steps = counted
        else:
            norm = self._engine.get_global_grad_norm()
            self._count(not self._engine.was_step_applied())
        if not want_norms:
            return None
        self._read_flags(wait=True)
        update = self._norm(list(torch._foreach_sub(self.held.weights(), before)))
        assert norm is not None
        return Norms(float(norm), float(update), self._skipped.take())

    def _guard(self) -> Tensor:
        """Tell the optimizer how to scale the gradient, and whether to leave the step out."""
        norm = self._norm(self.held.gradients())
        skip = (~norm.isfinite()).float()
        largest = self.config.gradient_clipping
        optimizer: Any = self._optimizer
        # The names by which torch's fused AdamW knows them as well.
        optimizer.grad_scale = ((norm + 1e-6) / largest).clamp(min=1) if largest else None
        optimizer.found_inf = skip
        if skip.device.type != "cuda":
            self._flags.append((skip, None))
        else:
            flag = torch.empty((), pin_memory=True)
            flag.copy_(skip, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._flags.append((flag, arrived))
        return norm

    def _norm(self, pieces: list[Tensor]) -> Tensor:
        """The norm over all ranks of what lies in pieces on them, fp32, on the device."""
        square = torch.zeros((), device=self.held.device)
        if pieces:
            norms = torch._foreach_norm(pieces, 2, dtype=torch.float32)
            square = torch.stack(norms).square().sum()
        return (sum_over_ranks(square) if self.held.sharded else square).sqrt()

    def _read_flags(self, wait: bool) -> None:
        while self._flags:
            flag, arrived = self._flags[0]
            if arrived is not None and not arrived.query():
                if not wait:
                    return
                arrived.synchronize()
            self._flags.popleft()
            # numpy() refuses what is not on the host.
            self._count(bool(flag.numpy()))

    def _count(self, skipped: bool) -> None:
        self._skipped.add(skipped)
        if self._checks:
            self._engine.skipped_steps += skipped
