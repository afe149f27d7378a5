"""The gradient of an embedding: the kernels against fp64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import embedding as module
from kernels.embedding import _embedding, _embedding_backward, embedding, embedding_reference

# Tokens, rows and width: no multiple of a block, one token, blocks that are full, more columns than
# a program has, more rows than tokens, none.
SHAPES = [(150, 50, 24), (1, 7, 5), (64, 9, 16), (133, 5, 300), (40, 90, 768), (0, 6, 8)]
PADDING = 3
DISTRIBUTIONS = {
    "uniform": lambda share: share,
    "skewed": lambda share: share**6,
    "one token": lambda share: torch.ones_like(share),
    "mostly padding": lambda share: torch.where(share < 0.9, 0.6, share),
}


def make_case(
    distribution: str, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """ids, weight and the gradient of the result."""
    tokens, rows, width = shape
    generator = torch.Generator().manual_seed(tokens + width)
    share = DISTRIBUTIONS[distribution](torch.rand(tokens, generator=generator))
    ids = (share * rows).long().clamp(max=rows - 1)
    if distribution == "mostly padding":
        ids[share == 0.6] = PADDING
    weight = torch.randn(rows, width, generator=generator)
    grad = torch.randn(tokens, width, generator=generator)
    return [ids.to(device), weight.to(device, dtype), grad.to(device, dtype)]


def run(
    function: Callable[..., Tensor],
    values: list[Tensor],
    wide: bool = False,
    padding: int | None = PADDING,
) -> list[Tensor]:
    """The result and the gradient of the weight."""
    ids, *floating = values
    weight, grad = (value.double() if wide else value for value in floating)
    weight = weight.clone().requires_grad_()
    out = function(ids, weight, padding)
    return [out, *torch.autograd.grad(out, weight, grad)]


def check(
    what: str,
    values: list[Tensor],
    assert_close: Callable[..., None],
    padding: int | None = PADDING,
    terms: float = 0,
) -> None:
    ours, plain, exact = (
        run(function, values, wide, padding)
        for function, wide in (
            (embedding, False),
            (embedding_reference, False),
            (embedding_reference, True),
        )
    )
    assert torch.equal(ours[0], plain[0])
    assert_close(what, ours[1], plain[1], exact[1], terms)
    # A sum of nothing is a zero, not a small number.
    assert torch.equal(ours[1][exact[1] == 0], plain[1].new_zeros(int((exact[1] == 0).sum())))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_is_as_exact_as_pytorch(
    distribution: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    assert_close: Callable[..., None],
) -> None:
    values = make_case(distribution, shape, dtype, device)
    check(f"embedding {shape} {distribution}", values, assert_close)


def test_without_a_padding_row(device: torch.device, assert_close: Callable[..., None]) -> None:
    values = make_case("mostly padding", (150, 50, 24), torch.float32, device)
    assert bool(run(embedding, values, padding=None)[1][PADDING].any())
    check("no padding row", values, assert_close, padding=None)


@pytest.mark.parametrize("sixteenths", [17, 32, 33, 90])
def test_runs_that_end_where_blocks_do(
    sixteenths: int,
    device: torch.device,
    assert_close: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One run or two that begin and end near borders; the longest has more pieces than are added
    up at once."""
    monkeypatch.setattr(module, "_PIECES", 2)
    places = module._PLACES if device.type == "cuda" else module._PLACES_INTERPRETED
    tokens = sixteenths * places // 16
    for border in {0, 1, places - 1, places, places + 1, tokens - places, tokens - 1}:
        ids = (torch.arange(tokens, device=device) >= border).long() + 1
        grad = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(tokens)).to(device)
        values = [ids, torch.ones(4, 8, device=device), grad]
        # One after another, n numbers leave √n times what the largest sum on the way is rounded by,
        # half an ulp at most; PyTorch adds up a few at a time.
        left = float(grad.cumsum(0).abs().max()) * tokens**0.5 / 4
        check(f"{tokens} from {border}", values, assert_close, terms=left)


@pytest.mark.parametrize("rows", [2**16, 2**16 + 1])
def test_ids_of_more_than_15_bits(
    rows: int,
    device: torch.device,
    assert_close: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many as 16 bits can number, and one more."""
    if device.type == "cpu":
        monkeypatch.setattr(module, "_ROWS", 2**14)
    edges = [0, 1, 2**15 - 1, 2**15, 2**15 + 1, 2**16 - 2, 2**16 - 1, rows - 1]
    ids = torch.tensor(edges, device=device).repeat(5)
    draw = torch.Generator().manual_seed(0)
    grad = torch.randn(len(ids), 4, generator=draw).to(device)
    for padding in (0, 2**15, rows - 1, None):
        values = [ids, torch.ones(rows, 4, device=device), grad]
        check(f"{rows} rows, {padding}", values, assert_close, padding)


def test_gradients_of_padding_are_not_read(device: torch.device) -> None:
    values = make_case("mostly padding", (150, 50, 24), torch.float32, device)
    _, expected = run(embedding, values)
    values[2][values[0] == PADDING] = float("nan")
    _, gradient = run(embedding, values)
    assert torch.equal(gradient, expected)
    assert not bool(gradient[PADDING].any())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.usefixtures("poisoned")
def test_every_row_is_written(distribution: str, device: torch.device) -> None:
    values = make_case(distribution, (133, 50, 40), torch.float32, device)
    for value in run(embedding, values):
        assert bool(value.isfinite().all())


def test_leading_dimensions_and_other_ids(device: torch.device) -> None:
    ids, weight, grad = make_case("skewed", (40, 50, 24), torch.float32, device)
    out, expected = run(embedding, [ids, weight, grad])
    folded, gradient = run(embedding, [ids.int().view(5, 8), weight, grad.view(5, 8, 24)])
    assert folded.shape == (5, 8, 24)
    assert torch.equal(folded.flatten(0, 1), out)
    assert torch.equal(gradient, expected)
    # Every gradient the same row, as of a sum, in memory of one.
    spread = grad[:1].expand(40, 24)
    alike = [run(embedding, [ids, weight, value])[1] for value in (spread, spread.clone())]
    assert torch.equal(*alike)


def test_twice_the_same_bits(device: torch.device) -> None:
    values = make_case("skewed", (150, 50, 24), torch.float32, device)
    for one, two in zip(run(embedding, values), run(embedding, values), strict=True):
        assert torch.equal(one, two)


def test_what_is_kept_for_the_backward_are_the_ids(device: torch.device) -> None:
    """Not the weight, which may be gone by then."""
    ids, weight, _ = make_case("skewed", (40, 50, 24), torch.float32, device)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        embedding(ids, weight.requires_grad_(), PADDING)
    assert [tensor.data_ptr() for tensor in kept] == [ids.data_ptr()]


def test_wrong_input_is_refused(device: torch.device) -> None:
    ids, weight, _ = make_case("skewed", (40, 50, 24), torch.float32, device)
    with pytest.raises(TypeError, match=r"a weight in .* not torch\.float64"):
        embedding(ids, weight.double())
    with pytest.raises(TypeError, match=r"ids in .* not torch\.int16"):
        embedding(ids.short(), weight)
    with pytest.raises(ValueError, match=r"not \(50,\)"):
        embedding(ids, weight[:, 0])
    with pytest.raises(ValueError, match=r"D at least 1, not \(50, 0\)"):
        embedding(ids, weight[:, :0])
    for padding in (-1, 50):
        with pytest.raises(ValueError, match=f"the padding row {padding} is none of 50 rows"):
            embedding(ids, weight, padding)


def test_registration(device: torch.device, opcheck: Callable[..., None]) -> None:
    ids, weight, grad = make_case("skewed", (40, 50, 24), torch.float32, device)
    for padding in (PADDING, None):
        opcheck(_embedding, (ids, weight, padding))
        opcheck(_embedding, (ids.view(5, 8), weight.clone().requires_grad_(), padding))
        opcheck(_embedding_backward, (grad, ids, 50, padding))


@pytest.mark.gpu
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_gpu_base_sizes(distribution: str, assert_close: Callable[..., None]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    values = make_case(distribution, (65_536, 50_368, 768), torch.bfloat16, torch.device("cuda"))
    check(f"base {distribution}", values, assert_close)


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    values = make_case("skewed", (3000, 500, 96), torch.bfloat16, torch.device("cuda"))
    expected = run(embedding, values)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run(embedding, values)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found[1], expected[1])


@pytest.mark.gpu
def test_one_graph_for_every_number_of_tokens(compiles_twice: Callable[..., None]) -> None:
    tokens = [700, 300, 640, 257, 1290, 1000, 310, 512, 770, 771, *range(303, 1200, 90)]
    device = torch.device("cuda")
    cases = [make_case("skewed", (n, 500, 96), torch.bfloat16, device)[:2] for n in tokens]
    compiles_twice(lambda ids, weight: embedding(ids, weight, PADDING), cases)


@pytest.mark.gpu
def test_offsets_beyond_31_bits() -> None:
    """8 GiB: gradients of more than 2³¹ numbers, and as many rows; one run of all but the ends."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    count, width = 2**31 // 1024 + 100, 1024
    grad = torch.zeros(count, width, dtype=torch.bfloat16, device="cuda")
    grad[:50] = torch.randn(50, width, device="cuda")
    grad[-50:] = torch.randn(50, width, device="cuda")
    ids = torch.full((count,), 5, device="cuda")
    ids[:50] = torch.arange(count - 50, count, device="cuda")
    found = _embedding_backward(grad, ids, count, None)
    assert found.numel() > 2**31
    assert torch.equal(found[-50:], grad[:50])
    expected = grad[-50:].double().sum(0)
    assert torch.allclose(found[5].double(), expected, rtol=2**-7, atol=1e-3)
    found[5] = 0
    assert not bool(found[:-50].any())
