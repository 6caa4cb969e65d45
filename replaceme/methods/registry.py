"""The methods by name. A new one is a module with a ``Method`` in it, and one line here; nothing else names it."""

from replaceme.base.params import Params
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
    """Return what the cut is chosen by: ``selection``, or the method's own criterion."""
    return CRITERIA[params.selection] if params.selection else METHODS[params.method].criterion
