"""Rotary and attention within a window: the kernels against fp64, on every shape of row."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import local_attention as module
from kernels import local_attention_tiles
from kernels.documents import document_bounds, document_bounds_reference, positions_from
from kernels.local_attention import (
    _local_attention,
    _local_attention_backward,
    local_attention,
    local_attention_reference,
    pipelined,
)
from kernels.local_attention_tiles import Tiles, Tuning
from kernels.rope import rope, rope_reference, rope_tables

# Lengths of documents, and tokens behind them.
LAYOUTS = {
    "even": ([6] * 4, 0),
    "skewed": ([40, *[3] * 4], 0),
    "code titles": ([4] * 7, 0),
    "empty documents": ([0, 5, 0, 0, 9, 0], 0),
    "length 1": ([1] * 7, 0),
    "one document": ([66], 0),
    "more tokens than documents": ([9, 7], 16),
    "no token": ([0], 0),
    "no document": ([0], 5),
}


@pytest.fixture(params=["walks", "tiles"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bf16 and heads of 64, both ways to compute them that this GPU has."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if request.param == "walks" and not pipelined(torch.bfloat16, 64, 64, torch.device("cuda")):
        pytest.skip("walks are for Hopper, with the triton that they were measured with")
    monkeypatch.setattr(module, "WALKS", request.param == "walks")


def make_case(
    layout: tuple[list[int], int],
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    positions: int = 128,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """qkv; tables and positions; cu_seqlens; the gradient of the result."""
    lengths, behind = layout
    tokens = sum(lengths) + behind
    generator = torch.Generator().manual_seed(1)
    qkv = 1.5 * torch.randn(tokens, 3, heads, head_dim, generator=generator)
    grad = torch.randn(tokens, heads, head_dim, generator=generator)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)
    cos, sin = (table.to(device) for table in rope_tables(positions, head_dim, 10_000.0))
    turn = [cos, sin, positions_from(cu_seqlens, tokens)]
    return qkv.to(device, dtype), turn, cu_seqlens, grad.to(device, dtype)


def run(
    qkv: Tensor, turn: list[Tensor], cu_seqlens: Tensor, grad: Tensor, window: int
) -> list[Tensor]:
    """The kernels' result and gradient."""
    leaf = qkv.clone().requires_grad_()
    out = local_attention(leaf, *turn, document_bounds(cu_seqlens, len(qkv)), window)
    return [out.detach(), *torch.autograd.grad(out, leaf, grad)]


def run_reference(
    qkv: Tensor, turn: list[Tensor], cu_seqlens: Tensor, grad: Tensor, window: int
) -> list[Tensor]:
    leaf = qkv.clone().requires_grad_()
    out = local_attention_reference(leaf, *turn, cu_seqlens, window)
    return [out.detach(), *torch.autograd.grad(out, leaf, grad.to(out.dtype))]


def gradient_by_formula(
    qkv: Tensor, turn: list[Tensor], cu_seqlens: Tensor, grad: Tensor, window: int
) -> Tensor:
    """The gradient as `kernels.local_attention` says, in plain PyTorch.

    Weights are made again from L, which is rounded, and g · o, with o rounded, is taken off g · v.
    PyTorch keeps the weights, and sums p g · v. So it errs less, and in other elements.
    """
    leaf = qkv.clone().requires_grad_()
    turned = rope_reference(leaf, *turn)
    q, k, v = turned.detach().unbind(1)
    first, end = document_bounds_reference(cu_seqlens, len(qkv))
    token = torch.arange(len(qkv), device=qkv.device)
    seen = (token >= first[:, None]) & (token < end[:, None])
    seen &= (token[:, None] - token).abs() <= window
    scale = qkv.shape[-1] ** -0.5
    scores = (torch.einsum("ihd,jhd->hij", q, k) * scale).masked_fill(~seen, -torch.inf)
    out = torch.einsum("hij,jhd->ihd", torch.where(seen, scores.softmax(-1), 0), v)
    p = torch.where(seen, (scores - scores.logsumexp(-1, keepdim=True)).exp(), 0)
    del scores
    delta = (grad * out).sum(-1)
    d = p * (torch.einsum("ihd,jhd->hij", grad, v) - delta.T[:, :, None])
    parts = [
        torch.einsum("hij,jhd->ihd", d, k) * scale,
        torch.einsum("hij,ihd->jhd", d, q) * scale,
        torch.einsum("hij,ihd->jhd", p, grad),
    ]
    return torch.autograd.grad(turned, leaf, torch.stack(parts, 1))[0]


def compare(what: str, case: tuple, window: int, assert_close: Callable[..., None]) -> list[Tensor]:
    ours, plain = run(*case, window), run_reference(*case, window)
    exact = run_reference(case[0].double(), *case[1:], window)
    # In half precision the rounding of weights, in both alike, hides how the two formulas differ.
    fp32 = case[0].dtype == torch.float32
    formula = gradient_by_formula(*case, window) if fp32 else plain[1]
    assert_close(f"local_attention {what} forward", ours[0], plain[0], exact[0])
    gradients = [ours[1], plain[1], exact[1], formula]
    compare_gradients(what, case, window, gradients, assert_close)
    return ours


def compare_gradients(
    what: str,
    case: tuple,
    window: int,
    gradients: list[Tensor],
    assert_close: Callable[..., None],
) -> None:
    """Ours, PyTorch's, the truth, and plain PyTorch's by the kernels' formula.

    A score's gradient is p (g · v − g · o), and 0 where a token sees itself alone. There PyTorch,
    which sums p g · v in the place of g · o, leaves 0 to the bit, and the kernels what fp32 leaves
    of numbers that cancel: 4 ulp of these are let pass, and ∂q and ∂k left out of the rest.
    """
    qkv, _, cu_seqlens, grad = case
    first, end = document_bounds_reference(cu_seqlens, len(qkv))
    alone = end - first == 1 if window else end > first
    eps = torch.finfo(torch.float32).eps
    q, k, v, g = (x[alone].double() for x in (*qkv.unbind(1), grad))
    cancelled = g.norm(dim=-1, keepdim=True) * v.norm(dim=-1, keepdim=True) * q.shape[-1] ** -0.5
    assert not bool(gradients[2][alone, :2].any())
    for left, other in zip(gradients[0][alone, :2].unbind(1), (k, q), strict=True):
        bound = 4 * eps * cancelled * other.norm(dim=-1, keepdim=True)
        assert bool((left.double().abs() <= bound).all()), f"{what}: {float(left.abs().max())}"
    gradients = [gradient.clone() for gradient in gradients]
    for gradient in gradients:
        gradient[alone, :2] = 0
    # Of few elements the largest error is chance: by one formula too, rounded elsewhere, it was up
    # to three times as large (40 seeds of LAYOUTS). So 2 ulp of the largest element may be left.
    terms = float(gradients[2].abs().max()) if len(qkv) else 0
    *gradients, formula = gradients
    assert_close(f"local_attention {what} gradient", *gradients, terms, formula)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_exact_as_pytorch(
    layout: str, dtype: torch.dtype, device: torch.device, assert_close: Callable[..., None]
) -> None:
    lengths, behind = LAYOUTS[layout]
    case = make_case(LAYOUTS[layout], 1, 16, dtype, device)
    for result in compare(layout, case, 9, assert_close):
        assert not bool(result[sum(lengths) : sum(lengths) + behind].any())


@pytest.mark.parametrize("layout", ["even", "skewed", "empty documents", "length 1"])
def test_fp32_gradients_too_large_by_two_millionths_would_be_seen(
    layout: str, device: torch.device, assert_close: Callable[..., None]
) -> None:
    case = make_case(LAYOUTS[layout], 1, 16, torch.float32, device)
    ours, plain = run(*case, 9)[1], run_reference(*case, 9)[1]
    exact = run_reference(case[0].double(), *case[1:], 9)[1]
    others = [plain, exact, gradient_by_formula(*case, 9)]
    compare_gradients("as it is", case, 9, [ours, *others], assert_close)
    with pytest.raises(AssertionError, match="too large gradient: off by"):
        compare_gradients("too large", case, 9, [ours * (1 + 2e-6), *others], assert_close)


@pytest.mark.parametrize(("heads", "head_dim", "window"), [(3, 6, 0), (4, 2, 1), (1, 80, 64)])
def test_any_even_width_any_heads_any_window(
    heads: int,
    head_dim: int,
    window: int,
    device: torch.device,
    assert_close: Callable[..., None],
) -> None:
    case = make_case(([50, 3], 0), heads, head_dim, torch.float16, device)
    compare(f"{heads}×{head_dim}, window {window}", case, window, assert_close)


def test_many_tiles(device: torch.device, assert_close: Callable[..., None]) -> None:
    """Tiles whose neighbours are whole, partial, and of another document."""
    case = make_case(([120, 9], 3), 1, 16, torch.float16, device, 256)
    compare("many tiles", case, 64, assert_close)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[1024, 300, 1], [16] * 1000, [5000, *[3] * 300]], ids=str)
@pytest.mark.parametrize(
    ("head_dim", "ways"),
    [(64, "walks"), (64, "tiles"), (128, "tiles"), (256, "tiles")],
    indirect=["ways"],
)
def test_gpu_at_real_sizes(
    lengths: list[int], head_dim: int, ways: None, assert_close: Callable[..., None]
) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        case = make_case((lengths, 77), 2, head_dim, dtype, torch.device("cuda"), 8192)
        compare(f"{len(lengths)} documents × {head_dim} {dtype}", case, 64, assert_close)


def test_how_it_is_cut_up_changes_little(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    assert_close: Callable[..., None],
) -> None:
    case = make_case(([60, 9], 0), 1, 8, torch.float16, device)
    tiles = Tiles(16, 32, 4, 2), Tiles(32, 64, 4, 1), Tiles(64, 16, 4, 1)
    monkeypatch.setattr(local_attention_tiles, "NARROW", Tuning(*tiles))
    compare("other tiles", case, 20, assert_close)


def test_every_output_is_written(device: torch.device, poisoned: None) -> None:
    case = make_case(([20, 7], 30), 1, 24, torch.float16, device)
    assert all(bool(value.isfinite().all()) for value in run(*case, 9))


def test_what_lies_behind_all_documents_is_never_read(device: torch.device) -> None:
    qkv, turn, cu_seqlens, grad = make_case(([20, 7], 9), 1, 16, torch.float16, device)
    expected = run(qkv, turn, cu_seqlens, grad, 9)
    qkv[27:], grad[27:] = float("nan"), float("inf")
    for one, two in zip(run(qkv, turn, cu_seqlens, grad, 9), expected, strict=True):
        assert torch.equal(one, two)


def test_what_is_no_number_is_not_hidden(device: torch.device) -> None:
    """The mask is a minimum, which must not take a bound for a score that is not a number."""
    qkv, turn, cu_seqlens, grad = make_case(([20, 7], 0), 1, 16, torch.float16, device)
    qkv[3, 0] = float("nan")
    out, _ = run(qkv, turn, cu_seqlens, grad, 9)
    assert bool(out[3].isnan().all())
    assert bool(out[4:].isfinite().all())
    qkv[3, 0], qkv[3, 1] = 0.0, float("nan")
    out, grad_qkv = run(qkv, turn, cu_seqlens, grad, 9)
    assert bool(out[:13].isnan().all())
    assert bool(grad_qkv[:13, 0].isnan().all())


def test_a_document_does_not_see_its_neighbours(device: torch.device) -> None:
    case = make_case(([9, 4, 9], 0), 1, 16, torch.float16, device)
    changed = case[0].clone()
    changed[9:13] += 1
    for one, two in zip(run(*case, 64), run(changed, *case[1:], 64), strict=True):
        assert torch.equal(one[:9], two[:9])
        assert torch.equal(one[13:], two[13:])
        assert not torch.equal(one[9:13], two[9:13])


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's numpy
@pytest.mark.parametrize("scores", ["nothing", "the most"])
def test_a_document_does_not_feel_its_neighbours_however_large(
    scores: str, device: torch.device
) -> None:
    """As long as all numbers are finite, here those that fp16 can hold when they have turned; and
    with queries along their keys, those whose scores, of 2^26.6, leave results finite."""
    qkv, turn, cu_seqlens, grad = make_case(([9, 4, 9], 0), 1, 16, torch.float16, device)
    before = run(qkv, turn, cu_seqlens, grad, 64)
    qkv[9:13], grad[9:13] = 4e4, -4e4
    if scores == "nothing":  # every pair of numbers that turns is 0 in a query or in a key
        qkv[9:13, 0, :, ::2], qkv[9:13, 1, :, 1::2] = 0, 0
    else:
        qkv[9:13, :2] = 5e3
    after = run(qkv, turn, cu_seqlens, grad, 64)
    assert bool(after[0].isfinite().all())
    for one, two in zip(before, after, strict=True):
        assert torch.equal(one[:9], two[:9])
        assert torch.equal(one[13:], two[13:])


@pytest.mark.filterwarnings("ignore:.*encountered")  # the interpreter's numpy
@pytest.mark.parametrize(
    ("part", "number"),
    [("query", "nan"), ("key", "nan"), ("value", "inf"), ("gradient", "inf")],
)
def test_what_is_not_finite_stays_near(
    part: str, number: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may get into other documents, for 0 · ∞ is no number, but no farther than is said."""
    tiles = Tiles(32, 32, 4, 1)
    monkeypatch.setattr(local_attention_tiles, "NARROW", Tuning(tiles, tiles, tiles))
    window, tokens = 9, 304
    place, reach = tokens // 2, tiles.block + tiles.step + window
    qkv, turn, cu_seqlens, grad = make_case(([8] * 38, 0), 1, 16, torch.float16, device)
    expected = run(qkv, turn, cu_seqlens, grad, window)
    if part == "gradient":
        grad[place] = float(number)
    else:
        qkv[place, ["query", "key", "value"].index(part)] = float(number)
    out, gradient = run(qkv, turn, cu_seqlens, grad, window)
    away = (torch.arange(tokens, device=device) - place).abs()
    for ours, before, most in ((out, expected[0], reach), (gradient, expected[1], 2 * reach)):
        assert 2 * most < tokens
        assert torch.equal(ours[away > most], before[away > most])
    assert not bool(gradient[place].isfinite().all())
    assert bool(out[place].isfinite().all()) == (part == "gradient")


def test_twice_the_same_bits(device: torch.device) -> None:
    case = make_case(([20, 3], 0), 1, 8, torch.float16, device)
    for one, two in zip(run(*case, 9), run(*case, 9), strict=True):
        assert torch.equal(one, two)


def test_non_contiguous_input_and_other_positions(device: torch.device) -> None:
    qkv, (cos, sin, positions), cu_seqlens, grad = make_case(
        ([6, 3], 0), 1, 8, torch.float32, device
    )
    expected = run(qkv, [cos, sin, positions], cu_seqlens, grad, 4)
    twice = qkv.repeat_interleave(2, dim=0)[::2]
    assert not twice.is_contiguous()
    bounds = document_bounds(cu_seqlens, 9)
    out = local_attention(twice, cos, sin, positions.long(), bounds, 4)
    assert torch.equal(out, expected[0])
    moved = local_attention(qkv, cos, sin, positions + 50, bounds, 4)
    assert torch.allclose(moved, expected[0], atol=1e-5)
    apart = grad.repeat_interleave(2, dim=0)[::2]
    assert not apart.is_contiguous()
    assert torch.equal(run(qkv, [cos, sin, positions], cu_seqlens, apart, 4)[1], expected[1])


def test_wrong_input_is_refused(device: torch.device) -> None:
    qkv, turn, cu_seqlens, _ = make_case(([4], 0), 2, 8, torch.float32, device)
    bounds = document_bounds(cu_seqlens, 4)
    with pytest.raises(TypeError, match=r"local_attention takes bf16, fp16 or fp32"):
        local_attention(qkv.double(), *turn, bounds, 4)
    with pytest.raises(ValueError, match=r"qkv must be \(T, 3, H, D\)"):
        local_attention(qkv[..., :7], *turn, bounds, 4)
    with pytest.raises(TypeError, match=r"position_ids must be int32 or int64, not torch\.f"):
        local_attention(qkv, *turn[:2], turn[2].float(), bounds, 4)
    with pytest.raises(ValueError, match=r"bounds must be \(2, 4\) int32"):
        local_attention(qkv, *turn, cu_seqlens, 4)
    with pytest.raises(ValueError, match="window must be between 0 and"):
        local_attention(qkv, *turn, bounds, -1)
    wide = torch.zeros(4, 3, 1, 258, device=device)
    tables = (table.to(device) for table in rope_tables(8, 258, 1e4))
    with pytest.raises(ValueError, match="heads up to 256"):
        local_attention(wide, *tables, turn[2], bounds, 4)


def test_registration(device: torch.device, opcheck: Callable[..., None]) -> None:
    qkv, turn, cu_seqlens, grad = make_case(([6, 3], 0), 1, 8, torch.float32, device)
    bounds = document_bounds(cu_seqlens, 9)
    turned = rope(qkv, *turn)
    opcheck(_local_attention, (turned, bounds, 4))
    out, logsumexp = _local_attention(turned, bounds, 4)
    opcheck(_local_attention_backward, (grad, turned, *turn, bounds, out, logsumexp, 4))


@pytest.mark.gpu
def test_one_graph_for_every_layout(ways: None, compiles_twice: Callable[..., None]) -> None:
    cos, sin = (table.cuda() for table in rope_tables(128, 64, 10_000.0))

    def layer(qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
        tokens = qkv.shape[0]
        positions = positions_from(cu_seqlens, tokens)
        return local_attention(qkv, cos, sin, positions, document_bounds(cu_seqlens, tokens), 64)

    cases = []
    for lengths in [[16] * n for n in range(1, 11)] + [[3] * n + [97] for n in range(10)]:
        qkv, _, cu_seqlens, _ = make_case((lengths, 0), 2, 64, torch.bfloat16, torch.device("cuda"))
        cases.append([qkv, cu_seqlens])
    compiles_twice(layer, cases)


@pytest.mark.gpu
def test_offsets_beyond_31_bits(ways: None) -> None:
    tokens, end = 2**31 // (3 * 12 * 64) + 1000, 1000
    cos, sin = (table.cuda() for table in rope_tables(1024, 64, 10_000.0))
    qkv = torch.zeros(tokens, 3, 12, 64, dtype=torch.bfloat16, device="cuda")
    qkv[-end:] = torch.randn(end, 3, 12, 64, device="cuda")
    grad = torch.zeros(tokens, 12, 64, dtype=torch.bfloat16, device="cuda")
    grad[-end:] = torch.randn(end, 12, 64, device="cuda")
    results = []
    for values, slope in ((qkv, grad), (qkv[-end:], grad[-end:])):
        count = len(values)
        cu_seqlens = torch.tensor([*range(0, count - end, 1000), count - end, count]).int().cuda()
        turn = [cos, sin, positions_from(cu_seqlens, count)]
        results.append([value[-end:] for value in run(values, turn, cu_seqlens, slope, 64)])
    for one, two in zip(*results, strict=True):
        # Tiles begin at other tokens, so that sums are taken in another order.
        assert (one.float() - two.float()).norm() < 0.01 * two.float().norm()


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu(ways: None) -> None:
    case = make_case(LAYOUTS["skewed"], 2, 64, torch.bfloat16, torch.device("cuda"))
    run(*case, 9)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(*case, 9)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("first", [0, 40, 49, 70])
def test_of_the_last_rows_alone_it_is_the_same_and_others_are_not_written(
    first: int, device: torch.device
) -> None:
    """From where a document begins, whichever tile that cuts; turned by nothing."""
    qkv, turn, cu_seqlens, grad = make_case(([40, 9, 21], 6), 2, 16, torch.float32, device)
    bounds = document_bounds(cu_seqlens, len(qkv))
    turned = rope(qkv, *turn).requires_grad_()
    still = (torch.ones_like(turn[0][:1]), torch.zeros_like(turn[1][:1]), 0 * turn[2])
    whole = local_attention(turned, *still, bounds, 12)
    (by_turned,) = torch.autograd.grad(whole, turned, grad)
    out, grad_turned = torch.full_like(whole, 7.0), torch.full_like(turned, 7.0)
    logsumexp = torch.empty(2, len(qkv) - first, device=device)
    rows, ends = turned.detach()[first:], bounds[:, first:] - first
    local_attention_tiles.forward(rows, ends, out[first:], logsumexp, 12)
    others = (*still[:2], still[2][first:], ends, out[first:], logsumexp, grad_turned[first:])
    local_attention_tiles.backward(grad[first:], rows, *others, 12)
    for ours, theirs in ((out, whole.detach()), (grad_turned, by_turned)):
        assert bool((ours[:first] == 7.0).all())
        torch.testing.assert_close(ours[first:], theirs[first:], rtol=1e-5, atol=1e-6)
