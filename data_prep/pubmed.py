"""PubMed: the XML files of baseline, updates and exports, to titles and abstracts.

An article may occur in many files: its record is revised, versioned or deleted by later ones.
So the files are read twice:

    paths = in_order(folder.rglob("*.xml*"))
    winners = fold(scan(path) for path in paths)        # which record of which file counts
    for path, positions in zip(paths, winners):
        for document in documents(path, positions): ...
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.document import Document


@dataclass(frozen=True)
class Scan:
    """What the fold needs to know of one file.

    pmids (n,) uint32 and versions (n,) uint16: of its n records, in file order;
    deleted_pmids (d,) uint32 and deleted_versions (d,) uint16: of its DeleteCitation list.
    """

    pmids: NDArray[np.uint32]
    versions: NDArray[np.uint16]
    deleted_pmids: NDArray[np.uint32]
    deleted_versions: NDArray[np.uint16]


def in_order(paths: Iterable[Path]) -> list[Path]:
    """The files in the order in which NLM made them, which is the order they are folded in.

    NLM's names hold year and number (`pubmed26n1334.xml.gz`; the updates of a year continue the
    numbers of its baseline). Files with other names come first, by path: their age is unknown.
    Sidecars (`.md5`) and hidden files are left out.
    """
    raise NotImplementedError


def scan(path: Path) -> Scan:
    """Pass 1 over one file; verifies its `.md5` sidecar where there is one.

    Independent of all other files, so that several can be scanned at once.
    Raises InputError for a file that is not PubMed XML, is cut short or fails its checksum.
    """
    raise NotImplementedError


def fold(scans: Iterable[Scan]) -> list[NDArray[np.int64]]:
    """For each file the positions, ascending int64, of its records that count.

    `scans` come in the order of `in_order`. Of the records of a PMID the last by (Version, file,
    position) counts; a DeleteCitation removes the records of its (PMID, Version) in its own and all
    earlier files. A record that wins but is retracted is dropped by `documents`, not here.
    """
    raise NotImplementedError


def documents(
    path: Path,
    positions: NDArray[np.int64],
    *,
    keep_retracted: bool = False,
    counts: Counter[str] | None = None,
) -> Iterator[Document]:
    """Pass 2 over one file: a document for each record at `positions` that has a text.

    Text: the title on a line, then each section of the abstract on a line, `LABEL: text` where it
    is labelled. id and group are `pubmed-<pmid>`.
    meta: `year` (int or None), `languages`, `publication_types` (lists of str), `has_abstract`,
    `truncated`, `retracted`, `retraction_notice` (bool), `version` (int), `file` (its name).
    `counts` gets `documents`, `records`, `replaced` (not in positions), `without_text`,
    `title_only` and `retracted` (both kinds; left out unless `keep_retracted`) added.
    Raises InputError like `scan`.
    """
    raise NotImplementedError
