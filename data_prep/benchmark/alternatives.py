"""The obvious alternatives to our stages, on the same input.

Each function gives rows with what it measured. A row of a package that is not installed
(`requirements-benchmark.txt` names them) or of a model that is not there has no documents.
"""

import csv
import gzip
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import webdataset
from lxml import etree

from data_prep import mimic, pubmed
from data_prep.benchmark.measure import Measured, measure
from data_prep.benchmark.stages import OURS
from data_prep.document import Document, write_documents
from data_prep.encoding import WordEncoder
from data_prep.shard_writer import write_shard
from data_prep.shards import DataSet, Row
from data_prep.tokenizer import SENTENCEPIECE_FILE, encode, load_tokenizer, new_word_encoder

_BATCH_DOCUMENTS = 4096


def compare_pubmed(source: str, paths: Sequence[Path], repeats: int) -> list[Measured]:
    """Reading PubMed's files: our two passes, pubmed_parser, and lxml alone.

    lxml alone takes the first piece of text of titles and sections, which is less than the text.
    """
    everything = [np.arange(len(pubmed.scan(path).pmids)) for path in paths]
    found = list(_pubmed_documents(paths, everything))
    size = sum(len(document.text.encode()) for document in found)
    records = sum(map(len, everything))

    def row(stage: str, who: str, work: Any) -> Measured:
        return measure(stage, who, source, work, records, size, repeats)

    rows = [
        row("scan", OURS, lambda: [pubmed.scan(path) for path in paths]),
        row("parse", OURS, lambda: _exhaust(_pubmed_documents(paths, everything))),
        row(
            "parse and identify",
            OURS,
            lambda: _exhaust(_pubmed_documents(paths, everything, languages=["en"])),
        ),
        row("parse", "lxml iterparse", lambda: _plain_lxml(paths)),
        _written(row, paths, everything),
    ]
    if not _is_installed("pubmed_parser"):
        return [*rows, _missing("parse", "pubmed_parser", source)]
    import pubmed_parser

    def parse() -> None:
        for path in paths:
            _exhaust(
                pubmed_parser.parse_medline_xml(str(path), author_list=False, reference_list=False)
            )

    return [*rows, row("parse", "pubmed_parser", parse)]


def _written(
    row: Callable[[str, str, Any], Measured], paths: Sequence[Path], everything: Sequence[Any]
) -> Measured:
    """As `documents` does: parsed, identified and written."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "documents.parquet"
        found = row(
            "documents",
            OURS,
            lambda: write_documents(out, _pubmed_documents(paths, everything, languages=["en"])),
        )
        return replace(found, written=out.stat().st_size)


def compare_notes(source: str, path: Path, repeats: int) -> list[Measured]:
    """Reading the notes of MIMIC: ours, and Python's csv module alone."""
    found = list(mimic.documents(path, source))
    size = sum(len(document.text.encode()) for document in found)

    def read() -> None:
        csv.field_size_limit(2**31 - 1)
        opened = gzip.open if is_gzip(path) else open
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            _exhaust(csv.DictReader(file))

    return [
        measure("notes", who, source, work, len(found), size, repeats)
        for who, work in (
            (OURS, lambda: _exhaust(mimic.documents(path, source))),
            ("csv module", read),
        )
    ]


def datatrove_minhash(source: str, documents: Sequence[Document]) -> Measured:
    """datatrove's own MinHash from signatures to the removal of duplicates, with its defaults.

    Those are ours too: runs of 5 words, 14 bands of 8 rows.
    """
    name = "datatrove MinHash"
    if not (_is_installed("xxhash") and _is_installed("spacy")):
        return _missing("near-duplicates", name, source)
    from datatrove.data import Document as Theirs
    from datatrove.pipeline.dedup import minhash
    from datatrove.utils.logging import logger

    logger.remove()
    texts = [Theirs(text=document.text, id=document.id) for document in documents]
    size = sum(len(document.text.encode()) for document in documents)
    bands = minhash.MinhashConfig().num_buckets

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            parts = [f"{folder}/{part}" for part in ("signatures", "buckets", "removed")]
            minhash.MinhashDedupSignature(parts[0]).run(iter(texts), 0, 1)
            for band in range(bands):
                minhash.MinhashDedupBuckets(*parts[:2]).run(None, band, bands)
            minhash.MinhashDedupCluster(*parts[1:]).run(None, 0, 1)
            _exhaust(minhash.MinhashDedupFilter(parts[2]).run(iter(texts), 0, 1))

    return measure("near-duplicates", name, source, run, len(texts), size, 1)


def compare_tokenizers(
    folder: Path, source: str, documents: Sequence[Document], repeats: int
) -> list[Measured]:
    """Token ids: ours, ours with no word met before, and SentencePiece's own encoding with threads.

    From the second repeat on the first has met every word before, which flatters it. The second
    forgets the words before each call, and so does the tokenizers library; it meets them once.
    """
    texts = [document.text for document in documents]
    size = sum(len(text.encode()) for text in texts)
    tokenizer = load_tokenizer(folder)
    batches = [texts[i : i + _BATCH_DOCUMENTS] for i in range(0, len(texts), _BATCH_DOCUMENTS)]
    threads = os.cpu_count() or 1

    def row(who: str, work: Callable[[], object]) -> Measured:
        return measure("encode", who, source, work, len(texts), size, repeats)

    def ours() -> None:
        for batch in batches:
            encode(tokenizer, batch)

    def ours_afresh(encoder: WordEncoder) -> None:
        tokenizer.backend_tokenizer.model._clear_cache()
        encoder.forget()
        for batch in batches:
            encoder.encode(batch)

    rows = [row(OURS, ours)]
    encoder = new_word_encoder(tokenizer)
    if encoder is not None:
        rows.append(row(f"{OURS}, new words", partial(ours_afresh, encoder)))
    name, path = f"SentencePiece, {threads} threads", folder / SENTENCEPIECE_FILE
    if not path.is_file():
        return [*rows, _missing("encode", name, source, f"no {SENTENCEPIECE_FILE}")]
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))

    def theirs() -> None:
        for batch in batches:
            model.encode(batch, num_threads=threads)

    return [*rows, row(name, theirs)]


def compare_shards(data: Path, split: str, source: str, repeats: int) -> list[Measured]:
    """Writing rows as a tar: ours with index and checksums, and webdataset's TarWriter.

    documents and bytes count rows here, and the bytes of their token ids.
    """
    reader = DataSet(data)
    rows = [reader.read(split, source, row) for row in range(reader.sources(split)[source])]
    size = sum(row.input_ids.nbytes for row in rows)

    def ours(folder: Path) -> None:
        write_shard(folder / "rows.tar", rows)

    def theirs(folder: Path) -> None:
        with webdataset.TarWriter(str(folder / "rows.tar")) as writer:
            for row in rows:
                writer.write(_sample(row))

    found = []
    for who, write in ((OURS, ours), ("webdataset TarWriter", theirs)):
        with tempfile.TemporaryDirectory() as folder:
            work = partial(write, Path(folder))
            found.append(measure("shards", who, source, work, len(rows), size, repeats))
    return found


def _sample(row: Row) -> dict[str, Any]:
    return {
        "__key__": row.key,
        "input_ids.npy": row.input_ids,
        "cu_seqlens.npy": row.cu_seqlens,
        "documents.json": json.dumps(row.documents).encode(),
    }


def _pubmed_documents(
    paths: Sequence[Path], positions: Sequence[Any], **options: Any
) -> Iterable[Document]:
    for path, of_file in zip(paths, positions, strict=True):
        yield from pubmed.documents(path, of_file, keep_retracted=True, **options)


def _plain_lxml(paths: Sequence[Path]) -> None:
    for path in paths:
        with gzip.open(path) if is_gzip(path) else path.open("rb") as file:
            for _, citation in etree.iterparse(file, tag="MedlineCitation"):
                citation.findtext("PMID")
                citation.findtext("Article/ArticleTitle")
                [part.text for part in citation.iterfind("Article/Abstract/AbstractText")]
                citation.clear()


def is_gzip(path: Path) -> bool:
    """Whether a file is gzip, by its first bytes."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _exhaust(things: Iterable[object]) -> None:
    for _ in things:
        pass


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _missing(stage: str, what: str, source: str, why: str = "not installed") -> Measured:
    return Measured(stage, f"{what} ({why})", source, 0, 0, 0.0, 0.0)
