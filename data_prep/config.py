"""The configuration of data preparation: the `data_prep:` section of a YAML file."""

from dataclasses import field, fields
from pathlib import Path

from common.config import ConfigError, config, config_to_dict

# Keys of `sources` whose documents are of a source of another name.
SOURCE_OF_KEY = {"icd9cm_dx": "icd9cm", "icd9cm_sg": "icd9cm"}

_MOST_ROW_TOKENS = 1 << 20
# 4 GB of ids for the writer of a shard.
_MOST_SHARD_TOKENS = 1 << 30


@config
class Sources:
    """Per source, patterns of its files below `raw_dir` (`**` is any depth); none leaves it out."""

    pubmed: list[str] = field(default_factory=list)
    """PubMed XML, plain or gzip: baseline, update files, exports"""
    discharge: list[str] = field(default_factory=list)
    """MIMIC-IV-Note's discharge.csv.gz"""
    radiology: list[str] = field(default_factory=list)
    """MIMIC-IV-Note's radiology.csv.gz"""
    icd10cm: list[str] = field(default_factory=list)
    """CMS's ICD-10-CM order file, or the zip with it"""
    icd9cm_dx: list[str] = field(default_factory=list)
    """CMS's long titles of ICD-9-CM diagnoses, or the zip with them"""
    icd9cm_sg: list[str] = field(default_factory=list)
    """CMS's long titles of ICD-9-CM procedures, or the zip with them"""

    def patterns(self) -> dict[str, list[str]]:
        """The patterns of every key."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


@config
class Tokenizer:
    """Trained on the training documents, or an existing one."""

    existing: str | None = None
    """folder of a fast Hugging Face tokenizer, or its name on the hub; none is trained then"""
    vocab_size: int = 50368
    """ids, a multiple of 64"""
    sample_bytes: int = 256 * 2**20
    """bytes of text to train on; training takes some twelve times as much memory"""
    shares: dict[str, float] | None = None
    """source -> its part of the sample; by default sources have the shares they have in the text"""


@config
class DataPrep:
    """From raw files to data sets, one for each of `max_lengths`."""

    raw_dir: Path = Path("data/raw")
    """folder of the raw files"""
    out_dir: Path = Path("data/base")
    """folder for everything that is made"""
    sources: Sources = field(default_factory=Sources)
    keep_retracted: bool = False
    """keep retracted PubMed articles and retraction notices"""
    validation_share: float = 0.01
    """share of the groups (subjects, articles, code categories) that is held out"""
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    row_tokens: int = 8192
    """tokens of a row, padding included"""
    max_lengths: list[int] = field(default_factory=lambda: [1024])
    """a data set is made for each: tokens of its longest document, [CLS] and [SEP] included"""
    max_documents: int = 512
    """most documents in a row"""
    rows_per_shard: int = 8192
    """rows of a shard; a writer holds so many in memory"""
    seed: int = 0
    """of the split, the tokenizer's sample and the order of documents and rows"""


def check(run: DataPrep) -> None:
    """Refuse, with a ConfigError that names the key, values that do not fit."""
    positive = {
        "row_tokens": run.row_tokens,
        "max_documents": run.max_documents,
        "rows_per_shard": run.rows_per_shard,
        "tokenizer.sample_bytes": run.tokenizer.sample_bytes,
    }
    for key, value in positive.items():
        _require(value > 0, f"{key} is {value}; it must be positive")
    _require(
        run.row_tokens <= _MOST_ROW_TOKENS,
        f"row_tokens is {run.row_tokens}; it must be at most {_MOST_ROW_TOKENS}",
    )
    _require(
        run.row_tokens * run.rows_per_shard <= _MOST_SHARD_TOKENS,
        f"rows_per_shard is {run.rows_per_shard}: shards of {run.row_tokens * run.rows_per_shard} "
        f"tokens, which a writer holds in memory; it must be at most "
        f"{_MOST_SHARD_TOKENS // run.row_tokens} with row_tokens = {run.row_tokens}",
    )
    _require(
        0 <= run.validation_share < 1,
        f"validation_share is {run.validation_share}; it must be at least 0 and below 1",
    )
    _require(bool(run.max_lengths), "max_lengths is empty; name a length, such as [1024]")
    _require(
        len(set(run.max_lengths)) == len(run.max_lengths),
        f"max_lengths names a length twice: {run.max_lengths}",
    )
    for length in run.max_lengths:
        # A piece holds [CLS], [SEP] and at least one token.
        _require(
            3 <= length <= run.row_tokens,
            f"max_lengths has {length}; a document must fit into a row of row_tokens = "
            f"{run.row_tokens} and has at least 3 tokens",
        )
    _check_tokenizer(run)
    _require(
        any(run.sources.patterns().values()),
        "sources names no files; give a source its patterns, as configs/sample.yaml does",
    )


def _check_tokenizer(run: DataPrep) -> None:
    """What would else be found out only after all documents have been read."""
    size, shares = run.tokenizer.vocab_size, run.tokenizer.shares or {}
    _require(
        size > 0 and size % 64 == 0,
        f"tokenizer.vocab_size is {size}; it must be a multiple of 64, such as "
        f"{max(1, -(-size // 64)) * 64}",
    )
    sources = {
        SOURCE_OF_KEY.get(key, key) for key, found in run.sources.patterns().items() if found
    }
    for source, share in shares.items():
        _require(
            source in sources,
            f"tokenizer.shares names {source!r}; the sources are {', '.join(sorted(sources))}",
        )
        _require(share > 0, f"tokenizer.shares.{source} is {share}; it must be positive")
    _require(
        sum(shares.values()) <= 1 + 1e-9,
        f"tokenizer.shares add up to {sum(shares.values())}; they must be 1 at most",
    )


def describe(run: DataPrep, max_length: int) -> dict[str, object]:
    """What a data set's manifest says of its configuration: all that decides its content.

    Where things lie on this machine does not, and neither do the other lengths made beside it.
    """
    values = config_to_dict(run)
    for key in ("raw_dir", "out_dir", "max_lengths"):
        del values[key]
    existing = run.tokenizer.existing
    if existing is not None and Path(existing).is_dir():
        values["tokenizer"]["existing"] = Path(existing).resolve().name
    return values | {"max_length": max_length}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
