"""Gram matrices, which cost as much as the layers they are taken at: they are symmetric, so half of the products will do."""

from collections.abc import Iterator

from torch import Tensor

# More parts save more products, down to a half, and multiply smaller matrices.
PARTS = 6


def squares(x: Tensor) -> Tensor:
    """Return ``xᵀx`` (k, k) of rows (tokens, k), in their format."""
    return mirror(add_squares(x.new_zeros(x.shape[1], x.shape[1]), x))


def add_squares(total: Tensor, x: Tensor) -> Tensor:
    """Add ``xᵀx`` to a sum (k, k) of which only the half above the diagonal counts until ``mirror``, and return it."""
    for start, stop in _parts(len(total)):
        total[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])
    return total


def mirror(total: Tensor) -> Tensor:
    """Complete a sum of ``add_squares`` and return it."""
    for start, stop in _parts(len(total)):
        total[stop:, start:stop] = total[start:stop, stop:].T
    return total


def _parts(width: int) -> Iterator[tuple[int, int]]:
    step = -(-width // PARTS)
    return ((start, start + step) for start in range(0, width, step))
