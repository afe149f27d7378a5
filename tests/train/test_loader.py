"""The loader hands out what its rows hold, from any step on, and its errors reach the loop."""

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from data_prep.shards import DataError, DataSet, Row
from train.loader import Ahead, Loader, RowCounts, StepMaker
from train.schedule import Progress, StepPlan

PAD = 2


def maker_of(run: Any, rank: int = 0) -> StepMaker:
    return StepMaker(run, rank)


def test_counts_of_the_index_are_those_of_the_rows(data_folder: Path) -> None:
    data = DataSet(data_folder)
    counts = RowCounts(data, "train")
    for source, rows in data.sources("train").items():
        for number in range(rows):
            ids = data.read("train", source, number).input_ids
            assert counts.tokens(source, number) == (ids != PAD).sum()
            assert counts.maskable(source, number) == (ids > 4).sum()


def documents_of(rows: list[Row]) -> list[NDArray[np.int64]]:
    """The tokens of the documents of some rows, longest first."""
    documents = [
        row.input_ids[a:b].astype(int)
        for row in rows
        for a, b in itertools.pairwise(row.cu_seqlens[: len(row.documents) + 1])
    ]
    return sorted(documents, key=len, reverse=True)


@pytest.mark.parametrize(
    ("ranks", "kind"), [(1, "token"), (2, "token"), (4, "token"), (2, "whole_word")]
)
def test_ranks_share_the_same_rows_and_know_the_step(
    resolved: Callable[..., Any], ranks: int, kind: str
) -> None:
    run = resolved(ranks, phase={"masking": {"kind": kind}})
    phase = run.phases["main"]
    plan = list(run.plans(Progress()))[1]
    parts = [list(maker_of(run, rank).micro_batches(plan)) for rank in range(ranks)]
    assert {len(part) for part in parts} == {phase.micro_steps}
    # Micro-step by micro-step, rank by rank, the rows are those of the order.
    batches = [part[k] for k in range(phase.micro_steps) for part in parts]
    rows = itertools.count(plan.first_row)
    for batch in batches:
        ats = [phase.order[next(rows)] for _ in range(phase.shape.rows)]
        read = documents_of([phase.data.read("train", at.source, at.row) for at in ats])
        found = [batch.input_ids[a:b].numpy() for a, b in itertools.pairwise(batch.cu_seqlens)]
        found = [tokens for tokens in found if len(tokens) and tokens[0] != PAD]
        for masked, tokens in zip(found, read, strict=True):
            assert (masked == tokens)[tokens < 5].all(), "special tokens stay"
        changed = np.concatenate(found) != np.concatenate(read)
        real = np.flatnonzero(batch.input_ids != PAD)
        assert set(real[changed]) <= set(batch.masked_indices[: batch.masked_tokens].tolist())
        assert changed.sum() > batch.masked_tokens / 2, "most of the masked tokens are replaced"
    ids = torch.cat([batch.input_ids for batch in batches])
    counts = maker_of(run).counts(plan)
    masked = sum((batch.labels != -100).sum() for part in parts for batch in part)
    assert counts.masked_tokens == masked
    assert counts.masked_tokens == sum(b.masked_tokens for part in parts for b in part)
    assert counts.tokens == (ids != PAD).sum()
    assert counts.tokens == sum(b.lengths.sum() for part in parts for b in part)
    for number, source in enumerate(phase.shape.sources):
        found = [(b.masked_sources == number) & (b.labels != -100) for p in parts for b in p]
        assert counts.masked_by_source[source] == torch.cat(found).sum()


@pytest.mark.parametrize("kind", ["token", "whole_word", "token_aware"])
def test_masks_do_not_depend_on_the_number_of_ranks(
    resolved: Callable[..., Any], kind: str
) -> None:
    labels = []
    for ranks in (1, 4):
        run = resolved(ranks, phase={"masking": {"kind": kind, "term_sources": ["notes"]}})
        plan = next(run.plans(Progress()))
        batches = [b for rank in range(ranks) for b in maker_of(run, rank).micro_batches(plan)]
        found = torch.cat([batch.labels for batch in batches])
        labels.append(sorted(found[found != -100].tolist()))
    assert labels[0] == labels[1]


def test_loader_is_the_maker_and_starts_anywhere(resolved: Callable[..., Any]) -> None:
    run = resolved(2)
    maker = maker_of(run, rank=1)
    plans = list(run.plans(Progress()))
    with Loader(maker, plans[3:], pin=False) as loader:
        seen = 0
        for loaded, plan in zip(loader, plans[3:], strict=True):
            assert loaded.plan == plan
            assert loaded.counts == maker.counts(plan)
            pairs = zip(loaded.micro_batches, maker.micro_batches(plan), strict=True)
            for got, expected in pairs:
                seen += 1
                assert torch.equal(got.input_ids, expected.input_ids)
                assert torch.equal(got.labels, expected.labels)
        assert seen == (len(plans) - 3) * run.phases["main"].micro_steps
        assert loader.wait_seconds > 0


def test_an_error_of_the_thread_reaches_the_loop(
    resolved: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = resolved(1)
    monkeypatch.setattr(run.phases["main"].data, "read", _refuse)
    with Loader(maker_of(run), run.plans(Progress()), pin=False) as loader:
        step = next(iter(loader))
        with pytest.raises(DataError, match="shard 7 is damaged"):
            next(step.micro_batches)


def _refuse(*_: object) -> None:
    raise DataError("shard 7 is damaged")


def test_items_are_made_ahead_but_not_far() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in itertools.count():
            made.append(number)
            yield number

    ahead = Ahead(items(), size=3)
    ahead.start()
    assert [next(ahead) for _ in range(2)] == [0, 1]
    ahead.stop()
    # Two taken, three waiting, one in hand, and at most four more that stopping made room for.
    assert len(made) <= 10
    assert not any(thread.name == "loader" for thread in threading.enumerate())


def test_the_end_stays_the_end() -> None:
    ahead = Ahead(iter([np.int64(1)]), size=3)
    ahead.start()
    assert list(ahead) == [1]
    assert list(ahead) == []
    ahead.stop()


def test_plan_of_a_run_is_a_plan(resolved: Callable[..., Any]) -> None:
    run = resolved(1)
    plans = list(run.plans(Progress()))
    assert len(plans) == run.last_step(Progress()) == 12
    assert all(isinstance(plan, StepPlan) for plan in plans)
