"""The report shows the figures of the run it is made from, and says what is missing."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from train.report import main
from train.report_plots import MOST_POINTS, Curves, loss_plot, smoothed, thinned

OLD = """kind step phase tokens phase_tokens rows_per_step mask_rate sources loss lr grad_norm
    tok_per_s step_s data_wait_s"""
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
        "update_norm": 0.1,
        "skipped_steps": 3,
        "masked_tokens": 300,
        "by_source": {"pubmed": {"loss": 9.0 - step, "masked_tokens": 300}},
        "tok_per_s": 5000.0,
        "padded_tok_per_s": 6250.0,
        "tflop_per_s": 1.5,
        "mfu": 0.375,
        "step_s": 0.5,
        "step_parts_s": {"data": 0.01, "forward_backward": 0.4, "optimizer": 0.05},
        "data_wait_s": 0.02,
        "data_wait_rank": 1,
        "pause_s": 60.0,
        "eta_s": 3723.0,
        "memory_allocated_gib": 20.5,
        "memory_reserved_gib": 22.25,
        "memory_resident_gib": 1.0,
    }


def start(step: int) -> dict[str, object]:
    return {
        "kind": "start",
        "step": step,
        "last_step": 40,
        "ranks": 2,
        "device": "NVIDIA H200",
        "precision": "bf16",
        "zero_stage": 1,
        "attention": "fa4",
        "parameters": 149_655_232,
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


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without plots, which take the most time."""
    monkeypatch.setattr("train.report_plots._figure", lambda *_, **__: "<svg></svg>")


@pytest.fixture
def unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are made, but not turned into markup, which takes most of their time."""
    monkeypatch.setattr("train.report_plots.to_svg", lambda figure: "<svg></svg>")


def test_report_says_which_code_ran(tmp_path: Path, undrawn: None) -> None:
    starts = [start(0), start(1) | {"commit": "0123456789"}, start(1) | {"commit": "0123456789"}]
    write_run(tmp_path, [*starts, record(2), VALIDATION])
    assert main([str(tmp_path)]) == 0
    assert "commit not known, then 0123456789<" in (tmp_path / "report.html").read_text()


def test_report_holds_both_figures_and_their_difference(tmp_path: Path) -> None:
    write_run(tmp_path, [record(1), record(2), VALIDATION])
    assert main([str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    for figure in ("6.8750", "5.5000", "1.3750", "0.2500", "seed: 17 # &lt;b&gt;"):
        assert figure in page
    cells = re.findall("<td[^>]*>([^<]*)</td>", page.partition("Sources read")[2])
    assert cells[:4] == ["pubmed", "2,000", "1.0000", "1.0000"], "tokens, their share, epochs"
    assert page.count("<svg") == 6


@pytest.mark.usefixtures("undrawn")
def test_the_page_begins_with_what_the_run_is_and_how_fast(tmp_path: Path) -> None:
    write_run(tmp_path, [start(0), record(2), start(2), record(4), VALIDATION | {"step": 4}])
    assert main([str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    rows = dict(re.findall("<tr><td>([^<]*)</td><td[^>]*>([^<]*)</td></tr>", page))
    assert rows["state"] == "step 4 of 40, 1:02:03 left"
    assert rows["taken up again after step"] == "2"
    assert rows["model"] == "149.66M parameters, bf16"
    assert rows["on"] == "2 × NVIDIA H200, ZeRO 1"
    assert rows["real tokens a second, median"] == "5,000"
    assert rows["MFU, median"] == "37.5%"
    assert rows["waiting for data, median of the slowest rank"] == "4.00%"
    assert rows["rank that waits longest most often"] == "1"
    assert rows["padding, median"] == "20.0%"
    assert rows["time in steps; in validation, checkpoints and logging"] == "0:00:02; 0:02:00"
    assert rows["steps left out"] == "3"
    assert rows["GPU memory, highest of all ranks (GiB)"] == "22.2500"


@pytest.mark.usefixtures("unwritten")
def test_a_device_without_a_peak_has_no_mfu(tmp_path: Path) -> None:
    write_run(tmp_path, [start(0), {**record(1), "mfu": None, "memory_reserved_gib": None}])
    assert main([str(tmp_path)]) == 0
    assert "no peak is known" in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("unwritten")
def test_a_step_without_a_finite_loss_has_a_dash(tmp_path: Path) -> None:
    """The plots leave it out."""
    sources = {"pubmed": {"loss": None, "masked_tokens": 300}}
    bad = {**record(2), "loss": None, "by_source": sources}
    for records in ([start(0), record(1), bad], [start(0), bad]):
        write_run(tmp_path, records)
        assert main([str(tmp_path)]) == 0
        page = (tmp_path / "report.html").read_text()
        rows = dict(re.findall("<tr><td>([^<]*)</td><td[^>]*>([^<]*)</td></tr>", page))
        assert rows["training loss, last record (nats)"] == "–"
        assert "None" not in page


@pytest.mark.usefixtures("unwritten")
def test_what_is_null_has_a_dash_or_no_point(tmp_path: Path) -> None:
    """The gradient of a step that was left out, and a validation whose loss is not finite."""
    bad = {**record(2), "grad_norm": None}
    part = {"loss": None, "accuracy": None, "masked_tokens": 9}
    checked = {**VALIDATION, **part, "by_source": dict.fromkeys(VALIDATION["by_source"], part)}
    for records in ([start(0), record(1), bad, checked], [start(0), bad, checked]):
        write_run(tmp_path, records)
        assert main([str(tmp_path)]) == 0
        page = (tmp_path / "report.html").read_text()
        rows = dict(re.findall("<tr><td>([^<]*)</td><td[^>]*>([^<]*)</td></tr>", page))
        assert rows["validation loss (nats)"] == "–"
        assert rows["validation loss below the unigram entropy by (nats)"] == "–"
        assert "None" not in page


@pytest.mark.usefixtures("unwritten")
def test_records_of_before_there_were_parts_of_steps_are_shown(tmp_path: Path) -> None:
    old = {name: value for name, value in record(1).items() if name in OLD.split()}
    write_run(tmp_path, [old, VALIDATION, start(1), record(2)])
    assert main([str(tmp_path)]) == 0
    write_run(tmp_path, [old, VALIDATION])
    assert main([str(tmp_path)]) == 0


def test_a_long_run_is_drawn_with_few_points() -> None:
    steps = np.arange(1, 50_001, dtype=float)
    thin_steps, thin_values = thinned(steps, 2 * steps)
    assert len(thin_steps) == MOST_POINTS
    assert np.allclose(thin_values, 2 * thin_steps)
    assert thin_steps.mean() == pytest.approx(steps.mean(), rel=1e-3)


def test_smoothing_weights_what_it_averages() -> None:
    values = np.array([1.0, 1.0, 7.0, 1.0, 1.0] * 40)
    weights = np.where(values == 7.0, 0.0, 1.0)
    assert np.allclose(smoothed(values, weights), 1.0)
    assert smoothed(values)[100] == pytest.approx(2.2)
    assert smoothed(values)[0] == 1.0, "the ends are what they are"


def test_equal_runs_give_equal_plots() -> None:
    curves = Curves([start(0)], [record(1), record(2)], [VALIDATION], {"short": 6.875})
    assert loss_plot(curves) == loss_plot(curves)


@pytest.mark.usefixtures("unwritten")
def test_a_run_without_validation_has_a_report(tmp_path: Path) -> None:
    write_run(tmp_path, [record(1)])
    assert main([str(tmp_path)]) == 0
    assert "No validation has run yet" in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("undrawn")
def test_a_report_ends_where_the_records_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, [record(1)])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\0\0\0\n" + json.dumps(record(2)).encode() + b"\n")
    assert main([str(tmp_path)]) == 0
    assert "line 2 of 3 is no record" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_missing_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err
    write_run(tmp_path, [])
    assert main([str(tmp_path)]) == 2
    assert "no training step" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
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
