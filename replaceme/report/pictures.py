"""The page's pictures, each as PNG for light and for dark pages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from replaceme.base.plan import Block
from replaceme.report.figures import draw_block_map, draw_curves, draw_layers, draw_ridge_path, draw_scores
from replaceme.report.formatting import Figures
from replaceme.report.theme import DARK, LIGHT, to_png
from replaceme.running.workspace import Workspace

# CSS pixels of the page per inch.
CSS_DPI = 96


@dataclass(frozen=True)
class Picture:
    """A picture (PNG) for light and dark pages, with its width and height in CSS pixels."""

    light: bytes
    dark: bytes
    size: tuple[int, int]


def draw_pictures(
    work: Workspace, profile: Figures, blocks: Sequence[Block], evaluation: Figures, solved: Figures, alpha: float
) -> dict[str, Picture]:
    """Return a run's pictures by name, without those that have nothing to show.

    Args:
        work: the folder with the run's results.
        profile: the content of its profile.json.
        blocks: the removed blocks.
        evaluation: the content of metrics/evaluation.json.
        solved: the content of metrics/solve.json.
        alpha: the run's ridge.
    """
    objective = {"objective": _read_points(work.solution / "loss.csv", "iteration", "loss")}
    repairs = {"residual": _read_points(work.repaired / "repairs.csv", "layer", "residual_after")}
    training = {
        "documents of the step": _read_points(work.edits / "loss.tsv", "step", "loss"),
        "held-out documents": _read_points(work.edits / "held_out_loss.tsv", "step", "held_out_loss"),
    }
    pictures = {
        "distances": _draw_themes(draw_block_map, profile["angular_distance"], "angular distance (half turns)", blocks),
        "cut_residuals": _draw_themes(draw_block_map, profile["residual"], "relative residual of a linear map", blocks),
        "layers": _draw_themes(draw_layers, profile["layers"], blocks),
        "scores": _draw_themes(draw_scores, evaluation),
        "loss": _draw_themes(draw_curves, objective, "iteration", "objective per token"),
        "repairs": _draw_themes(draw_curves, repairs, "layer", "relative residual"),
        "training": _draw_themes(draw_curves, training, "step", "training loss"),
    }
    # Only ridges have a path.
    path = _read_points(work.solution / "residuals.csv", "alpha", "relative_residual")
    if path and "relative_residual" in solved:
        chosen = alpha, solved["relative_residual"]
        pictures["residuals"] = _draw_themes(draw_ridge_path, path, chosen, solved["smallest_eigenvalue"])
    return {name: picture for name, picture in pictures.items() if picture}


def _draw_themes(draw: Callable[..., Figure | None], *arguments: Any) -> Picture | None:
    light, dark = (draw(*arguments, theme) for theme in (LIGHT, DARK))
    if not light or not dark:
        return None
    width, height = light.get_size_inches() * CSS_DPI
    return Picture(to_png(light), to_png(dark), (round(width), round(height)))


def _read_points(path: Path, x: str, y: str) -> list[tuple[float, float]]:
    """Return two columns of a table (CSV or TSV)."""
    table = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
    return list(zip(table[x].astype(float), table[y].astype(float), strict=True))
