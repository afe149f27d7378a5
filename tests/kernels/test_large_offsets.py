"""Operations on tensors of more than 2³¹ elements, where an offset of 32 bits would wrap around.

Beside those in the tests of single operations. Each takes what it needs and no more: inputs that
may be one tensor are one.
"""

import pytest
import torch
from torch import Tensor

from kernels.documents import clear_behind_documents, document_bounds
from kernels.layer_norm import _layer_norm_backward, add_layer_norm
from kernels.linear_cross_entropy import IGNORED, linear_cross_entropy_each
from kernels.rope import _rope, rope_in_place, rope_reference, rope_tables

HEADS, HEAD_DIM, END = 12, 64, 1000
TOKENS = 2**31 // (3 * HEADS * HEAD_DIM) + END

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def turning() -> list[Tensor]:
    """Tables, and positions that are different at the end."""
    tables = [table.cuda() for table in rope_tables(1024, HEAD_DIM, 10_000.0)]
    return [*tables, torch.arange(TOKENS, device="cuda") % 1024]


def test_rope_backward() -> None:
    """8 GiB: what a gradient is given to, to be turned back."""
    cos, sin, places = turning()
    grad = torch.zeros(TOKENS, 3, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    grad[-END:] = torch.randn(END, 3, HEADS, HEAD_DIM, device="cuda")
    out = _rope(grad, cos, sin, places, True)
    assert out.numel() > 2**31
    expected = rope_reference(grad[-END:], cos, -sin, places[-END:])
    assert torch.allclose(out[-END:].float(), expected.float(), rtol=2**-7, atol=1e-3)
    assert not bool(out[:-END].any())


def test_rope_in_place() -> None:
    """4 GiB."""
    cos, sin, places = turning()
    qkv = torch.zeros(TOKENS, 3, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    qkv[-END:] = torch.randn(END, 3, HEADS, HEAD_DIM, device="cuda")
    expected = rope_reference(qkv[-END:].clone(), cos, sin, places[-END:])
    assert qkv.numel() > 2**31
    rope_in_place(qkv, cos, sin, places)
    assert torch.allclose(qkv[-END:].float(), expected.float(), rtol=2**-7, atol=1e-3)
    assert not bool(qkv[:-END].any())


def test_add_layer_norm() -> None:
    """12 GiB, the least for three tensors of 2³¹ numbers: x is its own residual."""
    rows = 2**31 // 1024 + 100
    x = torch.zeros(rows, 1024, dtype=torch.bfloat16, device="cuda")
    x[-100:] = torch.randn(100, 1024, device="cuda")
    weight = torch.ones(1024, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        found = add_layer_norm(x, x, weight, 1e-5)
        expected = add_layer_norm(x[-100:], x[-100:], weight, 1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.numel() > 2**31
        assert torch.equal(ours[-100:], theirs)
        assert not bool(ours[:-100].any())


def test_add_layer_norm_backward() -> None:
    """8 GiB: the normed rows are both of their gradients too."""
    rows = 2**31 // 1024 + 100
    normed = torch.zeros(rows, 1024, dtype=torch.bfloat16, device="cuda")
    normed[-100:] = torch.randn(100, 1024, device="cuda")
    weight = torch.ones(1024, dtype=torch.bfloat16, device="cuda")
    rstd = torch.ones(rows, device="cuda")
    grad_x, _ = _layer_norm_backward(normed, weight, rstd, normed, normed)
    end = normed[-100:]
    expected, _ = _layer_norm_backward(end, weight, rstd[-100:], end, end)
    assert grad_x.numel() > 2**31
    assert bool(expected.any())
    assert torch.equal(grad_x[-100:], expected)
    assert not bool(grad_x[:-100].any())


def test_linear_cross_entropy() -> None:
    """16 GiB: rows of 2³¹ numbers, their gradients in fp32, and these rounded."""
    rows, width, vocabulary = 2**31 // 768 + 100, 768, 64
    hidden = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    hidden[-100:] = torch.randn(100, width, device="cuda")
    weight = torch.randn(vocabulary, width, device="cuda").bfloat16() / 16
    bias = torch.randn(vocabulary, device="cuda").bfloat16()
    weight.requires_grad_()
    bias.requires_grad_()
    labels = torch.full((rows,), IGNORED, device="cuda")
    labels[-100:] = torch.randint(vocabulary, (100,), device="cuda")

    def run(last: int) -> list[Tensor]:
        rows = hidden[-last:].detach().requires_grad_()
        loss, each = linear_cross_entropy_each(rows, weight, bias, labels[-last:])
        return [loss, each, *torch.autograd.grad(loss, (rows, weight, bias))]

    loss, each, grad_hidden, *others = run(rows)
    assert grad_hidden.numel() > 2**31
    # Another number of rows may be another kernel of the library's, which sums in another order.
    found = [loss, each[:, -100:], grad_hidden[-100:], *others]
    for ours, theirs in zip(found, run(100), strict=True):
        most = theirs.abs().max().item()
        assert torch.allclose(ours.float(), theirs.float(), rtol=2**-6, atol=2**-6 * most)
    assert not bool(each[:, :-100].any())
    assert not bool(grad_hidden[:-100].any())


def test_document_bounds() -> None:
    """8 GiB: the second row begins at 2³⁰, and ends behind 2³¹."""
    tokens = 2**30 + 300
    ends = [0, 5, 2**30 + 100, 2**30 + 100, 2**30 + 290]
    found = document_bounds(torch.tensor(ends, dtype=torch.int32, device="cuda"), tokens)
    assert found.numel() > 2**31
    pieces = [(0, 5, 0, 5), (5, ends[2], 5, ends[2]), (ends[2], ends[4], ends[2], ends[4])]
    pieces.append((ends[4], tokens, ends[4], ends[4]))  # behind all documents
    for start, stop, first, end in pieces:
        for row, value in zip(found[:, start:stop], (first, end), strict=True):
            assert row.amin().item() == row.amax().item() == value


@pytest.mark.parametrize("behind", [3, 2_000_000])
def test_clear_behind_documents(behind: int) -> None:
    """2 GiB; what is cleared begins behind 2³¹, or before it."""
    count, width = 2**31 // 1024 + 100, 1024
    rows = torch.ones(count, width, dtype=torch.int8, device="cuda")
    ends = torch.tensor([0, 7, count - behind], dtype=torch.int32, device="cuda")
    clear_behind_documents(rows, ends)
    assert rows[: count - behind].amin().item() == 1
    assert not bool(rows[count - behind :].any())
