"""Shrinkage of a correction, chosen by cross-validation over folds of documents.

The sums of a least squares add up over folds. For each fold f and ridge Λ, the correction X is solved from the sums of all
other folds. Times s, it changes the fold's sum of squared errors by

    s² tr(Xᵀ S_f X) − 2 s tr(Xᵀ C_f),    S_f = Σ w gᵀg and C_f = Σ w gᵀe over the fold's tokens.

The sum over the folds is least at ``s = Σ tr(Xᵀ C_f) / Σ tr(Xᵀ S_f X)``, limited to [0, 1]: at 0, the weights stay. Larger
ridges are tried as long as this sum falls. (Copas, Regression, prediction and shrinkage, 1983.)
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from replaceme.solvers.cholesky import factorize, solve_factorized
from replaceme.statistics.walk import sum_tensors

# Multiples of the ridge, tried in order until one is no better; and the smallest ridge for which float32 is precise enough.
MULTIPLES, FLOAT32_RIDGE = (1.0, 4.0, 16.0, 64.0), 1e-3
# Rows of a Gram matrix that are converted at once.
ROWS = 2048


@dataclass(frozen=True)
class Shrinkage:
    """How a correction is solved and applied.

    Attributes:
        ridge_multiple: factor of the ridge.
        scale: s, from 0 to 1.
    """

    ridge_multiple: float = 1.0
    scale: float = 1.0


def choose_shrinkage(folds: Sequence[Mapping[str, Tensor]], ridge: Tensor) -> Shrinkage:
    """Return the shrinkage that serves text of other folds best; none if there is no other fold.

    Args:
        folds: of each, ``gram`` S_f (k, k) and ``cross`` C_f (k, d), float64.
        ridge: (k,) float64, the diagonal of Λ, relative to each feature's sum of squares.
    """
    if len(folds) < 2:
        return Shrinkage()
    dtype = torch.float32 if float(ridge[ridge > 0].min()) >= FLOAT32_RIDGE else torch.float64
    diagonal = sum_tensors(fold["gram"].diagonal() for fold in folds)
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0)
    grams, ridge = [fold["gram"] for fold in folds], ridge.to(diagonal.device, dtype)
    crosses = [(fold["cross"] * scale[:, None]).to(dtype) for fold in folds]
    best, least = Shrinkage(), float("inf")
    for multiple in MULTIPLES:
        sums = _held_out_sums(grams, crosses, scale, multiple * ridge)
        if sums is None:
            continue
        linear, squared = sums
        s = min(max(linear / squared, 0.0), 1.0) if squared > 0 else 0.0
        change = s**2 * squared - 2 * s * linear
        if change >= least:
            break
        best, least = Shrinkage(multiple, s), change
    return best


def _held_out_sums(
    grams: Sequence[Tensor], crosses: Sequence[Tensor], scale: Tensor, ridge: Tensor
) -> tuple[float, float] | None:
    """Return ``Σ tr(Xᵀ C_f)`` and ``Σ tr(Xᵀ S_f X)`` over the folds; None if the ridge leaves a solve singular.

    Args:
        grams: S_f (k, k) of each fold, float64.
        crosses: C_f (k, d) of each, in units of ``scale`` and in the format of the solves.
        scale: (k,) float64, the units.
        ridge: (k,) the diagonal of Λ, in the format of the solves.
    """
    linear = squared = 0.0
    rest = torch.empty_like(grams[0], dtype=ridge.dtype)
    for fold, (gram, cross) in enumerate(zip(grams, crosses, strict=True)):
        for rows, part in _scaled([*grams[:fold], *grams[fold + 1 :]], scale):
            rest[rows] = part
        diagonal = rest.diagonal().clone()
        # A feature that is zero in all other folds gets no weight.
        rest.diagonal().add_(torch.where(diagonal > 0, ridge * diagonal, 1))
        factor, failed = factorize(rest)
        if failed:
            return None
        X = solve_factorized(factor, sum_tensors([*crosses[:fold], *crosses[fold + 1 :]]))
        linear += float((X * cross).sum())
        squared += sum(float((X[rows] * (part.to(X.dtype) @ X)).sum()) for rows, part in _scaled([gram], scale))
    return linear, squared


def _scaled(grams: Sequence[Tensor], scale: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield some rows at a time of the sum of Gram matrices, in units of ``scale``: a copy would be as large as they are."""
    for start in range(0, len(scale), ROWS):
        rows = slice(start, start + ROWS)
        yield rows, sum_tensors(gram[rows] for gram in grams) * scale * scale[rows, None]
