"""Local attention for Hopper: its walks, on emulated Gluon, against plain PyTorch in fp32.

Results, gradients and everything that runs by itself on a GPU; its types, and what a compiler makes
of it, are left to tests/kernels/test_compile_for_gpu.py and the tests on a GPU.
"""

import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kernels import local_attention
from kernels.documents import document_bounds_reference
from kernels.local_attention import local_attention_reference
from kernels.rope import rope_reference, rope_tables

sys.path.insert(0, str(Path(__file__).parent))
import gluon_emulator
from gluon_emulator import Hazard

FILE = Path(local_attention.__file__).with_name("local_attention_hopper.py")
SOURCE = FILE.read_text()
LOG2_E = local_attention._LOG2_E


@cache
def emulated() -> ModuleType:
    return gluon_emulator.load(FILE)


def make_case(lengths: list[int], behind: int, heads: int = 2) -> tuple[Tensor, ...]:
    """qkv, the gradient of the result, tables and positions, and cu_seqlens."""
    generator = torch.Generator().manual_seed(1)
    tokens = sum(lengths) + behind
    qkv = 1.5 * torch.randn(tokens, 3, heads, 64, generator=generator)
    grad = torch.randn(tokens, heads, 64, generator=generator)
    positions = torch.cat([torch.arange(n) for n in [*lengths, behind]])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return qkv, grad, *rope_tables(512, 64, 10_000.0), positions, cu_seqlens


def run(
    walks: ModuleType, case: tuple[Tensor, ...], span: int, window: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """Result, log2 of sums and gradient, by programs of `span` blocks; outputs are NaN before."""
    qkv, grad, *turn, cu_seqlens = case
    tokens, _, heads, _ = qkv.shape
    bounds = document_bounds_reference(cu_seqlens, tokens)
    turned = rope_reference(qkv, *turn)
    out, grad_qkv = (torch.full_like(value, float("nan")) for value in (grad, qkv))
    logsumexp = torch.full((heads, tokens), float("nan"))
    walks.multiprocessors = lambda device: 132
    walks.stretch = lambda tokens, heads, programs: span
    walks.forward(turned, bounds, out, logsumexp, window, LOG2_E / 8)
    saved = (turned, *turn, bounds, out, logsumexp)
    walks.backward(grad, *saved, grad_qkv, window, 1 / 8, LOG2_E / 8)
    return out, logsumexp, grad_qkv


def assert_as_reference(case: tuple[Tensor, ...], span: int, window: int = 64) -> None:
    qkv, grad, *turn, cu_seqlens = case
    leaf = qkv.clone().requires_grad_()
    expected = local_attention_reference(leaf, *turn, cu_seqlens, window)
    (gradient,) = torch.autograd.grad(expected, leaf, grad)
    out, logsumexp, grad_qkv = run(emulated(), case, span, window)
    assert bool(logsumexp.isfinite().all())
    torch.testing.assert_close(out, expected.detach(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(grad_qkv, gradient, rtol=1e-5, atol=5e-5)
    end = int(cu_seqlens[-1])
    assert not bool(out[end:].any())
    assert not bool(grad_qkv[end:].any())


@pytest.mark.parametrize(
    ("lengths", "behind", "span"),
    [
        ([0, 1, 16, 200, 64, 0, 5, 130], 13, 3),
        ([0, 1, 16, 200, 64, 0, 5, 130], 150, 1),
        ([200], 0, 2),
        ([1] * 20 + [16] * 10, 0, 1),
        ([130, 128, 130, 3], 7, 16),
        ([3], 0, 4),
        ([128], 64, 1),
        ([64, 64, 128], 0, 2),
        ([0], 70, 1),
        ([1], 0, 1),
    ],
    ids=str,
)
def test_as_plain_pytorch(lengths: list[int], behind: int, span: int) -> None:
    assert_as_reference(make_case(lengths, behind), span)


@pytest.mark.parametrize("window", [0, 1, 17])
def test_other_windows(window: int) -> None:
    assert_as_reference(make_case([130, 16], 3, 1), 2, window)


def test_the_stretch_changes_no_bit() -> None:
    case = make_case([300, 16, 120, 3], 5, 1)
    first, *others = (run(emulated(), case, span) for span in (1, 2, 3, 7))
    for other in others:
        assert all(map(torch.equal, first, other))


def test_what_lies_behind_all_documents_is_never_read() -> None:
    case = make_case([70, 30], 200, 1)
    expected = run(emulated(), case, 2)
    case[0][100:], case[1][100:] = float("nan"), float("inf")
    assert all(map(torch.equal, run(emulated(), case, 2), expected))


@pytest.mark.parametrize("part", ["query", "key", "value", "gradient"])
def test_what_is_not_finite_stays_near(part: str) -> None:
    """Up to 127 tokens away, and twice as far in gradients."""
    case = make_case([16] * 40, 40, 1)
    tokens, place = len(case[0]), 340
    before = run(emulated(), case, 4)
    if part == "gradient":
        case[1][place] = float("inf")
    else:
        case[0][place, ["query", "key", "value"].index(part)] = float("nan")
    after = run(emulated(), case, 4)
    away = (torch.arange(tokens) - place).abs()
    assert torch.equal(after[0][away > 127], before[0][away > 127])
    assert torch.equal(after[2][away > 254], before[2][away > 254])
    assert bool(after[0][place].isfinite().all()) == (part == "gradient")
    assert not bool(after[2][place].isfinite().all())


def test_no_neighbour_is_felt_however_large() -> None:
    case = make_case([90, 40, 90], 0, 1)
    before = run(emulated(), case, 2)
    case[0][90:130], case[1][90:130] = 4e4, -4e4
    out, _, gradient = run(emulated(), case, 2)
    for one, two in ((out, before[0]), (gradient, before[2])):
        assert torch.equal(one[:90], two[:90])
        assert torch.equal(one[130:], two[130:])


def fallible() -> list[tuple[str, int, str]]:
    """Every wait, fence and barrier of the kernels: its line, and what stands there without it."""
    lines = SOURCE.splitlines()
    found = []
    for at, line in enumerate(lines):
        if re.match(r"\s+(_barrier\(\)|hopper\.fence|async_copy\.(wait|commit)_group)", line):
            found.append((line, at, re.sub(r"\S.*", "pass", line)))
        elif "warpgroup_mma_wait(" in line:
            follows = lines[at + 1] if line.endswith("(") else ""
            wait = re.compile(r"(?<=\()\d(?=, \[)|(?<=    )\d(?=, \[)")
            if follows:
                found.append((line, at + 1, wait.sub("5", follows)))
            else:
                found.append((line, at, wait.sub("5", line)))
    return found


@pytest.mark.parametrize(("at", "instead"), [found[1:] for found in fallible()])
def test_nothing_that_waits_is_there_for_nothing(at: int, instead: str) -> None:
    """Without it the emulator finds a hazard: it can tell, and so what is left is enough."""
    lines = SOURCE.splitlines()
    assert lines[at] != instead
    lines[at] = instead
    walks = gluon_emulator.load(FILE, lambda _: "\n".join(lines))
    case = make_case([250], 0, 1)
    with pytest.raises(Hazard):
        run(walks, case, 4)
