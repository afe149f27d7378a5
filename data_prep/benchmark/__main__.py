"""Time every stage of the data preparation, next to what one would use instead, on real files.

    python -m data_prep.benchmark --data FOLDER [--json FILE] [--stage NAME]

FOLDER holds the raw files that configs/sample.yaml names. Rates are per core: documents and
megabytes of text for each second of CPU time, of all threads, so that other work on the machine
hardly changes them. What is compared with is in requirements-benchmark.txt; the row of a package
that is not installed says so. Then the whole corpora are projected from these rates.

NAME is one of pubmed, notes, pipeline, minhash, tokens, shards; the last four make the data set
first. FILE gets all rows, the versions and the processor.
"""

import argparse
import importlib.metadata
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.config import ConfigError, load_config
from common.files import make_private, write_json
from data_prep.benchmark import alternatives
from data_prep.benchmark.alternatives import is_gzip
from data_prep.benchmark.measure import Measured, cpu_model
from data_prep.benchmark.plan import Projected, caveats, project, whole_corpora
from data_prep.benchmark.stages import (
    NEAR_DUPLICATE_STAGES,
    OURS,
    Size,
    distinct_documents,
    document_sizes,
    kept_documents,
    measure_stages,
)
from data_prep.config import DataPrep
from data_prep.dedup import PROSE
from data_prep.document import InputError
from data_prep.mimic import SOURCES as NOTES
from data_prep.pubmed import in_order
from data_prep.shards import DataSet
from data_prep.split import TRAIN

SECTIONS = ("pubmed", "notes", "pipeline", "minhash", "tokens", "shards")
AS_PUBLISHED, VOLUME = "pubmed as published", "pubmed/volume"
_CONFIGS = Path(__file__).parents[2] / "configs"
_SAMPLE, _WHOLE = _CONFIGS / "sample.yaml", _CONFIGS / "base.yaml"
# Of PubMed, datatrove's MinHash gets some this many documents, which take it seconds.
_COMPARED_DOCUMENTS = 1000
_PACKAGES = (
    *("datatrove", "lxml", "numpy", "pubmed_parser", "pyarrow", "sentencepiece", "spacy"),
    *("tokenizers", "webdataset", "xxhash"),
)
_LINE = "{:20}{:24}{:21}{:>10}{:>9}{:>9}{:>13}{:>9}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of raw files")
    parser.add_argument("--config", type=Path, default=_SAMPLE, help="which of them, and how")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--stage", choices=SECTIONS, action="append", help="only this; repeatable")
    parser.add_argument("--repeats", type=int, default=3, help="of each; the fastest counts")
    parser.add_argument("--cores", type=int, default=64, help="to project for")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")
    options = parser.parse_args(arguments)
    make_private()
    try:
        with tempfile.TemporaryDirectory() as folder:
            overrides = [f"raw_dir={options.data}", f"out_dir={folder}/out", *options.overrides]
            config = load_config(DataPrep, "data_prep", options.config, overrides)
            result = benchmark(config, options.stage or SECTIONS, options.repeats, options.cores)
    except (ConfigError, InputError, OSError) as error:
        print("error: " + "; ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    if options.json:
        write_json(options.json, result)
    return 0


def benchmark(
    config: DataPrep, sections: Sequence[str], repeats: int, cores: int
) -> dict[str, Any]:
    """Measure `sections`, print a line each, and return everything as plain values."""
    print(_LINE.format("stage", "by", "of", "documents", "MB", "CPU s", "documents/s", "MB/s"))
    rows = _compare_readers(config, sections, repeats)
    stages: list[Measured] = []
    sizes: dict[str, dict[str, Size]] = {}
    if set(sections) - {"pubmed", "notes"}:
        stages = measure_stages(config)
        sizes = document_sizes(config.out_dir)
        _print(stages if "pipeline" in sections else [])
        rows += _compare_stages(config, sections, stages, repeats)
    result = {
        "environment": environment(),
        "comparisons": list(map(_plain, rows)),
        "stages": list(map(_plain, stages)),
    }
    if "pipeline" in sections:
        published = [r for r in rows if r.source == AS_PUBLISHED and r.stage in _READING]
        result["projection"] = _project(config, stages, sizes, published, cores)
    return result


_READING = ("scan", "documents")


def _project(
    config: DataPrep,
    stages: Sequence[Measured],
    sizes: dict[str, dict[str, Size]],
    published: Sequence[Measured],
    cores: int,
) -> dict[str, Any]:
    """Print the projection and return it; `published` are rows of reading PubMed's own files."""
    base = load_config(DataPrep, "data_prep", _WHOLE)
    full = whole_corpora(sizes["documents"])
    notes = caveats(sizes["kept"], full, config, base)
    if published:
        # The files of `pubmed/volume` hold no more than the text, so reading them is too cheap.
        stages = [r for r in stages if not (r.source == "pubmed" and r.stage in _READING)]
    elif "pubmed" in full:
        notes.append(
            "there is no PubMed file as NLM publishes them, so scan and documents of pubmed are "
            "projected from other files, which may hold little but the text and be read faster"
        )
    projected = project(stages, sizes, full, cores, config, base)
    projected += _project_reading(published, full, cores)
    _print_projection(projected, cores)
    for note in notes:
        print(f"note: {note}")
    return {
        "cores": cores,
        "corpora": {source: asdict(size) for source, size in full.items()},
        "stages": [asdict(row) for row in projected],
        "notes": notes,
    }


def environment() -> dict[str, Any]:
    """The processor, its load, and the versions of what was measured."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"cpu": cpu_model(), "load": os.getloadavg()[0], "versions": versions}


def _compare_readers(config: DataPrep, sections: Sequence[str], repeats: int) -> list[Measured]:
    rows: list[Measured] = []
    if "pubmed" in sections or "pipeline" in sections:
        patterns = config.sources.pubmed
        paths = in_order({path for pattern in patterns for path in config.raw_dir.glob(pattern)})
        volume = [path for path in paths if path.parent.name == "volume"]
        # NLM's are, and pubmed_parser reads no other.
        published = [path for path in paths if path not in volume and is_gzip(path)]
        for source, files in ((VOLUME, volume), (AS_PUBLISHED, published)):
            if files:
                rows += alternatives.compare_pubmed(source, files, repeats)
    if "notes" in sections:
        for source in NOTES:
            for pattern in getattr(config.sources, source):
                for path in sorted(config.raw_dir.glob(pattern)):
                    rows += alternatives.compare_notes(source, path, repeats)
    _print(rows)
    return rows


def _compare_stages(
    config: DataPrep, sections: Sequence[str], stages: Sequence[Measured], repeats: int
) -> list[Measured]:
    rows: list[Measured] = []
    if "minhash" in sections:
        for source in PROSE:
            documents = distinct_documents(config.out_dir, source)
            if source == "pubmed":
                documents = documents[:: -(-len(documents) // _COMPARED_DOCUMENTS) or 1]
            ours = [r for r in stages if r.source == source and r.stage in NEAR_DUPLICATE_STAGES]
            if ours:
                rows.append(_summed("near-duplicates", ours))
                rows.append(alternatives.datatrove_minhash(source, documents))
    data = config.out_dir / f"rows-{config.max_lengths[0]}"
    for source in DataSet(data).sources(TRAIN):
        if "tokens" in sections:
            documents = kept_documents(config.out_dir, source)
            folder = config.out_dir / "tokenizer"
            rows += alternatives.compare_tokenizers(folder, source, documents, repeats)
        if "shards" in sections:
            rows += alternatives.compare_shards(data, TRAIN, source, repeats)
    _print(rows)
    return rows


def _summed(stage: str, rows: Sequence[Measured]) -> Measured:
    """One row for several stages of the same documents."""
    cpu, wall = sum(row.cpu_s for row in rows), sum(row.wall_s for row in rows)
    written = sum(row.written for row in rows)
    first = rows[0]
    return Measured(stage, OURS, first.source, first.documents, first.bytes, cpu, wall, written)


def _project_reading(
    rows: Sequence[Measured], full: dict[str, Size], cores: int
) -> list[Projected]:
    """Reading PubMed's files, record by record; `rows` are of files as they are published."""
    found = []
    for row in rows:
        factor = full["pubmed"].documents / row.documents
        hours = row.cpu_s * factor / 3600
        written = row.written * factor / 1e9
        found.append(Projected(row.stage, "pubmed", hours, hours / cores, written))
    return found


def _plain(row: Measured) -> dict[str, Any]:
    return asdict(row) | {"documents_per_s": row.documents_per_s, "mb_per_s": row.mb_per_s}


def _print(rows: Sequence[Measured]) -> None:
    for row in rows:
        print(
            _LINE.format(
                row.stage,
                row.who,
                row.source,
                f"{row.documents:,}",
                f"{row.bytes / 1e6:.1f}",
                f"{row.cpu_s:.2f}",
                f"{row.documents_per_s:,.0f}",
                f"{row.mb_per_s:.2f}",
            ),
            flush=True,
        )


def _print_projection(rows: Sequence[Projected], cores: int) -> None:
    print(f"\nthe whole corpora on {cores} cores, by stage")
    print(f"{'stage':20}{'CPU hours':>11}{'hours':>9}{'GB':>9}")
    names = list(dict.fromkeys(row.stage for row in rows))
    for name in (*names, "in all"):
        of_stage = [row for row in rows if name in (row.stage, "in all")]
        cpu, wall, size = (
            sum(getattr(row, part) for row in of_stage)
            for part in ("cpu_hours", "wall_hours", "gigabytes")
        )
        print(f"{name:20}{cpu:>11.2f}{wall:>9.3f}{size:>9.2f}")


if __name__ == "__main__":
    sys.exit(main())
