"""Attention on rows of 65,536 tokens: two of 8192 among thousands of 16, and code titles.

All pairs of such a row would fit nowhere, so that documents are compared one by one: all the long
ones, and of the short ones a sample. A CPU does the same in small, for the kernel that Triton can
interpret.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kernels.benchmark_layouts import layouts
from kernels.documents import positions_from
from model.attention import SHORT_DOCUMENTS, Choice, LongDocuments, attend, describe_documents
from model.attention_choice import why_not
from model.rotary import RotaryTables

REFERENCE = Choice("reference", "backend")
TOKENS, HEADS, WIDTH = 65_536, 12, 64
# Documents from this length on are compared by themselves; of the others as many.
LONG, SAMPLE = 64, 64

AttentionRun = tuple[Tensor, Tensor]


def run(
    qkv: Tensor, grad: Tensor, lengths: list[int], window: int | None, choice: Choice
) -> AttentionRun:
    """The result and the gradient by qkv, rotary positions included."""
    leaf = qkv.detach().clone().requires_grad_()
    tables = RotaryTables(8192, qkv.shape[-1], 10_000.0).to(qkv.device)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(qkv.device)
    places = positions_from(cu_seqlens, len(qkv))
    long = [length for length in lengths if length > SHORT_DOCUMENTS]
    are_apart = lengths[: len(long)] == long
    of_long = LongDocuments(len(long), sum(long)) if are_apart else None
    documents = describe_documents(places, cu_seqlens, max(lengths), choice, of_long)
    out = attend(leaf, tables, documents, window, choice)
    return out.detach(), torch.autograd.grad(out, leaf, grad.to(out.dtype))[0]


def run_head_by_head(
    qkv: Tensor, grad: Tensor, lengths: list[int], window: int | None
) -> AttentionRun:
    """The reference, which makes all scores of a document: half a GiB a head in fp64."""
    heads = range(qkv.shape[2])
    results = [
        run(qkv[:, :, h : h + 1], grad[:, h : h + 1], lengths, window, REFERENCE) for h in heads
    ]
    outs, gradients = zip(*results, strict=True)
    return torch.cat(outs, 1), torch.cat(gradients, 2)


def groups(lengths: list[int]) -> list[list[int]]:
    """Numbers of the documents that are compared together: each long one, and a sample of the rest.

    Of few tokens PyTorch may be exact by chance, so that short ones share what they are allowed.
    """
    long = [number for number, length in enumerate(lengths) if length >= LONG]
    short = [number for number, length in enumerate(lengths) if length < LONG]
    sample = short[:: max(1, len(short) // SAMPLE)] + short[-1:]
    return [*([number] for number in long), sample]


def compare(
    what: str,
    ours: AttentionRun,
    lengths: list[int],
    qkv: Tensor,
    grad: Tensor,
    window: int | None,
    assert_close: Callable[..., None],
) -> None:
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    for numbers in groups(lengths):
        theirs = [lengths[number] for number in numbers]
        at = torch.cat([torch.arange(starts[n], starts[n + 1]) for n in numbers]).to(qkv.device)
        plain = run_head_by_head(qkv[at], grad[at], theirs, window)
        exact = run_head_by_head(qkv[at].double(), grad[at].double(), theirs, window)
        name = f"{what}, documents {numbers[:3]}"
        assert_close(f"{name}, forward", ours[0][at], plain[0], exact[0])
        assert_close(f"{name}, gradient", ours[1][at], plain[1], exact[1])


def make_row(
    tokens: int, heads: int, width: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    """qkv and the gradient of the result."""
    draw = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(tokens, 3, heads, width, generator=draw, device=device).to(dtype)
    return qkv, torch.randn(tokens, heads, width, generator=draw, device=device).to(dtype)


def choice_of(name: str) -> Choice:
    """A backend by its name, the kernel, or both; skips what is not here."""
    if name == "kernel":
        return Choice("reference", "kernel")
    backend, _, kernel = name.partition(" and ")
    if reason := why_not(backend, "cuda", None, torch.bfloat16, WIDTH):
        pytest.skip(reason)
    return Choice(backend, "kernel" if kernel else "backend")


BACKENDS = ["varlen", "fa4", "fa2"]
WITH_KERNEL = [f"{name} and kernel" for name in BACKENDS]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "window"),
    [("kernel", 64), *((name, None) for name in [*BACKENDS, *WITH_KERNEL])],
    ids=["kernel", *BACKENDS, *WITH_KERNEL],
)
@pytest.mark.parametrize("layout", ["skewed", "code titles"])
def test_gpu_long_rows_document_by_document(
    name: str, window: int | None, layout: str, cuda: str, assert_close: Callable[..., None]
) -> None:
    lengths, choice = layouts(TOKENS)[layout], choice_of(name)
    qkv, grad = make_row(sum(lengths), HEADS, WIDTH, torch.bfloat16, cuda)
    ours = run(qkv, grad, lengths, window, choice)
    compare(f"{name} {layout}", ours, lengths, qkv, grad, window, assert_close)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are compiled")
@pytest.mark.parametrize("layout", ["skewed", "code titles"])
def test_rows_document_by_document(layout: str, assert_close: Callable[..., None]) -> None:
    lengths, window = layouts(64)[layout], 9
    lengths[:2] = [LONG, LONG]
    qkv, grad = make_row(sum(lengths), 1, 8, torch.float16, "cpu")
    ours = run(qkv, grad, lengths, window, choice_of("kernel"))
    compare(layout, ours, lengths, qkv, grad, window, assert_close)
    # With one token of another document in sight it shows.
    apart = [lengths[0] - 1, lengths[1] + 1, *lengths[2:]]
    ours = run(qkv, grad, apart, window, REFERENCE)
    with pytest.raises(AssertionError, match=r"documents \[0\], forward: off by"):
        compare(layout, ours, lengths, qkv, grad, window, assert_close)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "window"),
    [
        *((name, window) for name in BACKENDS for window in (None, 64)),
        *((name, None) for name in WITH_KERNEL),
    ],
)
def test_gpu_deterministic_mode_gives_the_same_bits(
    name: str, window: int | None, cuda: str, deterministic: None
) -> None:
    """At a length where many blocks of keys add to one query's gradient, in whatever order."""
    lengths, choice = layouts(TOKENS)["skewed"], choice_of(name)
    qkv, grad = make_row(TOKENS, HEADS, WIDTH, torch.bfloat16, cuda)
    first = run(qkv, grad, lengths, window, choice)
    for _ in range(3):
        again = run(qkv, grad, lengths, window, choice)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])
