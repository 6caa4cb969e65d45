"""LLM-Pruner (arXiv 2305.11627): remove the heads and MLP channels with the least effect on the loss
(``replaceme.methods.groups``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from replaceme.base.combinations import Use, Values
from replaceme.base.errors import ParameterError
from replaceme.base.parameters import Params
from replaceme.base.progress import logger
from replaceme.methods.method import Bench, Method, drop
from replaceme.selection.criteria import WIDTH

if TYPE_CHECKING:
    from replaceme.methods.groups import Width
    from replaceme.models.families import Family, Linear
    from replaceme.models.model import Model

# The first and last layers that stay whole (published: layers 4 to 30 of 32 lose parts).
FIRST, LAST = 4, 2


def layers_of(params: Params, count: int) -> range:
    """Return the layers that lose groups.

    Raises:
        ParameterError: there are none.
    """
    if params.plain:
        return range(count)
    layers = range(params.min_distance_layer or FIRST, params.max_distance_layer or count - LAST)
    if not layers:
        raise ParameterError(
            f"min_distance_layer: of the model's {count} layers, none is between layer {layers.start} and layer {layers.stop}; "
            f"set it and max_distance_layer (null takes nothing from the first {FIRST} layers and the last {LAST})."
        )
    return layers


def check(params: Params, model: Model, family: Family) -> None:
    """Raise ParameterError if so much can't be removed, or no document can hold a piece of the text for the gradients."""
    from replaceme.methods.groups import CROPS, LENGTH

    _plan(params, model.skeleton(model.config()), family)
    pieces = params.max_length // LENGTH
    if not pieces:
        raise ParameterError(
            f"max_length: method llm_pruner takes pieces of {LENGTH} tokens; use at least {LENGTH}, not {params.max_length}."
        )
    if params.dataset_size * pieces < CROPS:
        raise ParameterError(
            f"dataset_size: method llm_pruner takes {CROPS} pieces of {LENGTH} tokens, and documents of at most "
            f"{params.max_length} tokens have {pieces} each; use at least {-(-CROPS // pieces)}, not {params.dataset_size}."
        )


def work(bench: Bench) -> dict[str, Any]:
    """Add the kept groups to the edits, and return figures of the removed ones."""
    from replaceme.methods.groups import crops_of, importance_of, least, shapes_of

    params, model, family = bench.params, bench.model, bench.family
    width, removed = _plan(params, model, family)
    importance, loss = importance_of(model, family, width.layers, width.groups, crops_of(bench.documents))
    for (layer, linear), values in importance.items():
        if removed[linear]:
            bench.edits.kept[layer, linear] = least(values, removed[linear])
    layers = family.decoder_layers(model)
    bench.edits.shapes = shapes_of(family, layers, bench.edits)
    heads = model.config.num_attention_heads // width.groups["attention_output"]
    if params.plain:
        bench.edits.config = _config(model.config, _kept(width, removed))
    place = "every layer" if params.plain else f"each of layers {width.layers[0]}–{width.layers[-1]}"
    bench.edits.parts = f"{_words(width, removed, heads)} in {place}"
    figures = {
        "removed_heads": len(width.layers) * removed["attention_output"] * heads,
        "removed_channels": len(width.layers) * removed["mlp_output"],
        "parameters_removed": width.parameters(removed),
        "parameters_wanted": params.layers_to_skip * width.layer_size,
        "calibration_loss": loss,
    }
    logger.info(
        "repair: %s go, %d parameters; %.3g layers have %d", bench.edits.parts, figures["parameters_removed"],
        params.layers_to_skip, figures["parameters_wanted"],
    )  # fmt: skip
    return figures


def _plan(params: Params, model: Any, family: Family) -> tuple[Width, dict[Linear, int]]:
    """Return the removable groups, and how many of them to remove from each layer."""
    from replaceme.methods.groups import width_of

    width = width_of(model, family, layers_of(params, len(family.decoder_layers(model))))

    def fits(kept: Mapping[Linear, int]) -> bool:
        return not params.plain or _describes(model, family, width, kept)

    return width, width.choose(params.layers_to_skip, fits)


def _kept(width: Width, removed: Mapping[Linear, int]) -> dict[Linear, int]:
    return {linear: count - removed[linear] for linear, count in width.groups.items()}


def _config(config: Any, kept: Mapping[Linear, int]) -> dict[str, Any]:
    """Return the config fields for the kept heads and channels."""
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    fields: dict[str, Any] = {"intermediate_size": kept["mlp_output"]}
    if kept["attention_output"] != groups:
        fields |= {"num_attention_heads": kept["attention_output"] * heads // groups, "head_dim": head_dim}
        if hasattr(config, "num_key_value_heads"):
            fields["num_key_value_heads"] = kept["attention_output"]
    return fields


def _describes(model: Any, family: Family, width: Width, kept: Mapping[Linear, int]) -> bool:
    """Return whether the family's own class, with such a config, has layers of exactly these groups."""
    import torch
    from transformers import AutoModelForCausalLM

    from replaceme.models.families import parameter_of

    config = model.config
    try:
        changed = type(config).from_dict({**config.to_dict(), **_config(config, kept)})
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(changed)
    except Exception:  # configs and models check themselves with errors of many kinds
        return False
    dense, cut = family.decoder_layers(model)[0], family.decoder_layers(built)[0]
    return all(
        parameter_of(cut, name).shape[dimension] * count == parameter_of(dense, name).shape[dimension] * kept[linear]
        for linear, count in width.groups.items()
        for name, dimension in family.cut_parameters(dense, linear).items()
    )


def _words(width: Width, removed: Mapping[Linear, int], heads: int) -> str:
    """Return the removed heads and channels, in words."""
    attention, mlp = removed["attention_output"], removed["mlp_output"]
    parts = [f"{heads * attention} of {heads * width.groups['attention_output']} heads"] if attention else []
    parts += [f"{mlp} of {width.groups['mlp_output']} MLP channels"] if mlp else []
    return " and ".join(parts)


def refuses(values: Values, kind: str, family: Family | None) -> list[str]:
    """Refuse what would be ignored or makes gradients overflow, and families whose parts can't be cut out by shapes alone."""
    if family:
        problem = f"method: llm_pruner is refused for the family '{kind}': {family.uncut}; use another method."
        return [problem] if family.uncut else []
    problems = []
    if values["dtype"] == "float16":
        problems.append("dtype: float16 is too short for the gradients of method llm_pruner; use bfloat16 or float32.")
    return problems + [
        f"{key}: with plain, method llm_pruner takes from every layer; use null."
        for key in ("min_distance_layer", "max_distance_layer")
        if values["plain"] and values[key] is not None
    ]


METHOD = Method(
    shared={"plain": Use(("repair",))},
    solve=drop("LLM-Pruner"),
    criterion=WIDTH,
    work=work,
    plain=lambda params: params.plain,
    words="removes parts of layers, not whole layers",
    selections=(),
    several=False,
    repairs=False,
    packed=False,
    refuses=refuses,
    check=check,
)
