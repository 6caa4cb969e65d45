"""The methods by name. A new method is a module with a ``Method``, its import and its entry here; nothing else names it."""

from collections.abc import Mapping
from typing import Any

from replaceme.base import combinations
from replaceme.base.combinations import MethodStage, Values, users_of
from replaceme.base.parameters import Params, fields_of
from replaceme.methods import (
    average,
    cosine,
    ghosted,
    laco,
    linearpatch,
    llm_pruner,
    llm_streamline,
    lstsq,
    prune_and_comp,
    shortgpt,
    sleb,
    slicegpt,
    uidl,
)
from replaceme.methods.method import Method
from replaceme.selection.criteria import CRITERIA, Criterion

METHODS: dict[str, Method] = {
    "average": average.METHOD,
    "cosine": cosine.METHOD,
    "ghosted": ghosted.METHOD,
    "laco": laco.METHOD,
    "linearpatch": linearpatch.METHOD,
    "llm_streamline": llm_streamline.METHOD,
    "llm_pruner": llm_pruner.METHOD,
    "lstsq": lstsq.METHOD,
    "prune_and_comp": prune_and_comp.METHOD,
    "shortgpt": shortgpt.METHOD,
    "sleb": sleb.METHOD,
    "slicegpt": slicegpt.METHOD,
    "uidl": uidl.METHOD,
}


def criterion_of(params: Params) -> Criterion:
    """Return the criterion of the cut: ``selection``, or the method's own."""
    return CRITERIA[params.selection] if params.selection else METHODS[params.method].criterion


# All parameters, with those of the methods, in documented order.
FIELDS = fields_of(METHODS)
# Those that have an effect only in some settings, with the methods that use them.
USERS = users_of(METHODS)


def has_effect(key: str, values: Values) -> bool:
    """Return whether a parameter changes the result, with all parameters' values."""
    return key not in USERS or combinations.has_effect(USERS[key], values)


def is_trained(method: str, healed: Mapping[str, Any], checked: Mapping[str, Any]) -> bool:
    """Return whether weights of a result were trained: those from before may have been kept, or plain removal exported.

    Args:
        method: its method's name.
        healed: the figures of metrics/heal.json; empty without healing.
        checked: those of metrics/check.json; empty without a comparison.
    """
    declared = METHODS.get(method)
    has_trained = (declared is not None and declared.trained) or healed.get("training_tokens", 0) > 0
    return has_trained and not checked.get("plain_removal_is_exported", False)


def read_by(stage: MethodStage) -> tuple[str, ...]:
    """Return the methods' parameters, own and shared ones, that change the output of a stage."""
    uses = [use for method in METHODS.values() for use in method.uses.items()]
    return tuple(dict.fromkeys(key for key, use in uses if stage in use.stages))
