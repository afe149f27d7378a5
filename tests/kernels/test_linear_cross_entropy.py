"""The chunked loss against the plain one, in Triton and in PyTorch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kernels import linear_cross_entropy as module
from kernels.linear_cross_entropy import (
    _linear_cross_entropy,
    linear_cross_entropy,
    linear_cross_entropy_each,
    linear_cross_entropy_reference,
)

VOCABULARY = 50


def make_case(
    rows: int,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    vocabulary: int = VOCABULARY,
    width: int = 16,
) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(rows, width), (vocabulary, width), (vocabulary,)]
    leaves = [
        torch.randn(size, generator=generator).to(device, dtype).requires_grad_() for size in sizes
    ]
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[::3] = -100
    return leaves, labels.to(device)


class LargestMade(TorchDispatchMode):
    """Elements of the largest floating tensor that an operation returns within."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point():
            self.elements = max(self.elements, out.numel())
        return out


def in_triton(*arguments: Tensor) -> Tensor:
    """The loss as on a GPU; on a CPU Triton interprets."""
    rows = len(arguments[0])
    return _linear_cross_entropy(*arguments, rows, torch.is_grad_enabled(), True)[0]


def run(function: Callable, leaves: list[Tensor], labels: Tensor) -> list[Tensor]:
    loss = function(*leaves, labels)
    return [loss, *torch.autograd.grad(loss / 3, leaves)]


@pytest.mark.parametrize(("rows", "chunk"), [(0, 7), (1, 7), (7, 7), (40, 7), (40, 1000), (10, 1)])
def test_equals_the_plain_loss(rows: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ELEMENTS_A_PLAIN_CHUNK", chunk * VOCABULARY)
    leaves, labels = make_case(rows)
    ours, theirs = (
        run(function, leaves, labels)
        for function in (linear_cross_entropy, linear_cross_entropy_reference)
    )
    assert ours[0].dtype == torch.float32
    assert ours[0].item() == pytest.approx(theirs[0].item(), rel=1e-6)
    for one, two in zip(ours[1:], theirs[1:], strict=True):
        assert torch.allclose(one, two, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("rows", "chunk"), [(0, 7), (1, 7), (40, 15), (150, 1000)])
@pytest.mark.parametrize("vocabulary", [50, 300])
def test_triton_is_as_exact_as_pytorch(
    rows: int,
    chunk: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    assert_close: Callable[..., None],
) -> None:
    monkeypatch.setattr(module, "_ELEMENTS_A_CHUNK", chunk * vocabulary)
    monkeypatch.setattr(module, "_FIRST_PASS", (16, 4))
    leaves, labels = make_case(rows, dtype, device, vocabulary)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    ours = run(in_triton, leaves, labels)
    plain = run(linear_cross_entropy_reference, leaves, labels)
    exact = run(linear_cross_entropy_reference, exact_leaves, labels)
    for name, *results in zip(
        ("loss", "hidden", "weight", "bias"), ours, plain, exact, strict=True
    ):
        assert_close(f"linear_cross_entropy {rows} {vocabulary} {name}", *results)


def test_a_chunk_has_no_more_rows_than_a_grid(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    leaves, labels = make_case(20, torch.float32, device)
    expected = run(in_triton, leaves, labels)
    rows = []
    turn = module._turn
    monkeypatch.setattr(module, "_MOST_ROWS", 7)
    monkeypatch.setattr(module, "_turn", lambda *a: rows.append(len(a[0])) or turn(*a))
    for one, two in zip(run(in_triton, leaves, labels), expected, strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-6)
    assert rows == [7, 7, 6]


def test_a_chunk_ends_where_its_rows_of_hidden_do(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Wider than the vocabulary is large: a chunk's logits alone would let 13 rows in."""
    leaves, labels = make_case(20, torch.float32, device, width=2 * VOCABULARY)
    expected = run(in_triton, leaves, labels)
    rows = []
    turn = module._turn
    monkeypatch.setattr(module, "_ELEMENTS_A_CHUNK", 13 * VOCABULARY)
    monkeypatch.setattr(module, "_turn", lambda *a: rows.append(len(a[0])) or turn(*a))
    for one, two in zip(run(in_triton, leaves, labels), expected, strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-6)
    assert rows == [6, 6, 6, 2]


def test_chunks_are_even_and_of_whole_multiples(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 rows in three chunks: 100 each would change what the passes are compiled for."""
    leaves, labels = make_case(300)
    rows = []
    turn = module._turn_plain
    monkeypatch.setattr(module, "_ELEMENTS_A_PLAIN_CHUNK", 149 * VOCABULARY)
    monkeypatch.setattr(module, "_turn_plain", lambda *a: rows.append(len(a[0])) or turn(*a))
    run(linear_cross_entropy, leaves, labels)
    assert rows == [112, 112, 76]


@pytest.mark.parametrize("function", [linear_cross_entropy, in_triton])
def test_large_logits_do_not_overflow(function: Callable, device: torch.device) -> None:
    hidden = torch.full((1, 1), 1e4, device=device)
    weight = torch.tensor([[1.0], [-1.0]], device=device)
    label = torch.tensor([1], device=device)
    loss = function(hidden, weight, torch.zeros(2, device=device), label)
    assert loss.item() == pytest.approx(2e4)


@pytest.mark.parametrize("function", [linear_cross_entropy, in_triton])
def test_ignored_rows_give_and_get_nothing(
    function: Callable, device: torch.device, poisoned: None
) -> None:
    leaves, labels = make_case(9, torch.float32, device)
    with torch.no_grad():
        leaves[0][labels == -100] = 1e30  # any product with it would show
    ours = run(function, leaves, labels)
    live = labels != -100
    kept = [leaves[0].detach()[live].requires_grad_(), *leaves[1:]]
    theirs = run(linear_cross_entropy_reference, kept, labels[live])
    assert not bool(ours[1][~live].any())
    assert torch.allclose(ours[1][live], theirs[1], rtol=1e-4, atol=1e-6)
    for one, two in zip((ours[0], *ours[2:]), (theirs[0], *theirs[2:]), strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)
    nothing = run(function, leaves, torch.full_like(labels, -100))
    assert not any(bool(value.any()) for value in nothing)


@pytest.mark.parametrize(("counted", "triton"), [(0, False), (9, False), (30, False), (9, True)])
def test_filler_at_the_end_costs_nothing(
    counted: int,
    triton: bool,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    poisoned: None,
) -> None:
    """The products of a long list with filler are those of the list without."""
    for name in ("_ELEMENTS_A_CHUNK", "_ELEMENTS_A_PLAIN_CHUNK"):
        monkeypatch.setattr(module, name, 7 * VOCABULARY)
    monkeypatch.setattr(module, "_ROWS_MULTIPLE", 2)
    (hidden, *others), labels = make_case(30, torch.float32, device)
    labels[counted:] = -100
    with torch.no_grad():
        hidden[counted + 1 :] = float("nan")  # would show wherever it is read

    def run_part(rows: int) -> tuple[list[Tensor], int]:
        with FlopCounterMode(display=False) as counter:
            values = _linear_cross_entropy._init_fn(
                hidden.detach()[:rows], *(o.detach() for o in others), labels[:rows], counted, True,
                triton,
            )  # fmt: skip
        return list(values), counter.get_total_flops()

    whole, flops = run_part(30)
    rounded = min(30, counted + counted % 2)
    alone, flops_alone = run_part(rounded)
    assert flops == flops_alone == 3 * 2 * rounded * VOCABULARY * 16
    assert not bool(whole[1][rounded:].any())
    assert not bool(whole[4][:, counted:].any())
    whole[1], whole[4] = whole[1][:rounded], whole[4][:, :rounded]
    for one, two in zip(whole, alone, strict=True):
        assert torch.equal(one, two)


def test_the_buffer_is_as_long_as_what_counts(device: torch.device) -> None:
    """Of 4096 rows 70 count: the largest thing made is 80 rows of logits, not 4096."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4096, 8, generator=generator), torch.randn(512, 8)
    labels = torch.full((4096,), -100)
    labels[:70] = 3
    arguments = [value.to(device) for value in (hidden, weight, torch.zeros(512), labels)]
    for triton in (False, True):
        sizes = LargestMade()
        with sizes:
            _linear_cross_entropy._init_fn(*arguments, 70, True, triton)
        assert sizes.elements == 80 * 512


@pytest.mark.parametrize("triton", [False, True])
def test_non_contiguous_input(triton: bool, device: torch.device) -> None:
    """Loss and gradients, whatever lies between the elements and in whatever order they lie."""
    leaves, labels = make_case(9, torch.float32, device)
    function = in_triton if triton else linear_cross_entropy
    expected = run(function, leaves, labels)
    for move in (
        lambda value: value.repeat_interleave(2, dim=0)[::2],
        lambda value: value.T.contiguous().T if value.dim() > 1 else value,
        lambda value: value.repeat_interleave(3, dim=-1)[..., ::3],
    ):
        moved = [move(leaf.detach()).requires_grad_() for leaf in leaves]
        assert not moved[0].is_contiguous()
        for one, two in zip(run(function, moved, move(labels)), expected, strict=True):
            assert torch.allclose(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("triton", [False, True])
def test_each_label_has_its_own_loss_and_is_on_top_or_not(
    triton: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Beside the sum, over several chunks; they carry no gradient, and the sum's stays."""
    for name in ("_ELEMENTS_A_CHUNK", "_ELEMENTS_A_PLAIN_CHUNK"):
        monkeypatch.setattr(module, name, 7 * VOCABULARY)
    leaves, labels = make_case(40, torch.float32, device)
    logits = F.linear(*leaves).detach()
    labels[1::2] = logits[1::2].argmax(-1)  # guessed right; every third is ignored again
    labels[::3] = -100
    expected = F.cross_entropy(logits, labels, reduction="none")
    if triton:
        loss, *_, each = _linear_cross_entropy(*leaves, labels, 40, True, True)
    else:
        loss, each = linear_cross_entropy_each(*leaves, labels)
        assert not each.requires_grad
        assert loss.requires_grad
    assert torch.allclose(each[0], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(each[1], (logits.argmax(-1) == labels).float())
    assert 0 < each[1].sum() < (labels != -100).sum()
    assert not bool(each[:, labels == -100].any())
    assert loss.item() == pytest.approx(expected.sum().item(), rel=1e-5)


def test_weight_gradient_is_summed_in_fp32(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """In bf16, adding chunk after chunk to a large sum would lose what the later ones bring."""
    for name in ("_ELEMENTS_A_CHUNK", "_ELEMENTS_A_PLAIN_CHUNK"):
        monkeypatch.setattr(module, name, 2 * VOCABULARY)
    leaves, labels = make_case(600, torch.bfloat16, device)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    ours = run(linear_cross_entropy, leaves, labels)
    exact = run(linear_cross_entropy, exact_leaves, labels)
    for gradient, truth in zip(ours[2:], exact[2:], strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.double() - truth).norm() < 0.006 * truth.norm()


def test_all_logits_are_never_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ELEMENTS_A_PLAIN_CHUNK", 2**16)
    hidden, weight = torch.randn(4096, 8, requires_grad=True), torch.randn(1024, 8)
    labels = torch.zeros(4096, dtype=torch.int64)
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(hidden, weight, torch.zeros(1024), labels).backward()
    assert max(event.cpu_memory_usage for event in profile.events()) < 4 * 2**20


@pytest.mark.parametrize("function", [linear_cross_entropy, in_triton])
def test_validation_makes_no_gradients(function: Callable, device: torch.device) -> None:
    leaves, labels = make_case(7, torch.float32, device)
    with torch.no_grad():
        loss = function(*leaves, labels)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(function(*leaves, labels).item())


def test_twice_the_same_bits(device: torch.device) -> None:
    leaves, labels = make_case(40, torch.float32, device)
    for one, two in zip(*(run(in_triton, leaves, labels) for _ in range(2)), strict=True):
        assert torch.equal(one, two)


def test_wrong_input_is_refused() -> None:
    leaves, labels = make_case(4, torch.float32)
    with pytest.raises(TypeError, match="one dtype"):
        linear_cross_entropy(leaves[0].half(), *leaves[1:], labels)
    with pytest.raises(ValueError, match=r"hidden \(M, D\)"):
        linear_cross_entropy(*leaves, labels[:3])
    for dtype in (torch.float32, torch.int32, torch.bool):
        with pytest.raises(TypeError, match=r"labels must be int64, not torch\."):
            linear_cross_entropy(*leaves, labels.to(dtype))
    for counted in (-1, 5):
        with pytest.raises(ValueError, match=f"counted must be between 0 and 4, not {counted}"):
            linear_cross_entropy(*leaves, labels, counted)


def test_registration(device: torch.device, opcheck: Callable[..., None]) -> None:
    leaves, labels = make_case(7, torch.float32, device)
    detached = [leaf.detach() for leaf in leaves]
    opcheck(_linear_cross_entropy, (*leaves, labels, 7, True, device.type == "cuda"))
    opcheck(_linear_cross_entropy, (*detached, labels, 5, False, device.type == "cuda"))


@pytest.mark.gpu
def test_one_graph_for_every_number_of_rows(compiles_twice: Callable[..., None]) -> None:
    cases = []
    for rows in (7, 300, 64, 2, 129, 40, 31, *range(3, 120, 9)):
        leaves, labels = make_case(rows, torch.bfloat16, "cuda")
        cases.append([leaf.detach() for leaf in leaves] + [labels])
    assert len(cases) >= 20
    compiles_twice(linear_cross_entropy, cases)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_and_memory_is_bounded() -> None:
    """At base size: the products and passes take at most 1 GiB beside the inputs."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    leaves, labels = make_case(19_660, torch.bfloat16, "cuda", 50_368, 768)
    run(linear_cross_entropy, leaves, labels)  # compiles
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = run(linear_cross_entropy, leaves, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    print(f"peak {peak:.2f} GiB beside the inputs")
    assert peak <= 1
    assert results[0].item() > 0


@pytest.mark.parametrize("needed", [False, True])
def test_gradients_are_made_where_anything_needs_one(
    needed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Tensor] = []
    product = module._product
    monkeypatch.setattr(module, "_product", lambda *a, **k: made.append(a[0]) or product(*a, **k))
    leaves, labels = make_case(9)
    values = [leaf.detach() for leaf in leaves]
    values[0].requires_grad_(needed)
    linear_cross_entropy(*values, labels)
    assert len(made) == (2 if needed else 0)
