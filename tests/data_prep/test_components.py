"""Connected components: compared with SciPy's, and written in shards that hold whole ones."""

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data_prep import components
from data_prep.components import MEMBER, first_of_component, write_members

POSITIONS = st.integers(0, 30)


def with_scipy(documents: int, edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each document the first of its component."""
    ones = np.ones(len(edges), np.bool_)
    matrix = coo_array((ones, tuple(edges.T)), shape=(documents, documents))
    _, label = connected_components(matrix, directed=False)
    first: dict[int, int] = {}
    return np.array([first.setdefault(of, place) for place, of in enumerate(label.tolist())])


@given(drawn=st.lists(st.tuples(POSITIONS, POSITIONS), max_size=40), block=st.integers(1, 40))
def test_components_are_those_of_scipy(drawn: list[tuple[int, int]], block: int) -> None:
    edges = np.array(drawn, np.int64).reshape(-1, 2)
    blocks = [edges[begin : begin + block] for begin in range(0, len(edges), block)]
    found = first_of_component(31, blocks)
    np.testing.assert_array_equal(found, with_scipy(31, edges))


def test_shards_hold_whole_components_and_every_member_once(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    copies = draw.integers(0, 3000, (400, 2))
    pairs = draw.integers(0, 3000, (900, 2))
    np.save(tmp_path / "copies.npy", copies)
    none = np.zeros(len(pairs))
    np.savez(tmp_path / "similar.npz", pairs=pairs, jaccard=none, is_duplicate=none)
    counts = write_members(
        3000, [tmp_path / "copies.npy"], [tmp_path / "similar.npz"], tmp_path, shard_members=100
    )
    expected = with_scipy(3000, np.concatenate([copies, pairs]))
    sizes = np.bincount(expected, minlength=3000)
    shards = [np.fromfile(path, MEMBER) for path in sorted(tmp_path.glob("*.members"))]
    assert len(shards) == -(-counts["clustered"] // 100) > 5
    names = [set(shard["cluster"].tolist()) for shard in shards]
    assert sum(map(len, names)) == len(set().union(*names)) == counts["clusters"]
    for shard in shards:
        assert (np.diff(shard["position"]) > 0).all()
    together = np.sort(np.concatenate(shards), order="position")
    members = np.flatnonzero(sizes[expected] > 1)
    np.testing.assert_array_equal(together["position"], members)
    np.testing.assert_array_equal(together["cluster"], expected[members])


def test_without_clusters_there_is_an_empty_shard(tmp_path: Path) -> None:
    assert write_members(7, [], [], tmp_path, shard_members=9)["clustered"] == 0
    assert [path.stat().st_size for path in tmp_path.glob("*.members")] == [0]


def test_clusters_of_any_number_take_no_more_files_than_may_be_open(tmp_path: Path) -> None:
    most = components.MOST_SHARDS
    twins = np.arange(4 * most).reshape(-1, 2)
    np.save(tmp_path / "copies.npy", twins)
    counts = write_members(4 * most, [tmp_path / "copies.npy"], [], tmp_path, shard_members=1)
    assert counts["clusters"] == 2 * most
    shards = [np.fromfile(path, MEMBER) for path in tmp_path.glob("*.members")]
    assert len(shards) == most
    together = np.sort(np.concatenate(shards), order="position")
    np.testing.assert_array_equal(together["position"], np.arange(4 * most))
