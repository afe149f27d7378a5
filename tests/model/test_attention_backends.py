"""The wrapping of others' attention, on a CPU with stand-ins that have their signatures."""

import importlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from kernels.documents import document_bounds_reference
from model.attention_backends import ShortDocuments, fa2_attention, fa4_attention, register
from model.attention_choice import _INSTALL, why_not

LENGTHS, BEHIND = [20, 0, 7, 1], 6
# Twenty, of up to 34 tokens.
LAYOUTS = [
    [34], [17, 17], [30, 3, 1], [8] * 4, [2] * 17, [1] * 20, [5, 0, 12],
    *([long, *[1] * (33 - long)] for long in range(3, 29, 2)),
]  # fmt: skip


def weights(q: Tensor, k: Tensor, ends_q: Tensor, ends_k: Tensor, window: int) -> Tensor:
    """Softmax over all pairs, others' documents masked out; queries behind all of them see all."""
    place_q, place_k = torch.arange(q.shape[0]), torch.arange(k.shape[0])
    document_q = torch.bucketize(place_q, ends_q[1:], right=True)
    document_k = torch.bucketize(place_k, ends_k[1:], right=True)
    seen = document_q[:, None] == document_k[None, :]
    if window >= 0:
        seen &= (place_q[:, None] - place_k[None, :]).abs() <= window
    seen |= (place_q >= ends_q[-1])[:, None]
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)


def dense(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, window: int) -> Tensor:
    return torch.einsum("hij,jhd->ihd", weights(q, k, ends_q, ends_k, window), v)


def poison_behind(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """NaN behind the documents, as fresh memory may hold."""
    behind = torch.arange(rows.shape[0]) >= cu_seqlens[-1]
    return rows.masked_fill(behind[:, None, None], float("nan"))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    out = poison_behind(dense(q, k, v, cu_seqlens_q, cu_seqlens_k, window), cu_seqlens_q)
    return out, q.new_zeros((q.shape[1], q.shape[0])).float()


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen: int,
    window: int,
) -> None:
    # What lies behind the last query may hold anything.
    grad = grad.masked_fill((torch.arange(len(q)) >= cu_seqlens_q[-1])[:, None, None], 0)
    p = weights(q, k, cu_seqlens_q, cu_seqlens_k, window)
    along_p = torch.einsum("ihd,jhd->hij", grad, v)
    along_s = p * (along_p - (p * along_p).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    grads = (
        torch.einsum("hij,jhd->ihd", along_s, k),
        torch.einsum("hij,ihd->jhd", along_s, q),
        torch.einsum("hij,ihd->jhd", p, grad),
    )
    ends = cu_seqlens_q, cu_seqlens_k, cu_seqlens_k
    for place, value, end in zip((dq, dk, dv), grads, ends, strict=True):
        place.copy_(poison_behind(value, end))


stand_in = register("stand_in", forward, backward)


def make_row(lengths: list[int], behind: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv, a leaf, cu_seqlens, and a gradient of the result."""
    tokens = sum(lengths) + behind
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(tokens, 3, 2, 8, generator=generator, dtype=torch.float64)
    grad = torch.randn(tokens, 2, 8, generator=generator, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return qkv.requires_grad_(), cu_seqlens, grad


def check(attend: Callable[..., Tensor], window: int | None) -> None:
    qkv, cu_seqlens, grad = make_row(LENGTHS, BEHIND)
    out = attend(qkv, None, cu_seqlens, cu_seqlens, 20, window)
    (gradient,) = torch.autograd.grad(out, qkv, grad)
    end = sum(LENGTHS)
    alone = qkv.detach()[:end].requires_grad_()
    expected = dense(*alone.unbind(1), cu_seqlens, cu_seqlens, -1 if window is None else window)
    (expected_gradient,) = torch.autograd.grad(expected, alone, grad[:end])
    for ours, theirs in ((out, expected), (gradient, expected_gradient)):
        assert torch.allclose(ours[:end], theirs)
        assert not bool(ours[end:].any())


@pytest.mark.parametrize("window", [None, 3, 0])
def test_results_gradients_and_zeros_behind_the_documents(window: int | None) -> None:
    check(stand_in, window)


def check_some(attend: Callable[..., Tensor]) -> None:
    """Queries at some tokens, of one document none, and filler behind them."""
    qkv, cu_seqlens, _ = make_row(LENGTHS, BEHIND)
    # Filler has place 0, which is a query's too: that one's gradient must not be lost.
    places, cu_seqlens_q = torch.tensor([0, 3, 19, 27]), torch.tensor([0, 3, 3, 3, 4]).int()
    filled_up = torch.cat([places, torch.zeros(3, dtype=torch.int64)])
    grad = torch.randn(7, 2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    end = sum(LENGTHS)
    out = attend(qkv, filled_up, cu_seqlens_q, cu_seqlens, 20, None)
    alone = qkv.detach()[:end].requires_grad_()
    expected = dense(*alone.unbind(1), cu_seqlens, cu_seqlens, -1)[places]
    assert torch.allclose(out[:4], expected)
    assert not bool(out[4:].any())
    (gradient,) = torch.autograd.grad(out, qkv, grad)
    (expected_gradient,) = torch.autograd.grad(expected, alone, grad[:4])
    assert torch.allclose(gradient[:end], expected_gradient)
    assert not bool(gradient[end:].any())


def test_what_does_not_lie_in_one_piece() -> None:
    qkv, cu_seqlens, grad = make_row(LENGTHS, BEHIND)
    results = []
    apart = [value.detach().repeat_interleave(2, 0)[::2] for value in (qkv, grad)]
    assert not any(value.is_contiguous() for value in apart)
    for values, given in ((qkv.detach(), grad), apart):
        leaf = values.requires_grad_()
        out = stand_in(leaf, None, cu_seqlens, cu_seqlens, 20, None)
        results.append((out, torch.autograd.grad(out, leaf, given)[0]))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_filler_alone() -> None:
    """As of a batch of validation in which nothing is masked."""
    qkv, cu_seqlens, _ = make_row(LENGTHS, BEHIND)
    places, nowhere = torch.zeros(4, dtype=torch.int64), torch.zeros_like(cu_seqlens)
    out = stand_in(qkv, places, nowhere, cu_seqlens, 20, None)
    (gradient,) = torch.autograd.grad(out, qkv, torch.randn_like(out))
    assert not bool(out.any())
    assert not bool(gradient.any())


def test_some_queries() -> None:
    check_some(stand_in)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are compiled")
@pytest.mark.parametrize("first", range(5))
@pytest.mark.parametrize("some", [False, True])
def test_short_documents_are_written_beside_the_others(first: int, some: bool) -> None:
    """From document `first` on; a backend leaves NaN there. Filler at places of both kinds."""
    lengths = [20, 9, 0, 7]
    ends = [0, *itertools.accumulate(lengths)]
    qkv, cu_seqlens, grad = make_row(lengths, BEHIND)
    places = torch.tensor([0, 3, 19, 21, 30, 35, 0, 35, 41]) if some else None
    cu_seqlens_q = torch.tensor([0, 3, 4, 4, 6]).int() if some else cu_seqlens
    taken = places[:6] if some else torch.arange(ends[-1])
    grad = grad[: 9 if some else len(grad)].float()
    leaf = qkv.detach().float().requires_grad_()
    short = ShortDocuments(document_bounds_reference(cu_seqlens, len(leaf)), first, ends[first])
    out = stand_in(leaf, places, cu_seqlens_q, cu_seqlens, 20, None, short)
    (gradient,) = torch.autograd.grad(out, leaf, grad)
    alone = qkv.detach()[: ends[-1]].requires_grad_()
    expected = dense(*alone.unbind(1), cu_seqlens, cu_seqlens, -1)[taken]
    (expected_gradient,) = torch.autograd.grad(expected, alone, grad[: len(taken)].double())
    for ours, theirs in ((out, expected), (gradient, expected_gradient)):
        torch.testing.assert_close(ours[: len(theirs)].double(), theirs, rtol=1e-4, atol=1e-5)
        assert not bool(ours[len(theirs) :].any())


def test_no_token() -> None:
    qkv, cu_seqlens, grad = make_row([0], 0)
    out = stand_in(qkv, None, cu_seqlens, cu_seqlens, 1, None)
    assert out.shape == (0, 2, 8)
    assert torch.autograd.grad(out, qkv, grad)[0].shape == (0, 3, 2, 8)


def test_documents_without_a_token_before_some_without_a_document() -> None:
    """Others' kernels are not asked: a grid over nothing cannot be launched."""
    qkv, cu_seqlens, grad = make_row([0, 0], 5)
    refused = register("refused", _refuse, _refuse)
    out = refused(qkv, None, cu_seqlens, cu_seqlens, 0, None)
    (gradient,) = torch.autograd.grad(out, qkv, grad)
    assert out.shape == (5, 2, 8)
    assert gradient.shape == qkv.shape
    assert not bool(out.any())
    assert not bool(gradient.any())


def _refuse(*_: object) -> NoReturn:
    raise AssertionError("called without a token in any document")


def test_one_graph_whatever_the_documents() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(stand_in, fullgraph=True, backend=counter)
    assert len(LAYOUTS) == 20
    for lengths in LAYOUTS:
        qkv, cu_seqlens, grad = make_row(lengths, 34 - sum(lengths))
        results = []
        for function in (compiled, stand_in):
            out = function(qkv, None, cu_seqlens, cu_seqlens, max(lengths), 3)
            results.append([out, *torch.autograd.grad(out, qkv, grad)])
        for one, two in zip(*results, strict=True):
            assert torch.equal(one, two)
    assert counter.frame_count <= 2


def test_registration() -> None:
    qkv, cu_seqlens, _ = make_row(LENGTHS, BEHIND)
    names = ["test_schema", "test_autograd_registration", "test_faketensor"]
    operations = torch.ops.clinical_modernbert
    bounds = document_bounds_reference(cu_seqlens, qkv.shape[0])
    nobody = torch.zeros(4, dtype=torch.int64)
    for places, numbers in itertools.product((None, nobody), ((4, len(qkv)), (1, 20), (0, 0))):
        leaf = qkv.detach().float().requires_grad_()
        short = None if numbers[0] == 4 else bounds
        where = (cu_seqlens if places is None else 0 * cu_seqlens, cu_seqlens, short)
        sizes = (20, -1, *numbers)
        given = (leaf, places, *where, *sizes)
        torch.library.opcheck(operations.stand_in.default, given, test_utils=names)
        out, *sums = (x.detach() for x in operations.stand_in(*given))
        saved = (torch.zeros_like(out), leaf.detach(), places, out, *sums)
        torch.library.opcheck(
            operations.stand_in_backward.default, (*saved, *where, *sizes), test_utils=names
        )


# The parameters of flash-attn 2.8.3.post2 (flash_attn/flash_attn_interface.py) and of flash-attn-4
# 4.0.0b36 (flash_attn/cute/interface.py), all of the former's and the latter's as far as they go.
# Each backward says in `asked` what it was told of `deterministic`.
def _fa2_module() -> ModuleType:
    def varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, causal, softcap) == (0.0, False, 0.0)
        assert softmax_scale == q.shape[-1] ** -0.5
        assert window_size_left == window_size_right
        out, lse = forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, window_size_left)
        return out, lse, torch.empty(0), torch.empty(2)

    def varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, causal, softcap, alibi_slopes) == (0.0, False, 0.0, None)
        assert softmax_scale == q.shape[-1] ** -0.5
        assert window_size_left == window_size_right
        module.asked.append(deterministic)
        saved, ends = (q, k, v, out, softmax_lse), (cu_seqlens_q, cu_seqlens_k)
        backward(dout, *saved, dq, dk, dv, *ends, max_seqlen_k, window_size_left)
        return softmax_lse

    module = ModuleType("flash_attn.flash_attn_interface")
    module.asked = []
    module._wrapped_flash_attn_varlen_forward = varlen_forward
    module._wrapped_flash_attn_varlen_backward = varlen_backward
    return module


def _fa4_module() -> ModuleType:
    def side(left: int | None, right: int | None) -> int:
        assert left == right
        return -1 if left is None else left

    def fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, page_table=None,
        softmax_scale=None, causal=False, softcap=None, window_size_left=None,
        window_size_right=None, *, return_lse=False,
    ):  # fmt: skip
        assert return_lse
        width = side(window_size_left, window_size_right)
        ends = cu_seqlens_q, cu_seqlens_k
        return *forward(q, k, v, *ends, max_seqlen_q, width), None, None, None

    def bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0,
        window_size_left=None, window_size_right=None, *, cu_seqlens_q=None, cu_seqlens_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
    ):  # fmt: skip
        module.asked.append(deterministic)
        width = side(window_size_left, window_size_right)
        saved, ends = (q, k, v, out, lse), (cu_seqlens_q, cu_seqlens_k)
        backward(dout, *saved, dq, dk, dv, *ends, max_seqlen_k, width)
        return dq, dk, dv

    module = ModuleType("flash_attn.cute.interface")
    module.asked = []
    module._flash_attn_fwd, module._flash_attn_bwd = fwd, bwd
    return module


@pytest.fixture(params=["fa2", "fa4"])
def stand_in_for(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[Callable[..., Tensor], ModuleType]:
    """A backend, and the module that takes the place of its package."""
    attend, make = {"fa2": (fa2_attention, _fa2_module), "fa4": (fa4_attention, _fa4_module)}[
        request.param
    ]
    module = make()
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return attend, module


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("window", [None, 3])
def test_calls_fit_the_documented_signatures(
    stand_in_for: tuple[Callable[..., Tensor], ModuleType], window: int | None
) -> None:
    attend, module = stand_in_for
    check(attend, window)
    check_some(attend)
    assert module.asked == [False, False]


@pytest.mark.parametrize("window", [None, 3])
def test_deterministic_algorithms_are_asked_for_where_torch_is_told_to(
    stand_in_for: tuple[Callable[..., Tensor], ModuleType],
    window: int | None,
    deterministic: None,
) -> None:
    attend, module = stand_in_for
    check(attend, window)
    assert module.asked == [True]


def fits(stand_in: Callable[..., object], real: Callable[..., object]) -> bool:
    """Whether a call that the stand-in takes means the same to the package's function.

    By position the same names in the same places; by name at least those, defaults alike.
    """
    real = getattr(real, "_init_fn", real)  # of a custom operation, the function itself
    ours, theirs = (inspect.signature(one).parameters for one in (stand_in, real))
    placed = [name for name, p in ours.items() if p.kind is not p.KEYWORD_ONLY]
    return (
        list(theirs)[: len(placed)] == placed
        and ours.keys() <= theirs.keys()
        and all(p.default == theirs[name].default for name, p in ours.items())
    )


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (_fa2_module, ["flash_attn_varlen_forward", "flash_attn_varlen_backward"]),
        (_fa4_module, ["flash_attn_fwd", "flash_attn_bwd"]),
    ],
    ids=["fa2", "fa4"],
)
def test_stand_ins_have_the_signatures_of_what_is_installed(
    make: Callable[[], ModuleType], names: list[str]
) -> None:
    module = make()
    try:
        installed = importlib.import_module(module.__name__)
    except ImportError as error:
        pytest.skip(f"{module.__name__} cannot be imported here: {error}")
    for name in names:
        stand_in = getattr(module, f"_wrapped_{name}", None) or getattr(module, f"_{name}")
        assert fits(stand_in, getattr(installed, f"_{name}")), name


def test_another_signature_is_seen() -> None:
    def ours(q, k, *, window=None):  # type: ignore[no-untyped-def]
        pass

    def longer(q, k, scale=1.0, window=None, more=0):  # type: ignore[no-untyped-def]
        pass

    def turned(k, q, window=None):  # type: ignore[no-untyped-def]
        pass

    def renamed(q, k, *, windows=None):  # type: ignore[no-untyped-def]
        pass

    def other_default(q, k, *, window=0):  # type: ignore[no-untyped-def]
        pass

    assert fits(ours, longer)
    assert not any(fits(ours, other) for other in (turned, renamed, other_default))


def test_what_to_install_is_what_was_checked() -> None:
    pins = (Path(__file__).parent.parent.parent / "requirements-gpu.txt").read_text()
    (pin,) = (word for word in _INSTALL["fa2"].split() if word.startswith("flash-attn=="))
    assert pin in pins


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["varlen", "fa4", "fa2"])
@pytest.mark.parametrize(("window", "short_apart"), [(-1, False), (64, False), (-1, True)], ids=str)
def test_gpu_registration(name: str, window: int, short_apart: bool, cuda: str) -> None:
    """Of both operations: the schema, autograd, and what the compiler is told of their results.

    `test_aot_dispatch_dynamic` is left out: it wants the gradients of two runs to be close in each
    element, and a backward that adds up in the order in which blocks end does not give that. One
    graph for all layouts, with gradients, is tested on the whole model.
    """
    if reason := why_not(name, cuda, None, torch.bfloat16, 64):
        pytest.skip(reason)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    lengths = [300, 0, 16, 1, 77]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(cuda)
    draw = torch.Generator(cuda).manual_seed(0)
    values = torch.randn(sum(lengths) + 6, 4, 3, 64, generator=draw, device=cuda).bfloat16()
    qkv, grad = values[:, :3].contiguous(), values[:, 3].contiguous()
    bounds = document_bounds_reference(cu_seqlens, qkv.shape[0]) if short_apart else None
    numbers = (1, 300) if short_apart else (len(lengths), len(qkv))
    operations = [
        getattr(torch.ops.clinical_modernbert, f"{name}_attention{end}").default
        for end in ("", "_backward")
    ]
    others = (cu_seqlens, cu_seqlens, bounds, 300, window, *numbers)
    forward_inputs = (qkv, None, *others)
    backward_inputs = (grad, qkv, None, *operations[0](*forward_inputs), *others)
    for operation, inputs in zip(operations, (forward_inputs, backward_inputs), strict=True):
        results = torch.library.opcheck(operation, inputs, test_utils=checks)
        assert set(results.values()) == {"SUCCESS"}
        with FakeTensorMode() as mode:
            said = operation(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in inputs))
        found = operation(*inputs)
        if isinstance(found, Tensor):
            found, said = (found,), (said,)
        for real, fake in zip(found, said, strict=True):
            assert (real.shape, real.dtype, real.stride()) == (
                fake.shape,
                fake.dtype,
                fake.stride(),
            )
    inputs = (qkv.clone().requires_grad_(), *forward_inputs[1:])
    results = torch.library.opcheck(operations[0], inputs, test_utils=checks)
    assert set(results.values()) == {"SUCCESS"}
