"""The numbers of a data card: bins, clusters, and small counts of notes that are withheld."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.card.facts import (
    CLUSTER_EDGES,
    LENGTH_EDGES,
    bin_names,
    binned,
    cluster_sizes,
    data_sets,
    shown,
)
from data_prep.document import InputError


@given(st.lists(st.integers(0, 40_000), max_size=50))
def test_bins_are_those_of_numpy(lengths: list[int]) -> None:
    found = binned(np.array(lengths, np.int64), LENGTH_EDGES)
    expected, _ = np.histogram(lengths, [*LENGTH_EDGES, np.inf])
    assert found.tolist() == expected.tolist()
    assert len(bin_names(LENGTH_EDGES)) == len(found)


def test_bins_have_names() -> None:
    assert bin_names((2, 3, 6)) == ["2", "3 to 5", "6 or more"]


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=2), st.integers(0, 30), max_size=8))
def test_no_small_count_of_notes_is_shown_or_can_be_had_by_subtraction(
    counts: dict[str, int],
) -> None:
    cells = shown("discharge", counts)
    assert all(cells[name] in (None, count) for name, count in counts.items())
    assert not any(count is not None and 0 < count < 10 for count in cells.values())
    hidden = [name for name, count in cells.items() if count is None]
    others = [name for name, count in counts.items() if count >= 10]
    assert len(hidden) != 1 or not others
    # No more is hidden than that.
    assert len(hidden) <= max(2, sum(0 < count < 10 for count in counts.values()))
    assert shown("pubmed", counts) == counts


def test_clusters_are_counted_over_batches(tmp_path: Path) -> None:
    sizes = [2, 70_000, 3, 2, 1500, 11]
    names = [f"pubmed-{number}" for number, size in enumerate(sizes) for _ in range(size)]
    folder = tmp_path / "clusters" / "pubmed"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"cluster": names}), folder / "a.parquet", row_group_size=1000)
    pq.write_table(pa.table({"cluster": ["pubmed-x"] * 4}), folder / "b.parquet")
    pq.write_table(pa.table({"cluster": pa.array([], pa.string())}), folder / "c.parquet")
    expected = binned(np.array([*sizes, 4]), CLUSTER_EDGES)
    assert cluster_sizes(tmp_path, "pubmed").tolist() == expected.tolist()
    with pytest.raises(InputError, match=r"clusters/discharge holds no"):
        cluster_sizes(tmp_path, "discharge")


def test_a_folder_without_data_sets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no data set"):
        data_sets(tmp_path)
