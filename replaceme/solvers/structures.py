"""Structured transforms as functions of a vector x, which the solvers vary and autograd differentiates:

    dense        x = all entries of T
    diagonal     x = the diagonal
    triangular   x = the entries on and below the diagonal (rows are tokens: output j depends on the inputs i ≥ j)
    two_vectors  x = (u, v),  T = I + uvᵀ

With an L1 penalty, x = (T⁺, T⁻), both at least 0, where ‖T‖₁ = Σ x is smooth and exact zeros lie at the bound.

Whitened, x holds the same numbers of ``R T`` instead of T's (``R u`` of two vectors), with ``RᵀR`` the metric of the loss: some
dimensions of M are a thousand times as large as the others, so T's rows are a million times as steep. A lower triangular R
keeps a triangular T triangular; where rows must not mix, R is diagonal.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from replaceme.solvers.closed_forms import upper_cholesky

# Added to the metric's diagonal, relative to its mean: limits the scaling of directions that no token has.
FLOOR = 1e-9


@dataclass(frozen=True)
class Entries:
    """The entries of T (d, d) that may differ from 0, in row-major order.

    Attributes:
        free: (d, d) bool, the mask of these entries.
        root: R, (d, d) lower triangular; None: the identity.
    """

    free: Tensor
    root: Tensor | None = None

    def vector(self, transform: Tensor) -> Tensor:
        """Return x (n,) of a transform (d, d) that has the structure."""
        return _multiply(self.root, transform)[self.free]

    def transform(self, x: Tensor) -> Tensor:
        """Return T (d, d)."""
        return _solve(self.root, torch.zeros_like(self.free, dtype=x.dtype).masked_scatter(self.free, x))

    def whitened(self, metric: Tensor) -> "Entries":
        """Return the same structure in coordinates where the metric (d, d), of any scale, is about the identity."""
        return replace(self, root=_root(metric, diagonal=int(self.free.sum()) == len(self.free)))


class SplitEntries(Entries):
    """The positive parts of these entries, then the negative ones."""

    def vector(self, transform: Tensor) -> Tensor:
        x = super().vector(transform)
        return torch.cat([x.clamp_min(0), (-x).clamp_min(0)])

    def transform(self, x: Tensor) -> Tensor:
        positive, negative = x.chunk(2)
        return super().transform(positive - negative)

    def l1_norm(self, x: Tensor) -> Tensor:
        """Return ``Σ T⁺ + T⁻`` (), which is ‖T‖₁ if one of each two is 0, as at any minimum."""
        positive, negative = x.chunk(2)
        return super().transform(positive + negative).sum()

    def whitened(self, metric: Tensor) -> "SplitEntries":
        return replace(self, root=_root(metric, diagonal=True))


@dataclass(frozen=True)
class TwoVectors:
    """``T = I + uvᵀ``; root as in ``Entries``."""

    root: Tensor | None = None

    def vector(self, transform: Tensor) -> Tensor:
        """Return (u, v) of equal norm; for the identity u = 0 and v of norm 1, since (0, 0) is a saddle point."""
        left, size, right = torch.linalg.svd(transform - torch.eye(len(transform)).to(transform))
        u, v = left[:, :1] * size[0].sqrt(), right[0] * size[0].sqrt()
        if not size[0] > 0:
            v = torch.full_like(size, len(size) ** -0.5)
        return torch.cat([_multiply(self.root, u)[:, 0], v])

    def transform(self, x: Tensor) -> Tensor:
        u, v = x.chunk(2)
        return torch.eye(len(u)).to(x) + _solve(self.root, u[:, None]) * v

    def whitened(self, metric: Tensor) -> "TwoVectors":
        return TwoVectors(_root(metric, diagonal=False))


Parametrisation = Entries | TwoVectors


def parametrise(structure: str, width: int, device: torch.device, *, split: bool = False) -> Parametrisation:
    """Return the parametrisation of a structure, for T (width, width); ``split`` for an L1 penalty on its entries."""
    if structure == "two_vectors":
        return TwoVectors()
    every = torch.ones(width, width, dtype=torch.bool, device=device)
    free = {"dense": every, "triangular": every.tril(), "diagonal": every.tril().triu()}[structure]
    return SplitEntries(free) if split else Entries(free)


def _root(metric: Tensor, *, diagonal: bool) -> Tensor:
    scaled = metric / metric.diagonal().mean().clamp_min(torch.finfo(metric.dtype).tiny)
    scaled.diagonal().add_(FLOOR)
    return scaled.diagonal().sqrt().diag() if diagonal else upper_cholesky(scaled).T


def _multiply(root: Tensor | None, rows: Tensor) -> Tensor:
    return rows if root is None else root @ rows


def _solve(root: Tensor | None, rows: Tensor) -> Tensor:
    return rows if root is None else torch.linalg.solve_triangular(root, rows, upper=False)
