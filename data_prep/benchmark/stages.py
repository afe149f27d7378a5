"""Every stage of the pipeline, run task by task in this process and measured by source."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from data_prep.benchmark.measure import Measured, timed
from data_prep.config import DataPrep
from data_prep.dedup import digests
from data_prep.document import Document, read_documents
from data_prep.pipeline import Pipeline, find_run
from data_prep.split import TRAIN
from data_prep.stages import Stage

OURS = "data_prep"
# What a task works on that is about no single source.
EVERY_SOURCE = "all"
# By stage, which documents of a source it works on; all of them where it is not named.
NEAR_DUPLICATE_STAGES = (
    *("signatures", "pairs", "candidates", "runs", "verified"),
    *("components", "clusters"),
)
_KEPT = ("statistics", "sample", "tokenizer", "tokens", "plan", "rows")


@dataclass(frozen=True)
class Size:
    """Documents, and bytes of their text in UTF-8."""

    documents: int = 0
    bytes: int = 0

    def __add__(self, other: "Size") -> "Size":
        return Size(self.documents + other.documents, self.bytes + other.bytes)


def measure_stages(config: DataPrep) -> list[Measured]:
    """Make the data sets of `config` in its out_dir, which is empty; a row a stage and source."""
    spent: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0])
    for stage in _stages(config):
        stage.prepare()
        for index, task in enumerate(tqdm(stage.tasks, desc=stage.name, disable=None)):
            cpu, wall = timed(partial(stage.run_task, index))
            part = task.group.rpartition("/")[2]
            row = spent[stage.name, part]
            row[0] += cpu
            row[1] += wall
            row[2] += sum(stage.sizes(index).values())
        stage.finish()
    sizes = document_sizes(config.out_dir)
    rows = []
    for (name, group), (cpu, wall, written) in spent.items():
        of_sources = sizes[_population(name)]
        source = group if group in sizes["documents"] else EVERY_SOURCE
        size = of_sources.get(group, Size())
        if source == EVERY_SOURCE:
            size = sum(of_sources.values(), Size())
        rows.append(
            Measured(name, OURS, source, size.documents, size.bytes, cpu, wall, int(written))
        )
    return rows


def document_sizes(out_dir: Path) -> dict[str, dict[str, Size]]:
    """What the sources hold: all `documents`, the `distinct` ones, and those that are `kept`."""
    return {
        "documents": _sizes(_read(out_dir / "documents")),
        "distinct": _sizes(_distinct(out_dir / "documents")),
        "kept": _sizes(_read(out_dir / "kept")),
    }


def distinct_documents(out_dir: Path, source: str) -> list[Document]:
    """The documents of a source, those that say the same once."""
    return list(_distinct(out_dir / "documents" / source))


def kept_documents(out_dir: Path, source: str) -> list[Document]:
    """The documents of a source that are trained on."""
    return list(_read(out_dir / "kept" / TRAIN / source))


def _stages(config: DataPrep) -> Iterator[Stage]:
    """The stages in their order; each can be made once those before are done."""
    pipeline = Pipeline(find_run(config)[0])
    for stage in pipeline.stages():
        yield stage
        kind, _, length = stage.name.partition("-")
        if kind == "rows":
            pipeline.write_manifest(int(length), stage.finish())


def _population(stage: str) -> str:
    name = stage.partition("-")[0]
    return "distinct" if name in NEAR_DUPLICATE_STAGES else "kept" if name in _KEPT else "documents"


def _read(folder: Path) -> Iterator[Document]:
    for path in sorted(folder.rglob("*.parquet")):
        yield from read_documents(path)


def _distinct(folder: Path) -> Iterator[Document]:
    seen: set[tuple[str, bytes]] = set()
    for document in _read(folder):
        digest = (document.source, digests([document]).tobytes())
        if digest not in seen:
            seen.add(digest)
            yield document


def _sizes(documents: Iterable[Document]) -> dict[str, Size]:
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for document in documents:
        of_source = found[document.source]
        of_source[0] += 1
        of_source[1] += len(document.text.encode())
    return {source: Size(*numbers) for source, numbers in found.items()}
