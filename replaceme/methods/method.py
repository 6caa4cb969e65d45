"""What a method is: the statistics it asks for, and the edits it makes of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from replaceme.edits import Edits
from replaceme.params import Params
from replaceme.plan import Plan

# (name of a statistic, number of the block) → its tensors
Statistics = Callable[[str, int], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Method:
    """A pruning method.

    Attributes:
        statistics: names of the statistics that it wants of each block (``replaceme.statistics``).
        solve: turns the parameters, the plan and the statistics into edits, and figures for metrics/solve.json.
    """

    statistics: tuple[str, ...]
    solve: Callable[[Params, Plan, Statistics], tuple[Edits, dict[str, Any]]]
