"""The plots of a run's report: each a figure of one or a few panels over the steps of the run.

Panels share their marks: a band for every second phase, a dotted line where a process took the run
up again. Curves of many records are means of as many records as fall on a point.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from common.plots import to_svg
from train.console import amount
from train.step_clock import PARTS

Record = dict[str, Any]
Get = Callable[[Record], float | None]
Draw = Callable[[Axes], None]
Points = tuple[NDArray[np.float64], NDArray[np.float64]]

MOST_POINTS = 400
SMOOTHED = 40
"""a smoothed curve is a running mean over so many-th part of its points"""
EARLY = 0.05
"""the share of a run in which the loss falls so far that nothing else would be seen beside it"""
WIDTH = 9.6
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
}
NAMES = {
    "data": "waiting for data",
    "forward_backward": "forward and backward",
    "optimizer": "optimizer",
}


@dataclass(frozen=True)
class Curves:
    """What is plotted: the records of a run, the phases' names in order, and each one's entropy."""

    starts: list[Record]
    train: list[Record]
    validation: list[Record]
    entropy: dict[str, float]

    @property
    def sources(self) -> list[str]:
        """All sources, in the order in which they have their colours."""
        return sorted(self.train[-1]["sources"])

    @property
    def resumed(self) -> list[int]:
        """Steps after which the run was taken up again."""
        return sorted({record["step"] for record in self.starts if record["step"]})

    def spans(self) -> dict[str, tuple[int, int]]:
        """The first and the last step of each phase, as far as it is recorded."""
        spans: dict[str, tuple[int, int]] = {}
        end = 0
        for record in self.train:
            first, _ = spans.get(record["phase"], (end, 0))
            spans[record["phase"]] = (first, end := record["step"])
        return spans


def loss_plot(curves: Curves) -> str:
    """Training and validation loss beside the unigram entropy of each phase's validation rows.

    At the left all of it; at the right, from EARLY on, as close as its values allow.
    """
    steps, losses = points(curves.train, lambda r: r["loss"])
    checked = points(curves.validation, lambda r: r["loss"])
    later = EARLY * curves.train[-1]["step"]

    def lines(axes: Axes) -> None:
        axes.plot(*thinned(steps, losses), color="C0", alpha=0.3, linewidth=0.8)
        axes.plot(*thinned(steps, smoothed(losses)), color="C0", label="training")
        axes.plot(*checked, color="C1", marker="o", markersize=3, label="validation")

    def whole(axes: Axes) -> None:
        lines(axes)
        for number, (name, span) in enumerate(curves.spans().items()):
            label = None if number else "unigram entropy"
            height = [curves.entropy[name]] * 2
            axes.plot(span, height, linestyle="--", color="grey", linewidth=1, label=label)
        axes.set(ylabel="nats a masked token")
        axes.legend(loc="upper right")
        _tokens_above(axes, curves)

    def close(axes: Axes) -> None:
        lines(axes)
        _look_close(axes, later, [(steps, losses), checked])
        _tokens_above(axes, curves)

    return _figure(curves, [[whole, close]], height=3.4, begins=(0.0, later), names_phases=True)


def source_plot(curves: Curves) -> str:
    """Loss, accuracy and what was read, by source."""
    steps = [record["step"] for record in curves.train]

    def color_of(source: str) -> str:
        return f"C{curves.sources.index(source) % 10}"

    def of_training(axes: Axes) -> None:
        drawn = []
        for source in curves.sources:
            at, losses = points(curves.train, _of(source, "loss"))
            _, weights = points(curves.train, _of(source, "masked_tokens"))
            drawn.append(thinned(at, smoothed(losses, weights)))
            # A source may be so rare that one record alone has any of it.
            marker = "." if len(at) == 1 else None
            axes.plot(*drawn[-1], label=source, color=color_of(source), marker=marker)
        axes.set(title="training loss, nats, smoothed")
        axes.legend(loc="upper right", fontsize=8, ncols=2)
        _look_close(axes, EARLY * steps[-1], drawn)

    def of_validation(key: str, title: str) -> Draw:
        def draw(axes: Axes) -> None:
            if key == "accuracy":
                for source in curves.sources:
                    at, values = points(curves.train, _of(source, key))
                    _, weights = points(curves.train, _of(source, "masked_tokens"))
                    if len(at) == len(weights):  # older records have no accuracy
                        line = thinned(at, smoothed(values, weights))
                        axes.plot(*line, color=color_of(source), linewidth=0.8, alpha=0.5)
            drawn = [points(curves.validation, _of(source, key)) for source in curves.sources]
            for source, line in zip(curves.sources, drawn, strict=True):
                axes.plot(*line, marker="o", markersize=2.5, linewidth=1, color=color_of(source))
            axes.set(title=title)
            if key == "loss":
                _look_close(axes, EARLY * steps[-1], drawn)

        return draw

    def of_epochs(axes: Axes) -> None:
        for source in curves.sources:
            read = [r["sources"].get(source, {"epochs": 0.0})["epochs"] for r in curves.train]
            axes.plot(*thinned(np.array(steps), np.array(read)), color=color_of(source))
        axes.set(title="epochs read", ylim=(0, None))

    return _figure(
        curves,
        [
            [of_training, of_validation("loss", "validation loss, nats")],
            [of_validation("accuracy", "accuracy on masked tokens (dots: validation)"), of_epochs],
        ],
        height=5.2,
    )


def optimizer_plot(curves: Curves) -> str:
    """Norms, learning rate, masking rate and the size of a step."""

    def masked(axes: Axes) -> None:
        axes.plot(*points(curves.train, lambda r: r["mask_rate"]), color="C0")
        axes.set(title="masking rate", ylim=(0, None))
        rows = axes.twinx()
        rows.plot(*points(curves.train, lambda r: r["rows_per_step"]), color="C3", linewidth=1)
        rows.set(ylim=(0, None))
        rows.grid(visible=False)
        rows.set_ylabel("rows a step", color="C3")
        axes.set_ylabel("share masked", color="C0")

    return _figure(
        curves,
        [
            [
                _line(curves, "gradient norm, before clipping", "grad_norm", logarithmic=True),
                _line(curves, "update norm", "update_norm", logarithmic=True),
            ],
            [_line(curves, "learning rate", "lr"), masked],
        ],
        height=4.6,
    )


def speed_plot(curves: Curves) -> str:
    """Tokens a second, real and with padding, and the MFU or, without a peak, TFLOP/s."""

    def tokens(axes: Axes) -> None:
        axes.plot(*_thin(curves.train, "padded_tok_per_s"), color="C7", label="with padding")
        axes.plot(*_thin(curves.train, "tok_per_s"), color="C0", label="real")
        axes.set(title="tokens a second, all ranks", ylim=(0, None))
        axes.yaxis.set_major_formatter(FuncFormatter(_short))
        axes.legend(loc="lower right")

    def use(axes: Axes) -> None:
        known = any(record.get("mfu") is not None for record in curves.train)
        if known:
            at, share = _thin(curves.train, "mfu")
            axes.plot(at, 100 * share, color="C2")
        else:
            axes.plot(*_thin(curves.train, "tflop_per_s"), color="C2")
        title = "MFU, % of the datasheet's peak" if known else "model TFLOP/s (no peak is known)"
        axes.set(title=title, ylim=(0, None))

    return _figure(curves, [[tokens, use]], height=2.6)


def time_plot(curves: Curves) -> str:
    """A step's time by part, and the share of it that the slowest rank waited for data.

    Steps many times as long as most, such as the first, which compiles, reach beyond the plot.
    """

    def parts(axes: Axes) -> None:
        steps, whole = points(curves.train, lambda r: r["step_s"] if "step_parts_s" in r else None)
        known = [r["step_parts_s"] for r in curves.train if "step_parts_s" in r]
        columns = [np.array([part[name] for part in known]) for name in PARTS]
        rest = np.maximum(whole - sum(columns), 0.0)
        layers = [thinned(steps, column)[1] for column in (*columns, rest)]
        axes.stackplot(
            thinned(steps, whole)[0],
            layers,
            labels=[*(NAMES[part] for part in PARTS), "the rest"],
            colors=["C3", "C0", "C1", "0.75"],
            linewidth=0,
        )
        most = min(whole.max(initial=0.0), 3 * float(np.median(whole))) if len(whole) else 1.0
        axes.set(title="seconds of a step", ylim=(0, 1.05 * most))
        axes.legend(loc="lower right", fontsize=8, framealpha=0.8, frameon=True)

    def waits(axes: Axes) -> None:
        at, share = points(
            curves.train, lambda r: 100 * r["data_wait_s"] / r["step_s"] if "step_s" in r else None
        )
        axes.plot(*thinned(at, share), color="C3")
        axes.axhline(1.0, color="grey", linestyle="--", linewidth=1)
        axes.set(
            title="waiting for data, % of a step, slowest rank (line: 1 %)",
            ylim=(0, max(1.5, 1.1 * share.max(initial=0.0))),
        )

    return _figure(curves, [[parts, waits]], height=2.8)


def memory_plot(curves: Curves) -> str:
    """Memory of the process that holds most, and steps left out."""

    def memory(axes: Axes) -> None:
        for key, label in (
            ("memory_reserved_gib", "GPU, reserved"),
            ("memory_allocated_gib", "GPU, tensors"),
            ("memory_resident_gib", "host"),
        ):
            at, held = _thin(curves.train, key)
            if len(at):
                axes.plot(at, held, label=label)
        axes.set(title="memory, GiB, the highest of all ranks", ylim=(0, None))
        if axes.lines:
            axes.legend()

    def skipped(axes: Axes) -> None:
        at, number = points(curves.train, lambda r: r.get("skipped_steps"))
        axes.step(at, number, where="post", color="C3")
        axes.set(title="steps left out", ylim=(0, max(4.0, 1.1 * number.max(initial=0.0))))

    return _figure(curves, [[memory, skipped]], height=2.4)


def points(records: Iterable[Record], get: Get) -> Points:
    """Steps and values of the records that have one."""
    found = [(record["step"], get(record)) for record in records]
    known = [(step, value) for step, value in found if value is not None]
    steps, values = zip(*known, strict=True) if known else ((), ())
    return np.array(steps, float), np.array(values, float)


def thinned(steps: NDArray[np.float64], values: NDArray[np.float64]) -> Points:
    """At most MOST_POINTS points, each the mean of as many neighbours."""
    parts = min(len(steps), MOST_POINTS)
    if parts == len(steps):
        return steps, values
    bounds = np.linspace(0, len(steps), parts + 1).astype(int)[:-1]
    sizes = np.diff([*bounds, len(steps)])
    return np.add.reduceat(steps, bounds) / sizes, np.add.reduceat(values, bounds) / sizes


def smoothed(
    values: NDArray[np.float64], weights: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """The mean of every value and its neighbours, weighted; fewer of them towards the ends."""
    reach = len(values) // (2 * SMOOTHED)
    weights = np.ones(len(values)) if weights is None else weights
    sums, totals = (np.concatenate([[0.0], np.cumsum(x)]) for x in (values * weights, weights))
    at = np.arange(len(values))
    near = np.minimum(reach, np.minimum(at, len(values) - 1 - at))
    low, high = at - near, at + near + 1
    return (sums[high] - sums[low]) / (totals[high] - totals[low])


def _figure(
    curves: Curves,
    panels: Sequence[Sequence[Draw]],
    height: float,
    begins: Sequence[float] = (0.0, 0.0),
    names_phases: bool = False,
) -> str:
    """The SVG of a grid of panels over the steps of the run, with its marks.

    begins: the step at which each column begins.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        grid = figure.subplots(len(panels), len(panels[0]), squeeze=False, sharex="col")
        for row, draws in zip(grid, panels, strict=True):
            for axes, draw, begin in zip(row, draws, begins, strict=True):
                draw(axes)
                _mark(axes, curves, begin, names_phases)
        for axes in grid[-1]:
            axes.set(xlabel="step")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        return to_svg(figure)


def _mark(axes: Axes, curves: Curves, begin: float, names_phases: bool) -> None:
    for number, (name, (first, last)) in enumerate(curves.spans().items()):
        if number % 2:
            axes.axvspan(first, last, color="0.93", zorder=0, linewidth=0)
        if names_phases and len(curves.entropy) > 1:
            place = axes.get_xaxis_transform()
            middle = (max(first, begin) + last) / 2
            axes.text(middle, 0.02, name, transform=place, ha="center", color="0.4", clip_on=True)
    for step in curves.resumed:
        axes.axvline(step, color="0.35", linestyle=":", linewidth=1)
    last = curves.train[-1]["step"]
    axes.set_xlim(begin, last + 0.01 * (last - begin))


def _look_close(axes: Axes, begin: float, lines: Sequence[Points]) -> None:
    """Let the height of the panel be that of what comes after the step `begin`."""
    seen = np.concatenate([values[steps >= begin] for steps, values in lines])
    low, high = float(seen.min(initial=np.inf)), float(seen.max(initial=-np.inf))
    if low < high:
        axes.set_ylim(low - 0.1 * (high - low), high + 0.05 * (high - low))


def _line(curves: Curves, title: str, key: str, logarithmic: bool = False) -> Draw:
    def draw(axes: Axes) -> None:
        axes.plot(*_thin(curves.train, key), color="C0")
        axes.set(title=title)
        if logarithmic:
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, None)

    return draw


def _tokens_above(axes: Axes, curves: Curves) -> None:
    """A second scale, of the real tokens read by then."""
    steps, tokens = points(curves.train, lambda r: r["tokens"])
    # Also where the panel goes on beyond the last record.
    at, read = (np.concatenate([[0.0], known, [2 * known[-1]]]) for known in (steps, tokens))

    def to_tokens(step: Any) -> Any:
        return np.interp(step, at, read)

    def to_steps(token: Any) -> Any:
        return np.interp(token, read, at)

    above = axes.secondary_xaxis("top", functions=(to_tokens, to_steps))
    above.xaxis.set_major_formatter(FuncFormatter(_short))
    above.set_xlabel("real tokens")


def _short(value: float, _: object) -> str:
    """A count on an axis: 3M."""
    text = amount(value)
    number = text.rstrip("kMB")
    return f"{float(number):g}{text[len(number) :]}"


def _thin(records: Iterable[Record], key: str) -> Points:
    return thinned(*points(records, lambda record: record.get(key)))


def _of(source: str, key: str) -> Get:
    return lambda record: record.get("by_source", {}).get(source, {}).get(key)
