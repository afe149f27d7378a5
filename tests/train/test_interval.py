"""Figures between two records: loss by source, speed, MFU, the slowest rank, and no wait before."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.attention import LongDocuments
from train import interval as module
from train.batch import PackedBatch
from train.flops import training_flops
from train.interval import Interval, peak_of
from train.loader import LoadedStep, StepMaker
from train.loop import accumulate
from train.masking import masked_count
from train.ranks import Ranks
from train.schedule import Progress, StepPlan

CPU = torch.device("cpu")


class ToHost(TorchDispatchMode):
    """Counts what is read from a device."""

    reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += str(func).startswith("aten._local_scalar_dense")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock's reading, to be set."""
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def losses_of(labels: Tensor) -> Tensor:
    """Some losses of labels, 0 for filler."""
    return torch.where(labels == -100, 0.0, labels % 7 + 0.5).float()


def right_of(labels: Tensor) -> Tensor:
    """Some labels are guessed right, none of them filler."""
    return ((labels != -100) & (labels % 3 == 0)).float()


class Engine:
    """What training calls of an engine, without a model."""

    def __call__(
        self,
        *batch: Any,
        each: bool,
        masked_cu_seqlens: Tensor,
        long: LongDocuments,
    ) -> tuple[Tensor, Tensor]:
        assert masked_cu_seqlens.shape == batch[2].shape
        assert long == LongDocuments(0, 0)  # no document of this data is
        # On a GPU a number would be waited for.
        assert masked_cu_seqlens.is_cuda or masked_cu_seqlens.numpy()[-1] == batch[6]
        losses_M = losses_of(batch[5])
        return losses_M.sum(), torch.stack([losses_M, right_of(batch[5])])

    def set_gradient_accumulation_boundary(self, is_last: bool) -> None:
        """Nothing is accumulated."""

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        """There are no gradients."""


def take_step(
    interval: Interval, maker: StepMaker, plan: StepPlan, device: torch.device = CPU
) -> list[PackedBatch]:
    """A step as the loop takes it; its micro-batches."""
    batches = list(maker.micro_batches(plan))
    ready = [batch if device == CPU else batch.pin() for batch in batches]
    counts, sources = maker.counts(plan), maker.sources(plan)
    loaded = LoadedStep(plan, counts, len(batches), sources, iter(ready))
    interval.add(loaded, accumulate(Engine(), interval.watch(loaded), Ranks(), device))
    return batches


@pytest.mark.usefixtures("joined")
def test_figures_are_those_of_the_rows(resolved: Callable[..., Any], seconds: list[float]) -> None:
    """Two steps in two seconds each; losses and FLOPs counted row by row."""
    run = resolved(1)
    phase, maker, loader = run.phases["main"], StepMaker(run, 0), SimpleNamespace(wait_seconds=5.0)
    interval = Interval(loader, CPU, peak=1e9)
    seconds[0] = 3.0
    interval.restart(phase)
    batches = []
    with ToHost() as to_host:
        for plan in list(run.plans(Progress()))[:2]:
            batches += take_step(interval, maker, plan)
    assert to_host.reads == 0
    seconds[0], loader.wait_seconds = 7.0, 5.5
    found = interval.close()

    sums: dict[str, list[float]] = {"notes": [], "papers": []}
    rights: dict[str, list[float]] = {"notes": [], "papers": []}
    flops = tokens = 0.0
    for number, batch in enumerate(batches):
        losses, right, at = losses_of(batch.labels), right_of(batch.labels), 0
        of_rows, lengths = {"notes": 0, "papers": 0}, []
        for row in range(2):
            address = phase.order[2 * number + row]
            read = phase.data.read("train", address.source, address.row)
            masked = masked_count(0.3, int((read.input_ids > 4).sum()))
            of_rows[address.source] += masked
            at += masked
            lengths += np.diff(read.cu_seqlens)[: len(read.documents)].tolist()
        for source, masked in of_rows.items():
            mine = batch.masked_sources[:at] == phase.shape.sources.index(source)
            assert int(mine.sum()) == masked
            sums[source] += losses[:at][mine].tolist()
            rights[source] += right[:at][mine].tolist()
        flops += training_flops(phase.model_config, lengths, at)
        tokens += sum(lengths)
    for source, values in sums.items():
        part = found["by_source"][source]
        assert part["loss"] == pytest.approx(np.mean(values))
        assert part["accuracy"] == pytest.approx(np.mean(rights[source]))
        assert part["masked_tokens"] == len(values)
    together = [*sums["notes"], *sums["papers"]]
    assert found["loss"] == pytest.approx(np.mean(together))
    assert found["accuracy"] == pytest.approx(np.mean([*rights["notes"], *rights["papers"]]))
    assert found["masked_tokens"] == len(together)
    assert found["tok_per_s"] == tokens / 4
    assert found["padded_tok_per_s"] == 2 * 8 * 64 / 4
    assert found["tflop_per_s"] == pytest.approx(flops / 4 / 1e12)
    assert found["mfu"] == pytest.approx(flops / 4 / 1e9)
    assert (found["step_s"], found["pause_s"]) == (2.0, 3.0)
    assert (found["data_wait_s"], found["data_wait_rank"]) == (0.25, 0)
    assert found["memory_resident_gib"] > 0.05
    assert found["memory_allocated_gib"] is None


@pytest.mark.usefixtures("joined")
def test_a_step_without_a_finite_loss_is_not_in_the_mean(resolved: Callable[..., Any]) -> None:
    """Its gradient is not finite either, and the optimizer leaves it out."""
    run = resolved(1)
    phase, maker = run.phases["main"], StepMaker(run, 0)
    interval = Interval(SimpleNamespace(wait_seconds=0.0), CPU, peak=None)
    plans = list(run.plans(Progress()))[:2]
    interval.restart(phase)
    take_step(interval, maker, plans[0])
    alone = interval.close()

    def spoilt(plan: StepPlan) -> None:
        loaded = LoadedStep(plan, maker.counts(plan), 1, maker.sources(plan), iter(()))
        interval.add(loaded, torch.tensor([[1.0, float("nan")], [1.0, 1.0]]))

    interval.restart(phase)
    take_step(interval, maker, plans[0])
    spoilt(plans[1])
    together = interval.close()
    for key in ("loss", "accuracy", "masked_tokens", "by_source"):
        assert together[key] == alone[key]
    interval.restart(phase)
    spoilt(plans[1])
    nothing = interval.close()
    assert (nothing["loss"], nothing["accuracy"], nothing["masked_tokens"]) == (None, None, 0)
    assert nothing["by_source"] == {}


@pytest.mark.usefixtures("joined")
def test_the_slowest_rank_is_named(
    resolved: Callable[..., Any], seconds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = resolved(1)
    monkeypatch.setattr(module, "gather", lambda peak: [peak, 3e9])
    # Another rank waits longer, does twice as much and holds less.
    monkeypatch.setattr(
        module,
        "of_all_ranks",
        lambda mine: torch.stack([mine, mine * torch.tensor([9.0, 2, 1, 1, 1, 0, 0, 0.5])]),
    )
    loader = SimpleNamespace(wait_seconds=0.0)
    interval = Interval(loader, CPU, peak=1e9)
    interval.restart(run.phases["main"])
    batches = take_step(interval, StepMaker(run, 0), next(run.plans(Progress())))
    seconds[0], loader.wait_seconds = 2.0, 0.1
    found = interval.close()
    assert (found["data_wait_s"], found["data_wait_rank"]) == (pytest.approx(0.9), 1)
    model = run.phases["main"].model_config
    flops = sum(training_flops(model, b.lengths, b.masked_tokens) for b in batches)
    assert found["mfu"] == pytest.approx(3 * flops / 2.0 / 4e9)


@pytest.mark.usefixtures("joined")
def test_without_the_peak_of_every_rank_there_is_no_mfu(
    resolved: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = resolved(1)
    monkeypatch.setattr(module, "gather", lambda peak: [peak, None])
    interval = Interval(SimpleNamespace(wait_seconds=0.0), CPU, peak=1e9)
    interval.restart(run.phases["main"])
    take_step(interval, StepMaker(run, 0), next(run.plans(Progress())))
    found = interval.close()
    assert found["mfu"] is None
    assert found["tflop_per_s"] > 0


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16", 989.4e12),
        ("NVIDIA H200", "fp32", None),
        ("NVIDIA GH900 Unheard-Of", "bf16", None),
    ],
)
def test_a_peak_is_known_or_there_is_none(
    name: str, precision: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_of(torch.device("cuda", 0), precision) == peak
    assert peak_of(CPU, precision) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("joined")
def test_on_a_gpu_nothing_is_waited_for_before_the_end(
    resolved: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, device = resolved(1), torch.device("cuda")
    monkeypatch.setattr(module, "sum_over_ranks", lambda tensor: tensor)  # gloo has none on a GPU
    interval = Interval(SimpleNamespace(wait_seconds=0.0), device, peak=1e15)
    interval.restart(run.phases["main"])
    maker, plan = StepMaker(run, 0), next(run.plans(Progress()))
    take_step(interval, maker, plan, device)
    interval.close()
    interval.restart(run.phases["main"])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = take_step(interval, maker, plan, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = interval.close()
    together = sum(losses_of(batch.labels).sum().item() for batch in batches)
    assert found["loss"] * found["masked_tokens"] == pytest.approx(together, rel=1e-6)
    assert 0 < sum(found["step_parts_s"].values()) <= found["step_s"]
    assert found["memory_reserved_gib"] >= found["memory_allocated_gib"] > 0
