"""Coordinates in which a loss is about as steep in every direction, for solvers that go by its gradient.

Layers write a few dimensions a thousand times as strongly as the others, so that a step of T there moves the loss a million
times as much, and a gradient method crawls. With ``S = UUᵀ`` the loss's metric (``MᵀM`` of a squared error), U upper
triangular, the coordinates are the x of ``UᵀT`` in place of T's: for a dense map, and for a lower triangular one too, as
``UᵀT`` is lower triangular when T is; for two vectors those of ``Uᵀu``; for a diagonal map U is the root of S's diagonal.
"""

import torch
from torch import Tensor

from replaceme.solvers.closed_forms import upper_cholesky
from replaceme.solvers.structures import Parametrisation

# Of the metric's mean diagonal: what keeps directions that no token has from being stretched without end.
FLOOR = 1e-9


class Whitening:
    """A change of coordinates between x and y, both (n,)."""

    def __init__(self, structure: Parametrisation, metric: Tensor):
        """Factorise the metric, (d, d) symmetric positive semi-definite; its scale doesn't matter."""
        self.structure = structure
        scaled = metric / metric.diagonal().mean().clamp_min(torch.finfo(metric.dtype).tiny)
        scaled = scaled + FLOOR * torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
        self.upper = upper_cholesky(scaled) if structure.mixes else scaled.diagonal().sqrt().diag()

    def enter(self, x: Tensor) -> Tensor:
        """Return y of x."""
        return self.structure.rows(x, lambda part: self.upper.T @ part)

    def leave(self, y: Tensor) -> Tensor:
        """Return x of y."""
        return self.structure.rows(y, lambda part: torch.linalg.solve_triangular(self.upper.T, part, upper=False))

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Return the gradient in y of a function with ``gradient`` in x."""
        return self.structure.rows(gradient, lambda part: torch.linalg.solve_triangular(self.upper, part, upper=True))
