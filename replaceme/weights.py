"""How much each token counts in the fits that are ours.

``1/‖H‖²`` of the state that is to be reached: every token then counts by its relative error. Without weights, a few tokens with
massive activations decide the fit.
"""

import torch
from torch import Tensor


def token_weights(H: Tensor) -> Tensor:
    """Return (tokens, 1): ``1/‖H‖²``; a state of zeros weighs nothing."""
    squares = H.square().sum(dim=1, keepdim=True)
    return torch.where(squares > 0, 1 / squares, 0)
