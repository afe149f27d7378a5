"""Local attention for Hopper: its walks on emulated Gluon, and on a GPU beside the tiles.

The emulator shows what is computed, and that nothing is read before it is there. What a compiler
makes of it is for tests/kernels/test_compile_for_gpu.py, and roundings are for a GPU, where
tests/kernels/test_local_attention.py holds walks and tiles to the same bounds.
"""

import re
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
from torch import Tensor

from kernels import local_attention
from kernels.benchmark_layouts import layouts
from kernels.documents import document_bounds, document_bounds_reference
from kernels.local_attention import WALKING_TRITONS, local_attention_reference, pipelined
from kernels.rope import rope, rope_reference, rope_tables

sys.path.insert(0, str(Path(__file__).parent))
import gluon_emulator
from gluon_emulator import Hazard

FILE = Path(local_attention.__file__).with_name("local_attention_hopper.py")
SOURCE = FILE.read_text()


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
    walks.forward(turned, bounds, out, logsumexp, window)
    saved = (turned, *turn, bounds, out, logsumexp)
    walks.backward(grad, *saved, grad_qkv, window)
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


@pytest.mark.parametrize(
    ("tokens", "heads", "programs", "blocks"),
    [
        (65_536, 12, 2 * 132, 47),
        (65_536, 12, 3 * 132, 32),
        (65_536, 16, 2 * 132, 64),  # 63 would make 17 × 16 programs, eight too many
        (1024, 12, 2 * 132, 1),
        (1, 12, 2 * 132, 1),
        (65_536, 300, 2 * 132, 1024),
    ],
)
def test_stretches_are_as_short_as_one_wave_allows(
    tokens: int, heads: int, programs: int, blocks: int
) -> None:
    stretch = gluon_emulator.load(FILE).stretch
    assert stretch(tokens, heads, programs) == blocks
    for tokens in (1, 64, 65, 5000, 65_536, 131_072):
        for heads in (1, 12, 16):
            span = stretch(tokens, heads, programs)
            assert heads * -(-tokens // (64 * span)) <= programs


@pytest.mark.parametrize(
    ("change", "walks"),
    [
        ({}, True),
        ({"window": 0}, True),
        ({"triton": "3.6.0+git1234"}, True),
        ({"dtype": torch.float16}, False),
        ({"dtype": torch.float32}, False),
        ({"head_dim": 128}, False),
        ({"window": 65}, False),
        ({"device": "cpu"}, False),
        ({"capability": (8, 0)}, False),
        ({"capability": (10, 0)}, False),
        ({"triton": "3.7.1"}, True),
        ({"triton": "3.8.0"}, False),
        ({"triton": "3.60.0"}, False),
        ({"hip": "7.0"}, False),
        ({"walks": False}, False),
    ],
    ids=str,
)
def test_where_walks_are_taken(
    change: dict[str, object], walks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = {
        "dtype": torch.bfloat16,
        "head_dim": 64,
        "window": 64,
        "device": "cuda",
        "capability": (9, 0),
        "triton": "3.6.0",
        "hip": None,
        "walks": True,
    }
    case = usual | change
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: case["capability"])
    monkeypatch.setattr(triton, "__version__", case["triton"])
    monkeypatch.setattr(torch.version, "hip", case["hip"])
    monkeypatch.setattr(local_attention, "WALKS", case["walks"])
    device = torch.device(case["device"])
    assert pipelined(case["dtype"], case["head_dim"], case["window"], device) == walks


@pytest.fixture
def hopper() -> torch.device:
    """A GPU that walks are for; asked of torch and triton, not of `pipelined`."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    major_minor = ".".join(triton.__version__.split(".")[:2])
    if torch.cuda.get_device_capability()[0] != 9 or major_minor not in WALKING_TRITONS:
        pytest.skip(f"needs Hopper and triton {' or '.join(WALKING_TRITONS)}")
    return torch.device("cuda")


def on(
    device: torch.device, case: tuple[Tensor, ...], window: int = 64
) -> tuple[list[Tensor], list[Tensor]]:
    """Result, sums and gradient in bf16; and what the backward was given but for the window."""
    qkv, grad, *turn, cu_seqlens = (value.to(device) for value in case)
    bounds = document_bounds(cu_seqlens, len(qkv))
    turned = rope(qkv.bfloat16(), *turn)
    out, logsumexp = local_attention._local_attention(turned, bounds, window)
    given = [grad.bfloat16(), turned, *turn, bounds, out, logsumexp]
    return [out, logsumexp, local_attention._local_attention_backward(*given, window)], given


def noted(taken: list[str], name: str, launch: Callable[..., None], *args: object) -> None:
    taken.append(name)
    launch(*args)


@pytest.mark.gpu
def test_gpu_takes_the_walks(hopper: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import local_attention_hopper

    taken = []
    for name in ("forward", "backward"):
        launch = getattr(local_attention_hopper, name)
        monkeypatch.setattr(local_attention_hopper, name, partial(noted, taken, name, launch))
    on(hopper, make_case([100], 0))
    assert taken == ["forward", "backward"]
    on(hopper, make_case([100], 0), 127)
    monkeypatch.setattr(local_attention, "WALKS", False)
    on(hopper, make_case([100], 0))
    assert taken == ["forward", "backward"]


@pytest.mark.gpu
@pytest.mark.parametrize("window", [64, 17, 0])
@pytest.mark.parametrize(
    ("lengths", "behind"),
    [([0, 1, 16, 300, 64, 0, 5, 500, 200, 128, *[3] * 40, 1], 77), ([1], 0), ([0], 70), ([128], 0)],
    ids=str,
)
def test_gpu_walks_agree_with_tiles(
    lengths: list[int],
    behind: int,
    window: int,
    hopper: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And give the same bits twice, and zeros behind the documents, where they read nothing."""
    case = make_case(lengths, behind, 12)
    walks, given = on(hopper, case, window)
    again, _ = on(hopper, case, window)
    assert all(map(torch.equal, walks, again))
    monkeypatch.setattr(local_attention, "WALKS", False)
    tiles, _ = on(hopper, case, window)
    gradient = local_attention._local_attention_backward(*given, window)
    live = sum(lengths)
    sums = [value[1][:, :live] for value in (walks, tiles)]
    for ours, theirs in ((walks[0], tiles[0]), sums, (walks[2], gradient)):
        difference = (ours.float() - theirs.float()).norm()
        assert difference <= 4e-3 * theirs.float().norm()
    monkeypatch.setattr(local_attention, "WALKS", True)
    assert not bool(walks[0][live:].any())
    assert not bool(walks[2][live:].any())
    case[0][live:], case[1][live:] = float("nan"), float("inf")
    assert all(map(torch.equal, walks, on(hopper, case, window)[0]))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["full1024", "skewed", "abstracts"])
def test_gpu_walks_of_other_stretches_give_the_same_bits(
    layout: str, hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernels import local_attention_hopper

    lengths = layouts(65_536)[layout]
    case = list(make_case(lengths, 65_536 - sum(lengths), 12))
    case[2:4] = rope_tables(8192, 64, 10_000.0)
    case[4] = case[4] % 8192  # tokens behind all documents may be more
    first, _ = on(hopper, case)
    for multiprocessors in (132, 78, 5):
        monkeypatch.setattr(
            local_attention_hopper, "multiprocessors", lambda _, count=multiprocessors: count
        )
        assert all(map(torch.equal, first, on(hopper, case)[0]))
