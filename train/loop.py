"""The training loop: from a resolved run to its last checkpoint.

A step is a pure function of the weights and of counters, so a run that is killed and taken up again
at its newest checkpoint goes on as if nothing had happened.
"""

import contextlib
import math

import torch
from torch import Tensor, nn

from common.config import ConfigError, config_to_yaml
from common.counter_random import derive_key
from common.files import whole_file, write_json
from model.attention import choose_attention
from model.modernbert import ModernBertForMaskedLM
from train import checkpoint
from train.engine import Engine, Norms, backward, start_engine, step
from train.loader import LoadedStep, Loader, StepMaker
from train.metrics import Interval, Metrics
from train.ranks import Ranks, only_run_in
from train.resolve import Run, parameter_count
from train.schedule import Progress
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
    found = checkpoint.find(run, ranks)
    engine = start_engine(make_model(run).to(device), run.config, run.deepspeed)
    progress = Progress()
    if found.path is not None:
        progress = checkpoint.load(engine, found.path)
    if ranks.is_first:
        _begin(run, found, progress, device)

    config = run.config
    maker = StepMaker(run.data, run.order, run.masker, run.shape, ranks.rank, ranks.size)
    validate = Validation(run, ranks, device)
    with contextlib.ExitStack() as stack:
        metrics = None
        if ranks.is_first:
            metrics = stack.enter_context(
                Metrics(config.run_dir, progress.step, run.last_step(progress))
            )
        loader = stack.enter_context(Loader(maker, run.plans(progress), device.type == "cuda"))
        interval = Interval(loader, device)
        for loaded in loader:
            plan = loaded.plan
            saves = plan.step % config.checkpoint.every_steps == 0 or plan.is_last
            validates = plan.step % config.validation.every_steps == 0 or plan.is_last
            # An interval of the log ends with every checkpoint, so that the lines of a run that
            # continues from one are those of a run that never stopped; and with every validation,
            # whose time is none of training's.
            logs = plan.step % config.log.every_steps == 0 or plan.step == 1 or saves or validates

            loss_sum = accumulate(engine, loaded, ranks, device)
            norms = step(engine, plan.lr, config.optimizer.lr, want_norms=logs)
            progress = Progress(
                step=plan.step,
                next_row=plan.first_row + plan.rows,
                slots=plan.slots,
                tokens=progress.tokens + loaded.counts.tokens,
            )
            interval.add(loss_sum, loaded.counts)
            if norms is not None:
                record = interval.close()
                check_finite(plan.step, record["loss"], norms)
                if metrics is not None:
                    metrics.train(
                        {
                            "step": plan.step,
                            "slots": progress.slots,
                            "tokens": progress.tokens,
                            "lr": plan.lr,
                            "mask_rate": plan.mask_rate,
                            "grad_norm": norms.gradient,
                            "update_norm": norms.update,
                            "skipped_steps": engine.skipped_steps,
                            **record,
                        }
                    )
            if validates:
                figures = validate(engine)
                if metrics is not None:
                    metrics.validation({"step": plan.step, **figures})
            if saves:
                path = checkpoint.save(engine, run, ranks, progress)
                if ranks.is_first:
                    print(f"checkpoint: {path}", flush=True)
            if logs:
                interval.restart()


def check_finite(step_number: int, loss: float, norms: Norms) -> None:
    """Raise TrainingError, on every rank alike, where the run has gone wrong.

    Called before every checkpoint, so that none is written of spoilt weights. A step that was left
    out, because its gradient was not finite, spoils nothing; many in a row never end.
    """
    if norms.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
        what = f"the gradients of {norms.skipped_in_a_row} steps in a row were not finite"
    elif not (math.isfinite(loss) and math.isfinite(norms.update)):
        what = f"the loss is {loss} and the norm of the update {norms.update}"
    else:
        return
    raise TrainingError(
        f"at step {step_number} {what}: lower optimizer.lr or lengthen schedule.warmup_tokens; the "
        "same command continues from the newest checkpoint"
    )


def accumulate(engine: Engine, loaded: LoadedStep, ranks: Ranks, device: torch.device) -> Tensor:
    """Forward and backward of every micro-batch; the rank's sum of cross-entropy, on the device."""
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for number, host_batch in enumerate(loaded.micro_batches, start=1):
        batch = host_batch.to(device)
        loss = engine(
            batch.input_ids,
            batch.position_ids,
            batch.cu_seqlens,
            batch.max_seqlen,
            batch.masked_indices,
            batch.labels,
        )
        is_last = number == loaded.micro_steps
        backward(engine, loss, ranks.size, loaded.counts.masked_tokens, is_last)
        loss_sum += loss.detach()
    return loss_sum


def make_model(run: Run) -> nn.Module:
    """The model a run starts from: random weights, the same on every rank, or those of a folder."""
    if run.config.init_from is not None:
        # Only here, for it brings transformers with it, which takes seconds.
        from model.huggingface import load_pretrained

        try:
            return load_pretrained(run.config.init_from)
        except ValueError as error:
            raise ConfigError(f"init_from: {error}") from None
    seed = derive_key(run.config.seed, "weights") >> 1
    return ModernBertForMaskedLM(run.model_config, torch.Generator().manual_seed(seed))


def _begin(run: Run, found: checkpoint.Found, progress: Progress, device: torch.device) -> None:
    """Say what is about to run, and put what the report needs into the run's folder."""
    for reason in found.skipped:
        print(f"warning: a checkpoint is passed over: {reason}", flush=True)
    for change in found.changed:
        print(f"warning: since {found.path} was written, {change}", flush=True)
    run_dir = run.config.run_dir
    with whole_file(run_dir / "config.yaml") as file:
        file.write(config_to_yaml(run.config).encode())
    write_json(run_dir / "data_manifest.json", run.data.manifest)
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    start = f"continues from {found.path}" if found.path else "starts anew"
    print(
        f"{run_dir}: {parameter_count(run.model_config):,} parameters, {run.ranks} ranks on "
        f"{device.type}, {run.precision}, ZeRO {run.config.zero_stage}, attention "
        f"{choose_attention(device, dtype)}; {run.last_step(progress):,} steps of "
        f"{run.slots_per_step:,} token slots; {start}",
        flush=True,
    )
