"""Steps with given gradients under every wrapper of DeepSpeed's; started by launched.py.

The gradients depend on no weight, so what a rule makes of them can be computed in one process,
without DeepSpeed. The steps `POISONED` have an infinity in them on one rank.
"""

import contextlib
import json
import traceback
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train.config import Train
from train.ranks import Ranks, sum_over_ranks
from train.schedule import Rates

STEPS, MICRO_STEPS, POISONED, LOGGED = 12, 2, (6, 9), (3, 9, 11)
PEAK, DECAY, CLIPPING = 0.02, 1e-4, 40.0
SHAPES = {
    "tied": (50, 3),
    "matrix": (7, 5),
    "norm": (11,),
    "long": (64, 33),
    "one": (1,),
    "bias": (5,),
}

# One of everything: wrapper, dtype, clipping by norm or none, rule.
CASES: dict[str, dict[str, Any]] = {
    "fp32_zero0": {"zero_stage": 0, "precision": "fp32"},
    "fp32_zero1": {"zero_stage": 1, "precision": "fp32"},
    "fp32_zero2_clipped": {"zero_stage": 2, "precision": "fp32"},
    "fp32_zero3_sub_groups": {"zero_stage": 3, "precision": "fp32"},
    "bf16_zero0_clipped": {"zero_stage": 0, "precision": "bf16"},
    "bf16_zero1_clipped": {"zero_stage": 1, "precision": "bf16"},
    "bf16_zero1_in_bf16": {"zero_stage": 1, "precision": "bf16"},
    "bf16_zero2": {"zero_stage": 2, "precision": "bf16"},
    "bf16_zero3_clipped": {"zero_stage": 3, "precision": "bf16"},
    "bf16_zero1_adamw_clipped": {"zero_stage": 1, "precision": "bf16"},
}
MORE_CASES: dict[str, dict[str, Any]] = {
    f"{precision}_zero{stage}{kind}": {"zero_stage": stage, "precision": precision}
    for precision in ("fp32", "bf16")
    for stage in range(4)
    for kind in ("", "_adamw_clipped")
}
MORE_CASES = {name: case for name, case in MORE_CASES.items() if name not in CASES}
MUON_CASES: dict[str, dict[str, Any]] = {
    f"{precision}_zero{stage}_muon": {"zero_stage": stage, "precision": precision}
    for precision in ("fp32", "bf16")
    for stage in (1, 2, 3)
}
# By key, DeepSpeed's checks beside ours.
CHECKED: dict[str, dict[str, Any]] = {
    "fp32_zero1_checked": {"zero_stage": 1, "precision": "fp32"},
    "bf16_zero1_checked": {"zero_stage": 1, "precision": "bf16"},
    "bf16_zero2_checked": {"zero_stage": 2, "precision": "bf16"},
}
EVERY_CASE = CASES | MORE_CASES | MUON_CASES | CHECKED
for name, case in EVERY_CASE.items():
    rule = next((rule for rule in ("adamw", "muon") if rule in name), "stable_adamw")
    case["optimizer"] = {"name": rule}
    if "clipped" in name:
        case["optimizer"]["gradient_clipping"] = CLIPPING
    if "sub_groups" in name:
        # Parameters in groups, each of which DeepSpeed steps by itself.
        case["deepspeed"] = {"zero_optimization": {"sub_group_size": 40}}
    if "checked" in name:
        case["deepspeed"] = {
            "bf16": {"check_grad_overflow": True},
            "zero_optimization": {"compute_grad_norm": True},
        }
    if "in_bf16" in name:
        case |= {"grad_accum_dtype": "bf16", "reduce_dtype": "bf16"}


class Dot(nn.Module):
    """The sum of weight × factors, whose gradient is `factors` whatever the weight."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, factors: Tensor) -> Tensor:
        return (self.weight * factors).float().sum()


class Model(nn.Module):
    """A parameter a shape; the first is used by two modules."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        for name, shape in SHAPES.items():
            # bf16 holds them exactly, so that all cases start from the same weights.
            weight = torch.randn(shape, generator=draw).bfloat16().float()
            self.add_module(name, Dot(nn.Parameter(weight)))
        self.again = Dot(self.tied.weight)

    def forward(self, factors: dict[str, Tensor]) -> Tensor:
        used = [(name, module) for name, module in self.named_children() if name in factors]
        return torch.stack([module(factors[name]) for name, module in used]).sum()


def factors(step: int, micro_step: int, rank: int) -> dict[str, Tensor]:
    """Gradients of a micro-step, some of them leaping.

    Small whole multiples of 3/8: their sums, and means over two or three ranks, are exact. Where
    they add up to nothing, a residue would make a step of its own.
    """
    draw = torch.Generator().manual_seed(step * 100 + micro_step * 10 + rank)
    shapes = SHAPES | {"again": SHAPES["tied"]}
    leaps = dict(zip(shapes, (1, 8, 64, 2, 32, 16, 1), strict=True))
    return {
        name: torch.randint(-3, 4, shape, generator=draw)
        * (3 / 8)
        * (leaps[name] if step % 4 == 3 else 1)
        for name, shape in shapes.items()
    }


def full_gradients(step: int, ranks: int) -> dict[str, Tensor]:
    """The mean over ranks of the sums over micro-steps, of each parameter."""
    parts = [factors(step, m, rank) for m in range(MICRO_STEPS) for rank in range(ranks)]
    means = {name: torch.stack([part[name] for part in parts]).sum(0) / ranks for name in parts[0]}
    means["tied"] += means.pop("again")
    return means


def lr_of(step: int) -> float:
    """A rate that changes."""
    return PEAK * (step + 1) / STEPS


class Watch(TorchDispatchMode):
    """Notes where numbers travel to the host, and the dtypes of what travels between ranks.

    places: innermost file and function outside torch; dtypes: of 50 elements or more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self.dtypes: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("aten._local_scalar_dense"):
            self.note()
        if name.startswith("c10d.") and "gather" not in name:
            tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
            self.dtypes |= {str(t.dtype) for t in tensors if t.numel() >= 50}
        return func(*args, **(kwargs or {}))

    def note(self, *warning: Any) -> None:
        """Note where we are."""
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename]
        frame = [f for f in frames if f.filename != __file__][-1]
        self.places.append(f"{Path(frame.filename).name} {frame.name}")

    def __enter__(self) -> "Watch":
        super().__enter__()
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        if torch.cuda.is_available():
            # On a GPU, copies and numbers that wait for it: torch warns of these.
            torch.cuda.set_sync_debug_mode("warn")
            warnings.simplefilter("always")
            warnings.showwarning = self.note
        return self

    def __exit__(self, *error: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
        self._warnings.__exit__(*error)
        super().__exit__(*error)


def make_engine(ranks: Ranks, changes: dict[str, Any]) -> Any:
    """The engine of a case, as training starts it."""
    from train.engine import deepspeed_config, start_engine

    batch = {"rows": 2 * ranks.size, "micro_rows": 1}
    phase = {"data": {"dir": "none"}, "tokens": 1, "batch": batch}
    config = TypeAdapter(Train).validate_python({"phases": {"main": phase}} | changes)
    settings = deepspeed_config(
        config, config.precision, config.phases["main"].batch, MICRO_STEPS, ranks.size
    )
    # Without this every parameter of a tiny model is kept whole on every rank.
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return start_engine(Model(), config, settings)


def take_step(engine: Any, number: int, ranks: Ranks, dtype: torch.dtype) -> dict[str, Any]:
    """A step, as the loop takes it; what there is to know of it."""
    from train.engine import backward, step

    given = [factors(number, micro_step, ranks.rank) for micro_step in range(MICRO_STEPS)]
    if number in POISONED and ranks.rank == ranks.size - 1:
        given[0]["long"][5, 5] = torch.inf
    device = engine.device
    given = [{name: part[name].to(device, dtype) for name in part} for part in given]
    with Watch() as watch:
        for micro_step in range(MICRO_STEPS):
            loss = engine(given[micro_step])
            # As many masked tokens as ranks: the loss itself.
            backward(engine, loss, ranks.size, ranks.size, micro_step == MICRO_STEPS - 1)
        sums = {str(piece.dtype) for piece in engine.optimizer_step.held.gradients()}
        norms = step(engine, Rates(lr_of(number), PEAK, DECAY), want_norms=number in LOGGED)
    return {
        "norms": norms and [norms.gradient, norms.update, norms.skipped_in_a_row],
        "places": watch.places if norms is None else [],
        "reduced": sorted(watch.dtypes),
        "sums": sorted(sums),
        "skipped": int(engine.skipped_steps),
    }


def full_weights(engine: Any) -> dict[str, np.ndarray]:
    """The fp32 weights of every parameter by name; every rank calls this."""
    from deepspeed.utils import safe_get_full_fp32_param

    wrapper, found = engine.optimizer, {}
    copies = {}
    if type(wrapper).__name__ == "FP16_UnfusedOptimizer":
        for ours, theirs in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            copies |= {id(p): w for p, w in zip(ours, theirs, strict=True)}
    for name, parameter in engine.module.named_parameters():
        if engine.zero_optimization_stage() == 0:
            full = copies.get(id(parameter), parameter)
        else:
            full = safe_get_full_fp32_param(parameter)
        found[name.removesuffix(".weight")] = full.detach().cpu().numpy().reshape(-1).copy()
    return found


# Where DeepSpeed's passes over gradients are replaced, and where not. Buckets of 200 elements: some
# parameters share one, one is larger.
SMALL_BUCKETS: dict[str, dict[str, Any]] = {"zero_optimization": {"reduce_bucket_size": 200}}
SUMS: dict[str, dict[str, Any]] = {
    f"{precision}_zero{stage}{kind}": {"zero_stage": stage, "precision": precision}
    | {"deepspeed": SMALL_BUCKETS}
    | ({"reduce_dtype": "bf16"} if kind == "_reduced_in_bf16" else {})
    for precision in ("fp32", "bf16")
    for stage in (1, 2)
    for kind in ("", "_reduced_in_bf16")
    if precision == "bf16" or not kind
}
# By another of DeepSpeed's ways to reduce, which has its own additions.
SUMS["bf16_zero1_unscattered"] = {
    "zero_stage": 1,
    "precision": "bf16",
    "deepspeed": {
        "zero_optimization": SMALL_BUCKETS["zero_optimization"] | {"reduce_scatter": False}
    },
}
# Micro-steps of each step. The sums of the second are not finite, in the third two parameters have
# no gradient, in the fourth one has none but in its last micro-step.
SUM_MICRO_STEPS = (3, 2, 1, 2, 3)
WITH_NAN, UNUSED, LATE = 1, (2, ("matrix", "norm")), (3, ("bias", "long"))


class Passes(TorchDispatchMode):
    """Counts operations that write gradients: casts, copies, sums, and tensors put together."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.").removesuffix(".default").removesuffix(".Tensor")
        if name in ("_to_copy", "copy_", "add_", "add.out", "cat", "div_", "zeros"):
            first = next(t for t in tree_leaves(out) if isinstance(t, Tensor))
            if first.numel() > 0:
                self.counts[name] = self.counts.get(name, 0) + 1
        return out


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that a place left unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(False)


def rounded_gradients(step: int, micro_step: int, rank: int) -> dict[str, Tensor]:
    """Gradients whose sums are rounded, some of them zeros of either sign."""
    draw = torch.Generator().manual_seed(1000 * step + 10 * micro_step + rank)
    shapes = SHAPES | {"again": SHAPES["tied"]}
    given = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    for part in given.values():
        part.view(-1)[1::4], part.view(-1)[3::4] = 0.0, -0.0
    if (step, micro_step) == (WITH_NAN, 0):
        given["long"][5, 5] = torch.nan
    is_last = micro_step == SUM_MICRO_STEPS[step] - 1
    without = UNUSED[1] if step == UNUSED[0] else LATE[1] if step == LATE[0] and not is_last else ()
    return {name: part for name, part in given.items() if name not in without}


def sum_gradients(
    ranks: Ranks, changes: dict[str, Any], as_deepspeed: bool, checkpoint: Path | None = None
) -> dict[str, Any]:
    """This rank's sums in each step, weights after it, and passes over gradients in the last.

    as_deepspeed: with DeepSpeed's own sums. checkpoint: where to leave one behind the step that is
    not finite, with which another engine goes on.
    """
    from train import engine as ours

    def make() -> Any:
        replaced = ours.without_copies
        if as_deepspeed:
            ours.without_copies = lambda wrapper: None
        try:
            return make_engine(ranks, changes)
        finally:
            ours.without_copies = replaced

    engine = make()
    dtype = torch.bfloat16 if changes["precision"] == "bf16" else torch.float32
    passes: list[dict[str, int]] = []
    sums, weights = [], []
    for number, micro_steps in enumerate(SUM_MICRO_STEPS):
        passes.clear()
        for micro_step in range(micro_steps):
            given = rounded_gradients(number, micro_step, ranks.rank)
            loss = engine({name: part.to(engine.device, dtype) for name, part in given.items()})
            is_last = micro_step == micro_steps - 1
            with Passes() as watch:
                ours.backward(engine, loss, ranks.size, ranks.size, is_last)
            passes.append(watch.counts)
        pieces = [piece.flatten().float() for piece in engine.optimizer_step.held.gradients()]
        all_sums = torch.cat(pieces).cpu()
        # One NaN is like another.
        sums.append(all_sums.masked_fill(all_sums.isnan(), torch.nan).numpy())
        ours.step(engine, Rates(lr_of(number), PEAK, DECAY), want_norms=False)
        full = full_weights(engine)
        weights.append(np.concatenate([full[key] for key in SHAPES]))
        if checkpoint is not None and number == WITH_NAN:
            engine.save_checkpoint(str(checkpoint), tag="state", save_latest=False)
            engine.destroy()
            engine = make()
            engine.load_checkpoint(str(checkpoint), tag="state")
    engine.destroy()
    return {"passes": passes, "sums": sums, "weights": weights}


def compare_sums(
    ranks: Ranks, names: Iterable[str], checkpoint: Path | None = None
) -> dict[str, dict[str, Any]]:
    """For each of SUMS and each step, on how many ranks bits depend on who adds gradients up, and
    on how many something is not finite; passes over gradients in the last step.

    checkpoint: where ours leaves one and goes on from it; DeepSpeed's own does not.
    """
    found = {}
    for name in names:
        theirs = sum_gradients(ranks, SUMS[name], as_deepspeed=True)
        with poisoned():
            ours = sum_gradients(ranks, SUMS[name], as_deepspeed=False, checkpoint=checkpoint)
        found[name] = {"ours": ours["passes"], "theirs": theirs["passes"]}
        for what in ("sums", "weights"):
            pairs = list(zip(ours[what], theirs[what], strict=True))
            differ = torch.tensor([mine.tobytes() != other.tobytes() for mine, other in pairs])
            infinite = torch.tensor([not np.isfinite(other).all() for _, other in pairs])
            found[name][f"{what} differ"] = sum_over_ranks(differ.int()).tolist()
            found[name][f"{what} not finite"] = sum_over_ranks(infinite.int()).tolist()
    return found


def run_case(ranks: Ranks, name: str, out: Path, resume_at: int | None = None) -> None:
    """Take the steps of a case; rank 0 writes the weights after every step and what else is known.

    resume_at: from that step on another engine takes them too, through a checkpoint; its steps,
    with the ones before, go to the folder `resumed`.
    """
    changes = EVERY_CASE[name]
    dtype = torch.bfloat16 if changes["precision"] == "bf16" else torch.float32
    checkpoint = str(out / f"{name}_checkpoint")
    engine = make_engine(ranks, changes)
    weights, known = [], []
    for number in range(STEPS):
        if number == resume_at:
            engine.save_checkpoint(checkpoint, tag="state", save_latest=False)
        known.append(take_step(engine, number, ranks, dtype))
        weights.append(full_weights(engine))
    write_case(ranks, out / name, weights, known)
    if resume_at is None:
        return
    engine = make_engine(ranks, changes)
    engine.load_checkpoint(checkpoint, tag="state")
    for number in range(resume_at, STEPS):
        known[number] = take_step(engine, number, ranks, dtype)
        weights[number] = full_weights(engine)
    write_case(ranks, out / "resumed" / name, weights, known)


def write_case(
    ranks: Ranks, path: Path, weights: list[dict[str, np.ndarray]], known: list[dict[str, Any]]
) -> None:
    if ranks.is_first:
        stacked = {key: np.stack([of_step[key] for of_step in weights]) for key in SHAPES}
        np.savez(path.with_name(f"{path.name}.npz"), **stacked)
        path.with_name(f"{path.name}.json").write_text(json.dumps(known))


def main(ranks: Ranks, out: Path, kind: str) -> None:
    """The cases of a kind into `out`: `plain`, `some` with Muon's, or `all`, which are more, with
    each interrupted once."""
    (out / "resumed").mkdir(parents=True, exist_ok=True)
    sums = compare_sums(ranks, SUMS)
    if ranks.is_first:
        (out / "sums.json").write_text(json.dumps(sums))
    more = {"plain": CHECKED, "some": CHECKED | MUON_CASES, "all": MORE_CASES | MUON_CASES}
    for name in CASES | more[kind]:
        run_case(ranks, name, out, resume_at=8 if kind == "all" else None)
