"""Near-duplicates: values keep notes apart, pairs are verified, parts change nothing."""

from pathlib import Path

import numpy as np
import pytest

from data_prep import near_duplicates
from data_prep.document import Document, write_documents
from data_prep.minhash import Banding
from data_prep.near_duplicates import jaccard, run_sets, source_files, verify

BANDING = Banding(words=5, bands=14, rows=8)
NOTE = " ".join(f"finding{n} is seen in the {side} lung" for n in range(30) for side in "lr")


def pair(first: str, second: str) -> tuple[float, bool]:
    (first_runs, first_values), (second_runs, second_values) = run_sets([first, second], 5)
    return jaccard(first_runs, second_runs), bool(np.isin(second_values, first_values).all())


@pytest.mark.parametrize(
    ("first", "second", "is_duplicate"),
    [
        (f"{NOTE}. Glucose 110 mg/dl.", f"{NOTE}. Glucose 111 mg/dl.", False),
        (f"{NOTE}. Mass of 1.2 cm.", f"{NOTE}. Mass of 1-2 cm.", False),
        (f"{NOTE}. BP 110 over 80.", f"{NOTE}. BP 80 over 110.", False),
        (f"{NOTE}. Troponin < 5.", f"{NOTE}. Troponin > 5.", False),
        (f"{NOTE}. Glucose 110 mg/dl.", f"{NOTE}. Glucose 110 mg/dl. Seen.", True),
        # The first has all values of the second.
        (f"{NOTE}. Glucose 110.", NOTE, True),
        (NOTE, f"{NOTE}. Glucose 110.", False),
    ],
)
def test_notes_that_differ_in_a_value_are_two_notes(
    first: str, second: str, is_duplicate: bool
) -> None:
    similarity, covers = pair(first, second)
    assert similarity > 0.9
    assert covers is is_duplicate


def test_jaccard_is_that_of_sets() -> None:
    first, second = np.array([1, 3, 5], np.uint64), np.array([3, 4, 5, 9], np.uint64)
    assert jaccard(first, second) == jaccard(second, first) == 2 / 5
    assert jaccard(first, first) == 1
    assert jaccard(first[:0], second[:0]) == 0


def run_steps(folder: Path, texts: list[list[str]], parts: int = 1) -> list[dict[str, np.ndarray]]:
    """All steps on files of `texts`, as the stages do them."""
    stems = [f"radiology/{number:05d}" for number in range(len(texts))]
    for name in ("documents", "unique", "signatures", "pairs", "candidates", "runs", "verified"):
        (folder / name / "radiology").mkdir(parents=True)
    begin = 0
    for stem, of_file in zip(stems, texts, strict=True):
        write_documents(
            folder / f"documents/{stem}.parquet",
            [Document(f"r-{n}", "radiology", f"{n}", text) for n, text in enumerate(of_file)],
        )
        np.save(folder / f"unique/{stem}.npy", np.arange(begin, begin + len(of_file)))
        begin += len(of_file)
    files = source_files(folder / "unique", stems)
    for stem, start in zip(stems, files.starts, strict=True):
        first_of = np.load(folder / f"unique/{stem}.npy")
        near_duplicates.write_signatures(
            folder / f"documents/{stem}.parquet",
            first_of,
            start,
            BANDING,
            folder / "signatures" / stem,
        )
    pairs = [folder / f"pairs/radiology/{band:02d}.pairs" for band in range(14)]
    for band, path in enumerate(pairs):
        near_duplicates.write_pairs(files, folder / "signatures", BANDING, band, path)
    near_duplicates.write_wanted(files, pairs, folder / "candidates")
    for stem in stems:
        near_duplicates.write_runs(
            folder / f"documents/{stem}.parquet",
            np.load(folder / f"candidates/{stem}.npy"),
            5,
            folder / "runs" / stem,
        )
    found = []
    for part in range(parts):
        out = folder / f"verified/{part}.npz"
        verify(files, pairs, (part, parts), folder / "candidates", folder / "runs", 0.8, out)
        found.append(dict(np.load(out)))
    return found


def test_pairs_are_found_over_files_and_verified(tmp_path: Path) -> None:
    other = " ".join(f"word{n}" for n in range(300))
    texts = [
        [NOTE, other, ""],
        [],
        [f"{NOTE} and no more", "short text", f"{other} at 5", f"{NOTE} at 6", f"{other} at 7"],
    ]
    (found,) = run_steps(tmp_path, texts)
    listed = {
        (a, b): (round(float(j), 3), bool(d))
        for (a, b), j, d in zip(
            found["pairs"].tolist(), found["jaccard"], found["is_duplicate"], strict=True
        )
    }
    # Position 3 is the longest of its kind, then 6, which has a value of its own.
    assert {pair: is_duplicate for pair, (_, is_duplicate) in listed.items()} == {
        (3, 6): False,
        (3, 0): True,
        (6, 0): True,
        (5, 7): False,
        (5, 1): True,
        (7, 1): True,
    }
    assert all(similarity >= 0.8 for similarity, _ in listed.values())


def test_parts_of_the_pairs_are_together_what_one_part_is(tmp_path: Path) -> None:
    texts = [[f"{NOTE} text {'again ' * (n % 7)}" for n in range(20)], [NOTE, f"{NOTE} end"]]
    (whole,) = run_steps(tmp_path / "whole", texts)
    parts = run_steps(tmp_path / "parts", texts, parts=5)
    assert len(whole["pairs"]) > 20
    assert sum(len(part["pairs"]) > 0 for part in parts) > 2
    together = np.concatenate([part["pairs"] for part in parts])
    order = np.lexsort((together[:, 1], together[:, 0]))
    np.testing.assert_array_equal(together[order], whole["pairs"])
