"""The whole of data preparation: raw files to data sets, on a made-up and on the real corpus."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from lxml import html

from common.config import config_to_yaml, load_config
from data_prep import cleaning_tasks, near_duplicates, pipeline, tasks
from data_prep.card.mixture import Mixture
from data_prep.card.report import write_reports
from data_prep.config import DataPrep, Sources, Tokenizer, check
from data_prep.document import read_documents
from data_prep.shards import DataSet
from data_prep.split import SPLITS
from data_prep.synthetic.corpus import write_corpus
from data_prep.tokenizer import encode, load_tokenizer

ROOT = Path(__file__).parent.parent.parent
SOURCES = Sources(
    pubmed=["pubmed/baseline/*.xml.gz", "pubmed/updatefiles/*.xml.gz"],
    discharge=["mimic-iv-note/note/discharge.csv.gz"],
    radiology=["mimic-iv-note/note/radiology.csv.gz"],
    icd10cm=["codes/icd10cm_order_*.txt"],
    icd9cm_dx=["codes/CMS*_DESC_LONG_DX.txt"],
    icd9cm_sg=["codes/CMS*_DESC_LONG_SG.txt"],
)


def configuration(raw: Path, out: Path, **changes: Any) -> DataPrep:
    values: dict[str, Any] = {
        "sources": SOURCES,
        "validation_share": 0.1,
        "tokenizer": Tokenizer(vocab_size=768),
        "row_tokens": 512,
        "max_lengths": [128, 512],
        "max_documents": 24,
        "rows_per_shard": 40,
    }
    return DataPrep(raw_dir=raw, out_dir=out, **(values | changes))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_corpus(folder, documents=150)
    return folder


@pytest.fixture(scope="module")
def made(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An out_dir with two data sets, made once; not to be changed."""
    out = tmp_path_factory.mktemp("made") / "out"
    pipeline.run(configuration(raw, out))
    return out


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def all_rows(data: DataSet) -> Any:
    for split in SPLITS:
        for source, rows in data.sources(split).items():
            for row in range(rows):
                yield split, data.read(split, source, row)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of the data sets and the tokenizer below `folder`."""
    parts = [*folder.glob("rows-*"), folder / "tokenizer"]
    paths = [path for part in parts for path in sorted(part.rglob("*")) if path.is_file()]
    assert len(paths) > 10
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def assert_no_data_set(out: Path) -> None:
    assert list(out.rglob("manifest.json")) == []
    assert list(out.rglob("*.tmp")) == []


@pytest.mark.parametrize("length", [128, 512])
def test_rows_hold_every_token_of_every_kept_document_once(made: Path, length: int) -> None:
    """From the documents' texts on the one side, from the rows on the other."""
    data = DataSet(made / f"rows-{length}")
    data.verify()
    tokenizer = load_tokenizer(made / "tokenizer")
    special = data.tokenizer["special_ids"]
    found: dict[tuple[str, str], dict[int, list[int]]] = {}
    for split, row in all_rows(data):
        bounds = row.cu_seqlens.tolist()
        assert len(row.documents) <= 24
        for name, begin, end in zip(row.documents, bounds, bounds[1:], strict=False):
            ids = row.input_ids[begin:end].tolist()
            assert (ids[0], ids[-1], len(ids) <= length) == (special["cls"], special["sep"], True)
            assert name.startswith(f"{row.source}-")
            identifier, _, piece = name.partition("#")
            pieces = found.setdefault((split, identifier), {})
            assert int(piece or 0) not in pieces
            pieces[int(piece or 0)] = ids[1:-1]
        assert (row.input_ids[bounds[len(row.documents)] :] == special["pad"]).all()
    number = 0
    for split in SPLITS:
        for path in sorted((made / "kept" / split).rglob("*.parquet")):
            documents = list(read_documents(path))
            for document, ids in zip(
                documents, encode(tokenizer, [d.text for d in documents]), strict=True
            ):
                pieces = found.pop((split, document.id))
                assert [t for _, piece in sorted(pieces.items()) for t in piece] == ids.tolist()
                number += 1
    assert found == {}
    assert number > 2000


@pytest.mark.parametrize("length", [128, 512])
def test_manifest_counts_are_those_of_documents_and_rows(made: Path, length: int) -> None:
    manifest = json.loads((made / f"rows-{length}" / "manifest.json").read_text())
    data = DataSet(made / f"rows-{length}")
    tokenizer = load_tokenizer(made / "tokenizer")
    special = set(manifest["tokenizer"]["special_ids"].values())
    token_counts = data.token_counts()
    assert list(token_counts) == sorted(data.sources("train"))
    for split in SPLITS:
        content = manifest["splits"][split]
        occurrences: Counter[int] = Counter()
        for source, entry in content["sources"].items():
            texts = [
                document.text
                for path in sorted((made / "kept" / split / source).glob("*.parquet"))
                for document in read_documents(path)
            ]
            tokens = [ids.tolist() for ids in encode(tokenizer, texts)]
            occurrences.update(token for ids in tokens for token in ids)
            rows = [data.read(split, source, row) for row in range(entry["rows"])]
            if split == "train":
                ids = np.concatenate([row.input_ids for row in rows])
                found = np.bincount(ids, minlength=manifest["tokenizer"]["vocab_size"])
                found[list(special)] = 0
                np.testing.assert_array_equal(token_counts[source], found)
            pieces = sum(len(row.documents) for row in rows)
            assert entry["documents"] == len(texts)
            assert entry["pieces"] == pieces
            assert entry["tokens"] == sum(map(len, tokens)) + 2 * pieces
            assert entry["fill"] == pytest.approx(entry["tokens"] / (512 * len(rows)), abs=1e-6)
            least = max(entry["tokens"] / 512, entry["pieces"] / 24)
            assert least <= entry["least_rows"] < least + 1
            assert entry["rows"] >= entry["least_rows"]
            for name in ("rows", "tokens", "documents", "pieces"):
                assert entry[name] == sum(shard[name] for shard in entry["shards"])
        for name in ("rows", "least_rows", "tokens", "documents", "pieces"):
            assert content[name] == sum(entry[name] for entry in content["sources"].values())
        assert not special & set(occurrences)
        shares = np.array(list(occurrences.values())) / occurrences.total()
        assert content["unigram_entropy"] == pytest.approx(-(shares * np.log(shares)).sum())
    totals = manifest["totals"]
    for name in ("rows", "least_rows", "tokens", "documents", "pieces"):
        assert totals[name] == sum(manifest["splits"][split][name] for split in SPLITS)
    assert totals["fill"] == pytest.approx(totals["tokens"] / (512 * totals["rows"]), abs=1e-6)


def test_plain_webdataset_reads_what_the_reader_reads(made: Path) -> None:
    data = DataSet(made / "rows-128")
    rows = {row.key: row for _, row in all_rows(data)}
    shards = [str(path) for path in sorted((made / "rows-128").glob("*.tar"))]
    assert len(shards) > len(data.sources("train")) + len(data.sources("validation"))
    number = 0
    for sample in webdataset.WebDataset(shards, shardshuffle=False).decode():
        row = rows[sample["__key__"]]
        np.testing.assert_array_equal(sample["input_ids.npy"], row.input_ids)
        np.testing.assert_array_equal(sample["cu_seqlens.npy"], row.cu_seqlens)
        assert sample["documents.json"] == row.documents
        number += 1
    assert number == len(rows)


def test_no_group_is_on_both_sides_and_no_text_is_kept_twice(made: Path) -> None:
    groups: dict[str, set[str]] = {split: set() for split in SPLITS}
    texts: Counter[tuple[str, str]] = Counter()
    for split in SPLITS:
        for path in (made / "kept" / split).rglob("*.parquet"):
            for document in read_documents(path):
                groups[split].add(document.group)
                texts[document.source, " ".join(document.text.split()).casefold()] += 1
    assert groups["train"]
    assert groups["validation"]
    assert not groups["train"] & groups["validation"]
    assert set(texts.values()) == {1}


def test_manifest_says_nothing_of_this_machine_and_lists_the_inputs(made: Path, raw: Path) -> None:
    text = (made / "rows-128" / "manifest.json").read_text()
    manifest = json.loads(text)
    for word in (str(raw), str(made), os.uname().nodename):
        assert word not in text
    assert [entry["path"] for entry in manifest["inputs"]] == [
        "pubmed/baseline/pubmed26n0001.xml.gz",
        "pubmed/baseline/pubmed26n0002.xml.gz",
        "pubmed/updatefiles/pubmed26n0003.xml.gz",
        "mimic-iv-note/note/discharge.csv.gz",
        "mimic-iv-note/note/radiology.csv.gz",
        "codes/icd10cm_order_demo.txt",
        "codes/CMS32_DESC_LONG_DX.txt",
        "codes/CMS32_DESC_LONG_SG.txt",
    ]
    assert (
        manifest["inputs"][0]["md5"]
        in (raw / "pubmed/baseline/pubmed26n0001.xml.gz.md5").read_text()
    )


def test_the_command_line_makes_the_same_bytes_elsewhere(
    made: Path, raw: Path, tmp_path: Path
) -> None:
    """Another process, other folders, another hash seed; and its files are its owner's alone."""
    other_raw = Path(shutil.copytree(raw, tmp_path / "elsewhere"))
    path = tmp_path / "run.yaml"
    settings = config_to_yaml(configuration(other_raw, tmp_path / "out")).splitlines()
    path.write_text("data_prep:\n" + "".join(f"  {line}\n" for line in settings))
    done = subprocess.run(
        [sys.executable, "-m", "data_prep", "--config", path, "seed=0"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": "5"},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == content(made)
    assert f"data set: {tmp_path / 'out' / 'rows-512'}" in done.stdout
    assert "train in all" in done.stdout
    for file in (tmp_path / "out").rglob("*"):
        assert file.stat().st_mode & 0o077 == 0


def must_not_run(*arguments: Any) -> Any:
    raise AssertionError("this was done already")


def test_what_is_done_is_not_done_again(
    copy: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(copy)
    for step in ("scan", "fold", "documents", "sample", "tokenizer", "tokens", "shard"):
        monkeypatch.setattr(tasks, step, must_not_run)
    for step in ("check", "digests", "unique", "signatures", "split", "paragraphs", "keep"):
        monkeypatch.setattr(cleaning_tasks, step, must_not_run)
    for step in ("write_pairs", "write_wanted", "verify"):
        monkeypatch.setattr(near_duplicates, step, must_not_run)
    pipeline.run(configuration(raw, copy))
    assert content(copy) == before


def test_a_changed_key_redoes_what_it_decides_and_nothing_else(
    copy: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "tokens", must_not_run)
    pipeline.run(configuration(raw, copy, max_lengths=[128], max_documents=5))
    data = DataSet(copy / "rows-128")
    assert data.max_documents == 5
    assert max(len(row.documents) for _, row in all_rows(data)) == 5
    # A lost shard is written again.
    shard = next((copy / "rows-128").glob("*.tar"))
    shard.unlink()
    pipeline.run(configuration(raw, copy, max_lengths=[128], max_documents=5))
    DataSet(copy / "rows-128").verify()


def test_a_changed_input_takes_the_old_manifests_away_first(
    copy: Path, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = Path(shutil.copytree(raw, tmp_path / "changed"))
    (changed / "codes/icd10cm_order_demo.txt").write_text("no code table\n")
    assert run_main(changed, copy) == 2
    assert "icd10cm_order_demo.txt, line 1" in capsys.readouterr().err
    assert_no_data_set(copy)


def run_main(raw: Path, out: Path, *words: str) -> int:
    from data_prep.__main__ import main

    path = out.parent / "run.yaml"
    settings = config_to_yaml(configuration(raw, out)).splitlines()
    path.write_text("data_prep:\n" + "".join(f"  {line}\n" for line in settings))
    umask = os.umask(0o077)
    try:
        return main(["--config", str(path), *words])
    finally:
        os.umask(umask)


CANARY = "canary-7Q"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def drop_text_column(path: Path) -> None:
    path.write_text("note_id,subject_id,hadm_id,note_type,note_seq,charttime\n1-DS-1,1,,DS,1,\n")


def break_a_note(path: Path) -> None:
    path.write_text(
        "note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text\n"
        f'1-DS-1,1,,DS,1,,,"{CANARY} was seen"\n2-DS-1,1,,DS,1,,"{CANARY} was\n'
    )


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("pubmed/baseline/pubmed26n0002.xml.gz", truncate, "pubmed26n0002.xml.gz"),
        ("pubmed/updatefiles/pubmed26n0003.xml.gz", Path.touch, None),
        ("mimic-iv-note/note/radiology.csv.gz", truncate, "radiology.csv.gz"),
        ("mimic-iv-note/note/discharge.csv.gz", drop_text_column, "discharge.csv.gz"),
        ("mimic-iv-note/note/discharge.csv.gz", break_a_note, "discharge.csv.gz"),
        ("codes/CMS32_DESC_LONG_DX.txt", lambda p: p.write_text("x"), "CMS32_DESC_LONG_DX.txt"),
        ("codes/CMS32_DESC_LONG_DX.txt", Path.unlink, "sources.icd9cm_dx"),
    ],
)
def test_a_bad_input_gives_one_line_that_names_it_and_no_data_set(
    raw: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    damage: Any,
    message: str | None,
) -> None:
    bad = Path(shutil.copytree(raw, tmp_path / "bad"))
    (bad / f"{name}.md5").unlink(missing_ok=True)
    damage(bad / name)
    status = run_main(bad, tmp_path / "out", "max_lengths=[128]")
    captured = capfd.readouterr()
    assert CANARY not in captured.err + captured.out
    if message is None:  # A touched file is not a changed one.
        assert status == 0
        return
    assert status == 2
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in captured.err
    assert_no_data_set(tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sources.pubmed=[pubmed/nothing/*.xml]"], "sources.pubmed: no file below raw_dir ="),
        (["sources.pubmed=[/etc/*]"], "sources.pubmed: '/etc/*' is not a pattern"),
        (["raw_dir=absent"], "make demo"),
        (["row_token=64"], "did you mean 'row_tokens'?"),
        (["max_lengths=[1024]"], "max_lengths has 1024; a document must fit into a row"),
        (["row_tokens=70000000000"], "row_tokens is 70000000000; it must be at most 1048576"),
        (["rows_per_shard=10000000"], "rows_per_shard is 10000000: shards of 5120000000 tokens"),
        (["max_lengths=[]"], "max_lengths is empty"),
        (["max_lengths=[128,128]"], "names a length twice"),
        (["max_documents=0"], "max_documents is 0; it must be positive"),
        (["validation_share=1.5"], "validation_share is 1.5"),
        (["sources={}"], "sources names no files"),
        (["tokenizer.vocab_size=100"], "vocab_size is 100; it must be a multiple of 64"),
        (["tokenizer.shares={icd9: 0.5}"], "names 'icd9'; the sources are icd10cm, icd9cm, pubmed"),
        (["tokenizer.shares={icd9cm: 0}"], "shares.icd9cm is 0"),
        (["tokenizer.shares={icd9cm: 0.9, pubmed: 0.2}"], "add up to 1.1"),
        (["out_dir=Makefile"], "Makefile"),
        (["tokenizer.vocab_size=1024000"], "supports a vocabulary of only"),
        (["tokenizer.existing=tests"], "tests is not a fast tokenizer's folder"),
    ],
)
def test_a_configuration_that_cannot_be_gives_one_line_that_names_the_key(
    raw: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(ROOT)
    only_codes = ["sources.discharge=[]", "sources.radiology=[]", "max_lengths=[128]"]
    assert run_main(raw, tmp_path / "out", *only_codes, *words) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert_no_data_set(tmp_path)


def test_the_configurations_that_come_with_the_project_are_valid() -> None:
    for name in ("base", "sample", "demo", "paper", "clinical_base"):
        run = load_config(DataPrep, "data_prep", ROOT / "configs" / f"{name}.yaml")
        check(run)
        assert run.out_dir.parts[0] in ("data", "demo")
        assert any(run.sources.patterns().values())


def test_the_two_files_that_are_not_pubmed_are_named(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("jmjamison_output.xml.gz", "sheydasa_pubmed_articles.xml.gz"):
        words = [f"sources={{pubmed: [pubmed/single/*.xml, pubmed/nonconforming/{name}]}}"]
        assert run_main(shared_data, tmp_path / "out", *words) == 2
        assert name in capsys.readouterr().err
        assert_no_data_set(tmp_path)


def test_real_documents_lose_nothing(
    made: Path, shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part of the real sample that takes seconds; the slow test below takes all of it."""
    run = configuration(
        shared_data,
        tmp_path / "out",
        sources=Sources(
            pubmed=["pubmed/baseline/*.gz", "pubmed/updatefiles/*.gz", "pubmed/single/*.xml"],
            radiology=["mimic-iv-note/note/radiology.csv.gz"],
            icd9cm_sg=["codes/cms_v32_icd9.zip"],
        ),
        tokenizer=Tokenizer(vocab_size=2048),
        row_tokens=8192,
        max_lengths=[1024, 8192],
        max_documents=512,
    )
    pipeline.run(run)
    for length in run.max_lengths:
        assert_lossless(tmp_path / "out", DataSet(tmp_path / "out" / f"rows-{length}"))


def assert_lossless(out: Path, data: DataSet) -> None:
    """The decoded rows hold the kept documents' texts, each once and whole."""
    tokenizer = load_tokenizer(out / "tokenizer")
    found: dict[str, dict[int, list[int]]] = {}
    for _, row in all_rows(data):
        bounds = row.cu_seqlens.tolist()
        for name, begin, end in zip(row.documents, bounds, bounds[1:], strict=False):
            identifier, _, piece = name.partition("#")
            ids = row.input_ids[begin + 1 : end - 1].tolist()
            assert found.setdefault(identifier, {}).setdefault(int(piece or 0), ids) is ids
    number = 0
    for path in sorted((out / "kept").rglob("*.parquet")):
        for document in read_documents(path):
            pieces = found.pop(document.id)
            ids = [token for _, piece in sorted(pieces.items()) for token in piece]
            assert tokenizer.decode(ids) == document.text, document.id
            number += 1
    assert found == {}
    totals = data.manifest["splits"]
    assert number == sum(totals[split]["documents"] for split in SPLITS)


@pytest.mark.slow
def test_the_whole_real_sample(
    shared_data: Path,
    tmp_path: Path,
    shared_runs: Callable[[html.HtmlElement, Path], set[tuple[str, ...]]],
) -> None:
    """Nothing is lost, rows are as few as can be, and the data card holds no text."""
    out = tmp_path / "out"
    words = [f"raw_dir={shared_data}", f"out_dir={out}", "row_tokens=8192"]
    words.append("max_lengths=[1024, 8192]")
    run = load_config(DataPrep, "data_prep", ROOT / "configs" / "sample.yaml", words)
    manifests = pipeline.run(run)
    assert_lossless(out, DataSet(out / "rows-1024"))
    for length, least in ((1024, 0.995), (8192, 0.98)):
        manifest = manifests[out / f"rows-{length}"]
        # Training and validation together, their last rows included.
        assert manifest["totals"]["fill"] > least
        for split in SPLITS:
            for source, entry in manifest["splits"][split]["sources"].items():
                assert entry["rows"] == entry["least_rows"], (length, split, source)
        assert manifest["splits"]["train"]["sources"]["pubmed"]["documents"] > 12_000
    page, _ = write_reports(out, Mixture())
    assert shared_runs(html.parse(page).getroot(), out / "documents") == set()
