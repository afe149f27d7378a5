"""Training or validation: decided group by group, and for near-duplicates together.

A group is what may not be cut, such as all notes of a subject, whatever files they are in. The
decision is a hash of the group, so it stays the same when documents are added, and a larger share
only moves groups from training to validation. Groups with documents that are near-duplicates of
each other are linked, and all go where the one with the smallest key goes; links that would make
more than so many groups one are not made, because templates would tie most subjects together.
"""

from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.counter_random import derive_key, random_bits

TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)
_BLOCK = 1 << 16


def group_key(group: str) -> int:
    """64 bits that stand for a group."""
    return derive_key("group", group)


@dataclass(frozen=True)
class Links:
    """Groups that go together: ascending `keys` of groups, and for each the key that decides."""

    keys: NDArray[np.uint64]
    leads: NDArray[np.uint64]


NO_LINKS = Links(np.zeros(0, np.uint64), np.zeros(0, np.uint64))


@dataclass(frozen=True)
class Split:
    """The split of every group."""

    validation_share: float
    seed: int
    links: Links = NO_LINKS

    def is_validation(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Whether the groups of these keys are for validation, (n,) bool."""
        places = np.searchsorted(self.links.keys, keys)
        places[places == len(self.links.keys)] = 0
        if len(self.links.keys):
            keys = np.where(self.links.keys[places] == keys, self.links.leads[places], keys)
        drawn = random_bits(derive_key("split", self.seed), keys) / 2.0**64
        return drawn < self.validation_share


def link_groups(pairs: NDArray[np.uint64], most_groups: int) -> Links:
    """Link the groups of every pair of keys (n, 2), in their order; never more than `most_groups`.

    Union-find; memory is some 100 bytes for each pair.
    """
    keys, places = np.unique(pairs.ravel(), return_inverse=True)
    flat = places.astype(np.int32).reshape(-1, 2)
    parent = array("i", range(len(keys)))
    size = array("i", [1]) * len(keys)

    def root(key: int) -> int:
        top = key
        while parent[top] != top:
            top = parent[top]
        while parent[key] != top:
            parent[key], key = top, parent[key]
        return top

    for begin in range(0, len(flat), _BLOCK):
        for pair in flat[begin : begin + _BLOCK].tolist():
            # The smaller key leads.
            first, second = sorted(map(root, pair))
            if first != second and size[first] + size[second] <= most_groups:
                parent[second] = first
                size[first] += size[second]
    leads = np.fromiter(map(root, range(len(keys))), np.int32, len(keys))
    return Links(keys, keys[leads])


def cluster_pairs(clusters: NDArray[np.int64], groups: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Pairs of groups to link, (pairs, 2): those of documents that follow each other in a cluster.

    clusters, groups: of the documents that stay, (n,) each.
    """
    order = np.lexsort((groups, clusters))
    clusters, groups = clusters[order], groups[order]
    linked = (clusters[1:] == clusters[:-1]) & (groups[1:] != groups[:-1])
    return np.stack([groups[:-1][linked], groups[1:][linked]], axis=1)


def on_both_sides(
    clusters: NDArray[np.int64], is_validation: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Which documents are for validation although one of their cluster is for training."""
    names, place = np.unique(clusters, return_inverse=True)
    has_train = np.zeros(len(names), np.bool_)
    has_train[place[~is_validation]] = True
    return is_validation & has_train[place]
