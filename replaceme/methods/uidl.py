"""UIDL (arXiv 2403.17887): drop the block and put nothing in its place."""

from replaceme.edits import Edits
from replaceme.methods.method import Method, Solved, Statistics
from replaceme.params import Params
from replaceme.plan import Plan


def solve(params: Params, plan: Plan, statistics: Statistics) -> Solved:
    """Return the removal alone."""
    return Solved(Edits("UIDL", plan.removed_layers))


METHOD = Method(fits=False, statistics=lambda params: (), solve=solve)
