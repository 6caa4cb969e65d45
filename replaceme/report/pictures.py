"""The page's pictures, each as PNG for light and for dark pages."""

import csv
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from replaceme.base.plan import Block
from replaceme.report.figures import draw_block_map, draw_curves, draw_layers, draw_ridge_path, draw_scores
from replaceme.report.formatting import Figures
from replaceme.report.theme import DARK, DPI, LIGHT, to_png
from replaceme.running.workspace import Workspace

# Pixels of a PNG file per CSS pixel of the page.
DENSITY = DPI / 96


@dataclass(frozen=True)
class Picture:
    """A picture (PNG) for light and dark pages."""

    light: bytes
    dark: bytes

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in CSS pixels."""
        width, height = struct.unpack(">II", self.light[16:24])
        return round(width / DENSITY), round(height / DENSITY)


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
    repairs = {"residual": _read_points(work.edits / "repairs.csv", "layer", "residual_after")}
    training = {
        "documents of the step": _read_points(work.edits / "loss.tsv", "step", "loss"),
        "held-out documents": _read_points(work.edits / "held_out_loss.tsv", "step", "held_out_loss"),
    }
    pictures = {
        "distances": _draw(draw_block_map, profile["angular_distance"], "angular distance (half turns)", blocks),
        "cut_residuals": _draw(draw_block_map, profile["residual"], "relative residual of a linear map", blocks),
        "layers": _draw(draw_layers, profile["layers"], blocks),
        "scores": _draw(draw_scores, evaluation),
        "loss": _draw(draw_curves, objective, "iteration", "objective per token"),
        "repairs": _draw(draw_curves, repairs, "layer", "relative residual"),
        "training": _draw(draw_curves, training, "step", "training loss"),
    }
    # Only ridges have a path.
    path = _read_points(work.solution / "residuals.csv", "alpha", "relative_residual")
    if path and "relative_residual" in solved:
        chosen = alpha, solved["relative_residual"]
        pictures["residuals"] = _draw(draw_ridge_path, path, chosen, solved["smallest_eigenvalue"])
    return {name: picture for name, picture in pictures.items() if picture}


def _draw(draw: Callable[..., Figure | None], *arguments: Any) -> Picture | None:
    light, dark = (draw(*arguments, theme) for theme in (LIGHT, DARK))
    return Picture(to_png(light), to_png(dark)) if light and dark else None


def _read_points(path: Path, x: str, y: str) -> list[tuple[float, float]]:
    """Return two columns of a table (CSV or TSV)."""
    with path.open(encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")
        return [(float(row[x]), float(row[y])) for row in rows]
