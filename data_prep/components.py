"""Which documents of a source form a cluster: the connected components of a graph.

Its edges are copies and similar pairs. They are read block by block; in memory are 5 bytes for each
document of the source, and the components are written in shards that hold whole ones.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.arrays import map_array, raw_files
from data_prep.stages import Counts
from data_prep.words import mix

# A document in a cluster with another one; a cluster is named after its first document.
MEMBER = np.dtype([("position", "<i8"), ("cluster", "<i8")])
SHARD_MEMBERS = 1 << 14
# All shards are written side by side, and systems commonly allow a process 1,024 open files.
MOST_SHARDS = 512
_BLOCK = 1 << 17


def first_of_component(documents: int, edges: Iterable[NDArray[np.int64]]) -> NDArray[np.uint32]:
    """For each document the first one of its component, (documents,) uint32.

    edges: blocks of (n, 2) positions. The order of the edges does not matter.
    """
    # Each points to one before it or to itself: the roots of trees.
    parent = np.arange(documents, dtype=np.uint32)
    for block in edges:
        left, right = block.astype(np.uint32).T
        while len(left):
            left, right = _roots(parent, left), _roots(parent, right)
            apart = left != right
            low = np.minimum(left[apart], right[apart])
            high = np.maximum(left[apart], right[apart])
            # Of several edges at one root one wins; the others are looked at again.
            np.minimum.at(parent, high, low)
            left, right = low, high
    for begin in range(0, documents, _BLOCK):
        block_of = np.arange(begin, min(begin + _BLOCK, documents))
        parent[block_of] = _roots(parent, block_of)
    return parent


def write_members(
    documents: int,
    copies: Sequence[Path],
    verified: Sequence[Path],
    out: Path,
    shard_members: int,
) -> Counts:
    """Write the members of all clusters of a source below `out`: `NNNNN.members`, MEMBER (raw).

    documents: of the source; copies, verified: what `dedup` and `near_duplicates.verify` wrote. A
    shard holds whole clusters, its members by position, some `shard_members` of them, or more where
    that would make over MOST_SHARDS; there is one even for no clusters.
    """
    first = first_of_component(documents, _edges(copies, verified))
    leads = np.zeros(documents, np.bool_)
    for begin, block in _blocks(first):
        leads[block[block != np.arange(begin, begin + len(block))]] = True
    members = 0
    for _, _, positions in _members(first, leads):
        members += len(positions)
    shards = min(-(-members // shard_members) or 1, MOST_SHARDS)
    with raw_files(*(out / f"{shard:05d}.members" for shard in range(shards))) as writer:
        for begin, block, positions in _members(first, leads):
            found = np.empty(len(positions), MEMBER)
            found["position"], found["cluster"] = positions, block[positions - begin]
            shard_of = mix(found["cluster"].astype(np.uint64)) % np.uint64(shards)
            writer.append(*(found[shard_of == np.uint64(shard)] for shard in range(shards)))
    return {"documents": documents, "clustered": members, "clusters": int(leads.sum())}


def _roots(parent: NDArray[np.uint32], nodes: NDArray[np.integer]) -> NDArray[np.uint32]:
    """Where the pointers of `nodes` end; they point there directly afterwards."""
    roots = parent[nodes]
    while True:
        above = parent[roots]
        if (above == roots).all():
            parent[nodes] = roots
            return roots
        roots = above


def _edges(copies: Sequence[Path], verified: Sequence[Path]) -> Iterator[NDArray[np.int64]]:
    for path in copies:
        found = map_array(path)
        for begin in range(0, len(found), _BLOCK):
            yield np.array(found[begin : begin + _BLOCK])
    for path in verified:
        with np.load(path) as part:
            yield part["pairs"]


def _blocks(first: NDArray[np.uint32]) -> Iterator[tuple[int, NDArray[np.uint32]]]:
    for begin in range(0, len(first), _BLOCK):
        yield begin, first[begin : begin + _BLOCK]


def _members(
    first: NDArray[np.uint32], leads: NDArray[np.bool_]
) -> Iterator[tuple[int, NDArray[np.uint32], NDArray[np.int64]]]:
    """(begin, block of `first`, positions in it of documents in clusters)."""
    for begin, block in _blocks(first):
        in_cluster = leads[begin : begin + len(block)] | (
            block != np.arange(begin, begin + len(block))
        )
        yield begin, block, np.flatnonzero(in_cluster) + begin
