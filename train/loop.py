"""The training loop: from a resolved run to its last checkpoint.

A step is a pure function of the weights and of counters, so a run that is killed and taken up again
at its newest checkpoint goes on as if nothing had happened.
"""

import contextlib
import math
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from common.commit import project_commit
from common.config import ConfigError, config_to_yaml
from common.files import whole_file, write_json
from model.attention import Choice
from model.attention_choice import (
    AttentionError,
    check_attention,
    choose_attention,
    what_to_install,
)
from model.modernbert import ModernBertForMaskedLM
from train import checkpoint
from train.console import Console
from train.describe import describe_phase, parameter_count
from train.engine import Engine, Norms, backward, start_engine, step
from train.interval import Interval, peak_of
from train.loader import LoadedStep, Loader, StepMaker
from train.metrics import Metrics, counters
from train.prepare_model import compiles, prepare_model, set_deterministic
from train.ranks import Ranks, only_run_in, problem_of_any
from train.resolve import Run, RunPhase
from train.schedule import StepPlan
from train.start import make_model
from train.tracing import Tracer, no_trace
from train.validation import Validation

MOST_SKIPPED_IN_A_ROW = 20
"""steps without a finite gradient, after which a run gives up"""


class TrainingError(RuntimeError):
    """Training that must not go on; the message says at which step, and what to do."""


def train(run: Run, ranks: Ranks, device: torch.device) -> None:
    """Train `run` from its newest checkpoint, or from the start, to its end.

    Raises ConfigError, on every rank alike, while another process trains in its `run_dir`.
    """
    with only_run_in(run.config.run_dir, ranks):
        _train(run, ranks, device)


def _train(run: Run, ranks: Ranks, device: torch.device) -> None:
    config = run.config
    found = checkpoint.find(run, ranks)
    model, attention = _make_ready_everywhere(run, device)
    engine = start_engine(model, config, run.deepspeed)
    checkpoint.load(engine, found)
    progress = found.progress
    if ranks.is_first:
        _begin(run, found, device, attention)

    with contextlib.ExitStack() as stack:
        console, metrics = None, None
        if ranks.is_first:
            last_step, last_slot = run.last_step(progress), run.last_slot(progress)
            console = stack.enter_context(Console(last_step, last_slot))
            metrics = stack.enter_context(
                Metrics(config.run_dir, progress.step, last_slot, console)
            )
            metrics.start(_circumstances(run, found, device, attention))
        tracer = stack.enter_context(Tracer(config.profile, config.run_dir, ranks.rank))
        maker = StepMaker(run, ranks.rank)
        loader = stack.enter_context(Loader(maker, run.plans(progress), device.type == "cuda"))
        interval = Interval(loader, device, peak_of(device, run.precision))
        phase: RunPhase | None = None
        for loaded in loader:
            plan = loaded.plan
            tracer.begin_step(plan.step)
            if phase is None or plan.phase != phase.name:
                phase = run.phases[plan.phase]
                engine.module.set_global_rope_theta(phase.model_config.global_rope_theta)
                validate = Validation(phase, config.validation.rate, ranks, device)
                if console is not None:
                    console.line("\n".join(describe_phase(phase, ranks.size)))
                interval.restart(phase)
            saves = plan.step % config.checkpoint.every_steps == 0 or plan.ends_phase
            validates = plan.step % config.validation.every_steps == 0 or plan.ends_phase
            # An interval of the log ends with every checkpoint, so that the lines of a run that
            # continues from one are those of a run that never stopped; and with every validation,
            # whose time is none of training's.
            logs = plan.step % config.log.every_steps == 0 or plan.step == 1 or saves or validates

            sums = accumulate(engine, interval.watch(loaded), ranks, device)
            norms = step(engine, plan.rates, want_norms=logs)
            interval.add(loaded, sums)
            counts = loaded.counts
            progress = progress.after(plan, counts.rows_by_source, counts.tokens_by_source)
            if console is not None:
                console.step(plan.step, plan.slots, progress.all_tokens)
            if norms is not None:
                record = interval.close()
                if metrics is not None:
                    state = {
                        "grad_norm": norms.gradient,
                        "update_norm": norms.update,
                        "skipped_steps": engine.skipped_steps,
                    }
                    metrics.train({**counters(run, plan, progress), **state, **record})
                check_finite(plan, norms)
            if validates:
                figures = validate(engine)
                if metrics is not None:
                    metrics.validation({"step": plan.step, "phase": plan.phase, **figures})
            if saves:
                if metrics is not None:
                    metrics.sync()
                path = checkpoint.save(engine, run, ranks, progress)
                if console is not None:
                    console.line(f"checkpoint: {path}")
            if logs:
                interval.restart(phase)


def check_finite(plan: StepPlan, norms: Norms) -> None:
    """Raise TrainingError, on every rank alike, where the run has gone wrong.

    Called before every checkpoint, so that none is written of spoilt weights: infinite ones make
    the norm of any update NaN, of none at all too. A step that was left out, because its gradient
    was not finite, spoils nothing; many in a row never end.
    """
    if norms.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
        what = f"the gradients of {norms.skipped_in_a_row} steps in a row were not finite"
    elif not math.isfinite(norms.update):
        what = f"the norm of the update is {norms.update}"
    else:
        return
    raise TrainingError(
        f"at step {plan.step} {what}: lower phases.{plan.phase}.lr.peak or lengthen its "
        "lr.warmup_tokens; the same command continues from the newest checkpoint"
    )


def accumulate(engine: Engine, loaded: LoadedStep, ranks: Ranks, device: torch.device) -> Tensor:
    """Forward and backward of every micro-batch.

    Returns this rank's sums of cross-entropy and of tokens guessed right, by source, (2, sources)
    fp64, on the device.
    """
    sums = torch.zeros(2, len(loaded.sources), dtype=torch.float64, device=device)
    for number, host_batch in enumerate(loaded.micro_batches, start=1):
        batch = host_batch.to(device)
        loss, each_2M = engine(
            batch.input_ids,
            batch.position_ids,
            batch.cu_seqlens,
            batch.max_seqlen,
            batch.masked_indices,
            batch.labels,
            batch.masked_tokens,
            each=True,
            masked_cu_seqlens=batch.masked_cu_seqlens,
            long=batch.long,
        )
        is_last = number == loaded.micro_steps
        backward(engine, loss, ranks.size, loaded.counts.masked_tokens, is_last)
        sums.index_add_(1, batch.masked_sources, each_2M.double())
    return sums


def _circumstances(
    run: Run, found: checkpoint.Found, device: torch.device, attention: Choice
) -> dict[str, Any]:
    """What a process trains on, and from where."""
    progress = found.progress
    return {
        "step": progress.step,
        "slots": sum(progress.rows_of(part.name) * part.row_tokens for part in run.schedules),
        "ranks": run.ranks,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "peak_flops": peak_of(device, run.precision),
        "precision": run.precision,
        "zero_stage": run.config.zero_stage,
        "attention": str(attention),
        "compiled": compiles(run.config, device.type == "cuda"),
        "recompute": run.config.recompute,
        "fp8": run.config.fp8,
        "parameters": parameter_count(run.start),
        "last_step": run.last_step(progress),
        "commit": project_commit(),
        "torch": version("torch"),
        "deepspeed": version("deepspeed"),
    }


def _choose_attention(run: Run, device: torch.device) -> Choice:
    """The run's attention, tried out on a GPU before anything depends on it."""
    width, dtype = run.start.head_dim, _dtype(run)
    config = run.config
    try:
        choice = choose_attention(device, dtype, width, config.attention, config.local_attention)
        if device.type == "cuda":
            heads, window = run.start.num_attention_heads, run.start.local_attention // 2
            check_attention(choice, device, dtype, heads, width, window)
    except AttentionError as error:
        raise ConfigError(str(error)) from error
    return choice


def make_ready(run: Run, device: torch.device) -> tuple[ModernBertForMaskedLM, Choice]:
    """The model as an engine takes it: on the device, attention tried out, compiled as asked.

    Sets for the whole process whether it computes deterministically.
    """
    set_deterministic(run.config.deterministic)
    model = make_model(run.config, run.start).to(device)
    attention = model.attention = _choose_attention(run, device)
    prepare_model(model, run.config, device)
    return model, attention


def _make_ready_everywhere(run: Run, device: torch.device) -> tuple[ModernBertForMaskedLM, Choice]:
    """`make_ready`, or ConfigError on every rank: one machine may lack a package or have an older
    GPU, and the others would wait for its ranks."""
    ready, problem = None, ""
    try:
        ready = make_ready(run, device)
    except ConfigError as error:
        problem = str(error)
    if problem := problem_of_any(problem):
        raise ConfigError(problem)
    assert ready is not None
    return ready


def _dtype(run: Run) -> torch.dtype:
    return torch.bfloat16 if run.precision == "bf16" else torch.float32


def where_from(run: Run, found: checkpoint.Found) -> str:
    """What the run begins with, as a clause."""
    if not found.starts_anew:
        return f"continues from {found.path}"
    if found.path is not None:
        return f"starts with the weights and the optimizer of {found.path}"
    if run.config.init_from is not None:
        return f"starts with the weights of {run.config.init_from}"
    return "starts anew"


def _begin(run: Run, found: checkpoint.Found, device: torch.device, attention: Choice) -> None:
    """Say what is about to run, and put what the report needs into the run's folder."""
    for path, reason in found.skipped.items():
        aside = checkpoint.put_aside(path)
        print(f"warning: a checkpoint is passed over, and now {aside}: {reason}", flush=True)
    for change in found.changed:
        print(f"warning: since {found.path} was written, {change}", flush=True)
    run_dir = run.config.run_dir
    (run_dir / "data").mkdir(exist_ok=True)
    with whole_file(run_dir / "config.yaml") as file:
        file.write(config_to_yaml(run.config).encode())
    for phase in run.phases.values():
        write_json(run_dir / "data" / f"{phase.name}.json", phase.data.manifest)
    print(
        f"{run_dir}: {parameter_count(run.start):,} parameters, {run.ranks} ranks on "
        f"{device.type}, {run.precision}, ZeRO {run.config.zero_stage}, attention "
        f"{attention}; {run.last_step(found.progress):,} steps; {where_from(run, found)}",
        flush=True,
    )
    if run.config.profile is not None:
        idle = no_trace(run.config.profile, found.progress.step, run.last_step(found.progress))
        if idle is not None:
            print(idle, flush=True)
    sizes = run.start.head_dim, run.start.local_attention // 2
    for line in what_to_install(attention, device, _dtype(run), *sizes):
        print(line, flush=True)
