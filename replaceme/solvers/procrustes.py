"""The map that folds after a norm: an orthogonal matrix between two diagonal ones, fitted by least squares from sums only.

A norm with weight γ after the MLP has the output ``M = u diag(γ)``, u of a fixed length for each token. A rotation of the
norm's input rotates u, and γ can be replaced, so ``M T = u Q D`` with ``T = diag(γ)⁻¹ Q D`` folds exactly. The fit is over
these maps, rather than a projection of the best T onto them. With ``S = diag(γ)⁻¹(MᵀM + αI)diag(γ)⁻¹`` and ``C =
diag(γ)⁻¹MᵀY`` it minimises

    f(Q, D) = tr(D QᵀSQ D) − 2 tr(D QᵀC)

Given Q, D has a closed form. If D is a multiple of the identity, Q is ``polar(C)`` (orthogonal Procrustes, Schönemann 1966):
the start. For any other D, ``−tr((δ − D²)QᵀSQ)`` with ``δ = max D²`` is concave in Q and lies below its tangent, so the step
``Q ← polar(C D + S Q(δ − D²))`` never raises f. Nesterov's momentum, reset when f rises, needs a quarter of the steps.
"""

import torch
from torch import Tensor

from replaceme.base.errors import SolveError

# Stop at this gain of an iteration, relative to f, or after this many iterations.
GAIN, ITERATIONS = 2e-5, 200


def fit_orthogonal_map(gram: Tensor, cross: Tensor, alpha: float, norm: Tensor | None = None) -> Tensor:
    """Return ``argmin ‖Y − M T‖² + α‖T‖²`` over ``T = diag(γ)⁻¹ Q D``; a local minimum, no worse than the best ``s Q``.

    Args:
        gram: ``MᵀM``, (d, d) float64; the fit runs on its device.
        cross: ``MᵀY``, (d, d) float64, on the same device.
        alpha: ridge, in the units of ``gram``.
        norm: γ (d,); None if there is no norm: all ones.

    Returns:
        T, (d, d) float64.

    Raises:
        SolveError: α = 0 and M is 0, or γ has zeros.
    """
    gamma = torch.ones(len(gram), dtype=torch.float64, device=gram.device) if norm is None else norm.to(gram)
    if not bool((gamma != 0).all()):
        raise SolveError("transform: an orthogonal map divides by the norm's weight, which has zeros here.")
    S = (gram + alpha * torch.eye(len(gram), dtype=torch.float64, device=gram.device)) / gamma / gamma[:, None]
    C = cross / gamma[:, None]
    if not float(S.diagonal().sum()) > 0:
        raise SolveError(f"alpha: {alpha:g} leaves the least squares singular (M is always 0); set it above 0.")
    Q = polar_factor(C)
    D = ((Q * C).sum() / S.diagonal().sum()).expand(len(S))
    lowest, best, momentum, before = torch.inf, Q * D, 0, S @ Q
    for _ in range(ITERATIONS):
        turned = S @ Q
        squares, products = (Q * turned).sum(dim=0), (Q * C).sum(dim=0)
        D = torch.where(squares > 0, products / squares, D)
        value = float((D.square() * squares - 2 * D * products).sum())
        if 0 <= lowest - value <= GAIN * abs(value):
            break
        if value < lowest:
            lowest, best, momentum = value, Q * D, momentum + 1
        else:
            momentum = 0
        ahead = momentum / (momentum + 3) * (turned - before)
        Q, before = polar_factor(C * D + (turned + ahead) * (D.square().max() - D.square())), turned
    return best / gamma[:, None]


def polar_factor(matrix: Tensor) -> Tensor:
    """Return the orthogonal matrix nearest to ``matrix`` (d, d)."""
    left, _, right = torch.linalg.svd(matrix)
    return left @ right
