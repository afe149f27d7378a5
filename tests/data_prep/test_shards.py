"""The shard reader: the rows that were written, from anywhere, or an error that says what to do."""

import hashlib
import json
import multiprocessing
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from data_prep.__main__ import main as run_data_prep
from data_prep.shard_writer import shard_name, write_shard
from data_prep.shards import FORMAT_VERSION, DataError, DataSet, Row, row_key

ROW_TOKENS = 16
ROWS = 7
ROWS_PER_SHARD = 3
TOKENIZER = {
    "file_sha256": hashlib.sha256(b"{}").hexdigest(),
    "vocab_size": 1024,
    "real_vocab_size": 1000,
    "special_ids": {"cls": 2, "sep": 3, "pad": 0, "mask": 4, "unk": 1},
    "excluded_ids": [0, 1, 2, 3, 4],
}


def make_row(number: int) -> Row:
    """A row of two documents of differing lengths; every fourth row has no padding."""
    first, second = 3 + number % 3, 4 + number % 2
    ids = np.arange(ROW_TOKENS, dtype=np.uint16) + 100 * number
    bounds = [0, first, first + second, ROW_TOKENS]
    names = [f"pubmed-{number}", f"pubmed-9{number}#1"]
    if number % 4 == 0:
        names.append(f"pubmed-9{number}#0")
    return Row(ids, np.array(bounds, np.int32), names, "pubmed", row_key("pubmed", "train", number))


def write_data_set(folder: Path) -> list[Row]:
    """A data set of one source and split, its manifest made by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [make_row(number) for number in range(ROWS)]
    entries = []
    for number, begin in enumerate(range(0, ROWS, ROWS_PER_SHARD)):
        path = folder / shard_name("pubmed", "train", number)
        entries.append(write_shard(path, iter(rows[begin : begin + ROWS_PER_SHARD])).to_dict())
    manifest = {
        "format": FORMAT_VERSION,
        "row_tokens": ROW_TOKENS,
        "max_length": ROW_TOKENS,
        "max_documents": 4,
        "tokenizer": TOKENIZER,
        "splits": {"train": {"sources": {"pubmed": {"shards": entries}}}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return rows


def assert_equal(found: Row, wanted: Row) -> None:
    np.testing.assert_array_equal(found.input_ids, wanted.input_ids)
    np.testing.assert_array_equal(found.cu_seqlens, wanted.cu_seqlens)
    assert found.input_ids.dtype == np.uint16
    assert found.cu_seqlens.dtype == np.int32
    assert (found.documents, found.source, found.key) == (
        wanted.documents,
        wanted.source,
        wanted.key,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_data_set(tmp_path / "rows")
    return tmp_path / "rows"


def test_reader_gives_the_rows_that_were_written(folder: Path) -> None:
    data = DataSet(folder)
    assert data.sources("train") == {"pubmed": ROWS}
    for number in range(ROWS):
        assert_equal(data.read("train", "pubmed", number), make_row(number))
    data.verify()


def test_plain_webdataset_reads_the_same_rows(folder: Path) -> None:
    data = DataSet(folder)
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    assert len(samples) == ROWS
    for number, sample in enumerate(samples):
        row = data.read("train", "pubmed", number)
        assert sample["__key__"] == row.key
        np.testing.assert_array_equal(sample["input_ids.npy"], row.input_ids)
        np.testing.assert_array_equal(sample["cu_seqlens.npy"], row.cu_seqlens)
        assert sample["documents.json"] == row.documents


def test_same_rows_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_data_set(tmp_path / "again")
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 7
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_counts_of_a_shard(tmp_path: Path) -> None:
    entry = write_shard(tmp_path / "pubmed-train-000000.tar", map(make_row, range(ROWS)))
    rows = [make_row(number) for number in range(ROWS)]
    assert entry.rows == ROWS
    assert entry.pieces == sum(len(row.documents) for row in rows)
    assert entry.tokens == sum(int(row.cu_seqlens[len(row.documents)]) for row in rows)
    # The piece #0 stands for its document; #1 is not counted again.
    assert entry.documents == ROWS + 2


def test_a_failing_row_leaves_neither_shard_nor_index(tmp_path: Path) -> None:
    def rows() -> Iterator[Row]:
        yield make_row(0)
        raise RuntimeError("the source of rows failed")

    with pytest.raises(RuntimeError, match="source of rows"):
        write_shard(tmp_path / "pubmed-train-000000.tar", rows())
    assert list(tmp_path.iterdir()) == []


def test_threads_read_the_same_rows(folder: Path) -> None:
    data = DataSet(folder)
    numbers = list(range(ROWS)) * 50
    with ThreadPoolExecutor(8) as pool:
        rows = pool.map(lambda number: data.read("train", "pubmed", number), numbers)
        for number, row in zip(numbers, rows, strict=True):
            assert_equal(row, make_row(number))


def _keys_and_sums(data: DataSet, queue: Any) -> None:
    queue.put([int(data.read("train", "pubmed", n).input_ids.sum()) for n in range(ROWS)])


def test_forked_processes_read_through_the_parents_descriptors(folder: Path) -> None:
    data = DataSet(folder)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_keys_and_sums, args=(data, queue)) for _ in range(3)]
    for child in children:
        child.start()
    found = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    wanted = [int(make_row(n).input_ids.sum()) for n in range(ROWS)]
    assert found == [wanted] * 3
    # A child that ends closes its own copies only.
    assert_equal(data.read("train", "pubmed", 5), make_row(5))


def test_a_data_set_can_be_pickled(folder: Path) -> None:
    again = pickle.loads(pickle.dumps(DataSet(folder)))
    assert_equal(again.read("train", "pubmed", 6), make_row(6))


def test_importing_the_reader_needs_numpy_and_the_standard_library_only() -> None:
    script = (
        "import sys\n"
        "before = {name.split('.')[0] for name in sys.modules}\n"
        "import data_prep.shards\n"
        "new = {name for name in sys.modules if name.split('.')[0] not in before}\n"
        "new = {name for name in new if name.split('.')[0] not in sys.stdlib_module_names}\n"
        "print(sorted(name for name in new if name.split('.')[0] != 'numpy'))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "['data_prep', 'data_prep.shards']"


def edit_tokenizer(folder: Path, **changes: Any) -> None:
    edit_manifest(folder, tokenizer=TOKENIZER | changes)


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_shard(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["sources"]["pubmed"]["shards"][1].update(changes)
    path.write_text(json.dumps(manifest))


SECOND = "pubmed-train-000001"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / f"{SECOND}.tar").unlink(), rf"{SECOND}\.tar .*make the data set again"),
        (lambda f: (f / f"{SECOND}.index.npy").unlink(), rf"{SECOND}\.index\.npy .*make the data"),
        (
            lambda f: (f / f"{SECOND}.tar").write_bytes((f / f"{SECOND}.tar").read_bytes()[:-512]),
            rf"{SECOND}\.tar has \d+ bytes",
        ),
        (
            lambda f: shutil.copy(f / "pubmed-train-000000.index.npy", f / f"{SECOND}.index.npy"),
            rf"{SECOND}\.index\.npy is not the index",
        ),
        (lambda f: edit_shard(f, rows=2), rf"{SECOND}\.index\.npy holds \(3,\).* 2 rows"),
        (lambda f: edit_manifest(f, row_tokens=32), r"train-000000\.tar.*row_tokens is 32"),
        # Row 0 has a document of 9 tokens and ids from 0 to 15.
        (lambda f: edit_manifest(f, max_length=7), r"row pubmed-train-000000000 .*max_length is 7"),
        (lambda f: edit_tokenizer(f, vocab_size=5, real_vocab_size=5), r"vocab_size is 5"),
        (lambda f: edit_manifest(f, max_length=17), r"manifest\.json: max_length cannot be right"),
        (lambda f: edit_manifest(f, row_tokens="16"), r"manifest\.json: row_tokens cannot be"),
        (lambda f: edit_tokenizer(f, real_vocab_size=1025), r"real_vocab_size - 1 cannot be right"),
        (lambda f: edit_tokenizer(f, excluded_ids=[0, 1024]), r"excluded_ids cannot be right"),
        (lambda f: edit_tokenizer(f, excluded_ids=None), r"manifest\.json is not a manifest"),
        (lambda f: edit_tokenizer(f, special_ids={}), r"not a manifest .*KeyError: 'cls'"),
        (
            lambda f: edit_tokenizer(f, special_ids=TOKENIZER["special_ids"] | {"mask": 9999}),
            r"manifest\.json: special_ids\.mask cannot be right",
        ),
        (lambda f: edit_tokenizer(f, file_sha256=None), r"file_sha256 cannot be right"),
        (lambda f: edit_manifest(f, tokenizer=[]), r"manifest\.json is not a manifest"),
        (lambda f: edit_manifest(f, format=99), r"manifest\.json has the format 99"),
        (lambda f: edit_manifest(f, splits=[]), r"manifest\.json is not a manifest"),
        (lambda f: (f / "manifest.json").write_text("[1]"), r"manifest\.json is not a manifest"),
        (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json is not a manifest"),
        (lambda f: (f / "manifest.json").unlink(), r"not a finished data set.*make demo"),
        (lambda f: shutil.rmtree(f), r"not a finished data set.*make demo"),
    ],
)
def test_a_damaged_data_set_names_the_file_and_the_remedy(
    folder: Path, damage: Any, message: str
) -> None:
    damage(folder)
    with pytest.raises(DataError, match=message):
        DataSet(folder)


def test_a_folder_around_data_sets_names_them(folder: Path) -> None:
    with pytest.raises(DataError, match=rf"holds some: {folder.name}; name one of them"):
        DataSet(folder.parent)


def test_verify_finds_a_changed_byte_that_opening_cannot_see(folder: Path) -> None:
    path = folder / f"{SECOND}.tar"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    data = DataSet(folder)
    with pytest.raises(DataError, match=rf"{SECOND}\.tar is damaged.*make the data set again"):
        data.verify()


def test_the_command_that_verifies_says_what_it_read_or_names_the_spoilt_shard(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_data_prep(["verify", str(folder)]) == 0
    out = capsys.readouterr().out
    sources = DataSet(folder).manifest["splits"]["train"]["sources"]
    for source, entry in sources.items():
        rows = sum(shard["rows"] for shard in entry["shards"])
        assert f"train {source}: {len(entry['shards'])} shards, {rows} rows" in out
    assert f"{folder} is whole" in out

    shard = folder / sources[min(sources)]["shards"][-1]["name"]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert run_data_prep(["verify", str(folder)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: {shard} is damaged")
    assert shown.err.count("\n") == 1
    assert not shown.out
    assert run_data_prep(["verify", str(folder / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_row_whose_bytes_changed_is_refused(folder: Path) -> None:
    path = folder / f"{SECOND}.tar"
    content = path.read_bytes()
    assert content.count(b"\x93NUMPY") == 6
    path.write_bytes(content.replace(b"\x93NUMPY", b"\x93NUMPX"))
    with pytest.raises(DataError, match=rf"{SECOND}\.tar: row pubmed-train-000000003 cannot be"):
        DataSet(folder).read("train", "pubmed", 3)


@pytest.mark.parametrize("member", ["input_ids.npy", "cu_seqlens.npy", "documents.json"])
def test_a_row_with_one_changed_bit_is_refused_before_it_is_trained_on(
    folder: Path, member: str
) -> None:
    """Ids in the vocabulary, bounds in order: nothing but the checksum can tell."""
    path = folder / f"{SECOND}.tar"
    with tarfile.open(path) as tar:
        found = next(m for m in tar.getmembers() if m.name == f"pubmed-train-000000004.{member}")
    content = bytearray(path.read_bytes())
    # The last digit of a document's number, the last id, the high byte of the last bound.
    content[found.offset_data + found.size - (3 if member == "documents.json" else 2)] ^= 1
    path.write_bytes(content)
    data = DataSet(folder)
    assert_equal(data.read("train", "pubmed", 3), make_row(3))
    with pytest.raises(DataError, match=rf"{SECOND}\.tar: row pubmed-train-000000004 .*checksum"):
        data.read("train", "pubmed", 4)


@pytest.mark.parametrize("row", [-1, ROWS])
def test_rows_that_do_not_exist_are_refused(folder: Path, row: int) -> None:
    with pytest.raises(IndexError, match=r"rows 0 … 6"):
        DataSet(folder).read("train", "pubmed", row)


def test_unknown_splits_and_sources_are_named(folder: Path) -> None:
    data = DataSet(folder)
    with pytest.raises(DataError, match="no split 'test'"):
        data.sources("test")
    with pytest.raises(DataError, match="no source 'radiology'"):
        data.read("train", "radiology", 0)


def test_the_reader_knows_the_tokenizer_of_its_rows(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    DataSet(folder).check_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(DataError, match=r"tokenizer\.json is not the tokenizer that the rows of"):
        DataSet(folder).check_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"absent/tokenizer\.json cannot be read"):
        DataSet(folder).check_tokenizer(tmp_path / "absent")
