"""The report's page: all results of a run in one HTML file that can be read offline, on a phone or in print.

The page depends on the run's files alone. Times vary from run to run and are not among these files; a caller that has measured
them passes them in, and gets the same page with them.
"""

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from replaceme.base.config import WITHOUT_EFFECT, settings_yaml
from replaceme.base.files import read_json, without_folder, write_text
from replaceme.base.parameters import Params
from replaceme.base.plan import group_adjacent, load_blocks
from replaceme.base.published import PRESETS, preset_values
from replaceme.export.card import describe_check
from replaceme.methods.registry import FIELDS, criterion_of
from replaceme.models.embedded import MODELS
from replaceme.report import sentences, tables
from replaceme.report.pictures import Picture, draw_pictures
from replaceme.running.versions import list_versions
from replaceme.running.workspace import Workspace

SETTINGS_FILE, PICTURES = "params.yaml", "pictures"


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
    evaluation, solved, repaired = (read_json(work.metric(name)) for name in ("evaluation", "solve", "repair"))
    selected, edits = read_json(work.metric("select")), read_json(work.edits / "edits.json")
    healed, checked, words = read_json(work.metric("heal")), read_json(work.metric("check")), criterion_of(params).words
    if plain := checked.get("plain_removal_is_exported", False):
        # What was fitted and trained is not in the model, and its cut is another.
        blocks = tuple(group_adjacent(edits["removed_layers"]))
        solved = repaired = healed = selected = {}
        words = "the divergence of plain removal on the dense model's own text"
    fits = _collect_fits(solved, repaired)
    made_with = read_json(work.text_versions) | read_json(work.model_versions) | read_json(work.score_versions)
    pictures = draw_pictures(work, profile, blocks, evaluation, solved, params.alpha)
    settings = settings_yaml(params, FIELDS)
    html = _TEMPLATES.get_template("page.html").render(
        model=without_folder(params.model_path),
        method=edits["title"],
        parts=edits["parts"],
        removed=sum(map(len, blocks)),
        layers=len(profile["residual"]),
        outcome=sentences.list_outcomes(evaluation, speed),
        continuations=read_json(work.continuations),
        accuracy=tables.tabulate_accuracy(evaluation),
        divergence=tables.tabulate_divergence(evaluation),
        perplexity=tables.tabulate_perplexity(evaluation),
        size=tables.tabulate_sizes(evaluation),
        times=tables.tabulate_times(speed) if speed else None,
        cost=tables.tabulate_cost(cost) if cost else None,
        cut=sentences.describe_cut(profile["angular_distance"], profile["residual"], blocks, words, selected),
        parts_table=tables.tabulate_parts(repaired) if edits["parts"] else None,
        fit_table=tables.tabulate_fits(fits),
        repair=sentences.describe_repair(repaired),
        heal=sentences.describe_healing(healed),
        plain=plain,
        checked=describe_check(checked).replace(" x ", " × "),
        proof=sentences.describe_proof(read_json(work.metric("export")), blocks),
        about=MODELS[params.model_path].disclosure if params.model_path in MODELS else "",
        changes=_shorten_settings(params),
        settings=settings,
        versions=list_versions(made_with),
        pictures=pictures,
    )
    return Page(html, pictures, settings)


def _collect_fits(solved: Mapping[str, Any], repaired: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the figures of each block by its name; a single block has the empty name."""
    later = {key.replace("block", "block "): value for key, value in repaired.items() if isinstance(value, Mapping)}
    if later.keys() <= {"block 0"}:
        # With narrower MLPs, the first block is fitted in repair too.
        return {"": {**solved, **later.get("block 0", {})}}
    return {"block 0": solved, **later}


def _shorten_settings(params: Params) -> str:
    """Return the settings for a config of ``replaceme``: the nearest preset, and what differs from it."""
    defaults, changed = {name: field.default for name, field in FIELDS.items()}, {}
    for preset in PRESETS:
        usual = defaults | dict(Params.model_validate(preset_values(preset, params.method)))
        changed[preset] = [name for name in FIELDS if name not in WITHOUT_EFFECT and getattr(params, name) != usual[name]]
    nearest = min(PRESETS, key=lambda preset: len(changed[preset]))
    return f"preset: {nearest}\n" + settings_yaml(params, dict.fromkeys(["method", "model_path", *changed[nearest]]))


def _encode_image(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def _allow_breaks(text: str) -> Markup:
    """Allow line breaks after the underscores of a long task name."""
    return escape(text).replace("_", Markup("_<wbr>"))


def _keep_units(text: str) -> str:
    """Keep signs and units with their figures; a line may break before an error, and between words."""
    return re.sub(r" (?!±|[a-z]{4})", "\N{NO-BREAK SPACE}", text)


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters |= {"embedded": _encode_image, "breakable": _allow_breaks, "with_units": _keep_units}
