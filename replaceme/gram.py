"""Gram matrices, which cost as much as the layers they are taken at: they are symmetric, so half of the products will do."""

from torch import Tensor

# More parts save more products, down to a half, and multiply smaller matrices.
PARTS = 6


def squares(x: Tensor) -> Tensor:
    """Return ``xᵀx`` (k, k) of rows (tokens, k), in their format."""
    width = x.shape[1]
    step = -(-width // PARTS)
    product = x.new_empty(width, width)
    for start in range(0, width, step):
        stop = start + step
        product[start:stop, start:] = x[:, start:stop].T @ x[:, start:]
        product[stop:, start:stop] = product[start:stop, stop:].T
    return product
