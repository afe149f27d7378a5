"""One HTML page about a run, from the files in its folder: `python -m train.report RUN`.

It reads `config.yaml`, `metrics.jsonl` and `data/PHASE.json` and writes `RUN/report.html`. The
training loop knows nothing of it, and it runs on a finished, a running or a copied run alike.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from common.files import make_private
from common.html import Page
from train.console import amount, duration
from train.records import Record, read_records
from train.report_plots import (
    Curves,
    loss_plot,
    memory_plot,
    optimizer_plot,
    source_plot,
    speed_plot,
    time_plot,
)


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
    starts, train, validation = (
        [record for record in records if record["kind"] == kind]
        for kind in ("start", "train", "validation")
    )
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
    entropy = {name: part.unigram_entropy for name, part in phases.items()}
    curves = Curves(starts, train, validation, entropy)

    page = Page(f"Pretraining run {run_dir.resolve().name}")
    _summary(page, curves, phases)
    page.figure(
        loss_plot(curves),
        "Loss; training pale as recorded and, over it, a running mean. Grey bands are every second "
        "phase, a dotted line is where the run was taken up again.",
    )
    page.figure(source_plot(curves), "By source: loss, accuracy, and how often each was read.")
    _sources(page, curves)
    _validation_by_source(page, phases)
    page.heading("Optimizer")
    page.figure(optimizer_plot(curves), "Norms, rates, and rows of a step over all ranks.")
    page.heading("Speed")
    page.figure(speed_plot(curves), "By the wall clock, pauses left out.")
    page.figure(
        time_plot(curves),
        "Parts are means over ranks; on a GPU its own times. The host may wait for data while the "
        "GPU is busy: what that cost is `waiting for data` at the left.",
    )
    page.figure(memory_plot(curves), "Memory, and steps whose gradient was not finite.")
    _phases(page, phases)
    _data_table(page, phases)
    page.heading("Configuration")
    page.preformatted(_read_text(run_dir / "config.yaml"))
    page.write(run_dir / "report.html")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise _not_there(path, error) from None


def _not_there(path: Path, error: OSError) -> ReportError:
    return ReportError(f"cannot read {path} ({error.strerror}); is it a run folder?")


def _read_metrics(path: Path) -> list[Record]:
    try:
        lines, warning = read_records(path)
    except OSError as error:
        raise _not_there(path, error) from None
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    return [record for _, record in lines]


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


def _summary(page: Page, curves: Curves, phases: dict[str, Part]) -> None:
    last = curves.train[-1]
    rows: list[list[object]] = []
    if curves.starts:
        rows += _circumstances(curves)
    rows += [
        ["real tokens seen", last["tokens"]],
        ["training loss, last record (nats)", last["loss"]],
    ]
    part = next((part for part in reversed(phases.values()) if part.validation), None)
    if part is not None:
        entropy, loss = part.unigram_entropy, part.validation[-1]["loss"]
        rows += [
            ["validation loss (nats)", loss],
            ["unigram entropy of the validation tokens (nats)", entropy],
            [
                "validation loss below the unigram entropy by (nats)",
                None if loss is None else entropy - loss,
            ],
            ["validation accuracy on masked tokens", part.validation[-1]["accuracy"]],
        ]
    page.table(["figure", "value"], [*rows, *_speed(curves)])
    page.paragraph(
        "The unigram entropy is the loss of a model that knows only how frequent each token is; "
        "what lies below it was learned from context."
    )


def _circumstances(curves: Curves) -> list[list[object]]:
    """How far the run is, and on what it runs."""
    start, last = curves.starts[-1], curves.train[-1]
    state = f"all {last['step']:,} steps taken"
    if last["step"] < start["last_step"]:
        left = duration(last["eta_s"])
        state = f"step {last['step']:,} of {start['last_step']:,}, {left} left"
    resumed = ", ".join(f"{step:,}" for step in curves.resumed) or "never"
    # Runs of before it was recorded do not say.
    commits = dict.fromkeys(start.get("commit") or "not known" for start in curves.starts)
    return [
        ["state", state],
        ["taken up again after step", resumed],
        ["model", f"{amount(start['parameters'])} parameters, {start['precision']}"],
        ["on", f"{start['ranks']} × {start['device']}, ZeRO {start['zero_stage']}"],
        ["attention", start["attention"]],
        ["code", f"commit {', then '.join(commits)}"],
    ]


def _speed(curves: Curves) -> list[list[object]]:
    """Medians of what is recorded of speed, and how long it all took."""
    train = [record for record in curves.train if "step_parts_s" in record]
    if not train:
        return []
    waits = [record["data_wait_s"] / record["step_s"] for record in train]
    slowest = Counter(record["data_wait_rank"] for record in train).most_common(1)[0][0]
    padding = [1 - record["tok_per_s"] / record["padded_tok_per_s"] for record in train]
    shares = [record["mfu"] for record in train if record["mfu"] is not None]
    steps = {record["step"] for record in curves.starts} | {r["step"] for r in train}
    before = dict(zip(sorted(steps)[1:], sorted(steps), strict=False))
    stepping = sum(r["step_s"] * (r["step"] - before.get(r["step"], 0)) for r in train)
    pauses = sum(record["pause_s"] for record in train)
    rows: list[list[object]] = [
        ["real tokens a second, median", round(median(r["tok_per_s"] for r in train))],
        ["MFU, median", f"{median(shares):.1%}" if shares else "no peak is known"],
        ["waiting for data, median of the slowest rank", f"{median(waits):.2%}"],
        ["padding, median", f"{median(padding):.1%}"],
        ["time in steps; in validation, checkpoints and logging",
         f"{duration(stepping)}; {duration(pauses)}"],
        ["steps left out", train[-1]["skipped_steps"]],
    ]  # fmt: skip
    if curves.starts and curves.starts[-1]["ranks"] > 1:
        rows.insert(3, ["rank that waits longest most often", slowest])
    held = [r["memory_reserved_gib"] for r in train if r["memory_reserved_gib"] is not None]
    if held:
        rows.append(["GPU memory, highest of all ranks (GiB)", max(held)])
    return rows


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


def _sources(page: Page, curves: Curves) -> None:
    """What has been read of each source in the whole run, as it came out."""
    last = curves.train[-1]
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


if __name__ == "__main__":
    sys.exit(main())
