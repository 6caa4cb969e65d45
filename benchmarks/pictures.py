"""Draw the pictures of the committed records: ``python -m benchmarks.pictures`` writes docs/images/{healing,text_sizes}.png."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from replaceme.report.theme import LIGHT, WIDTH, drawing, set_grid, set_log_scale, to_png

DOCS = Path(__file__).resolve().parent.parent / "docs"
# What the healing of each curve began with.
OWN = "repair, a quarter of its text its own"
STARTS = {"4 of 30": "repair, 64k tokens", "8 of 30": OWN}
# The best setting of each, which has another start or other text than the rest of its curve.
BEST = {"4 of 30": OWN, "8 of 30": f"{OWN}; more fresh text"}


def main() -> None:
    """Draw them."""
    sizes = pd.read_csv(DOCS / "records" / "text_sizes.csv")
    minutes = sizes["seconds"] / 60
    sizes = sizes.assign(x=minutes, said=(sizes["tokens"] / 1024).map("{:.0f}k".format), best=False)
    runs = pd.read_csv(DOCS / "records" / "quality.csv")
    runs = runs.assign(best=runs["start"] == runs["layers"].map(BEST))
    runs = runs[(runs["start"] == runs["layers"].map(STARTS)) | runs["best"]]
    runs = runs.assign(x=runs["heal_tokens"] / 1000, said=runs["unseen_ratio"].map("{:.2f}".format))
    for name, rows, label, limits in (
        ("text_sizes", sizes, "minutes of the compression", (0, minutes.max() + 0.7)),
        ("healing", runs, "tokens trained on (thousands)", (-30, 1130)),
    ):
        (DOCS / "images" / f"{name}.png").write_bytes(to_png(draw_curves(rows, label, limits)))


def draw_curves(runs: pd.DataFrame, label: str, limits: tuple[float, float]) -> Figure:
    """Draw the perplexity of unseen text against ``x``, each point with what is ``said``: a curve for each number of layers.

    A point that is ``best`` stands for itself.
    """
    with drawing(LIGHT, 0.8 * WIDTH) as figure:
        axes = figure.add_subplot()
        for number, (layers, own) in enumerate(runs.sort_values("x").groupby("layers")):
            look: Any = {"color": LIGHT.series[number], "marker": "os"[number], "capsize": 2, "lw": 1.6, "ms": 5.5}
            curve, best = own[~own["best"]], own[own["best"]]
            axes.errorbar(curve["x"], curve["unseen_ratio"], curve["unseen_stderr"], label=f"{layers} layers removed", **look)
            if len(best):
                look |= {"ls": "", "mfc": "white", "label": f"{layers}, best setting"}
                axes.errorbar(best["x"], best["unseen_ratio"], best["unseen_stderr"], **look)
            for x, ratio, said, apart in own[["x", "unseen_ratio", "said", "best"]].itertuples(index=False):
                axes.annotate(said, (x, ratio), (4, -16 if apart else 6), textcoords="offset points")
        axes.set(xlabel=label, ylabel="perplexity of unseen text (times dense)", xlim=limits)
        set_log_scale(axes, "y", [1.0, 2.0, *runs["unseen_ratio"]])
        set_grid(axes, "both")
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


if __name__ == "__main__":
    main()
