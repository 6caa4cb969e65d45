"""Least squares for new weights of the last linears in the layer before the cut, toward the state at the cut.

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
from replaceme.solvers.quality import (
    describe_ridge,
    distance_from_identity,
    relative_residual,
    sse_change,
    sse_change_of_correction,
)
from replaceme.solvers.ridge import solve_correction, solve_ridge
from replaceme.statistics.features import Features


def refit(edits: Edits, layer: int, sums: Mapping[str, Tensor], alpha: float, ridge: float) -> dict[str, float]:
    """Solve for the layer's linears, add the solution to the edits, and return how well it fits.

    Args:
        edits: receives a transform (fitted with the same token weights) and corrections of the weights after it.
        layer: the kept layer before the removed block.
        sums: ``replaceme.statistics.cut_statistics.FeatureGram``: of the MLP's features (refit), or of the attention's too
            (joint). Afterwards, ``gram`` holds nothing of use: it is factorised in its own memory.
        alpha: ridge of the transform, in the units of ``Σ w MᵀM``.
        ridge: λ of the corrections.

    Raises:
        SolveError: the least squares are singular with ``alpha`` or with ``ridge``.
    """
    solution = solve_ridge(sums["added_gram"], sums["added_cross"] + sums["added_gram"], alpha)
    transform = edits.transforms[layer] = solution.transform
    added = transform - torch.eye(len(transform)).to(transform)
    sse_removed = float(sums["gap_squares"])
    sse_transform = sse_removed + sse_change(sums["added_gram"], sums["added_cross"], added)
    sse, cross = sse_transform, sums["cross"] - sums["feature_added"] @ added
    both = Features.from_tensor(sums["layout"])
    mlp, mlp_columns = both.only("mlp_output")
    for features, columns in ((mlp, mlp_columns), (both, slice(None))):
        gram, penalty = sums["gram"][columns, columns], features.per_column(dict.fromkeys(features.widths, ridge))
        is_last, diagonal = features == both, gram.diagonal().clone()
        change = solve_correction(gram, cross[columns], penalty, overwrite=is_last)
        edits.correct_all(layer, features.parts(change))
        sse += sse_change_of_correction(diagonal, cross[columns], change, penalty)
        if is_last:
            break
        cross = cross - sums["gram"][:, columns] @ change
    output_squares = float(sums["output_squares"])
    # A new attention output changes the input of an MLP after it, so a joint residual is that of the least squares only.
    name = "weighted_residual" if mlp == both else "weighted_residual_joint"
    return {
        "tokens": int(sums["tokens"]),
        "weighted_residual_removed": relative_residual(sse_removed, output_squares),
        "weighted_residual_transform": relative_residual(sse_transform, output_squares),
        name: relative_residual(sse, output_squares),
        "distance_from_identity": distance_from_identity(transform),
        **describe_ridge(solution.eigenvalues, alpha),
    }
