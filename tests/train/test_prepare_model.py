"""Compiled layers, recomputation and 8-bit products: the same training, in few compilations."""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from common.config import ConfigError
from kernels.geglu import geglu_reference
from model.attention import SHORT_DOCUMENTS, LongDocuments
from model.config import ModernBertConfig
from model.modernbert import ModernBertForMaskedLM
from train import loop
from train import prepare_model as prepare
from train.batch import SEQLEN_RATIO, PackedBatch, seqlen_bucket
from train.config import Train
from train.loop import make_ready
from train.resolve import Run, resolve

sys.path.insert(0, str(Path(__file__).parent))
from gpus import ON_ONE_AND_TWO_GPUS

SMALL = ModernBertConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    cls_token_id=1,
    sep_token_id=2,
)
CPU = torch.device("cpu")
SCRIPT = Path(__file__).parent / "launched.py"
LEVELS = ("none", "mlp", "layer")
KINDS = 5
"""of graphs: the first layer, global layers, local layers, the last, the head"""


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Graphs are counted, but no code is generated."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(prepare, "BACKEND", counter)
    yield counter
    torch._dynamo.reset()


def make_model(config: ModernBertConfig = SMALL) -> ModernBertForMaskedLM:
    model = ModernBertForMaskedLM(config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= 4 if "Wqkv" in name else 2
    return model


def make_batch(lengths: list[int], max_seqlen: int, documents: int) -> PackedBatch:
    """A batch as the loader makes them: bounds filled up to `documents`, masked list too."""
    draw = torch.Generator().manual_seed(len(lengths))
    tokens = sum(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    masked = torch.arange(0, tokens, 4)
    labels = torch.randint(3, 64, masked.shape, generator=draw)
    labels[-len(lengths) :] = -100
    cu_seqlens = torch.cat([bounds, bounds[-1:].expand(documents - len(lengths))])
    long = max((n for n, length in enumerate(lengths, 1) if length > SHORT_DOCUMENTS), default=0)
    return PackedBatch(
        input_ids=torch.randint(3, 64, (tokens,), generator=draw),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        masked_indices=masked,
        masked_cu_seqlens=torch.searchsorted(masked[: -len(lengths)], cu_seqlens.long()).int(),
        labels=labels,
        masked_sources=torch.zeros_like(masked),
        masked_tokens=len(masked) - len(lengths),
        lengths=np.array(lengths),
        long=LongDocuments(long, sum(lengths[:long])),
    ).to(CPU)


def loss_and_gradients(
    model: ModernBertForMaskedLM, batch: PackedBatch
) -> tuple[Tensor, list[Tensor]]:
    loss = model(
        batch.input_ids,
        batch.position_ids,
        batch.cu_seqlens,
        batch.max_seqlen,
        batch.masked_indices,
        batch.labels,
        batch.masked_tokens,
        masked_cu_seqlens=batch.masked_cu_seqlens,
        long=batch.long,
    )
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def saved_bytes(model: ModernBertForMaskedLM, batch: PackedBatch) -> int:
    """What the forward keeps for the backward, parameters and tables left out."""
    tensors = [*model.parameters(), *model.buffers()]
    owned = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_and_gradients(model, batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def assert_alike(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() <= tolerance * other.norm()


def test_twenty_layouts_in_few_compilations(counter: CompileCounterWithBackend) -> None:
    """Any number of documents, however long, in one graph; compiled and eager agree throughout."""
    model, eager = (make_model(dataclasses.replace(SMALL, num_hidden_layers=7)) for _ in range(2))
    prepare.compile_layers(model)
    draw = np.random.default_rng(0)
    expected = KINDS
    for layout in range(20):
        cuts = np.sort(draw.choice(np.arange(1, 256), draw.integers(1, 40), replace=False))
        lengths = np.diff([0, *cuts, 256]).tolist()
        bucket = seqlen_bucket(max(lengths)) * SEQLEN_RATIO ** (layout % 3)
        batch = make_batch(lengths, bucket, 64 * (1 + layout % 5))
        loss, ours = loss_and_gradients(model, batch)
        expected_loss, theirs = loss_and_gradients(eager, batch)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
        assert_alike(ours, theirs, 1e-5)
    assert counter.frame_count == expected
    # A new phase: another base of the rotary positions, then another length.
    for one in (model, eager):
        one.set_global_rope_theta(500.0)
    batch = make_batch([200, 56], 256, 64)
    before = loss
    loss, ours = loss_and_gradients(model, batch)
    assert counter.frame_count == expected
    assert loss != before
    assert_alike(ours, loss_and_gradients(eager, batch)[1], 1e-5)
    loss_and_gradients(model, make_batch([300, 212], 512, 64))
    assert counter.frame_count == 2 * expected
    assert list(model.state_dict()) == list(eager.state_dict())


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_recomputation_changes_memory_alone(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each level keeps less; what is kept of a layer under `layer` is what goes into it."""
    monkeypatch.setattr(prepare, "BACKEND", "aot_eager")
    batch = make_batch([100, 28], 128, 64)
    kept, gradients = {}, {}
    for level in LEVELS:
        torch._dynamo.reset()
        model = make_model()
        model.set_recompute(level)
        if compiled:
            prepare.compile_layers(model)
        gradients[level] = loss_and_gradients(model, batch)[1]
        kept[level] = saved_bytes(model, batch)
        for ours, theirs in zip(gradients[level], gradients["none"], strict=True):
            assert torch.equal(ours, theirs)
    found = [kept[level] for level in LEVELS if level in kept]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == len(found)
    tokens, hidden, layers = 128, 32, 4
    # Two tensors of the hidden size go into a layer, of which the first layer's are one.
    assert kept["layer"] <= 1.5 * tokens * hidden * 4 * 2 * layers + 10 * tokens * hidden * 4


def test_compiled_runs_follow_the_eager_one_and_go_on_bit_for_bit(
    launcher: Any, data_folder: Path, phases: Callable[..., Any]
) -> None:
    """Two phases: another length, another base, growing batches; validated in between."""
    both, eager = phases(), {"compile": "none"}
    changes = {"compile": "layers", "recompute": "mlp", "phases": both}
    begun = {"phases": {"short": both["short"]}}
    # A phase is added to a run that has ended, which so goes on from its checkpoint.
    later = {"run_dir": str(launcher.folder / "begun")}
    kinds = {"eager": eager, "whole": {}, "begun": begun, "later": later}
    kinds |= {f"zero{stage}": {"zero_stage": stage} for stage in (0, 2)}
    kinds["same bits"] = {"deterministic": True}
    configs = [launcher.write(name, data_folder, **changes | kinds[name]) for name in kinds]
    waits = launcher.write("waits", data_folder)
    tasks = [*(f"traced:{config}" for config in configs), f"waits:{waits}"]
    done = launcher.run(1, *tasks, script=SCRIPT)
    assert done.code == 0, done.out + done.err
    assert "continues from" in done.out
    whole = launcher.losses("whole")
    assert len(whole) == 12
    assert launcher.losses("begun") == whole
    for name in ("eager", "zero0", "zero2", "same bits"):
        np.testing.assert_allclose(launcher.losses(name), whole, rtol=1e-5)
    assert "waited: []" in done.out


@pytest.fixture(scope="module")
def two_ranks_more(
    tmp_path_factory: pytest.TempPathFactory,
    launcher_in: Callable[[Path], Any],
    data_folder: Path,
) -> Any:
    """What the two slow tests look at, in one start."""
    launcher = launcher_in(tmp_path_factory.mktemp("two_ranks_more"))
    settings = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    runs: dict[str, dict[str, Any]] = {
        level: {"zero_stage": 3, "deepspeed": settings, "recompute": level} for level in LEVELS
    }
    runs |= {
        "whole": {"compile": "layers", "precision": "bf16"},
        "eager": {"compile": "none", "precision": "bf16"},
    }
    tasks = [f"train:{launcher.write(name, data_folder, **run)}" for name, run in runs.items()]
    done = launcher.run(2, *tasks, script=SCRIPT)
    assert done.code == 0, done.out + done.err
    return launcher


@pytest.mark.slow
def test_zero_3_recomputes_what_it_has_to_fetch_again(two_ranks_more: Any) -> None:
    """A layer's weights are on two ranks, and gathered for the second forward too."""
    for level in LEVELS:
        assert two_ranks_more.losses(level) == two_ranks_more.losses("none")


@pytest.mark.slow
def test_code_is_generated_and_two_ranks_go_on_bit_for_bit(two_ranks_more: Any) -> None:
    """By the compiler's C++, in bf16."""
    before = two_ranks_more.losses("whole")
    np.testing.assert_allclose(before, two_ranks_more.losses("eager"), rtol=2e-3)
    run_dir = two_ranks_more.folder / "whole"
    (run_dir / "checkpoints" / "step_00000012").rename(two_ranks_more.folder / "away")
    assert two_ranks_more.run(2, "--config", f"{run_dir}.yaml").code == 0
    assert two_ranks_more.losses("whole") == before


@pytest.mark.parametrize(
    ("changes", "on_gpu", "message"),
    [
        ({"compile": "layers", "zero_stage": 3}, True, "zero_stage 3 fetches.*set compile=none"),
        ({"fp8": "tensorwise"}, False, "needs a GPU; set fp8=none"),
        ({"fp8": "rowwise", "precision": "fp32"}, True, "weights are fp32; set precision=bf16"),
        ({"fp8": "rowwise", "compile": "none"}, True, "not compiled.*set compile=layers"),
        ({"fp8": "rowwise", "zero_stage": 3}, True, "not compiled.*zero_stage below 3"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], on_gpu: bool, message: str, resolved: Callable[..., Run]
) -> None:
    config = resolved(1).config
    for key, value in changes.items():
        object.__setattr__(config, key, value)
    precision = "fp32" if config.precision == "fp32" else "bf16"
    with pytest.raises(ConfigError, match=message):
        prepare.check_preparation(config, precision, on_gpu)


@pytest.mark.parametrize("fp8", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_8_bits_need_tokens_that_16_divides(
    fp8: str, data_maker: Callable[..., Path], tmp_path: Path
) -> None:
    """All of a micro-batch, which the gradient of a weight is a sum over."""
    rows = {"train": {"notes": 8}, "validation": {"notes": 2}}
    data = data_maker(tmp_path / "odd", rows, row_tokens=40)

    def resolve_it(micro_rows: int) -> Run:
        batch = {"rows": 6, "micro_rows": micro_rows}
        phase = {"data": {"dir": str(data)}, "tokens": 400, "batch": batch, "lr": {"peak": 1e-3}}
        values = {"fp8": fp8, "phases": {"main": phase}}
        return resolve(TypeAdapter(Train).validate_python(values), ranks=1, on_gpu=True)

    assert resolve_it(2).phases["main"].shape.tokens == 80
    if fp8 == "rowwise_with_gw_hp":
        assert resolve_it(3).phases["main"].shape.tokens == 120, "that gradient is in bf16"
        return
    with pytest.raises(ConfigError) as caught:
        resolve_it(3)
    assert str(caught.value) == (
        "phases.main.batch.micro_rows = 3 makes micro-batches of 120 tokens, which fp8="
        f"{fp8} needs to be a multiple of 16; set it to a multiple of 2, or fp8=rowwise_with_gw_hp"
    )


def test_auto_compiles_on_a_gpu_but_not_with_zero_3(resolved: Callable[..., Run]) -> None:
    config = resolved(1).config
    assert config.compile == "auto"
    assert prepare.compiles(config, on_gpu=True)
    assert not prepare.compiles(config, on_gpu=False)
    object.__setattr__(config, "zero_stage", 3)
    assert not prepare.compiles(config, on_gpu=True)


@pytest.fixture
def not_deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a process begins; and so it is left behind."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    prepare.set_deterministic(False)


def test_deterministic_sets_what_torch_and_cublas_need(
    not_deterministic: None, resolved: Callable[..., Run]
) -> None:
    for asked in (False, True):
        make_ready(resolved(deterministic=asked), CPU)
        assert torch.are_deterministic_algorithms_enabled() == asked
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory == (not asked)
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if asked else None)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    prepare.set_deterministic(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    make_ready(resolved(), CPU)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_deterministic_comes_before_anything_is_multiplied(
    not_deterministic: None, resolved: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuBLAS reads its variable once; on a GPU the trial of attention already multiplies."""
    seen = []

    def look(*arguments: Any) -> ModernBertForMaskedLM:
        seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        return make_model()

    monkeypatch.setattr(loop, "make_model", look)
    make_ready(resolved(deterministic=True), CPU)
    assert seen == [":4096:8"]


def scaled(values: Tensor, dtype: torch.dtype, dim: int | None, by_powers: bool) -> Tensor:
    """Values as 8 bits hold them: scaled so that the largest of all (of each along `dim`) fits.

    by_powers: the scale is the power of two below.
    """
    wide = values.double()
    largest = wide.abs().amax() if dim is None else wide.abs().amax(dim, keepdim=True)
    scale = torch.finfo(dtype).max / largest.clamp(min=1e-12)
    if by_powers:
        scale = scale.log2().floor().exp2()
    return (wide * scale).float().to(dtype).double() / scale


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_products_in_8_bits(recipe: str) -> None:
    """The three products of a linear map, against the recipe written out; only layers are changed,
    and the weights stay who they are."""
    model, plain = make_model().bfloat16(), make_model().bfloat16()
    weights = dict(model.named_parameters())
    prepare.use_fp8(model, recipe, emulate=True)
    assert dict(model.named_parameters()).keys() == weights.keys()
    assert all(weights[name] is p for name, p in model.named_parameters())
    kinds = {type(module).__name__ for module in model.head.modules()}
    assert "Float8Linear" not in kinds
    assert type(model.decoder) is type(plain.decoder)

    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    linear = model.model.layers[0].mlp.Wi
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(64, 32, generator=draw).bfloat16().requires_grad_()
    grad = torch.randn(64, 96, generator=draw).bfloat16()
    out = linear(x)
    by_x, by_weight = torch.autograd.grad(out, [x, linear.weight], grad)
    w = linear.weight.detach()
    rows, whole = (None, None) if recipe == "tensorwise" else (1, 0)
    of_grad = e5m2 if recipe == "tensorwise" else e4m3
    of_weight = None if recipe == "rowwise_with_gw_hp" else whole
    cast = functools.partial(scaled, by_powers=recipe != "tensorwise")
    expected = cast(x.detach(), e4m3, rows) @ cast(w, e4m3, rows).T
    expected_by_x = cast(grad, of_grad, rows) @ cast(w, e4m3, of_weight)
    if recipe == "rowwise_with_gw_hp":
        expected_by_weight = grad.double().T @ x.detach().double()
    else:
        expected_by_weight = cast(grad, of_grad, whole).T @ cast(x.detach(), e4m3, whole)
    for ours, theirs in (
        (out, expected),
        (by_x, expected_by_x),
        (by_weight, expected_by_weight),
    ):
        assert (ours.double() - theirs).norm() <= 5e-3 * theirs.norm()

    mlp = model.model.layers[0].mlp
    product = torch.randn(64, 96, generator=draw).bfloat16()
    activated = geglu_reference(product)
    expected = cast(activated, e4m3, rows) @ cast(mlp.Wo.weight.detach(), e4m3, rows).T
    assert (mlp.Wo(product).double() - expected).norm() <= 5e-3 * expected.norm()

    batch = make_batch([100, 28], 128, 64)
    ours, theirs = loss_and_gradients(model, batch), loss_and_gradients(plain, batch)
    torch.testing.assert_close(ours[0], theirs[0], rtol=2e-2, atol=0)


def test_8_bits_are_refused_where_they_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"8\.9 or later, this one has 8\.0; set fp8=none"):
        prepare._check_fp8(model, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    model.model.layers[0].mlp.Wi = torch.nn.Linear(32, 90, bias=False)
    with pytest.raises(ConfigError, match=r"sizes that 16 divides, the model has \[90\]"):
        prepare._check_fp8(model, CPU)


def on_gpu() -> ModernBertForMaskedLM:
    """In bf16, its heads of the usual width."""
    return make_model(dataclasses.replace(SMALL, hidden_size=128)).to("cuda", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recompute", ["none", "mlp", "layer"])
def test_on_a_gpu_compiled_and_eager_agree(recompute: str) -> None:
    """In bf16 with the GPU's own kernels, layout after layout, in few compilations."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gpu = torch.device("cuda")
    models = [on_gpu(), on_gpu()]
    models[0].set_recompute(recompute)
    prepare.compile_layers(models[0])
    for lengths, documents in (([256], 64), ([100, 150, 6], 64), ([16] * 16, 256)):
        batch = make_batch(lengths, 256, documents).to(gpu)
        (loss, ours), (expected, theirs) = (loss_and_gradients(model, batch) for model in models)
        torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
        assert_alike(ours, theirs, 3e-2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= KINDS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_on_a_gpu_8_bits_are_near(recipe: str) -> None:
    torch._dynamo.reset()
    gpu = torch.device("cuda")
    models = [on_gpu(), on_gpu()]
    prepare._check_fp8(models[0], gpu)
    prepare.use_fp8(models[0], recipe)
    prepare.compile_layers(models[0])
    batch = make_batch([200, 56], 256, 64).to(gpu)
    (loss, ours), (expected, theirs) = (loss_and_gradients(model, batch) for model in models)
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    assert_alike(ours, theirs, 0.3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_deterministic_runs_are_the_same_to_the_bit(
    launcher: Any, data_folder: Path
) -> None:
    """Compiled layers, engine and optimizer: nothing refuses the mode, and losses are the same."""
    launcher.accelerator = "cuda"
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 1}
    changes = {"deterministic": True, "model": sizes}
    configs = [launcher.write(name, data_folder, **changes) for name in ("one", "two")]
    done = launcher.run(1, *(f"train:{config}" for config in configs), script=SCRIPT)
    assert done.code == 0, done.out + done.err
    assert launcher.losses("one") == launcher.losses("two")


@ON_ONE_AND_TWO_GPUS
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_on_gpus_a_step_that_is_not_logged_waits_for_nothing(
    stage: int, gpus: int, launcher: Any, data_folder: Path
) -> None:
    """Compiled layers, engine and optimizer; waits are errors, as far as waits.py sees them."""
    launcher.accelerator = "cuda"
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 1}
    config = launcher.write("run", data_folder, zero_stage=stage, model=sizes)
    done = launcher.run(gpus, f"waits:{config}", script=SCRIPT)
    assert done.code == 0, done.out + done.err
    assert done.out.count("waited: []") == gpus
