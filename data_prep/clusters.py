"""What is dropped of every cluster of duplicates, and which groups they tie together.

Documents of a source that say the same, or are verified near-duplicates, or are so but for a value,
form clusters. A document is dropped only for a document that stays and that it is a duplicate of;
of equals the longest stays, of equally long ones the first. A text that occurs in many groups (such
as the report of a normal X-ray in hundreds of subjects) is a template: so many copies of it stay,
at most one a group, the first ones.

Which documents form a cluster is found first (`data_prep.components`); then whole clusters are
decided in shards. Memory: some 1,000 bytes for each document of a shard, which are 16,384 or the
largest cluster.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from common.files import whole_file
from data_prep.arrays import map_array, save_array
from data_prep.components import MEMBER
from data_prep.near_duplicates import SourceFiles
from data_prep.stages import Counts

# Decisions on documents; those up to COPY stay.
KEPT, COPY, EXACT, NEAR = range(4)
DECISION = np.dtype([("position", "<i8"), ("decision", "u1")])
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
    positions: NDArray[np.int64],
    clusters: NDArray[np.int64],
    copies: NDArray[np.int64],
    groups: NDArray[np.uint64],
    similar: Similar,
    templates: Templates,
) -> Clustered:
    """Decide for whole clusters.

    positions (ascending), clusters, groups: of their documents, (n,) each; copies: (m, 2)
    positions, documents and the first ones that say the same; similar: all pairs among them.
    """
    near = drop_near(similar)
    exact_of = positions.copy()
    exact_of[np.searchsorted(positions, copies[:, 0])] = copies[:, 1]
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
    decisions[_template_copies(positions, duplicate_of, groups, templates)] = COPY
    return Clustered(positions, clusters, decisions, duplicate_of, jaccard, groups)


def write_clusters(
    files: SourceFiles,
    members: Path,
    copies: Sequence[Path],
    group_folder: Path,
    documents: Path,
    verified: Sequence[Path],
    templates: Templates,
    out: Path,
) -> Counts:
    """Decide for a shard of a source's clusters, and write

    `out`.npy: DECISION, every document, by position; `out`.parquet: the same by id and cluster;
    `out`.kept.npz: positions, clusters and groups of those that stay where another one of their
    cluster does.

    members: what `components.write_members` wrote; copies: what `dedup` wrote.
    """
    shard = np.fromfile(members, MEMBER)
    positions = shard["position"]
    found = cluster(
        positions,
        shard["cluster"],
        _copies_of(positions, copies),
        _take(files.of(group_folder, ".groups.npy"), files.starts, positions),
        _similar_of(positions, verified),
        templates,
    )
    decisions = np.empty(len(positions), DECISION)
    decisions["position"], decisions["decision"] = positions, found.decisions
    save_array(out.with_name(f"{out.name}.npy"), decisions)
    _write_table(files, documents, found, out.with_name(f"{out.name}.parquet"))
    stays = found.decisions <= COPY
    labels, sizes = np.unique(found.clusters[stays], return_counts=True)
    stays[stays] = (sizes > 1)[np.searchsorted(labels, found.clusters[stays])]
    with whole_file(out.with_name(f"{out.name}.kept.npz")) as file:
        np.savez(
            file,
            positions=found.positions[stays],
            clusters=found.clusters[stays],
            groups=found.groups[stays],
        )
    numbers = np.bincount(found.decisions, minlength=NEAR + 1)
    return {
        "clustered": len(positions),
        "exact_duplicates": int(numbers[EXACT]),
        "near_duplicates": int(numbers[NEAR]),
        "template_copies": int(numbers[COPY]),
        "clusters": len(np.unique(found.clusters)),
        "clusters_with_several_kept": int((sizes > 1).sum()),
    }


def _copies_of(positions: NDArray[np.int64], paths: Sequence[Path]) -> NDArray[np.int64]:
    """The copies among the documents at ascending `positions`, of all parts."""
    found = [np.zeros((0, 2), np.int64)]
    for path in paths:
        copies = map_array(path)
        found.append(np.array(copies[is_among(copies[:, 0], positions)]))
    return np.concatenate(found)


def _similar_of(positions: NDArray[np.int64], paths: Sequence[Path]) -> Similar:
    """The similar pairs among the documents at ascending `positions`."""
    pairs, jaccard = [np.zeros((0, 2), np.int64)], [np.zeros(0, np.float32)]
    is_duplicate = [np.zeros(0, np.bool_)]
    for path in paths:
        with np.load(path) as part:
            chosen = is_among(part["pairs"][:, 0], positions)
            pairs.append(part["pairs"][chosen])
            jaccard.append(part["jaccard"][chosen])
            is_duplicate.append(part["is_duplicate"][chosen])
    return Similar(np.concatenate(pairs), np.concatenate(jaccard), np.concatenate(is_duplicate))


def is_among(values: NDArray[np.int64], ordered: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of `values` are in the ascending array `ordered`, (n,) bool."""
    if not len(ordered):
        return np.zeros(len(values), np.bool_)
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return ordered[places] == values


def _take(
    files: Sequence[Path], starts: Sequence[int], positions: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """The values of arrays in `files` at ascending `positions` over all of them."""
    bounds = [*np.searchsorted(positions, starts).tolist(), len(positions)]
    taken = [np.zeros(0, np.uint64)]
    for path, start, (begin, end) in zip(files, starts, pairwise(bounds), strict=True):
        if begin < end:
            taken.append(np.array(map_array(path)[positions[begin:end] - start]))
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
