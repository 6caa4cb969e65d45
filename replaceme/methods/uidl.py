"""UIDL (arXiv 2403.17887): drop the block and put nothing in its place."""

from replaceme.edits import Edits
from replaceme.methods.method import Method, Solved, Statistics
from replaceme.params import Params
from replaceme.plan import Block


def solve(params: Params, block: Block, statistics: Statistics) -> Solved:
    """Return no change."""
    return Solved(Edits("UIDL", []))


METHOD = Method(stand_in=lambda params: "nothing", statistics=lambda params: (), solve=solve)
