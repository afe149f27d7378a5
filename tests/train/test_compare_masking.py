"""The comparison of ways of masking: scores against validation's, and two tiny trainings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.config import ConfigError
from model.modernbert import ModernBertForMaskedLM
from train import compare_masking
from train.compare_masking import score, table
from train.mask_order import token_statistics
from train.ranks import Ranks
from train.token_weights import BANDS
from train.validation import Validation

TERMS = {"term_sources": ["notes"]}


class Engine:
    """What validation uses of an engine."""

    def __init__(self, module: ModernBertForMaskedLM) -> None:
        self.module = module
        self.eval = self.train = module.eval


@pytest.mark.usefixtures("joined")
def test_scores_are_those_of_validation(resolved: Callable[..., Any]) -> None:
    run = resolved(phase={"masking": TERMS | {"kind": "whole_word"}})
    model = ModernBertForMaskedLM(run.start, torch.Generator().manual_seed(1)).eval()
    found = score(run, model, torch.device("cpu"))
    wanted = Validation(run.last_phase, 0.15, Ranks(), torch.device("cpu"))(Engine(model))
    for name in ("loss", "accuracy", "masked_tokens"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-5)
    bands = found["by_frequency"].values()
    assert sum(band["masked_tokens"] for band in bands) == found["masked_tokens"]
    total = sum(band["masked_tokens"] * band["loss"] for band in bands)
    assert total / found["masked_tokens"] == pytest.approx(found["loss"])
    assert 0 < found["terms"]["masked_tokens"] < found["masked_tokens"]
    assert found["words"]["words"] > 0
    with pytest.raises(ConfigError, match=r"masking\.term_sources"):
        score(resolved(phase={"masking": {"term_sources": []}}), model, torch.device("cpu"))


def words_of(ids: list[int]) -> list[list[int]]:
    """In the fixture's vocabulary an ordinary id divisible by 3 begins a word."""
    words: list[list[int]] = []
    before = 0
    for token in ids:
        if token > 4:
            if before <= 4 or token % 3 == 0:
                words.append([])
            words[-1].append(token)
        before = token
    return words


def test_a_word_is_right_when_all_its_tokens_are(
    resolved: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every word that holds a term is masked; guessed are the tokens not 1 modulo 3."""
    run = resolved(phase={"masking": TERMS})

    def guess(_: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(len(batch.labels)), batch.labels % 3 != 1

    monkeypatch.setattr(compare_masking, "predict", guess)
    monkeypatch.setattr(compare_masking, "WORD_SHARE", 1.0)
    found = score(run, ModernBertForMaskedLM(run.start), torch.device("cpu"))["words"]
    special = run.last_phase.masker.vocabulary.special
    texts = ["" if special[i] else "word" for i in range(64)]
    _, terms = token_statistics(run.last_phase.config.masking, run.last_phase.data, texts, special)
    words = []
    for source, rows in run.last_phase.validation_rows.items():
        for number in range(rows):
            ids = run.last_phase.data.read("validation", source, number).input_ids.tolist()
            words += [word for word in words_of(ids) if any(terms[token] for token in word)]
    right = [all(token % 3 != 1 for token in word) for word in words]
    assert 0 < sum(right) < len(right) == found["words"]
    assert found["accuracy"] == pytest.approx(np.mean(right))
    assert found["loss"] == pytest.approx(sum(map(len, words)) / len(words))


def make_record(kind: str, seed: int, value: float) -> dict[str, Any]:
    part = {"loss": value, "accuracy": value}
    bands = dict.fromkeys(BANDS, part)
    record = {"kind": kind, "seed": seed, "tokens": 1000, "loss": value, "accuracy": value}
    return record | {"by_frequency": bands, "terms": part, "words": part}


def test_the_table_has_means_and_deviations_over_seeds() -> None:
    records = [make_record("token", 1, 0.25), make_record("token", 2, 0.75)]
    lines = table([*records, make_record("whole_word", 1, 0.5)]).splitlines()
    assert lines[2].startswith("| token | 2 | 1,000 | 0.5000 ± 0.3536 |")
    assert lines[3].startswith("| whole_word | 1 | 1,000 | 0.5000 |")
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.slow
def test_the_command_trains_and_scores_every_way(
    launcher: Any, data_folder: Path, tmp_path: Path
) -> None:
    config = launcher.write("base", data_folder, phase={"masking": TERMS})
    out = tmp_path / "out"
    words = ["--config", str(config), "--out", str(out), "--seeds", "1", "log.every_steps=6"]
    script = tmp_path / "command.py"
    script.write_text("import sys\nfrom train.compare_masking import main\nsys.exit(main())\n")
    finished = launcher.run(1, *words, script=script)
    assert finished.code == 0, finished.err
    records = json.loads((out / "masking.json").read_text())
    assert [record["kind"] for record in records] == ["token", "whole_word", "token_aware"]
    assert len({record["tokens"] for record in records}) == 1, "equal tokens"
    assert len({record["loss"] for record in records}) == 3
    assert (out / "masking.md").read_text() in finished.out
    for record in records:
        lines = (out / f"{record['kind']}-1" / "metrics.jsonl").read_text().splitlines()
        last = [r for r in map(json.loads, lines) if r["kind"] == "validation"][-1]
        assert record["loss"] == pytest.approx(last["loss"], rel=1e-5)
