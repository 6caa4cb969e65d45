"""Parametrisations of structured transforms: T as a function of a vector x of free numbers, for solvers over vectors.

    dense        x = all entries of T
    diagonal     x = the diagonal
    triangular   x = the entries on and below the diagonal (rows are tokens: output j depends on the inputs i ≥ j)
    two_vectors  x = (u, v),  T = I + uvᵀ

Each is a map ``build`` from x to T with its derivatives: ``pull_back`` takes a gradient in T to one in x, ``push`` a step in x
to one in T, and ``bend`` returns the Hessian's second-derivative term of ``build``, which is 0 unless the structure is two
vectors.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from replaceme.solvers.closed_forms import Structure


class Parametrisation(Protocol):
    """A structure of T (d, d); all tensors are of T's dtype and device.

    Attributes:
        bends: whether the map from x to T is curved, so ``bend`` is not 0.
        mixes: whether T keeps its structure under multiplication by a lower triangular matrix from the left.
    """

    bends: bool
    mixes: bool

    def start(self, transform: Tensor) -> Tensor:
        """Return x (n,) of a transform that has the structure."""
        ...

    def build(self, x: Tensor) -> Tensor:
        """Return T (d, d)."""
        ...

    def pull_back(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient in x (n,) of a function of T whose gradient in T is ``gradient`` (d, d)."""
        ...

    def push(self, x: Tensor, step: Tensor) -> Tensor:
        """Return the change of T (d, d), to first order, for a change of x (n,)."""
        ...

    def bend(self, step: Tensor, gradient: Tensor) -> Tensor:
        """Return (n,): ``∂²T/∂x² · step``, contracted with a gradient in T (d, d)."""
        ...

    def rows(self, x: Tensor, operator: Callable[[Tensor], Tensor]) -> Tensor:
        """Return x (n,) after a linear operator acts on T from the left, or on u of two vectors."""
        ...


class Entries:
    """The entries of T that may differ from 0, in row-major order."""

    bends = False

    def __init__(self, free: Tensor):
        """Take the mask (d, d) bool of these entries: all, those on and below the diagonal, or the diagonal."""
        self.free = free
        self.mixes = int(free.sum()) > len(free)

    def start(self, transform: Tensor) -> Tensor:
        return transform[self.free]

    def build(self, x: Tensor) -> Tensor:
        transform = torch.zeros(self.free.shape, dtype=x.dtype, device=x.device)
        transform[self.free] = x
        return transform

    def pull_back(self, x: Tensor, gradient: Tensor) -> Tensor:
        return gradient[self.free]

    def push(self, x: Tensor, step: Tensor) -> Tensor:
        return self.build(step)

    def bend(self, step: Tensor, gradient: Tensor) -> Tensor:
        return torch.zeros_like(step)

    def rows(self, x: Tensor, operator: Callable[[Tensor], Tensor]) -> Tensor:
        return operator(self.build(x))[self.free]


class TwoVectors:
    """``T = I + uvᵀ``."""

    bends = True
    mixes = True

    def start(self, transform: Tensor) -> Tensor:
        """Return (u, v) of equal norm; for the identity u = 0 and v of norm 1, since (0, 0) is a saddle point."""
        width = len(transform)
        left, size, right = torch.linalg.svd(transform - torch.eye(width, dtype=transform.dtype, device=transform.device))
        if not size[0] > 0:
            return torch.cat([torch.zeros_like(size), torch.full_like(size, width**-0.5)])
        return torch.cat([left[:, 0], right[0]]) * size[0].sqrt()

    def build(self, x: Tensor) -> Tensor:
        u, v = x.chunk(2)
        return torch.eye(len(u), dtype=x.dtype, device=x.device) + torch.outer(u, v)

    def pull_back(self, x: Tensor, gradient: Tensor) -> Tensor:
        u, v = x.chunk(2)
        return torch.cat([gradient @ v, gradient.T @ u])

    def push(self, x: Tensor, step: Tensor) -> Tensor:
        (u, v), (du, dv) = x.chunk(2), step.chunk(2)
        return torch.outer(du, v) + torch.outer(u, dv)

    def bend(self, step: Tensor, gradient: Tensor) -> Tensor:
        return self.pull_back(step, gradient)

    def rows(self, x: Tensor, operator: Callable[[Tensor], Tensor]) -> Tensor:
        u, v = x.chunk(2)
        return torch.cat([operator(u[:, None])[:, 0], v])


def parametrisation(structure: Structure, width: int, device: torch.device | str = "cpu") -> Parametrisation:
    """Return the parametrisation of a structure, by name, for T (width, width)."""
    if structure == "two_vectors":
        return TwoVectors()
    every = torch.ones(width, width, dtype=torch.bool, device=device)
    return Entries({"dense": every, "triangular": every.tril(), "diagonal": every.tril().triu()}[structure])
