"""A made-up method: the MLP output before the cut times a number."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from replaceme.base.combinations import Settings, Use, Values
from replaceme.base.params import Params
from replaceme.base.plan import Block
from replaceme.methods.method import Method, Solved, Statistics


class Fading(Settings):
    """Parameters of the made-up method."""

    faded_factor: Annotated[float, Use(("solve", "repair"))] = Field(
        1.0, gt=0, allow_inf_nan=False, description="The number that the MLP output before the cut is multiplied by."
    )


def solve(params: Params, block: Block, statistics: Statistics) -> Solved:
    """Return the factor as a transform, and the number of tokens."""
    import torch

    from replaceme.edits.edits import Edits

    sums = statistics("gram")
    T = Fading.of(params).faded_factor * torch.eye(len(sums["gram"]), dtype=torch.float64)
    return Solved(Edits("a made-up method", [], {block.layer_before_cut: T}), {"tokens": int(sums["tokens"])})


def refusals(values: Values) -> list[str]:
    """Refuse the factor 1, which changes nothing."""
    if values["faded_factor"] == 1:
        return ["faded_factor: 1 changes nothing; use another number, or method uidl."]
    return []


METHOD = Method(
    settings=Fading,
    statistics=lambda params: ("gram",),
    solve=solve,
    words="multiplies one output by a number",
    refusals=refusals,
)
