"""The report's page: all results of a run in one HTML file that can be read offline, on a phone or in print.

The page depends on the run's files alone. Times vary from run to run and are not among these files; a caller that has measured
them passes them in, and gets the same page with them.
"""

import base64
import csv
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from replaceme.base.config import settings_yaml
from replaceme.base.files import read_json, without_folder, write_text
from replaceme.base.parameters import Params
from replaceme.base.plan import Block, load_blocks
from replaceme.base.versions import listed
from replaceme.base.workspace import Workspace
from replaceme.methods.registry import FIELDS, criterion_of
from replaceme.models.embedded import MODELS
from replaceme.report import sentences, tables
from replaceme.report.figures import curves, cut_map, layer_figures, residual_path, score_figure
from replaceme.report.published_table import LABEL
from replaceme.report.theme import DARK, DPI, LIGHT, Theme, png

# Pixels of a PNG file per CSS pixel of the page.
DENSITY = DPI / 96
SETTINGS_FILE, PICTURES = "params.yaml", "pictures"


@dataclass(frozen=True)
class Picture:
    """A picture for light and dark pages (PNG), and its alternative text."""

    light: bytes
    dark: bytes
    words: str

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in CSS pixels."""
        width, height = struct.unpack(">II", self.light[16:24])
        return round(width / DENSITY), round(height / DENSITY)


@dataclass(frozen=True)
class Page:
    """A report: the page, and separately the pictures and settings that it contains."""

    html: str
    pictures: Mapping[str, Picture]
    settings: str

    def save(self, folder: Path) -> None:
        """Write ``index.html``, ``params.yaml`` and, in light colours, ``pictures/<name>.png`` into ``folder``."""
        write_text(folder / "index.html", self.html)
        write_text(folder / SETTINGS_FILE, self.settings)
        (folder / PICTURES).mkdir()
        for name, picture in self.pictures.items():
            (folder / PICTURES / f"{name}.png").write_bytes(picture.light)


def render(
    params: Params, work: Workspace, speed: Mapping[str, Any] | None = None, cost: Mapping[str, Any] | None = None
) -> Page:
    """Make the report of a finished run.

    Args:
        params: the run's settings.
        work: the folder with its results.
        speed: measured times: ``prefill_seconds`` and ``decode_seconds_per_token`` (each ``dense``, ``pruned``, ``speedup``),
            and ``prompt_tokens``, ``new_tokens``, ``batch_size``, ``rounds``, ``dtype``, ``device``, ``threads``, ``machine``.
        cost: what the compression cost, as in metrics/compression.json.

    Raises:
        ResourceError: a result is missing, because the stage that writes it has not run.
    """
    profile, blocks = read_json(work.profile / "profile.json"), load_blocks(work.blocks)
    evaluation, solved = read_json(work.metric("evaluation")), read_json(work.metric("solve"))
    distances, residuals, layers = profile["angular_distance"], profile["residual"], profile["layers"]
    repaired, edits = read_json(work.metric("repair")), read_json(work.edits / "edits.json")
    fits = _fits(solved, repaired)
    made_with = read_json(work.text_versions) | read_json(work.model_versions) | read_json(work.score_versions)
    pictures = {
        "distances": _map(distances, "angular distance (half turns)", blocks),
        "cut_residuals": _map(residuals, "relative residual of a linear map", blocks),
        "layers": _picture(lambda theme: layer_figures(layers, blocks, theme), sentences.layer_words(layers, blocks)),
        "scores": _picture(lambda theme: score_figure(evaluation, theme), sentences.score_words(evaluation)),
        "residuals": _residual_picture(params, _points(work.solution / "residuals.csv", "alpha", "relative_residual"), solved),
        "loss": _curves(
            {"objective": _points(work.solution / "loss.csv", "iteration", "loss")}, "iteration", "objective per token"
        ),
        "repairs": _curves(
            {"after each linear": _points(work.edits / "repairs.csv", "layer", "residual_after")}, "layer", "relative residual"
        ),
        "training": _curves(
            {
                "documents of the step": _points(work.edits / "loss.tsv", "step", "loss"),
                "held-out documents": _points(work.edits / "held_out_loss.tsv", "step", "held_out_loss"),
            },
            "step",
            "training loss",
        ),
    }
    settings = settings_yaml(params, FIELDS)
    drawn = {name: picture for name, picture in pictures.items() if picture}
    html = _TEMPLATES.get_template("page.html").render(
        model=without_folder(params.model_path),
        method=edits["title"],
        parts=edits["parts"],
        removed=sum(map(len, blocks)),
        layers=len(distances),
        outcome=sentences.outcome(evaluation),
        continuations=read_json(work.continuations),
        accuracy=tables.accuracy_table(evaluation),
        divergence=tables.divergence_table(evaluation),
        perplexity=tables.perplexity_table(evaluation),
        size=tables.size_table(evaluation),
        times=tables.times_table(speed) if speed else None,
        cost=tables.cost_table(cost) if cost else None,
        cut=sentences.cut_sentences(distances, residuals, blocks, criterion_of(params).words, read_json(work.metric("select"))),
        parts_table=tables.parts_table(repaired) if edits["parts"] else None,
        layer_reading=sentences.layer_sentences(layers, blocks),
        fit=sentences.fit_sentences(fits),
        fit_table=tables.fit_table(fits),
        repair=sentences.repair_sentence(repaired),
        heal=sentences.heal_sentence(read_json(work.metric("heal"))),
        proof=sentences.proof_sentence(read_json(work.metric("export")), blocks),
        published=tables.published_table(LABEL),
        about=MODELS[params.model_path].about if params.model_path in MODELS else "",
        settings=settings,
        versions=listed(made_with),
        pictures=drawn,
    )
    return Page(html, drawn, settings)


def _map(values: list[list[float]], label: str, blocks: tuple[Block, ...]) -> Picture | None:
    return _picture(lambda theme: cut_map(values, label, blocks, theme), sentences.map_words(label, values, blocks))


def _fits(solved: Mapping[str, Any], repaired: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the figures of each block by its name; a single block has the empty name."""
    later = {key.replace("block", "block "): value for key, value in repaired.items() if isinstance(value, Mapping)}
    if later.keys() <= {"block 0"}:
        # With narrower MLPs, the first block is fitted in repair too.
        return {"": {**solved, **later.get("block 0", {})}}
    return {"block 0": solved, **later}


def _points(path: Path, x: str, y: str) -> list[tuple[float, float]]:
    """Return two columns of a table (CSV or TSV)."""
    with path.open(encoding="utf-8", newline="") as lines:
        return [
            (float(row[x]), float(row[y])) for row in csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")
        ]


def _residual_picture(params: Params, rows: list[tuple[float, float]], solved: Mapping[str, Any]) -> Picture | None:
    if not rows or "relative_residual" not in solved:
        return None
    chosen, smallest = (params.alpha, solved["relative_residual"]), solved["smallest_eigenvalue"]
    return _picture(lambda theme: residual_path(rows, chosen, smallest, theme), sentences.residual_words(rows, chosen))


def _curves(lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str) -> Picture | None:
    if not any(lines.values()):
        return None
    return _picture(lambda theme: curves(lines, x, y, theme), sentences.curve_words(lines, x, y))


def _picture(draw: Callable[[Theme], Figure | None], words: str) -> Picture | None:
    light, dark = draw(LIGHT), draw(DARK)
    return Picture(png(light), png(dark), words) if light and dark else None


def _embedded(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def _breakable(text: str) -> Markup:
    """Allow line breaks after the underscores of a long task name."""
    return escape(text).replace("_", Markup("_<wbr>"))


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters |= {"embedded": _embedded, "breakable": _breakable}
