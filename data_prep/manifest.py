"""The manifest of a data set: what it holds, what it was made from, and the hash of every file.

It is written last and is the same bytes for the same inputs and configuration, wherever they lie.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.files import file_hash, whole_file, write_json
from data_prep.config import DataPrep, describe
from data_prep.packing import SPECIAL_TOKENS
from data_prep.rows import Part
from data_prep.shard_writer import token_dtype
from data_prep.shards import FORMAT_VERSION, MANIFEST_NAME, TOKEN_COUNTS_NAME
from data_prep.split import SPLITS, TRAIN
from data_prep.token_files import TokenFile


def write_manifest(
    folder: Path,
    config: DataPrep,
    max_length: int,
    tokenizer: dict[str, Any],
    inputs: list[dict[str, Any]],
    shards: Mapping[Part, Sequence[dict[str, Any]]],
    files: Mapping[Part, Sequence[TokenFile]],
) -> dict[str, Any]:
    """Write the manifest of the data set in `folder`, and return it.

    tokenizer: `data_prep.tokenizer.describe`, and `file_sha256` of its tokenizer.json; shards: the
    entries of every split and source, in order; files: the tokens they were made from. What the
    shards hold is compared with these: RuntimeError when a token or a document is lost or there
    twice.
    """
    excluded = [*tokenizer["special_ids"].values(), *tokenizer["excluded_ids"]]
    splits = {split: _split(config, split, shards, files, excluded) for split in SPLITS}
    manifest = {
        "format": FORMAT_VERSION,
        "row_tokens": config.row_tokens,
        "max_length": max_length,
        "max_documents": config.max_documents,
        "token_dtype": token_dtype(tokenizer["vocab_size"]).name,
        "tokenizer": tokenizer,
        "configuration": describe(config, max_length),
        "inputs": inputs,
        "token_counts": _write_token_counts(folder, tokenizer["vocab_size"], files),
        "totals": _totals(config.row_tokens, list(splits.values())),
        "splits": splits,
    }
    write_json(folder / MANIFEST_NAME, manifest)
    return manifest


def unigram_entropy(counts: NDArray[np.int64]) -> float:
    """Entropy in nats of the distribution that `counts` (vocabulary,) describe; 0 for no tokens.

    It is the loss of a model that knows how often each token occurs and nothing else.
    """
    shares = counts[counts > 0] / max(counts.sum(), 1)
    # Rounded, because the order in which machines add may differ in the last bits.
    return round(float(-(shares * np.log(shares)).sum()), 9)


def _write_token_counts(
    folder: Path, vocab_size: int, files: Mapping[Part, Sequence[TokenFile]]
) -> dict[str, Any]:
    """How often each token occurs in training, by source, (sources, vocab_size) int64, as a file.

    Returns its entry in the manifest. Token-aware masking weights tokens by it.
    """
    sources = sorted(source for split, source in files if split == TRAIN)
    counts = np.zeros((len(sources), vocab_size), np.int64)
    for row, source in zip(counts, sources, strict=True):
        for tokens in files[TRAIN, source]:
            row += tokens.counts()
    path = folder / TOKEN_COUNTS_NAME
    with whole_file(path) as file:
        np.save(file, counts)
    return {"sha256": file_hash(path), "sources": sources}


def _split(
    config: DataPrep,
    split: str,
    shards: Mapping[Part, Sequence[dict[str, Any]]],
    files: Mapping[Part, Sequence[TokenFile]],
    excluded: list[int],
) -> dict[str, Any]:
    sources = {}
    occurrences: Any = 0
    for part in sorted(part for part in shards if part[0] == split):
        _compare(part, shards[part], files[part])
        sources[part[1]] = _of_part(config, shards[part])
        occurrences = occurrences + sum(file.counts() for file in files[part])
    counts = np.array(occurrences, np.int64, ndmin=1)
    if sources:
        counts[excluded] = 0
    return _totals(config.row_tokens, list(sources.values())) | {
        "unigram_entropy": unigram_entropy(counts),
        "sources": sources,
    }


def _of_part(config: DataPrep, shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The entry of a split and source; `least_rows`: no packing of its pieces has fewer."""
    entry = _totals(config.row_tokens, [shard | {"least_rows": 0} for shard in shards])
    least = max(
        -(-entry["tokens"] // config.row_tokens), -(-entry["pieces"] // config.max_documents)
    )
    return entry | {"least_rows": least, "shards": list(shards)}


def _totals(row_tokens: int, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    totals = {
        name: sum(part[name] for part in parts)
        for name in ("rows", "least_rows", "tokens", "documents", "pieces")
    }
    slots = totals["rows"] * row_tokens
    return totals | {"fill": round(totals["tokens"] / slots, 6) if slots else 0.0}


def _compare(part: Part, shards: Sequence[dict[str, Any]], files: Sequence[TokenFile]) -> None:
    """Nothing is lost and nothing is there twice: the shards hold what the token files hold."""
    pieces = sum(shard["pieces"] for shard in shards)
    found = {
        "documents": sum(shard["documents"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards) - SPECIAL_TOKENS * pieces,
    }
    wanted = {
        "documents": sum(len(file) for file in files),
        "tokens": sum(int(file.starts()[-1]) for file in files),
    }
    if found != wanted:
        raise RuntimeError(
            f"the shards of {'/'.join(part)} hold {found}, its token files {wanted}: this is a "
            "defect of data_prep, please report it"
        )
