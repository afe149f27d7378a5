"""MIMIC-IV-Note: notes come out as they went in, and never in an error."""

import contextlib
import csv
import gzip
import hashlib
import io
import tracemalloc
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.csv
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.document import Document, InputError
from data_prep.mimic import count_problem, documents

HEADER = [
    "note_id",
    "subject_id",
    "hadm_id",
    "note_type",
    "note_seq",
    "charttime",
    "storetime",
    "text",
]
CANARY = "Zyxwvut Qanary Vharf"


def _row(number: int = 1, text: str = "Stable.", **values: str) -> dict[str, str]:
    row = {
        "note_id": f"100{number}-DS-1",
        "subject_id": f"100{number}",
        "hadm_id": f"200{number}",
        "note_type": "DS",
        "note_seq": "1",
        "charttime": "2150-01-01 00:00:00",
        "storetime": "",
        "text": text,
    }
    return row | values


def _csv(*rows: dict[str, str], header: list[str] = HEADER) -> bytes:
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, header, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue().encode()


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def test_a_note_becomes_a_document(tmp_path: Path) -> None:
    """Hashes for identifiers, the same group for both kinds of note, layout untouched."""
    text = ' \nName:  ___   Unit No:   ___\r\n\r\nHis "Hgb"\rfell,\n\tto 7.2 \u00a0 &lt; 8 \n '
    path = _write(tmp_path / "discharge.csv", _csv(_row(text=text)))
    (document,) = documents(path, "discharge")
    assert document == Document(
        id=f"discharge-{_hash('1001-DS-1')}",
        source="discharge",
        group=f"subject-{_hash('1001')}",
        text=text.replace("\r\n", "\n"),
        meta={
            "note_type": "DS",
            "note_seq": 1,
            "charttime": "2150-01-01 00:00:00",
            "admission": _hash("2001"),
            "characters": len(text) - 2,
        },
    )
    (report,) = documents(path, "radiology")
    assert report.group == document.group
    assert report.id == document.id.replace("discharge", "radiology")


def test_identifiers_are_strings_and_hadm_id_may_be_missing(tmp_path: Path) -> None:
    """`007` and `7` are two subjects; an empty hadm_id is None, not a hash of nothing."""
    rows = [_row(1, subject_id="007", hadm_id=""), _row(2, subject_id="7")]
    first, second = documents(_write(tmp_path / "r.csv", _csv(*rows)), "radiology")
    assert first.group != second.group
    assert (first.meta["admission"], second.meta["admission"]) == (None, _hash("2002"))


@pytest.mark.parametrize(
    ("stated", "kept"),
    [
        ("2150-03-04", "2150-03-04"),
        ("2150-03-04 05:06:07", "2150-03-04 05:06:07"),
        ("", None),
        ("yesterday", None),
        ("2150-03-04 at noon", None),
    ],
)
def test_a_time_is_kept_and_nothing_else(tmp_path: Path, stated: str, kept: str | None) -> None:
    path = _write(tmp_path / "r.csv", _csv(_row(1, charttime=stated)))
    (document,) = documents(path, "radiology")
    assert document.meta["charttime"] == kept


def test_white_space_is_no_document_and_is_counted(tmp_path: Path) -> None:
    """Duplicates of a text are documents: their removal is another step's."""
    rows = [_row(1), _row(2, text=" \n\t"), _row(3, text=""), _row(4)]
    counts: Counter[str] = Counter()
    found = list(documents(_write(tmp_path / "d.csv", _csv(*rows)), "discharge", counts))
    assert [d.text for d in found] == ["Stable.", "Stable."]
    assert counts == Counter(records=4, documents=2, without_text=2)


def test_other_forms_of_the_same_table(tmp_path: Path) -> None:
    """Gzip by magic bytes, a byte order mark, CRLF rows, other columns, another column order."""
    rows = [_row(1, text="One,\ntwo."), _row(2, text='"Quoted"')]
    plain = _csv(*rows)
    forms = [
        gzip.compress(plain),
        b"\xef\xbb\xbf" + plain,
        _csv(*rows, header=["extra", *reversed(HEADER)]),
        plain.replace(b"\n100", b"\r\n100"),
    ]
    expected = list(documents(_write(tmp_path / "d.csv", plain), "discharge"))
    assert len(expected) == 2
    for form in forms:
        assert list(documents(_write(tmp_path / "d.csv.gz", form), "discharge")) == expected


def test_a_very_long_note_is_read(tmp_path: Path) -> None:
    """Python's own limit for a field is 131,072 characters."""
    path = _write(tmp_path / "d.csv", _csv(_row(text="word " * 100_000)))
    assert len(next(documents(path, "discharge")).text) == 500_000


# -------------------------------------------------------------------------------------- bad input


def _bad_inputs() -> dict[str, tuple[bytes, str]]:
    """File name -> (content with the canary in it, what the error must say)."""
    rows = [_row(number, text=f"{CANARY}\n{number}") for number in range(1, 200)]
    good = _csv(*rows)
    last = good.rindex(b"100199-DS")
    no_text = [name for name in HEADER if name != "text"]
    return {
        "empty.csv": (b"", "has no header"),
        "no_text.csv": (_csv(*rows, header=no_text), "no column text, only note_id, subject_id,"),
        "renamed.csv": (good.replace(b",text\n", b",note\n"), "no column text, only note_id"),
        "headless.csv": (good.partition(b"\n")[2], "has no header in its first row"),
        "mixed_header.csv": (b"note_id," + CANARY.encode() + b",text\n", "has no header"),
        "truncated.csv.gz": (gzip.compress(good)[:-30], "truncated gzip"),
        "corrupt.csv.gz": (gzip.compress(good)[:-8] + b"\0" * 8, "damaged or truncated gzip"),
        "cut_in_note.csv": (good[:-6], "malformed or cut short"),
        "cut_in_row.csv": (good[: last + 12], "record 199 has"),
        "more_fields.csv": (good + f"1,2,3,4,5,6,7,8,{CANARY}\n".encode(), "record 200 has 9"),
        "stray_quote.csv": (good + f'1,2,3,DS,1,,,"{CANARY}"x\n'.encode(), "malformed"),
        "latin1.csv": (good + f"1,2,3,DS,1,,,{CANARY} \xe9\n".encode("latin-1"), "is not UTF-8"),
        "no_note_id.csv": (good + f",2,3,DS,1,,,{CANARY}\n".encode(), "record 200 has no note_id"),
        "no_subject.csv": (good + f"1, ,3,DS,1,,,{CANARY}\n".encode(), "has no subject_id"),
        "twice.csv": (good + _csv(rows[0]).partition(b"\n")[2], "repeat a note_id"),
    }


def _frames(error: BaseException) -> Iterator[types.FrameType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


@pytest.mark.parametrize("name", list(_bad_inputs()))
def test_bad_input_is_named_and_no_note_is_shown(tmp_path: Path, name: str) -> None:
    """Neither the error, what it is chained to, nor our frames' variables hold a note's text."""
    content, says = _bad_inputs()[name]
    path = _write(tmp_path / name, content)
    with pytest.raises(InputError, match=says) as caught:
        for document in documents(path, "discharge"):
            del document
    shown = [str(caught.value), repr(caught.value)]
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    for frame in _frames(caught.value):
        if Path(frame.f_code.co_filename).name == "mimic.py":
            shown.append(repr(frame.f_locals))
    assert len(shown) > 2
    assert name in shown[0]
    for text in shown:
        for word in CANARY.split():
            assert word not in text


def test_a_missing_file_and_a_wrong_source(tmp_path: Path) -> None:
    """The path is in the message; a source that does not exist is the caller's mistake."""
    with pytest.raises(InputError, match=r"none\.csv cannot be read"):
        list(documents(tmp_path / "none.csv", "discharge"))
    with pytest.raises(ValueError, match="source must be one of"):
        list(documents(tmp_path / "none.csv", "nursing"))


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    position=st.integers(0, 3000),
    removed=st.integers(0, 60),
    added=st.binary(max_size=12),
    packed=st.booleans(),
)
def test_damaged_bytes_give_the_documented_error_or_documents(
    tmp_path: Path, position: int, removed: int, added: bytes, packed: bool
) -> None:
    """Whatever a transfer does to a file, no other exception comes out."""
    content = _csv(*(_row(number, text='Zwei, "drei"\nénd') for number in range(20)))
    content = gzip.compress(content, mtime=0) if packed else content
    position %= len(content)
    path = tmp_path / "damaged.csv.gz"
    path.write_bytes(content[:position] + added + content[position + removed :])
    with contextlib.suppress(InputError):
        assert all(document.text for document in documents(path, "discharge"))


# ------------------------------------------------------------------------------- the whole stream


def test_memory_stays_flat(tmp_path: Path) -> None:
    """Ten times the notes take no more memory but for the 8 bytes each that find duplicates."""
    peaks = []
    for number in (200, 2000):
        rows = (_row(i, text=f"{i} " + "word " * 4000) for i in range(number))
        path = _write(tmp_path / "d.csv.gz", gzip.compress(_csv(*rows), compresslevel=1))
        tracemalloc.start()
        assert sum(1 for _ in documents(path, "discharge")) == number
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


@pytest.mark.parametrize(("source", "number"), [("discharge", 5111), ("radiology", 3851)])
def test_real_notes_are_unchanged(shared_data: Path, source: str, number: int) -> None:
    """Text and identifiers equal what Arrow's CSV reader makes of the same file."""
    path = shared_data / "mimic-iv-note" / "note" / f"{source}.csv.gz"
    table = pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(HEADER, "string"), strings_can_be_null=False
        ),
    ).to_pydict()
    found = list(documents(path, source))
    assert len(found) == len(table["text"]) == number
    assert [d.text for d in found] == [text.replace("\r\n", "\n") for text in table["text"]]
    assert [d.id for d in found] == [f"{source}-{_hash(i)}" for i in table["note_id"]]
    assert [d.group for d in found] == [f"subject-{_hash(i)}" for i in table["subject_id"]]
    assert [d.meta["admission"] is None for d in found] == [not i for i in table["hadm_id"]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Name: ___ Unit No: ___", "Name: █ Unit No: █"),
        ("___-year-old, Dr.___, on ___.", "█-year-old, Dr.█, on █."),
        ("Sign: ____\n_______\n__", "Sign: ____\n_______\n__"),
        ("___\n___", "█\n█"),
    ],
)
def test_redactions_become_one_mark_by_choice(tmp_path: Path, text: str, expected: str) -> None:
    """Exactly three underscores; longer lines are layout. By default nothing is changed."""
    path = tmp_path / "discharge.csv"
    header = "note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text"
    path.write_text(f'{header}\n1-DS-1,1,2,DS,1,2180-01-01 00:00:00,,"{text}"\n')
    assert [d.text for d in documents(path, "discharge", redaction="█")] == [expected]
    assert [d.text for d in documents(path, "discharge", redaction="\\1")] == [
        expected.replace("█", "\\1")
    ]
    assert [d.text for d in documents(path, "discharge")] == [text]


def test_counts_are_compared_with_the_published_ones() -> None:
    """Both published counts of discharge summaries are right; others are named with them."""
    assert count_problem("discharge", 331_793) is None
    assert count_problem("discharge", 331_794) is None
    assert count_problem("radiology", 2_321_355) is None
    assert count_problem("discharge", 357_289) == (
        "discharge has 357,289 notes where MIMIC-IV-Note 2.2 has 331,793 or 331,794: 2.1's"
    )
    problem = count_problem("radiology", 3_851)
    assert problem is not None
    assert "3,851 notes where MIMIC-IV-Note 2.2 has 2,321,355" in problem
