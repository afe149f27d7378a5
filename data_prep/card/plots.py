"""The plots of a data card, each from the rows of the table beneath it."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from common.plots import to_svg

# Told apart without colour, too (Okabe and Ito), and by hatching.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
_HATCHES = ("", "//", "..", "xx", "\\\\", "--", "++", "oo")

Series = Mapping[str, Sequence[float]]


def bars(names: Sequence[str], series: Series, label: str, share: bool = False) -> str:
    """Horizontal bars: for each of `names`, from the top, one of every series."""
    thickness = 0.8 / max(len(series), 1)
    inches = 0.9 + len(names) * max(0.26, 0.13 * len(series))
    figure = Figure(figsize=(8, inches), layout="constrained")
    axes = figure.subplots()
    for number, (name, values) in enumerate(series.items()):
        places = [row + (number - (len(series) - 1) / 2) * thickness for row in range(len(names))]
        axes.barh(places, values, thickness, label=name, **_look(number))
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    _finish(axes, axes.xaxis, label, share, legend=len(series) > 1)
    return to_svg(figure)


def stacked(names: Sequence[str], series: Series, label: str) -> str:
    """Horizontal bars of shares: for each of `names` the series one after another."""
    figure = Figure(figsize=(8, 1.2 + 0.35 * len(names)), layout="constrained")
    axes = figure.subplots()
    before = [0.0] * len(names)
    for number, (name, values) in enumerate(series.items()):
        axes.barh(range(len(names)), values, 0.7, left=before, label=name, **_look(number))
        before = [start + value for start, value in zip(before, values, strict=True)]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    _finish(axes, axes.xaxis, label, share=True, legend=True)
    return to_svg(figure)


def columns(
    names: Sequence[str], series: Series, label: str, share: bool = False, logarithmic: bool = False
) -> str:
    """Columns side by side over ordered bins."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(len(series), 1)
    for number, (name, values) in enumerate(series.items()):
        places = [bin_ + (number - (len(series) - 1) / 2) * width for bin_ in range(len(names))]
        axes.bar(places, values, width, label=name, **_look(number))
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    if logarithmic:
        axes.set_yscale("log")
    _finish(axes, axes.yaxis, label, share, legend=len(series) > 1, logarithmic=logarithmic)
    return to_svg(figure)


def timeline(years: Sequence[int], counts: Sequence[int], label: str) -> str:
    """Counts by year."""
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.bar(years, counts, 1.0, color=_COLOURS[0], edgecolor="white", linewidth=0.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes, axes.yaxis, label, share=False, legend=False)
    return to_svg(figure)


def _look(number: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "hatch": _HATCHES[number % len(_HATCHES)],
        "edgecolor": "white",
        "linewidth": 0.2,
    }


def _finish(
    axes: Any, axis: Any, label: str, share: bool, legend: bool, logarithmic: bool = False
) -> None:
    axis.set_label_text(label)
    if share:
        axis.set_major_formatter(PercentFormatter(1, decimals=None))
    elif not logarithmic:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if legend:
        axes.legend(fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
