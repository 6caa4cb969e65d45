"""Draw the pictures of the committed records: ``python -m benchmarks.pictures`` writes docs/images/{healing,text_sizes}.png."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from replaceme.report.theme import LIGHT, WIDTH, drawing, set_grid, set_log_scale, to_png

DOCS = Path(__file__).resolve().parent.parent / "docs"
# What the healing of each curve began with.
STARTS = {"4 of 30": "repair, 64k tokens", "8 of 30": "repair, 64k tokens, a quarter of them its own"}


def main() -> None:
    """Draw them."""
    sizes = pd.read_csv(DOCS / "records" / "text_sizes.csv")
    (DOCS / "images" / "text_sizes.png").write_bytes(to_png(draw_text_sizes(sizes)))
    runs = pd.read_csv(DOCS / "records" / "quality.csv")
    runs = runs[(runs["model"] == "smollm2-135m-instruct") & (runs["start"] == runs["layers"].map(STARTS))]
    (DOCS / "images" / "healing.png").write_bytes(to_png(draw_healing(runs)))


def draw_text_sizes(runs: pd.DataFrame) -> Figure:
    """Draw the perplexity of unseen text against the minutes of the compression, at each number of calibration tokens."""
    with drawing(LIGHT, 0.8 * WIDTH) as figure:
        axes = figure.add_subplot()
        for number, (layers, own) in enumerate(runs.sort_values("tokens").groupby("layers")):
            minutes = own["seconds"] / 60
            axes.errorbar(
                minutes, own["unseen_ratio"], own["unseen_stderr"], label=f"{layers} layers removed", **look_of(number)
            )
            for x, ratio, tokens in zip(minutes, own["unseen_ratio"], own["tokens"], strict=True):
                axes.annotate(f"{tokens / 1024:.0f}k", (x, ratio), (4, 6), textcoords="offset points")
        axes.set(
            xlabel="minutes of the compression",
            ylabel="perplexity of unseen text (times dense)",
            xlim=(0, runs["seconds"].max() / 60 + 0.7),
        )
        set_log_scale(axes, "y", [1.0, 2.0, *runs["unseen_ratio"]])
        set_grid(axes, "both")
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def look_of(number: int) -> dict[str, Any]:
    """Return how a curve is drawn."""
    return {"color": LIGHT.series[number], "marker": "os"[number], "capsize": 2, "lw": 1.6, "ms": 5.5}


def draw_healing(runs: pd.DataFrame) -> Figure:
    """Draw the perplexity of unseen text against the tokens of the healing, a curve for each number of removed layers."""
    with drawing(LIGHT, 0.8 * WIDTH) as figure:
        axes = figure.add_subplot()
        for number, (layers, own) in enumerate(runs.sort_values("heal_tokens").groupby("layers")):
            thousands = own["heal_tokens"] / 1000
            axes.errorbar(
                thousands, own["unseen_ratio"], own["unseen_stderr"], label=f"{layers} layers removed", **look_of(number)
            )
            for x, ratio in zip(thousands, own["unseen_ratio"], strict=True):
                axes.annotate(f"{ratio:.2f}", (x, ratio), (4, 6), textcoords="offset points")
        axes.set(xlabel="tokens trained on (thousands)", ylabel="perplexity of unseen text (times dense)", xlim=(-30, 1130))
        set_log_scale(axes, "y", [1.0, 2.0, *runs["unseen_ratio"]])
        set_grid(axes, "both")
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


if __name__ == "__main__":
    main()
