"""Averaged layers, the simplest merge: the linears before the cut become the mean of their own and the block's.

Not a published method: the baseline for methods that merge weights by a formula (LaCo, arXiv 2402.11187).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from replaceme.base.errors import ParameterError
from replaceme.base.params import Params
from replaceme.base.plan import Block
from replaceme.methods.method import Method, Solved, Statistics

if TYPE_CHECKING:
    from replaceme.models.families import Family
    from replaceme.models.model import Model


def solve(params: Params, block: Block, statistics: Statistics) -> Solved:
    """Return the mean, ``W = Σ W_j / (n + 1)`` over the layer before the cut and the block's n layers."""
    from replaceme.edits.edits import Edits

    layers = range(block.layer_before_cut, block.end)
    return Solved(Edits("averaged layers", [], mixtures={block.layer_before_cut: dict.fromkeys(layers, 1 / len(layers))}))


def check(params: Params, model: Model, family: Family) -> None:
    """Refuse mixtures of experts: experts of different layers do not correspond."""
    if family.experts:
        kind = model.config().model_type
        raise ParameterError(f"method: average is not derived for the mixture of experts of the family '{kind}'; use uidl.")


METHOD = Method(solve=solve, words="averages one block with the layer before it", several=False, check=check)
