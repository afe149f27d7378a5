"""Model FLOPs against a count by hand, a loop over all pairs, and torch's own counter."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import ModernBertConfig as HuggingFaceConfig
from transformers import ModernBertForMaskedLM

from model.config import ModernBertConfig
from train.flops import attended_pairs, peak_flops, training_flops


def test_a_count_by_hand() -> None:
    """Base, one document of 1,024 tokens, 307 of them masked: the last layer has 307 queries."""
    base = ModernBertConfig()
    products = 1024 * 21 * (768 * 2304 + 768 * 768 + 768 * 2304 + 1152 * 768)
    last = 1024 * 768 * 1536 + 307 * (768 * 768 + 768 * 768 + 768 * 2304 + 1152 * 768)
    head = 307 * (768 * 768 + 768 * 50368)
    local = 1024 * 129 - 64 * 65
    attention = 2 * 768 * (7 * 1024 * 1024 + 307 * 1024 + 14 * local)
    counted = training_flops(base, [1024], 307)
    assert counted == pytest.approx(6 * (products + last + head + attention), rel=1e-12)
    # Peers quote 0.82 GFLOP a token at 1,024 with the head on 30 %, all of the last layer in it.
    saved = 6 * 717 * (2 * 768 * 768 + 768 * 2304 + 1152 * 768 + 2 * 768 * 1024)
    assert (counted + saved) / 1024 == pytest.approx(0.82e9, rel=0.02)


def test_no_token_costs_nothing() -> None:
    assert training_flops(ModernBertConfig(), [], 0) == 0
    assert training_flops(ModernBertConfig(), [0], 0) == 0


@pytest.mark.parametrize("window", [None, 1, 3, 64])
def test_pairs_are_those_of_a_loop(window: int | None) -> None:
    lengths = np.array([0, 1, 2, 3, 4, 5, 64, 65, 66, 200])
    expected = sum(
        window is None or abs(query - key) <= window
        for length in lengths
        for query in range(length)
        for key in range(length)
    )
    assert attended_pairs(lengths, window) == expected


def test_forward_and_backward_are_what_torch_counts_for_transformers() -> None:
    """Documents short enough for every window, all tokens through the head, no padding."""
    sizes = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "pad_token_id": 0,
        "cls_token_id": 1,
        "sep_token_id": 2,
    }
    others = {"bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager"}
    peer = ModernBertForMaskedLM(HuggingFaceConfig(**sizes, **others))
    ids = torch.randint(5, 320, (3, 40))
    with FlopCounterMode(display=False) as counter:
        peer(input_ids=ids, labels=ids).loss.backward()
    ours = training_flops(ModernBertConfig(**sizes), [40] * 3, ids.numel())
    # The gradient of the embeddings is no product, so that nothing of forward lacks its backward.
    assert counter.get_total_flops() == pytest.approx(ours, rel=1e-6)


def test_a_gpu_that_is_not_known_has_no_peak() -> None:
    assert peak_flops("NVIDIA H200") == 989.4e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA A100 80GB PCIe") == 312e12
    assert peak_flops("NVIDIA H200 NVL") == 835.5e12
    assert peak_flops("NVIDIA GB200") == 2500e12
    assert peak_flops("NVIDIA GH900 Unheard-Of") is None
    assert peak_flops("NVIDIA RTX A1000") is None, "which is no A100"
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None, "a seventh of a GPU"
    for virtual in ("GRID A100-10C", "GRID A100D-4-40C", "NVIDIA A100-40C", "NVIDIA L40S-48Q"):
        assert peak_flops(virtual) is None, f"{virtual} is a share of one"
    assert peak_flops("NVIDIA A100-1-5CME") is None
    assert peak_flops("NVIDIA A100-PCIE-40GB") == 312e12
    assert peak_flops("NVIDIA H100") is None, "its three versions differ, and this names none"
