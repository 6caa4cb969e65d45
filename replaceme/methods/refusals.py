"""Settings that a model family does not allow: not exact for it, or not derived. Each is refused with the reason."""

from collections.abc import Mapping
from typing import Any

from replaceme.base.combinations import (
    Values,
    heals,
    refits,
    repairs,
    without_attention,
)
from replaceme.models.families import Obstacle

OBSTACLES: Mapping[Obstacle, str] = {
    "norm": "the norm behind the MLP of the family",
    "experts": "the mixture of experts of the family",
    "undescribed": "a family that nobody described,",
}


def family_refusals(values: Values, kind: str, family: Any) -> list[str]:
    """Return a sentence for each parameter that would not be exact, or is not derived, for a model's family.

    Args:
        values: all parameters' values.
        kind: the family's name.
        family: its description (``replaceme.models.families``).
    """
    method, transform, problems = values["method"], values["transform"], []
    if method == "llm_pruner" and family.uncut:
        return [f"method: llm_pruner is refused for the family '{kind}': {family.uncut}; use another method."]
    if method == "slicegpt" and family.unsliced:
        return [f"method: slicegpt is refused for the family '{kind}': {family.unsliced}; use another method."]
    if method == "prune_and_comp" and not family.norm_before:
        problems.append(
            f"method: prune_and_comp scales the residual stream, and not all that reads it in the family '{kind}' does so "
            "through a norm: no scalar folds; use shortgpt."
        )
    if family.parallel and without_attention(values):
        problems.append(
            f"llm_streamline_form: mlp is not derived for the family '{kind}', whose attention and MLP are parallel; use layer."
        )
    if transform == "channels" and not family.mlp_norm:
        problems.append(
            f"transform: channels folds the norm in front of an MLP into its linears, and those of this model of the family "
            f"'{kind}' have no biases for the norm's, or are not described so; use joint."
        )
    obstacle: Obstacle | None = family.obstacle
    if obstacle is None:
        return problems
    place = f"{OBSTACLES[obstacle]} '{kind}'"
    if without_attention(values) and obstacle != "experts":
        problems.append(f"llm_streamline_form: mlp is not derived for {place}; use layer.")
    if obstacle == "experts" and method == "laco":
        problems.append(f"method: laco is not derived for {place}, where no expert is the next layer's; use another method.")
    if obstacle == "norm" and method == "cosine":
        problems.append(f"method: cosine makes maps that do not fold into {place}; use lstsq with transform: orthogonal.")
    elif obstacle == "norm" and method == "lstsq" and transform != "orthogonal":
        problems.append(f"transform: {transform} does not fold into {place}; use orthogonal.")
    elif refits(values) and (obstacle == "experts" or transform in ("joint", "channels")):
        use = "refit" if obstacle == "undescribed" else "dense"
        problems.append(f"transform: {transform} is not derived for {place}; use {use}.")
    if repairs(values):
        problems.append(f"repair: is not derived for {place}; use false.")
    if heals(values) and obstacle != "norm":
        problems.append(f"heal_epochs: is not derived for {place}; use 0.")
    return problems
