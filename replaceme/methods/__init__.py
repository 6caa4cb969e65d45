"""The methods by name. A new one is a module with a ``Method`` in it, and one line here; nothing else names it."""

from replaceme.methods import cosine, laco, llm_pruner, lstsq, shortgpt, sleb, uidl
from replaceme.methods.method import Method

METHODS: dict[str, Method] = {
    "cosine": cosine.METHOD,
    "laco": laco.METHOD,
    "llm_pruner": llm_pruner.METHOD,
    "lstsq": lstsq.METHOD,
    "shortgpt": shortgpt.METHOD,
    "sleb": sleb.METHOD,
    "uidl": uidl.METHOD,
}
