"""Settings refused for a model family, because the fold would be inexact or no formula is derived.

Refusals of a single method are in its own file (``Method.refuses``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from replaceme.base.combinations import NEW_WEIGHTS, Values
from replaceme.base.parameters import Params
from replaceme.methods.registry import METHODS
from replaceme.models.memory import HEALED_WHOLE

if TYPE_CHECKING:
    from replaceme.models.families import Family


def family_refusals(values: Values, kind: str, family: Family) -> list[str]:
    """Return a sentence for each parameter that is not exact, or not derived, for a model's family.

    Args:
        values: all parameters' values.
        kind: the family's name.
        family: its description.
    """
    transform, problems = values["transform"], METHODS[values["method"]].refuses(values, kind, family)
    named = any(problem.startswith(("transform:", "method:")) for problem in problems)
    if transform == "channels" and not family.mlp_norm and not family.detected:
        problems.append(
            f"transform: channels folds the norm before an MLP into its linears, and those of this model of the family "
            f"'{kind}' have no biases for the norm's, or are not described so; use joint."
        )
    if family.obstacle is None:
        return problems
    place = family.obstacle_words(kind)
    if not named and transform in NEW_WEIGHTS and (family.obstacle == "experts" or transform in ("joint", "channels")):
        use = "refit" if family.obstacle == "undescribed" else "dense"
        problems.append(f"transform: {transform} is not derived for {place}; use {use}.")
    if values["repair"]:
        problems.append(f"repair: is not derived for {place}; use false.")
    if values["heal_epochs"] and family.obstacle != "norm":
        problems.append(f"heal_epochs: is not derived for {place}; use 0.")
    return problems


def needs_whole(params: Params) -> str | None:
    """Return why the parameters need a model that is in memory as a whole; None if it can be streamed."""
    if METHODS[params.method].work:
        return f"method {params.method} works on many layers at once"
    return HEALED_WHOLE if params.heal_epochs else None
