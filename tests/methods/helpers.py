"""The edits as the stages solve and repair make them, for tests of repair, channels and healing."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from replaceme.base.documents import Documents
from replaceme.base.params import read_params
from replaceme.base.plan import Block, Plan
from replaceme.edits.edits import Edits
from replaceme.methods.registry import METHODS
from replaceme.models.families import family_of
from replaceme.observers.statistics import take_statistics
from replaceme.repair.mend import Repair, mend

BLOCK = Block(2, 4)

Mending = Callable[..., tuple[list[Repair], dict[str, Any]]]


def solved(model: Any, documents: Documents, blocks: tuple[Block, ...], **options: Any) -> tuple[Edits, Mending]:
    """Return the edits as solve makes them, and ``mend`` for them, to be called with a scratch folder or none."""
    params = read_params(None, {"batch_size": 4, **options})
    family, method = family_of(model.config), METHODS[params.method]
    plan = Plan(blocks, method.statistics(params))
    taken = take_statistics(model, family, documents, blocks[0], plan.statistics, 4)
    edits = method.solve(params, blocks[0], taken.__getitem__).edits
    edits.removed_layers = plan.removed_layers
    return edits, partial(mend, params, model, family, documents, edits, plan)


def same_weights(a: Any, b: Any, tolerance: float = 1e-3) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(
        torch.allclose(one, other, rtol=tolerance, atol=tolerance * float(other.detach().abs().max())) for one, other in pairs
    )
