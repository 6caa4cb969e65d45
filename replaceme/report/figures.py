"""The pictures of one run: the map of all blocks, the layers' figures, the scores, the ridge path and curves.

Each function returns a matplotlib ``Figure`` for a light or a dark page, or None if there is nothing to show;
``replaceme.report.theme.png`` turns it into bytes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from replaceme.base.plan import Block
from replaceme.report.theme import LIGHT, WIDTH, Theme, drawing, log_axis, quiet

# The side of a frame, at least, as a fraction of the map: single cells of a large model's map are too small.
FRAME = 1 / 28


def cut_map(values: Sequence[Sequence[float]], label: str, blocks: Sequence[Block], theme: Theme = LIGHT) -> Figure:
    """Draw a heat map of a figure over all blocks: host layer on the x axis, last removed layer on the y axis.

    Args:
        values: layers × layers, by host and last removed layer.
        label: name of the figure.
        blocks: the removed blocks, if any; they are framed, and a thin line runs through all blocks of the same size.
        theme: the colours.
    """
    layers = len(values)
    above = [[values[host][last] if last > host else math.nan for host in range(layers)] for last in range(layers)]
    with drawing(theme, WIDTH * 0.86) as figure:
        axes = figure.add_subplot()
        image = axes.imshow(above, origin="lower", cmap="viridis", interpolation="nearest")
        bar = figure.colorbar(image, ax=axes, shrink=0.82, pad=0.02, aspect=24)
        bar.set_label(label)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        if blocks:
            _same_size(axes, sorted({len(block) for block in blocks}, reverse=True), layers)
            frame = Line2D([], [], marker="s", ls="", mfc="none", mec=theme.mark, mew=2, ms=9)
            axes.legend([frame], ["removed block" if len(blocks) == 1 else "removed blocks"], loc="lower right", frameon=False)
        for block in blocks:
            _frame(axes, block, max(1.3, layers * FRAME), theme)
        axes.set(xlabel="host layer", ylabel="last removed layer")
        _whole_numbers(axes)
        axes.yaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.tick_params(length=2)
    return figure


def _same_size(axes: Axes, sizes: Sequence[int], layers: int) -> None:
    """Draw a diagonal through all blocks of each size, and write the sizes above the map, from left to right."""
    halo = [patheffects.withStroke(linewidth=2.2, foreground="black", alpha=0.35)]
    for size in sizes:
        ends = [-0.5, layers - size - 0.5], [size - 0.5, layers - 0.5]
        axes.plot(*ends, color="white", lw=0.9, path_effects=halo)
    middle = layers - sum(sizes) / len(sizes) - 0.5
    axes.annotate(
        f"{', '.join(map(str, sizes))} layer{'s' * (sizes != [1])}", (middle, layers - 0.5), (0, 3),
        textcoords="offset points", ha="center", va="bottom", fontsize=10,
    )  # fmt: skip


def _frame(axes: Axes, block: Block, side: float, theme: Theme) -> None:
    corner = block.host - side / 2, block.end - 1 - side / 2
    halo = [patheffects.withStroke(linewidth=4, foreground=theme.background)]
    axes.add_patch(Rectangle(corner, side, side, fill=False, ec=theme.mark, lw=2, path_effects=halo, zorder=4))


def layer_figures(layers: Mapping[str, Sequence[float]], blocks: Sequence[Block], theme: Theme = LIGHT) -> Figure:
    """Draw block influence, and mean and largest token norm, by layer; the removed layers are shaded.

    Args:
        layers: ``block_influence``, ``mean_norm`` and ``max_norm``, one number per layer.
        blocks: the removed blocks.
        theme: the colours.
    """
    with drawing(theme, WIDTH * 0.95) as figure:
        influence, norm = figure.subplots(2, 1, sharex=True)
        curves = [
            (influence, "block_influence", "block influence", theme.pruned, "o", "-"),
            (norm, "max_norm", "largest", theme.series[1], "^", "-"),
            (norm, "mean_norm", "mean", theme.pruned, "o", "-"),
        ]
        for axes, key, label, colour, marker, line in curves:
            axes.plot(layers[key], line, color=colour, marker=marker, ms=3.5, lw=1.2, label=label)
        for axes, keys, title in (
            (influence, ["block_influence"], "Block influence: 1 − cosine of input and output"),
            (norm, ["max_norm", "mean_norm"], "Token norm after each layer"),
        ):
            for number, block in enumerate(blocks):
                axes.axvspan(block.start - 0.5, block.end - 0.5, color=theme.shade, lw=0, label="removed" * (number == 0))
            log_axis(axes, "y", [value for key in keys for value in layers[key] if value > 0])
            axes.set_title(title)
            quiet(axes)
        handles, labels = norm.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        norm.set_xlabel("layer")
        _whole_numbers(norm)
    return figure


def score_figure(evaluation: Mapping[str, Any], theme: Theme = LIGHT) -> Figure | None:
    """Draw the scores of both models with error bars of one standard error; None without scores.

    Args:
        evaluation: the content of metrics/evaluation.json.
        theme: the colours.
    """
    panels = [
        (title, factor, tasks)
        for title, factor, tasks in (
            ("Accuracy (%), more is better", 100, evaluation.get("accuracy")),
            ("Perplexity (log axis), less is better", 1, evaluation.get("perplexity")),
        )
        if tasks
    ]
    if not panels:
        return None
    heights = [0.62 + 0.54 * len(tasks) for _, _, tasks in panels]
    with drawing(theme, sum(heights) + 0.4) as figure:
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (title, factor, tasks) in zip(grid, panels, strict=True):
            _score_panel(axes, tasks, factor, theme)
            if factor == 1:
                log_axis(axes, "x", _ends(tasks))
            axes.set_title(title)
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _score_panel(axes: Axes, tasks: Mapping[str, Mapping[str, float]], factor: float, theme: Theme) -> None:
    """Draw one line per task, with the task's name above it: a long name then takes no width from the scores."""
    for row, (name, task) in enumerate(tasks.items()):
        axes.axhline(row, color=theme.grid, lw=0.8, zorder=0)
        axes.annotate(
            name, (0, row), (0, 9), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=10,
            color=theme.text, va="bottom",
        )  # fmt: skip
        for side, colour, marker, shift in (("dense", theme.dense, "o", 0), ("pruned", theme.pruned, "D", 0.2)):
            axes.errorbar(
                factor * task[side], row + shift, xerr=factor * task.get(f"stderr_{side}", 0), color=colour, marker=marker,
                ms=5.5, capsize=3, lw=1.4, label=side if row == 0 else None, ls="",
            )  # fmt: skip
    axes.set_ylim(len(tasks) - 0.5, -0.8)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    quiet(axes, "x")


def _ends(tasks: Mapping[str, Mapping[str, float]]) -> list[float]:
    """Return the ends of all error bars that a logarithmic axis can show."""
    ends = [
        task[side] + sign * task.get(f"stderr_{side}", 0)
        for task in tasks.values() for side in ("dense", "pruned") for sign in (-1, 1)
    ]  # fmt: skip
    return [end for end in ends if end > 0]


def residual_path(
    rows: Sequence[tuple[float, float]],
    chosen: tuple[float, float],
    smallest_eigenvalue: float,
    theme: Theme = LIGHT,
) -> Figure | None:
    """Draw the relative residual against the ridge α; None without a positive α.

    Args:
        rows: pairs of α and relative residual.
        chosen: the pair of this run.
        smallest_eigenvalue: of ``MᵀM``, drawn as a vertical line; below it, α changes little.
        theme: the colours.
    """
    positive = [alpha for alpha, _ in rows if alpha > 0]
    if not positive:
        return None
    with drawing(theme, WIDTH * 0.66) as figure:
        axes = figure.add_subplot()
        axes.plot(*zip(*sorted(rows), strict=True), color=theme.pruned, marker="o", ms=4, lw=1.4, label="ridge path")
        axes.plot(
            *chosen, color=theme.mark, marker="D", ms=8, ls="", clip_on=False, zorder=4, label=f"this run: α = {chosen[0]:g}"
        )
        if smallest_eigenvalue > 0:
            label = f"smallest eigenvalue: {smallest_eigenvalue:.4g}"
            axes.axvline(smallest_eigenvalue, color=theme.text, lw=1, ls="--", label=label)
        alphas = [alpha for alpha in (*positive, chosen[0], smallest_eigenvalue) if alpha > 0]
        if min(chosen[0], *(alpha for alpha, _ in rows)) == 0:
            # A logarithmic axis can't show α = 0: below the smallest α, this axis is linear down to 0.
            straight = 10 ** math.floor(math.log10(min(alphas)))
            axes.set_xscale("symlog", linthresh=straight, linscale=0.5)
            axes.set_xlim(-0.2 * straight, 2 * max(alphas))
        else:
            axes.set_xscale("log")
        axes.margins(y=0.12)
        axes.set(xlabel="α", ylabel="relative residual")
        quiet(axes, "both")
        axes.legend(loc="best", framealpha=1)
    return figure


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, theme: Theme = LIGHT) -> Figure | None:
    """Draw what changes in the course of a loop or of the layers; None without points.

    Args:
        lines: name → pairs of x, whole numbers, and y; a single line is not named in the picture.
        x: label of the x axis.
        y: label of the y axis, which is logarithmic if all values are positive.
        theme: the colours.
    """
    lines = {name: pairs for name, pairs in lines.items() if pairs}
    if not lines:
        return None
    with drawing(theme, WIDTH * 0.6) as figure:
        axes = figure.add_subplot()
        for colour, marker, (name, pairs) in zip(theme.series, "o^sD", lines.items(), strict=False):
            shape = marker if len(pairs) < 40 else ""
            axes.plot(*zip(*pairs, strict=True), color=colour, marker=shape, ms=4, lw=1.4, label=name)
        values = [value for pairs in lines.values() for _, value in pairs]
        if min(values) > 0:
            log_axis(axes, "y", values)
        axes.set(xlabel=x, ylabel=y)
        _whole_numbers(axes)
        quiet(axes, "both")
        if len(lines) > 1:
            axes.legend(loc="best")
    return figure


def _whole_numbers(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
