"""Sums over tokens, in float64; Gram matrices among them, which cost as much as the layers they are taken at.

A Gram matrix is symmetric, so half of the products will do.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

# More parts save more products, down to a half, and multiply smaller matrices.
PARTS = 6


def squares(x: Tensor) -> Tensor:
    """Return ``xᵀx`` (k, k) of rows (tokens, k), in their format."""
    return mirror(add_squares(x.new_zeros(x.shape[1], x.shape[1]), x))


def add_squares(total: Tensor, x: Tensor) -> Tensor:
    """Add ``xᵀx`` to a sum (k, k) of which only the half above the diagonal counts until ``mirror``, and return it.

    The products are in the format of ``x``, whatever that of the sum is.
    """
    for start, stop in _parts(len(total)):
        part, left, right = total[start:stop, start:], x[:, start:stop].T, x[:, start:]
        if x.dtype == total.dtype:
            part.addmm_(left, right)
        else:
            part.add_(left @ right)
    return total


def mirror(total: Tensor) -> Tensor:
    """Complete a sum of ``add_squares`` and return it."""
    for start, stop in _parts(len(total)):
        total[stop:, start:stop] = total[start:stop, stop:].T
    return total


def _parts(width: int) -> Iterator[tuple[int, int]]:
    step = -(-width // PARTS)
    return ((start, start + step) for start in range(0, width, step))


class Sums:
    """Running sums by name, float64, on the device of what is added to them."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.squared: set[str] = set()

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Add a part to each of some sums."""
        for name, part in parts.items():
            self.totals[name] = self.totals[name].add_(part) if name in self.totals else part.double()

    def add_squares(self, name: str, x: Tensor) -> None:
        """Add ``xᵀx`` (k, k) of rows (tokens, k) to a sum; the products are in their format."""
        if name not in self.totals:
            self.totals[name] = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
            self.squared.add(name)
        add_squares(self.totals[name], x)

    @torch.inference_mode()
    def finished(self) -> dict[str, Tensor]:
        """Return the sums, when nothing more is to come."""
        for name in self.squared:
            mirror(self.totals[name])
        return self.totals


def token_weights(H: Tensor) -> Tensor:
    """Return (tokens, 1): ``1/‖H‖²``; a state of zeros weighs nothing."""
    squares = H.square().sum(dim=1, keepdim=True)
    return torch.where(squares > 0, 1 / squares, 0)
