"""What is dropped of every cluster of duplicates, and which groups they tie together.

Documents of a source that say the same, or are verified near-duplicates, or are so but for a value,
form clusters. A document is dropped only for a document that stays and that it is a duplicate of;
of equals the longest stays, of equally long ones the first. A text that occurs in many groups (such
as the report of a normal X-ray in hundreds of subjects) is a template: so many copies of it stay,
at most one a group, the first ones.

Memory: one byte a document of the source, and some 250 a document that is in a cluster.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from common.files import whole_file
from data_prep.arrays import map_array, save_array
from data_prep.dedup import LEFT_OUT
from data_prep.near_duplicates import SourceFiles
from data_prep.stages import Counts

# Verdicts on documents; those up to COPY stay.
KEPT, COPY, EXACT, NEAR, CHECKED_OUT = range(5)
_WORDS = np.array(["kept", "template copy", "exact duplicate", "near-duplicate"], object)
_TABLE_ROWS = 1 << 16
_SCHEMA = pa.schema(
    [
        pa.field("cluster", pa.string(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("decision", pa.string(), nullable=False),
        pa.field("duplicate_of", pa.string()),
        pa.field("jaccard", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Similar:
    """Pairs of a source that are similar, as `near_duplicates.verify` finds them.

    pairs: (n, 2) int64 positions, the longer document first; jaccard: (n,) float32; is_duplicate:
    (n,) bool.
    """

    pairs: NDArray[np.int64]
    jaccard: NDArray[np.float32]
    is_duplicate: NDArray[np.bool_]


@dataclass(frozen=True)
class Templates:
    """A text in at least `groups` groups is a template, of which `copies` stay."""

    groups: int
    copies: int


# For code descriptions, which are not copied: no text is one.
NO_TEMPLATES = Templates(groups=2**62, copies=1)


def drop_near(similar: Similar) -> Similar:
    """One pair for each document that is dropped: what stays, and what is dropped for it.

    A document stays unless a document that stays is one it is a duplicate of: decided from the
    longest on. Of several the first that stays is taken.
    """
    pairs = similar.pairs[similar.is_duplicate]
    jaccard = similar.jaccard[similar.is_duplicate]
    nodes, flat = np.unique(pairs.ravel(), return_inverse=True)
    first, second = flat.reshape(-1, 2).T
    stays = np.zeros(len(nodes), np.bool_)
    decided = np.zeros(len(nodes), np.bool_)
    open_edges = np.ones(len(first), np.bool_)
    while not decided.all():
        # Whoever is dropped by nothing that may still stay, stays; what it is paired with goes.
        waits = np.zeros(len(nodes), np.bool_)
        waits[second[open_edges]] = True
        new = ~decided & ~waits
        stays |= new
        decided |= new
        decided[second[open_edges & stays[first]]] = True
        open_edges &= ~decided[first] & ~decided[second]
    chosen = np.flatnonzero(stays[first] & ~stays[second])
    chosen = chosen[np.lexsort((first[chosen], second[chosen]))]
    chosen = chosen[np.unique(second[chosen], return_index=True)[1]]
    return Similar(pairs[chosen], jaccard[chosen], np.ones(len(chosen), np.bool_))


@dataclass(frozen=True)
class Clustered:
    """Every document of a source that is in a cluster with another one, by position.

    positions, clusters (the first position in it), decisions (KEPT, COPY, EXACT, NEAR),
    duplicate_of (the position of a document that stays, or its own), jaccard (their similarity, NaN
    where they say the same), groups (uint64 keys): (n,) each.
    """

    positions: NDArray[np.int64]
    clusters: NDArray[np.int64]
    decisions: NDArray[np.uint8]
    duplicate_of: NDArray[np.int64]
    jaccard: NDArray[np.float32]
    groups: NDArray[np.uint64]


def cluster(
    first_of: Sequence[NDArray[np.int64]],
    groups: Sequence[NDArray[np.uint64]],
    similar: Similar,
    templates: Templates,
) -> Clustered:
    """Decide for a source; `first_of` and `groups` are those of its files, in their order."""
    starts = np.cumsum([0, *map(len, first_of)])
    near = drop_near(similar)
    copies, originals = _exact_copies(first_of, starts)
    positions = np.unique(np.concatenate([copies, originals, similar.pairs.ravel()]))
    group = _take(groups, starts, positions)

    exact_of = positions.copy()
    exact_of[np.searchsorted(positions, copies)] = originals
    duplicate_of = positions.copy()
    jaccard = np.full(len(positions), np.nan, np.float32)
    dropped = np.searchsorted(positions, near.pairs[:, 1])
    duplicate_of[dropped], jaccard[dropped] = near.pairs[:, 0], near.jaccard
    # A copy of a near-duplicate is dropped for what that was dropped for.
    of_first = np.searchsorted(positions, exact_of)
    duplicate_of, jaccard = duplicate_of[of_first], jaccard[of_first]

    decisions = np.full(len(positions), KEPT, np.uint8)
    decisions[~np.isnan(jaccard)] = NEAR
    decisions[exact_of != positions] = EXACT
    decisions[_template_copies(positions, duplicate_of, group, templates)] = COPY

    edges = np.stack([exact_of, positions], axis=1)
    label = _components(positions, np.concatenate([edges, similar.pairs]))
    return Clustered(positions, label, decisions, duplicate_of, jaccard, group)


def write_clusters(
    files: SourceFiles,
    first_of: Path,
    group_folder: Path,
    documents: Path,
    verified: Sequence[Path],
    templates: Templates,
    out: Path,
    name: str,
) -> Counts:
    """Decide for a source, and write below `out`:

    `<stem>.npy` for every file, (documents,) uint8: KEPT, COPY, EXACT, NEAR or
    CHECKED_OUT; `<name>/clusters.parquet`: every document in a cluster, by id; `<name>/kept.npz`:
    positions, clusters and groups of those that stay in a cluster where another one does.
    """
    masks = [map_array(path) for path in files.of(first_of, ".npy")]
    groups = [map_array(path) for path in files.of(group_folder, ".groups.npy")]
    found = cluster(masks, groups, _load_similar(verified), templates)
    for path, mask, begin in zip(files.of(out, ".npy"), masks, files.starts, strict=True):
        verdict = np.where(mask == LEFT_OUT, CHECKED_OUT, KEPT).astype(np.uint8)
        here = slice(*np.searchsorted(found.positions, [begin, begin + len(mask)]))
        verdict[found.positions[here] - begin] = found.decisions[here]
        save_array(path, verdict)
    _write_table(files, documents, found, out / name / "clusters.parquet")
    stays = found.decisions <= COPY
    labels, sizes = np.unique(found.clusters[stays], return_counts=True)
    stays[stays] = (sizes > 1)[np.searchsorted(labels, found.clusters[stays])]
    with whole_file(out / name / "kept.npz") as file:
        np.savez(
            file,
            positions=found.positions[stays],
            clusters=found.clusters[stays],
            groups=found.groups[stays],
        )
    numbers = np.bincount(found.decisions, minlength=CHECKED_OUT)
    return {
        "documents": sum(int((mask != LEFT_OUT).sum()) for mask in masks),
        "exact_duplicates": int(numbers[EXACT]),
        "near_duplicates": int(numbers[NEAR]),
        "template_copies": int(numbers[COPY]),
        "clusters": len(np.unique(found.clusters)),
        "clusters_with_several_kept": int((sizes > 1).sum()),
    }


def _exact_copies(
    first_of: Sequence[NDArray[np.int64]], starts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of documents that repeat another, and of what they repeat."""
    copies, originals = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for mask, begin in zip(first_of, starts[:-1].tolist(), strict=True):
        rows = np.flatnonzero((mask != LEFT_OUT) & (mask != np.arange(len(mask)) + begin))
        copies.append(rows + begin)
        originals.append(mask[rows])
    return np.concatenate(copies), np.concatenate(originals)


def _take(
    files: Sequence[NDArray[np.uint64]], starts: NDArray[np.int64], positions: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """The values at ascending `positions` over all files."""
    bounds = np.searchsorted(positions, starts)
    taken = [np.zeros(0, np.uint64)]
    for file, start, begin, end in zip(
        files, starts[:-1].tolist(), bounds[:-1], bounds[1:], strict=True
    ):
        taken.append(file[positions[begin:end] - start])
    return np.concatenate(taken)


def _template_copies(
    positions: NDArray[np.int64],
    duplicate_of: NDArray[np.int64],
    group: NDArray[np.uint64],
    templates: Templates,
) -> NDArray[np.int64]:
    """Rows that stay as copies of a template, besides what they are duplicates of."""
    # Text by text: what stays anyway, then its duplicates in their order.
    order = np.lexsort((positions, duplicate_of != positions, duplicate_of))
    # Of these the first of every group.
    by_group = order[np.lexsort((group[order], duplicate_of[order]))]
    is_new = np.ones(len(order), np.bool_)
    is_new[1:] = (np.diff(duplicate_of[by_group]) != 0) | (
        group[by_group][1:] != group[by_group][:-1]
    )
    is_first = np.zeros(len(order), np.bool_)
    is_first[by_group[is_new]] = True
    order = order[is_first[order]]
    _, text, in_groups = np.unique(duplicate_of[order], return_inverse=True, return_counts=True)
    rank = np.arange(len(order)) - (np.cumsum(in_groups) - in_groups)[text]
    chosen = order[(in_groups[text] >= templates.groups) & (rank < templates.copies)]
    return chosen[duplicate_of[chosen] != positions[chosen]]


def _components(positions: NDArray[np.int64], edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """For every position the first one of its connected component."""
    first, second = np.searchsorted(positions, edges).T
    size = len(positions)
    matrix = coo_array((np.ones(len(first), np.bool_), (first, second)), shape=(size, size))
    _, label = connected_components(matrix, directed=False)
    lowest = np.full(size, np.iinfo(np.int64).max)
    np.minimum.at(lowest, label, positions)
    return lowest[label]


def _load_similar(paths: Sequence[Path]) -> Similar:
    parts = [np.load(path) for path in paths]
    return Similar(
        np.concatenate([np.zeros((0, 2), np.int64), *(part["pairs"] for part in parts)]),
        np.concatenate([np.zeros(0, np.float32), *(part["jaccard"] for part in parts)]),
        np.concatenate([np.zeros(0, np.bool_), *(part["is_duplicate"] for part in parts)]),
    )


def _write_table(files: SourceFiles, documents: Path, found: Clustered, out: Path) -> None:
    """Write the clusters with the documents' ids, cluster by cluster."""
    ids = np.empty(len(found.positions), object)
    bounds = np.searchsorted(found.positions, [*files.starts, files.documents])
    for path, start, begin, end in zip(
        files.of(documents, ".parquet"),
        files.starts,
        bounds[:-1],
        bounds[1:],
        strict=True,
    ):
        if begin < end:
            column = pq.read_table(path, columns=["id"])["id"]
            ids[begin:end] = column.take(found.positions[begin:end] - start).to_pylist()
    order = np.lexsort((found.positions, found.clusters))
    with whole_file(out) as file, pq.ParquetWriter(file, _SCHEMA, compression="zstd") as writer:
        for begin in range(0, len(order), _TABLE_ROWS):
            rows = order[begin : begin + _TABLE_ROWS]
            other = found.duplicate_of[rows]
            is_own = other == found.positions[rows]
            columns = [
                pa.array(ids[np.searchsorted(found.positions, found.clusters[rows])]),
                pa.array(ids[rows]),
                pa.array(_WORDS[found.decisions[rows]]),
                pa.array(ids[np.searchsorted(found.positions, other)], mask=is_own),
                pa.array(found.jaccard[rows], mask=np.isnan(found.jaccard[rows])),
            ]
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
