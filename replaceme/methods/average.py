"""Averaged layers, the plainest merge: the host's linears become the mean of its own and of the block's.

A floor for what merges weights by a formula (LaCo, arXiv 2402.11187): no published method, but what one would try first.
"""

from typing import Any

from replaceme.base.errors import ParameterError
from replaceme.base.params import Params
from replaceme.base.plan import Block
from replaceme.edits.edits import Edits
from replaceme.methods.method import Method, Solved, Statistics
from replaceme.models.families import Family


def solve(params: Params, block: Block, statistics: Statistics) -> Solved:
    """Return the mean, ``W = Σ W_j / (n + 1)`` over the host and the n layers of the block."""
    layers = range(block.host, block.end)
    return Solved(Edits("averaged layers", [], mixtures={block.host: dict.fromkeys(layers, 1 / len(layers))}))


def check(params: Params, model: Any, family: Family) -> None:
    """Raise ParameterError where layers have experts, none of which is another layer's."""
    if family.experts:
        raise ParameterError(
            f"method: average is not derived for the mixture of experts of the family '{model.config.model_type}'; use uidl."
        )


METHOD = Method(
    solve=solve,
    words="averages one block with its host",
    several=False,
    check=check,
)
