"""Exact deduplication: what counts as the same, and that the first one stays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.dedup import LEFT_OUT, copies_in_part, digests, first_of_file, parts_of
from data_prep.document import Document


def same(source: str, first: str, second: str) -> bool:
    found = digests(
        [Document(f"{source}-{n}", source, f"{n}", text) for n, text in enumerate((first, second))]
    )
    return bool((found[0] == found[1]).all())


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        ("No acute disease.", "No acute disease.", True),
        ("No acute disease.", "NO ACUTE\r\n\r\n  disease. ", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("Glucose 110 mg/dL", "Glucose 111 mg/dL", False),
        ("Mass 1.2 cm", "Mass 12 cm", False),
        ("No acute disease.", "No acute disease", False),
        ("no disease", "nodisease", False),
    ],
)
def test_notes_are_compared_without_case_and_white_space(
    first: str, second: str, equal: bool
) -> None:
    assert same("radiology", first, second) is equal


def test_code_descriptions_are_compared_as_they_are() -> None:
    text = "ICD 10 code for S72.001A: Fracture"
    assert same("icd10cm", text, text)
    assert not same("icd10cm", text, text.lower())
    assert not same("icd9cm", "ICD 9 code for 001.0: Cholera", "ICD 9 code for 00.10: Cholera")


@given(
    files=st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=6),
    part_digests=st.sampled_from([1, 3, 1 << 20]),
)
def test_first_of_each_kind_stays_over_all_files(files: list[list[int]], part_digests: int) -> None:
    values = [
        digests([Document("", "pubmed", "", f"text {value}") for value in file]) for file in files
    ]
    # A value of 9 is left out before.
    considered = [np.array([value != 9 for value in file], np.bool_) for file in files]
    parts = parts_of(sum(map(len, files)), part_digests)
    copies, compared = zip(
        *(copies_in_part(values, considered, part, parts) for part in range(parts)), strict=True
    )
    assert sum(compared) == sum(value != 9 for file in files for value in file)
    first: dict[int, int] = {9: LEFT_OUT}
    position = 0
    for file, counts in zip(files, considered, strict=True):
        positions = first_of_file(counts, position, copies)
        for value, first_of in zip(file, positions.tolist(), strict=True):
            assert first_of == first.setdefault(value, position)
            position += 1


def test_digests_take_sixteen_bytes_a_document() -> None:
    found = digests(Document("", "pubmed", "", f"{n}" * 1000) for n in range(10))
    assert found.shape == (10, 2)
    assert found.dtype == np.uint64
    assert found.nbytes == 160
