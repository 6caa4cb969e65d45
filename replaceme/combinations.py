"""Which parameters go together: what can't be done is refused by name, and what has no effect is said to have none."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

Values = Mapping[str, Any]
Obstacle = Literal["norm", "experts", "undescribed"]

# The methods that put nothing in the place of what they remove.
DROPPING = ("uidl", "shortgpt", "sleb")
# The methods that put an operator on the whole state behind the host.
OPERATING = ("linearpatch", "ghosted")
# Those that remove no layer, but parts of layers.
NARROWING = ("slicegpt", "llm_pruner")

OBSTACLES: Mapping[Obstacle, str] = {
    "norm": "the norm behind the MLP of the family",
    "experts": "the mixture of experts of the family",
    "undescribed": "a family that nobody described,",
}


def _merges(values: Values) -> bool:
    return bool(values["method"] == "laco")


def _scales(values: Values) -> bool:
    return bool(values["method"] == "prune_and_comp")


def _streamlines(values: Values) -> bool:
    return bool(values["method"] == "llm_streamline")


def _without_attention(values: Values) -> bool:
    return _streamlines(values) and values["llm_streamline_form"] == "mlp"


def _has_plain(values: Values) -> bool:
    return _narrows(values) or _without_attention(values)


def _narrows(values: Values) -> bool:
    return values["method"] in NARROWING


def _iterates(values: Values) -> bool:
    return bool(values["method"] == "cosine")


def _steps(values: Values) -> bool:
    return _iterates(values) and values["solver"] == "adam"


def _refits(values: Values) -> bool:
    return values["transform"] in ("refit", "joint")


def _repairs(values: Values) -> bool:
    return bool(values["repair"])


# Parameters that not every setting uses: what they belong to, when they have an effect.
EFFECTS: Mapping[str, tuple[str, Callable[[Values], bool]]] = {
    "laco_layers": ("method laco", _merges),
    "laco_interval": ("method laco", _merges),
    "laco_threshold": ("method laco", _merges),
    "linearpatch_form": ("method linearpatch", lambda values: bool(values["method"] == "linearpatch")),
    "ghosted_weighted": ("method ghosted", lambda values: bool(values["method"] == "ghosted")),
    "llm_streamline_form": ("method llm_streamline", _streamlines),
    "llm_streamline_learning_rate": ("method llm_streamline", _streamlines),
    "llm_streamline_epochs": ("method llm_streamline", _streamlines),
    "plain": ("methods slicegpt and llm_pruner, and llm_streamline_form mlp", _has_plain),
    "refit_ridge": ("transform refit or joint", _refits),
    "repair_ridge_attention": ("repair", _repairs),
    "repair_ridge_mlp": ("repair", _repairs),
    "loss": ("method cosine", _iterates),
    "accurate": ("loss cosine of method cosine", lambda values: _iterates(values) and values["loss"] == "cosine"),
    "l1_ratio": ("loss elastic_net of method cosine", lambda values: _iterates(values) and values["loss"] == "elastic_net"),
    "solver": ("method cosine", _iterates),
    "start": ("method cosine", _iterates),
    "learning_rate": ("solver adam of method cosine", _steps),
    "epochs": ("solver adam of method cosine", _steps),
    "tokens_per_step": ("solver adam of method cosine", _steps),
    "max_iterations": (
        "solvers lbfgs, cg and trust_region of method cosine",
        lambda values: _iterates(values) and values["solver"] != "adam",
    ),
}


def has_effect(key: str, values: Values) -> bool:
    """Return whether a parameter changes the result, with all parameters' values."""
    return key not in EFFECTS or EFFECTS[key][1](values)


def without_effect(given: Values, values: Values, defaults: Values) -> list[str]:
    """Return a sentence for each parameter that was given, isn't at its default, and has no effect."""
    return [
        f"{key} belongs to {EFFECTS[key][0]} and is ignored"
        for key in EFFECTS
        if key in given and values[key] != defaults[key] and not has_effect(key, values)
    ]


def refusals(values: Values) -> list[str]:
    """Return a sentence for each combination that would not be what its names say."""
    method, transform, loss, solver = (values[key] for key in ("method", "transform", "loss", "solver"))
    problems = []
    if method in DROPPING and transform != "dense":
        problems.append(
            f"transform: {transform} has no place in method {method}, which puts nothing in the block's place; use dense."
        )
    if _scales(values) and transform != "dense":
        problems.append(
            f"transform: {transform} has no place in method prune_and_comp, which puts one number there; use dense."
        )
    if method in OPERATING and transform != "dense":
        problems.append(
            f"transform: {transform} has no place in method {method}, which maps the whole state behind the host; use dense."
        )
    if _merges(values):
        problems += _merge_refusals(values)
    if _streamlines(values):
        problems += _training_refusals(values)
    if _narrows(values):
        problems += _width_refusals(values)
    if not _iterates(values):
        return problems
    if transform == "orthogonal":
        problems.append("transform: orthogonal is fitted by least squares alone; use method lstsq.")
    if _refits(values):
        problems.append(
            f"transform: {transform} solves least squares for the host's own weights and has no other objective; use method "
            "lstsq, or transform dense, diagonal, two_vectors or triangular."
        )
    if loss == "elastic_net" and solver in ("cg", "trust_region"):
        problems.append(f"solver: {solver} needs a smooth objective, and loss elastic_net has a kink at 0; use lbfgs or adam.")
    if loss == "elastic_net" and transform == "two_vectors":
        problems.append(
            "transform: two_vectors has no entries of its own that loss elastic_net could set to 0; use dense, diagonal or "
            "triangular, or loss mse."
        )
    return problems


def _merge_refusals(values: Values) -> list[str]:
    problems = []
    if values["transform"] != "dense":
        problems.append(
            f"transform: {values['transform']} has no place in method laco, which merges the layers' own weights; use dense."
        )
    if values["selection"] is not None:
        problems.append(
            f"selection: {values['selection']} has no place in method laco, which chooses by what layers merge to; use null."
        )
    if values["num_A"] > 1:
        problems.append("num_A: method laco makes as many merges as layers_to_skip takes; use 1.")
    return problems


def _training_refusals(values: Values) -> list[str]:
    problems, selection = [], values["selection"]
    if values["transform"] != "dense":
        problems.append(
            f"transform: {values['transform']} has no place in method llm_streamline, which trains a layer; use dense."
        )
    if values["repair"]:
        problems.append("repair: has no place in method llm_streamline, which trains one layer alone; use false.")
    if selection in ("influence", "greedy"):
        problems.append(
            f"selection: {selection} chooses single layers, and method llm_streamline trains one layer for one block; use "
            "null, angular, residual or loss."
        )
    if values["num_A"] > 1:
        problems.append("num_A: method llm_streamline trains one layer for one block; use 1.")
    if values["use_4bit"]:
        problems.append("use_4bit: method llm_streamline trains from the layer's own weights, not from 4-bit ones; use false.")
    return problems


def _width_refusals(values: Values) -> list[str]:
    method, problems = values["method"], []
    place = f"has no place in method {method}, which removes parts of layers and no layer; use"
    if values["transform"] != "dense":
        problems.append(f"transform: {values['transform']} {place} dense.")
    if values["selection"] is not None:
        problems.append(f"selection: {values['selection']} {place} null.")
    if values["num_A"] > 1:
        problems.append(f"num_A: {values['num_A']} {place} 1.")
    if _repairs(values):
        problems.append(f"repair: is not derived for method {method}; use false.")
    if method == "slicegpt":
        problems += [
            f"{key}: method slicegpt takes from all layers alike; use null."
            for key in ("min_distance_layer", "max_distance_layer")
            if values[key] is not None
        ]
    if method == "llm_pruner":
        if values["use_4bit"]:
            problems.append(
                "use_4bit: method llm_pruner needs the gradients of the weights, and packed ones have none; use false."
            )
        if values["dtype"] == "float16":
            problems.append("dtype: float16 is too short for the gradients of method llm_pruner; use bfloat16 or float32.")
        problems += [
            f"{key}: with plain, method llm_pruner takes from every layer; use null."
            for key in ("min_distance_layer", "max_distance_layer")
            if values["plain"] and values[key] is not None
        ]
    return problems


def family_refusals(values: Values, kind: str, family: Any) -> list[str]:
    """Return a sentence for each parameter that would not be exact, or is not derived, for a model's family.

    Args:
        values: all parameters' values.
        kind: the family's name.
        family: its description (``replaceme.families``).
    """
    method, transform, problems = values["method"], values["transform"], []
    if method == "llm_pruner" and family.uncut:
        return [f"method: llm_pruner is refused for the family '{kind}': {family.uncut}; use another method."]
    if method == "slicegpt" and family.unsliced:
        return [f"method: slicegpt is refused for the family '{kind}': {family.unsliced}; use another method."]
    if _scales(values) and not family.norm_before:
        problems.append(
            f"method: prune_and_comp scales the residual stream, and not all that reads it in the family '{kind}' does so "
            "through a norm: no scalar folds; use shortgpt."
        )
    if family.parallel and _without_attention(values):
        problems.append(
            f"llm_streamline_form: mlp is not derived for the family '{kind}', whose attention and MLP are parallel; use layer."
        )
    obstacle: Obstacle | None = family.obstacle
    if obstacle is None:
        return problems
    place = f"{OBSTACLES[obstacle]} '{kind}'"
    if _without_attention(values) and obstacle != "experts":
        problems.append(f"llm_streamline_form: mlp is not derived for {place}; use layer.")
    if obstacle == "experts" and _merges(values):
        problems.append(f"method: laco is not derived for {place}, where no expert is the next layer's; use another method.")
    if obstacle == "norm" and method == "cosine":
        problems.append(f"method: cosine makes maps that do not fold into {place}; use lstsq with transform: orthogonal.")
    elif obstacle == "norm" and method == "lstsq" and transform != "orthogonal":
        problems.append(f"transform: {transform} does not fold into {place}; use orthogonal.")
    elif _refits(values) and (obstacle == "experts" or transform == "joint"):
        use = "refit" if obstacle == "undescribed" else "dense"
        problems.append(f"transform: {transform} is not derived for {place}; use {use}.")
    if _repairs(values):
        problems.append(f"repair: is not derived for {place}; use false.")
    return problems
