"""Averaged layers, the simplest merge: the host's linears become the mean of its own and the block's.

Not a published method: the baseline for methods that merge weights by a formula (LaCo, arXiv 2402.11187).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from replaceme.base.combinations import Values
from replaceme.base.parameters import Params
from replaceme.base.plan import Block
from replaceme.methods.method import Method, Solved, Statistics

if TYPE_CHECKING:
    from replaceme.models.families import Family


def solve(params: Params, block: Block, statistics: Statistics) -> Solved:
    """Return the mean, ``W = Σ W_j / (n + 1)`` over the host and the block's n layers."""
    from replaceme.edits.edits import Edits

    layers = range(block.host, block.end)
    return Solved(Edits("averaged layers", [], mixtures={block.host: dict.fromkeys(layers, 1 / len(layers))}))


def refuses(values: Values, kind: str, family: Family | None) -> list[str]:
    """Refuse mixtures of experts: experts of different layers do not correspond."""
    if family and family.experts:
        return [f"method: average is not derived for the mixture of experts of the family '{kind}'; use uidl."]
    return []


METHOD = Method(solve=solve, words="averages one block with its host", several=False, refuses=refuses)
