"""The methods by name. A new one is a module with a ``Method`` in it, and one line here; nothing else names it."""

from replaceme.methods import (
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
)  # fmt: skip
from replaceme.methods.method import Method

METHODS: dict[str, Method] = {
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
