"""The benchmark runs on a small input, and its arithmetic is right."""

import gzip
import importlib.util
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from data_prep.benchmark.__main__ import SECTIONS, main
from data_prep.benchmark.alternatives import compare_tokenizers
from data_prep.benchmark.measure import Measured, cpu_seconds, measure
from data_prep.benchmark.plan import caveats, project, whole_corpora
from data_prep.benchmark.stages import OURS, Size
from data_prep.config import DataPrep, Tokenizer
from data_prep.document import Document

ARTICLE = (
    "<PubmedArticle><MedlineCitation><PMID>{n}</PMID><Article><Journal><JournalIssue><PubDate>"
    "<Year>2001</Year></PubDate></JournalIssue></Journal><ArticleTitle>On drug {n} in rats."
    "</ArticleTitle><Abstract><AbstractText>{words}</AbstractText></Abstract></Article>"
    "</MedlineCitation></PubmedArticle>"
)
WORDS = (
    "patient denies chest pain dyspnea fever chills with history of hypertension and diabetes "
    "mellitus on metformin lisinopril for the left ventricular ejection fraction was low"
)
HEADER = "note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text\n"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """60 abstracts in PubMed's form and 40 notes, 10 of them twice."""
    folder = tmp_path / "raw"
    (folder / "volume").mkdir(parents=True)
    draw = random.Random(0)
    words = [" ".join(draw.choices(WORDS.split(), k=60)) for _ in range(100)]
    articles = "".join(ARTICLE.format(n=n, words=words[n]) for n in range(1, 61))
    xml = f"<PubmedArticleSet>{articles}</PubmedArticleSet>"
    (folder / "volume" / "a.xml.gz").write_bytes(gzip.compress(xml.encode()))
    rows = (f'{n}-DS-1,{n},,DS,1,,,"{words[60 + n % 30]}"\n' for n in range(40))
    (folder / "discharge.csv").write_text(HEADER + "".join(rows))
    return folder


def test_every_section_on_a_small_input(
    raw: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All stages are there, with what they worked on; rates are quotients; no text is shown."""
    config = tmp_path / "c.yaml"
    config.write_text(
        "data_prep: {sources: {pubmed: ['volume/*.gz'], discharge: [discharge.csv]}, "
        f"tokenizer: {{existing: {trained}}}, row_tokens: 512, max_lengths: [256], "
        "validation_share: 0.1}"
    )
    out = tmp_path / "out.json"
    command = ["--data", str(raw), "--config", str(config), "--json", str(out), "--repeats", "1"]
    assert main(command) == 0
    result = json.loads(out.read_text())
    stages = {(row["stage"], row["source"]): row for row in result["stages"]}
    assert stages["scan", "pubmed"]["documents"] == 60
    assert stages["documents", "discharge"]["documents"] == 40
    assert stages["signatures", "discharge"]["documents"] == 30
    assert stages["documents", "discharge"]["written"] > 1000
    names = {name for name, _ in stages}
    assert {"fold", "checks", "clusters", "kept", "tokens", "plan-256", "rows-256"} <= names
    for row in result["stages"] + result["comparisons"]:
        assert row["documents_per_s"] == pytest.approx(row["documents"] / max(row["cpu_s"], 1e-9))
        assert row["mb_per_s"] == pytest.approx(row["bytes"] / 1e6 / max(row["cpu_s"], 1e-9))
    assert_alternatives_worked(result["comparisons"])
    assert result["environment"]["versions"]["lxml"] != "not installed"
    projected = {row["stage"] for row in result["projection"]["stages"]}
    assert projected == names
    of_pubmed = [row for row in result["projection"]["stages"] if row["source"] == "pubmed"]
    assert {"scan", "documents"} <= {row["stage"] for row in of_pubmed}
    assert "metformin" not in (printed := capsys.readouterr().out)
    assert "the whole corpora on 64 cores" in printed
    assert "no PubMed file as NLM publishes them" in printed
    assert set(SECTIONS) > {"minhash"}


def assert_alternatives_worked(rows: list[dict[str, Any]]) -> None:
    """Where its packages are installed, each alternative did the work."""
    done = {(row["stage"], row["source"], row["who"]) for row in rows if row["documents"]}
    threads = f"SentencePiece, {os.cpu_count()} threads"
    for needs, stage, source, who in (
        ([], "notes", "discharge", "csv module"),
        ([], "shards", "discharge", "webdataset TarWriter"),
        ([], "encode", "pubmed", f"{OURS}, new words"),
        ([], "encode", "pubmed", threads),
        (["pubmed_parser"], "parse", "pubmed/volume", "pubmed_parser"),
        (["datatrove", "spacy", "xxhash"], "near-duplicates", "pubmed", "datatrove MinHash"),
        (["datatrove", "spacy", "xxhash"], "near-duplicates", "discharge", "datatrove MinHash"),
    ):
        is_there = all(importlib.util.find_spec(package) for package in needs)
        assert ((stage, source, who) in done) == is_there


def test_a_tokenizer_without_a_sentencepiece_model(trained: Path, tmp_path: Path) -> None:
    """Its row says that there is none; ours are there."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(trained / name, tmp_path / name)
    documents = [Document("a", "discharge", "1", "chest pain")]
    *ours, missing = compare_tokenizers(tmp_path, "discharge", documents, 1)
    assert [row.documents for row in ours] == [1, 1]
    assert missing.who.endswith("(no sentencepiece.model)")
    assert missing.documents == 0


def test_a_folder_without_files_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line on stderr, status 2."""
    assert main(["--data", str(tmp_path / "none")]) == 2
    assert "raw_dir" in capsys.readouterr().err


def test_cpu_time_is_what_is_counted() -> None:
    """Sleeping costs nothing, computing does; the best of several calls counts."""
    asleep = measure("s", OURS, "x", lambda: time.sleep(0.2), 1, 1, 1)
    assert asleep.cpu_s < 0.1 < asleep.wall_s

    def compute() -> None:
        began = cpu_seconds()
        while cpu_seconds() < began + 0.05:
            pass

    assert 0.05 <= measure("s", OURS, "x", compute, 1, 1, 2).cpu_s < 1


def _row(stage: str, source: str, cpu_s: float = 36.0, written: int = 10**6) -> Measured:
    return Measured(stage, OURS, source, 100, 1000, cpu_s, cpu_s, written)


def test_projection() -> None:
    """The larger of the factors by documents and by bytes; one task is not divided by cores."""
    measured = {"pubmed": Size(100, 1000), "discharge": Size(100, 1000)}
    full = {"pubmed": Size(1000, 50_000), "discharge": Size(2000, 1000)}
    here, there = DataPrep(), DataPrep()
    rows = [
        _row("tokens", "pubmed"),
        _row("tokens", "discharge"),
        _row("split", "all"),
        _row("evaluation", "all"),
    ]
    sizes = {"documents": measured, "kept": measured}
    found = project(rows, sizes, full, 4, here, there)
    tokens, notes, split, evaluation = found
    assert (tokens.cpu_hours, tokens.wall_hours) == pytest.approx((0.5, 0.125))
    assert tokens.gigabytes == pytest.approx(0.05)
    assert notes.cpu_hours == pytest.approx(0.2)
    # 200 documents and 2,000 bytes become 3,000 and 51,000.
    assert (split.cpu_hours, split.wall_hours) == pytest.approx((0.255, 0.255))
    assert (evaluation.cpu_hours, evaluation.wall_hours) == pytest.approx((0.01, 0.01))


@pytest.mark.parametrize(
    ("stage", "source", "tasks"),
    [
        ("pairs", "pubmed", 14),
        ("components", "pubmed", 1),
        # 524,288 at a time, and 262,144.
        ("fold", "pubmed", 4),
        ("unique", "discharge", 1),
        ("plan-1024", "pubmed", 8),
        ("documents", "discharge", 1),
        ("documents", "icd10cm", 1),
        ("statistics", "pubmed", 64),
    ],
)
def test_a_stage_takes_no_more_cores_than_it_has_tasks(stage: str, source: str, tasks: int) -> None:
    """The number of its tasks for the whole source."""
    sizes = {source: Size(100, 1000)}
    full = {source: Size(2_000_000 if source == "pubmed" else 400_000, 1000)}
    both = {"documents": sizes, "kept": sizes}
    (found,) = project([_row(stage, source)], both, full, 64, DataPrep(), DataPrep())
    assert found.cpu_hours / found.wall_hours == pytest.approx(tasks)


def test_the_tokenizer_is_projected_from_what_it_was_trained_on() -> None:
    """Not from all that was kept; of a source with a share, no more than there is."""
    here = DataPrep(tokenizer=Tokenizer(sample_bytes=500))
    there = DataPrep(tokenizer=Tokenizer(sample_bytes=4000, shares={"pubmed": 0.5, "hcpcs": 0.5}))
    sizes = {"pubmed": Size(100, 1000)}
    full = {"pubmed": Size(10_000, 100_000), "hcpcs": Size(1, 500)}
    both = {"documents": sizes, "kept": sizes}
    found = project([_row("tokenizer", "all")], both, full, 64, here, there)
    assert found[0].cpu_hours == pytest.approx(0.01 * (2000 + 500) / 500)
    assert found[0].gigabytes == pytest.approx(0.001)
    assert any("entries" in note for note in caveats(sizes, full, here, there))
    copied = DataPrep(tokenizer=Tokenizer(existing="x"))
    (found_copied,) = project([_row("tokenizer", "all")], both, full, 64, copied, there)
    assert found_copied.cpu_hours == pytest.approx(0.01)


def test_whole_corpora() -> None:
    """PubMed at its measured mean length, notes at MIMIC's, codes as they are."""
    measured = {"pubmed": Size(10, 15_000), "radiology": Size(3, 30), "icd10cm": Size(7, 70)}
    full = whole_corpora(measured)
    assert full["pubmed"] == Size(40_000_000, 60_000_000_000)
    assert full["radiology"].documents == 2_321_355
    assert full["icd10cm"] == Size(7, 70)
    assert "discharge" not in full
