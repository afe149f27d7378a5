"""Loss and accuracy on the validation rows: the same rows under the same masks every time."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.attention import Queries
from model.modernbert import ModernBertForMaskedLM
from train.batch import PackedBatch, pack
from train.engine import Engine
from train.loader import RowCounts
from train.mask_order import TokenOrder
from train.masking import IGNORED
from train.ranks import Ranks, sum_over_ranks
from train.resolve import RunPhase

LOGIT_ROWS = 2_048
"""masked positions whose logits are held at once"""


class Validation:
    """Runs the model over a fixed part of a phase's validation rows, shared out over the ranks."""

    def __init__(self, phase: RunPhase, rate: float, ranks: Ranks, device: torch.device) -> None:
        """rate: the masking rate, the same in all phases, so that their figures compare."""
        self._phase, self._rate, self._ranks, self._device = phase, rate, ranks, device
        self._sources = sorted(phase.validation_rows)
        self._rows = [
            (source, row)
            for source in self._sources
            for row in range(phase.validation_rows[source])
        ]
        self._counts = RowCounts(phase.data, "validation")
        # Plain, however training masks, so that losses of different runs compare.
        self._masker = replace(phase.masker, order=TokenOrder())
        self._shape = replace(phase.shape, highest_rate=rate)

    def __call__(self, engine: Engine) -> dict[str, Any]:
        """Loss in nats a masked token and accuracy, in all and by source; every rank calls this.

        Sums run over all ranks, so the figures do not depend on how rows are shared out.
        """
        # Rows: loss, correct, masked tokens; a column a source. One transfer at the end.
        sources = self._shape.sources
        sums = torch.zeros(3, len(sources), dtype=torch.float64, device=self._device)
        engine.eval()
        # Not compiled: few batches, for which every graph would have to be compiled once more.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for batch in self._batches():
                self._add(engine.module, batch, sums)
        engine.train()
        by_source = dict(zip(sources, sum_over_ranks(sums).T.tolist(), strict=True))
        total = [sum(column) for column in zip(*by_source.values(), strict=True)]
        return {
            **_figures(total),
            "by_source": {name: _figures(by_source[name]) for name in self._sources},
        }

    def _batches(self) -> Iterator[PackedBatch]:
        """This rank's batches, as many as every other rank's: ZeRO-3 gathers weights in step."""
        size, at_once = self._shape.rows, self._ranks.size * self._shape.rows
        for first in range(0, len(self._rows), at_once):
            mine = first + self._ranks.rank * size
            yield self._batch(range(mine, mine + size))

    def _batch(self, numbers: range) -> PackedBatch:
        rows, masks = [], []
        for number in numbers:
            # Past the end the last row stands in, with nothing masked, so that it does not count.
            source, at = self._rows[min(number, len(self._rows) - 1)]
            row = self._phase.data.read("validation", source, at)
            maskable = self._counts.maskable(source, at) if number < len(self._rows) else 0
            rows.append(row)
            masks.append(
                self._masker.mask(row.input_ids, maskable, self._rate, "validation", source, at)
            )
        return pack(rows, masks, self._shape)

    def _add(self, model: ModernBertForMaskedLM, host_batch: PackedBatch, sums: Tensor) -> None:
        """Add a batch's figures to `sums`, (3, sources), without a wait for the device."""
        batch = host_batch.to(self._device)
        loss_M, correct_M = predict(model, batch)
        figures = torch.stack([loss_M, correct_M, batch.labels != IGNORED]).to(sums.dtype)
        sums.index_add_(1, batch.masked_sources, figures)


def predict(model: ModernBertForMaskedLM, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Cross-entropy (M,) fp32 and whether the likeliest token is the label (M,) bool.

    batch: on the model's device. Both are 0 where the label is ignored. No more than LOGIT_ROWS
    rows of logits are held at once.
    """
    hidden_MD = model.encode(
        batch.input_ids,
        batch.position_ids,
        batch.cu_seqlens,
        batch.max_seqlen,
        Queries(batch.masked_indices, batch.masked_cu_seqlens),
        batch.long,
    )
    losses, corrects = [], []
    for some_MD, labels_M in zip(
        hidden_MD.split(LOGIT_ROWS), batch.labels.split(LOGIT_ROWS), strict=True
    ):
        logits_MV = model.logits(some_MD).float()
        losses.append(F.cross_entropy(logits_MV, labels_M, ignore_index=IGNORED, reduction="none"))
        corrects.append(logits_MV.argmax(-1) == labels_M)
    return torch.cat(losses), torch.cat(corrects)


def _figures(sums: list[float]) -> dict[str, float]:
    loss, correct, masked = sums
    # A source of a few rows may have nothing to mask in them.
    count = max(masked, 1.0)
    return {"loss": loss / count, "accuracy": correct / count, "masked_tokens": int(masked)}
