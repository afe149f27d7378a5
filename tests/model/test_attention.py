"""Attention backends against an fp64 softmax written out, document by document."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import local_attention_tiles
from kernels.documents import positions_from
from model import attention
from model.attention import (
    BACKENDS,
    SHORT_DOCUMENTS,
    Choice,
    LongDocuments,
    Queries,
    attend,
    describe_documents,
    reference_attention,
)
from model.attention_backends import register
from model.attention_choice import why_not
from model.rotary import RotaryTables

LAYOUTS = {
    "even": [64, 64, 64],
    "abstracts": [250, 181, 322, 260],
    "skewed": [900, *[3] * 40, 450],
    "code titles": [16] * 60,
    "empty documents": [0, 0, 130, 0, 66, 65, 0, 0],
    "length 1": [1] * 9,
    "whole tiles": [448, 512, 448],
    "one long document": [777],
    "no token": [0, 0],
}
HEADS, WIDTH = 2, 16


def make_row(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3, HEADS, WIDTH, generator=generator)
    return 1.5 * qkv, torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def call(
    backend: Callable[..., Tensor],
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: int | None,
) -> Tensor:
    """A backend's result where every token is a query."""
    return backend(qkv, None, cu_seqlens, cu_seqlens, max_seqlen, window)


def every_third(lengths: list[int], filler: int) -> Queries:
    """Queries at every third token, none in some documents, and `filler` that mean nothing."""
    places = torch.tensor(range(1, sum(lengths), 3), dtype=torch.int64)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    of_each = torch.searchsorted(places, ends).int()
    return Queries(torch.cat([places, torch.zeros(filler, dtype=torch.int64)]), of_each)


def written_out(qkv: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v over all T × T pairs, others' documents masked out."""
    q, k, v = qkv.double().unbind(1)
    place = torch.arange(qkv.shape[0])
    document = torch.bucketize(place, cu_seqlens[1:].long(), right=True)
    seen = document[:, None] == document[None, :]
    if window is not None:
        seen &= (place[:, None] - place[None, :]).abs() <= window
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 64, 8, 0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_reference_is_the_formula(layout: str, window: int | None, dtype: torch.dtype) -> None:
    qkv, cu_seqlens = make_row(LAYOUTS[layout])
    leaf = qkv.to(dtype).requires_grad_()
    exact_leaf = leaf.detach().double().requires_grad_()
    out = call(reference_attention, leaf, cu_seqlens, max(LAYOUTS[layout]), window)
    exact = written_out(exact_leaf, cu_seqlens, window)
    assert out.dtype == dtype
    assert out.shape == exact.shape
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (gradient,) = torch.autograd.grad((out * weight).sum(), leaf)
    (exact_gradient,) = torch.autograd.grad((exact * weight.double()).sum(), exact_leaf)
    for actual, truth in ((out, exact), (gradient, exact_gradient)):
        difference = (actual.double() - truth).norm()
        assert difference <= 10 * torch.finfo(dtype).eps * truth.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 64, 0])
def test_to_a_compiler_the_reference_is_one_operation(layout: str, window: int | None) -> None:
    """The same result, and as gradients those that PyTorch derives."""
    qkv, cu_seqlens = make_row(LAYOUTS[layout])
    cu_seqlens = torch.cat([cu_seqlens, cu_seqlens[-1:]])
    qkv = torch.cat([qkv, qkv[:3]])
    results = []
    for operation in (attention._opaque_reference, reference_attention):
        leaf = qkv.clone().requires_grad_()
        out = call(operation, leaf, cu_seqlens, max(LAYOUTS[layout]), window)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append((out, torch.autograd.grad((out * weight).sum(), leaf)[0]))
    (out, gradient), (expected, expected_gradient) = results
    assert torch.equal(out, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 64])
def test_a_document_does_not_see_its_neighbours(window: int | None) -> None:
    lengths = LAYOUTS["skewed"]
    qkv, cu_seqlens = make_row(lengths)
    changed = qkv.clone()
    changed[:900] = float("nan")
    leaves = [values.requires_grad_() for values in (qkv, changed)]
    outs = [call(reference_attention, leaf, cu_seqlens, 900, window) for leaf in leaves]
    assert torch.equal(outs[0][900:], outs[1][900:])
    gradients = [
        torch.autograd.grad(out.sum(), leaf)[0] for out, leaf in zip(outs, leaves, strict=True)
    ]
    assert torch.equal(gradients[0][900:], gradients[1][900:])
    assert not bool(gradients[0].isnan().any())


@pytest.mark.parametrize("window", [None, 64])
def test_the_place_in_the_row_changes_no_bit(window: int | None) -> None:
    document, _ = make_row([450], seed=3)
    outs = []
    for before, behind in ((0, 0), (37, 450), (450, 3)):
        row, _ = make_row([before + behind])
        qkv = torch.cat([row[:before], document, row[before:]])
        cu_seqlens = torch.tensor([0, before, before + 450, before + 450 + behind]).int()
        outs.append(call(reference_attention, qkv, cu_seqlens, 450, window)[before : before + 450])
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_a_local_layer_does_not_make_all_scores() -> None:
    """Were they made, the largest intermediate would be 4096² × 2 heads, 134 MB."""
    qkv, cu_seqlens = make_row([4096])
    with torch.profiler.profile(profile_memory=True) as profile:
        call(reference_attention, qkv, cu_seqlens, 4096, 64)
    assert max(event.cpu_memory_usage for event in profile.events()) < 32 * 2**20


@pytest.mark.parametrize("window", [None, 3])
def test_tokens_behind_all_documents_get_and_give_nothing(window: int | None) -> None:
    qkv, cu_seqlens = make_row([5, 4, 3])
    qkv[9:] = float("nan")
    leaf = qkv.requires_grad_()
    out = call(reference_attention, leaf, cu_seqlens[:3], 5, window)
    (gradient,) = torch.autograd.grad(out.sum(), leaf)
    alone = call(reference_attention, qkv.detach()[:9], cu_seqlens[:3], 5, window)
    assert torch.equal(out[:9], alone)
    assert bool(gradient[:9].any())
    assert not bool(out[9:].any())
    assert not bool(gradient[9:].any())


def run_attend(
    lengths: list[int],
    behind: int,
    max_seqlen: int,
    window: int | None,
    choice: Choice,
    queries: Queries | None = None,
    long: int | None = None,
) -> list[Tensor]:
    """The result and the gradient by qkv, by the documents and some tokens behind them; long: so
    many documents come before the short ones."""
    qkv, _ = make_row([*lengths, behind])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    places = torch.cat([torch.arange(n) for n in [*lengths, behind]])
    of_long = None if long is None else LongDocuments(long, sum(lengths[:long]))
    documents = describe_documents(places, cu_seqlens, max_seqlen, choice, of_long)
    leaf = qkv.clone().requires_grad_()
    out = attend(leaf, RotaryTables(1024, WIDTH, 10_000.0), documents, window, choice, queries)
    return [out.detach(), torch.autograd.grad(out.square().sum(), leaf)[0]]


ASKED: list[list[int]] = []
"""The bounds of documents that the backend was asked for, forward and backward."""


def _asked_forward(*values: Any) -> tuple[Tensor, Tensor]:
    ASKED.append(values[4].tolist())
    return attention._opaque_forward(*values)


def _asked_backward(*values: Any) -> None:
    ASKED.append(values[10].tolist())
    attention._opaque_backward(*values)


watched = register("watched", _asked_forward, _asked_backward, False)
IN_KERNEL, IN_PYTORCH = Choice("watched", "kernel"), Choice("reference", "backend")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    monkeypatch.setitem(BACKENDS, "watched", watched)
    ASKED.clear()
    return ASKED


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are compiled")
@pytest.mark.parametrize(
    ("lengths", "max_seqlen", "window"),
    [
        ([30, 0, 1, 12], 30, 7),
        ([30, 0, 1, 12], 30, None),
        ([30, 0, 1, 12], SHORT_DOCUMENTS, None),
        ([SHORT_DOCUMENTS, 3, SHORT_DOCUMENTS - 1], SHORT_DOCUMENTS, None),
        ([1, 1], 1, None),
        ([0, 0], 0, None),
    ],
    ids=str,
)
def test_the_local_kernel_is_the_reference(
    lengths: list[int], max_seqlen: int, window: int | None, asked: list[list[int]]
) -> None:
    """With a window, and without one where no document is long; no backend is asked."""
    ours = run_attend(lengths, 4, max_seqlen, window, IN_KERNEL)
    theirs = run_attend(lengths, 4, max_seqlen, window, IN_PYTORCH)
    for one, two in zip(ours, theirs, strict=True):
        assert (one - two).norm() <= 1e-5 * two.norm()
    assert not asked


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are compiled")
@pytest.mark.parametrize(
    ("lengths", "long"),
    [
        ([200, 130, 128, 5, 0, 1, 64], 2),
        ([300, *[16] * 9, 0], 1),
        ([129, 3], 1),
        ([150, 140], 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("behind", [0, 9])
@pytest.mark.parametrize("some", [False, True], ids=["", "some queries"])
def test_short_documents_are_windows_beside_long_ones(
    lengths: list[int], long: int, behind: int, some: bool, asked: list[list[int]]
) -> None:
    """The backend has the long ones alone, forward and backward, and every row is written."""
    queries = every_third(lengths, 3) if some else None
    ours = run_attend(lengths, behind, max(lengths), None, IN_KERNEL, queries, long)
    ends = [0, *itertools.accumulate(lengths)]
    assert asked == [ends[: long + 1]] * 2
    theirs = run_attend(lengths, behind, max(lengths), None, IN_PYTORCH, queries)
    for one, two in zip(ours, theirs, strict=True):
        assert one.shape == two.shape
        assert (one - two).norm() <= 1e-5 * two.norm()
    assert not ours[1][sum(lengths) :].any()


@pytest.mark.parametrize("window", [None, 7])
def test_short_documents_stay_the_backends_without_the_kernel(window: int | None) -> None:
    lengths = [140, 20, 3]
    ours = run_attend(lengths, 0, 140, window, IN_PYTORCH, long=1)
    for one, two in zip(ours, run_attend(lengths, 0, 140, window, IN_PYTORCH), strict=True):
        assert torch.equal(one, two)


def test_a_bound_beyond_short_documents_is_the_backends_affair(asked: list[list[int]]) -> None:
    """However short they are: where nothing else is said, the bound alone is known on the host."""
    ours = run_attend([5, 9], 0, SHORT_DOCUMENTS + 1, None, IN_KERNEL)
    assert asked == [[0, 5, 14]] * 2
    for one, two in zip(ours, run_attend([5, 9], 0, 9, None, IN_PYTORCH), strict=True):
        assert (one - two).norm() <= 1e-6 * two.norm()


@pytest.mark.usefixtures("asked")
def test_one_kernel_serves_all_short_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its window is a constant of what is compiled, and a bound may be any number."""
    windows: list[int] = []

    def seen(*values: Any) -> None:
        windows.append(values[-1])

    monkeypatch.setattr(local_attention_tiles, "forward", seen)
    monkeypatch.setattr(local_attention_tiles, "backward", seen)
    for bound in (0, 9, 77, SHORT_DOCUMENTS):
        run_attend([5, 0], 0, bound, None, IN_KERNEL)
    run_attend([200, 0, 9], 0, 512, None, IN_KERNEL, long=1)
    assert windows == [SHORT_DOCUMENTS - 1] * 10


def test_the_smallest_bucket_of_training_is_short() -> None:
    batch = pytest.importorskip("train.batch")
    assert batch.SMALLEST_SEQLEN == SHORT_DOCUMENTS


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("compiled", [False, True])
def test_some_queries_are_rows_of_all(
    layout: str, window: int | None, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results and gradients; with a window, or in an order not known, computed with all."""
    if compiled:
        monkeypatch.setitem(BACKENDS, "reference", attention._opaque_reference)
    lengths = LAYOUTS[layout]
    queries, bound = every_third(lengths, 2), max(SHORT_DOCUMENTS + 1, *lengths)
    real = len(queries.places_M) - 2

    def run(given: Queries | None) -> tuple[Tensor, Tensor]:
        qkv, cu_seqlens = make_row([*lengths, 4])
        leaf = qkv.double().requires_grad_()
        places = torch.cat([torch.arange(n) for n in [*lengths, 4]])
        documents = describe_documents(places, cu_seqlens[:-1], bound, IN_PYTORCH)
        tables = RotaryTables(1024, WIDTH, 10_000.0)
        out = attend(leaf, tables, documents, window, IN_PYTORCH, given)
        if given is None:
            out = out[queries.places_M]
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        return out[:real], torch.autograd.grad((out * weight)[:real].sum(), leaf)[0]

    expected = run(None)
    for given in (queries, queries._replace(cu_seqlens=None)):
        for ours, theirs in zip(run(given), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_rows_are_taken_as_index_select_takes_them() -> None:
    """Filler has place 0, which is a query's too: that one's gradient must not be lost."""
    values = torch.randn(7, 2, 3, dtype=torch.float64)
    places, ends = torch.tensor([0, 2, 6, 0, 0]), torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    weight = torch.randn(5, 2, 3, dtype=torch.float64)
    weight[3:] = 0
    results = []
    for given in (Queries(places, ends), Queries(places, None)):
        leaf = values.clone().requires_grad_()
        taken = given.take(leaf)
        results.append((taken, torch.autograd.grad(taken, leaf, weight)[0]))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert bool(results[0][1][0].any())


def test_some_queries_are_all_that_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(*values: Any) -> Tensor:
        qkv, places, *_ = values
        asked.append(len(qkv if places is None else places))
        return reference_attention(*values)

    monkeypatch.setitem(BACKENDS, "reference", counted)
    lengths = [200, 0, 30]
    queries = every_third(lengths, 0)
    run_attend(lengths, 0, 200, None, IN_PYTORCH, queries)
    run_attend(lengths, 0, 200, 8, IN_PYTORCH, queries)
    assert asked == [len(queries.places_M), 230]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fa4", "fa2", "varlen", "kernel"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("behind", [0, 50])
@pytest.mark.parametrize(
    ("dtype", "window"),
    [(torch.bfloat16, None), (torch.bfloat16, 64), (torch.bfloat16, 8), (torch.float16, 64)],
    ids=str,
)
def test_gpu_attention_agrees_with_the_reference(
    name: str, layout: str, behind: int, window: int | None, dtype: torch.dtype, cuda: str
) -> None:
    width = 64
    choice = Choice("reference", "kernel") if name == "kernel" else Choice(name, "backend")
    lengths = LAYOUTS[layout]
    if name == "kernel" and window is None and max(lengths) > SHORT_DOCUMENTS:
        pytest.skip("the kernel is for layers with a window and for short documents")
    if name != "kernel" and (reason := why_not(name, "cuda", None, dtype, width)):
        pytest.skip(reason)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(cuda)
    generator = torch.Generator().manual_seed(0)
    shape = (sum(lengths) + behind, 3, HEADS, width)
    qkv = torch.randn(shape, generator=generator).to(cuda, dtype)
    weight = torch.randn(qkv[:, 0].shape, generator=generator).to(cuda, dtype)
    tables = RotaryTables(1024, width, 10_000.0).to(cuda)
    places = positions_from(cu_seqlens, len(qkv))

    def run(values: Tensor, which: Choice) -> tuple[Tensor, Tensor]:
        leaf = values.clone().requires_grad_()
        documents = describe_documents(places, cu_seqlens, max(lengths), which)
        out = attend(leaf, tables, documents, window, which)
        (gradient,) = torch.autograd.grad(out, leaf, weight.to(out.dtype))
        return out.detach().double(), gradient.double()

    slow = Choice("reference", "backend")
    exact, plain, fast = run(qkv.double(), slow), run(qkv, slow), run(qkv, choice)
    for ours in fast:
        assert not bool(ours[sum(lengths) :].any())
    check_norms(f"{name} {layout} window {window}", fast, plain, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fa4", "fa2", "varlen"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpu_some_queries_agree_with_the_reference(name: str, layout: str, cuda: str) -> None:
    """Documents without a query among them, filler, and tokens behind all documents."""
    check_gpu(Choice(name, "backend"), LAYOUTS[layout], every_third(LAYOUTS[layout], 7), cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fa4", "fa2", "varlen"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("some", [False, True], ids=["", "some queries"])
def test_gpu_short_documents_apart_agree_with_the_reference(
    name: str, layout: str, some: bool, cuda: str
) -> None:
    lengths = sorted(LAYOUTS[layout], reverse=True)
    queries = every_third(lengths, 7) if some else None
    check_gpu(Choice(name, "kernel"), lengths, queries, cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fa4", "fa2", "varlen"])
def test_gpu_filler_alone(name: str, cuda: str) -> None:
    """As of a batch of validation in which nothing is masked."""
    lengths = [300, 0, 17]
    nowhere = Queries(torch.zeros(64, dtype=torch.int64), torch.zeros(4, dtype=torch.int32))
    for local in ("backend", "kernel"):
        check_gpu(Choice(name, local), lengths, nowhere, cuda)


def spoil_memory() -> None:
    """Leave NaN in the memory that comes next, in pieces of all sizes."""
    torch.cuda.empty_cache()
    sizes = [2**24] * 8 + [2**19] * 300 + [2**17] * 100 + [2**10] * 2000
    pieces = [torch.full((size,), float("nan"), device="cuda") for size in sizes]
    del pieces


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2**10, 2**20])
def test_gpu_memory_is_spoilt(size: int, cuda: str) -> None:
    spoil_memory()
    assert torch.empty(size, device=cuda).isnan().any()


def check_gpu(choice: Choice, lengths: list[int], queries: Queries | None, cuda: str) -> None:
    """Where the kernel runs, short documents apart, which come last."""
    width = 64
    if reason := why_not(choice.backend, "cuda", None, torch.bfloat16, width):
        pytest.skip(reason)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(cuda)
    rows = real = sum(lengths)
    if queries is not None:
        assert queries.cu_seqlens is not None
        rows, real = len(queries.places_M), int(queries.cu_seqlens[-1])
        queries = Queries(queries.places_M.to(cuda), queries.cu_seqlens.to(cuda))
    long = [length for length in lengths if length > SHORT_DOCUMENTS]
    of_long = LongDocuments(len(long), sum(long)) if choice.local == "kernel" else None
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths) + 50, 3, HEADS, width, generator=generator)
    weight = torch.randn(rows + (50 if queries is None else 0), HEADS, width, generator=generator)
    tables = RotaryTables(1024, width, 10_000.0).to(cuda)
    places = positions_from(cu_seqlens, len(qkv))

    def run(dtype: torch.dtype, which: Choice) -> tuple[Tensor, Tensor]:
        leaf = qkv.bfloat16().to(cuda, dtype).requires_grad_()
        bound = max(SHORT_DOCUMENTS + 1, *lengths)
        documents = describe_documents(places, cu_seqlens, bound, which, of_long)
        spoil_memory()
        out = attend(leaf, tables, documents, None, which, queries)
        grad = weight.bfloat16().to(cuda, dtype)
        spoil_memory()
        return out.detach().double(), torch.autograd.grad(out, leaf, grad)[0].double()

    slow = Choice("reference", "backend")
    exact, plain = run(torch.float64, slow), run(torch.bfloat16, slow)
    ours = run(torch.bfloat16, choice)
    assert not bool(ours[0][real:].any())
    assert not bool(ours[1][sum(lengths) :].any())
    if real:
        asked = "all" if queries is None else "some"
        check_norms(f"{choice} {lengths[:4]} …, {asked} queries", ours, plain, exact)
    else:
        assert not bool(ours[1].any())


def check_norms(
    what: str,
    ours: tuple[Tensor, Tensor],
    plain: tuple[Tensor, Tensor],
    exact: tuple[Tensor, Tensor],
) -> None:
    """At most 1.5 times PyTorch's error of the result and of its gradient, in the norm.

    And what fp32 rounds, 2 ulp. In a gradient that is of √D times its size, |g| |v| |k| / √D, of
    which p (g · v − g · o) leaves nothing where a token sees itself alone, in PyTorch to the bit.
    """
    width = exact[0].shape[-1]
    for name, a, b, c, size in zip(
        ("forward", "gradient"), ours, plain, exact, (1, width**0.5), strict=True
    ):
        if c.numel() == 0:
            continue
        errors = [float((x.double() - c).norm() / c.norm().clamp(min=1e-30)) for x in (a, b)]
        print(f"{what} {name}: {errors[0]:.1e}, PyTorch {errors[1]:.1e}")
        allowed = 1.5 * errors[1] + 2 * torch.finfo(torch.float32).eps * size
        assert errors[0] <= allowed, f"{what} {name}: off by {errors[0]:.1e}, not {allowed:.1e}"


def test_twice_the_error_of_pytorch_would_be_seen() -> None:
    qkv, cu_seqlens = make_row(LAYOUTS["code titles"])
    results = []
    for values in (qkv.bfloat16(), qkv.bfloat16().double()):
        leaf = values.requires_grad_()
        out = call(reference_attention, leaf, cu_seqlens, 16, None)
        results.append((out.detach().double(), torch.autograd.grad(out.sum(), leaf)[0].double()))
    plain, exact = results
    check_norms("as PyTorch", plain, plain, exact)
    for place in range(2):
        twice = [*plain]
        twice[place] = 2 * plain[place] - exact[place]
        with pytest.raises(AssertionError, match=r"twice .*: off by"):
            check_norms("twice", (twice[0], twice[1]), plain, exact)
