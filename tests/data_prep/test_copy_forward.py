"""Copy-forward: what an earlier note of the subject says goes once, layout and all else stays."""

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import mimic
from data_prep.copy_forward import (
    copied,
    paragraphs,
    parts_of,
    place_in_time,
    without,
    write_paragraphs,
)
from data_prep.document import Document

HISTORY = "Past medical history:\n  hypertension since 1998, diabetes mellitus, gout  "
PLAN = "Plan:\n\tcontinue metformin 500 mg twice a day and follow up in two weeks"


def note(
    name: str, subject: str, sequence: int | None, text: str, time: str | None = None
) -> Document:
    return Document(name, "discharge", subject, text, {"note_seq": sequence, "charttime": time})


def dropped(notes: list[Document], folder: Path, least: int = 20, size: int = 9) -> list[list[int]]:
    """Two files, so that the order of files and notes differ."""
    half = len(notes) // 2
    paths = []
    for number, (begin, part) in enumerate([(0, notes[:half]), (half, notes[half:])]):
        paths.append(folder / f"{number}")
        write_paragraphs(iter(part), np.ones(len(part), np.bool_), begin, least, paths[-1])
    parts = parts_of(paths, size)
    return sorted(drop for part in range(parts) for drop in copied(paths, part, parts).tolist())


@given(st.text(alphabet="ab \t\n", max_size=40))
def test_paragraphs_together_are_the_text(text: str) -> None:
    parts = paragraphs(text)
    assert "".join(parts) == text
    # A blank line is only at the end of a paragraph, or where nothing is before it.
    for part in parts:
        lines = part.strip().split("\n")
        assert part.strip() == "" or all(line.strip() for line in lines)


def test_the_earliest_note_keeps_a_paragraph_and_layout_stays(tmp_path: Path) -> None:
    notes = [
        note("c", "s1", 3, f"Third.\n \n{HISTORY}\n\n\n{PLAN}\n"),
        note("b", "s1", 2, f"{PLAN}\n\nSecond   note,\n  on two lines.\n\n{HISTORY.upper()}\n"),
        note("a", "s1", 1, f"First.\n\n{HISTORY}\n\nAnd {HISTORY}\n\n{HISTORY}"),
        note("x", "s2", 9, f"Another subject.\n\n{HISTORY}\n\n{PLAN}"),
    ]
    drops = dropped(notes, tmp_path)
    # PLAN stays in b and in x, HISTORY in a (where it is repeated) and in x.
    assert drops == [[0, 1], [0, 2], [1, 2]]
    assert without(notes[0].text, [1, 2]) == "Third.\n \n"
    assert without(notes[1].text, [2]) == f"{PLAN}\n\nSecond   note,\n  on two lines.\n\n"
    assert without("one\n\ntwo\n", [0, 1]) == ""
    assert dropped(notes, tmp_path, size=1) == drops


def test_short_paragraphs_stay(tmp_path: Path) -> None:
    text = "No acute disease.\n\nSigned by the physician"
    notes = [note("a", "s", 1, text), note("b", "s", 2, text)]
    assert dropped(notes, tmp_path, least=21) == []
    # Without its white space the second paragraph has 20 characters, the first 15.
    assert dropped(notes, tmp_path, least=20) == [[1, 1]]
    assert dropped(notes, tmp_path, least=15) == [[1, 0], [1, 1]]


def test_notes_without_a_number_come_last_in_the_order_of_the_file(tmp_path: Path) -> None:
    notes = [note("a", "s", None, PLAN), note("b", "s", None, PLAN), note("c", "s", 7, PLAN)]
    assert dropped(notes, tmp_path) == [[0, 0], [1, 0]]
    assert dropped(notes[:2], tmp_path) == [[1, 0]]


def test_notes_are_in_the_order_of_their_time_before_their_number(tmp_path: Path) -> None:
    """Addenda are numbered by themselves, and a number may be lower for a later note."""
    notes = [
        note("a", "s", 1, PLAN, "2150-03-02 08:00:00"),
        note("b", "s", 9, PLAN, "2150-03-01 23:59:59"),
        note("c", "s", 0, PLAN),
    ]
    assert dropped(notes, tmp_path) == [[0, 0], [2, 0]]
    at_one_time = [
        note("a", "s", 2, PLAN, "2150-03-01 00:00:00"),
        note("b", "s", 1, PLAN, "2150-03-01"),
        note("c", "s", None, PLAN, "2150-03-01"),
    ]
    assert dropped(at_one_time, tmp_path) == [[0, 0], [2, 0]]


TIMES = st.one_of(
    st.none(), st.datetimes(datetime(1800, 1, 1)).map(lambda time: f"{time:%Y-%m-%d %H:%M:%S}")
)


@given(st.lists(st.tuples(TIMES, st.one_of(st.none(), st.integers(0, 9))), max_size=8))
def test_places_in_time_sort_like_times_and_numbers(notes: list[tuple[Any, Any]]) -> None:
    def key(found: tuple[Any, Any]) -> Any:
        time, number = found
        return time is None, time or "", number is None, number or 0

    ordered = sorted(notes, key=key)
    assert sorted(notes, key=lambda found: place_in_time(*found)) == ordered
    assert all(0 <= place_in_time(*found) < 2**63 for found in notes)


def test_notes_that_are_left_out_keep_nothing_from_others(tmp_path: Path) -> None:
    notes = [note("a", "s", 1, PLAN), note("b", "s", 2, PLAN)]
    stays = np.array([False, True])
    assert write_paragraphs(iter(notes), stays, 0, 20, tmp_path / "0") == {"paragraphs": 1}
    assert copied([tmp_path / "0"], 0, 1).tolist() == []


@pytest.mark.parametrize("source", mimic.SOURCES)
def test_real_notes_lose_repeated_paragraphs_and_nothing_else(
    shared_data: Path, tmp_path: Path, source: str
) -> None:
    """Against a plain reading of all real notes, their exact copies among them."""
    path = shared_data / f"mimic-iv-note/note/{source}.csv.gz"
    notes = list(mimic.documents(path, source))
    write_paragraphs(iter(notes), np.ones(len(notes), np.bool_), 0, 100, tmp_path / "0")
    found = {tuple(drop) for drop in copied([tmp_path / "0"], 0, 1).tolist()}
    order = sorted(range(len(notes)), key=lambda n: (notes[n].meta["note_seq"], n))
    first: dict[tuple[str, str], int] = {}
    expected = set()
    for number in order:
        for place, text in enumerate(paragraphs(notes[number].text)):
            words = " ".join(text.casefold().split())
            if len(words.replace(" ", "")) >= 100:
                keeper = first.setdefault((notes[number].group, words), number)
                if keeper != number:
                    expected.add((number, place))
    assert found == expected
    # The radiology reports are a paragraph each, and no subject has one twice.
    assert len(found) > 5_000 if source == "discharge" else len(notes) == 3851
