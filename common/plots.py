"""Plots as SVG markup: equal figures give equal bytes."""

import io

import matplotlib as mpl
from matplotlib.figure import Figure


def to_svg(figure: Figure) -> str:
    """The SVG of a figure, letters drawn as shapes, with nothing in it that changes by itself."""
    # A fixed salt and no date: equal figures give equal markup.
    with mpl.rc_context({"svg.hashsalt": "clinical-modernbert"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
