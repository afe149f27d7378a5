"""What the tasks of the stages before and after cleaning do (`data_prep.pipeline` says which).

Each function does one task: it reads what stages before it wrote and writes its own files, whole or
not at all. Counts hold numbers, never text.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.config import config_to_dict
from common.files import whole_file
from data_prep import codes, mimic, pubmed
from data_prep.arrays import map_array, save_array
from data_prep.config import DataPrep
from data_prep.document import Document, read_documents, write_documents, write_parts
from data_prep.inputs import Input
from data_prep.progress import advance
from data_prep.rows import write_planned_shard
from data_prep.shard_writer import token_dtype
from data_prep.stages import Counts
from data_prep.token_files import write_tokens
from data_prep.tokenizer_sample import sample_key

if TYPE_CHECKING:
    # transformers takes seconds to import, and most tasks do without it.
    from transformers import PreTrainedTokenizerFast

# Records whose versions one task of `fold` compares, at some 40 bytes each.
FOLD_RECORDS = 1 << 19
# What `fold` writes: the number of the file, then the record's position in it.
_FILE_SHIFT = np.uint64(32)


def scan(path: Path, out: Path) -> Counts:
    """Write which records a PubMed file holds."""
    found = pubmed.scan(path)
    with whole_file(out) as file:
        np.savez(file, **vars(found))
    return {"records": len(found.pmids), "deletions": len(found.deleted_pmids)}


def fold(scans: Sequence[Path], part: int, parts: int, out: Path) -> Counts:
    """Write which records count, of those whose PMID is `part` modulo `parts`.

    `out`: (records,) uint64 in ascending order, file << 32 | position.
    """
    found: list[pubmed.Scan] = []
    positions: list[NDArray[np.int64]] = []
    for path in scans:
        with np.load(path) as arrays:
            records = np.flatnonzero(arrays["pmids"] % parts == part)
            deleted = arrays["deleted_pmids"] % parts == part
            positions.append(records)
            found.append(
                pubmed.Scan(
                    arrays["pmids"][records],
                    arrays["versions"][records],
                    arrays["deleted_pmids"][deleted],
                    arrays["deleted_versions"][deleted],
                )
            )
        advance("files", 1)
    winners = [np.zeros(0, np.uint64)]
    for number, (of_file, chosen) in enumerate(zip(positions, pubmed.fold(found), strict=True)):
        place = of_file[chosen].astype(np.uint64)
        winners.append(np.uint64(number) << _FILE_SHIFT | place)
    save_array(out, np.concatenate(winners))
    return {"records": sum(map(len, winners))}


def _winners(folded: Sequence[Path], number: int) -> NDArray[np.int64]:
    """The positions of the records that count in PubMed's file `number`, ascending."""
    bounds = np.array([number, number + 1], np.uint64) << _FILE_SHIFT
    chosen = [np.zeros(0, np.uint64)]
    for path in folded:
        part = map_array(path)
        chosen.append(np.array(part[slice(*np.searchsorted(part, bounds))]))
    return np.sort((np.concatenate(chosen) - bounds[0]).astype(np.int64))


def documents(
    source: Input,
    folded: Sequence[Path],
    config: DataPrep,
    edition_in_id: bool,
    headings: Path | None,
    out: Path,
) -> Counts:
    """Write the documents of an input: `out`.parquet, of notes `out`-NNNN.parquet.

    folded: what the tasks of `fold` wrote; headings: the file with ICD-10-CM's, for its codes.
    """
    counts: Counter[str] = Counter()
    found: Iterator[Document]
    path = out.with_name(f"{out.name}.parquet")
    if source.kind == "pubmed":
        found = pubmed.documents(
            source.path,
            _winners(folded, source.number),
            keep_retracted=config.keep_retracted,
            **config_to_dict(config.pubmed),
            counts=counts,
        )
        counts["documents"] = write_documents(path, found)
    elif source.kind in codes.KINDS:
        found = codes.documents(
            source.path,
            source.kind,
            counts,
            templates=config.code_templates,
            edition_in_id=edition_in_id,
            headings=headings,
        )
        counts["documents"] = write_documents(path, found)
    else:
        found = mimic.documents(source.path, source.kind, counts, redaction=config.redaction)
        counts["documents"] = write_parts(out, found, config.part_characters)
    return dict(counts)


def sample(kept: Path, share: float, seed: int, out: Path) -> Counts:
    """Write a random `share` of the documents of a file."""
    below = int(share * 2**64)
    chosen = (
        document for document in read_documents(kept) if sample_key(seed, document.id) < below
    )
    return {"documents": write_documents(out, chosen)}


def tokenizer(existing: str | None, samples: Sequence[Path], out: Path, config: DataPrep) -> Counts:
    """Train the tokenizer on `samples`, or copy the existing one."""
    from data_prep import tokenizer as tokenizers

    if existing is not None:
        tokenizers.save_tokenizer(tokenizers.load_tokenizer(existing), out)
    else:
        tokenizers.train_tokenizer(
            (document for path in samples for document in read_documents(path)),
            out,
            config.tokenizer.vocab_size,
            sample_bytes=config.tokenizer.sample_bytes,
            shares=config.tokenizer.shares,
            seed=config.seed,
        )
    load_tokenizer.cache_clear()
    return {"vocabulary": load_tokenizer(out)[1]["vocab_size"]}


def tokens(kept: Path, tokenizer_folder: Path, out: Path) -> Counts:
    """Write the token ids of a file's documents."""
    found, description = load_tokenizer(tokenizer_folder)
    vocab_size = description["vocab_size"]
    dtype = token_dtype(vocab_size)
    return dict(write_tokens(out, read_documents(kept), found, vocab_size, dtype))


def shard(*arguments: Any) -> Counts:
    """`rows.write_planned_shard`; the counts are the shard's entry in the manifest."""
    return write_planned_shard(*arguments).to_dict()


@cache
def load_tokenizer(folder: Path) -> "tuple[PreTrainedTokenizerFast, dict[str, Any]]":
    """The tokenizer and its description, kept because a process tokenises many files."""
    from data_prep import tokenizer as tokenizers

    found = tokenizers.load_tokenizer(folder)
    return found, tokenizers.describe(found)
