"""Preconditioning of the iterative solvers: coordinates in which a loss is about equally steep in every direction.

Some dimensions of M are a thousand times as large as the others, so a step of T there moves the loss a million times as much,
and gradient methods become slow. With the loss's metric ``S = UUᵀ`` (``MᵀM`` for a squared error), U upper triangular, the
solver varies the free numbers of ``UᵀT`` instead of T's; for two vectors, ``Uᵀu`` and v. This also suits a lower triangular T,
as ``UᵀT`` is lower triangular too. For a diagonal map, U is the square root of S's diagonal.
"""

import torch
from torch import Tensor

from replaceme.solvers.closed_forms import upper_cholesky
from replaceme.solvers.structures import Parametrisation

# Added to the metric's diagonal, relative to its mean: limits the scaling of directions that no token has.
FLOOR = 1e-9


class Whitening:
    """A change of coordinates between x and y, both (n,)."""

    def __init__(self, structure: Parametrisation, metric: Tensor):
        """Factorise the metric, (d, d) symmetric positive semi-definite, up to its scale."""
        self.structure = structure
        scaled = metric / metric.diagonal().mean().clamp_min(torch.finfo(metric.dtype).tiny)
        scaled = scaled + FLOOR * torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
        self.upper = upper_cholesky(scaled) if structure.mixes else scaled.diagonal().sqrt().diag()

    def enter(self, x: Tensor) -> Tensor:
        """Return y from x."""
        return self.structure.rows(x, lambda part: self.upper.T @ part)

    def leave(self, y: Tensor) -> Tensor:
        """Return x from y."""
        return self.structure.rows(y, lambda part: torch.linalg.solve_triangular(self.upper.T, part, upper=False))

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Return the gradient in y of a function whose gradient in x is ``gradient``."""
        return self.structure.rows(gradient, lambda part: torch.linalg.solve_triangular(self.upper, part, upper=True))
