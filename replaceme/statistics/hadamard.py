"""Hadamard matrices: entries ±1, orthogonal rows.

Kronecker products of a Sylvester matrix (order 2^k) and a Paley matrix, of order q + 1 (prime q = 4k + 3) or 2(q + 1) (prime
q = 4k + 1), made from the quadratic residues modulo q (Paley, "On orthogonal matrices", 1933). These orders cover the widths of
the usual models: 576 = 16 · 36, 896 = 32 · 28, 3072 = 256 · 12, 5120 = 256 · 20.
"""

from math import isqrt

import torch
from torch import Tensor


def hadamard(order: int) -> Tensor | None:
    """Return an (order, order) float64 matrix, scaled to be orthonormal; None if the constructions give none of this order."""
    import scipy.linalg

    core = _core(order)
    if core is None:
        return None
    signs = torch.kron(torch.from_numpy(scipy.linalg.hadamard(order // len(core))), core)
    return signs.double() / order**0.5


def _core(order: int) -> Tensor | None:
    """Return the smallest Paley matrix, or (1), whose order times a power of 2 is ``order``; None if there is none."""
    sizes = [order >> halved for halved in range(order.bit_length()) if order % (1 << halved) == 0]
    return next((core for size in reversed(sizes) if (core := _paley(size)) is not None), None)


def _paley(size: int) -> Tensor | None:
    if size == 1:
        return torch.ones(1, 1, dtype=torch.int64)
    if _is_prime(size - 1) and size % 4 == 0:
        return _bordered(size - 1, -1) + torch.eye(size, dtype=torch.int64)
    half = size // 2
    if size % 4 == 0 and half % 4 == 2 and _is_prime(half - 1):
        off_diagonal, diagonal = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
        return torch.kron(_bordered(half - 1, 1), off_diagonal) + torch.kron(torch.eye(half, dtype=torch.int64), diagonal)
    return None


def _bordered(q: int, sign: int) -> Tensor:
    """Return (q + 1, q + 1): the matrix χ(i − j) with a row of ones above it and a column of ``sign`` on its left.

    χ is the quadratic character modulo q: 1 for squares, 0 for 0 and −1 for all others.
    """
    squares = torch.full((q,), -1)
    squares[torch.arange(q) ** 2 % q] = 1
    squares[0] = 0
    indices = torch.arange(q)
    bordered = torch.ones(q + 1, q + 1, dtype=torch.int64)
    bordered[0, 0], bordered[1:, 0] = 0, sign
    bordered[1:, 1:] = squares[(indices[:, None] - indices) % q]
    return bordered


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, isqrt(number) + 1))
