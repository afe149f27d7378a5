"""Rotary positions: the kernel against fp64, on every shape of row."""

from collections.abc import Callable
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers import ModernBertConfig as TheirConfig
from transformers.models.modernbert.modeling_modernbert import ModernBertRotaryEmbedding

from kernels import rope as module
from kernels.documents import positions_from
from kernels.rope import (
    _rope,
    _rope_in_place,
    rope,
    rope_in_place,
    rope_reference,
    rope_tables,
)

LAYOUTS = {
    "even": [16] * 4,
    "skewed": [97, *[3] * 11],
    "empty documents": [0, 5, 0, 0, 9, 0],
    "length 1": [1] * 7,
    "one document": [37],
    "no token": [0],
}
POSITIONS = 128


def make_rows(
    lengths: list[int], heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qkv, cos, sin, position_ids of documents of these lengths."""
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, generator=generator)
    cos, sin = rope_tables(POSITIONS, head_dim, 10_000.0)
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    return qkv.to(device, dtype), cos.to(device), sin.to(device), position_ids.to(device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_and_gradient_are_as_exact_as_pytorch(
    layout: str, dtype: torch.dtype, device: torch.device, assert_close: Callable[..., None]
) -> None:
    qkv, *others = make_rows(LAYOUTS[layout], 3, 24, dtype, device)
    grad = torch.randn(qkv.shape, generator=torch.Generator().manual_seed(2)).to(qkv)
    results = []
    for function, wide in ((rope, qkv), (rope_reference, qkv), (rope_reference, qkv.double())):
        leaf = wide.clone().requires_grad_()
        out = function(leaf, *others)
        results.append((out, *torch.autograd.grad(out, leaf, grad.to(out.dtype))))
    for what, *values in zip(("forward", "gradient"), *results, strict=True):
        assert_close(f"rope {layout} {what}", *values)


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (5, 6), (12, 64), (3, 80)])
def test_any_even_width_and_any_number_of_heads(
    heads: int, head_dim: int, device: torch.device, assert_close: Callable[..., None]
) -> None:
    qkv, *others = make_rows([5, 2], heads, head_dim, torch.float32, device)
    exact = rope_reference(qkv.double(), *others)
    plain = rope_reference(qkv, *others)
    for ours in (rope(qkv, *others), rope_in_place(qkv.clone(), *others)):
        for place, name in enumerate("qkv"):
            assert_close(f"rope {name}", *(one[:, place] for one in (ours, plain, exact)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place_is_the_same(layout: str, dtype: torch.dtype, device: torch.device) -> None:
    qkv, *others = make_rows(LAYOUTS[layout], 3, 24, dtype, device)
    expected = rope(qkv, *others)
    assert rope_in_place(qkv, *others) is qkv
    assert torch.equal(qkv, expected)
    with pytest.raises(RuntimeError, match="has no gradient"):
        rope_in_place(qkv.requires_grad_(), *others)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's numpy
def test_values_pass_through_bit_by_bit(device: torch.device) -> None:
    qkv, *others = make_rows([9], 3, 8, torch.float32, device)
    qkv[4, 2, 1] = float("inf")
    turned = rope(qkv, *others)
    assert torch.equal(turned[:, 2], qkv[:, 2])
    assert bool(turned[:, :2].isfinite().all())


def test_every_output_is_written(device: torch.device, poisoned: None) -> None:
    qkv, *others = make_rows(LAYOUTS["skewed"], 3, 24, torch.float32, device)
    leaf = qkv.clone().requires_grad_()
    out = rope(leaf, *others)
    out.sum().backward()
    assert bool(out.isfinite().all())
    assert leaf.grad is not None
    assert bool(leaf.grad.isfinite().all())


def test_scores_depend_on_the_distance_alone(device: torch.device) -> None:
    cos, sin = (table.to(device) for table in rope_tables(64, 16, 10_000.0))
    qkv = torch.randn(1, 3, 2, 16, device=device).expand(64, -1, -1, -1).contiguous()
    q, k, _ = rope(qkv, cos, sin, torch.arange(64, device=device)).unbind(1)
    scores = torch.einsum("ihd,jhd->hij", q.double(), k.double())
    for distance in (1, 17):
        diagonal = scores.diagonal(distance, 1, 2)
        assert torch.allclose(diagonal, diagonal[:, :1].expand_as(diagonal), atol=1e-4)


def test_non_contiguous_input_and_int32_positions(device: torch.device) -> None:
    qkv, cos, sin, position_ids = make_rows([6, 3], 4, 8, torch.float32, device)
    twice = qkv.repeat_interleave(2, dim=0)[::2]
    assert not twice.is_contiguous()
    expected = rope(qkv, cos, sin, position_ids)
    assert torch.equal(rope(twice, cos, sin, position_ids.int()), expected)
    grad = torch.randn_like(expected)
    leaf, apart = qkv.clone().requires_grad_(), grad.repeat_interleave(2, dim=0)[::2]
    assert not apart.is_contiguous()
    one, two = (
        torch.autograd.grad(rope(leaf, cos, sin, position_ids), leaf, given)[0]
        for given in (grad, apart)
    )
    assert torch.equal(one, two)
    with pytest.raises(ValueError, match="needs a contiguous qkv"):
        rope_in_place(twice, cos, sin, position_ids)


def test_wrong_input_is_refused(device: torch.device) -> None:
    qkv, cos, sin, position_ids = make_rows([4], 2, 8, torch.float32, device)
    with pytest.raises(TypeError, match=r"fp32, not torch\.float64"):
        rope(qkv.double(), cos, sin, position_ids)
    with pytest.raises(TypeError, match="tables must be fp32"):
        rope(qkv, cos.half(), sin, position_ids)
    with pytest.raises(ValueError, match=r"qkv must be \(T, 3, H, D\)"):
        rope(qkv[..., :7], cos, sin, position_ids)
    with pytest.raises(ValueError, match="tables must be"):
        rope(qkv[..., :6], cos, sin, position_ids)
    with pytest.raises(ValueError, match=r"position_ids must be \(4,\)"):
        rope(qkv, cos, sin, position_ids[:3])
    for function in (rope, rope_in_place):
        with pytest.raises(TypeError, match=r"position_ids must be int32 or int64, not torch\.f"):
            function(qkv, cos, sin, position_ids.float())


def test_registration(device: torch.device, opcheck: Callable[..., None]) -> None:
    qkv, *others = make_rows([6, 3], 2, 8, torch.float32, device)
    for leaf in (qkv, qkv.clone().requires_grad_()):
        for inverse in (False, True):
            opcheck(_rope, (leaf, *others, inverse))
    opcheck(_rope_in_place, (qkv, *others))


def test_a_compiler_is_given_a_copy_that_is_turned_where_it_lies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which it leaves out where it can (`tests/model/test_compile.py`); others get a new tensor."""
    turned: list[Tensor] = []
    monkeypatch.setattr(module, "_turn_in_place", lambda qkv, *_: turned.append(qkv))
    case = make_rows([6, 3], 2, 8, torch.float32, torch.device("cpu"))
    with FakeTensorMode() as mode:
        qkv, *others = (mode.from_tensor(tensor) for tensor in case)
        out = _rope._init_fn(qkv, *others, False)
    assert len(turned) == 1
    assert out is turned[0]
    assert out is not qkv
    monkeypatch.setattr(module, "wrap_triton", lambda _: MagicMock())
    _rope._init_fn(*case, False)
    assert len(turned) == 1


@pytest.mark.gpu
def test_one_graph_for_every_layout(compiles_twice: Callable[..., None]) -> None:
    def turned(qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
        cos, sin = (table.cuda() for table in tables)
        return rope(qkv, cos, sin, positions_from(cu_seqlens, qkv.shape[0]))

    tables = rope_tables(POSITIONS, 64, 10_000.0)
    cases = []
    for lengths in [[16] * n for n in range(1, 11)] + [[3] * n + [97] for n in range(10)]:
        qkv, *_ = make_rows(lengths, 2, 64, torch.bfloat16, torch.device("cuda"))
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).cuda()
        cases.append([qkv, cu_seqlens])
    compiles_twice(turned, cases)


@pytest.mark.parametrize("theta", [10_000.0, 160_000.0])
def test_tables_are_those_of_transformers(theta: float) -> None:
    config = TheirConfig(
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": theta}
            for kind in ("full_attention", "sliding_attention")
        }
    )
    theirs = ModernBertRotaryEmbedding(config)
    expected = theirs(torch.zeros(1), torch.arange(8192)[None], "full_attention")
    for table, their_table in zip(rope_tables(8192, 64, theta), expected, strict=True):
        assert table.dtype == torch.float32
        assert torch.equal(table, their_table[0, :, :32])


@pytest.mark.gpu
def test_offsets_beyond_31_bits() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    tokens, heads, head_dim = 2**31 // (3 * 12 * 64) + 1000, 12, 64
    cos, sin = (table.cuda() for table in rope_tables(1024, head_dim, 10_000.0))
    qkv = torch.zeros(tokens, 3, heads, head_dim, dtype=torch.bfloat16, device="cuda")
    qkv[-1000:] = torch.randn(1000, 3, heads, head_dim, device="cuda")
    position_ids = torch.arange(tokens, device="cuda") % 1024
    out = rope(qkv, cos, sin, position_ids)
    expected = rope_reference(qkv[-1000:], cos, sin, position_ids[-1000:])
    assert torch.allclose(out[-1000:].float(), expected.float(), rtol=2**-7, atol=1e-3)
    assert not bool(out[:-1000].any())
