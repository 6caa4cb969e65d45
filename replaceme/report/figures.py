"""The figures of one run: the map of all blocks, the layers, the scores, the ridge path, and curves of loops.

Each function draws on a matplotlib ``Figure`` for a light or a dark page, and returns None if there is nothing to show.
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
from replaceme.report.theme import WIDTH, Theme, drawing, set_grid, set_log_scale

# The side of a frame, at least, as a fraction of the map: single cells of a large model's map are too small.
FRAME = 1 / 28


def draw_block_map(values: Sequence[Sequence[float]], label: str, blocks: Sequence[Block], theme: Theme) -> Figure:
    """Draw a heat map of a figure over all blocks, by the layer before the block (x) and the last removed layer (y).

    Args:
        values: layers × layers, by the layer before the block and the last removed layer.
        label: name of the figure.
        blocks: the removed blocks, if any; they are framed, and a thin line runs through all blocks of the same size.
        theme: the colours.
    """
    layers = len(values)
    above = [[values[before][last] if last > before else math.nan for before in range(layers)] for last in range(layers)]
    with drawing(theme, WIDTH * 0.86) as figure:
        axes = figure.add_subplot()
        image = axes.imshow(above, origin="lower", cmap="viridis", interpolation="nearest")
        bar = figure.colorbar(image, ax=axes, shrink=0.82, pad=0.02, aspect=24)
        bar.set_label(label)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        if blocks:
            _draw_sizes(axes, sorted({len(block) for block in blocks}, reverse=True), layers)
            frame = Line2D([], [], marker="s", ls="", mfc="none", mec=theme.mark, mew=2, ms=9)
            axes.legend([frame], ["removed block" if len(blocks) == 1 else "removed blocks"], loc="lower right", frameon=False)
        side, halo = max(1.3, layers * FRAME), [patheffects.withStroke(linewidth=4, foreground=theme.background)]
        for block in blocks:
            corner = block.start - 1 - side / 2, block.end - 1 - side / 2
            axes.add_patch(Rectangle(corner, side, side, fill=False, ec=theme.mark, lw=2, path_effects=halo, zorder=4))
        axes.set(xlabel="layer before the block", ylabel="last removed layer")
        _use_whole_numbers(axes)
        axes.yaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.tick_params(length=2)
    return figure


def _draw_sizes(axes: Axes, sizes: Sequence[int], layers: int) -> None:
    """Draw a diagonal through all blocks of each size, and write the sizes above the map, from left to right."""
    halo = [patheffects.withStroke(linewidth=2.2, foreground="black", alpha=0.35)]
    for size in sizes:
        axes.plot([-0.5, layers - size - 0.5], [size - 0.5, layers - 0.5], color="white", lw=0.9, path_effects=halo)
    text, middle = f"{', '.join(map(str, sizes))} layer{'s' * (sizes != [1])}", layers - sum(sizes) / len(sizes) - 0.5
    axes.annotate(text, (middle, layers - 0.5), (0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=10)


def draw_layers(layers: Mapping[str, Sequence[float]], blocks: Sequence[Block], theme: Theme) -> Figure:
    """Draw block influence, and mean and largest token norm, by layer; the removed layers are shaded.

    Args:
        layers: ``block_influence``, ``mean_norm`` and ``max_norm``, one number per layer.
        blocks: the removed blocks.
        theme: the colours.
    """
    largest, mean = (theme.series[1], "^", "largest"), (theme.pruned, "o", "mean")
    panels: tuple[tuple[str, dict[str, tuple[str, str, str]]], ...] = (
        ("Block influence: 1 − cosine of input and output", {"block_influence": (theme.pruned, "o", "")}),
        ("Token norm after each layer", {"max_norm": largest, "mean_norm": mean}),
    )
    with drawing(theme, WIDTH * 0.95) as figure:
        grid = figure.subplots(2, 1, sharex=True)
        for axes, (title, lines) in zip(grid, panels, strict=True):
            for key, (colour, marker, label) in lines.items():
                axes.plot(layers[key], color=colour, marker=marker, ms=3.5, lw=1.2, label=label)
            for number, block in enumerate(blocks):
                axes.axvspan(block.start - 0.5, block.end - 0.5, color=theme.shade, lw=0, label="removed" * (number == 0))
            set_log_scale(axes, "y", [value for key in lines for value in layers[key] if value > 0])
            axes.set_title(title)
            set_grid(axes)
        figure.legend(*grid[1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        grid[1].set_xlabel("layer")
        _use_whole_numbers(grid[1])
    return figure


def draw_scores(evaluation: Mapping[str, Any], theme: Theme) -> Figure | None:
    """Draw the scores of both models with error bars of one standard error; None without scores.

    Args:
        evaluation: the content of metrics/evaluation.json.
        theme: the colours.
    """
    titles = {"accuracy": "Accuracy (%), more is better", "perplexity": "Perplexity (log axis), less is better"}
    panels = [(kind, title, evaluation[kind]) for kind, title in titles.items() if evaluation.get(kind)]
    if not panels:
        return None
    heights = [0.62 + 0.54 * len(tasks) for _, _, tasks in panels]
    with drawing(theme, sum(heights) + 0.4) as figure:
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (kind, title, tasks) in zip(grid, panels, strict=True):
            ends = _draw_tasks(axes, tasks, 100 if kind == "accuracy" else 1, theme)
            if kind == "perplexity":
                set_log_scale(axes, "x", [end for end in ends if end > 0])
            axes.set_title(title)
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw_tasks(axes: Axes, tasks: Mapping[str, Mapping[str, float]], factor: float, theme: Theme) -> list[float]:
    """Draw one line per task, with its name above it, so that a long one takes no width; return the ends of the error bars."""
    ends = []
    for row, (name, task) in enumerate(tasks.items()):
        axes.axhline(row, color=theme.grid, lw=0.8, zorder=0)
        axes.annotate(
            name, (0, row), (0, 9), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=10,
            color=theme.text, va="bottom",
        )  # fmt: skip
        for side, colour, marker, shift in (("dense", theme.dense, "o", 0), ("pruned", theme.pruned, "D", 0.2)):
            value, error = factor * task[side], factor * task.get(f"stderr_{side}", 0)
            ends += [value - error, value + error]
            axes.errorbar(
                value, row + shift, xerr=error, color=colour, marker=marker, ms=5.5, capsize=3, lw=1.4, ls="",
                label=side if row == 0 else None,
            )  # fmt: skip
    axes.set_ylim(len(tasks) - 0.5, -0.8)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    set_grid(axes, "x")
    return ends


def draw_ridge_path(
    rows: Sequence[tuple[float, float]], chosen: tuple[float, float], smallest_eigenvalue: float, theme: Theme
) -> Figure | None:
    """Draw the relative residual against the ridge α; None without a positive α.

    Args:
        rows: pairs of α and relative residual.
        chosen: the pair of this run.
        smallest_eigenvalue: of ``MᵀM``, drawn as a vertical line; below it, α changes little.
        theme: the colours.
    """
    if not any(alpha > 0 for alpha, _ in rows):
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
        alphas = [chosen[0], *(alpha for alpha, _ in rows)]
        positive = [alpha for alpha in (*alphas, smallest_eigenvalue) if alpha > 0]
        axes.set_xscale("log")
        if min(alphas) == 0:
            # A logarithmic axis can't show α = 0: below the smallest α, this axis is linear down to 0.
            straight = 10 ** math.floor(math.log10(min(positive)))
            axes.set_xscale("symlog", linthresh=straight, linscale=0.5)
            axes.set_xlim(-0.2 * straight, 2 * max(positive))
        axes.margins(y=0.12)
        axes.set(xlabel="α", ylabel="relative residual")
        set_grid(axes, "both")
        axes.legend(loc="best", framealpha=1)
    return figure


def draw_curves(lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, theme: Theme) -> Figure | None:
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
            set_log_scale(axes, "y", values)
        axes.set(xlabel=x, ylabel=y)
        _use_whole_numbers(axes)
        set_grid(axes, "both")
        if len(lines) > 1:
            axes.legend(loc="best")
    return figure


def _use_whole_numbers(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
