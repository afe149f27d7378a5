"""What a configuration may not say, and how that is put."""

from pathlib import Path

import pytest

from common.config import ConfigError, load_config
from train.config import Train
from train.phase_config import Batch, BatchWarmup, micro_steps

CONFIGS = Path(__file__).parent.parent.parent / "configs"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optimizer.learning_rate=1", "did you mean"),
        ("zero_stage=4", "zero_stage"),
        ("phases={}", "phases is empty"),
        ("phases={'a.b': {data: {dir: x}, tokens: 1}}", "letters, digits"),
        ("phases.main.batch.row=8", r"did you mean 'phases\.main\.batch\.rows'"),
        ("phases.main.weight_decay=0.01", r"phases\.main .*weight_decay is 0.01: it is the share"),
        # A phase that a word names by mistake is none.
        (
            "phases.mian.batch.rows=8",
            r"lacks the key 'phases\.mian\.data'; did you mean 'phases.main'",
        ),
        ("phases.main.tokens=0", r"phases\.main.*tokens is 0"),
        ("phases.main.tokens=null", r"phases\.main.*tokens is missing"),
        ("phases.main.batch.rows=0", r"phases\.main\.batch.*rows is 0"),
        ("phases.main.batch.warmup={rows: 8, increment: 10, tokens: 9}", "8 rows by 10"),
        ("phases.main.batch.warmup={rows: 0, increment: 10, tokens: 9}", r"warmup.*rows is 0"),
        ("phases.main.masking.rate=1.5", r"phases\.main\.masking.*rate is 1.5"),
        ("phases.main.masking.final_rate=0", r"final_rate is 0"),
        ("phases.main.masking.kind=span", "'token', 'whole_word' or 'token_aware'"),
        ("phases.main.masking.weight_cap=0", r"masking in .*weight_cap is 0"),
        ("phases.main.masking.frequency_exponent=-1", r"masking in .*frequency_exponent is -1"),
        ("phases.main.masking.random_share=0.3", r"mask_share \+ random_share"),
        ("phases.main.lr.peak=0", r"phases\.main\.lr.*peak is 0"),
        ("phases.main.lr.decay=none", "decay_tokens needs a shape"),
        ("phases.main.lr.final_share=1", "final_share is 1"),
        ("phases.main.lr={decay: none, final_share: 0.1}", "final_share needs a shape"),
        ("deepspeed={zero_optimisation: {stage: 1}}", "no such key.*mean zero_optimization"),
        ("deepspeed={gradient_clip: 1.0}", r"deepspeed\.gradient_clip: DeepSpeed has no such key"),
        ("deepspeed={activation_checkpointing: {}}", "`recompute` says"),
        ("phases.main.global_rope_theta=0", "global_rope_theta is 0"),
        ("init_optimizer=kept", "init_from names no checkpoint"),
        ("checkpoint.keep=1", "at least 2"),
        ("phases.main.data.weights={notes: -1}", r"data.*weights\.notes"),
        ("phases.main.data.weights={notes: .inf}", r"weights\.notes is inf"),
        ("phases.main.data.weights={}", r"data.*weights names no source"),
        ("phases.main.data={dir: x, weights: {a: 1}, epochs: {a: 1}}", "both say how much"),
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
        ("deepspeed={train_batch_size: 3}", r"deepspeed\.train_batch_size: set the run's own key"),
        ("deepspeed={amp: {enabled: true}}", r"deepspeed\.amp: `precision`.* say all dtypes"),
        ("deepspeed={torch_autocast: {enabled: true}}", r"deepspeed\.torch_autocast: `precision`"),
        ("deepspeed={gradient_allreduce_op: sum}", r"gradient_allreduce_op: batches"),
        ("deepspeed={zero_optimization: {offload_param: {device: cpu}}}", "stay on the GPU"),
        ("deepspeed={zero_optimization: {cpu_offload: true}}", "stay on the GPU"),
        ("deepspeed={zero_optimization: {zero_hpz_partition_size: 8}}", "lays parameters out"),
        ("deepspeed={zero_optimization: {round_robin_gradients: true}}", "lays parameters out"),
        ("deepspeed={zero_optimization: {zero_quantized_gradients: true}}", "`reduce_dtype` says"),
        ("deepspeed={bfloat16: {enabled: true}}", r"deepspeed\.bfloat16"),
        ("deepspeed={bf16: true}", r"deepspeed\.bf16 must hold keys, not True"),
        ("deepspeed={zero_optimization: true}", "zero_optimization must hold keys"),
        ("deepspeed={bf16: {enabled: true}}", r"deepspeed\.bf16\.enabled: .*`precision`"),
        ("deepspeed={bf16: {check_grad_overflow: false}}", "may only be true"),
        ("deepspeed={zero_optimization: {compute_grad_norm: false}}", "may only be true"),
        ("deepspeed={zero_optimization: {stage: 3}}", r"deepspeed\.zero_optimization\.stage"),
        ("model.geometry=huge", "'base' or 'large'"),
        ("train.seed=3", "unknown key 'train' in .*leave 'train.' away"),
        ("phases.main.tokens=1e9", "'1e9' is no whole number; write it out, as in 1_000_000_000"),
    ],
)
def test_errors_name_the_key(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Train, "train", CONFIGS / "demo.yaml", [word])


def test_deepspeeds_own_keys_are_left_to_it() -> None:
    word = (
        "deepspeed={comms_logger: {enabled: true}, bf16: {check_grad_overflow: true}, "
        "zero_optimization: {reduce_bucket_size: 100, compute_grad_norm: true}}"
    )
    keys = load_config(Train, "train", CONFIGS / "demo.yaml", [word]).deepspeed
    assert keys["comms_logger"] == {"enabled": True}
    assert keys["zero_optimization"] == {"reduce_bucket_size": 100, "compute_grad_norm": True}


def test_micro_steps() -> None:
    assert micro_steps("main", Batch(rows=24, micro_rows=2), ranks=3) == 4


def test_every_size_of_a_batch_warm_up_must_divide() -> None:
    warmup = BatchWarmup(rows=12, increment=6, tokens=100)
    batch = Batch(rows=24, micro_rows=2, warmup=warmup)
    assert micro_steps("main", batch, ranks=3) == 4
    with pytest.raises(ConfigError, match=r"phases\.main: 2 ranks .* batch\.warmup\.increment = 6"):
        micro_steps("main", batch, ranks=2)


def test_a_batch_that_does_not_divide_is_refused_with_the_counts_that_fit() -> None:
    with pytest.raises(ConfigError) as error:
        micro_steps("main", Batch(rows=20, micro_rows=4), ranks=3)
    message = str(error.value)
    assert "batch.rows = 12 or 24" in message
    assert "ranks one of [1, 5]" in message
    assert "batch.micro_rows" not in message.partition("what fits")[2], (
        "20 rows on 3 ranks never do"
    )


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_ready_configurations_are_valid(path: Path) -> None:
    assert load_config(Train, "train", path).run_dir != Path()
