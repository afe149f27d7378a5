"""Where the time of a step goes: the parts of kernels, of traces, and of a step on a GPU."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from train.benchmark import cases, measure, parts, plain
from train.benchmark.parts import Kernel
from train.ranks import Ranks

CPU = torch.device("cpu")


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
        ("_apart_kernel", "model", "memory_bound"),
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
    from kernels import local_attention

    names = [name for name in vars(local_attention) if name.endswith("_kernel")]
    assert len(names) == 3
    for name in names:
        assert parts.category(Kernel(name, 0, 1)) == "attention"


def test_time_counts_once_and_the_rest_is_idle() -> None:
    kernels = [
        Kernel("nvjet_one", 0, 4000),
        # Hidden behind a product but for its last millisecond.
        Kernel("ncclDevKernel_ReduceScatter", 1000, 5000),
        Kernel("_local_attention_forward_kernel", 6000, 8000),
        # Two at once.
        Kernel("triton_poi_fused_add_1", 8000, 9000),
        Kernel("triton_poi_fused_add_2", 8500, 9500),
        Kernel("_apply_kernel", 9500, 10_000, "optimizer"),
    ]
    found = parts.split(kernels, step_seconds=0.012)
    assert found == pytest.approx(
        {
            "gemm": 4,
            "attention": 2,
            "memory_bound": 1.5,
            "optimizer": 0.5,
            "engine": 1,
            "idle": 12 - 9,
        }
    )
    # A step as timed may be a little shorter than its kernels under the profiler.
    assert parts.split(kernels, step_seconds=0.008)["idle"] == 0


def test_a_trace_says_where_a_kernel_was_launched() -> None:
    """Two threads: the main one, 1, and autograd's, 2."""

    def event(kind: str, name: str, thread: int, ts: float, dur: float, **more: Any) -> dict:
        return {"ph": "X", "cat": kind, "name": name, "tid": thread, "ts": ts, "dur": dur} | {
            "args": more
        }

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


def test_one_step_is_timed_and_profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is idle is the time of the very batches that the profiler watches."""
    taken: list[list[str]] = []
    clock = itertools.count()

    def take(loaded: Any) -> None:
        # The first time takes longest.
        for _ in range(0 if taken else 9):
            next(clock)
        taken.append(list(loaded.micro_batches))

    def profile_step(engine: Any, again: Callable[[], None], seconds: float) -> dict[str, float]:
        assert len(taken) == 2, "timed before the profiler is on"
        again()
        return {"idle": seconds}

    @dataclasses.dataclass(frozen=True)
    class Loaded:
        micro_batches: Iterator[str]

    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(measure, "profile_step", profile_step)
    loaded: Any = Loaded(iter(["one", "two"]))
    assert measure.take_apart(None, loaded, take, CPU) == {"idle": 1.0}
    assert taken == [["one", "two"]] * 3


@pytest.mark.gpu
@pytest.mark.usefixtures("joined")
def test_parts_of_a_step_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda", 0)
    run = cases.resolve_case(cases.TINY, None, [], 1, on_gpu=True)
    starts: list[Callable[..., Any]] = [measure.with_engine, plain.without_engine]
    for start in starts:
        found = measure.measure(run, Ranks(), device, start, repeats=3)
        assert found.parts is not None
        assert set(found.parts) == set(parts.PARTS)
        for name in ("gemm", "attention", "memory_bound", "optimizer", "engine"):
            assert found.parts[name] > 0, name
        assert found.memory_gib is not None
        assert found.memory_gib > 0
