"""The numbers of a data card, gathered from what `python -m data_prep` left in its `out_dir`.

Read are the manifest, the summaries of the stages, the statistics of the kept documents, the
lengths of their tokens and the table of clusters: numbers and ids, no text. Files are read one at a
time and in batches, so memory does not grow with the corpus.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from common.files import file_hash
from data_prep.document import InputError
from data_prep.shards import MANIFEST_NAME
from data_prep.split import SPLITS
from data_prep.stages import SUMMARY_NAME

# Sources made of MIMIC's notes; small counts of theirs are withheld.
NOTES = ("discharge", "radiology")
SMALLEST_CELL = 10
# Tokens of a document: from one edge up to the next, without it.
LENGTH_EDGES = (0, *(1 << power for power in range(4, 15)))
CLUSTER_EDGES = (2, 3, 4, 6, 11, 21, 51, 101, 1001)

Record = dict[str, Any]
# None is a count that is withheld.
Cells = dict[str, int | None]


@dataclass(frozen=True)
class Facts:
    """What a card says of a data set.

    folder: the data set; manifest: its manifest, and manifest_sha256 its hash.
    steps: source -> stage -> count -> number, from the stages' summaries; sets: the same of the
    evaluation sets' texts.
    totals: source -> documents, characters, words; breakdowns: name -> source -> value ->
    documents, both of the kept documents of both splits.
    lengths: source -> documents by LENGTH_EDGES (the last bin is open).
    clusters: source -> clusters of duplicates by CLUSTER_EDGES (the last bin is open).
    """

    folder: Path
    manifest: Record
    manifest_sha256: str
    steps: dict[str, dict[str, Counter[str]]]
    sets: Counter[str]
    totals: dict[str, Counter[str]]
    breakdowns: dict[str, dict[str, Counter[str]]]
    lengths: dict[str, NDArray[np.int64]]
    clusters: dict[str, NDArray[np.int64]]

    @property
    def sources(self) -> list[str]:
        """The sources of the data set, by name."""
        return sorted(self.totals)

    def parts(self) -> Iterator[tuple[str, str, Record]]:
        """(split, source, the manifest's entry) of every part."""
        for split in SPLITS:
            for source, entry in sorted(self.manifest["splits"][split]["sources"].items()):
                yield split, source, entry

    def in_source(self, source: str, name: str) -> int:
        """`name` (documents, tokens, rows, …) of a source, both splits together."""
        return sum(entry[name] for _, found, entry in self.parts() if found == source)


def data_sets(folder: Path) -> list[Path]:
    """A data set itself, or those of an `out_dir`, shorter documents first; InputError for none."""
    if (folder / MANIFEST_NAME).is_file():
        return [folder]
    found = [path.parent for path in folder.glob(f"rows-*/{MANIFEST_NAME}")]
    if not found:
        raise InputError(
            f"{folder} holds no data set (rows-…/{MANIFEST_NAME}); give the out_dir of a finished "
            "`python -m data_prep`, or run it again to its end"
        )
    return sorted(found, key=lambda path: int(path.name.removeprefix("rows-")))


def gather(data_set: Path) -> Facts:
    """The facts of a data set; raises InputError naming the file that is missing."""
    out_dir = data_set.resolve().parent
    manifest = _read_json(data_set / MANIFEST_NAME)
    parts = {(split, source) for split in SPLITS for source in manifest["splits"][split]["sources"]}
    sources = sorted({source for _, source in parts})
    totals: dict[str, Counter[str]] = {source: Counter() for source in sources}
    breakdowns: dict[str, dict[str, Counter[str]]] = {}
    lengths = {source: np.zeros(len(LENGTH_EDGES), np.int64) for source in sources}
    for split, source in sorted(parts):
        for path in _files(out_dir / "statistics" / split / source, "*.json"):
            found = _read_json(path)
            totals[source].update(found["totals"])
            for name, counts in found["breakdowns"].items():
                breakdowns.setdefault(name, {}).setdefault(source, Counter()).update(counts)
        for path in _files(out_dir / "tokens" / split / source, "*/starts.npy"):
            lengths[source] += binned(np.diff(np.load(path, mmap_mode="r")), LENGTH_EDGES)
    return Facts(
        folder=data_set,
        manifest=manifest,
        manifest_sha256=file_hash(data_set / MANIFEST_NAME),
        steps=_steps(out_dir),
        sets=Counter(_summary(out_dir, "evaluation").get("sets", {})),
        totals=totals,
        breakdowns=breakdowns,
        lengths=lengths,
        clusters={source: cluster_sizes(out_dir, source) for source in sources},
    )


def binned(values: NDArray[np.integer[Any]], edges: tuple[int, ...]) -> NDArray[np.int64]:
    """How many `values` (n,) lie from each edge up to the next; (edges,), the last bin is open."""
    places = np.searchsorted(edges, values, side="right") - 1
    return np.bincount(places[places >= 0], minlength=len(edges)).astype(np.int64)


def bin_names(edges: tuple[int, ...]) -> list[str]:
    """What the bins of `binned` are called."""
    names = [
        f"{low:,}" if high == low + 1 else f"{low:,} to {high - 1:,}"
        for low, high in pairwise(edges)
    ]
    return [*names, f"{edges[-1]:,} or more"]


def cluster_sizes(out_dir: Path, source: str) -> NDArray[np.int64]:
    """Clusters of duplicates of a source by CLUSTER_EDGES.

    A table has its clusters one after another, each whole.
    """
    sizes = np.zeros(len(CLUSTER_EDGES), np.int64)
    for path in _files(out_dir / "clusters" / source, "*.parquet"):
        last, size = "", 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=["cluster"]):
                for name, members in groupby(batch.column("cluster").to_pylist()):
                    if name != last:
                        sizes += binned(np.array([size]), CLUSTER_EDGES)
                        last, size = name, 0
                    size += len(list(members))
        sizes += binned(np.array([size]), CLUSTER_EDGES)
    return sizes


def shown(source: str, counts: Mapping[str, int]) -> Cells:
    """The counts of a breakdown as they may be shown: of notes, none from 1 to 9.

    A cell that alone is withheld could be had by subtraction, so the next smallest goes with it.
    """
    cells: Cells = dict(counts)
    if source not in NOTES:
        return cells
    small = {name for name, count in counts.items() if 0 < count < SMALLEST_CELL}
    large = {name: count for name, count in counts.items() if count >= SMALLEST_CELL}
    if len(small) == 1 and large:
        small.add(min(large, key=lambda name: (large[name], name)))
    return {name: None if name in small else count for name, count in counts.items()}


def _steps(out_dir: Path) -> dict[str, dict[str, Counter[str]]]:
    found: dict[str, dict[str, Counter[str]]] = {}
    for stage in ("scan", "documents", "checks", "clusters", "kept"):
        for source, counts in _summary(out_dir, stage).items():
            found.setdefault(source, {})[stage] = Counter(counts)
    return found


def _summary(out_dir: Path, stage: str) -> dict[str, Record]:
    path = out_dir / stage / SUMMARY_NAME
    # A stage without tasks leaves none: there are no notes to copy from, for example.
    return _read_json(path)["counts"] if path.is_file() else {}


def _files(folder: Path, pattern: str) -> list[Path]:
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise InputError(
            f"{folder} holds no {pattern}: the data set was made without it; run the same "
            "python -m data_prep again"
        )
    return paths


def _read_json(path: Path) -> Record:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{path} is missing or damaged; run python -m data_prep again") from None
