"""What is measured: document lengths, data sets made of them, and the run of each case.

Lengths are log-normal like those of the real sources: medians of 250 tokens for abstracts and 2,200
for discharge notes, a standard deviation of the logarithm of 0.7 for both, cut at `max_length`.
Documents are packed as the data stage packs them (`data_prep.packing`), so rows are mixtures that
end in next to no padding, as real ones do; padding counts in no throughput. Token ids are
log-uniform, which is Zipf's law.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config import load_config
from data_prep.packing import pack
from data_prep.shards import DataSet, Row, row_key
from model.config import BASE
from train.config import Train
from train.resolve import Run, open_folders, resolve

ROW_TOKENS = 8192
_SOURCE = "synthetic"
_NEVER = 10**15
# A corpus has many rows: in few, those that are filled when its short documents have run out would
# be many.
_ROWS_PACKED = 16


@dataclass(frozen=True)
class Layout:
    """Documents of a kind, and the rows they are packed into.

    median: of their length in tokens; None: every document has `max_length`. rows: of so many are
    there tokens, out of the `_ROWS_PACKED` times as many that are packed.
    """

    median: int | None
    max_length: int
    row_tokens: int = ROW_TOKENS
    rows: int = 256
    spread: float = 0.7
    vocabulary: int = BASE.vocab_size

    def lengths(self, random: np.random.Generator) -> NDArray[np.int64]:
        """Lengths of as many documents as fill about all rows that are packed."""
        slots = _ROWS_PACKED * self.rows * self.row_tokens
        if self.median is None:
            return np.full(slots // self.max_length, self.max_length, np.int64)
        drawn = np.exp(random.standard_normal(3 * slots // self.median + 64) * self.spread)
        lengths = np.clip(np.rint(drawn * self.median), 3, self.max_length).astype(np.int64)
        return lengths[np.cumsum(lengths) <= slots]


@dataclass(frozen=True)
class Case:
    """One run to measure.

    layout: its documents, or the folder of a data set. model: keys of `model:`; None leaves the
    configuration's. with_peers: transformers' model as well; not on large, where its ways would
    take the longest of all and compare the code that base compares. reach, stretch: tokens a second
    and GPU that are aimed at on an H200.
    """

    name: str
    layout: Layout | Path
    model: dict[str, Any] | None
    micro_rows: int = 8
    micro_steps: int = 1
    with_peers: bool = True
    without_engine: bool = False
    reach: int | None = None
    stretch: int | None = None


_ABSTRACTS = Layout(median=250, max_length=1024)
_NOTES = Layout(median=2200, max_length=8192)
_BASE, _LARGE = {"geometry": "base"}, {"geometry": "large"}
_TINY = {
    "geometry": "base",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}

GPU_CASES = (
    Case("abstracts-1024", _ABSTRACTS, _BASE, reach=510_000, stretch=560_000),
    Case("notes-8192", _NOTES, _BASE, reach=420_000, stretch=460_000),
    Case("full-8192", Layout(None, 8192), _BASE, reach=325_000, stretch=345_000),
    Case("large-1024", _ABSTRACTS, _LARGE, with_peers=False, reach=200_000, stretch=240_000),
    Case("large-8192", _NOTES, _LARGE, with_peers=False, reach=160_000, stretch=190_000),
    Case("notes-accumulate-8", _NOTES, _BASE, micro_steps=8, with_peers=False),
    Case("accumulate-8", _ABSTRACTS, _BASE, micro_steps=8, with_peers=False, without_engine=True),
)
TINY = Case(
    "tiny",
    Layout(median=40, max_length=128, row_tokens=256, rows=16, vocabulary=512),
    _TINY,
    micro_rows=1,
    micro_steps=2,
    without_engine=True,
)
"""small enough for any machine; its speed says nothing"""


def shard_cases(folders: Sequence[Path]) -> list[Case]:
    """The cases of real data sets, named after the length of their documents.

    Where several have one length, also after the folder that each lies in, and numbered where that
    has the same name, too. Raises DataError where a folder is no data set.
    """
    names = [f"shards-{DataSet(folder).max_length}" for folder in folders]
    around = [folder.resolve().parent.name for folder in folders]
    for told_apart in (around, range(1, len(folders) + 1)):
        times = Counter(names)
        names = [
            f"{name}-{more}" if times[name] > 1 else name
            for name, more in zip(names, told_apart, strict=True)
        ]
    return [Case(name, folder, None) for name, folder in zip(names, folders, strict=True)]


def resolve_case(
    case: Case, config: Path | None, words: Sequence[str], ranks: int, on_gpu: bool
) -> Run:
    """The run of a case: what the case says over `config`, and `words` (key=value) over both."""
    layout = case.layout
    folder = Path(_SOURCE) if isinstance(layout, Layout) else layout
    phase = {
        "data": {"dir": str(folder)},
        "tokens": _NEVER,
        "batch": {
            "rows": case.micro_rows * case.micro_steps * ranks,
            "micro_rows": case.micro_rows,
        },
        "lr": {"peak": 1e-4},
        "masking": {"rate": 0.3},
    }
    said: dict[str, Any] = {"phases": {"main": phase}, "init_from": None, "init_optimizer": "fresh"}
    if case.model is not None:
        said["model"] = case.model
    own = [f"{key}={json.dumps(value)}" for key, value in said.items()]
    train = load_config(Train, "train", config, [*own, *words])
    if not isinstance(layout, Layout):
        return resolve(train, ranks, on_gpu, open_folders)
    data = SyntheticData(layout)
    return resolve(train, ranks, on_gpu, lambda _: {train.phases["main"].data.dir: data})


class SyntheticData(DataSet):
    """A data set in memory, made of a layout; the same layout gives the same rows."""

    def __init__(self, layout: Layout) -> None:
        self.folder = Path(_SOURCE)
        self.manifest, self.manifest_sha256 = {}, _SOURCE
        self.row_tokens, self.max_length = layout.row_tokens, layout.max_length
        self.max_documents = layout.row_tokens
        self.tokenizer = _tokenizer(layout.vocabulary)
        random = np.random.default_rng(3)
        packed = stand_for(pack_rows(layout.lengths(random), layout.row_tokens), layout.rows)
        random.shuffle(packed)
        self._rows = [
            _make_row(random, lengths, layout.row_tokens, number, self.tokenizer)
            for number, lengths in enumerate(packed)
        ]

    def sources(self, split: str) -> dict[str, int]:
        """One source; validation, which is not measured, has its first row."""
        return {_SOURCE: len(self._rows) if split == "train" else 1}

    def read(self, split: str, source: str, row: int) -> Row:
        """A row of either split."""
        return replace(self._rows[row], key=row_key(source, split, row))

    def counts(self, split: str, source: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Real tokens and documents of every row."""
        rows = self._rows[: self.sources(split)[source]]
        documents = np.array([len(row.documents) for row in rows])
        tokens = np.array([int(row.cu_seqlens[len(row.documents)]) for row in rows])
        return tokens, documents


def pack_rows(lengths: NDArray[np.int64], row_tokens: int) -> list[NDArray[np.int64]]:
    """Lengths put into rows of `row_tokens`, in random order, as the data stage packs documents.

    The emptiest row, whose documents ran out, is left out unless it is the only one.
    """
    plan = pack(lengths, row_tokens, max_documents=row_tokens, key=3)
    rows = np.split(lengths[plan.order], plan.bounds[1:-1])
    if len(rows) > 1:
        del rows[int(np.argmin([row.sum() for row in rows]))]
    return rows


def stand_for(rows: list[NDArray[np.int64]], number: int) -> list[NDArray[np.int64]]:
    """So many of the rows, spread evenly over what attention costs: the pairs of tokens in them.

    Drawn at random, a few hundred rows of notes may have a twentieth more or fewer than all.
    """
    number = min(number, len(rows))
    ordered = sorted(rows, key=lambda lengths: int((lengths**2).sum()))
    return [ordered[(2 * place + 1) * len(rows) // (2 * number)] for place in range(number)]


def _tokenizer(vocabulary: int) -> dict[str, Any]:
    """A manifest's description of a tokenizer; with 50,368 tokens, ids are those of ModernBERT."""
    real = vocabulary - 83
    special = {name: real - 5 + i for i, name in enumerate(("unk", "cls", "sep", "pad", "mask"))}
    return {
        "sha256": _SOURCE,
        "file_sha256": _SOURCE,
        "vocab_size": vocabulary,
        "real_vocab_size": real,
        "special_ids": special,
        "excluded_ids": [],
    }


def _make_row(
    random: np.random.Generator,
    lengths: NDArray[np.int64],
    row_tokens: int,
    number: int,
    tokenizer: dict[str, Any],
) -> Row:
    special = tokenizer["special_ids"]
    ordinary = special["unk"]
    ids = (np.exp(random.random(row_tokens) * np.log(ordinary)) % ordinary).astype(np.uint16)
    ends = np.cumsum(random.permutation(lengths))
    starts = np.concatenate([[0], ends[:-1]])
    ids[starts], ids[ends - 1] = special["cls"], special["sep"]
    ids[ends[-1] :] = special["pad"]
    padding = [row_tokens] if ends[-1] < row_tokens else []
    bounds = np.array([0, *ends.tolist(), *padding], np.int32)
    documents = [f"{_SOURCE}-{number}-{place}" for place in range(len(lengths))]
    return Row(ids, bounds, documents, _SOURCE, row_key(_SOURCE, "train", number))
