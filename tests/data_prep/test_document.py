"""Documents survive their Parquet files; the files are whole, equal for equal documents."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.document import Document, InputError, read_documents, write_documents


def _documents(number: int) -> Iterator[Document]:
    for i in range(number):
        meta = {"year": None, "languages": ["eng"], "retracted": False, "ünï": i}
        yield Document(f"pubmed-{i}", "pubmed", f"pubmed-{i}", f"Title {i}\n \nµg\r\n", meta)


def test_round_trip(tmp_path: Path) -> None:
    """What is written is read, in order, over several row groups."""
    path = tmp_path / "00000.parquet"
    assert write_documents(path, _documents(10_000)) == 10_000
    assert list(read_documents(path)) == list(_documents(10_000))
    assert pq.ParquetFile(path).metadata.num_row_groups == 3
    assert pq.ParquetFile(path).schema_arrow.names == ["id", "source", "group", "text", "meta"]


def test_no_documents_are_a_file_too(tmp_path: Path) -> None:
    """An empty part of a source is a whole file of no rows."""
    assert write_documents(tmp_path / "empty.parquet", iter(())) == 0
    assert list(read_documents(tmp_path / "empty.parquet")) == []


def test_equal_documents_give_equal_bytes(tmp_path: Path) -> None:
    """Nothing in the file depends on when or from what it was written."""
    write_documents(tmp_path / "a", _documents(500))
    write_documents(tmp_path / "b", list(_documents(500)))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_failing_source_leaves_nothing(tmp_path: Path) -> None:
    """An error in the middle of the documents leaves no file, not a shorter one."""

    def failing() -> Iterator[Document]:
        yield from _documents(9000)
        raise InputError("some.xml.gz is truncated; fetch it again")

    with pytest.raises(InputError, match="truncated"):
        write_documents(tmp_path / "x.parquet", failing())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "columns"])
def test_a_bad_file_is_named(tmp_path: Path, damage: str) -> None:
    """Reading says which file it is and what to do."""
    path = tmp_path / "00007.parquet"
    write_documents(path, _documents(100))
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        pq.write_table(pq.read_table(path).drop_columns(["group"]), path)
    with pytest.raises(InputError, match=r"00007\.parquet .* run this stage .* again"):
        list(read_documents(path))


@pytest.mark.parametrize("place", ["page", "content"])
def test_damage_inside_a_file_is_named_and_not_quoted(tmp_path: Path, place: str) -> None:
    """The footer is whole, so the damage shows only when a row group is read."""
    path = tmp_path / "00007.parquet"
    canary = "canary-7Q"
    if place == "page":
        found = [Document(f"discharge-{i}", "discharge", "1", canary * i) for i in range(500)]
        write_documents(path, found)
        content = bytearray(path.read_bytes())
        content[20 : len(content) // 2] = bytes(len(content) // 2 - 20)
        path.write_bytes(content)
    else:
        write_documents(path, [Document("discharge-1", "discharge", "1", canary)])
        table = pq.read_table(path)
        meta = pa.array([f'{{"{canary}'], pa.string())
        pq.write_table(table.set_column(4, table.schema.field("meta"), meta), path)
    with pytest.raises(InputError, match=r"00007\.parquet is damaged; .* again") as error:
        list(read_documents(path))
    assert canary not in str(error.value)
    assert error.value.__suppress_context__
