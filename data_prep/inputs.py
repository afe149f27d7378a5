"""The raw files of a configuration: which there are, in which order, and their checksums."""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import ConfigError
from data_prep.checksums import md5s
from data_prep.codes import HEADINGS
from data_prep.codes.rxnorm import companion
from data_prep.config import DataPrep, source_of
from data_prep.document import InputError
from data_prep.pubmed import in_order

# In out_dir, so that a second run does not read all raw files again.
MD5_MEMORY = "md5.json"


@dataclass(frozen=True)
class Input:
    """One raw file, read as one kind.

    kind: `pubmed`, `discharge`, `radiology`, a kind of code table, such as `icd9cm-dx`, or
    `icd10cm-tabular`, of which no documents are made.
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


@dataclass(frozen=True)
class DocumentFile:
    """One file of documents: those of an input, or a part of those of a table of notes.

    stem: `<source>/NNNNN`, or `<source>/NNNNN-PPPP` for a part; what is made of it is named so.
    """

    source: str
    stem: str


@dataclass(frozen=True)
class EvaluationInput:
    """One file of an evaluation set; `number` is the set's place in the configuration."""

    number: int
    path: Path
    name: str
    md5: str

    def description(self) -> dict[str, Any]:
        """What a manifest says of it."""
        size = self.path.stat().st_size
        return {"kind": "evaluation", "path": self.name, "md5": self.md5, "bytes": size}


def find_evaluation_inputs(config: DataPrep) -> list[EvaluationInput]:
    """The files of the evaluation sets of `config`, set by set; errors as in `find_inputs`."""
    raw_dir = config.raw_dir
    found = [
        (number, path)
        for number, part in enumerate(config.decontaminate.sets)
        for path in _files(raw_dir, f"decontaminate.sets {part.name}", part.files)
    ]
    hashes = md5s([path for _, path in found], config.out_dir / MD5_MEMORY)
    return [
        EvaluationInput(number, path, path.relative_to(raw_dir).as_posix(), md5)
        for (number, path), md5 in zip(found, hashes, strict=True)
    ]


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
        for path in _files(raw_dir, f"sources.{key}", patterns)
    ]
    hashes = md5s([path for _, path in found], config.out_dir / MD5_MEMORY)
    inputs = []
    numbers: Counter[str] = Counter()
    for (key, path), md5 in zip(found, hashes, strict=True):
        kind, source = key.replace("_", "-"), source_of(key)
        name = path.relative_to(raw_dir).as_posix()
        size = path.stat().st_size
        inputs.append(Input(kind, source, numbers[source], path, name, md5, size))
        numbers[source] += 1
    _check_companions(inputs)
    _check_headings(inputs)
    return inputs


def _check_companions(inputs: list[Input]) -> None:
    """What an input takes from another file must be an input itself: its content decides, too."""
    paths = {found.path for found in inputs if found.kind == "rxnorm"}
    for found in inputs:
        if found.kind == "ndc" and companion(found.path) not in paths:
            raise ConfigError(
                f"sources.ndc has {found.name}, and sources.rxnorm not the "
                f"{companion(found.path).name} beside it; name both files of one release"
            )


def _check_headings(inputs: list[Input]) -> None:
    """A code that two editions have is one text, so its headings are those of one list."""
    names = [found.name for found in inputs if found.kind == HEADINGS]
    if len(names) > 1:
        raise ConfigError(
            f"sources.icd10cm_tabular has {len(names)} files ({', '.join(names[:3])}, …); name the "
            "newest one only"
        )


def _files(raw_dir: Path, where: str, patterns: list[str]) -> list[Path]:
    files: set[Path] = set()
    unmatched = []
    for pattern in patterns:
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts or not pattern:
            raise ConfigError(f"{where}: {pattern!r} is not a pattern relative to raw_dir")
        matches = {path for path in raw_dir.glob(pattern) if path.is_file()}
        matches = {p for p in matches if p.suffix != ".md5" and not p.name.startswith(".")}
        if not matches:
            unmatched.append(f"{where}: no file below raw_dir = {raw_dir} matches {pattern!r}")
        files |= matches
    if patterns and not files:
        raise ConfigError(f"{'; '.join(unmatched)}; correct a pattern, or take {where} out")
    for warning in unmatched:
        print(f"data_prep: warning: {warning}", file=sys.stderr)
    return in_order(files) if where == "sources.pubmed" else sorted(files)
