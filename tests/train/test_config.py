"""What a configuration may not say, and how that is put."""

from pathlib import Path

import pytest

from common.config import ConfigError, load_config
from train.config import Batch, Train, micro_steps

CONFIGS = Path(__file__).parent.parent.parent / "configs"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optimizer.learning_rate=1", "did you mean"),
        ("zero_stage=4", "zero_stage"),
        ("batch.rows=0", r"batch\.rows is 0"),
        ("masking.rate=1.5", r"masking\.rate is 1.5"),
        ("masking.kind=span", "'token', 'whole_word' or 'token_aware'"),
        ("masking.weight_cap=0", r"masking in .*weight_cap is 0"),
        ("masking.frequency_exponent=-1", r"masking in .*frequency_exponent is -1"),
        ("masking.random_share=0.3", r"masking\.mask_share \+ masking\.random_share"),
        ("schedule.warmup_tokens=20_000_000_000", r"schedule\.total_tokens"),
        ("checkpoint.keep=1", "at least 2"),
        ("data.weights={notes: -1}", r"data\.weights\.notes"),
        ("data.weights={}", r"data\.weights names no source"),
        ("validation.rows=0", r"validation\.rows is 0"),
        ("optimizer.betas=[1.5, 0.9]", r"optimizer\.betas has 1.5"),
        ("optimizer.weight_decay=-1", r"optimizer\.weight_decay is -1"),
        ("optimizer.weight_decay=0.01", "set 0.01 × the peak rate"),
        (
            "optimizer.muon_lr_factor=9",
            r"optimizer\.muon_lr_factor is set but optimizer\.name is stable_adamw",
        ),
        ("optimizer={name: muon, gradient_clipping: 1}", r"optimizer\.gradient_clipping"),
        ("deepspeed={communication_data_type: fp16}", r"deepspeed\.communication_data_type"),
        ("deepspeed={zero_optimization: {offload_optimizer: {device: cpu}}}", "offload_optimizer"),
        ("deepspeed={train_batch_size: 3}", r"deepspeed\.train_batch_size"),
        ("deepspeed={zero_optimization: {stage: 3}}", r"deepspeed\.zero_optimization\.stage"),
        ("model.geometry=huge", "'base' or 'large'"),
    ],
)
def test_errors_name_the_key(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Train, "train", None, [word])


def test_micro_steps() -> None:
    assert micro_steps(Batch(rows=24, micro_rows=2), ranks=3) == 4


def test_a_batch_that_does_not_divide_is_refused_with_the_counts_that_fit() -> None:
    with pytest.raises(ConfigError) as error:
        micro_steps(Batch(rows=20, micro_rows=4), ranks=3)
    message = str(error.value)
    assert "batch.rows = 12 or 24" in message
    assert "ranks one of [1, 5]" in message
    assert "batch.micro_rows" not in message.partition("what fits")[2], (
        "20 rows on 3 ranks never do"
    )


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_ready_configurations_are_valid(path: Path) -> None:
    assert load_config(Train, "train", path).run_dir != Path()
