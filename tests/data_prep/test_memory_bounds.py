"""The bytes that docs/data.md says a stage's memory grows by, for each document, note, code, link.

Each is measured at two sizes, so that what does not grow is not counted, and printed. What is
mapped from files is no memory of the process and not seen.
"""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.counter_random import permutation
from data_prep import codes, components, mimic, near_duplicates, rows, split
from data_prep.arrays import save_array
from data_prep.decontaminate import EvaluationFile, load_index, write_index
from data_prep.near_duplicates import SourceFiles

Work = Callable[[], object]


def peak(work: Work) -> int:
    """The most bytes that `work` holds at a time."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def bytes_for_each(prepare: Callable[[Path, int], Work], folder: Path, size: int) -> float:
    """How much more `prepare(folder, n)` holds for each of n, from `size` to four times that."""
    peaks = []
    for number in (size, 4 * size):
        inside = folder / str(number)
        inside.mkdir()
        work = prepare(inside, number)
        # What only the first call makes is no part of it.
        if not peaks:
            work()
        peaks.append(peak(work))
    return (peaks[1] - peaks[0]) / (3 * size)


def candidates(folder: Path, documents: int) -> Work:
    """A block of pairs."""
    pairs = folder / "pairs"
    np.arange(2 * near_duplicates.PART_PAIRS, dtype=np.int64).tofile(pairs)
    files = SourceFiles(("a", "b"), (0, documents // 2), documents)
    return lambda: near_duplicates.write_wanted(files, [pairs], folder)


def alone(folder: Path, documents: int) -> Work:
    """No document like another."""
    return clustered(folder, documents, 0)


def clustered(folder: Path, documents: int, share: int = 1) -> Work:
    """Every document a copy of another one."""
    (folder / "out").mkdir()
    copies = folder / "copies.npy"
    second = np.arange(1, documents * share, 2)
    save_array(copies, np.stack([second, second - 1], axis=1))
    members = components.SHARD_MEMBERS
    return lambda: components.write_members(documents, [copies], [], folder / "out", members)


def notes(folder: Path, number: int) -> Work:
    """Short notes, read to the end."""
    path = folder / "radiology.csv"
    with path.open("w") as file:
        file.write("note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text\n")
        file.writelines(f"{n}-RR-1,{n},,RR,1,,,Normal.\n" for n in range(number))
    return lambda: sum(1 for _ in mimic.documents(path, "radiology"))


def code_table(folder: Path, number: int) -> Work:
    """A table like ICD-10-CM's order file, its titles of the real mean length."""
    path = folder / "icd10cm_order_2026.txt"
    title = "Displaced fracture of unspecified part of neck of right femur, subsequent encounter"
    with path.open("w") as file:
        for n in range(number):
            file.write(f"{n:05d} A{n:06d} 1 {title[:60]:60} {title}{n}\n")
    return lambda: sum(1 for _ in codes.documents(path, "icd10cm"))


def links(folder: Path, number: int) -> Work:
    """Pairs of groups that are all different."""
    pairs = permutation(7, 2 * number).astype(np.uint64).reshape(-1, 2)
    return lambda: split.link_groups(pairs, 100)


def evaluation_words(folder: Path, words: int) -> list[EvaluationFile]:
    path = folder / "set.txt"
    with path.open("w") as file:
        for line in range(words // 100):
            file.write(" ".join(f"w{100 * line + n}" for n in range(100)) + "\n")
    return [EvaluationFile(0, path, "lines", ())]


def evaluation(folder: Path, words: int) -> Work:
    files = evaluation_words(folder, words)
    return lambda: write_index(files, ["a"], 13, folder / "index.npz")


def checks(folder: Path, words: int) -> Work:
    write_index(evaluation_words(folder, words), ["a"], 13, folder / "index.npz")
    return lambda: load_index(folder / "index.npz")


def row_order(folder: Path, number: int) -> Work:
    """A few rows of many, each of one piece."""
    plan = folder / "plan"
    plan.mkdir()
    for name in rows.PLAN_FILES:
        length = number + 1 if name == "bounds.npy" else number
        np.save(plan / name, np.arange(length))
    return lambda: rows._planned([plan], range(64), 7)


def verified(folder: Path, documents: int) -> Work:
    """The places of all documents' runs in one file."""
    save_array(folder / "a.npy", np.ones(documents, np.bool_))
    np.save(folder / "a.starts.npy", np.zeros(2 * documents + 1, np.int64))
    files = SourceFiles(("a",), (0,), documents)
    return lambda: near_duplicates._RunReader(files, folder, folder).number_of_runs(documents - 1)


# (stage as docs/data.md names it, bytes, work, the smaller size)
BOUNDS = (
    ("candidates", 1, candidates, 300_000),
    ("components", 5, alone, 300_000),
    ("components of clusters", 10, clustered, 100_000),
    ("documents of notes", 24, notes, 2_000),
    ("documents of codes", 950, code_table, 500),
    ("verified", 24, verified, 100_000),
    ("split", 100, links, 10_000),
    ("rows", 24, row_order, 100_000),
    ("evaluation", 120, evaluation, 50_000),
    ("checks", 17, checks, 50_000),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "bound", "prepare", "size"), BOUNDS, ids=[stage for stage, *_ in BOUNDS]
)
def test_memory_grows_as_documented(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    bound: int,
    prepare: Callable[[Path, int], Work],
    size: int,
) -> None:
    # So small that there are several at either size.
    for module in (split, components):
        monkeypatch.setattr(module, "_BLOCK", 1000)
    found = bytes_for_each(prepare, tmp_path, size)
    print(f"{stage}: {found:.1f} bytes for each, at most {bound}")
    assert found <= 1.05 * bound
