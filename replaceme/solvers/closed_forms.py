"""Squared error with a ridge, in closed form, for each structure that a transform can have; float64, from sums alone.

With ``S = MᵀM + αI`` and ``C = MᵀY`` (rows are tokens, ``Y ≈ M T``):

- ``dense``: ``T = S⁻¹C``.
- ``diagonal``: ``t_j = C_jj / S_jj``.
- ``triangular`` (lower: output j is made of the inputs i ≥ j): column j solves ``S[j:, j:] t = C[j:, j]``. With ``S = UUᵀ``, U
  upper triangular, each ``S[j:, j:]`` is ``U[j:, j:] U[j:, j:]ᵀ``, so that ``T = U⁻ᵀ tril(U⁻¹C)`` solves all columns at once.
- ``two_vectors``: ``T = I + uvᵀ``, the ridge on ``uvᵀ``. With ``S = LLᵀ`` and ``R = MᵀY − MᵀM`` the objective is
  ``‖Lᵀuvᵀ − L⁻¹R‖²`` and a constant, so that the largest singular triple (σ, a, b) of ``L⁻¹R`` gives ``u = σL⁻ᵀa``, ``v = b``.
- ``orthogonal``: what folds behind a norm, by a few steps of its own (``replaceme.solvers.procrustes``).
"""

from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from replaceme.solvers.arguments import ArgumentError
from replaceme.solvers.procrustes import orthogonal_map
from replaceme.solvers.ridge import require_full_rank, solve_ridge

Structure = Literal["dense", "diagonal", "two_vectors", "triangular", "orthogonal"]
STRUCTURES: Mapping[str, Structure] = {name: name for name in get_args(Structure)}


def closed_form(gram: Tensor, cross: Tensor, alpha: float, structure: Structure, norm: Tensor | None = None) -> Tensor:
    """Return ``argmin ‖Y − M T‖² + α‖T − P‖²`` over the transforms of a structure; P = I for two vectors, else 0.

    Args:
        gram: ``MᵀM``, (d, d), symmetric positive semi-definite.
        cross: ``MᵀY``, (d, d).
        alpha: ridge, in the units of ``gram``.
        structure: which entries of T may differ from P, and how.
        norm: weight (d,) of the norm that M has gone through, for an orthogonal map; None is no norm.

    Returns:
        T, (d, d) float64.

    Raises:
        ArgumentError: the system is singular to float64, with this alpha.
    """
    gram, cross = gram.double(), cross.double()
    if structure == "dense":
        return solve_ridge(gram, cross, alpha).transform
    if structure == "diagonal":
        return _diagonal(gram, cross, alpha)
    if structure == "orthogonal":
        return orthogonal_map(gram, cross, alpha, norm)
    require_full_rank(torch.linalg.eigvalsh(gram), alpha)
    ridged = gram + alpha * torch.eye(len(gram), dtype=torch.float64)
    return _triangular(ridged, cross) if structure == "triangular" else _two_vectors(ridged, cross - gram)


def structure_words(structure: str) -> str:
    """Return what a title says of a structure behind the method's name: nothing of a dense one."""
    return "" if structure == "dense" else f", {structure.replace('_', ' ')}"


def upper_cholesky(matrix: Tensor) -> Tensor:
    """Return U, upper triangular, with ``UUᵀ = matrix``. Raises ArgumentError where it is singular to float64."""
    return _cholesky(matrix.flip(0, 1)).flip(0, 1)


def squared_error(sums: Mapping[str, Tensor], transform: Tensor) -> float:
    """Return ``‖Y − M T‖²`` from ``gram``, ``cross`` and ``target_squares`` (``ΣY²``); never below zero, as rounding can be."""
    explained = 2 * (transform * sums["cross"]).sum() - (transform * (sums["gram"] @ transform)).sum()
    return max(float(sums["target_squares"] - explained), 0.0)


def _diagonal(gram: Tensor, cross: Tensor, alpha: float) -> Tensor:
    scale = gram.diagonal() + alpha
    if float(scale.min()) <= 0:
        raise ArgumentError(
            f"{{alpha}}: {alpha:g} leaves the least squares singular ({int((scale <= 0).sum())} of {len(gram)} dimensions of M "
            "are always 0); set {alpha} above 0."
        )
    return torch.diag(cross.diagonal() / scale)


def _triangular(ridged: Tensor, cross: Tensor) -> Tensor:
    upper = upper_cholesky(ridged)
    forward = torch.linalg.solve_triangular(upper, cross, upper=True).tril()
    return torch.linalg.solve_triangular(upper.T, forward, upper=False).tril()


def _two_vectors(ridged: Tensor, remaining: Tensor) -> Tensor:
    from scipy.linalg import eigh

    lower = _cholesky(ridged)
    whitened = torch.linalg.solve_triangular(lower, remaining, upper=False)
    # The right singular vector by the eigenvectors of the square: the largest one loses nothing by it.
    last = len(lower) - 1
    _, vectors = eigh((whitened.T @ whitened).numpy(), subset_by_index=[last, last])
    v = torch.from_numpy(np.ascontiguousarray(vectors))
    u = torch.linalg.solve_triangular(lower.T, whitened @ v, upper=True)
    return torch.eye(len(lower), dtype=torch.float64) + u @ v.T


def _cholesky(ridged: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(ridged)
    if failed:
        raise ArgumentError("{alpha}: the least squares are singular to float64; raise {alpha}, or {tokens}.")
    return factor
