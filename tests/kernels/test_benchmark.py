"""What of the benchmark runs anywhere: its layouts, its tables, and what it says on a CPU."""

import gc
import sys
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from common.commit import project_commit
from kernels import (
    benchmark,
    benchmark_attention,
    benchmark_cases,
    local_attention,
    local_attention_tiles,
)
from kernels.benchmark_attention import candidates, name_of, seen_pairs
from kernels.benchmark_cases import _adamw, _both_passes, base_parameters
from kernels.benchmark_layouts import Case, bucketed, layouts, token_ids
from kernels.local_attention_tiles import NARROW
from kernels.stable_adamw import apply_update_reference, update_moments_reference
from model import attention


@pytest.mark.parametrize("tokens", [65_536, 16_384, 12_288, 10_000, 1000])
def test_layouts_fill_the_tokens(tokens: int) -> None:
    for name, lengths in layouts(tokens).items():
        assert min(lengths) > 0, name
        assert sum(lengths) == tokens, name
    assert 20 < tokens / len(layouts(tokens)["code titles"]) < 32


def test_skewed_is_skewed() -> None:
    lengths = layouts(65_536)["skewed"]
    assert sorted(set(lengths)) == [16, 8192]
    assert sum(lengths) == 65_536


def test_token_ids_have_runs_of_every_length() -> None:
    longest = {}
    for name, ids in token_ids(65_536, 50_368).items():
        assert ids.shape == (65_536,)
        assert ids.amin() >= 0
        counts = ids.bincount(minlength=50_368)
        assert len(counts) == 50_368
        longest[name] = int(counts.amax())
    assert longest["uniform"] < 20
    assert 3000 < longest["Zipf"] < 3500
    assert longest["one token"] == 65_536


def test_share_of_the_roofline_and_files(tmp_path: Path) -> None:
    table = benchmark.Table(benchmark.Roofline(copy=4e12, product=800e12))
    case = Case(
        "geglu", "any", [], {}, {"forward": 4_000_000, "both": 4_000_000}, {"both": 8 * 10**9}
    )
    table.add(case, "forward", "ours", 2.0, 2**29)
    table.add(case, "both", "ours", 20.0, None)
    first, second = table.rows
    assert (first["tb_per_s"], first["share_of_roofline"], first["gib"]) == ("2.00", "0.50", "0.50")
    assert (second["tflop_per_s"], second["share_of_roofline"]) == ("400", "0.50")
    path = tmp_path / "new" / "results.csv"
    results = benchmark.merge(benchmark.read_csv(path), table.rows, "one GPU")
    benchmark.write_csv(path, *results)
    lines = path.read_text().splitlines()
    assert lines[0] == "# geglu: one GPU"
    assert lines[1] == ",".join(benchmark.COLUMNS)
    assert len(lines) == 4
    benchmark.plot(tmp_path, *results)
    assert (tmp_path / "geglu.png").stat().st_size > 1000


def test_a_run_in_pieces_keeps_what_it_did_not_measure(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"

    def measured(op: str, us: str) -> dict[str, str]:
        return dict.fromkeys(benchmark.COLUMNS, "") | {"op": op, "us": us}

    pieces = [
        ([measured("rope", "1"), measured("unpad", "2"), measured("pad", "3")], "one GPU: A"),
        ([measured("geglu", "4")], "another"),
        ([measured("unpad", "5"), measured("unpad", "6"), measured("pad", "7")], "another"),
    ]
    for rows, header in pieces:
        benchmark.write_csv(path, *benchmark.merge(benchmark.read_csv(path), rows, header))
    rows, headers = benchmark.read_csv(path)
    found = [(row["op"], row["us"]) for row in rows]
    assert found == [("rope", "1"), ("unpad", "5"), ("unpad", "6"), ("pad", "7"), ("geglu", "4")]
    assert headers == {
        "rope": "one GPU: A", "unpad": "another", "pad": "another", "geglu": "another"
    }  # fmt: skip
    other = measured("rope", "8") | {"layout": "even, 64 tokens"}
    benchmark.write_csv(path, *benchmark.merge((rows, headers), [other], "a third"))
    rows, headers = benchmark.read_csv(path)
    assert {row["us"] for row in rows if row["op"] == "rope"} == {"1", "8"}
    assert (headers["rope"], headers["rope at 64 tokens"]) == ("one GPU: A", "a third")
    drawn = [row | {"share_of_roofline": "0.5"} for row in rows if row["op"] == "rope"]
    benchmark.plot(tmp_path, drawn, headers)
    assert {file.name for file in tmp_path.glob("*.png")} == {"rope.png", "rope at 64 tokens.png"}
    path.write_text(path.read_text().replace("# rope: one", "# one"))
    with pytest.raises(ValueError, match=r"does not say where \['rope'\] were measured"):
        benchmark.read_csv(path)


def test_results_that_are_kept_can_be_added_to() -> None:
    path = Path(__file__).parent.parent.parent / "benchmarks" / "results" / "kernels_h200.csv"
    rows, headers = benchmark.read_csv(path)
    assert {benchmark._measured(row) for row in rows} == headers.keys()
    assert set(rows[0]) == set(benchmark.COLUMNS)


def test_a_cpu_is_told_what_it_cannot_do() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        benchmark.main([])


@pytest.mark.parametrize(("length", "window"), [(1, 0), (7, 2), (7, 6), (7, 64), (130, 64)])
def test_pairs_within_a_window(length: int, window: int) -> None:
    near = [abs(i - j) <= window for i in range(length) for j in range(length)]
    assert seen_pairs(length, window) == sum(near)


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases are made on a CPU, with few sets of inputs."""
    randint = torch.randint
    monkeypatch.setattr(benchmark_cases, "sets_of", lambda size: range(2))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(torch, "randint", lambda *sizes, device: randint(*sizes))
    monkeypatch.setattr(
        benchmark_cases, "random_tensor", lambda *sizes, grad=True: torch.ones(sizes).bfloat16()
    )


def test_of_unpad_the_least_is_every_number_once(on_a_cpu: None) -> None:
    first, *_ = benchmark_cases.make("unpad", 4096)
    mask, ids, hidden = first.inputs[0]
    real = int(mask.sum())
    assert mask.shape == ids.shape == hidden.shape[:2] == (4, 1024)
    packed = real * (ids.itemsize + hidden[0, 0].nbytes)
    forward = mask.nbytes + 2 * packed + 4 * real + 4 * mask.numel()
    backward = (real + mask.numel()) * hidden[0, 0].nbytes + 4 * mask.numel()
    least = {"forward": forward, "backward": backward, "both": forward + backward}
    assert first.bytes == least
    assert list(first.who) == ["ours", "reference", "torch.compile"]
    for who, function in first.who.items():
        assert sum(out.nbytes for out in function(*first.inputs[0])) == packed, who
    _, back, *_ = benchmark_cases.make("unpad", 4096)
    assert list(back.who) == ["ours", "reference", "torch.compile"]
    forward = packed + mask.numel() * (ids.itemsize + hidden[0, 0].nbytes + 4)
    backward = real * (2 * hidden[0, 0].nbytes + 4)
    assert back.bytes == {"forward": forward, "backward": backward, "both": forward + backward}


def test_fills_of_unpad_are_as_documented(on_a_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_cases, "unpad", lambda *_: (None, []))
    monkeypatch.setattr(benchmark_cases, "random_tensor", lambda *sizes: torch.zeros(()))
    fills = [case.layout for case in benchmark_cases.make("unpad", 65_536)]
    assert fills == 2 * ["64x1024 51%"] + 2 * ["32x8192 25%"]


def test_rotary_of_others_has_nothing_else_to_do(
    on_a_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch writes nothing over, and flash-attn's tables are of its dtype beforehand."""
    asked: list[list[torch.Tensor]] = []
    theirs = ModuleType("flash_attn.ops.triton.rotary")
    theirs.apply_rotary = lambda x, *tables, **options: asked.append([x, *tables])
    for name in ("flash_attn", "flash_attn.ops", "flash_attn.ops.triton"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, theirs.__name__, theirs)
    monkeypatch.setattr(benchmark_cases, "version_of", lambda package: "2")
    case = next(benchmark_cases.make("rope_in_place", 1024))
    qkv, *others = case.inputs[0]
    before = qkv.clone()
    turned = case.who["reference"](qkv, *others)
    assert torch.equal(qkv, before)
    for inputs in 2 * [case.inputs[0]]:
        case.who["flash-attn"](*inputs)
    assert [tensor.data_ptr() for tensor in asked[0]] == [t.data_ptr() for t in asked[1]]
    assert all(tensor.dtype == torch.bfloat16 for tensor in asked[0])
    assert asked[0][0].data_ptr() == qkv.data_ptr()
    assert turned.shape == qkv[:, :2].shape


@pytest.mark.parametrize("walks", [False, True])
def test_a_record_says_what_it_timed(walks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(local_attention, "pipelined", lambda *_: walks)
    roofline = benchmark.Roofline(copy=4e12, product=800e12)
    line = benchmark.describe_run(roofline, {"flash-attn": None, "liger-kernel": "0.8"})
    assert line.startswith(f"a GPU, commit {project_commit()}, torch ")
    assert line.endswith(
        "liger-kernel 0.8, copy 4.00 TB/s, bf16 product 800 TFLOP/s; "
        f"{'local_attention by walks, and ' * walks}local_attention in tiles {name_of(NARROW)}"
    )


def test_the_page_names_the_tiles_that_were_timed_and_those_in_use() -> None:
    """Which may differ, as long as whoever reads the figures is told."""
    root = Path(__file__).parent.parent.parent
    _, headers = benchmark.read_csv(root / "benchmarks" / "results" / "kernels_h200.csv")
    _, timed = headers["local_attention"].split("local_attention in tiles ")
    page = (root / "docs" / "kernels.md").read_text()
    assert f"`{timed}`" in page
    assert f"`{name_of(NARROW)}`" in page
    assert timed == name_of(NARROW) or f"`{name_of(NARROW)}` has not been timed" in page


def test_tuning_varies_one_kernel_of_what_is_in_use() -> None:
    first, *others = candidates(NARROW)
    assert first == NARROW
    for tuning in others:
        changed = [field for field, tiles in vars(tuning).items() if tiles != vars(NARROW)[field]]
        assert len(changed) == 1, tuning
    assert len(set(others)) == len(others)


@pytest.fixture
def without_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases of attention are made without a GPU and without anything to compute."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(benchmark_attention, "random_tensor", lambda *sizes: torch.zeros(()))
    monkeypatch.setattr(benchmark_attention, "document_bounds", lambda *_: torch.zeros(()))
    monkeypatch.setattr(benchmark_attention, "positions_from", lambda *_: torch.zeros(()))


@pytest.mark.usefixtures("without_inputs")
def test_short_documents_are_measured_as_the_model_takes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Behind long ones, or alone; where they lie among them, as in notes, nobody does."""
    asked: dict[int, int] = {}

    def long_ends(ends: Tensor, longest: int, window: int | None, deterministic: bool) -> Tensor:
        return ends

    def windows(ends: Tensor, tokens: int, first: int, before: Tensor | None) -> None:
        assert tokens == int(ends[-1]) == 65_536
        assert first == (0 if before is None else int(before[-1]))
        asked[first] = 0 if before is None else len(before) - 1

    monkeypatch.setattr(benchmark_attention, "version_of", "flash-attn-4".__eq__)
    monkeypatch.setattr(benchmark_attention, "_fa4", lambda *_: None)
    monkeypatch.setattr(benchmark_attention, "_fa4_in_place", long_ends)
    monkeypatch.setattr(benchmark_attention, "_windows", windows)
    ours = {
        case.layout: [who for who in case.who if "ours" in who]
        for case in benchmark_attention.make_global(65_536)
    }
    titles = {"code titles", "code titles, bucketed"}
    assert {layout for layout, who in ours.items() if who == ["ours, as windows"]} == titles
    apart = {layout for layout, who in ours.items() if who == ["FA4 and ours"]}
    assert apart == {"skewed", "notes and code titles"}
    notes = [length for length in layouts(32_768)["notes"] if length > attention.SHORT_DOCUMENTS]
    assert asked == {0: 0, 2 * 8192: 2, sum(notes): len(notes)}
    assert benchmark_attention.SHORT_DOCUMENTS == attention.SHORT_DOCUMENTS


def test_a_reference_is_measured_where_all_pairs_fit(
    without_inputs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_attention, "pipelined", lambda *_: False)
    for tokens, there in ((8192, True), (16_384, False)):
        for make in (benchmark_attention.make_local, benchmark_attention.make_global):
            for case in make(tokens):
                assert ("reference" in case.who) == there


def test_the_references_see_what_others_see() -> None:
    ends = torch.tensor([0, 200, 205, 205, 256], dtype=torch.int32)
    qkv = torch.randn(256, 3, 2, 16, generator=torch.Generator().manual_seed(0))
    expected = attention.reference_attention(qkv, None, ends, ends, 200, None)
    torch.testing.assert_close(benchmark_attention._masked(ends, 256)(qkv), expected)
    still = (torch.ones(1, 8), torch.zeros(1, 8), torch.zeros(256, dtype=torch.int64))
    out = benchmark_attention._local_reference(ends, qkv, *still, torch.zeros(()))
    torch.testing.assert_close(out, attention.reference_attention(qkv, None, ends, ends, 200, 64))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are compiled")
@pytest.mark.parametrize("long", [0, 1])
def test_windows_see_what_others_see(long: int) -> None:
    """Value and gradient, behind what somebody else computes of the first document."""
    ends = torch.tensor([0, 20, 25, 25, 40], dtype=torch.int32)
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(40, 3, 12, 64, generator=draw).requires_grad_()
    grad = torch.randn(40, 12, 64, generator=draw)
    expected = attention.reference_attention(qkv, None, ends, ends, 20, None)
    (gradient,) = torch.autograd.grad(expected, qkv, grad)

    def forward(_: Tensor) -> tuple[Tensor, ...]:
        return (torch.where(torch.arange(40)[:, None, None] < 20, expected.detach(), torch.nan),)

    def backward(grad: Tensor, qkv: Tensor, grad_qkv: Tensor, out: Tensor) -> None:
        grad_qkv[:20] = gradient[:20]

    before = (forward, backward) if long else None
    out = benchmark_attention._windows(ends, 40, 20 * long, before)(qkv)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(out, qkv, grad)[0], gradient, rtol=1e-4, atol=1e-5
    )


def test_tuning_varies_the_same_in_every_layout(
    without_inputs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the layout before was measured with last."""
    usual = local_attention_tiles.NARROW
    monkeypatch.setattr(local_attention_tiles, "NARROW", usual)
    monkeypatch.setattr(benchmark_attention, "_local", lambda *_: ())
    monkeypatch.setattr(local_attention, "WALKS", True)
    found = []
    for case in benchmark_attention.make_local(16_384, tune=True):
        found.append(list(case.who))
        for measure in case.who.values():
            measure()
            assert not vars(local_attention)["WALKS"]
        assert vars(local_attention_tiles)["NARROW"] != usual
    assert len(found) == 3
    assert found == [[name_of(tuning) for tuning in candidates(usual)]] * 3
    assert vars(local_attention_tiles)["NARROW"] == usual
    assert vars(local_attention)["WALKS"]


@pytest.mark.parametrize("walks", [False, True])
def test_both_of_ours_are_measured_where_there_are_two(
    walks: bool, without_inputs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[bool] = []
    monkeypatch.setattr(local_attention, "WALKS", True)
    monkeypatch.setattr(local_attention, "pipelined", lambda *_: walks)
    monkeypatch.setattr(
        benchmark_attention, "_local", lambda *_: taken.append(local_attention.WALKS)
    )
    monkeypatch.setattr(benchmark_attention, "version_of", lambda package: None)
    for case in benchmark_attention.make_local(16_384):
        mine = [who for who in case.who if who.startswith("ours")]
        assert mine == ["ours", "ours, by tiles"][: 1 + walks]
        for who in mine:
            case.who[who]()
    assert taken == [True, False][: 1 + walks] * 6
    assert vars(local_attention)["WALKS"]


def test_what_does_not_fit_takes_the_place_of_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part of an operation's layouts would replace all of an earlier run's."""

    def make(name: str, tokens: int) -> Iterator[Case]:
        yield Case(name, "even", [], {}, {})
        if name == "rope":
            raise torch.OutOfMemoryError("no room")
        if name == "pad":
            raise ModuleNotFoundError("a peer's")
        if name == "unpad":
            raise ValueError("ours")

    roofline = benchmark.Roofline(copy=4e12, product=800e12)
    monkeypatch.setattr(benchmark, "measure_roofline", lambda: roofline)
    monkeypatch.setattr(benchmark, "describe_run", lambda *_: "a GPU")
    monkeypatch.setattr(benchmark.cases, "make", make)
    monkeypatch.setattr(
        benchmark,
        "run_case",
        lambda case, table: table.rows.append({"op": case.op, "layout": case.layout}),
    )
    *_, (rows, _) = benchmark.measure(["geglu", "rope", "pad"], [64], tune=False)
    assert rows == [{"op": "geglu", "layout": "even, 64 tokens"}]
    said = capsys.readouterr().out
    assert "rope, 64 tokens: not measured" in said
    assert "pad, 64 tokens: not measured: ModuleNotFoundError: a peer's" in said
    *_, (rows, _) = benchmark.measure(["geglu"], [64, 65_536], tune=False)
    assert [row["layout"] for row in rows] == ["even, 64 tokens", "even"]
    with pytest.raises(ValueError, match="ours"):
        list(benchmark.measure(["unpad"], [64], tune=False))


def test_flex_attention_sees_what_others_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    ends = torch.tensor([0, 200, 205, 256], dtype=torch.int32)
    qkv = torch.randn(256, 3, 2, 16, generator=torch.Generator().manual_seed(0))
    expected = attention.reference_attention(qkv, None, ends, ends, 200, 64)
    torch.testing.assert_close(benchmark_attention.flex(ends, 256, 64)(qkv), expected)


class _Memory:
    """Of a GPU what `peak_memory` asks: bytes, and their peak since it was reset."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = self.most = 0
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.most)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: self.take(0, reset=True))

    def take(self, size: int, reset: bool = False) -> None:
        self.now += size
        self.most = self.now if reset else max(self.most, self.now)

    def in_a_cycle(self, size: int) -> None:
        """Memory that only the collector gives back."""

        class Node:
            itself: object

        node = Node()
        node.itself = node
        self.take(size)
        weakref.finalize(node, self.take, -size)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> _Memory:
    return _Memory(monkeypatch)


def test_garbage_from_before_does_not_lower_the_peak(memory: _Memory) -> None:
    def call(given: torch.Tensor) -> list[torch.Tensor]:
        memory.take(300)
        gc.collect()
        memory.take(-200)
        # Of 100 bytes; what was given, a part of it, and the same once more take none.
        result = torch.zeros(25)
        return [result, result[3:], given, given[1:]]

    gc.collect()
    gc.disable()
    try:
        memory.in_a_cycle(250)
        assert benchmark.peak_memory(partial(call, torch.zeros(1000))) == 300
    finally:
        gc.enable()


def test_a_peak_below_what_was_returned_is_not_believed(
    memory: _Memory, capsys: pytest.CaptureFixture[str]
) -> None:
    memory.take(250)

    def call(given: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        memory.take(-250)  # something from before
        memory.take(300)
        return torch.zeros(20), torch.zeros(5), *given

    assert benchmark.peak_memory(partial(call, [torch.zeros(1000)])) is None
    assert "a peak of 50 bytes, where 100 were returned" in capsys.readouterr().out


def test_directions_hand_out_what_they_make() -> None:
    """So that the peak of memory can be compared with it."""
    x = torch.ones(3, requires_grad=True)
    case = Case("any", "", [[x]], {}, dict.fromkeys(("forward", "backward", "both"), 1))
    sizes = {}
    for direction, calls in benchmark._directions(case, lambda x: (2 * x, x + 1)):
        sizes[direction] = benchmark._new_bytes(calls[0](), calls[0])
    assert sizes == {"forward": 24, "backward": 12, "both": 12}


def test_buckets_are_those_of_training() -> None:
    titles = layouts(65_536)["code titles"]
    lengths, longest = bucketed(titles)
    batch = pytest.importorskip("train.batch")
    assert len(titles) <= len(lengths) < len(titles) + batch.DOCUMENTS_MULTIPLE
    assert len(lengths) % batch.DOCUMENTS_MULTIPLE == 0
    assert longest == batch.seqlen_bucket(max(titles))
    assert lengths[: len(titles)] == titles
    assert sum(lengths) == 65_536


def test_the_optimizers_compared_take_a_step() -> None:
    assert sum(base_parameters()) == 149_655_232
    state = [torch.ones(8) for _ in range(4)]
    ones = [torch.ones(2), torch.ones(2), torch.ones(()), torch.zeros(())]
    passes = update_moments_reference, apply_update_reference
    sums = _both_passes(*passes, ((0, 5), (5, 8)), *state, *ones)
    assert isinstance(sums, torch.Tensor)
    assert sums.tolist() == [5, 3]
    assert bool((state[3] < 1).all())
    for fused in (True, False):
        apart = [torch.ones(n) for _ in range(4) for n in (5, 3)]
        _adamw(fused, *apart, torch.ones(()), torch.ones(()))
        assert all(bool((weights < 1).all()) for weights in apart[6:])


class _Asks(torch.autograd.Function):
    """Attention whose backward says whether torch is set to deterministic algorithms."""

    @staticmethod
    def forward(ctx, q: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        return q.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        return torch.full_like(grad, float(torch.are_deterministic_algorithms_enabled()))


def test_torch_attention_is_measured_in_both_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode is on in the backward of the one that has it in its name, whenever it is called."""
    monkeypatch.setattr(benchmark_attention, "varlen_attn", lambda q, *_, **__: _Asks.apply(q))
    monkeypatch.setattr(benchmark_attention, "version_of", lambda package: None)
    who = benchmark_attention._others(torch.tensor([0, 2]), 2, None)
    assert list(who) == ["varlen_attn", "varlen_attn, deterministic"]
    qkv = torch.ones(2, 3, 1, 4, requires_grad=True)
    outs = [attend(qkv) for attend in who.values()]
    for _ in range(2):
        for asked, out in enumerate(outs):
            (gradient,) = torch.autograd.grad(out, qkv, torch.ones_like(out), retain_graph=True)
            assert bool((gradient[:, 0] == asked).all())
            assert not torch.are_deterministic_algorithms_enabled()
            assert torch.utils.deterministic.fill_uninitialized_memory
    with torch.no_grad():
        assert not who["varlen_attn, deterministic"](qkv).requires_grad
