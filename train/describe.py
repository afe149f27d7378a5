"""What a run will be, as text: for `--dry-run`."""

import json

from common.config import config_to_yaml
from model.config import ModernBertConfig
from train.resolve import Run, RunPhase
from train.schedule import Progress, lr_factor, mask_rate, stretches


def describe(run: Run) -> str:
    """The resolved run as text: configuration, model, every phase, and what DeepSpeed is told."""
    model = run.start
    slots = sum(part.rows() * part.row_tokens for part in run.schedules)
    lines = [
        config_to_yaml(run.config).rstrip(),
        "---",
        f"model: {model.num_hidden_layers} layers × {model.hidden_size}, vocabulary "
        f"{model.vocab_size}, {parameter_count(model):,} parameters, {run.precision}",
        f"run: {run.last_step(Progress()):,} steps, {slots:,} token slots, phases: "
        f"{', '.join(run.phases)}",
    ]
    for phase in run.phases.values():
        lines += describe_phase(phase, run.ranks)
    lines.append("deepspeed: " + json.dumps(run.deepspeed, indent=2))
    if run.config.optimizer.gradient_clipping:
        lines.append(
            f"gradients are clipped at {run.config.optimizer.gradient_clipping} by our own step, "
            "on the device, so DeepSpeed is told not to"
        )
    return "\n".join(lines)


def describe_phase(phase: RunPhase, ranks: int) -> list[str]:
    """The lines about a phase: steps, slots, batch, rates, and what is read of each source."""
    schedule, batch, data = phase.schedule, phase.config.batch, phase.data
    sizes = list(stretches(schedule, 0))
    rows, steps = schedule.rows(), sum(number for _, number in sizes)
    read = phase.order.rows_read(rows)
    lines = [
        f"phase {phase.name}: {steps:,} steps, {rows:,} rows, {rows * schedule.row_tokens:,} "
        "token slots",
        f"  data: {data.folder}, rows of {data.row_tokens:,} tokens, documents of at most "
        f"{data.max_length:,}; global rope theta {phase.model_config.global_rope_theta:,.0f}",
        f"  batch: {batch.rows} rows a step = {ranks} ranks × {phase.micro_steps} micro-steps × "
        f"{batch.micro_rows} rows",
    ]
    if batch.warmup is not None:
        growth = ", ".join(f"{number:,} of {size}" for size, number in sizes)
        lines.append(f"  batch warm-up over {batch.warmup.tokens:,} slots: {growth} rows")
    lines += [f"  learning rate: {_rates(phase)}", f"  masked: {_masking(phase)}"]
    for name, number in read.items():
        available = phase.order.rows[name]
        tokens = int(data.counts("train", name)[0].sum() / available * number)
        lines.append(
            f"  source {name}: {available:,} rows, {number / rows:.2%} of the rows read, "
            f"{number / available:.3f} epochs, some {tokens:,} tokens"
        )
    lines += [
        f"  validation {name}: {number:,} of {data.sources('validation')[name]:,} rows"
        for name, number in phase.validation_rows.items()
    ]
    return lines


def parameter_count(model: ModernBertConfig) -> int:
    """Parameters of a model, the tied decoder's matrix counted once."""
    hidden, layers = model.hidden_size, model.num_hidden_layers
    attention = 4 * hidden * hidden
    mlp = 3 * hidden * model.intermediate_size
    norms = 2 * hidden
    # The first layer has no norm before its attention; the encoder has one before and one after.
    encoder = model.vocab_size * hidden + layers * (attention + mlp + norms) + hidden
    head = hidden * hidden + hidden + model.vocab_size
    return encoder + head


def _rates(phase: RunPhase) -> str:
    """The learning rate at the places of a phase where its course changes."""
    lr, tokens = phase.config.lr, phase.schedule.tokens
    places = {0, lr.warmup_tokens, tokens}
    if lr.decay != "none":
        places.add(lr.warmup_tokens if lr.decay_tokens is None else tokens - lr.decay_tokens)
    parts = [f"{lr.peak * lr_factor(lr, at, tokens):.3g} at {at:,}" for at in sorted(places)]
    shape = "" if lr.decay == "none" else f", decay {lr.decay}"
    return f"{', '.join(parts)} slots{shape}"


def _masking(phase: RunPhase) -> str:
    masking, tokens = phase.config.masking, phase.schedule.tokens
    begin, end = (mask_rate(masking, at, tokens) for at in (0, tokens))
    return f"{begin:.1%}" if begin == end else f"{begin:.1%} to {end:.1%}, linearly"
