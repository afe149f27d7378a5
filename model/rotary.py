"""Tables of rotary positions, and the turn of queries and keys by them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernels.rope import rope, rope_in_place, rope_reference, rope_tables


def runs_in_triton(tensor: Tensor) -> bool:
    """Whether this project's kernels take it; elsewhere their references compute the same."""
    return tensor.is_cuda and tensor.dtype != torch.float64


class RotaryTables(nn.Module):
    """Cosine and sine of every position for one base, fp32 whatever the model's dtype.

    Not in the state dict: they follow from the configuration.
    """

    cos_PR: Tensor
    sin_PR: Tensor

    def __init__(self, positions: int, head_dim: int, theta: float):
        super().__init__()
        self.sizes = (positions, head_dim, theta)
        cos, sin = rope_tables(*self.sizes)
        self.register_buffer("cos_PR", cos, persistent=False)
        self.register_buffer("sin_PR", sin, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryTables":
        """Follow the model to another device but not to another dtype.

        In bf16 every sine and cosine would be rounded to eight bits; `model.bfloat16()`, which
        DeepSpeed calls, must not touch them.
        """
        super()._apply(fn, recurse)
        device = self.cos_PR.device
        cos, sin = rope_tables(*self.sizes)
        self.cos_PR, self.sin_PR = cos.to(device), sin.to(device)
        return self

    def set_theta(self, theta: float) -> None:
        """Turn by another base from here on; the tables stay where they are in memory."""
        self.sizes = (*self.sizes[:2], theta)
        cos, sin = rope_tables(*self.sizes)
        self.cos_PR.copy_(cos)
        self.sin_PR.copy_(sin)

    def forward(self, qkv_T3HD: Tensor, position_ids_T: Tensor) -> Tensor:
        """Queries and keys turned to their positions, and values as they are: (T, 3, H, D).

        Triton on a GPU, where qkv is written over if there is no gradient to compute; plain
        PyTorch elsewhere.
        """
        turn = rope_reference
        if runs_in_triton(qkv_T3HD):
            turn = rope if torch.is_grad_enabled() else rope_in_place
        return turn(qkv_T3HD, self.cos_PR, self.sin_PR, position_ids_T)
