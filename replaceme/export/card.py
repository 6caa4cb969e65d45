"""The model card of a pruned model: what was done to which model, what it cost, and how to do it again.

No paths, no secrets. The scores are known only after the export: ``replaceme.publish`` adds them.
"""

from collections.abc import Sequence
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import metadata_load

from replaceme import __version__
from replaceme.base.combinations import NEW_WEIGHTS
from replaceme.base.params import Params
from replaceme.base.progress import logger
from replaceme.base.settings import settings_yaml
from replaceme.edits.edits import Edits
from replaceme.methods.registry import EFFECTS, FIELDS, has_effect
from replaceme.models.families import Linear
from replaceme.models.model import CARD, Model
from replaceme.models.own_form import FILE

# The settings that the model came from, and those of its scores; the others say where it was computed.
SETTINGS = (
    "method", "model_path", "revision", "trust_remote_code", "use_4bit", "dataset", "dataset_config", "dataset_split",
    "dataset_column", "dataset_revision", "dataset_size", "max_length", "pack", "seed", "batch_size", "dtype", "threads",
    "selection", "layers_to_skip", "tolerated_loss", "min_distance_layer", "max_distance_layer", "num_A", "merge_consecutive",
    "transform", "repair", "heal_epochs", *EFFECTS,
)  # fmt: skip
SCORING = ("tasks", "eval_tokens", "eval_batch_size", "eval_dtype")
# What the dense model's own card says of it that holds for the pruned one too.
INHERITED = ("license", "license_name", "license_link", "language")


def model_card(
    params: Params,
    source: Model,
    edits: Edits,
    solved: dict[str, Any],
    scores: str = "",
    results: Sequence[EvalResult] = (),
) -> str:
    """Return the README.md of a pruned model's folder.

    Args:
        params: the setting.
        source: the dense model.
        edits: what was changed.
        solved: the figures of metrics/solve.json.
        scores: what it scores, as Markdown; empty while that isn't known.
        results: the same for the hub.
    """
    removed, layers = edits.removed_layers, int(source.config().num_hidden_layers)
    title = f"{source.name} without {edits.parts or f'{len(removed)} of its {layers} layers'}"
    kind = "width-pruning" if edits.parts else "depth-pruning"
    parts = [
        "---",
        _metadata(source, title, kind, results),
        "---",
        "",
        f"# {title}",
        "",
        *_changes(params, source, edits, solved),
    ]
    if scores:
        parts += ["", "## Scores", "", scores]
    return "\n".join([*parts, "", "## How to reproduce", "", *_reproduction(params, source, bool(scores))])


def _metadata(source: Model, title: str, kind: str, results: Sequence[EvalResult]) -> str:
    """Return the card's YAML block, which the hub reads."""
    known = _own_metadata(source)
    return ModelCardData(
        # The hub knows a local copy by what its card says that it comes from.
        base_model=source.name if source.commit else known.get("base_model"),
        **{key: known.get(key) for key in INHERITED},
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", kind, "replaceme"],
        model_name=title if results else None,
        eval_results=list(results) or None,
    ).to_yaml()


def _own_metadata(source: Model) -> dict[str, Any]:
    """Return what the dense model's own card says in its YAML block; nothing where there is none."""
    try:
        known = metadata_load(source.folder / CARD) or {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError):
        logger.warning(
            "model_path: the YAML block of %s's %s can't be read; its licence is not carried over", source.name, CARD
        )
        return {}
    return {key: value for key, value in known.items() if value and isinstance(value, str | list)}


def _changes(params: Params, source: Model, edits: Edits, solved: dict[str, Any]) -> list[str]:
    """Return the sentences that say what was removed, and what took its place."""
    commit = f" (commit {source.commit})" if source.commit else ""
    what = edits.parts[:1].upper() + edits.parts[1:] or f"Layers {_runs(edits.removed_layers)} (counted from 0)"
    lines = [f"{what} were removed from `{source.name}`{commit} with {edits.title}."]
    if edits.transforms:
        hosts = ", ".join(map(str, sorted(edits.transforms)))
        lines += [
            f"A linear map, fitted to calibration text without training the model, was folded into the MLP of layer {hosts}: "
            "no new parameter, the same architecture."
        ]
    lines += [
        f"The weights of the linears of layers {_runs([*mixture])} were merged into those of layer {layer}, without training."
        for layer, mixture in sorted(edits.mixtures.items())
    ]
    for layer, channels in sorted(edits.channels.items()):
        own = int((channels[:, 0] == layer).sum())
        lines += [
            f"The MLP of layer {layer} is made of {own:,} of its own channels and {len(channels) - own:,} of removed layers: "
            "as many as it had, and no new parameter."
        ]
    linears: tuple[tuple[Linear, str], ...] = (("attention_output", "attention output"), ("mlp_output", "last MLP linear"))
    for linear, words in linears:
        corrected = [layer for layer, name in edits.corrections if name == linear]
        if corrected and not params.heal_epochs:
            lines += [f"The weights of the {words} of layer {_runs(corrected)} were solved for anew, likewise."]
    if params.heal_epochs:
        healed = _runs([layer for layer, name in edits.corrections if name == "mlp_output"])
        start = ", from what was solved for without training" if params.repair or params.transform in NEW_WEIGHTS else ""
        lines += [
            f"The weights of the attention output and the last MLP linear of layer {healed} were trained on "
            f"calibration text toward the original model's predictions{start}."
        ]
    if trained := sorted({layer for layer, _ in edits.parameters}):
        speaks = all(bool(value.any()) for value in edits.parameters.values())
        lines += [
            f"The weights of layer {_runs(trained)} were found by training on calibration text"
            f"{'' if speaks else '; its attention is left with weights of 0, so that it adds nothing'}."
        ]
    if edits.without_attention:
        lines += [f"Layer {_runs([*edits.without_attention])} has no attention any more."]
    if scalars := {layer: float(P) for layer, P in sorted(edits.operators.items()) if not P.ndim}:
        listed = ", ".join(f"by {1 / scale:.4g} behind layer {layer}" for layer, scale in scalars.items())
        lines += [
            "The residual stream lacks the magnitude that the removed layers gave it. To make up for that, what all layers "
            f"behind the cut add to it was multiplied {listed}: no new parameter, the same architecture."
        ]
    if mapped := [layer for layer, P in edits.operators.items() if P.ndim]:
        lines += [f"The whole state behind layer {_runs(mapped)} goes through a linear map of its own."]
    if edits.form(""):
        lines += [
            "",
            "No class of transformers has this form: the model loads with `trust_remote_code=True`, by the file "
            f"`{FILE}` beside its weights.",
        ]
    for key in ("relative_residual", "weighted_residual"):
        if key in solved:
            where = "the first cut" if len(edits.transforms | edits.operators) > 1 else "the cut"
            lines += ["", f"Relative residual of the fit at {where}: {solved[key]:.4g}."]
    return lines


def _reproduction(params: Params, source: Model, scored: bool) -> list[str]:
    """Return the settings as a file that every console script takes, and the commands."""
    if source.commit:
        params = params.model_copy(update={"revision": source.commit})
    values = params.model_dump()
    keys = [
        key
        for key in (*SETTINGS, *(SCORING if scored else ()))
        if has_effect(key, values) and (values[key] is not None or FIELDS[key].default is not None)
    ]
    return [
        f"With replaceme-dvc {__version__}, save these settings as `settings.yaml` (a local file or folder stands there by its "
        "own name):",
        "", "```yaml", settings_yaml(params, keys).rstrip(), "```", "",
        "```bash", "run_replaceme --config settings.yaml", "```", "",
        "Or set them in the pipeline's `params.yaml`, and `dvc repro`.",
        "",
    ]  # fmt: skip


def _runs(layers: list[int]) -> str:
    """Write positions as ranges: ``11–18`` or ``3–4, 9``."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)
