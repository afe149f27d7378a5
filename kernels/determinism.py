"""Whether torch's own operations, and others' attention that asks torch, sum in a fixed order.

This project's kernels always do.
"""

import torch


def use_deterministic_algorithms(asked: bool) -> None:
    """Set torch's mode for the whole process, or take it back; fresh memory is not filled in it.

    With the mode torch also fills fresh memory, lest its content be read. Nothing here reads it,
    which tests in that mode show, and filling takes as long as writing does.
    """
    torch.use_deterministic_algorithms(asked)
    torch.utils.deterministic.fill_uninitialized_memory = not asked  # type: ignore[attr-defined]
