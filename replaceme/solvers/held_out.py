"""How strong a correction is: chosen by what it does on text that it was not fitted on.

The sums of a least squares add up over folds of documents. For each fold f and ridge Λ, the correction X is solved from the
sums of all other folds. Times s, it changes the fold's sum of squared errors by

    s² tr(Xᵀ S_f X) − 2 s tr(Xᵀ C_f),    S_f = Σ w gᵀg and C_f = Σ w gᵀe over the fold's tokens.

The sum over the folds is least at ``s = Σ tr(Xᵀ C_f) / Σ tr(Xᵀ S_f X)``, limited to [0, 1]: at 0, the weights stay. Larger
ridges are tried as long as this sum falls. (Shrinkage by cross-validation: Copas, Regression, prediction and shrinkage, 1983.)
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from replaceme.observers.walk import total
from replaceme.solvers.cholesky import factorized, solved

# Multiples of the ridge, tried in order until one is no better; and the smallest ridge for which float32 is precise enough.
MULTIPLES, FLOAT32_RIDGE = (1.0, 4.0, 16.0, 64.0), 1e-3
# Rows of a Gram matrix that are converted at once.
ROWS = 2048


@dataclass(frozen=True)
class Strength:
    """How a correction is solved and applied.

    Attributes:
        ridge: multiple of the ridge.
        scale: s, from 0 to 1.
    """

    ridge: float = 1.0
    scale: float = 1.0


def strength_of(folds: Sequence[Mapping[str, Tensor]], ridge: Tensor) -> Strength:
    """Return the strength that serves text of other folds best; the full one if there is no other fold.

    Args:
        folds: of each, ``gram`` S_f (k, k) and ``cross`` C_f (k, d), float64.
        ridge: (k,) float64, the diagonal of Λ, relative to each feature's sum of squares.
    """
    if len(folds) < 2:
        return Strength()
    penalties = ridge[ridge > 0]
    dtype = torch.float32 if float(penalties.min()) >= FLOAT32_RIDGE else torch.float64
    diagonal = total(fold["gram"].diagonal() for fold in folds)
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0)
    crosses = [(fold["cross"] * scale[:, None]).to(dtype) for fold in folds]
    ridge = ridge.to(diagonal.device, dtype)
    rest = torch.empty_like(folds[0]["gram"], dtype=dtype)
    best, least = Strength(), float("inf")
    for multiple in MULTIPLES:
        gained = squares = 0.0
        for fold, own_cross in zip(folds, crosses, strict=True):
            for rows, part in _scaled([other["gram"] for other in folds if other is not fold], scale):
                rest[rows] = part
            own = rest.diagonal().clone()
            # A feature that is zero in all other folds gets no weight.
            rest.diagonal().add_(torch.where(own > 0, multiple * ridge * own, 1))
            factor, failed = factorized(rest)
            if failed:
                break
            X = solved(factor, total(other for other in crosses if other is not own_cross))
            gained += float((X * own_cross).sum())
            squares += sum(float((X[rows] * (part.to(dtype) @ X)).sum()) for rows, part in _scaled([fold["gram"]], scale))
        else:
            share = min(max(gained / squares, 0.0), 1.0) if squares > 0 else 0.0
            change = share**2 * squares - 2 * share * gained
            if change >= least:
                return best
            best, least = Strength(multiple, share), change
    return best


def _scaled(grams: Sequence[Tensor], scale: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield some rows at a time of the sum of Gram matrices, in units of ``scale``: a copy would be as large as they are."""
    for start in range(0, len(scale), ROWS):
        rows = slice(start, start + ROWS)
        yield rows, total(gram[rows] for gram in grams) * scale * scale[rows, None]
