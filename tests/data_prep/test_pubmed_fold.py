"""Which record of an article counts, over versions, revisions, deletions and files."""

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.pubmed import Scan, fold, in_order


def _scan(*records: tuple[int, int], deleted: tuple[tuple[int, int], ...] = ()) -> Scan:
    def split(pairs: tuple[tuple[int, int], ...]) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.array(pairs, dtype=np.uint32).reshape(-1, 2)
        return numbers[:, 0], numbers[:, 1].astype(np.uint16)

    return Scan(*split(records), *split(deleted))


def _winners(*scans: Scan) -> list[list[int]]:
    return [positions.tolist() for positions in fold(scans)]


def test_the_last_record_of_a_pmid_counts() -> None:
    """By version first, then by file, then by position in the file."""
    assert _winners(_scan((1, 1), (2, 1)), _scan((1, 1))) == [[1], [0]]
    assert _winners(_scan((1, 2), (2, 1)), _scan((1, 1))) == [[0, 1], []]
    assert _winners(_scan((1, 1), (2, 1), (1, 1))) == [[1, 2]]
    assert _winners() == []
    assert _winners(_scan(), _scan(deleted=((5, 1),))) == [[], []]


def test_a_deletion_removes_what_came_before() -> None:
    """In its own and earlier files, that version only; a later file may bring the record back."""
    first = _scan((1, 1), (2, 1), (3, 1))
    assert _winners(first, _scan((4, 1), deleted=((1, 1), (4, 1), (99, 1)))) == [[1, 2], []]
    assert _winners(first, _scan(deleted=((1, 1),)), _scan((1, 1))) == [[1, 2], [], [0]]
    assert _winners(_scan((1, 1), (1, 2)), _scan(deleted=((1, 2),))) == [[0], []]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(1, 6), st.integers(1, 3)), max_size=8),
            st.lists(st.tuples(st.integers(1, 6), st.integers(1, 3)), max_size=3),
        ),
        max_size=5,
    )
)
def test_fold_equals_applying_the_files_one_by_one(
    files: list[tuple[list[tuple[int, int]], list[tuple[int, int]]]],
) -> None:
    """Against a dictionary that is updated file by file."""
    state: dict[tuple[int, int], tuple[int, int]] = {}
    for number, (records, deleted) in enumerate(files):
        state.update({key: (number, position) for position, key in enumerate(records)})
        for key in deleted:
            state.pop(key, None)
    best = {pmid: max(v for p, v in state if p == pmid) for pmid, _ in state}
    expected = sorted(state[pmid, version] for pmid, version in best.items())
    found = _winners(*(_scan(*records, deleted=tuple(deleted)) for records, deleted in files))
    assert [(f, p) for f, positions in enumerate(found) for p in positions] == expected


def test_files_are_folded_in_the_order_nlm_made_them() -> None:
    """By year and number in the name, whatever the folder; other names first."""
    names = [
        "updatefiles/pubmed26n1335.xml.gz",
        "baseline/pubmed26n0001.xml.gz.md5",
        "baseline/pubmed26n0001.xml.gz",
        "old/medline99n0400.xml.gz",
        "sample/pubmed25n2000.xml.gz",
        "efetch/export.xml",
        ".hidden.xml",
    ]
    assert [path.as_posix() for path in in_order(map(Path, names))] == [
        "efetch/export.xml",
        "old/medline99n0400.xml.gz",
        "sample/pubmed25n2000.xml.gz",
        "baseline/pubmed26n0001.xml.gz",
        "updatefiles/pubmed26n1335.xml.gz",
    ]
