"""Experiments against each other: how much was removed, and how good what is left is.

Only an experiment that no other beats in both respects is worth a name; these make up the Pareto front.
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

# Seven colours and nine shapes: 63 methods before a pair comes again.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LABEL_WIDTH, LONG_NAME = 18, 14
# Of the legend; what it has more than these makes the picture higher (in inches).
LEGEND_LINES, LEGEND_LINE = 3, 0.21


@dataclass(frozen=True)
class Point:
    """An experiment.

    Attributes:
        label: a short name.
        method: what it was made with.
        removed_percent: parameters removed; 0 is the dense model.
        quality: what was measured.
    """

    label: str
    method: str
    removed_percent: float
    quality: float


def pareto_front(points: Sequence[Point], higher_is_better: bool) -> list[Point]:
    """Return the points that no other one beats, the least removed first.

    A point beats another when it has as much removed and is as good, and is ahead in one of the two. Equals stay together.
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
    """Draw experiments by parameters removed and quality, with the Pareto front, whose points are filled and named.

    Args:
        points: at least one.
        quality: what the y axis shows.
        higher_is_better: percent of the dense model's accuracy; False is a ratio of perplexities, on a logarithmic axis.
        theme: the colours.
    """
    front = pareto_front(points, higher_is_better)
    dense = 100.0 if higher_is_better else 1.0
    methods = sorted({point.method for point in points})
    columns = 2 if max(map(len, methods)) > LONG_NAME else 3
    below = max(math.ceil((len(methods) + 2) / columns) - LEGEND_LINES, 0) * LEGEND_LINE
    with drawing(theme, WIDTH * 0.86 + below) as figure:
        axes = figure.add_subplot()
        axes.axhline(dense, color=theme.dense, lw=1, ls=":", label="dense")
        axes.plot(*zip(*map(_place, front), strict=True), color=theme.dense, lw=1.3, label="best for its size", zorder=1)
        for number, method in enumerate(methods):
            look: dict[str, Any] = {
                "marker": MARKERS[number % len(MARKERS)],
                "color": theme.series[number % len(theme.series)],
                "ls": "",
            }
            axes.plot([], [], **look, label=method)
            for point in (point for point in points if point.method == method):
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
            [(*_place(point), _broken(point.label)) for point in front],
            [*map(_place, points)],
            [((0, dense), (axes.get_xlim()[1], dense)), *pairwise(map(_place, front))],
        )
    return figure


def _place(point: Point) -> tuple[float, float]:
    return point.removed_percent, point.quality


def _broken(label: str) -> str:
    """Break a long label behind commas."""
    lines: list[str] = []
    for part in label.split(", "):
        if lines and len(lines[-1]) + len(part) < LABEL_WIDTH:
            lines[-1] += f", {part}"
        else:
            lines.append(part)
    return ",\n".join(lines)
