"""The curve of a small run of two phases against one written down before, and what moves it.

All of training is in it: the order of rows, masks, the model, the loss, the schedule and the
optimizer. After a change that is meant to move it,
`python -m pytest tests/train/test_golden_curve.py --write-golden-curve` writes it anew.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import model.attention
from train.resolve import Run

GOLDEN = Path(__file__).parent / "golden_curve.json"
RELATIVE = 1e-5

Losses = Callable[[Run], list[float]]


@pytest.fixture
def run(resolved: Callable[..., Run], phases: Callable[..., Any]) -> Run:
    """Four layers, the first and the last global; windows shorter than documents.

    The weights start large, for with ModernBERT's attention is nearly even at first, and what it
    is even over hardly moves the loss.
    """
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
    }
    return geometry(
        resolved(1, phases=phases(), model=sizes), local_attention=8, initializer_range=0.3
    )


def geometry(run: Run, **changes: Any) -> Run:
    """The run with another model."""
    return replace(run, start=replace(run.start, **changes))


def golden() -> list[float]:
    losses: list[float] = json.loads(GOLDEN.read_text())["losses"]
    return losses


def test_losses_are_those_written_down(
    run: Run, plain_losses: Losses, request: pytest.FixtureRequest
) -> None:
    losses = plain_losses(run)
    if request.config.getoption("--write-golden-curve"):
        GOLDEN.write_text(json.dumps({"losses": losses}, indent=1) + "\n")
    assert losses[-1] < losses[0] - 0.1
    np.testing.assert_allclose(losses, golden(), rtol=RELATIVE)


def other_rope_of_windows(run: Run) -> Run:
    return geometry(run, local_rope_theta=run.start.local_rope_theta * 1.05)


def other_window(run: Run) -> Run:
    return geometry(run, local_attention=10)


def other_period(run: Run) -> Run:
    return geometry(run, global_attn_every_n_layers=2)


def other_rope_of_global_layers(run: Run) -> Run:
    phases = {
        name: replace(part, model_config=replace(part.model_config, global_rope_theta=9_000.0))
        for name, part in run.phases.items()
    }
    return replace(run, phases=phases)


def other_optimizer(run: Run) -> Run:
    optimizer = replace(run.config.optimizer, betas=(0.9, 0.985))
    return replace(run, config=replace(run.config, optimizer=optimizer))


@pytest.mark.parametrize(
    "mutate",
    [
        other_rope_of_windows,
        other_rope_of_global_layers,
        other_window,
        other_period,
        other_optimizer,
    ],
)
def test_another_formula_leaves_the_curve(
    mutate: Callable[[Run], Run], run: Run, plain_losses: Losses
) -> None:
    assert leaves_the_curve(plain_losses(mutate(run)))


def test_another_scale_of_attention_leaves_the_curve(
    run: Run, plain_losses: Losses, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = model.attention._softmax_attention
    monkeypatch.setattr(
        model.attention, "_softmax_attention", lambda q, *rest: plain(q * 1.01, *rest)
    )
    assert leaves_the_curve(plain_losses(run))


def leaves_the_curve(losses: list[float]) -> bool:
    """Whether the comparison above would fail."""
    return not np.allclose(losses, golden(), rtol=RELATIVE, atol=0)
