"""What DeepSpeed's optimizer wrappers hold: fp32 weights, gradients, and which is whose.

DeepSpeed 0.19.8 steps through one of these:

| wrapper | when | this rank's fp32 weights |
|---|---|---|
| none | ZeRO 0, fp32 | the parameters themselves |
| FP16_UnfusedOptimizer | ZeRO 0, bf16 | a copy of each parameter |
| DeepSpeedZeroOptimizer | ZeRO 1 and 2 | a stretch of each flattened group |
| DeepSpeedZeroOptimizer_Stage3 | ZeRO 3 | the flattened pieces of a sub-group's parameters |

Some wait for the device: before a step, to ask on the host whether the gradient's norm is finite,
which train/optimizer_step.py asks on the device instead; or at the end of backward, for the stream
that reduces. `without_waits` takes both out. (train/engine.py sees to it that BF16_Optimizer is not
used.) DeepSpeedZeroOptimizer passes more often over gradients than adding them up needs, which
`without_copies` mends, and beside Muon it loses some, which `without_losses` does.
"""

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kernels.mixed_precision import add_narrow, write_narrow
from train.stable_adamw import Layout, whole

Wrapper = Any
"""one of DeepSpeed's optimizer wrappers, which have no types"""


@dataclass(frozen=True)
class Held:
    """What a rank updates, and with which gradients.

    layouts: the tensors that the optimizer steps, fp32, with the layout of each. gradients:
    averaged over ranks, complete before a step, an element for each of the weights', padding zero.
    sharded: other ranks hold other elements.
    """

    layouts: dict[Tensor, Layout]
    gradients: Callable[[], list[Tensor]]
    sharded: bool

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return next(iter(self.layouts)).device

    def weights(self) -> list[Tensor]:
        """This rank's fp32 weights, without padding, which may hold anything."""
        return [
            weights.detach().view(-1)[start:stop]
            for weights, layout in self.layouts.items()
            for start, stop in layout.pieces
            if start < stop
        ]


def held(wrapper: Wrapper) -> Held:
    """What this rank's wrapper holds; wrapper: `engine.optimizer`. TypeError for one of a kind that
    is not in the table above, whose places nobody here knows."""
    if isinstance(wrapper, torch.optim.Optimizer):
        return _plain(wrapper)
    name = type(wrapper).__name__
    if name not in _HELD:
        raise TypeError(f"{name} is none of DeepSpeed 0.19.8's wrappers that train/zero.py knows")
    return _HELD[name](wrapper)


def without_waits(wrapper: Wrapper) -> None:
    """Let the wrapper step unchecked and unclipped, so that the host does not wait for the device.

    DeepSpeedZeroOptimizer has keys for that (train/engine.py sets them), the others have not.
    """
    name = type(wrapper).__name__
    if name == "DeepSpeedZeroOptimizer":
        epilogue = wrapper.independent_gradient_partition_epilogue
        wrapper.independent_gradient_partition_epilogue = lambda: _end_backward(wrapper, epilogue)
    elif name == "FP16_UnfusedOptimizer":
        wrapper.step = types.MethodType(_step_unfused, wrapper)
    elif name == "DeepSpeedZeroOptimizer_Stage3":
        # The norm it would check on the host, as a number that is there already, and the pass over
        # the gradient that would divide it by 1.
        wrapper._get_norm_groups = lambda: [0.0]
        wrapper.unscale_and_clip_grads = lambda sub_group, norm: None


def without_copies(wrapper: Wrapper) -> None:
    """Let ZeRO 1 and 2 add bf16 gradients up in fp32 without copying them; same sums, to the bit.

    DeepSpeed keeps the fp32 sums of what a rank steps in a buffer of their own, which it fills with
    zeros every step. What it does before that with whole gradients is passes over memory: a cast, a
    copy into a bucket, one out of it to be reduced, and one back which nothing reads. Other dtypes,
    and Muon's groups, have no such buffer and stay as they are.
    """
    if type(wrapper).__name__ != "DeepSpeedZeroOptimizer" or wrapper.cpu_offload:
        return
    groups = range(len(wrapper.bit16_groups))
    if not all(wrapper._use_compact_grad_partition_buffer(group) for group in groups):
        return
    _write_first(wrapper)
    wrapper._fill_param_grad_accum_attribute = types.MethodType(_add_gradient, wrapper)
    wrapper.allreduce_and_copy_with_multiple_ranks = types.MethodType(_reduce_bucket, wrapper)
    # What travels in another dtype is rounded, also where it travels nowhere.
    in_fp32 = wrapper.communication_data_type == torch.float32
    if dist.get_world_size(wrapper.dp_process_group) == 1 and in_fp32:
        wrapper.process_gradients = types.MethodType(_add_to_partition, wrapper)
        # Elements; buckets stay empty, but are allocated all the same, and percentages reckoned.
        wrapper.reduce_bucket_size = 1


def without_losses(wrapper: Wrapper) -> None:
    """Let ZeRO 1 and 2 keep the bf16 gradients that come before those of Muon's matrices.

    Slices of a bucket for the same rank are joined where the second has no place in that rank's
    fp32 sums, as Muon's have none, and then the first's place is forgotten too: norms, whose
    gradients come just before a matrix's, stood still. A place that takes nothing keeps them apart.
    """
    if type(wrapper).__name__ != "DeepSpeedZeroOptimizer":
        return
    place_of, nowhere = wrapper._get_compact_grad_partition_slice, torch.empty(0)

    def place(group: int, rank: int, parameter: int, elements: int) -> Tensor | None:
        found: Tensor | None = place_of(group, rank, parameter, elements)
        if found is None and rank == dist.get_rank(wrapper.real_dp_process_group[group]):
            return nowhere
        return found

    def add(sums: Tensor | None, gradient: Tensor) -> None:
        if sums is not None and sums is not nowhere:
            sums.add_(gradient)

    wrapper._get_compact_grad_partition_slice = place
    wrapper._add_to_grad_partition_buffer = add


def _write_first(wrapper: Wrapper) -> None:
    """Write what comes first to a sum, which DeepSpeed adds to zeros; the same sum, to the bit.

    DeepSpeed makes the buffer of a group's sums when the first of its gradients comes in a step,
    and gives it back at the step's end, also where the step is left out. Here it is made without
    zeros, and what nothing was written to by the end of backward (parameters without a gradient,
    padding) becomes zero then. It does not matter to which micro-step a gradient belongs.
    """
    sums_of = wrapper._get_compact_grad_partition_buffer
    epilogue = wrapper.independent_gradient_partition_epilogue
    # By address, for every caller cuts slices of its own out of the buffer.
    unwritten: dict[int, Tensor] = {}

    def sums_of_group(group: int) -> list[Tensor]:
        sums: list[Tensor] | None = wrapper.averaged_gradients.get(group)
        if sums is None:
            with _Unfilled():
                sums = sums_of(group)
            unwritten.update({piece.data_ptr(): piece for piece in sums})
        return sums

    def add(sums: Tensor | None, gradient: Tensor) -> None:
        if sums is None:
            return
        first = unwritten.pop(sums.data_ptr(), None)
        if first is None:
            add_gradient(sums, gradient)
        else:
            assert first.numel() == gradient.numel(), "a sum is written as a whole"
            write_gradient(sums, gradient)

    def end_backward() -> None:
        epilogue()
        if unwritten:
            torch._foreach_zero_(list(unwritten.values()))
            unwritten.clear()

    wrapper._get_compact_grad_partition_buffer = sums_of_group
    # All of DeepSpeed's own ways of reduction add by it too, where keys choose another.
    wrapper._add_to_grad_partition_buffer = add
    wrapper.independent_gradient_partition_epilogue = end_backward


class _Unfilled(TorchFunctionMode):
    """Memory as it comes where zeros are asked for, in this thread."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (torch.empty if func is torch.zeros else func)(*args, **(kwargs or {}))


def _add_gradient(wrapper: Wrapper, parameter: Any) -> None:
    """Add a gradient to the parameter's sum over micro-steps, cast as it is read (stage 1)."""
    if parameter.grad is None:
        return
    if parameter.grad_accum is None:
        parameter.grad_accum = torch.empty(
            parameter.shape, dtype=wrapper.gradient_accumulation_dtype, device=parameter.device
        )
        write_gradient(parameter.grad_accum, parameter.grad)
    else:
        add_gradient(parameter.grad_accum, parameter.grad)
    parameter.grad = None


def _add_to_partition(wrapper: Wrapper, parameter: Any, group: int) -> None:
    """A new gradient where there is one rank: straight into what the optimizer will be given."""
    wrapper.setup_buckets()
    name, size = wrapper.get_param_id(parameter), parameter.numel()
    sums = wrapper._get_compact_grad_partition_slice(group, 0, name, size)
    wrapper._add_to_grad_partition_buffer(sums.view_as(parameter), parameter.grad)
    parameter.grad = None


def write_gradient(sums: Tensor, gradient: Tensor) -> None:
    """Write the first gradient of a sum, whatever is in it: the bits of `add_gradient` to zero.

    (Not those of a copy: 0 + (-0) is +0.)
    """
    if _widens(sums, gradient):
        write_narrow(sums, gradient.contiguous())
    else:
        torch.add(gradient, 0, out=sums)


def add_gradient(sums: Tensor, gradient: Tensor) -> None:
    """Add a gradient to its sum, of whatever dtypes; the kernel wants memory in one order."""
    if _widens(sums, gradient):
        add_narrow(sums, gradient.contiguous())
    else:
        sums.add_(gradient)


def _widens(sums: Tensor, gradient: Tensor) -> bool:
    """Whether `kernels.mixed_precision` takes the two."""
    return sums.is_cuda and sums.dtype == torch.float32 != gradient.dtype


def _reduce_bucket(
    wrapper: Wrapper,
    slices: list[Tensor],
    communication_data_type: torch.dtype,
    log: None = None,
    divide: bool = False,
    process_group: dist.ProcessGroup | None = None,
    bucket_ranks: list[frozenset[int]] | None = None,
    output_bucket: list[Tensor | None] | None = None,
) -> None:
    """Sum up over ranks, where they lie, the slices of a bucket; add this rank's to its own sums.

    output_bucket: for each slice its place in this rank's sums, None for what other ranks step.
    """
    assert output_bucket is not None
    assert not divide, "the bucket is divided by the number of ranks before it is cut"
    first, last = slices[0], slices[-1]
    length = last.storage_offset() + last.numel() - first.storage_offset()
    sizes = [piece.numel() for piece in slices]
    assert length == sum(sizes), "a bucket is cut into slices that lie one after another"
    bucket = first.as_strided((length,), (1,))
    reduced = bucket.to(communication_data_type)
    dist.all_reduce(reduced, group=process_group)
    for piece, sums in zip(reduced.split(sizes), output_bucket, strict=True):
        wrapper._add_to_grad_partition_buffer(sums, piece)
    if bucket.is_cuda:
        # It may be given back before this stream has come so far.
        bucket.record_stream(torch.cuda.current_stream())


def _end_backward(wrapper: Wrapper, epilogue: Callable[[], None]) -> None:
    """The end of a backward, where the streams wait for each other, and the host for neither.

    What follows (gradients handed to the step, their memory given back and written anew) comes
    after the reductions either way, and later reductions after what is to be reduced.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()

    def synchronize() -> None:
        backward, reduction = accelerator.current_stream(), wrapper.reduction_stream
        backward.wait_stream(reduction)
        reduction.wait_stream(backward)

    accelerator.synchronize = synchronize
    try:
        epilogue()
    finally:
        del accelerator.synchronize


@torch.no_grad()
def _step_unfused(wrapper: Wrapper, closure: None = None) -> None:
    """FP16_UnfusedOptimizer.step without its norms."""
    pairs = _unfused_pairs(wrapper)
    for weights, parameter in pairs:
        weights.grad = _gradient(parameter).to(weights.dtype)
    wrapper.optimizer.step()
    for weights, parameter in pairs:
        weights.grad = None
        parameter.copy_(weights)


def _unfused_pairs(wrapper: Wrapper) -> list[tuple[Tensor, Tensor]]:
    """(fp32 weights, bf16 parameter) for each parameter."""
    return [
        pair
        for groups in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True)
        for pair in zip(*groups, strict=True)
    ]


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "reduction gives every parameter one"
    return parameter.grad


def _plain(optimizer: torch.optim.Optimizer) -> Held:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return Held({p: whole(p) for p in parameters}, lambda: [*map(_gradient, parameters)], False)


def _unfused(wrapper: Wrapper) -> Held:
    pairs = _unfused_pairs(wrapper)
    return Held({w: whole(w) for w, _ in pairs}, lambda: [_gradient(p) for _, p in pairs], False)


def _stage_1_and_2(wrapper: Wrapper) -> Held:
    layouts = {}
    for index, weights in enumerate(wrapper.single_partition_of_fp32_groups):
        sizes = [p.numel() for p in wrapper.round_robin_bit16_groups[index]]
        offsets = wrapper.round_robin_bit16_offsets[index]
        group = wrapper.real_dp_process_group[index]
        layouts[weights] = _stretch(offsets, sizes, weights.numel(), group)

    def gradients() -> list[Tensor]:
        groups = range(len(wrapper.bit16_groups))
        return [piece for index in groups for piece in wrapper.averaged_gradients[index]]

    return Held(layouts, gradients, True)


def _stage_3(wrapper: Wrapper) -> Held:
    layouts = {}
    for index, weights in enumerate(wrapper.fp32_partitioned_groups_flat):
        group = wrapper._get_sub_group_process_group(index)
        rank, at, pieces, sizes = dist.get_rank(group), 0, [], []
        for parameter in wrapper.fp16_groups[index]:
            held_here = parameter.partition_numel()
            # The last ranks' pieces are padded to the length of the others'.
            real = min(max(parameter.ds_numel - rank * held_here, 0), held_here)
            pieces.append((at, at + real))
            sizes.append(parameter.ds_numel)
            at += held_here
        layouts[weights] = Layout(tuple(pieces), tuple(sizes), group)

    def gradients() -> list[Tensor]:
        groups = range(len(wrapper.fp16_groups))
        return [piece for index in groups for piece in wrapper.averaged_gradients[index]]

    return Held(layouts, gradients, True)


def _stretch(offsets: list[int], sizes: list[int], length: int, group: dist.ProcessGroup) -> Layout:
    """The layout of a rank's stretch of `length` elements of parameters flattened at `offsets`."""
    first = dist.get_rank(group) * length
    pieces = []
    for offset, size in zip(offsets, sizes, strict=True):
        start = min(max(offset - first, 0), length)
        stop = min(max(offset + size - first, 0), length)
        pieces.append((start, stop))
    return Layout(tuple(pieces), tuple(sizes), group)


_HELD = {
    "FP16_UnfusedOptimizer": _unfused,
    "DeepSpeedZeroOptimizer": _stage_1_and_2,
    "DeepSpeedZeroOptimizer_Stage3": _stage_3,
}
