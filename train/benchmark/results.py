"""The records of what was measured: made, merged into a file, compared and drawn."""

import functools
import json
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.commit import project_commit
from common.config import ConfigError
from kernels.benchmark_layouts import version_of
from train.benchmark import interruptions
from train.benchmark.cases import GPU_CASES, TINY, Case
from train.benchmark.measure import Measurement
from train.benchmark.parts import PARTS, Breakdown
from train.describe import parameter_count
from train.prepare_model import compiles
from train.resolve import Run

OURS, PLAIN = "ours", "ours, without engine"
AIM = 0.97
"""of the engine against the step without it, and of a GPU among several against one alone"""
_PACKAGES = ("torch", "triton", "deepspeed", "transformers", "flash-attn-4", "flash-attn")

Record = dict[str, Any]
Key = tuple[str, str, int]


@dataclass(frozen=True)
class Machine:
    """Where it is measured.

    datasheet: FLOP/s that the manufacturer names; None where it is not known. products: FLOP/s of a
    product right before and right after the measurement; none on a CPU.
    """

    device: str
    datasheet: float | None = None
    products: tuple[float, ...] = ()

    @property
    def peak(self) -> float | None:
        """The better of the products; None on a CPU."""
        return max(self.products, default=None)

    @property
    def peak_source(self) -> str | None:
        """What `mfu_of_measured_peak` is a share of."""
        if not self.products:
            return None
        before, after = (f"{rate / 1e12:.0f} TFLOP/s" for rate in self.products)
        return (
            f"the better of two products of 8192 x 8192 matrices on the hot GPU, {before} before "
            f"and {after} after"
        )


@functools.cache
def versions() -> dict[str, str | None]:
    """Of Python, of the packages that matter, where they are installed, and of this project.

    Once for the process: what it runs is what it read when it began.
    """
    found = {name: version_of(name) for name in _PACKAGES}
    # Of the build, with its CUDA.
    found["torch"] = torch.__version__
    return {
        "commit": project_commit(),
        "python": platform.python_version(),
        **{name: number for name, number in found.items() if number is not None},
    }


def make_record(
    case: Case, who: str, gpus: int, run: Run, machine: Machine, found: Measurement
) -> Record:
    """The figures of one measurement; `docs/speed.md` says what each means."""
    speeds = sorted(found.speeds(gpus))
    rate = found.flop_rate(gpus)
    shape = run.phases["main"].shape
    is_ours = who.startswith(OURS)
    return {
        **_identity(case, who, gpus, machine),
        "tok_per_s_per_gpu": round(found.speed(gpus), 1),
        "spread": [round(speeds[0], 1), round(speeds[-1], 1)],
        "mfu": share(rate, machine.datasheet),
        "mfu_of_measured_peak": share(rate, machine.peak),
        "peak_source": machine.peak_source,
        "memory_gib": None if found.memory_gib is None else round(found.memory_gib, 2),
        "data_wait_share": (
            None if found.data_wait_share is None else round(found.data_wait_share, 5)
        ),
        "step_ms": round(1000 * statistics.median(found.seconds), 3),
        "steps": len(found.seconds),
        "seconds": [round(seconds, 5) for seconds in found.seconds],
        "interruptions": found.interruptions,
        **_where_time_goes(found.breakdown),
        "parameters": parameter_count(run.start),
        "micro_batch": shape.tokens,
        "micro_steps": run.phases["main"].micro_steps,
        "zero_stage": run.config.zero_stage if is_labelled(who) else None,
        "compiled": compiles(run.config, machine.device != "cpu") if is_ours else None,
        "recompute": run.config.recompute if is_ours else None,
        "fp8": run.config.fp8 if is_ours else None,
        "precision": run.precision,
        "note": found.note,
        "versions": versions(),
        "error": None,
    }


def _where_time_goes(found: Breakdown | None) -> Record:
    if found is None:
        return {"parts": None, "parts_steps": 0, "kernels": []}
    return {
        "parts": {name: round(found.parts[name], 3) for name in PARTS},
        "parts_steps": found.steps,
        "kernels": [
            {"ms": round(ms, 3), "launches": round(launches, 1), "part": part, "name": name}
            for ms, launches, part, name in found.kernels
        ],
    }


def failed(case: Case, who: str, gpus: int, machine: Machine, error: BaseException) -> Record:
    """The record of what could not be measured, and why."""
    reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    figures = ("tok_per_s_per_gpu", "mfu", "memory_gib", "data_wait_share", "parts")
    return {
        **_identity(case, who, gpus, machine),
        **dict.fromkeys(figures),
        "versions": versions(),
        "error": reason[:400],
    }


def _identity(case: Case, who: str, gpus: int, machine: Machine) -> Record:
    return {"case": case.name, "who": who, "gpus": gpus, "device": machine.device}


def share(rate: float, peak: float | None) -> float | None:
    """A rate of FLOPs as a share of a peak; None where there is none."""
    return None if peak is None else round(rate / peak, 4)


def line(record: Record) -> str:
    """A record as a line of text."""
    name = f"{record['case']:<16} {record['who']:<40} {record['gpus']} × "
    if record["error"] is not None:
        return f"{name}not measured: {record['error']}"
    low, high = record["spread"]
    words = [f"{record['tok_per_s_per_gpu']:>10,.0f} tok/s ({low:,.0f} to {high:,.0f})"]
    if record["mfu"] is not None:
        words.append(f"MFU {record['mfu']:.1%}")
    if record["mfu_of_measured_peak"] is not None:
        words.append(f"({record['mfu_of_measured_peak']:.1%} of the measured peak)")
    if record["memory_gib"] is not None:
        words.append(f"{record['memory_gib']:.1f} GiB")
    if record["data_wait_share"] is not None:
        words.append(f"data wait {record['data_wait_share']:.2%}")
    if record["parts"] is not None:
        parts = ", ".join(f"{key} {value:.1f}" for key, value in record["parts"].items())
        words.append(f"a step of {sum(record['parts'].values()):.1f} ms: {parts}")
    return f"{name}{'  '.join(words)}"


def warning(record: Record) -> str | None:
    """A line where something came between steps that were timed; None where nothing did."""
    happened = interruptions.in_words(record.get("interruptions") or {})
    if happened is None:
        return None
    return (
        f"warning: {record['case']}, {record['who']}: while steps were timed there were "
        f"{happened}; `seconds` in the record shows what that came to"
    )


def key_of(record: Record) -> Key:
    """What there is one record of."""
    return record["case"], record["who"], record["gpus"]


def is_labelled(who: str) -> bool:
    """Whether these are the figures of ours, through the engine, under any label."""
    return who.startswith(OURS) and who != PLAIN


def label_of(label: str | None) -> str:
    """What ours is called in the records."""
    return f"{OURS}, {label}" if label else OURS


def merge(old: Iterable[Record], new: Iterable[Record]) -> list[Record]:
    """Both, the new in place of the old of the same case, who and GPUs; by case, GPUs, who.

    What could not be measured takes the place of nothing that was.
    """
    merged: dict[Key, Record] = {}
    for record in (*old, *new):
        before = merged.get(key_of(record))
        if before is None or record["error"] is None or before["error"] is not None:
            merged[key_of(record)] = record
    order = [case.name for case in (*GPU_CASES, TINY)]

    def place(record: Record) -> tuple[int, str, int, bool, str]:
        case, who, gpus = key_of(record)
        known = order.index(case) if case in order else len(order)
        return known, case, gpus, not who.startswith(OURS), who

    return sorted(merged.values(), key=place)


def read(path: Path) -> list[Record]:
    """The records of a file, none where there is no file; ConfigError for what is no such file."""
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        for record in records:
            key_of(record)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(
            f"{path} is not a list of records of this benchmark ({type(error).__name__}: {error}); "
            "give another file to --json"
        ) from None
    assert isinstance(records, list)
    return records


def comparisons(records: Sequence[Record]) -> list[str]:
    """What one record says against another, as lines of text, with what else differs."""
    measured = {key_of(r): r for r in records if r["tok_per_s_per_gpu"]}
    lines = []
    for (case, who, gpus), ours in measured.items():
        if who != OURS:
            continue
        plain, alone = measured.get((case, PLAIN, gpus)), measured.get((case, OURS, 1))
        if plain is not None:
            part = _times(ours, plain)
            lines.append(
                f"{case}: {part:.1%} of the step without the engine (aim {AIM:.0%})"
                f"{_besides(ours, plain)}"
            )
        if gpus > 1 and alone is not None:
            part = _times(ours, alone)
            lines.append(
                f"{case}: a GPU of {gpus} does {part:.1%} of one alone (aim {AIM:.0%})"
                f"{_besides(ours, alone)}"
            )
        others = [
            record
            for (other, name, count), record in measured.items()
            if (other, count) == (case, gpus) and not name.startswith(OURS)
        ]
        if others:
            best = max(others, key=lambda record: float(record["tok_per_s_per_gpu"]))
            lines.append(f"{case}: {_times(ours, best):.2f} × {best['who']}{_besides(ours, best)}")
    return lines


def _times(one: Record, other: Record) -> float:
    return float(one["tok_per_s_per_gpu"] / other["tok_per_s_per_gpu"])


def _besides(one: Record, other: Record) -> str:
    """In what two records differ beside what is compared: device, code, and words."""
    found = []
    for name, first, second in (
        ("device", one["device"], other["device"]),
        ("commit", one["versions"].get("commit"), other["versions"].get("commit")),
        ("words", " ".join(one.get("words", [])), " ".join(other.get("words", []))),
    ):
        if first != second:
            found.append(f"{name} {first or 'none'} against {second or 'none'}")
    return f"; but {', '.join(found)}" if found else ""


def _aims(record: Record) -> tuple[int | None, int | None]:
    """Reach and stretch of the case, where the record is ours."""
    aims = {case.name: (case.reach, case.stretch) for case in GPU_CASES}
    return aims.get(record["case"], (None, None)) if is_labelled(record["who"]) else (None, None)


def plot(path: Path, records: Sequence[Record]) -> None:
    """Bars of tokens a second and GPU, with what is aimed at and what the products alone allow.

    Raises ConfigError where nothing was measured.
    """
    # Only here: a GPU machine may lack it.
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    shown = [r for r in records if r["tok_per_s_per_gpu"] is not None]
    if not shown:
        raise ConfigError("--plot: there is nothing to draw, no record has a speed")
    figure, axes = pyplot.subplots(figsize=(10, 1.2 + 0.3 * len(shown)))
    places = np.arange(len(shown))
    speeds = [r["tok_per_s_per_gpu"] / 1000 for r in shown]
    colors = ["#1f5a99" if r["who"].startswith(OURS) else "#b0b7bf" for r in shown]
    axes.barh(places, speeds, 0.7, color=colors)
    for place, record, speed in zip(places, shown, speeds, strict=True):
        text = f"{speed:,.1f}"
        if share_of_peak := record["mfu_of_measured_peak"]:
            axes.plot([speed / share_of_peak] * 2, [place - 0.35, place + 0.35], "k:", lw=1)
        if record["mfu"]:
            text += f"   MFU {record['mfu']:.0%}"
        # Beside a bar that is too short for it.
        inside = speed > 0.3 * max(speeds)
        at, color = (0, "white") if inside else (speed, "black")
        axes.text(at, place, f" {text}", va="center", fontsize=7, color=color)
        for aim, style in zip(_aims(record), ("-", "--"), strict=True):
            if aim is not None:
                ends = [place - 0.45, place + 0.45]
                axes.plot([aim / 1000] * 2, ends, style, color="#c8501e", lw=2)
    gpus = {n: "1 GPU" if n == 1 else f"{n} GPUs" for n in (r["gpus"] for r in shown)}
    axes.set_yticks(places, [f"{r['case']}: {r['who']}, {gpus[r['gpus']]}" for r in shown])
    axes.invert_yaxis()
    axes.set_xlabel(
        "thousand real tokens a second and GPU; solid and dashed: reach and stretch; "
        "dotted: all of the measured matrix peak"
    )
    devices = sorted({r["device"] for r in shown})
    found = sorted({r["versions"]["torch"] for r in shown})
    axes.set_title(f"{', '.join(devices)}; torch {', '.join(found)}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
