"""The model card of a pruned model: what was done to which model, and how to do it again. No paths, no secrets."""

from pathlib import Path
from typing import Any

from replaceme.combinations import EFFECTS, has_effect
from replaceme.edits import Edits
from replaceme.families import Linear
from replaceme.models import Model
from replaceme.params import Params

# The settings that say what was done; the others say where and how it was computed.
SETTINGS = (
    "method", "revision", "use_4bit", "dataset", "dataset_config", "dataset_split", "dataset_column", "dataset_revision",
    "dataset_size", "max_length", "pack", "seed", "batch_size", "dtype", "selection", "layers_to_skip", "min_distance_layer",
    "max_distance_layer", "num_A", "merge_consecutive", "transform", "alpha", "repair", *EFFECTS,
)  # fmt: skip


def model_card(params: Params, source: Model, edits: Edits, solved: dict[str, Any]) -> str:
    """Return the README.md of a pruned model's folder.

    Args:
        params: the setting.
        source: the dense model.
        edits: what was changed.
        solved: the figures of metrics/solve.json.
    """
    removed = edits.removed_layers
    layers = int(source.config().num_hidden_layers)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *([f"base_model: {source.name}"] if source.commit else []),
        "tags: [pruned, depth-pruning, replaceme]",
        "---",
        "",
        f"# {source.name} without {len(removed)} of its {layers} layers",
        "",
        f"Layers {_runs(removed)} (counted from 0) were removed from `{source.name}`"
        + (f" (commit {source.commit})" if source.commit else "")
        + f" with {edits.title}.",
    ]
    if edits.transforms:
        hosts = ", ".join(map(str, sorted(edits.transforms)))
        lines += [
            f"A linear map, fitted to calibration text without training the model, was folded into the MLP of layer {hosts}: "
            "no new parameter, the same architecture."
        ]
    linears: tuple[tuple[Linear, str], ...] = (("attention_output", "attention output"), ("mlp_output", "last MLP linear"))
    for linear, words in linears:
        if corrected := [layer for layer, name in edits.corrections if name == linear]:
            lines += [f"The weights of the {words} of layer {_runs(corrected)} were solved for anew, likewise."]
    for key in ("relative_residual", "weighted_residual"):
        if key in solved:
            where = "the first cut" if len(edits.transforms) > 1 else "the cut"
            lines += ["", f"Relative residual of the fit at {where}: {solved[key]:.4g}."]
    # A user's own file is named without its folder.
    shown = [key for key in SETTINGS if has_effect(key, params.model_dump())]
    settings = {key: value for key in shown if (value := getattr(params, key)) is not None}
    file = Path(params.dataset).expanduser()
    settings["dataset"] = file.name if file.exists() else params.dataset
    lines += ["", "## Settings", "", "```yaml", *(f"{key}: {_scalar(value)}" for key, value in settings.items()), "```", ""]
    return "\n".join(lines)


def _runs(layers: list[int]) -> str:
    """Write positions as ranges: ``11–18`` or ``3–4, 9``."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)


def _scalar(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
