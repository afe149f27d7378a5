"""Where the time of a step goes: the parts of kernels, of traces, and of a step on a GPU."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from train.benchmark import cases, measure, parts, plain
from train.benchmark.parts import Kernel
from train.ranks import Ranks


@pytest.mark.parametrize(
    ("name", "where", "expected"),
    [
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", "model", "gemm"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "model", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "model", "gemm"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "model", "gemm"),
        ("triton_tem_fused_mm_12", "model", "gemm"),
        ("kernel_cutlass_kernel_flash_attncuteflash_fwdFlashAttentionSm90", "model", "attention"),
        ("void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<>", "model", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention)", "model", "attention"),
        ("_local_attention_forward_kernel", "model", "attention"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_clone_3", "model", "memory_bound"),
        ("triton_red_fused_native_layer_norm_backward_7", "model", "memory_bound"),
        ("_rope_in_place_kernel", "model", "memory_bound"),
        ("void at::native::vectorized_elementwise_kernel<4, GeluCUDA>", "model", "memory_bound"),
        ("void at::native::multi_tensor_apply_kernel<>", "optimizer", "optimizer"),
        ("sm90_xmma_gemm_f32f32", "optimizer", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<4, Add>", "engine", "engine"),
        ("Memcpy DtoD (Device -> Device)", "engine", "engine"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage)", "model", "engine"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "optimizer", "engine"),
    ],
)
def test_a_kernel_has_its_part(name: str, where: str, expected: str) -> None:
    assert parts.category(Kernel(name, 0, 1, where)) == expected


def test_our_kernels_are_called_what_the_parts_are_told_by() -> None:
    kernels = Path(parts.__file__).parent.parent.parent / "kernels"
    source = "".join(path.read_text() for path in kernels.glob("local_attention*.py"))
    names = re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)
    assert len(names) == 5
    for name in names:
        assert parts.category(Kernel(name, 0, 1)) == "attention"


def test_time_counts_once_and_the_rest_is_idle() -> None:
    def bound(start: float, step: int) -> Kernel:
        return Kernel("_start_of_a_step", start, start, step=step)

    kernels = [
        bound(-1000, 0),
        Kernel("nvjet_one", 0, 4000, step=1),
        # Hidden behind a product but for its last millisecond.
        Kernel("ncclDevKernel_ReduceScatter", 1000, 5000, step=1),
        Kernel("_local_attention_forward_kernel", 6000, 8000, step=1),
        # Two at once.
        Kernel("triton_poi_fused_add_1", 8000, 9000, step=1),
        Kernel("triton_poi_fused_add_2", 8500, 9500, step=1),
        Kernel("_apply_kernel", 9500, 10_000, "optimizer", step=1),
        bound(12_000, 2),
    ]
    found = parts.split(kernels)
    assert found is not None
    assert found.steps == 1
    assert found.parts == pytest.approx(
        {
            "gemm": 4,
            "attention": 2,
            "memory_bound": 1.5,
            "optimizer": 0.5,
            "engine": 1,
            "idle": 12 - 9,
        }
    )


def event(kind: str, name: str, thread: int, ts: float, dur: float, **more: Any) -> dict[str, Any]:
    """An event of a trace in Chrome's format, times in microseconds."""
    known = {"ph": "X", "cat": kind, "name": name, "tid": thread, "ts": ts, "dur": dur}
    return known | {"args": more}


# Kind, name, stream, start and end on the device, and the recorded step that launched it.
WORK = [
    ("kernel", "nvjet_of_the_step_before", 7, 500, 1500, None),
    ("kernel", "nvjet", 7, 1500, 2500, 0),
    # The first whole step; what is idle before it is not its own.
    ("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 7, 3000, 3100, 1),
    ("kernel", "nvjet", 7, 3100, 5100, 1),
    ("kernel", "ncclDevKernel_ReduceScatter", 20, 4100, 6100, 1),
    ("kernel", "triton_poi_fused_add", 7, 6500, 7000, 1),
    # The second one.
    ("kernel", "void at::native::FillFunctor", 7, 7200, 7210, 2),
    ("kernel", "nvjet", 7, 7250, 9250, 2),
    ("gpu_memset", "Memset (Device)", 20, 9250, 9450, 2),
    ("kernel", "ncclDevKernel_AllGather", 20, 9450, 9900, 2),
    # Where it ends.
    ("kernel", "void at::native::FillFunctor", 7, 9500, 9510, 3),
    ("kernel", "nvjet", 7, 9900, 12_000, 3),
]


def trace() -> list[dict[str, Any]]:
    """Four steps of which the device does what WORK says, and the host launches it long before."""
    events = [event("user_annotation", "benchmark: one step", 1, 100 * n, 90) for n in range(4)]
    for link, (kind, name, stream, start, end, step) in enumerate(WORK):
        if step is not None:
            # Half of it from autograd's thread.
            at = 100 * step + 1 + link
            events.append(event("cuda_runtime", "launch", 1 + link % 2, at, 1, correlation=link))
        events.append(event(kind, name, stream, start, end - start, correlation=link))
    events.append(event("gpu_user_annotation", "benchmark: one step", 7, 0, 50_000))
    # A trace is in no order.
    return events[::-1]


def test_a_whole_step_is_from_its_first_kernel_to_the_first_of_the_next() -> None:
    """Two steps on two streams: gaps within and between them, copies and overlaps."""
    found = parts.split(parts.read_kernels(trace()))
    assert found is not None
    idle = (6500 - 6100) + (7200 - 7000) + (7250 - 7210)
    sums = {
        "gemm": 2000 + 2000,
        "attention": 0,
        "memory_bound": 100 + 500 + 10 + 200,
        "optimizer": 0,
        "engine": (6100 - 5100) + (9500 - 9450),
        "idle": idle,
    }
    assert sum(sums.values()) == 9500 - 3000
    assert found.parts == pytest.approx({name: us / 1000 / 2 for name, us in sums.items()})
    assert found.steps == 2
    # The longest first, hidden time and all; what lies across a border counts inside of it.
    assert found.kernels[:3] == [
        (2.0, 1.0, "gemm", "nvjet"),
        (1.0, 0.5, "engine", "ncclDevKernel_ReduceScatter"),
        (0.25, 0.5, "memory_bound", "triton_poi_fused_add"),
    ]
    assert len(found.kernels) == 7


@pytest.mark.parametrize("without", [{1, 2, 3}, {1, 2}, {0, 1, 2, 3}])
def test_without_a_whole_step_nothing_is_said(without: set[int]) -> None:
    kernels = [one for one in parts.read_kernels(trace()) if one.step not in without]
    assert parts.split(kernels) is None


class Idle:
    """An engine of which the profiler may watch what the loop calls."""

    def optimizer_step(self) -> None: ...

    def step(self) -> None: ...

    def backward(self) -> None: ...


def test_steps_are_recorded_right_behind_those_that_warm_up() -> None:
    taken = []

    def take() -> None:
        engine.step()
        taken.append(torch.ones(3).cos())

    engine = Idle()
    events = parts.record(engine, take, warm_up=4, steps=3)
    assert len(taken) == 7
    names = [one["name"] for one in events if one.get("cat") in ("user_annotation", "cpu_op")]
    for name in ("benchmark: one step", "benchmark: step", "aten::cos"):
        assert names.count(name) == 3, name
    assert not vars(engine)


def test_a_trace_says_where_a_kernel_was_launched() -> None:
    """Two threads: the main one, 1, and autograd's, 2."""

    evaluate = "autograd::engine::evaluate_function: "
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
        event("user_annotation", "benchmark: backward", 1, 100, 100),
        event("cpu_op", evaluate + "MmBackward0", 2, 110, 10),
        event("cpu_op", evaluate + "torch::autograd::AccumulateGrad", 2, 130, 10),
        event("user_annotation", "benchmark: whole step", 1, 300, 100),
        event("user_annotation", "benchmark: step", 1, 320, 70),
        event("user_annotation", "Optimizer.step#StableAdamW.step", 1, 330, 20),
        event("gpu_user_annotation", "benchmark: step", 7, 0, 10_000),
    ]
    launched = {  # where: thread and moment
        "model": [(1, 50), (2, 115), (2, 150)],
        "engine": [(2, 135), (1, 190), (1, 325), (1, 360)],
        "optimizer": [(1, 310), (1, 340)],
    }
    number = itertools.count(1)
    for where, places in launched.items():
        for thread, moment in places:
            link = next(number)
            kind = "cuda_driver" if link % 2 else "cuda_runtime"
            events.append(event(kind, "cuLaunchKernelEx", thread, moment, 1, correlation=link))
            events.append(event("kernel", where, 7, 1000 + link, 0.5, correlation=link))
    events.append(event("gpu_memset", "model", 7, 2000, 1, correlation=999))
    events.append(event("cuda_runtime", "cudaDeviceSynchronize", 1, 330, 1))
    found = parts.read_kernels(events)
    assert len(found) == 10
    for kernel in found:
        assert kernel.where == kernel.name
    assert found[0].end - found[0].start == pytest.approx(0.5)


@pytest.mark.gpu
@pytest.mark.usefixtures("joined")
def test_parts_of_a_step_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda", 0)
    run = cases.resolve_case(cases.TINY, None, [], 1, on_gpu=True)
    starts: list[Callable[..., Any]] = [measure.with_engine, plain.without_engine]
    effort = measure.Effort(3, seconds=0.5, warm_up_s=0.5, parts_s=0.2)
    for start in starts:
        found = measure.measure(run, Ranks(), device, start, effort)
        assert len(found.seconds) > 3
        assert found.breakdown is not None
        assert found.breakdown.steps >= 2
        assert found.breakdown.parts["idle"] >= 0
        assert None not in found.interruptions.values()
        assert set(found.breakdown.parts) == set(parts.PARTS)
        for name in ("gemm", "attention", "memory_bound", "optimizer", "engine"):
            assert found.breakdown.parts[name] > 0, name
        assert found.memory_gib is not None
        assert found.memory_gib > 0
