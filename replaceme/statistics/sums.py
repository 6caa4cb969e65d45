"""Sums over tokens, in float64.

A Gram matrix costs about as much as a layer. It is symmetric, so only about half of it is computed. Products of features are
float32 or float64, or bfloat16 beside a large ridge (``gram_format``).

A device without float64 computes products of a few tokens in float32, and the processor adds them up in float64. The shorter
the tiles, the smaller the error and the more is copied: with ``TILE`` tokens it is 3e-8 of a sum, whatever their number.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from replaceme.base.accelerators import float64_device, multiplies_bfloat16, to_float64
from replaceme.base.errors import SolveError
from replaceme.base.group import all_reduce_sum
from replaceme.models.dtypes import is_finite

# Blocks of columns of a Gram matrix. More of them save more products, at most half, but make the matrices smaller.
PARTS = 6
# Tokens of a product in float32, where the device has no float64.
TILE = 256
# From this ridge on, relative to the diagonal, the rounding of products to bfloat16 is small beside it. On the demo it moves
# eigenvalues, in units of the diagonal, by 0.01 at most, and raises a least squares' objective by less than 1e-6 of it. The
# shift grows with the root of the number of features, and falls with that of batches.
ROUNDING_RIDGE = 0.3


def squares(x: Tensor) -> Tensor:
    """Return ``xᵀx`` (k, k) of rows (tokens, k), in the format of ``x``."""
    return mirror(add_squares(x.new_zeros(x.shape[1], x.shape[1]), x))


def add_squares(total: Tensor, x: Tensor) -> Tensor:
    """Add ``xᵀx`` of rows (tokens, k) to ``total`` (k, k), in place and above the diagonal only, and return it.

    ``mirror`` completes the sum. Products are computed in the format of ``x``.
    """
    for rows in (x,) if x.device == total.device else x.split(TILE):
        for start, stop in _parts(len(total)):
            part, left, right = total[start:stop, start:], rows[:, start:stop].T, rows[:, start:]
            if x.dtype == total.dtype:
                part.addmm_(left, right)
            else:
                part.add_((left @ right).to(total.device))
    return total


def gram_format(states: torch.dtype, device: torch.device, ridge: float) -> torch.dtype:
    """Return the format of the products of features for a least squares with a ridge: bfloat16 where it serves, else float32.

    Args:
        states: the format that the features were computed in.
        device: where.
        ridge: the smallest λ of a feature, relative to its sum of squares; 0 where the column of ones is among them.
    """
    serves = states == torch.bfloat16 and ridge >= ROUNDING_RIDGE and multiplies_bfloat16(device)
    return torch.bfloat16 if serves else torch.float32


def widen(x: Tensor) -> Tensor:
    """Return ``x`` in the widest format that its device computes in: float64 or float32."""
    return x.double() if float64_device(x.device) == x.device else x.float()


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``leftᵀ right`` (k, d) of rows (tokens, k) and (tokens, d), in their format; sums of tiles in float64."""
    if float64_device(left.device) == left.device:
        return left.T @ right
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for part, other in zip(left.split(TILE), right.split(TILE), strict=True):
        total += (part.T @ other).cpu()
    return total


def mirror(total: Tensor) -> Tensor:
    """Copy the half above the diagonal of a sum of ``add_squares`` below it, in place, and return it."""
    for start, stop in _parts(len(total)):
        total[stop:, start:stop] = total[start:stop, stop:].T
    return total


def _parts(width: int) -> Iterator[tuple[int, int]]:
    step = -(-width // PARTS)
    return ((start, start + step) for start in range(0, width, step))


class Sums:
    """Running sums by name, float64, on the device of their first part, or on the processor if that has no float64."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        # Their halves above the diagonal.
        self.squares: dict[str, Tensor] = {}

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Add each part to the sum of its name."""
        for name, part in parts.items():
            known = self.totals.get(name)
            self.totals[name] = to_float64(part) if known is None else known.add_(part.to(known.device))

    def add_squares(self, name: str, x: Tensor) -> None:
        """Add ``xᵀx`` (k, k) of rows (tokens, k) to a sum; products are computed in the format of ``x``."""
        if name not in self.squares:
            self.squares[name] = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=float64_device(x.device))
        add_squares(self.squares[name], x)

    def all_reduce(self) -> None:
        """Add the sums of the processes that share a walk."""
        for sums in (self.totals, self.squares):
            all_reduce_sum(sums)

    @torch.inference_mode()
    def take_totals(self) -> dict[str, Tensor]:
        """Return the sums, once: they are kept no longer.

        Raises:
            SolveError: a sum is not finite.
        """
        totals = self.totals | {name: mirror(total) for name, total in self.squares.items()}
        self.totals, self.squares = {}, {}
        if not is_finite(*totals.values()):
            raise SolveError("dtype: the sums over the activations are not finite; use float32 or bfloat16.")
        return totals


def token_weights(H: Tensor) -> Tensor:
    """Return ``1/‖H‖²`` (tokens, 1) for states H (tokens, d); 0 for a state of zeros."""
    squares = H.square().sum(dim=1, keepdim=True)
    return torch.where(squares > 0, 1 / squares, 0)
