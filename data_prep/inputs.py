"""The raw files of a configuration: which there are, in which order, and their checksums."""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import ConfigError
from data_prep.checksums import md5s
from data_prep.config import SOURCE_OF_KEY, DataPrep
from data_prep.document import InputError
from data_prep.pubmed import in_order


@dataclass(frozen=True)
class Input:
    """One raw file, read as one kind.

    kind: `pubmed`, `discharge`, `radiology`, `icd10cm`, `icd9cm-dx` or `icd9cm-sg`.
    number: its place among the inputs of its source; files made from it are named after it.
    name: its path relative to raw_dir.
    """

    kind: str
    source: str
    number: int
    path: Path
    name: str
    md5: str
    bytes: int

    @property
    def stem(self) -> str:
        """`<source>/NNNNN`."""
        return f"{self.source}/{self.number:05d}"

    def description(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {"kind": self.kind, "path": self.name, "md5": self.md5, "bytes": self.bytes}


def find_inputs(config: DataPrep) -> list[Input]:
    """The inputs of `config`: sources in the order of the keys, PubMed in NLM's, others by path.

    A pattern that no file matches is named on stderr. Raises ConfigError for a key of `sources`
    none of whose patterns does, InputError for a folder or file that is not there or cannot be
    read.
    """
    raw_dir = config.raw_dir
    if not raw_dir.is_dir():
        raise InputError(
            f"raw_dir = {raw_dir} is no folder; give the folder of the raw files as "
            "raw_dir=FOLDER, or try `make demo`, which makes a small corpus"
        )
    found = [
        (key, path)
        for key, patterns in config.sources.patterns().items()
        for path in _files(raw_dir, key, patterns)
    ]
    # Once for all inputs: it keeps what it found in out_dir.
    hashes = md5s([path for _, path in found], config.out_dir / "md5.json")
    inputs = []
    numbers: Counter[str] = Counter()
    for (key, path), md5 in zip(found, hashes, strict=True):
        kind, source = key.replace("_", "-"), SOURCE_OF_KEY.get(key, key)
        name = path.relative_to(raw_dir).as_posix()
        size = path.stat().st_size
        inputs.append(Input(kind, source, numbers[source], path, name, md5, size))
        numbers[source] += 1
    return inputs


def _files(raw_dir: Path, key: str, patterns: list[str]) -> list[Path]:
    files: set[Path] = set()
    unmatched = []
    for pattern in patterns:
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts or not pattern:
            raise ConfigError(f"sources.{key}: {pattern!r} is not a pattern relative to raw_dir")
        matches = {path for path in raw_dir.glob(pattern) if path.is_file()}
        matches = {p for p in matches if p.suffix != ".md5" and not p.name.startswith(".")}
        if not matches:
            unmatched.append(
                f"sources.{key}: no file below raw_dir = {raw_dir} matches {pattern!r}"
            )
        files |= matches
    if patterns and not files:
        raise ConfigError(f"{'; '.join(unmatched)}; correct a pattern, or take the source out")
    for warning in unmatched:
        print(f"data_prep: warning: {warning}", file=sys.stderr)
    return in_order(files) if key == "pubmed" else sorted(files)
