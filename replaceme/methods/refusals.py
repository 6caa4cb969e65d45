"""What a model refuses: settings that are not exact, or not derived, for its family, or that ask for more than it has.

What one method needs of a model is in its own file (``Method.check``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from replaceme.base.combinations import NEW_WEIGHTS, STEPWISE
from replaceme.base.errors import ParameterError
from replaceme.base.parameters import Params
from replaceme.methods.registry import METHODS
from replaceme.models.memory import HEALING_OBSTACLE

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
    transform = params.transform
    named = any(problem.startswith(("transform:", "method:")) for problem in problems)
    kind = model.config().model_type
    if transform == "channels" and not family.mlp_norm and not family.detected:
        problems.append(
            f"transform: channels folds the norm before an MLP into its linears, and those of this model of the family "
            f"'{kind}' have no biases for the norm's, or are not described so; use joint."
        )
    if family.obstacle is not None:
        family_words = family.obstacle_words(kind)
        if not named and transform in NEW_WEIGHTS and (family.obstacle == "experts" or transform in STEPWISE):
            use = "refit" if family.obstacle == "undescribed" else "dense"
            problems.append(f"transform: {transform} is not derived for {family_words}; use {use}.")
        if params.repair:
            problems.append(f"repair: is not derived for {family_words}; use false.")
    if problems:
        raise ParameterError(problems)


def streaming_obstacle(params: Params) -> str | None:
    """Return why the parameters need a model that is in memory as a whole; None if it can be streamed."""
    if METHODS[params.method].fit_on_model:
        return f"method {params.method} works on many layers at once"
    return HEALING_OBSTACLE if params.heal_tokens else None
