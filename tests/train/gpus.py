"""Marks of tests that run on GPUs, and on how many."""

import pytest
import torch

ON_ONE_AND_TWO_GPUS = pytest.mark.parametrize(
    "gpus",
    [
        pytest.param(
            number,
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(
                    torch.cuda.device_count() < number, reason=f"needs CUDA devices: {number}"
                ),
            ],
        )
        for number in (1, 2)
    ],
)
"""one process a GPU; with two, gradients are reduced by NCCL, on a stream of their own"""
