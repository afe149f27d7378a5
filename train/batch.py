"""A micro-batch as the model takes it: packed rows, positions, document bounds, masked positions.

Shapes that a compiler or a kernel sees take few values: T = rows × row_tokens and M (from the
highest masking rate) are constant, and the longest document is rounded up to a bucket here, on the
host, so that no value travels from device to host within a micro-batch. The number of documents is
the one size that compiled layers take as it comes; kernels whose grid goes over documents pay for
empty ones, so it is rounded up by little.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.shards import Row
from model.attention import SHORT_DOCUMENTS, LongDocuments
from train.masking import IGNORED, MaskedRow, masked_count

DOCUMENTS_MULTIPLE = 64
# The last layer multiplies as many rows: 8-bit products take multiples of 16, and the tiles of all
# products are of 64 rows and more.
MASKED_MULTIPLE = 64
SMALLEST_SEQLEN = 128
# On an H200, a micro-batch of abstracts with 16 short documents took 1,651 µs of attention, forward
# and backward, where these were windows and 1,708 where they were FlashAttention-4's, and with 128
# of them 1,661 and 1,888; but the last layer, which computes masked tokens alone, 1,644 and 1,329,
# and 1,683 and 1,496 (no record is kept). Of base's eight such layers that is 0.1 ms to gain with
# 16 of them and 1.4 with 128; the margin is for models of fewer layers.
FEWEST_SHORT = 64
SEQLEN_RATIO = 4


@dataclass(frozen=True)
class BatchShape:
    """The constants of a phase's micro-batches."""

    rows: int
    row_tokens: int
    max_length: int
    highest_rate: float
    sources: tuple[str, ...]
    """those that rows may be of, numbered in this order"""

    @property
    def tokens(self) -> int:
        """T, the length of a micro-batch."""
        return self.rows * self.row_tokens

    @property
    def masked(self) -> int:
        """M, the room for masked positions in a micro-batch, a multiple of MASKED_MULTIPLE."""
        room = self.rows * masked_count(self.highest_rate, self.row_tokens)
        return room + -room % MASKED_MULTIPLE


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch, on the host or on a device.

    input_ids, position_ids: (T,) int64; position_ids count from 0 in every document.
    cu_seqlens: (N + 1,) int32, document bounds, then T again for every empty document up to N, a
    multiple of DOCUMENTS_MULTIPLE. max_seqlen: at least the longest document.
    long: the documents of more than SHORT_DOCUMENTS tokens, with which a row begins; all of them
    where fewer than FEWEST_SHORT are shorter, unless all are.
    masked_indices, labels: (M,) int64, different places in ascending order; what is left of M
    points to position 0 with label -100. masked_cu_seqlens: (N + 1,) int32, which of them lie in
    each document. masked_sources: (M,) int64, the number of the source that each of them is of; 0
    for what is left. masked_tokens: how many labels count; lengths: (documents,) tokens of each
    document in the order of the rows, padding not counted; both are known on the host.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    masked_indices: Tensor
    masked_cu_seqlens: Tensor
    labels: Tensor
    masked_sources: Tensor
    masked_tokens: int
    lengths: NDArray[np.int64]
    long: LongDocuments

    def to(self, device: torch.device) -> "PackedBatch":
        """The batch on `device`; from pinned memory the copies do not wait."""
        batch = self
        if device.type != "cpu":
            batch = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        # The one length that changes from batch to batch: a compiled layer takes any.
        for ends in (batch.cu_seqlens, batch.masked_cu_seqlens):
            torch._dynamo.maybe_mark_dynamic(ends, 0)
        return batch

    def pin(self) -> "PackedBatch":
        """The batch in page-locked memory, from which a GPU copies by itself."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "PackedBatch":
        return replace(
            self,
            input_ids=function(self.input_ids),
            position_ids=function(self.position_ids),
            cu_seqlens=function(self.cu_seqlens),
            masked_indices=function(self.masked_indices),
            masked_cu_seqlens=function(self.masked_cu_seqlens),
            labels=function(self.labels),
            masked_sources=function(self.masked_sources),
        )


def pack(rows: Sequence[Row], masks: Sequence[MaskedRow], shape: BatchShape) -> PackedBatch:
    """One micro-batch from `shape.rows` rows and their masks, on the host.

    The documents of all rows stand longest first: a GPU that is given the tiles of attention in
    their order ends with short ones, and few of its multiprocessors wait for the last.
    """
    input_ids = np.concatenate([row.input_ids for row in rows]).astype(np.int64)
    masked_indices = np.zeros(shape.masked, np.int64)
    labels = np.full(shape.masked, IGNORED, np.int64)
    masked_sources = np.zeros(shape.masked, np.int64)
    bounds, documents_of = [np.zeros(1, np.int64)], []
    filled = 0
    for number, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        offset = number * shape.row_tokens
        positions = offset + mask.positions
        input_ids[positions] = mask.replacements
        masked_indices[filled : filled + len(positions)] = positions
        labels[filled : filled + len(positions)] = mask.labels
        masked_sources[filled : filled + len(positions)] = shape.sources.index(row.source)
        filled += len(positions)
        bounds.append(offset + _split_padding(row, shape.max_length))
        documents_of.append(np.diff(row.cu_seqlens[: len(row.documents) + 1]).astype(np.int64))
    came_from, cu_seqlens = _longest_first(np.concatenate(bounds))
    went_to = np.empty_like(came_from)
    went_to[came_from] = np.arange(shape.tokens)
    places = went_to[masked_indices[:filled]]
    ascending = np.argsort(places, kind="stable")
    for values in (labels, masked_sources):
        values[:filled] = values[ascending]
    masked_indices[:filled] = places[ascending]
    lengths = np.diff(cu_seqlens)
    empty = -len(lengths) % DOCUMENTS_MULTIPLE
    cu_seqlens = np.pad(cu_seqlens, (0, empty), mode="edge")
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids[came_from]),
        position_ids=torch.from_numpy(
            np.arange(shape.tokens) - np.repeat(cu_seqlens[: len(lengths)], lengths)
        ),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=min(seqlen_bucket(int(lengths.max())), shape.max_length),
        masked_indices=torch.from_numpy(masked_indices),
        masked_cu_seqlens=torch.from_numpy(
            np.searchsorted(masked_indices[:filled], cu_seqlens).astype(np.int32)
        ),
        labels=torch.from_numpy(labels),
        masked_sources=torch.from_numpy(masked_sources),
        masked_tokens=filled,
        lengths=np.concatenate(documents_of),
        long=_long_documents(lengths),
    )


def _long_documents(lengths: NDArray[np.int64]) -> LongDocuments:
    """Of all documents of a batch, longest first."""
    number = int((lengths > SHORT_DOCUMENTS).sum())
    if number > 0 and len(lengths) - number < FEWEST_SHORT:
        number = len(lengths)
    return LongDocuments(number, int(lengths[:number].sum()))


def seqlen_bucket(longest: int) -> int:
    """A length rounded up to SMALLEST_SEQLEN × 4^k: few different ones, none far too large."""
    sizes = (SMALLEST_SEQLEN * SEQLEN_RATIO**power for power in itertools.count())
    return next(size for size in sizes if size >= longest)


def _longest_first(bounds: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each token of the sorted segments was before, (T,), and the segments' new bounds."""
    lengths = np.diff(bounds)
    order = np.argsort(-lengths, kind="stable")
    ends = np.concatenate([[0], np.cumsum(lengths[order])])
    came_from = np.arange(bounds[-1]) + np.repeat(bounds[:-1][order] - ends[:-1], lengths[order])
    return came_from, ends


def _split_padding(row: Row, max_length: int) -> NDArray[np.int64]:
    """The ends of a row's segments, its padding cut into pieces of at most `max_length`.

    Padding is longer than any document where a source ends in a nearly empty row; whole, it would
    raise `max_seqlen` for everyone in the batch.
    """
    ends = row.cu_seqlens[1:].astype(np.int64)
    pieces = np.arange(row.cu_seqlens[len(row.documents)] + max_length, ends[-1], max_length)
    return np.concatenate([ends[:-1], pieces, ends[-1:]])
