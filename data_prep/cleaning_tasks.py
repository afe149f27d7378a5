"""What the tasks of the cleaning stages do (`data_prep.cleaning` says which stages there are).

Each function does one task: it reads what stages before it wrote and writes its own files, whole or
not at all. Counts and decisions hold ids and numbers, never text.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.files import whole_file
from data_prep import copy_forward, dedup, near_duplicates
from data_prep.arrays import map_array, save_array
from data_prep.clusters import COPY
from data_prep.config import DataPrep
from data_prep.decontaminate import Index, load_index
from data_prep.document import Document, read_documents, write_documents
from data_prep.minhash import Banding, batches
from data_prep.quality import RULES, broken_rules
from data_prep.split import (
    SPLITS,
    TRAIN,
    VALIDATION,
    Links,
    Split,
    cluster_pairs,
    group_key,
    link_groups,
    on_both_sides,
)
from data_prep.stages import Counts
from data_prep.words import hash_words

# A check's verdict is 0, or 1 + the place of its reason here.
OVERLAP = "evaluation_text"
REASONS = (*RULES, OVERLAP)


@dataclass(frozen=True)
class Stays:
    """Which documents of a file stay: by what `checks`, `clusters` and `split` decided.

    begin: the position of the file's first document.
    """

    checks: Path
    decisions: tuple[Path, ...]
    left_out: Path | None
    begin: int

    def load(self) -> NDArray[np.bool_]:
        """(documents,) bool."""
        stays = np.load(self.checks) == 0
        for path in self.decisions:
            shard = map_array(path)
            bounds = [self.begin, self.begin + len(stays)]
            inside = np.array(shard[slice(*np.searchsorted(shard["position"], bounds))])
            stays[inside["position"] - self.begin] = inside["decision"] <= COPY
        stays[self.on_both_sides(len(stays))] = False
        return stays

    def on_both_sides(self, documents: int) -> NDArray[np.int64]:
        """Which of the file's `documents` the split leaves out, ascending numbers."""
        if self.left_out is None:
            return np.zeros(0, np.int64)
        positions = map_array(self.left_out)
        here = slice(*np.searchsorted(positions, [self.begin, self.begin + documents]))
        return positions[here] - self.begin


def check(documents: Path, index: Path, config: DataPrep, out: Path) -> Counts:
    """Write `out`.npy, (documents,) uint8 verdicts, and `out`.jsonl, the reasons by id."""
    sets = [part.name for part in config.decontaminate.sets]
    counts: Counter[str] = Counter()
    verdicts: list[NDArray[np.uint8]] = [np.zeros(0, np.uint8)]
    with whole_file(out.with_name(f"{out.name}.jsonl")) as file:
        for batch in _document_batches(documents):
            rules, overlaps = _look_at(batch, _load_index(index), config)
            of_batch = np.zeros(len(batch), np.uint8)
            for number, (document, rule, bits) in enumerate(
                zip(batch, rules, overlaps.tolist(), strict=True)
            ):
                found = [name for place, name in enumerate(sets) if bits >> place & 1]
                counts.update(f"overlap {name}" for name in found)
                reason = rule or (OVERLAP if found and config.decontaminate.drop else None)
                if reason is not None:
                    counts[reason] += 1
                    of_batch[number] = 1 + REASONS.index(reason)
                if reason is not None or found:
                    entry = {"id": document.id, "left_out_for": reason, "overlaps": found}
                    file.write(json.dumps(entry).encode() + b"\n")
            verdicts.append(of_batch)
    save_array(out.with_name(f"{out.name}.npy"), np.concatenate(verdicts))
    return {"documents": sum(map(len, verdicts))} | dict(counts)


def digests(documents: Path, out: Sequence[Path]) -> Counts:
    """Write the digests of a file's documents and the keys of their groups."""
    groups: list[int] = []

    def noting_groups() -> Iterator[Document]:
        for document in read_documents(documents):
            groups.append(group_key(document.group))
            yield document

    found = dedup.digests(noting_groups())
    save_array(out[0], found)
    save_array(out[1], np.array(groups, np.uint64))
    return {"documents": len(found)}


def unique(
    digest_files: Sequence[Path], checks: Sequence[Path], part: int, parts: int, out: Path
) -> Counts:
    """Write `dedup.copies_in_part` of a source."""
    copies, compared = dedup.copies_in_part(
        map(map_array, digest_files), (map_array(path) == 0 for path in checks), part, parts
    )
    save_array(out, copies)
    return {"documents": compared, "unique": compared - len(copies)}


def signatures(
    documents: Path, checks: Path, copies: Sequence[Path], begin: int, banding: Banding, out: Path
) -> Counts:
    """`near_duplicates.write_signatures` of a file."""
    first_of = dedup.first_of_file(np.load(checks) == 0, begin, map(map_array, copies))
    return near_duplicates.write_signatures(documents, first_of, begin, banding, out)


def runs(documents: Path, candidates: Path, words: int, out: Path) -> Counts:
    """`near_duplicates.write_runs` of a file."""
    return near_duplicates.write_runs(documents, np.load(candidates), words, out)


def split(kept: Mapping[str, Sequence[Path]], config: DataPrep, out: Path) -> Counts:
    """Write which groups are linked, and by source which documents are left out of validation.

    kept: for each source the `.kept.npz` of the shards of its clusters.
    """
    pairs = [np.zeros((0, 2), np.uint64)]
    for paths in kept.values():
        for path in paths:
            with np.load(path) as found:
                pairs.append(cluster_pairs(found["clusters"], found["groups"]))
    links = link_groups(np.concatenate(pairs), config.near_duplicates.linked_groups)
    sides = Split(config.validation_share, config.seed, links)
    left_out = 0
    for source, paths in kept.items():
        positions = [np.zeros(0, np.int64)]
        for path in paths:
            with np.load(path) as found:
                apart = on_both_sides(found["clusters"], sides.is_validation(found["groups"]))
                positions.append(found["positions"][apart])
        save_array(out / f"{source}.npy", np.sort(np.concatenate(positions)))
        left_out += sum(map(len, positions))
    with whole_file(out / "links.npz") as file:
        np.savez(file, **vars(links))
    sizes = np.unique(links.leads, return_counts=True)[1]
    return {
        "linked_groups": len(links.keys),
        "largest_linked": int(sizes.max(initial=0)),
        "left_out_of_validation": left_out,
    }


def paragraphs(
    documents: Path, stays: Stays, begin: int, minimum_characters: int, out: Path
) -> Counts:
    """`copy_forward.write_paragraphs` of a file."""
    found = read_documents(documents)
    return copy_forward.write_paragraphs(found, stays.load(), begin, minimum_characters, out)


def copied(paragraph_files: Sequence[Path], part: int, parts: int, out: Path) -> Counts:
    """Write `copy_forward.copied` of a source."""
    drops = copy_forward.copied(paragraph_files, part, parts)
    save_array(out, drops)
    return {"paragraphs": len(drops)}


def keep(
    documents: Path,
    groups: Path,
    stays: Stays,
    copied_paragraphs: Sequence[Path],
    begin: int,
    out: dict[str, Path],
    config: DataPrep,
) -> Counts:
    """Write the documents of a file that stay, by split, and by id what notes have lost and which
    documents the split leaves out.
    """
    with np.load(out[TRAIN].parents[3] / "split" / "links.npz") as arrays:
        sides = Split(config.validation_share, config.seed, Links(**arrays))
    is_validation = sides.is_validation(np.load(groups))
    staying = stays.load()
    drops = _drops(copied_paragraphs, begin, len(staying))
    counts: Counter[str] = Counter(documents=len(staying), left_out=int((~staying).sum()))

    apart = set(stays.on_both_sides(len(staying)).tolist())
    apart_log: list[bytes] = []

    def of(wanted: str, log: list[bytes]) -> Iterator[Document]:
        chosen = staying & (is_validation == (wanted == VALIDATION))
        for number, document in enumerate(read_documents(documents)):
            if wanted == VALIDATION and number in apart:
                apart_log.append(json.dumps({"id": document.id}).encode() + b"\n")
            if not chosen[number]:
                continue
            gone = drops.get(begin + number)
            if gone is None:
                yield document
                continue
            text = copy_forward.without(document.text, gone)
            lost = len(document.text) - len(text)
            entry = {"id": document.id, "paragraphs": len(gone), "characters": lost}
            log.append(json.dumps(entry | {"whole": not text}).encode() + b"\n")
            counts["copied_paragraphs"] += len(gone)
            counts["copied_characters"] += lost
            counts["copied_whole"] += not text
            if text:
                yield Document(document.id, document.source, document.group, text, document.meta)

    def measured(documents: Iterator[Document], name: str) -> Iterator[Document]:
        for document in documents:
            counts[f"{name}_bytes"] += len(document.text.encode())
            yield document

    log: list[bytes] = []
    for name in SPLITS:
        counts[f"{name}_bytes"] = 0
        counts[name] = write_documents(out[name], measured(of(name, log), name))
    for name, lines in (("copied", log), ("apart", apart_log)):
        with whole_file(out[name]) as file:
            file.writelines(lines)
    return dict(counts)


def _look_at(
    batch: Sequence[Document], index: Index, config: DataPrep
) -> tuple[list[str | None], NDArray[np.uint64]]:
    """For each document of one source the rule it breaks, and the sets it overlaps with."""
    texts = [document.text for document in batch]
    words = hash_words(texts, whole_values=False)
    rules = config.quality.of(batch[0].source)
    broken: list[str | None] = [None] * len(batch)
    if rules is not None:
        broken = broken_rules(texts, words, rules)
    return broken, index.sets_of(batch, words)


def _document_batches(path: Path) -> Iterator[list[Document]]:
    documents: list[Document] = []

    def numbered() -> Iterator[tuple[int, str]]:
        for document in read_documents(path):
            documents.append(document)
            yield len(documents), document.text

    for batch in batches(numbered()):
        of_batch, documents[: len(batch)] = documents[: len(batch)], []
        yield of_batch


def _drops(paths: Sequence[Path], begin: int, documents: int) -> dict[int, list[int]]:
    """The paragraphs that the notes of a file lose, by the note's position."""
    found: dict[int, list[int]] = {}
    for path in paths:
        drops = map_array(path)
        here = slice(*np.searchsorted(drops[:, 0], [begin, begin + documents]))
        for position, paragraph in drops[here].tolist():
            found.setdefault(position, []).append(paragraph)
    return found


@lru_cache(maxsize=1)
def _load_index(path: Path) -> Index:
    """Kept because a process checks many files."""
    return load_index(path)
