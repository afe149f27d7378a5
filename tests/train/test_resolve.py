"""What a configuration, a data set and a number of ranks make together."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import ConfigError
from data_prep.shards import DataError
from model.config import BASE, LARGE
from model.modernbert import ModernBertForMaskedLM
from train.describe import parameter_count
from train.resolve import resolve
from train.schedule import Progress


def test_sizes_come_from_the_configuration_and_ids_from_the_tokenizer(
    resolved: Callable[..., Any],
) -> None:
    model = resolved().start
    assert (model.hidden_size, model.num_hidden_layers) == (32, 2)
    assert (model.vocab_size, model.pad_token_id, model.cls_token_id) == (64, 2, 0)
    large = resolved(model={"geometry": "large"}).start
    assert large == dataclasses.replace(
        LARGE, vocab_size=64, pad_token_id=2, cls_token_id=0, sep_token_id=1
    )


def test_parameters_are_counted_without_building_the_model(resolved: Callable[..., Any]) -> None:
    config = resolved().start
    built = sum(p.numel() for p in ModernBertForMaskedLM(config).parameters())
    assert parameter_count(config) == built
    assert parameter_count(BASE) == 149_655_232
    assert parameter_count(LARGE) == 395_881_664


def test_sizes_that_cannot_be_built_name_the_key(resolved: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="hidden_size 30"):
        resolved(model={"hidden_size": 30, "num_attention_heads": 4})


def test_a_tokenizer_that_is_not_the_data_sets_is_refused(
    resolved: Callable[..., Any], data_maker: Callable[..., Path], tmp_path: Path
) -> None:
    rows = {"train": {"notes": 8}, "validation": {"notes": 2}}
    data = data_maker(tmp_path / "data", rows)
    assert resolved(phase={"data": {"dir": data}}).phases["main"].data.folder == data
    (tmp_path / "data" / "tokenizer" / "tokenizer.json").write_text("[]")
    with pytest.raises(DataError, match=r"tokenizer\.json is not the tokenizer"):
        resolved(phase={"data": {"dir": data}})


def test_validation_rows_are_shared_out(resolved: Callable[..., Any]) -> None:
    assert resolved().phases["main"].validation_rows == {"notes": 2, "papers": 3}
    whole = resolved(validation={"every_steps": 6, "rows": 100})
    assert whole.phases["main"].validation_rows == {"notes": 3, "papers": 6}


def test_without_validation_rows_the_key_that_makes_some_is_named(
    resolved: Callable[..., Any], data_maker: Callable[..., Path], tmp_path: Path
) -> None:
    data = data_maker(tmp_path / "data", {"train": {"notes": 8}, "validation": {}})
    with pytest.raises(DataError, match="a larger validation_share"):
        resolved(phase={"data": {"dir": data}})


def test_deepspeed_gets_what_the_run_says_and_its_own_keys(resolved: Callable[..., Any]) -> None:
    assert resolved(zero_stage=1).deepspeed["zero_optimization"]["overlap_comm"] is True
    extra = {"zero_optimization": {"overlap_comm": False}, "memory_breakdown": False}
    settings = resolved(2, zero_stage=2, deepspeed=extra).deepspeed
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["zero_optimization"] == {
        "stage": 2,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": 25_000_000,
        "compute_grad_norm": False,
    }
    assert settings["memory_breakdown"] is False
    assert "bf16" not in settings
    half = resolved(precision="bf16").deepspeed
    assert half["bf16"]["enabled"]
    assert half["data_types"] == {"grad_accum_dtype": "fp32"}
    assert half["communication_data_type"] == "fp32"


@pytest.mark.parametrize("asked", ["auto", "bf16"])
def test_a_gpu_without_bf16_says_the_key(
    resolved: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    capability = (7, 5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    config = resolved(precision=asked).config
    message = (
        f"^precision is {asked}, but Tesla T4 has no bf16: its compute capability is 7.5, bf16 "
        "begins with 8.0; set precision=fp32$"
    )
    with pytest.raises(ConfigError, match=message):
        resolve(config, 1, on_gpu=True)
    assert resolve(config, 1, on_gpu=False).precision == ("fp32" if asked == "auto" else "bf16")
    whole = dataclasses.replace(config, precision="fp32")
    assert resolve(whole, 1, on_gpu=True).precision == "fp32"
    capability = (8, 0)
    assert resolve(config, 1, on_gpu=True).precision == "bf16"


def test_phases_follow_one_another_on_their_own_data(
    resolved: Callable[..., Any], phases: Callable[..., Any]
) -> None:
    run = resolved(2, phases=phases())
    short, long = run.phases.values()
    assert (short.shape.tokens, long.shape.tokens) == (64, 2 * 128)
    assert (short.shape.max_length, long.shape.max_length) == (32, 64)
    assert long.shape.masked == 128, "room for 2 × 38, by the phase's highest rate, in 64s"
    assert (short.micro_steps, long.micro_steps) == (4, 1)
    assert short.validation_rows == {"notes": 2, "papers": 3}
    assert long.validation_rows == {"notes": 2, "papers": 3}
    assert run.deepspeed["gradient_accumulation_steps"] == 4
    assert run.last_step(Progress()) == 12
    assert run.start.max_position_embeddings == 8192
    thetas = [phase.model_config.global_rope_theta for phase in (short, long)]
    assert thetas == [10_000, 160_000]


def test_a_phase_keeps_the_base_of_the_one_before(
    resolved: Callable[..., Any], phases: Callable[..., Any]
) -> None:
    parts = phases()
    del parts["long"]["global_rope_theta"]
    assert resolved(phases=parts).phases["long"].model_config.global_rope_theta == 10_000


def test_a_phase_reads_on_where_another_left_the_same_data(
    resolved: Callable[..., Any], phases: Callable[..., Any]
) -> None:
    parts = phases()
    again = {**parts["short"], "tokens": 5120}
    run = resolved(phases={**parts, "again": again})
    short, long, third = run.phases.values()
    assert third.order.start == short.order.rows_read(40)
    assert sum(third.order.start.values()) == short.schedule.rows() == 40
    assert sum(long.order.start.values()) == 0


def test_phases_of_other_tokenizers_are_refused(
    resolved: Callable[..., Any],
    phases: Callable[..., Any],
    data_maker: Callable[..., Path],
    tmp_path: Path,
) -> None:
    rows = {"train": {"notes": 8}, "validation": {"notes": 2}}
    other = data_maker(tmp_path / "other", rows)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["tokenizer"]["sha256"] = "1" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    parts = phases()
    parts["long"]["data"] = {"dir": str(other)}
    with pytest.raises(ConfigError, match=r"phases\.long\.data\.dir = .* another tokenizer"):
        resolved(phases=parts)


def test_epochs_of_every_source_make_the_length_of_a_phase(
    resolved: Callable[..., Any], data_folder: Path
) -> None:
    """40 rows of notes three times, 90 of papers once and a half."""
    data = {"dir": str(data_folder), "epochs": {"notes": 3, "papers": 1.5}}
    phase = resolved(phase={"data": data, "tokens": None}).phases["main"]
    assert phase.schedule.tokens == (120 + 135) * 64
    rows = phase.schedule.rows()
    assert rows == 256, "whole steps of 8"
    assert phase.order.rows_read(255) == {"notes": 120, "papers": 135}
    for source, number in phase.order.rows_read(rows).items():
        assert 0 <= number - data["epochs"][source] * phase.order.rows[source] <= 1


def test_epochs_of_some_sources_leave_the_rest_to_the_others(
    resolved: Callable[..., Any], data_folder: Path
) -> None:
    data = {"dir": str(data_folder), "epochs": {"notes": 2}}
    phase = resolved(phase={"data": data, "tokens": 160 * 64}).phases["main"]
    assert phase.order.rows_read(160) == {"notes": 80, "papers": 80}


def test_a_small_source_beside_a_large_one_is_read_as_often_as_asked(
    resolved: Callable[..., Any], data_maker: Callable[..., Path], tmp_path: Path
) -> None:
    """Seldom, but to the row: by an epoch that is no round number in binary, over two phases."""
    rows = {"train": {"codes": 10, "notes": 200}, "validation": {"notes": 2}}
    data = {"dir": str(data_maker(tmp_path / "data", rows)), "epochs": {"codes": 0.7}}
    # Left to the notes: 793 rows of the first phase, of which 7 are of codes.
    part = {"data": data, "tokens": 800 * 64, "batch": {"rows": 8, "micro_rows": 2}}
    one, two = resolved(phases={"one": part, "two": part}).phases.values()
    assert one.order.rows_read(800) == two.order.rows_read(800) == {"codes": 7, "notes": 793}
    assert two.order.start == {"codes": 7, "notes": 793}
    codes = [
        phase.order[number].row
        for phase in (one, two)
        for number in range(800)
        if phase.order[number].source == "codes"
    ]
    assert sorted(codes[:10]) == list(range(10))


@pytest.mark.parametrize(
    ("epochs", "tokens", "message"),
    [
        ({"notes": 1, "papers": 1}, 6144, "names every source, so that 130 rows are read, 8,320"),
        ({"notes": 3}, 6144, r"asks for 7,680 slots, which leaves nothing of tokens = 6,144"),
        ({"labels": 3}, 6144, r"phases\.main\.data\.epochs\.labels: .* it has notes, papers"),
    ],
)
def test_epochs_that_do_not_fit_are_refused(
    resolved: Callable[..., Any],
    data_folder: Path,
    epochs: dict[str, float],
    tokens: int,
    message: str,
) -> None:
    data = {"dir": str(data_folder), "epochs": epochs}
    with pytest.raises(ConfigError, match=message):
        resolved(phase={"data": data, "tokens": tokens})


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (
            {"lr": {"warmup_tokens": 7000}},
            r"lr\.decay_tokens is 7,000, more than the phase's 6,144",
        ),
        ({"lr": {"warmup_tokens": 6144, "decay": "sqrt"}}, r"leaves no tokens for lr\.decay"),
        (
            {
                "batch": {
                    "rows": 8,
                    "micro_rows": 2,
                    "warmup": {"rows": 2, "increment": 2, "tokens": 7000},
                }
            },
            r"batch\.warmup\.tokens is 7,000",
        ),
    ],
)
def test_ramps_longer_than_their_phase_are_refused(
    resolved: Callable[..., Any], phase: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"phases.main: .*{message}"):
        resolved(phase=phase)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_stage": 0, "precision": "bf16", "grad_accum_dtype": "fp32"}, "set zero_stage=1"),
        ({"precision": "fp32", "grad_accum_dtype": "bf16"}, "weights are fp32"),
    ],
)
def test_sums_that_deepspeed_has_no_place_for_are_refused(
    resolved: Callable[..., Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"grad_accum_dtype is .*{message}"):
        resolved(**changes)


def test_a_trace_is_asked_of_a_rank_that_there_is(resolved: Callable[..., Any]) -> None:
    profile = {"first_step": 3, "rank": 1}
    assert resolved(2, profile=profile).config.profile.rank == 1
    with pytest.raises(ConfigError, match=r"profile\.rank is 1, and the run's ranks are 0 to 0"):
        resolved(1, profile=profile)


def test_steps_do_not_depend_on_the_number_of_ranks(
    resolved: Callable[..., Any], phases: Callable[..., Any]
) -> None:
    plans = [list(resolved(ranks, phases=phases()).plans(Progress())) for ranks in (1, 2)]
    assert plans[0] == plans[1]
    orders = [resolved(ranks, phases=phases()).phases["long"].order for ranks in (1, 2)]
    assert [orders[0][row] for row in range(50)] == [orders[1][row] for row in range(50)]
