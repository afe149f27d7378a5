"""Decontamination: overlaps by words and by PMID, counted by set, on the real files too."""

from pathlib import Path

import numpy as np
import pytest

from data_prep import pubmed
from data_prep.decontaminate import EvaluationFile, Index, load_index, write_index
from data_prep.document import Document, InputError
from data_prep.evaluation_texts import evaluation_texts
from data_prep.words import hash_words

WORDS = [f"word{n}" for n in range(40)]
TEXT = " ".join(WORDS)


def index_of(folder: Path, *texts: str, kind: str = "lines") -> Index:
    files = []
    for number, text in enumerate(texts):
        (folder / f"set{number}").write_text(text)
        files.append(EvaluationFile(number, folder / f"set{number}", kind, ()))
    write_index(files, [f"set{n}" for n in range(len(texts))], 13, folder / "index.npz")
    return load_index(folder / "index.npz")


def sets_of(index: Index, *texts: str, source: str = "pubmed") -> list[int]:
    documents = [Document(f"pubmed-{n}", source, "", text) for n, text in enumerate(texts)]
    words = hash_words([document.text for document in documents], whole_values=False)
    return index.sets_of(documents, words).tolist()


def test_thirteen_words_in_a_row_overlap_and_twelve_do_not(tmp_path: Path) -> None:
    index = index_of(tmp_path, TEXT)
    thirteen, twelve = " ".join(WORDS[5:18]), " ".join(WORDS[5:17])
    assert sets_of(
        index,
        f"Before it: {thirteen.upper()}; and after.",
        f"Before it: {twelve}; and after.",
        f"{twelve} {twelve}",
        thirteen,
        twelve,
        "",
        " . ".join(WORDS[20:]),
    ) == [1, 0, 0, 1, 0, 0, 1]


def test_a_run_does_not_go_from_one_document_to_the_next(tmp_path: Path) -> None:
    index = index_of(tmp_path, TEXT)
    assert sets_of(index, " ".join(WORDS[:10]), " ".join(WORDS[10:20])) == [0, 0]
    # Nor from one evaluation text to the next.
    index = index_of(tmp_path, "\n".join([" ".join(WORDS[:10]), " ".join(WORDS[10:20])]))
    assert sets_of(index, TEXT) == [0]


def test_several_sets_are_told_apart(tmp_path: Path) -> None:
    other = " ".join(f"other{n}" for n in range(20))
    index = index_of(tmp_path, TEXT, f"{other}\n{TEXT}", other)
    assert sets_of(index, TEXT, other, f"{other} {TEXT}", "nothing") == [0b011, 0b110, 0b111, 0]


def test_pmids_count_for_pubmed_alone(tmp_path: Path) -> None:
    index = index_of(tmp_path, "1\n3\n", kind="pmids")
    assert sets_of(index, "a", "b", "c", "d") == [0, 1, 0, 1]
    assert sets_of(index, "a", "b", "c", "d", source="radiology") == [0, 0, 0, 0]


def test_counts_say_what_cannot_be_found(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(f"{TEXT}\nshort text\n")
    counts = write_index(
        [EvaluationFile(0, tmp_path / "a", "lines", ())], ["A"], 13, tmp_path / "index.npz"
    )
    assert counts == {"A texts": 2, "A too_short": 1, "A pmids": 0, "A runs": 28}
    (tmp_path / "a").write_text("\n\n")
    with pytest.raises(InputError, match="neither a text nor a PMID"):
        write_index([EvaluationFile(0, tmp_path / "a", "lines", ())], ["A"], 13, tmp_path / "i")


def test_no_sets_no_overlap(tmp_path: Path) -> None:
    write_index([], [], 13, tmp_path / "index.npz")
    assert sets_of(load_index(tmp_path / "index.npz"), TEXT) == [0]


def test_real_articles_of_nicta_piboso_and_pubmedqa_are_found(
    shared_data: Path, tmp_path: Path
) -> None:
    """By their PMIDs, and by their words alone as well."""
    benchmarks = shared_data / "benchmarks"
    fields = ("QUESTION", "CONTEXTS", "LONG_ANSWER")
    files = [
        EvaluationFile(0, path, "sections", ())
        for path in sorted(benchmarks.glob("nicta_piboso/*_clean.txt.gz"))
    ]
    files.append(
        EvaluationFile(1, benchmarks / "pubmedqa/ori_pqal.json.gz", "json_by_pmid", fields)
    )
    write_index(files, ["NICTA-PIBOSO", "PubMedQA"], 13, tmp_path / "index.npz")
    index = load_index(tmp_path / "index.npz")
    listed = [
        {pmid for file in files if file.number == n for pmid, _ in _texts(file)} for n in (0, 1)
    ]
    paths = pubmed.in_order(set((shared_data / "pubmed/volume").glob("*.xml.gz")))
    winners = pubmed.fold(pubmed.scan(path) for path in paths)
    documents = [
        document
        for path, rows in zip(paths, winners, strict=True)
        for document in pubmed.documents(path, rows)
    ]
    words = hash_words([document.text for document in documents], whole_values=False)
    by_both = index.sets_of(documents, words)
    none = np.zeros(0, np.uint64)
    by_words = Index(13, index.runs, index.run_sets, none, none).sets_of(documents, words)
    for number, least in ((0, 5), (1, 1)):
        pmids = [int(document.id.removeprefix("pubmed-")) for document in documents]
        overlap = np.array([pmid in listed[number] for pmid in pmids])
        assert overlap.sum() >= least
        bit = np.uint64(1 << number)
        assert ((by_both[overlap] & bit) > 0).all()
        assert ((by_words[overlap] & bit) > 0).mean() > 0.8


def _texts(file: EvaluationFile) -> list[tuple[int | None, str]]:
    return list(evaluation_texts(file.path, file.format, file.fields))
