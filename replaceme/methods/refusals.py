"""What a model refuses: settings that are not exact, or not derived, for its family, or that ask for more than it has.

What one method needs of a model is in its own file (``Method.check``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from replaceme.base.combinations import heals, refits, repairs
from replaceme.base.errors import ParameterError
from replaceme.base.params import Params
from replaceme.methods.registry import METHODS
from replaceme.models.memory import HEALED_WHOLE

if TYPE_CHECKING:
    from replaceme.models.families import Family
    from replaceme.models.model import Model


def check_model(params: Params, model: Model, family: Family) -> None:
    """Raise ParameterError, with a sentence for each parameter, if a model can't be pruned so; its weights are not loaded."""
    problems: list[str] = []
    try:
        METHODS[params.method].check(params, model, family)
    except ParameterError as refusal:
        problems += refusal.problems
    values, transform = params.model_dump(), params.transform
    named = any(problem.startswith(("transform:", "method:")) for problem in problems)
    kind = model.config().model_type
    if transform == "channels" and not family.mlp_norm and not family.detected:
        problems.append(
            f"transform: channels folds the norm before an MLP into its linears, and those of this model of the family "
            f"'{kind}' have no biases for the norm's, or are not described so; use joint."
        )
    if family.obstacle is not None:
        place = family.obstacle_words(kind)
        if not named and refits(values) and (family.obstacle == "experts" or transform in ("joint", "channels")):
            use = "refit" if family.obstacle == "undescribed" else "dense"
            problems.append(f"transform: {transform} is not derived for {place}; use {use}.")
        if repairs(values):
            problems.append(f"repair: is not derived for {place}; use false.")
        if heals(values) and family.obstacle != "norm":
            problems.append(f"heal_epochs: is not derived for {place}; use 0.")
    if problems:
        raise ParameterError(problems)


def needs_whole(params: Params) -> str | None:
    """Return why the parameters need a model that is in memory as a whole; None if it can be streamed."""
    if METHODS[params.method].fit_on_model:
        return f"method {params.method} works on many layers at once"
    return HEALED_WHOLE if params.heal_epochs else None
