"""`python -m data_prep report`: a page with the numbers of the data set and no text of it."""

import csv
import gzip
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from lxml import html

from data_prep import pipeline
from data_prep.__main__ import main
from data_prep.config import DataPrep, Decontaminate, EvaluationSet, Sources, Tokenizer
from data_prep.document import read_documents
from data_prep.synthetic.corpus import write_corpus

CANARY = "quetzal"
SECTIONS = (
    *("Sources", "Lengths", "Left out", "Evaluation sets", "Clusters of duplicates", "Fill"),
    *("Mixture", "Who and what it is about", "Provenance", "Configuration"),
)


def plant(notes: Path) -> None:
    """Put the canary where the card reads notes: heading, examination, age, and body."""
    with gzip.open(notes, "rt", newline="") as file:
        rows = list(csv.reader(file))
    text = rows[0].index("text")
    rows[1][text] = re.sub("Service: .*", f"Service: {CANARY} ward", rows[1][text])
    rows[1][text] = re.sub("EXAMINATION: .*", f"EXAMINATION: {CANARY} scan", rows[1][text])
    rows[1][text] += f"\nThe {CANARY} is 50 years old and a woman."
    content = io.StringIO()
    csv.writer(content).writerows(rows)
    with gzip.open(notes, "wt", newline="") as file:
        file.write(content.getvalue())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    write_corpus(folder / "raw", documents=60)
    for name in ("discharge", "radiology"):
        plant(folder / "raw" / "mimic-iv-note" / "note" / f"{name}.csv.gz")
    articles = EvaluationSet(name="articles", format="pmids", files=["benchmarks/pmids.txt"])
    pipeline.run(
        DataPrep(
            raw_dir=folder / "raw",
            out_dir=folder / "out",
            sources=Sources(
                pubmed=["pubmed/baseline/*.xml.gz", "pubmed/updatefiles/*.xml.gz"],
                discharge=["mimic-iv-note/note/discharge.csv.gz"],
                radiology=["mimic-iv-note/note/radiology.csv.gz"],
                icd10cm=["codes/icd10cm_order_*.txt"],
            ),
            decontaminate=Decontaminate(sets=[articles]),
            validation_share=0.1,
            tokenizer=Tokenizer(vocab_size=512),
            row_tokens=512,
            max_lengths=[128],
        )
    )
    return folder / "out"


@pytest.fixture(scope="module")
def written(made: Path) -> Path:
    assert main(["report", str(made), "weights.pubmed=3", "weights.discharge=1"]) == 0
    return made / "rows-128" / "report.html"


@pytest.fixture(scope="module")
def page(written: Path) -> html.HtmlElement:
    return html.parse(written).getroot()


def tables_below(page: html.HtmlElement, heading: str) -> list[list[list[str]]]:
    """The tables of a section, as rows of cells, the header first."""
    found = []
    for element in page.xpath(f"//h2[.={heading!r}]/following-sibling::*"):
        if element.tag == "h2":
            break
        for table in element.iter("table"):
            rows = table.iter("tr")
            found.append([[cell.text_content() for cell in row] for row in rows])
    return found


def test_every_section_is_there_and_every_plot_has_words_and_a_table(
    page: html.HtmlElement,
) -> None:
    assert tuple(heading.text for heading in page.iter("h2")) == SECTIONS
    plots = page.findall(".//figure")
    assert len(plots) > 15
    for plot in plots:
        assert plot.find("svg").get("role") == "img"
        assert len(plot.find("svg").get("aria-label")) > 20
        assert plot.find("figcaption").text.endswith(".")
        assert any(element.tag in ("table", "details") for element in plot.itersiblings())
    assert not page.xpath("//@src | //link | //@href | //script")


def test_numbers_are_those_of_the_data_set(made: Path, page: html.HtmlElement) -> None:
    manifest = json.loads((made / "rows-128" / "manifest.json").read_text())
    parts = {
        (source, split): entry
        for split, content in manifest["splits"].items()
        for source, entry in content["sources"].items()
    }
    header, *rows = tables_below(page, "Sources")[0]
    assert len(rows) == len(parts) == 8
    for row in rows:
        entry = parts[row[0], row[1]]
        assert row[2:] == [f"{entry[name]:,}" for name in header[2:]]
    kept = made / "kept"
    for row in tables_below(page, "Left out")[0][1:]:
        steps = [int(cell.replace(",", "")) for cell in row[1:]]
        documents = sum(1 for p in kept.glob(f"*/{row[0]}/*.parquet") for _ in read_documents(p))
        assert steps[-1] == documents
        assert steps[0] - sum(steps[1:-1]) == documents
    sets = tables_below(page, "Evaluation sets")[0]
    assert sets[0][4:] == [f"found in {s}" for s in ("discharge", "icd10cm", "pubmed", "radiology")]
    assert int(sets[1][6]) > 0
    for path in manifest["inputs"]:
        assert path["md5"] in page.text_content()


def test_what_is_no_article_is_counted(made: Path, tmp_path: Path) -> None:
    """Other abstracts and vernacular titles, those left out for their language too."""
    out = Path(shutil.copytree(made, tmp_path / "out"))
    summary = json.loads((out / "documents" / "summary.json").read_text())
    counts = {"other_abstracts": 31, "vernacular_titles": 29, "other_language_parts": 1234}
    summary["counts"]["pubmed"] |= counts
    (out / "documents" / "summary.json").write_text(json.dumps(summary))
    assert main(["report", str(out)]) == 0
    page = html.parse(out / "rows-128" / "report.html").getroot()
    (table,) = (t for t in tables_below(page, "Left out") if t[0][1] == "number")
    assert [row[1] for row in table[1:]] == ["31", "29", "1,234", "0"]
    assert "left out for their language" in table[3][0]


def test_the_mixture_is_that_of_the_weights(made: Path, page: html.HtmlElement) -> None:
    rows = {row[0]: row[1:] for row in tables_below(page, "Mixture")[0][1:]}
    assert {source: row[2] for source, row in rows.items()} == {
        "pubmed": "75.00%",
        "discharge": "25.00%",
        "radiology": "0.00%",
        "icd10cm": "0.00%",
    }
    total = sum(int(row[0].replace(",", "")) for row in rows.values())
    epochs = 0.75 * total / int(rows["pubmed"][0].replace(",", ""))
    assert float(rows["pubmed"][3]) == pytest.approx(epochs, abs=1e-4)


def test_the_page_holds_no_text(
    made: Path,
    written: Path,
    page: html.HtmlElement,
    shared_runs: Callable[[html.HtmlElement, Path], set[tuple[str, ...]]],
) -> None:
    assert shared_runs(page, made / "documents") == set()
    assert CANARY in str(
        [d.text for p in made.glob("kept/*/discharge/*.parquet") for d in read_documents(p)]
    )
    for path in [written, *(made / "statistics").rglob("*.json")]:
        assert CANARY not in path.read_text().lower()
    assert written.stat().st_mode & 0o077 == 0


def test_no_breakdown_of_notes_shows_a_small_count(page: html.HtmlElement) -> None:
    tables = [
        *tables_below(page, "Lengths"),
        *tables_below(page, "Clusters of duplicates"),
        *tables_below(page, "Who and what it is about"),
    ]
    cells = [
        cell
        for header, *rows in tables
        for row in rows
        for source, cell in zip(header, row, strict=True)
        if source in ("discharge", "radiology")
    ]
    assert len(cells) > 80
    assert "withheld" in cells
    assert not set(cells) & set("123456789")
    alts = [alt for alt in page.xpath("//@aria-label") if " in radiology: " in alt]
    assert any("withheld" in alt for alt in alts)


def test_equal_data_sets_have_equal_pages(made: Path, written: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(made, tmp_path / "out"))
    content = written.read_bytes()
    (out / "rows-128" / "report.html").unlink()
    # The data set itself, this time.
    words = ["weights.discharge=1", "weights.pubmed=3"]
    assert main(["report", str(out / "rows-128"), *words]) == 0
    assert (out / "rows-128" / "report.html").read_bytes() == content


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["weights.pubmde=1"],
            "weights.pubmde: .* has no such source to train on; it has discharge",
        ),
        (["weights.pubmed=0"], "weights.pubmed is 0.0, it must be above 0"),
        (["tokens=0"], "tokens is 0, it must be above 0"),
        (["wieghts={}"], "did you mean 'weights'"),
    ],
)
def test_a_mixture_that_does_not_fit_is_refused(
    made: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["report", str(made), *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_what_is_missing_is_named(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no data set" in capsys.readouterr().err
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    shutil.rmtree(copy / "statistics" / "train" / "pubmed")
    assert main(["report", str(copy)]) == 2
    assert "statistics/train/pubmed holds no *.json" in capsys.readouterr().err
