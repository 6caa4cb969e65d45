"""Two pictures of experiments: quality against size, and the methods of about the same size, the best on top."""

from textwrap import fill
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from replaceme.report.experiment_table import (
    REMOVED,
    RETENTION,
    SHORT,
    SIZES,
    UNSEEN,
    Comparison,
    find_ratio_columns,
    name_methods,
)
from replaceme.report.formatting import format_digits
from replaceme.report.theme import LIGHT, WIDTH, drawing, set_grid, set_log_scale

# Seven colours and nine shapes: a pair repeats after 63 series.
MARKERS = "os^DvPX<>"
MOST_SERIES = 9
# The best experiment of each method is always among these.
MOST_ROWS = 24
# Characters of a legend's and of a row's line, and their heights in inches.
LEGEND_WIDTH, LEGEND_LINE, ROW_WIDTH, ROW_LINE = 48, 0.21, 30, 0.17
# From this ratio of the largest to the smallest value on, an axis of perplexities is logarithmic.
WIDE = 3.0


def draw_quality(comparison: Comparison) -> Figure:
    """Draw quality against the parameters removed, with the Pareto front, whose points are filled and named by their size.

    Experiments that differ in size alone are a series. With more series than can be told apart, each method is one.
    """
    table, quality = comparison.table, comparison.quality
    dense = get_dense_value(quality)
    series = comparison.name_series()
    if series.nunique() > MOST_SERIES:
        series = name_methods(table)
    names = {name: fill(name, LEGEND_WIDTH, break_on_hyphens=False) for name in sorted(set(series))}
    lines = 2 + sum(name.count("\n") + 1 for name in names.values())
    with drawing(LIGHT, 0.75 * WIDTH + LEGEND_LINE * lines) as figure:
        axes = figure.add_subplot()
        axes.axhline(dense, color=LIGHT.dense, lw=1, ls=":", label="dense")
        front = table[table["best"]].sort_values(REMOVED)
        axes.plot(front[REMOVED], front[quality], color=LIGHT.dense, lw=1.3, label="best for its size", zorder=1)
        for number, (name, label) in enumerate(names.items()):
            own = table[series == name].sort_values(REMOVED)
            colour, marker = LIGHT.series[number % len(LIGHT.series)], MARKERS[number % len(MARKERS)]
            axes.plot([], [], color=colour, marker=marker, ls="", label=label)
            if own[REMOVED].is_unique:
                axes.plot(own[REMOVED], own[quality], color=colour, lw=1, alpha=0.5, zorder=1)
            for is_best, points in own.groupby("best"):
                form: dict[str, Any] = {"ms": 8, "zorder": 3} if is_best else {"ms": 6.5, "mfc": "none", "mew": 1.4}
                axes.plot(points[REMOVED], points[quality], color=colour, marker=marker, ls="", clip_on=False, **form)
        axes.set(
            xlabel="parameters removed (%)", ylabel=get_quality_title(quality), xlim=(0, 1.25 * max(table[REMOVED].max(), 1))
        )
        axes.margins(y=0.14)
        if dense == 1:
            set_log_scale(axes, "y", [dense, *table[quality]])
        axes.xaxis.set_major_locator(MaxNLocator(6))
        set_grid(axes, "both")
        _name_sizes(axes, front, quality)
        figure.legend(loc="outside lower center", frameon=False)
    return figure


def _name_sizes(axes: Axes, front: pd.DataFrame, quality: str) -> None:
    """Write the setting of its size next to each point of the front, on the side of what removes more and keeps more."""
    up = 1 if quality == RETENTION else -1
    last = -axes.get_xlim()[1]
    for _, point in front.iterrows():
        words = [f"{SHORT.get(name, name)} {point[name]}" for name in SIZES if point.get(name, "") not in ("", "null")]
        if point[REMOVED] - last > 0.06 * axes.get_xlim()[1]:  # names side by side can be read
            last, vertical = point[REMOVED], "bottom" if up > 0 else "top"
            axes.annotate(
                ", ".join(words), (point[REMOVED], point[quality]), (5, 3 * up), textcoords="offset points", va=vertical
            )


def draw_methods(comparison: Comparison) -> Figure | None:
    """Draw experiments of about the same size, each as a line from the dense model's quality; None without two methods.

    With several such sizes, the one with the most methods is taken. Perplexity is preferred: it is finer than accuracy.
    """
    rows, quality = _choose_size(comparison)
    if rows.empty:
        return None
    dense = get_dense_value(quality)
    series = [fill(name, ROW_WIDTH, break_on_hyphens=False) for name in comparison.name_series()[rows.index]]
    names = [f"{name}\n−{removed:.1f} %" for name, removed in zip(series, rows[REMOVED], strict=True)]
    heights = [0.12 + ROW_LINE * (name.count("\n") + 1) for name in names]
    centres = [sum(heights[:number]) + height / 2 for number, height in enumerate(heights)]
    looks: dict[str, dict[str, Any]] = {
        "": {"color": LIGHT.pruned, "marker": "o", "ms": 7.5},
        "trained": {"color": LIGHT.series[1], "marker": "D", "ms": 6.5},
    }
    with drawing(LIGHT, sum(heights) + 0.85) as figure:
        axes = figure.add_subplot()
        axes.axvline(dense, color=LIGHT.dense, lw=1, ls=":")
        for y, value, trained in zip(centres, rows[quality], rows["trained"], strict=True):
            axes.plot([dense, value], [y, y], color=looks[trained]["color"], lw=1.6, alpha=0.5, zorder=2)
            axes.plot(value, y, ls="", zorder=3, clip_on=False, **looks[trained])
            text = f"{value:.1f} %" if quality == RETENTION else f"× {format_digits(value, 3)}"
            # To the right of point and line: the names are on the left.
            axes.annotate(text, (max(value, dense), y), (8, 0), textcoords="offset points", va="center")
        axes.set(xlabel=get_quality_title(quality), ylim=(sum(heights), 0))
        axes.set_yticks(centres, names)
        axes.spines["left"].set_visible(False)
        if dense == 1 and rows[quality].max() > WIDE * min(1, rows[quality].min()):
            set_log_scale(axes, "x", [dense, *rows[quality]])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
        set_grid(axes, "x")
        if rows["trained"].any():
            marks = [Line2D([], [], ls="", **look) for look in looks.values()]
            figure.legend(marks, ["not trained", "trained"], loc="outside lower center", ncols=2, frameon=False)
    return figure


def _choose_size(comparison: Comparison) -> tuple[pd.DataFrame, str]:
    """Return the rows of the methods' picture, the best first, and the figure that they are compared by."""
    table, quality = comparison.table, comparison.quality
    methods = table.groupby("size")["method"].nunique()
    rows = table[table["size"] == methods[methods == methods.max()].index.max()]
    if methods.max() < 2:
        return rows[:0], quality
    if quality != UNSEEN:
        quality = next((name for name in find_ratio_columns(rows) if rows[name].notna().all()), quality)
    rows = rows.sort_values(quality, ascending=quality != RETENTION, kind="stable")
    is_other = rows.duplicated("method")
    kept = [*rows.index[~is_other], *rows.index[is_other][: MOST_ROWS - int((~is_other).sum())]]
    return rows[rows.index.isin(kept)], quality


def get_dense_value(quality: str) -> float:
    """Return the dense model's value of a figure that experiments are ranked by."""
    return 100.0 if quality == RETENTION else 1.0


def get_quality_title(quality: str) -> str:
    """Return the title of an axis."""
    if quality == RETENTION:
        return "accuracy kept (% of dense)"
    text = "unseen text" if quality == UNSEEN else quality.split(".", 1)[1].removesuffix(".ratio")
    return f"perplexity of {text} (times dense)"
