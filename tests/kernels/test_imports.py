"""A package named `kernels` exists elsewhere, and transformers looks for it; ours must not hurt."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BUILD = """
import torch
from transformers import AutoModelForMaskedLM, ModernBertConfig
config = ModernBertConfig(
    vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
    sep_token_id=2,
)
logits = AutoModelForMaskedLM.from_config(config)(torch.tensor([[1, 5, 2]])).logits
print(tuple(logits.shape))
"""


@pytest.mark.parametrize(
    "order",
    ["import kernels.rope, kernels.unpad, transformers", "import transformers, kernels.rope"],
)
def test_transformers_works_beside_our_kernels(order: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", order + BUILD], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 3, 64)"
