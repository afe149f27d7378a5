"""The plots of a data card, each from the rows of the table beneath it."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from common.plots import to_svg

# Told apart without colour, too (Okabe and Ito), by hatching.
_COLOURS = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"),
    *("#D55E00", "#F0E442", "#999999", "#000000"),
)
_HATCHES = ("", "//", "..", "xx", "\\\\", "--", "++", "oo", "|")
# Inches: of a page's width, of a letter, of what stands below the axis and beside the last bar.
_WIDTH, _LETTER, _BELOW, _BESIDE = 8.0, 0.085, 0.55, 0.35

Series = Mapping[str, Sequence[float]]
Order = Sequence[str]


def bars(
    names: Sequence[str], series: Series, label: str, share: bool = False, order: Order = ()
) -> str:
    """Horizontal bars: for each of `names`, from the top, one of every series.

    order: names of series that look the same in every plot, whichever of them it shows.
    """
    thickness = 0.8 / max(len(series), 1)
    figure, axes = _horizontal(names, max(0.26, 0.13 * len(series)), series)
    for number, (name, values) in enumerate(series.items()):
        places = [row + (number - (len(series) - 1) / 2) * thickness for row in range(len(names))]
        axes.barh(
            places,
            values,
            thickness,
            label=name,
            **_look(order.index(name) if name in order else number),
        )
    _finish(axes, axes.xaxis, label, share, series)
    return to_svg(figure)


def stacked(names: Sequence[str], series: Series, label: str, order: Order = ()) -> str:
    """Horizontal bars of shares: for each of `names` the series one after another."""
    figure, axes = _horizontal(names, 0.35, series)
    before = [0.0] * len(names)
    for number, (name, values) in enumerate(series.items()):
        axes.barh(
            range(len(names)),
            values,
            0.7,
            left=before,
            label=name,
            **_look(order.index(name) if name in order else number),
        )
        before = [start + value for start, value in zip(before, values, strict=True)]
    _finish(axes, axes.xaxis, label, True, series)
    return to_svg(figure)


def columns(
    names: Sequence[str],
    series: Series,
    label: str,
    share: bool = False,
    logarithmic: bool = False,
    order: Order = (),
) -> str:
    """Columns side by side over ordered bins."""
    figure, axes = _axes(left=0.8, bottom=1.0, height=3.4, series=series)
    width = 0.8 / max(len(series), 1)
    for number, (name, values) in enumerate(series.items()):
        places = [bin_ + (number - (len(series) - 1) / 2) * width for bin_ in range(len(names))]
        axes.bar(
            places,
            values,
            width,
            label=name,
            **_look(order.index(name) if name in order else number),
        )
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize="small")
    if logarithmic:
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.8)
    _finish(axes, axes.yaxis, label, share, series)
    return to_svg(figure)


def timeline(years: Sequence[int], counts: Sequence[int], label: str) -> str:
    """Counts by year."""
    figure, axes = _axes(left=0.9, bottom=0.4, height=2.6, series={})
    axes.bar(years, counts, 1.0, color=_COLOURS[0], edgecolor="white", linewidth=0.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes, axes.yaxis, label, False, {})
    return to_svg(figure)


def _horizontal(names: Sequence[str], row: float, series: Series) -> tuple[Figure, Any]:
    """Axes for horizontal bars, a row of `row` inches for each of `names`, from the top."""
    left = 0.2 + _LETTER * max(map(len, names), default=0)
    figure, axes = _axes(left, _BELOW, row * len(names) + 0.1 + _BELOW, series)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    return figure, axes


def _axes(left: float, bottom: float, height: float, series: Series) -> tuple[Figure, Any]:
    """A figure with one pair of axes, margins in inches, and room for a legend on top of it.

    Laid out by hand: matplotlib's own layouts draw every figure several times.
    """
    legend = 0.3 * -(-len(series) // _legend_columns(series)) if len(series) > 1 else 0.0
    height += legend + 0.1
    figure = Figure(figsize=(_WIDTH, height))
    axes = figure.add_axes(
        (
            left / _WIDTH,
            bottom / height,
            1 - (left + _BESIDE) / _WIDTH,
            1 - (bottom + legend + 0.1) / height,
        )
    )
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend_columns(series: Series) -> int:
    widest = max(map(len, series), default=1)
    return max(1, min(len(series), int(_WIDTH * 0.85 / (0.6 + _LETTER * widest))))


def _look(number: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "hatch": _HATCHES[number % len(_HATCHES)],
        "edgecolor": "white",
        "linewidth": 0.2,
    }


def _finish(axes: Any, axis: Any, label: str, share: bool, series: Series) -> None:
    axis.set_label_text(label)
    if share:
        axis.set_major_formatter(PercentFormatter(1))
    elif axis.get_scale() == "linear":
        axis.set_major_locator(MaxNLocator(6))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if len(series) > 1:
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1, 1),
            ncols=_legend_columns(series),
            fontsize="small",
            frameon=False,
        )
