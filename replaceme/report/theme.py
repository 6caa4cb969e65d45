"""Style of the pictures: a light and a dark theme, and PNG bytes that depend on the data alone.

A picture is shown about 350 CSS pixels wide on a phone, where one point is one pixel: the text stays legible. Figures are made
without pyplot. While one is drawn or saved, matplotlib uses its own defaults, so that no matplotlibrc changes a picture; the
caller's settings are restored afterwards.
"""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

WIDTH = 4.8
DPI = 200


@dataclass(frozen=True)
class Theme:
    """Colours of a picture; those of ``series`` can be told apart by colour-blind readers too."""

    background: str
    text: str
    grid: str
    shade: str
    dense: str
    pruned: str
    mark: str
    series: tuple[str, ...]


LIGHT = Theme(
    background="#ffffff",
    text="#1f2328",
    grid="#d8dce2",
    shade="#dfe5ee",
    dense="#6b7280",
    pruned="#0b63b0",
    mark="#c2255c",
    series=("#0b63b0", "#c44f00", "#0a7d57", "#9c3f93", "#7a5c00", "#c2255c", "#3f5a6b"),
)
DARK = Theme(
    background="#14171b",
    text="#e4e8ee",
    grid="#343b44",
    shade="#2a323d",
    dense="#9aa4b2",
    pruned="#5fb0f5",
    mark="#ff6f9f",
    series=("#5fb0f5", "#ff9a4d", "#3fcf9c", "#dd8fd6", "#d9b84a", "#ff6f9f", "#a3bccb"),
)


@contextmanager
def drawing(theme: Theme, height: float) -> Iterator[Figure]:
    """Yield an empty figure of the page's width, to draw on inside the block.

    Args:
        theme: its colours.
        height: in inches.
    """
    colours = {
        "text.color": theme.text, "axes.labelcolor": theme.text, "xtick.color": theme.text, "ytick.color": theme.text,
        "axes.edgecolor": theme.dense, "axes.facecolor": theme.background, "figure.facecolor": theme.background,
        "legend.facecolor": theme.background, "legend.edgecolor": theme.grid, "grid.color": theme.grid,
    }  # fmt: skip
    shapes = {
        "font.family": "DejaVu Sans", "font.size": 10.5, "xtick.labelsize": 10, "ytick.labelsize": 10, "legend.fontsize": 10,
        "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
        "axes.axisbelow": True, "grid.linewidth": 0.6, "legend.framealpha": 0.9,
    }  # fmt: skip
    with style.context({**colours, **shapes}, after_reset=True):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def to_png(figure: Figure) -> bytes:
    """Return a figure as PNG: the same bytes for the same data."""
    file = io.BytesIO()
    with style.context({}, after_reset=True):
        # By default matplotlib writes its version into the file.
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def set_log_scale(axes: Axes, direction: Literal["x", "y"], values: Sequence[float]) -> None:
    """Make an axis logarithmic, with readable ticks whether it spans many decades or part of one.

    Args:
        axes: the axes that it belongs to.
        direction: the x or the y axis.
        values: the values to show, all above 0.
    """
    low, high = min(values), max(values)
    room = max((high / low) ** 0.08, 1.02)
    low, high = low / room, high * room
    axes.set(**{f"{direction}scale": "log", f"{direction}lim": (low, high)})
    axis = axes.xaxis if direction == "x" else axes.yaxis
    decades = math.log10(high / low)
    if decades < 0.5:
        axis.set_major_locator(AutoLocator())
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    if decades < 2.5:
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def set_grid(axes: Axes, grid: Literal["x", "y", "both"] = "y") -> None:
    """Give axes a faint grid along ``grid`` and no tick marks."""
    axes.grid(True, axis=grid)
    axes.tick_params(which="both", length=0)
