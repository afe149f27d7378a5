"""When a run must not go on."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.config import ConfigError
from model.attention import Choice
from model.attention_choice import AttentionError
from train import loop
from train.checkpoint import Found
from train.loop import MOST_SKIPPED_IN_A_ROW, TrainingError, check_finite, where_from
from train.optimizer_step import Norms, SkippedInARow
from train.resolve import Run
from train.schedule import Progress, Rates, StepPlan

PLAN = StepPlan(
    step=7,
    phase="long",
    first_row=0,
    rows=8,
    slots=512,
    rates=Rates(lr=1e-3, peak=1e-3, weight_decay=0.0),
    mask_rate=0.3,
    ends_phase=False,
)


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        (Norms(gradient=1.0, update=0.1, skipped_in_a_row=0), None),
        (Norms(gradient=math.inf, update=0.0, skipped_in_a_row=1), None),
        (Norms(gradient=1.0, update=math.nan, skipped_in_a_row=0), "the update is nan"),
        (Norms(gradient=1.0, update=math.inf, skipped_in_a_row=0), "the update is inf"),
        (Norms(math.inf, 0.0, MOST_SKIPPED_IN_A_ROW), "gradients of 20 steps in a row"),
    ],
)
def test_a_run_ends_where_its_weights_are_spoilt(norms: Norms, message: str | None) -> None:
    """A step that was left out spoils nothing, but many in a row never end."""
    if message is None:
        check_finite(PLAN, norms)
    else:
        with pytest.raises(TrainingError, match=f"at step 7 .*{message}.*lower phases.long.lr"):
            check_finite(PLAN, norms)


def test_a_row_that_ended_before_a_logged_step_is_still_said() -> None:
    skipped = SkippedInARow()
    for step in [True] * 20 + [False]:
        skipped.add(step)
    assert skipped.take() == 20
    skipped.add(False)
    assert skipped.take() == 0
    for step in [True, False, True, True]:
        skipped.add(step)
    assert skipped.take() == 2
    skipped.add(True)
    assert skipped.take() == 3, "a row that goes on counts from its beginning"
    skipped.add(False)
    assert skipped.take() == 0


@pytest.mark.parametrize(
    ("init_from", "found", "said"),
    [
        (None, Found(None, [], [], Progress()), "starts anew"),
        ("START", Found(None, [], [], Progress()), "starts with the weights of START"),
        (
            "START",
            Found(Path("START"), [], [], Progress()),
            "starts with the weights and the optimizer of START",
        ),
        ("START", Found(Path("RUN"), [], [], Progress(4)), "continues from RUN"),
    ],
)
def test_a_run_says_what_it_begins_with(
    resolved: Callable[..., Run], init_from: str | None, found: Found, said: str
) -> None:
    run = resolved()
    config = replace(run.config, init_from=None if init_from is None else Path(init_from))
    assert where_from(replace(run, config=config), found) == said


def test_attention_that_does_not_work_ends_a_run_in_one_line(
    resolved: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package can be installed and not work; it is tried out before anything depends on it."""

    def check(*arguments: object) -> None:
        raise AttentionError("attention fa4 does not run (ImportError: no kernel). Set …")

    monkeypatch.setattr(loop, "choose_attention", lambda *arguments: Choice("fa4", "kernel"))
    monkeypatch.setattr(loop, "check_attention", check)
    with pytest.raises(ConfigError, match=r"^attention fa4 does not run .* Set …$"):
        loop._choose_attention(resolved(), torch.device("cuda"))
