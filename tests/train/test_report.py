"""The report shows the figures of the run it is made from, and says what is missing."""

import json
import re
from pathlib import Path

import pytest

from train.report import main

SOURCE = {"rows": 3, "tokens": 900, "documents": 7, "fill": 0.99}
MANIFEST = {
    "max_length": 1024,
    "splits": {
        "train": {"unigram_entropy": 7.1, "sources": {"pubmed": SOURCE}},
        "validation": {"unigram_entropy": 6.875, "sources": {"pubmed": SOURCE}},
    },
}


def record(step: int) -> dict[str, object]:
    return {
        "kind": "train",
        "step": step,
        "phase": "short",
        "tokens": 1000 * step,
        "phase_tokens": 1000 * step,
        "rows_per_step": 8,
        "mask_rate": 0.3,
        "sources": {"pubmed": {"tokens": 1000 * step, "epochs": 0.5 * step}},
        "loss": 9.0 - step,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tok_per_s": 5000.0,
        "data_wait_s": 0.001,
    }


VALIDATION = {
    "kind": "validation",
    "phase": "short",
    "step": 2,
    "loss": 5.5,
    "accuracy": 0.25,
    "by_source": {"pubmed": {"loss": 5.5, "accuracy": 0.25}},
}


def write_run(folder: Path, records: list[dict[str, object]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "short.json").write_text(json.dumps(MANIFEST))
    (folder / "config.yaml").write_text("seed: 17 # <b>\n")


def test_report_holds_both_figures_and_their_difference(tmp_path: Path) -> None:
    write_run(tmp_path, [record(1), record(2), VALIDATION])
    assert main([str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    for figure in ("6.8750", "5.5000", "1.3750", "0.2500", "seed: 17 # &lt;b&gt;"):
        assert figure in page
    cells = re.findall("<td[^>]*>([^<]*)</td>", page.partition("Sources read")[2])
    assert cells[:4] == ["pubmed", "2,000", "1.0000", "1.0000"], "tokens, their share, epochs"
    assert page.count("<svg") == 4


def test_equal_runs_give_equal_pages(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "run").mkdir(parents=True)
        write_run(tmp_path / name / "run", [record(1), VALIDATION])
        assert main([str(tmp_path / name / "run")]) == 0
    pages = [(tmp_path / name / "run" / "report.html").read_bytes() for name in ("a", "b")]
    assert pages[0] == pages[1]


def test_a_run_without_validation_has_a_report(tmp_path: Path) -> None:
    write_run(tmp_path, [record(1)])
    assert main([str(tmp_path)]) == 0
    assert "No validation has run yet" in (tmp_path / "report.html").read_text()


def test_missing_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err
    write_run(tmp_path, [])
    assert main([str(tmp_path)]) == 2
    assert "no training step" in capsys.readouterr().err


def test_every_phase_has_its_row_and_its_entropy(tmp_path: Path) -> None:
    later = {**record(3), "phase": "long", "phase_tokens": 1000, "loss": 2.25}
    longer = json.loads(json.dumps(MANIFEST)) | {"max_length": 8192}
    longer["splits"]["validation"]["unigram_entropy"] = 7.125
    checked = {**VALIDATION, "phase": "long", "step": 3, "loss": 5.25}
    write_run(tmp_path, [record(1), record(2), VALIDATION, later, checked])
    (tmp_path / "data" / "long.json").write_text(json.dumps(longer))
    assert main([str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    cells = re.findall("<td[^>]*>([^<]*)</td>", page.partition("<h2>Phases")[2])
    assert cells[:4] == ["short", "2", "2,000", "1,024"]
    assert cells[8:12] == ["long", "3", "1,000", "8,192"]
    assert "1.8750" in page, "the last phase's entropy less its validation loss"
