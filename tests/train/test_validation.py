"""Validation: the same figures on any number of ranks, equal to a plain computation."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from model.attention import LongDocuments
from model.modernbert import ModernBertForMaskedLM
from train import validation
from train.ranks import Ranks
from train.validation import Validation

pytestmark = pytest.mark.usefixtures("joined")


class Engine(SimpleNamespace):
    """What validation uses of an engine."""

    def eval(self) -> None:
        self.module.eval()

    def train(self) -> None:
        self.module.train()


def make_engine(run: Any) -> Engine:
    generator = torch.Generator().manual_seed(1)
    return Engine(module=ModernBertForMaskedLM(run.start, generator))


def plain(run: Any, engine: Engine, source: str) -> tuple[float, int, int]:
    """Loss, correct and masked tokens of a source, a row at a time."""
    total, correct, masked = 0.0, 0, 0
    for number in range(run.phases["main"].validation_rows[source]):
        row = run.phases["main"].data.read("validation", source, number)
        ids = row.input_ids.astype(np.int64)
        maskable = int((ids > 4).sum())
        mask = run.phases["main"].masker.mask(ids, maskable, 0.15, "validation", source, number)
        ids[mask.positions] = mask.replacements
        lengths = np.diff(row.cu_seqlens)
        positions = np.arange(64) - np.repeat(row.cu_seqlens[:-1], lengths)
        with torch.no_grad():
            hidden = engine.module.encode(
                torch.from_numpy(ids),
                torch.from_numpy(positions.astype(np.int64)),
                torch.from_numpy(row.cu_seqlens),
                64,
            )
            logits = engine.module.logits(hidden[torch.from_numpy(mask.positions)])
        labels = torch.from_numpy(mask.labels)
        total += float(F.cross_entropy(logits, labels, reduction="sum"))
        correct += int((logits.argmax(-1) == labels).sum())
        masked += len(labels)
    return total, correct, masked


def test_figures_are_those_of_a_plain_computation(
    resolved: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "LOGIT_ROWS", 7)
    run = resolved()
    engine = make_engine(run)
    found = Validation(run.phases["main"], 0.15, Ranks(), torch.device("cpu"))(engine)
    sums = {source: plain(run, engine, source) for source in ("notes", "papers")}
    for source, (loss, correct, masked) in sums.items():
        part = found["by_source"][source]
        assert part["loss"] == pytest.approx(loss / masked, rel=1e-5)
        assert part["accuracy"] == pytest.approx(correct / masked)
        assert part["masked_tokens"] == masked
    losses, corrects, counts = (sum(column) for column in zip(*sums.values(), strict=True))
    assert found["loss"] == pytest.approx(losses / counts, rel=1e-5)
    assert found["accuracy"] == pytest.approx(corrects / counts)
    assert engine.module.training


@pytest.mark.parametrize("kind", ["whole_word", "token_aware"])
def test_validation_masks_plainly_however_training_does(
    resolved: Callable[..., Any], kind: str
) -> None:
    runs = [resolved(), resolved(phase={"masking": {"kind": kind, "term_sources": []}})]
    figures = [
        Validation(run.last_phase, 0.15, Ranks(), torch.device("cpu"))(make_engine(run))
        for run in runs
    ]
    assert figures[0] == figures[1]


def test_ranks_share_the_rows_and_no_row_counts_twice(
    resolved: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = resolved(4)
    engine = make_engine(run)
    alone = Validation(run.phases["main"], 0.15, Ranks(), torch.device("cpu"))(engine)
    sums: list[torch.Tensor] = []
    monkeypatch.setattr(
        validation, "sum_over_ranks", lambda tensor: sums.append(tensor.clone()) or tensor
    )
    for rank in range(4):
        Validation(run.phases["main"], 0.15, Ranks(rank=rank, size=4), torch.device("cpu"))(engine)
    loss, correct, masked = torch.stack(sums).sum(0).sum(1).tolist()
    assert masked == alone["masked_tokens"]
    assert correct / masked == pytest.approx(alone["accuracy"])
    assert loss / masked == pytest.approx(alone["loss"], rel=1e-5)


def test_the_model_is_told_which_documents_are_long(
    resolved: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, told = resolved(), []
    encode = ModernBertForMaskedLM.encode

    def watched(*values: Any) -> Any:
        told.append(values[-1])
        return encode(*values)

    monkeypatch.setattr(ModernBertForMaskedLM, "encode", watched)
    Validation(run.phases["main"], 0.15, Ranks(), torch.device("cpu"))(make_engine(run))
    # No document of this data is long.
    assert set(told) == {LongDocuments(0, 0)}
