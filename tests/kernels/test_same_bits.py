"""Every operation gives the same bits twice, forward and backward, in base sizes and skewed rows.

In the interpreter the sizes are small, and it is this file that is tried out: programs run one
after another there, so that only a GPU can show sums taken in the order in which they end.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels.benchmark_layouts import layouts, token_ids
from kernels.documents import document_bounds, positions_from
from kernels.embedding import embedding
from kernels.geglu import geglu_linear
from kernels.layer_norm import add_layer_norm, layer_norm
from kernels.linear_cross_entropy import _linear_cross_entropy
from kernels.local_attention import local_attention
from kernels.rope import rope, rope_in_place, rope_tables
from kernels.stable_adamw import apply_update, update_moments
from kernels.unpad import pad, unpad


@dataclass(frozen=True)
class Sizes:
    tokens: int
    heads: int
    head_dim: int
    inner: int
    masked: int
    vocabulary: int

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim


BASE = Sizes(65_536, 12, 64, 1152, 19_660, 50_368)
SMALL = Sizes(32, 1, 8, 12, 20, 50)


@dataclass
class Row:
    """Sizes, a device, the skewed layout, and random tensors that are the same every time."""

    sizes: Sizes
    device: torch.device

    def __post_init__(self) -> None:
        self.lengths = layouts(self.sizes.tokens)["skewed"]
        ends = torch.tensor([0, *self.lengths]).cumsum(0, dtype=torch.int32)
        self.cu_seqlens = ends.to(self.device)
        self.draw = torch.Generator(self.device).manual_seed(0)
        # The interpreter truncates to bf16.
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float16

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self.draw, device=self.device)
        return values.to(dtype or self.dtype)

    def qkv(self) -> tuple[Tensor, list[Tensor]]:
        """(T, 3, H, D), and tables and positions."""
        sizes = self.sizes
        tables = rope_tables(max(self.lengths), sizes.head_dim, 10_000.0)
        turn = [*(t.to(self.device) for t in tables), positions_from(self.cu_seqlens, sizes.tokens)]
        return self.random(sizes.tokens, 3, sizes.heads, sizes.head_dim), turn


def with_gradients(
    row: Row, function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor
) -> list[Tensor]:
    """Results, and the gradients of all floating inputs for random gradients of the results."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    found = function(*leaves)
    outs = [found] if isinstance(found, Tensor) else list(found)
    slopes = [row.random(*out.shape, dtype=out.dtype) for out in outs]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, wanted, slopes)]


def run_rope(row: Row) -> list[Tensor]:
    qkv, turn = row.qkv()
    results = with_gradients(row, lambda x: rope(x, *turn), qkv)
    rope_in_place(qkv, *turn)
    return [*results, qkv]


def run_local_attention(row: Row) -> list[Tensor]:
    qkv, turn = row.qkv()
    bounds = document_bounds(row.cu_seqlens, row.sizes.tokens)
    return with_gradients(row, lambda x: local_attention(x, *turn, bounds, 64), qkv)


def run_embedding(row: Row) -> list[Tensor]:
    sizes = row.sizes
    ids = token_ids(sizes.tokens, sizes.vocabulary)["Zipf"].to(row.device)
    weight = row.random(sizes.vocabulary, sizes.hidden)
    return with_gradients(row, lambda w: embedding(ids, w, 3), weight)


def run_norms(row: Row) -> list[Tensor]:
    shape, weight = (row.sizes.tokens, row.sizes.hidden), row.random(row.sizes.hidden)
    x, residual = row.random(*shape), row.random(*shape)
    both = with_gradients(row, lambda *v: add_layer_norm(*v, 1e-5), x, residual, weight)
    return [*both, *with_gradients(row, lambda *v: layer_norm(*v, 1e-5), x, weight)]


def run_geglu(row: Row) -> list[Tensor]:
    sizes = row.sizes
    x = row.random(sizes.tokens, 2 * sizes.inner)
    return with_gradients(row, geglu_linear, x, row.random(sizes.hidden, sizes.inner))


def run_loss(row: Row) -> list[Tensor]:
    sizes = row.sizes
    shapes = (sizes.masked, sizes.hidden), (sizes.vocabulary, sizes.hidden), (sizes.vocabulary,)
    leaves = [row.random(*shape).mul_(0.3).requires_grad_() for shape in shapes]
    labels = torch.arange(sizes.masked, device=row.device) * 7 % sizes.vocabulary
    labels[::9] = -100
    loss, *_, each = _linear_cross_entropy(*leaves, labels, sizes.masked, True, True)
    return [loss.detach(), each.detach(), *torch.autograd.grad(loss, leaves)]


def run_unpad_and_pad(row: Row) -> list[Tensor]:
    """The documents as rows of a padded batch, most of which is padding; so narrow ones."""
    lengths, tokens = torch.tensor(row.lengths, device=row.device), row.sizes.tokens
    mask = torch.arange(max(row.lengths), device=row.device) < lengths[:, None]
    ids = torch.arange(mask.numel(), device=row.device).view(mask.shape)

    def there_and_back(hidden: Tensor) -> tuple[Tensor, ...]:
        packing, (packed_ids, packed) = unpad(mask, [ids, hidden], tokens + 100)
        places.extend([packing.index_T, packing.slot_BS, packing.cu_seqlens, packed_ids])
        return packed, *pad(packing, [packed])

    places: list[Tensor] = []
    results = with_gradients(row, there_and_back, row.random(*mask.shape, 4))
    return [*places, *results]


def run_stable_adamw(row: Row) -> list[Tensor]:
    """A step over the parameters of an embedding and 22 layers, flat."""
    hidden, inner = row.sizes.hidden, row.sizes.inner
    layer = [3 * hidden * hidden, hidden * hidden, 2 * inner * hidden, inner * hidden, hidden]
    counts = [row.sizes.vocabulary * hidden, *(22 if hidden > 8 else 2) * layer]
    pieces = tuple(itertools.pairwise(itertools.accumulate(counts, initial=0)))
    gradient, mean, square, weights = row.random(4, sum(counts), dtype=torch.float32).unbind()
    square.square_()
    shares, one = torch.tensor([0.1, 0.7], device=row.device), torch.ones((), device=row.device)
    sums = update_moments(gradient, mean, square, shares, one, 0 * one, 1e-6, pieces)
    apply_update(weights, mean, square, 1e-3 / sums, 1e-5, 1e-6, pieces)
    return [sums, mean, square, weights]


@pytest.mark.parametrize(
    "operation",
    [
        run_rope,
        run_local_attention,
        run_embedding,
        run_norms,
        run_geglu,
        run_loss,
        run_unpad_and_pad,
        run_stable_adamw,
    ],
)
def test_same_bits_twice(operation: Callable[[Row], list[Tensor]], device: torch.device) -> None:
    sizes = BASE if device.type == "cuda" else SMALL
    first = operation(Row(sizes, device))
    # Other work in between, so that the second time does not find the machine as the first did.
    torch.ones(1_000_000 if sizes is BASE else 10, device=device).cumsum(0)
    second = operation(Row(sizes, device))
    assert all(bool(value.any()) for value in first)
    for number, (one, two) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(one, two), f"result {number}"
