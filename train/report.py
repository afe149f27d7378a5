"""One HTML page about a run, from the files in its folder: `python -m train.report RUN`.

It reads `config.yaml`, `metrics.jsonl` and `data_manifest.json` and writes `RUN/report.html`. The
training loop knows nothing of it, and it runs on a finished, a running or a copied run alike.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from common.files import make_private
from common.html import Page
from common.plots import to_svg

Record = dict[str, Any]


class ReportError(ValueError):
    """A run folder that holds nothing to report on."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.report", description=__doc__)
    parser.add_argument("run", type=Path, help="the run's folder (run_dir)")
    run_dir = parser.parse_args(arguments).run
    make_private()
    try:
        write_report(run_dir)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(run_dir / "report.html")
    return 0


def write_report(run_dir: Path) -> None:
    """Write `report.html` into `run_dir`; raises ReportError naming the file that is missing."""
    records = _read_metrics(run_dir / "metrics.jsonl")
    train = [record for record in records if record["kind"] == "train"]
    validation = [record for record in records if record["kind"] == "validation"]
    if not train:
        raise ReportError(f"{run_dir / 'metrics.jsonl'} holds no training step yet")
    manifest = json.loads(_read_text(run_dir / "data_manifest.json"))

    page = Page(f"Pretraining run {run_dir.resolve().name}")
    _summary(page, train, validation, manifest)
    page.figure(_loss_plot(train, validation, manifest), "Loss in nats a masked token.")
    _validation_by_source(page, validation, manifest)
    page.heading("Speed and schedule")
    page.figure(
        _series_plot(train, {"tok_per_s": "real tokens a second", "data_wait_s": "data wait, s"}),
        "Real tokens (padding not counted) over all ranks, and the wait for data in a step.",
    )
    page.figure(
        _series_plot(train, {"lr": "learning rate", "grad_norm": "gradient norm"}),
        "Learning rate, and the gradient norm before clipping.",
    )
    _data_table(page, manifest)
    page.heading("Configuration")
    page.preformatted(_read_text(run_dir / "config.yaml"))
    page.write(run_dir / "report.html")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ReportError(f"cannot read {path} ({error.strerror}); is it a run folder?") from None


def _read_metrics(path: Path) -> list[Record]:
    return [json.loads(line) for line in _read_text(path).splitlines()]


def _unigram_entropy(manifest: Record) -> float:
    return manifest["splits"]["validation"]["unigram_entropy"]


def _summary(page: Page, train: list[Record], validation: list[Record], manifest: Record) -> None:
    last = train[-1]
    rows: list[list[object]] = [
        ["steps", last["step"]],
        ["real tokens seen", last["tokens"]],
        ["training loss, last step", last["loss"]],
        ["real tokens a second, median", _median([record["tok_per_s"] for record in train])],
    ]
    if validation:
        entropy, loss = _unigram_entropy(manifest), validation[-1]["loss"]
        rows += [
            ["validation loss (nats)", loss],
            ["unigram entropy of the validation tokens (nats)", entropy],
            ["validation loss below the unigram entropy by (nats)", entropy - loss],
            ["validation accuracy on masked tokens", validation[-1]["accuracy"]],
        ]
    page.table(["figure", "value"], rows)
    page.paragraph(
        "The unigram entropy is the loss of a model that knows only how frequent each token is; "
        "what lies below it was learned from context."
    )


def _validation_by_source(page: Page, validation: list[Record], manifest: Record) -> None:
    if not validation:
        page.paragraph("No validation has run yet.")
        return
    page.heading("Validation by source")
    sources = manifest["splits"]["validation"]["sources"]
    page.table(
        ["source", "rows", "tokens", "loss (nats)", "accuracy"],
        [
            [name, sources[name]["rows"], sources[name]["tokens"], part["loss"], part["accuracy"]]
            for name, part in sorted(validation[-1]["by_source"].items())
        ],
    )


def _data_table(page: Page, manifest: Record) -> None:
    page.heading("Data")
    header = ["split", "source", "documents", "tokens", "rows", "share of the rows used"]
    rows = [
        [split, name, part["documents"], part["tokens"], part["rows"], part["fill"]]
        for split, content in sorted(manifest["splits"].items())
        for name, part in sorted(content["sources"].items())
    ]
    page.table(header, rows)


def _loss_plot(train: list[Record], validation: list[Record], manifest: Record) -> str:
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    axes.plot(*_series(train, "loss"), label="training", linewidth=1)
    if validation:
        axes.plot(*_series(validation, "loss"), label="validation", marker="o", markersize=3)
    axes.axhline(_unigram_entropy(manifest), linestyle="--", color="grey", label="unigram entropy")
    axes.set(xlabel="step", ylabel="nats a masked token")
    axes.legend()
    return to_svg(figure)


def _series_plot(records: list[Record], labels: dict[str, str]) -> str:
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, len(labels)), labels.items(), strict=True):
        axes.plot(*_series(records, key), linewidth=1)
        axes.set(xlabel="step", ylabel=label)
    return to_svg(figure)


def _series(records: list[Record], key: str) -> tuple[list[int], list[float]]:
    return [record["step"] for record in records], [record[key] for record in records]


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    sys.exit(main())
