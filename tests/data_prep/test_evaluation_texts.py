"""Evaluation sets: every format, the real files, and files of another format."""

import gzip
import json
from pathlib import Path

import pytest

from data_prep.document import InputError
from data_prep.evaluation_texts import evaluation_texts

CONTENT = {
    "lines": ("one text\nanother\n", [(None, "one text"), (None, "another")]),
    "jsonl": (
        '{"text": "a", "label": 1}\n\n{"text": ["b", "c"]}\n',
        [(None, "a"), (None, "b\nc")],
    ),
    "json_by_pmid": ('{"12": {"text": "a", "YEAR": 3}}', [(12, "a")]),
    "tokens": ("Torsade\tB\nde\tI\n\npointes\tI\n", [(None, "Torsade de  pointes")]),
    "sections": (
        "###12\nmethods\tOne .\noutcome\tTwo .\n\n###13\nother\tThree\n",
        [(12, "One .\nTwo ."), (13, "Three")],
    ),
    "pubtator": (
        "12|t|A | title\n12|a|Text.\n12\t0\t1\tA\tD\tMESH\n\n",
        [(12, "A | title"), (12, "Text.")],
    ),
    "pmids": ("12\n13\n\n", [(12, ""), (13, "")]),
}


@pytest.mark.parametrize("kind", CONTENT)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_each_format_is_read(tmp_path: Path, kind: str, pack: type[bytes]) -> None:
    content, expected = CONTENT[kind]
    path = tmp_path / "file"
    path.write_bytes(pack(content.encode()))
    assert [f for f in evaluation_texts(path, kind, ["text"]) if f != (None, "")] == expected


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("jsonl", b'{"text": "a"}\nb\n', "line 2 is no JSON object"),
        ("jsonl", b'{"label": "a"}\n', "line 1 has no text 'text'; it has label"),
        ("json_by_pmid", b"[1]", "the file is no JSON object"),
        ("json_by_pmid", b'{"x1": {"text": "a"}}', "'x1' is no PMID"),
        ("json_by_pmid", b'{"1": "yes"}', "the entry '1' is no JSON object"),
        ("sections", b"###12\nno label\n", "line 2: no label and tab"),
        ("sections", b"###x\n", "line 1: 'x' is no PMID"),
        ("pubtator", b"12|t|A\nwords\n", "line 2: no line of PubTator"),
        ("pmids", b"12\nx\n", "line 2: 'x' is no PMID"),
        ("lines", b"\xff\xfe", "is not UTF-8 text"),
        # No time in its header: it is part of the name of a test, the same in each worker.
        ("lines", gzip.compress(b"text" * 999, mtime=0)[:-9], "damaged or truncated gzip"),
    ],
)
def test_a_file_of_another_format_is_named_with_the_line(
    tmp_path: Path, kind: str, content: bytes, message: str
) -> None:
    path = tmp_path / "evaluation.txt"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        list(evaluation_texts(path, kind, ["text"]))
    assert "evaluation.txt" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind", "fields", "texts", "pmids"),
    [
        ("nicta_piboso/*_clean.txt.gz", "sections", [], 1000, 1000),
        (
            "pubmedqa/ori_pqal.json.gz",
            "json_by_pmid",
            ["QUESTION", "CONTEXTS", "LONG_ANSWER"],
            1000,
            1000,
        ),
        ("chemprot/*.txt.gz", "jsonl", ["text"], 10_065, 0),
        ("ner/NCBI-disease/*.tsv.gz", "tokens", [], 3, 0),
        ("ner/NCBI-disease-original/*.txt.gz", "pubtator", [], 1586, 792),
        ("ner/BC5CDR/*.tsv.gz", "tokens", [], 3, 0),
    ],
)
def test_real_sets_are_read(
    shared_data: Path, name: str, kind: str, fields: list[str], texts: int, pmids: int
) -> None:
    files = sorted((shared_data / "benchmarks").glob(name))
    found = [entry for path in files for entry in evaluation_texts(path, kind, fields)]
    assert sum(bool(text.strip()) for _, text in found) == texts
    assert len({pmid for pmid, _ in found if pmid is not None}) == pmids


def test_real_ground_truth_gives_its_pmids(shared_data: Path, tmp_path: Path) -> None:
    truth = json.loads((shared_data / "benchmarks/pubmedqa/test_ground_truth.json").read_text())
    (tmp_path / "pmids").write_text("\n".join(truth))
    found = list(evaluation_texts(tmp_path / "pmids", "pmids", []))
    assert [str(pmid) for pmid, _ in found] == list(truth)
