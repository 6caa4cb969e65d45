"""Comparison of methods at about the same size: one line per experiment, the best at the top."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from replaceme.report.tables import digits
from replaceme.report.theme import LIGHT, Theme, drawing, log_axis, quiet

# Rows at most; the best experiment of each method is always among them.
ROWS = 24
# Heights in inches: of a row's first line, and of each small line below it.
FIRST, NEXT = 0.27, 0.14
SMALL, WRAPPED = 8.5, 30
# From this ratio of the largest to the smallest value on, the axis is logarithmic.
WIDE = 3.0


@dataclass(frozen=True)
class Row:
    """An experiment.

    Attributes:
        method: name of its method.
        removed_percent: percentage of the parameters that were removed.
        quality: perplexity over the dense model's, or percentage of its accuracy.
        trained: whether it trained.
        settings: the settings that tell it apart from others of its method.
    """

    method: str
    removed_percent: float
    quality: float
    trained: bool = False
    settings: str = ""


def methods_figure(rows: Sequence[Row], quality: str, higher_is_better: bool = False, theme: Theme = LIGHT) -> Figure:
    """Draw the quality of each experiment as a line that starts at the dense model's; trained ones are marked.

    Args:
        rows: at least one.
        quality: label of the x axis.
        higher_is_better: True for a percentage of the dense model's accuracy, False for a ratio of perplexities.
        theme: the colours.
    """
    dense, rows = 100.0 if higher_is_better else 1.0, _chosen(rows, higher_is_better)
    details = [wrap(_detail(row), WRAPPED, break_on_hyphens=False) for row in rows]
    heights = [FIRST + NEXT * len(lines) for lines in details]
    places = [sum(heights[:number]) + height / 2 for number, height in enumerate(heights)]
    trained = any(row.trained for row in rows)
    with drawing(theme, sum(heights) + (0.85 if trained else 0.6)) as figure:
        axes = figure.add_subplot()
        axes.axvline(dense, color=theme.dense, lw=1, ls=":")
        for row, place, lines in zip(rows, places, details, strict=True):
            _draw(axes, row, place, dense, theme)
            _name(axes, row, place, lines, theme)
        axes.set(xlabel=quality, ylim=(sum(heights), 0), yticks=[])
        axes.spines["left"].set_visible(False)
        values = [dense, *(row.quality for row in rows)]
        if not higher_is_better and max(values) / min(values) > WIDE:
            log_axis(axes, "x", values)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
        quiet(axes, "x")
        if trained:
            marks = [_mark(theme, False), _mark(theme, True)]
            figure.legend(marks, ["not trained", "trained"], loc="outside lower center", ncols=2, frameon=False)
    return figure


def _chosen(rows: Sequence[Row], higher_is_better: bool) -> list[Row]:
    """Return the rows to draw, the best first."""
    ordered = sorted(rows, key=lambda row: -row.quality if higher_is_better else row.quality)
    best = {row.method: row for row in reversed(ordered)}
    others = [row for row in ordered if row is not best[row.method]]
    kept = [*best.values(), *others[: max(ROWS - len(best), 0)]]
    return [row for row in ordered if any(row is each for each in kept)]


def _detail(row: Row) -> str:
    return ", ".join(filter(None, [f"−{row.removed_percent:.1f} %", "trained" * row.trained, row.settings]))


def _look(row_trained: bool, theme: Theme) -> dict[str, Any]:
    return (
        {"color": theme.series[1], "marker": "D", "ms": 6.5}
        if row_trained
        else {"color": theme.pruned, "marker": "o", "ms": 7.5}
    )


def _mark(theme: Theme, trained: bool) -> Line2D:
    return Line2D([], [], ls="", **_look(trained, theme))


def _draw(axes: Axes, row: Row, place: float, dense: float, theme: Theme) -> None:
    look = _look(row.trained, theme)
    axes.plot([dense, row.quality], [place, place], color=look["color"], lw=1.6, alpha=0.5, zorder=2)
    axes.plot(row.quality, place, ls="", zorder=3, clip_on=False, **look)
    # To the right of point and line: the names are on the left.
    axes.annotate(
        f"{row.quality:.1f} %" if dense > 1 else f"× {digits(row.quality, 3)}", (max(row.quality, dense), place), (8, 0),
        textcoords="offset points", va="center", annotation_clip=False,
    )  # fmt: skip


def _name(axes: Axes, row: Row, place: float, lines: Sequence[str], theme: Theme) -> None:
    """Write a row's method to the left of the axes, and its details below in small type."""
    top = place - (FIRST + NEXT * len(lines)) / 2
    small: dict[str, Any] = {"fontsize": SMALL, "color": theme.dense}
    heights = [FIRST / 2 + 0.01, *(FIRST - 0.01 + NEXT * (number + 0.35) for number in range(len(lines)))]
    for number, (line, height) in enumerate(zip([row.method, *lines], heights, strict=True)):
        axes.annotate(
            line, (0, top + height), (-6, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points", ha="right",
            va="center", annotation_clip=False, **(small if number else {}),
        )  # fmt: skip
