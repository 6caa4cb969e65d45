"""Trade-off between size and quality over experiments.

Only the experiments on the Pareto front are labelled: those that no other beats in size and quality.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from replaceme.report.labels import place_labels
from replaceme.report.theme import LIGHT, WIDTH, Theme, drawing, log_axis, quiet

# Seven colours and nine shapes: a pair repeats after 63 series.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LABEL_WIDTH, LEGEND_WIDTH, LONG_NAME = 18, 26, 14
# Lines of the legend that fit the picture's height; each further one adds ``LEGEND_LINE`` inches.
LEGEND_LINES, LEGEND_LINE = 3, 0.21


@dataclass(frozen=True)
class Point:
    """An experiment.

    Attributes:
        label: a short name.
        series: what it has in common with others of other sizes: they have one look, and a line joins them.
        removed_percent: percentage of the parameters that were removed; 0 is the dense model.
        quality: the measured quality.
    """

    label: str
    series: str
    removed_percent: float
    quality: float


def pareto_front(points: Sequence[Point], higher_is_better: bool) -> list[Point]:
    """Return the points that no other point beats, ordered by the share removed.

    A point beats another if it is at least as good in both respects and better in one. Of equal points, all stay.
    """
    sign = 1 if higher_is_better else -1
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.removed_percent, -sign * point.quality)):
        best = front[-1] if front else None
        same = best and (best.removed_percent, best.quality) == (point.removed_percent, point.quality)
        if best is None or same or sign * point.quality > sign * best.quality:
            front.append(point)
    return sorted(front, key=lambda point: point.removed_percent)


def quality_against_size(
    points: Sequence[Point],
    quality: str = "accuracy kept (% of dense)",
    higher_is_better: bool = True,
    theme: Theme = LIGHT,
) -> Figure:
    """Draw quality against parameters removed, with the Pareto front; its points are filled and labelled.

    Args:
        points: at least one.
        quality: label of the y axis.
        higher_is_better: True for a percentage of the dense model's accuracy, False for a ratio of perplexities, which is
            drawn on a logarithmic axis.
        theme: the colours.
    """
    front = pareto_front(points, higher_is_better)
    dense = 100.0 if higher_is_better else 1.0
    series = sorted({point.series for point in points})
    names = {name: _broken(name, LEGEND_WIDTH) for name in series}
    columns = 2 if max(len(line) for name in names.values() for line in name.split("\n")) > LONG_NAME else 3
    # The legend's columns are filled one after the other, below its first two entries.
    heights = [1, 1, *(name.count("\n") + 1 for name in names.values())]
    each = math.ceil(len(heights) / columns)
    lines = max(sum(heights[start : start + each]) for start in range(0, len(heights), each))
    below = max(lines - LEGEND_LINES, 0) * LEGEND_LINE
    with drawing(theme, WIDTH * 0.86 + below) as figure:
        axes = figure.add_subplot()
        axes.axhline(dense, color=theme.dense, lw=1, ls=":", label="dense")
        axes.plot(*zip(*map(_place, front), strict=True), color=theme.dense, lw=1.3, label="best for its size", zorder=1)
        for number, name in enumerate(series):
            look: dict[str, Any] = {
                "marker": MARKERS[number % len(MARKERS)],
                "color": theme.series[number % len(theme.series)],
                "ls": "",
            }
            axes.plot([], [], **look, label=names[name])
            own = sorted((point for point in points if point.series == name), key=_place)
            if len({point.removed_percent for point in own}) == len(own) > 1:
                axes.plot(*zip(*map(_place, own), strict=True), color=look["color"], lw=1, alpha=0.5, zorder=1)
            for point in own:
                fill: dict[str, Any] = {"ms": 8, "zorder": 3} if point in front else {"ms": 6.5, "mfc": "none", "mew": 1.4}
                axes.plot(*_place(point), **look, **fill, clip_on=False)
        axes.set(xlabel="parameters removed (%)", ylabel=quality)
        axes.margins(x=0.12, y=0.14)
        if not higher_is_better:
            log_axis(axes, "y", [dense, *(point.quality for point in points)])
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        quiet(axes, "both")
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, columnspacing=1.2, handletextpad=0.5)
        place_labels(
            axes,
            [(*_place(point), _broken(point.label, LABEL_WIDTH)) for point in front],
            [*map(_place, points)],
            [((0, dense), (axes.get_xlim()[1], dense)), *pairwise(map(_place, front))],
        )
    return figure


def _place(point: Point) -> tuple[float, float]:
    return point.removed_percent, point.quality


def _broken(label: str, width: int) -> str:
    """Break a long label after commas."""
    lines: list[str] = []
    for part in label.split(", "):
        if lines and len(lines[-1]) + len(part) < width:
            lines[-1] += f", {part}"
        else:
            lines.append(part)
    return ",\n".join(lines)
