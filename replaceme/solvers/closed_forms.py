"""Ridge regression in closed form for each structure of a transform; float64, from sums only.

With ``S = MᵀM + αI`` and ``C = MᵀY`` (rows are tokens, ``Y ≈ M T``):

- ``dense``: ``T = S⁻¹C``.
- ``diagonal``: ``t_j = C_jj / S_jj``.
- ``triangular`` (lower: output j depends on the inputs i ≥ j): column j solves ``S[j:, j:] t = C[j:, j]``. With ``S = UUᵀ``, U
  upper triangular, each ``S[j:, j:]`` is ``U[j:, j:] U[j:, j:]ᵀ``, so ``T = U⁻ᵀ tril(U⁻¹C)`` solves all columns at once.
- ``two_vectors``: ``T = I + uvᵀ``, the ridge on ``uvᵀ``. With ``S = LLᵀ`` and ``R = MᵀY − MᵀM`` the objective is
  ``‖Lᵀuvᵀ − L⁻¹R‖²`` plus a constant, so the largest singular triple (σ, a, b) of ``L⁻¹R`` gives ``u = σL⁻ᵀa``, ``v = b``.
- ``orthogonal``: the map that folds after a norm, by a short iteration (``replaceme.solvers.procrustes``).
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from replaceme.base.errors import SolveError
from replaceme.solvers.procrustes import fit_orthogonal_map
from replaceme.solvers.ridge import require_full_rank, solve_ridge


def solve_closed_form(gram: Tensor, cross: Tensor, alpha: float, structure: str, norm: Tensor | None = None) -> Tensor:
    """Return ``argmin ‖Y − M T‖² + α‖T − P‖²`` over the transforms of a structure; P = I for two vectors, else 0.

    Args:
        gram: ``MᵀM``, (d, d), symmetric positive semi-definite.
        cross: ``MᵀY``, (d, d).
        alpha: ridge, in the units of ``gram``.
        structure: one of those above.
        norm: weight (d,) of the norm whose output M is, for an orthogonal map; None if there is no norm.

    Returns:
        T, (d, d) float64.

    Raises:
        SolveError: the system is singular to float64, or ``norm`` has zeros.
    """
    gram, cross = gram.double(), cross.double()
    if structure == "dense":
        return solve_ridge(gram, cross, alpha).transform
    if structure == "diagonal":
        return _diagonal(gram, cross, alpha)
    if structure == "orthogonal":
        return fit_orthogonal_map(gram, cross, alpha, norm)
    require_full_rank(torch.linalg.eigvalsh(gram), alpha)
    ridged = gram + alpha * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    return _triangular(ridged, cross) if structure == "triangular" else _two_vectors(ridged, cross - gram)


def title_suffix(structure: str) -> str:
    """Return a structure's words after the method's name in a title; none for a dense map."""
    return "" if structure == "dense" else f", {structure.replace('_', ' ')}"


def upper_cholesky(matrix: Tensor) -> Tensor:
    """Return U, upper triangular, with ``UUᵀ = matrix``. Raises SolveError where it is singular to float64."""
    return _cholesky(matrix.flip(0, 1)).flip(0, 1)


def squared_error(sums: Mapping[str, Tensor], transform: Tensor) -> Tensor:
    """Return ``‖Y − M T‖²`` () from ``gram``, ``cross`` and ``target_squares`` (``ΣY²``); rounding can take it below 0."""
    explained = 2 * (transform * sums["cross"]).sum() - (transform * (sums["gram"] @ transform)).sum()
    return sums["target_squares"] - explained


def _diagonal(gram: Tensor, cross: Tensor, alpha: float) -> Tensor:
    scale = gram.diagonal() + alpha
    if float(scale.min()) <= 0:
        raise SolveError(
            f"alpha: {alpha:g} leaves the least squares singular ({int((scale <= 0).sum())} of {len(gram)} dimensions of M are "
            "always 0); set it above 0.",
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
    # v is an eigenvector of the Gram matrix of ``whitened``; squaring loses no accuracy in the leading one.
    last = len(lower) - 1
    _, vectors = eigh((whitened.T @ whitened).cpu().numpy(), subset_by_index=[last, last])
    v = torch.from_numpy(np.ascontiguousarray(vectors)).to(lower.device)
    u = torch.linalg.solve_triangular(lower.T, whitened @ v, upper=True)
    return torch.eye(len(lower), dtype=torch.float64, device=lower.device) + u @ v.T


def _cholesky(ridged: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(ridged)
    if failed:
        raise SolveError("alpha: the least squares are singular to float64; raise it, or dataset_size.")
    return factor
