"""The ready files resolve, on one GPU and on eight, to the runs that their sources describe."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.config import load_config
from model.config import BASE, LARGE, to_hugging_face
from model.modernbert import ModernBertForMaskedLM
from model.tiling import tile
from train.config import Train
from train.describe import describe
from train.resolve import Run, resolve
from train.schedule import Progress
from train.start import read_geometry

CONFIGS = Path(__file__).parent.parent.parent / "configs"
SOURCES = ("pubmed", "discharge", "radiology", "icd10cm", "icd9cm")


@pytest.fixture(scope="module")
def folder(data_maker: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets of both lengths for every file, and a model to start from."""
    folder = tmp_path_factory.mktemp("ready")
    for name, lengths, sources in (
        ("base", (1024, 8192), SOURCES),
        ("paper", (1024,), SOURCES),
        ("sample_gpu", (1024, 8192), SOURCES),
        ("clinical_base", (8192,), SOURCES[:3]),
    ):
        rows = {"train": dict.fromkeys(sources, 2), "validation": dict.fromkeys(sources, 1)}
        for length in lengths:
            data_maker(folder / "data" / name, rows, row_tokens=8192, max_length=length)
    start = folder / "models" / "ModernBERT-base"
    start.mkdir(parents=True)
    config = dataclasses.replace(
        BASE, vocab_size=64, pad_token_id=2, cls_token_id=0, sep_token_id=1
    )
    (start / "config.json").write_text(json.dumps(to_hugging_face(config)))
    return folder


def resolved(name: str, ranks: int, *words: str) -> Run:
    return resolve(load_config(Train, "train", CONFIGS / name, words), ranks, on_gpu=True)


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("name", ["base", "large", "clinical_base", "paper", "sample_gpu"])
def test_a_dry_run_describes_every_phase(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, ranks: int
) -> None:
    monkeypatch.chdir(folder)
    run = resolved(f"{name}.yaml", ranks)
    text = describe(run)
    for phase in run.phases.values():
        assert f"phase {phase.name}: " in text
        batch = phase.config.batch
        assert phase.micro_steps * ranks * batch.micro_rows == batch.rows
        assert batch.rows * 8192 <= 5_200_000, "a step of at most ModernBERT's 5.1 M tokens"
        assert phase.order.weights.keys() <= phase.data.sources("train").keys()
    for plan, _ in zip(run.plans(Progress()), range(3), strict=False):
        assert plan.rows % (ranks * run.phases[plan.phase].config.batch.micro_rows) == 0
    assert text.count("epochs, some") == sum(len(p.order.weights) for p in run.phases.values())


def test_base_is_modernberts_recipe_at_a_fiftieth_of_its_length(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    short, long, decay = resolved("base.yaml", 8).phases.values()
    lengths = [phase.schedule.tokens * 50 for phase in (short, long, decay)]
    assert lengths == [1_719_000_000_000, 250_000_000_000, 50_000_000_000]
    assert [phase.data.max_length for phase in (short, long, decay)] == [1024, 8192, 8192]
    assert short.config.batch.rows * 8 == 4608
    assert short.config.batch.warmup is not None
    assert short.config.batch.warmup.rows * 8 == 768
    thetas = [phase.model_config.global_rope_theta for phase in (short, long, decay)]
    assert thetas == [10_000, 160_000, 160_000]
    assert short.model_config.local_rope_theta == decay.model_config.local_rope_theta == 10_000


def test_large_is_tiled_from_base(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    run = resolved("large.yaml", 8, "init_from=models/ModernBERT-base")
    assert run.start == dataclasses.replace(
        LARGE, vocab_size=64, pad_token_id=2, cls_token_id=0, sep_token_id=1
    )
    text = describe(run)
    assert "model: 28 layers × 1024, vocabulary 64, 344,320,064 parameters" in text
    assert "init_from: models/ModernBERT-base" in text
    # As `make_model` does it, without values.
    with torch.device("meta"):
        start = ModernBertForMaskedLM(read_geometry(Path("models/ModernBERT-base")))
        assert tile(start, run.start).config == run.start


def test_the_paper_takes_150_000_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    run = resolved("paper.yaml", 1)
    assert run.last_step(Progress()) == 150_000
    assert run.config.phases["main"].lr.warmup_tokens * 10 == run.config.phases["main"].tokens


def test_clinical_base_reads_what_it_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    every, clinical = resolved("clinical_base.yaml", 1).phases.values()
    assert set(every.order.weights) == {"pubmed", "discharge", "radiology"}
    assert set(clinical.order.weights) == {"discharge", "radiology"}
    # Three times two rows of each source, rounded up to a step.
    assert every.schedule.tokens == 3 * 2 * 3 * 8192
    assert clinical.order.start["discharge"] == every.order.rows_read(576)["discharge"]
