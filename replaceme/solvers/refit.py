"""Least squares for new weights of the host's last linears, toward the state at the cut.

ReplaceMe's transform of ``M = G Wᵀ`` only mixes the d outputs of the MLP; its last linear has f × d weights. Least squares over
all these weights, with a ridge toward ReplaceMe's fold, includes that fold and adds no parameters (rows are tokens, weighted by
w = 1/‖H‖²):

    refit:  W'ᵀ = argmin Σ w ‖H − Z − g W'ᵀ‖² + λ (W' − TᵀW) diag(S) (W' − TᵀW)ᵀ,   S = Σ w gᵀg
    joint:  the same for [A | G] toward H − h_in: the attention's output projection too, with the refit as its prior

The ridge is in each feature's own units; a plain ridge would penalise features of small magnitude far more than large ones. The
fit solves for the change from the prior. The sums already hold the current residuals, so the weights are not needed.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from replaceme.edits.edits import Edits
from replaceme.observers.features import Features
from replaceme.solvers.quality import gained, gained_by_ridge, relative, ridge_figures
from replaceme.solvers.ridge import solve_correction, solve_ridge


def refit(edits: Edits, host: int, sums: Mapping[str, Tensor], alpha: float, ridge: float) -> dict[str, float]:
    """Solve for the host's linears, add the solution to the edits, and return how well it fits.

    Args:
        edits: receives a transform (fitted with the same token weights) and corrections of the weights after it.
        host: the kept layer before the block.
        sums: ``replaceme.observers.statistics.FeatureGram``: of the MLP's features (refit), or of the attention's too (joint).
            Afterwards, ``gram`` holds nothing of use: it is factorised in its own memory.
        alpha: ridge of the transform, in the units of ``Σ w MᵀM``.
        ridge: λ of the corrections.

    Raises:
        ArgumentError: the least squares are singular with ``alpha`` or with ``ridge``.
    """
    features = Features.from_tensor(sums["layout"])
    solution = solve_ridge(sums["added_gram"], sums["added_cross"] + sums["added_gram"], alpha)
    transform = edits.transforms[host] = solution.transform
    step = transform - torch.eye(len(transform), dtype=transform.dtype)
    squares = float(sums["gap_squares"])
    of_transform = squares + gained(sums["added_gram"], sums["added_cross"], step)
    cross = sums["cross"] - sums["feature_added"] @ step
    left = of_transform
    alone, columns = features.only("mlp_output")
    for part, place in ((alone, columns), (features, slice(None))):
        gram, penalty = sums["gram"][place, place], part.per_column(dict.fromkeys(part.widths, ridge))
        last, diagonal = part == features, gram.diagonal().clone()
        change = solve_correction(gram, cross[place], penalty, overwrite=last)
        edits.correct_all(host, part.parts(change))
        left += gained_by_ridge(diagonal, cross[place], change, penalty)
        if last:
            break
        cross = cross - sums["gram"][:, place] @ change
    output_squares = float(sums["output_squares"])
    # A new attention output changes the input of an MLP after it, so a joint residual is that of the least squares only.
    name = "weighted_residual" if alone == features else "weighted_residual_joint"
    return {
        "tokens": int(sums["tokens"]),
        "weighted_residual_removed": relative(squares, output_squares),
        "weighted_residual_transform": relative(of_transform, output_squares),
        name: relative(left, output_squares),
        "distance_from_identity": float(step.norm() / len(step) ** 0.5),
        **ridge_figures(solution.eigenvalues, alpha),
    }
