"""One HTML page about a run, from the files in its folder: `python -m train.report RUN`.

It reads `config.yaml`, `metrics.jsonl` and `data/PHASE.json` and writes `RUN/report.html`. The
training loop knows nothing of it, and it runs on a finished, a running or a copied run alike.
"""

import argparse
import json
import sys
from dataclasses import dataclass
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
    names = list(dict.fromkeys(record["phase"] for record in train))
    phases = {
        name: Part(
            [record for record in train if record["phase"] == name],
            [record for record in validation if record["phase"] == name],
            json.loads(_read_text(run_dir / "data" / f"{name}.json")),
        )
        for name in names
    }

    page = Page(f"Pretraining run {run_dir.resolve().name}")
    _summary(page, train, phases)
    page.figure(_loss_plot(train, validation, phases), "Loss in nats a masked token.")
    _phases(page, phases)
    _sources(page, train[-1])
    _validation_by_source(page, phases)
    page.heading("Speed and schedule")
    page.figure(
        _series_plot(train, {"tok_per_s": "real tokens a second", "data_wait_s": "data wait, s"}),
        "Real tokens (padding not counted) over all ranks, and the wait for data in a step.",
    )
    page.figure(
        _series_plot(train, {"lr": "learning rate", "grad_norm": "gradient norm"}),
        "Learning rate, and the gradient norm before clipping.",
    )
    page.figure(
        _series_plot(train, {"mask_rate": "masking rate", "rows_per_step": "rows a step"}),
        "Share of the tokens that is masked, and rows of a step over all ranks.",
    )
    _data_table(page, phases)
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


@dataclass(frozen=True)
class Part:
    """What belongs to one phase: its records, and the manifest of its data set."""

    train: list[Record]
    validation: list[Record]
    manifest: Record

    @property
    def unigram_entropy(self) -> float:
        """That of the validation tokens, in nats."""
        return float(self.manifest["splits"]["validation"]["unigram_entropy"])


def _summary(page: Page, train: list[Record], phases: dict[str, Part]) -> None:
    last = train[-1]
    part = next((part for part in reversed(phases.values()) if part.validation), None)
    rows: list[list[object]] = [
        ["steps", last["step"]],
        ["real tokens seen", last["tokens"]],
        ["training loss, last step", last["loss"]],
        ["real tokens a second, median", _median([record["tok_per_s"] for record in train])],
    ]
    if part is not None:
        entropy, loss = part.unigram_entropy, part.validation[-1]["loss"]
        rows += [
            ["validation loss (nats)", loss],
            ["unigram entropy of the validation tokens (nats)", entropy],
            ["validation loss below the unigram entropy by (nats)", entropy - loss],
            ["validation accuracy on masked tokens", part.validation[-1]["accuracy"]],
        ]
    page.table(["figure", "value"], rows)
    page.paragraph(
        "The unigram entropy is the loss of a model that knows only how frequent each token is; "
        "what lies below it was learned from context."
    )


def _phases(page: Page, phases: dict[str, Part]) -> None:
    page.heading("Phases")
    header = ["phase", "last step", "real tokens", "documents up to", "rows a step"]
    header += ["masking rate", "training loss", "validation loss"]
    page.table(
        header,
        [
            [
                name,
                part.train[-1]["step"],
                part.train[-1]["phase_tokens"],
                part.manifest["max_length"],
                part.train[-1]["rows_per_step"],
                part.train[-1]["mask_rate"],
                part.train[-1]["loss"],
                part.validation[-1]["loss"] if part.validation else "none yet",
            ]
            for name, part in phases.items()
        ],
    )


def _sources(page: Page, last: Record) -> None:
    """What has been read of each source in the whole run, as it came out."""
    page.heading("Sources read")
    page.table(
        ["source", "real tokens read", "share of the tokens", "epochs"],
        [
            [name, read["tokens"], read["tokens"] / last["tokens"], read["epochs"]]
            for name, read in sorted(last["sources"].items())
        ],
    )
    page.paragraph(
        "An epoch is every row of a source once; phases on rows of other lengths add up, for the "
        "rows hold the same documents."
    )


def _validation_by_source(page: Page, phases: dict[str, Part]) -> None:
    page.heading("Validation by source")
    rows = []
    for name, part in phases.items():
        held = part.manifest["splits"]["validation"]["sources"]
        figures = part.validation[-1]["by_source"] if part.validation else {}
        rows += [
            [name, source, held[source]["rows"], held[source]["tokens"], it["loss"], it["accuracy"]]
            for source, it in sorted(figures.items())
        ]
    if not rows:
        page.paragraph("No validation has run yet.")
        return
    page.table(["phase", "source", "rows", "tokens", "loss (nats)", "accuracy"], rows)


def _data_table(page: Page, phases: dict[str, Part]) -> None:
    page.heading("Data")
    header = ["phase", "split", "source", "documents", "tokens", "rows", "share of the rows used"]
    rows = [
        [phase, split, name, held["documents"], held["tokens"], held["rows"], held["fill"]]
        for phase, part in phases.items()
        for split, content in sorted(part.manifest["splits"].items())
        for name, held in sorted(content["sources"].items())
    ]
    page.table(header, rows)


def _loss_plot(train: list[Record], validation: list[Record], phases: dict[str, Part]) -> str:
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    axes.plot(*_series(train, "loss"), label="training", linewidth=1)
    if validation:
        axes.plot(*_series(validation, "loss"), label="validation", marker="o", markersize=3)
    for number, part in enumerate(phases.values()):
        ends = [part.train[0]["step"], part.train[-1]["step"]]
        label = None if number else "unigram entropy"
        axes.plot(ends, [part.unigram_entropy] * 2, linestyle="--", color="grey", label=label)
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
