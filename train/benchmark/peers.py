"""Hugging Face's ModernBERT on the same documents: what transformers offers, each way it offers it.

The documents, masks and labels are those of our own micro-batches. Weights are fp32 under bf16
autocast and the optimizer is torch's fused AdamW, as in transformers' Trainer with `bf16`. A padded
batch holds as many documents as fill as many slots as our micro-batch at their greatest length, is
padded to its longest document rounded up to a quarter of that length, and is half as large where
the GPU's memory does not hold it. With FlashAttention transformers takes padding out around
attention alone; "packed" is its way of leaving it out altogether, all documents in one row.
"""

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kernels.benchmark_layouts import version_of
from model.config import ModernBertConfig, to_hugging_face
from train.batch import PackedBatch
from train.benchmark import interruptions
from train.benchmark.device import Clock, Memory, warm_up
from train.benchmark.measure import Effort, Measurement
from train.flops import training_flops
from train.loader import StepMaker
from train.masking import IGNORED
from train.resolve import Run
from train.schedule import Progress

_BATCHES = 4
"""differing batches that take turns"""
_WARM_UP = 2
"""times at least that each is taken before any is timed: what is compiled may be compiled twice"""


@dataclass(frozen=True)
class Peer:
    """A way to run transformers' ModernBertForMaskedLM.

    sparse: logits of masked positions alone (its `sparse_prediction`).
    """

    attention: str = "sdpa"
    compiled: bool = False
    packed: bool = False
    sparse: bool = False


@dataclass(frozen=True)
class Document:
    """One document as our loader masked it: (n,) each, labels −100 where nothing is predicted."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class PeerBatch:
    """The arguments of a forward, and what is in it: lengths of documents, tokens."""

    inputs: dict[str, Tensor | int]
    lengths: list[int]
    masked: int
    slots: int
    """padding included"""


def peers(on_gpu: bool) -> dict[str, Peer]:
    """The ways that can be tried here, by the name they bear in the results."""
    found = {"Hugging Face sdpa": Peer(), "Hugging Face sdpa, sparse": Peer(sparse=True)}
    if not on_gpu:
        return found
    found["Hugging Face sdpa, compiled"] = Peer(compiled=True)
    packages = {"flash-attn-4": "flash_attention_4", "flash-attn": "flash_attention_2"}
    for package, attention in packages.items():
        if version_of(package) is not None:
            found[f"Hugging Face {attention}"] = Peer(attention)
            found[f"Hugging Face {attention}, packed"] = Peer(attention, packed=True)
            # The least work that transformers can be asked for.
            found[f"Hugging Face {attention}, packed, sparse"] = Peer(
                attention, packed=True, sparse=True
            )
    return found


def measure_peer(peer: Peer, run: Run, device: torch.device, effort: Effort) -> Measurement:
    """Time steps of transformers' model on the documents of `run`, each batch equally often.

    Half as many steps as of ours are enough: they differ less. On one device.
    """
    documents = run_documents(run)
    phase = run.phases["main"]
    longest, slots = phase.shape.max_length, phase.shape.tokens
    at_once = max(1, slots // longest)
    while True:
        try:
            return _measure(peer, run, device, effort, documents, at_once)
        except torch.cuda.OutOfMemoryError:
            if at_once == 1 or peer.packed:
                raise
        # Out of the handler, whose traceback holds the tensors.
        at_once //= 2


def _measure(
    peer: Peer,
    run: Run,
    device: torch.device,
    effort: Effort,
    documents: list[Document],
    at_once: int,
) -> Measurement:
    memory = Memory(device)
    shape, config = run.phases["main"].shape, run.phases["main"].model_config
    if peer.packed:
        batches = packed_batches(documents, shape.tokens, device)
    else:
        batches = padded_batches(documents, at_once, shape.max_length, config.pad_token_id, device)
    with device:
        model = _model(peer, config)
    optimizer = torch.optim.AdamW(
        model.parameters(), 1e-4, betas=(0.9, 0.98), eps=1e-6, fused=device.type == "cuda"
    )
    call = torch.compile(model) if peer.compiled else model

    def take(batch: PeerBatch) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16"):
            loss = call(**batch.inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def take_all() -> None:
        for batch in batches:
            take(batch)

    round_s = warm_up(take_all, device, _WARM_UP, effort.warm_up_s)
    rounds = max(math.ceil(effort.steps / 2 / len(batches)), math.ceil(effort.seconds / round_s))
    clock, timed = Clock(device), batches * rounds
    # Right before the first that is timed, so that the host is ahead of the device by then.
    take(batches[-1])
    memory.restart()
    before = interruptions.read(device)
    for batch in timed:
        clock.mark()
        take(batch)
    clock.mark()
    seconds = clock.seconds()
    happened = interruptions.between(before, interruptions.read(device))
    real = sum(sum(batch.lengths) for batch in batches)
    padded = sum(batch.slots for batch in batches)
    size = statistics.median(len(batch.lengths) for batch in batches)
    return Measurement(
        seconds=seconds,
        elapsed=sum(seconds),
        tokens=[sum(batch.lengths) for batch in timed],
        flops=[training_flops(config, batch.lengths, batch.masked) for batch in timed],
        memory_gib=memory.peak_gib(),
        data_wait_share=None,
        breakdown=None,
        interruptions=happened,
        note=f"{size:g} documents a batch, {1 - real / padded:.0%} padding",
    )


def run_documents(run: Run) -> list[Document]:
    """The documents of the run's first micro-batches, masked, enough for the batches of a peer."""
    maker, documents = StepMaker(run, rank=0), []
    shape = run.phases["main"].shape
    wanted = _BATCHES * shape.tokens
    for plan in run.plans(Progress()):
        for batch in maker.micro_batches(plan):
            documents += list(_unpack(batch, run.start.cls_token_id))
        if sum(len(document.input_ids) for document in documents) >= wanted:
            break
    return documents


def _unpack(batch: PackedBatch, cls_id: int) -> Iterator[Document]:
    """The documents of a packed batch; its padding, which has no [CLS], is left out."""
    input_ids, ends = batch.input_ids.numpy(), batch.cu_seqlens.numpy()
    labels = np.full(len(input_ids), IGNORED, np.int64)
    count = batch.masked_tokens
    labels[batch.masked_indices.numpy()[:count]] = batch.labels.numpy()[:count]
    for start, end in itertools.pairwise(ends.tolist()):
        if start < end and input_ids[start] == cls_id:
            yield Document(input_ids[start:end], labels[start:end])


def padded_batches(
    documents: Sequence[Document], at_once: int, longest: int, pad_id: int, device: torch.device
) -> list[PeerBatch]:
    """Up to four batches of `at_once` documents, (B, S) each."""
    step = max(1, longest // 4)
    batches: list[PeerBatch] = []
    for first in range(0, min(len(documents), _BATCHES * at_once), at_once):
        chosen = documents[first : first + at_once]
        if batches and len(chosen) < at_once:
            break
        lengths = [len(document.input_ids) for document in chosen]
        width = -(-max(lengths) // step) * step
        input_ids = np.full((len(chosen), width), pad_id, np.int64)
        labels = np.full((len(chosen), width), IGNORED, np.int64)
        for row, document in enumerate(chosen):
            input_ids[row, : lengths[row]] = document.input_ids
            labels[row, : lengths[row]] = document.labels
        mask = np.arange(width) < np.array(lengths)[:, None]
        inputs = {"input_ids": input_ids, "attention_mask": mask.astype(np.int64), "labels": labels}
        batches.append(_batch(inputs, lengths, device))
    return batches


def packed_batches(
    documents: Sequence[Document], slots: int, device: torch.device
) -> list[PeerBatch]:
    """Up to four batches of one row with documents end to end, at most `slots` tokens each."""
    batches: list[PeerBatch] = []
    waiting = list(documents)
    while waiting and len(batches) < _BATCHES:
        ends = np.cumsum([len(document.input_ids) for document in waiting])
        number = max(1, int(np.searchsorted(ends, slots, side="right")))
        chosen, waiting = waiting[:number], waiting[number:]
        lengths = [len(document.input_ids) for document in chosen]
        inputs = {
            "input_ids": np.concatenate([document.input_ids for document in chosen])[None],
            "labels": np.concatenate([document.labels for document in chosen])[None],
            "position_ids": np.concatenate([np.arange(length) for length in lengths])[None],
        }
        batch = _batch(inputs, lengths, device)
        bounds = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device=device)
        for side in "qk":
            batch.inputs[f"cu_seq_lens_{side}"] = bounds
            batch.inputs[f"max_length_{side}"] = max(lengths)
        batches.append(batch)
    return batches


def _batch(
    arrays: dict[str, NDArray[np.int64]], lengths: list[int], device: torch.device
) -> PeerBatch:
    masked = int((arrays["labels"] != IGNORED).sum())
    inputs: dict[str, Tensor | int] = {
        name: torch.from_numpy(array).to(device) for name, array in arrays.items()
    }
    return PeerBatch(inputs, lengths, masked, arrays["input_ids"].size)


def _model(peer: Peer, config: ModernBertConfig) -> nn.Module:
    # Only here: a machine without transformers measures the rest.
    from transformers import AutoModelForMaskedLM
    from transformers import ModernBertConfig as HuggingFaceConfig

    values = to_hugging_face(config) | {"sparse_prediction": peer.sparse}
    model: nn.Module = AutoModelForMaskedLM.from_config(
        HuggingFaceConfig(**values), attn_implementation=peer.attention
    )
    return model.train()
