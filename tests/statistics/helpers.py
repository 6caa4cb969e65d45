"""The published M, Z and H of one block, by plain hooks."""

import numpy as np
import torch

from replaceme.base.documents import Documents
from replaceme.base.plan import Block
from tests.helpers import passing

BLOCK = Block(start=2, end=4)


def at_cut(model: torch.nn.Module, documents: Documents) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return M, Z and H of all tokens, document by document without padding."""
    host = passing(model, BLOCK.layer_before_cut, documents)
    return host["M"], host["output"] - host["M"], passing(model, BLOCK.end - 1, documents)["output"]
