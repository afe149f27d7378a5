"""The benchmark runs on a small input, and its arithmetic is right."""

import gzip
import json
import random
import time
from pathlib import Path

import pytest

from data_prep.benchmark.__main__ import SECTIONS, main
from data_prep.benchmark.measure import Measured, cpu_seconds, measure
from data_prep.benchmark.plan import project, whole_corpora
from data_prep.benchmark.stages import OURS, Size

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
    by = {(row["stage"], row["who"].partition(" (")[0]) for row in result["comparisons"]}
    assert {("notes", "csv module"), ("shards", "webdataset TarWriter")} <= by
    assert {("parse", "pubmed_parser"), ("near-duplicates", "datatrove MinHash")} <= by
    assert result["environment"]["versions"]["lxml"] != "not installed"
    projected = {row["stage"] for row in result["projection"]["stages"]}
    assert names - {"scan", "documents"} <= projected
    assert "metformin" not in (printed := capsys.readouterr().out)
    assert "the whole corpora on 64 cores" in printed
    assert set(SECTIONS) > {"minhash"}


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
    rows = [
        _row("tokens", "pubmed"),
        _row("tokens", "discharge"),
        _row("split", "all"),
        _row("evaluation", "all"),
    ]
    tokens, notes, split, evaluation = project(rows, measured, full, cores=4)
    assert (tokens.cpu_hours, tokens.wall_hours) == pytest.approx((0.5, 0.125))
    assert tokens.gigabytes == pytest.approx(0.05)
    assert notes.cpu_hours == pytest.approx(0.2)
    # 200 documents and 2,000 bytes become 3,000 and 51,000.
    assert (split.cpu_hours, split.wall_hours) == pytest.approx((0.255, 0.255))
    assert evaluation.cpu_hours == pytest.approx(0.01)


def test_whole_corpora() -> None:
    """PubMed at its measured mean length, notes at MIMIC's, codes as they are."""
    measured = {"pubmed": Size(10, 15_000), "radiology": Size(3, 30), "icd10cm": Size(7, 70)}
    full = whole_corpora(measured)
    assert full["pubmed"] == Size(40_000_000, 60_000_000_000)
    assert full["radiology"].documents == 2_321_355
    assert full["icd10cm"] == Size(7, 70)
    assert "discharge" not in full
