"""ReplaceMe with an objective of choice (arXiv 2505.02819, section 3): one transform a block, by an iterative solver.

    Σ_tokens loss + α‖T − P‖²_F,   P = 0; P = I for the fast cosine and for two vectors

The fast cosine, ``1 − cos(M T, Y)``, knows nothing of T's scale. A ridge to 0 would have no minimum, hence P = I; and T is
scaled at the end by the least-squares factor ``tr(TᵀMᵀY) / tr(TᵀMᵀM T)``. The elastic net is the squared error with
``α(ρ‖T‖₁ + (1 − ρ)/2 ‖T‖²)``. Only the cosine reads tokens; the squared errors need the sums alone.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from replaceme.base.combinations import TRANSFORMS, Values
from replaceme.base.compute import resolve_device
from replaceme.base.params import Params
from replaceme.base.plan import Block
from replaceme.base.progress import logger
from replaceme.edits.edits import Edits
from replaceme.methods.method import Method, Solved, Statistics
from replaceme.observers.shards import StoredShards
from replaceme.solvers.closed_forms import STRUCTURES, closed_form, structure_words
from replaceme.solvers.minimisers import Budget, Minimum, minimise
from replaceme.solvers.objectives import CosineLoss, Problem, SquaredError
from replaceme.solvers.quality import fit_quality, ridge_figures
from replaceme.solvers.structures import parametrisation

LOSSES = {"cosine": "cosine", "mse": "squared error", "elastic_net": "elastic net"}

# In units of the mean diagonal of MᵀM.
START_RIDGE = 1e-6

Sums = Mapping[str, Tensor]


def statistics(params: Params) -> tuple[str, ...]:
    """Return what the objective needs: single tokens for the cosine alone."""
    if params.loss != "cosine":
        return ("gram", "sample")
    return ("gram", "sample", _tokens(params))


def solve(params: Params, block: Block, statistics: Statistics) -> Solved:
    """Return the transform, how well it fits, and how the solver came there."""
    sums, sample = statistics("gram"), statistics("sample")
    problem = problem_of(params, sums, statistics)
    start = problem.structure.start(_start(params, sums).to(problem.prior))
    found = minimise(problem, start, params.solver, _budget(params))
    transform = problem.structure.build(found.x).cpu()
    fit = _solver_figures(found)
    if _is_fast(params):
        fit["rescaled_by"] = least_squares_scale(transform, sums)
        transform = transform * fit["rescaled_by"]
    fit |= fit_quality(transform, sums, sample)
    if params.loss == "mse":
        fit |= ridge_figures(torch.linalg.eigvalsh(sums["gram"]), params.alpha)
    _report(params, block.host, fit)
    edits = Edits(f"ReplaceMe ({_words(params)})", [], {block.host: transform})
    return Solved(edits, fit, loss_curve=list(found.curve.items()))


def problem_of(params: Params, sums: Sums, statistic: Statistics) -> Problem:
    """Return the objective of one block.

    Args:
        params: loss, its form, the transform's structure and the penalty.
        sums: the statistic ``gram``.
        statistic: the block's statistics by name; asked for tokens alone.
    """
    device, width = resolve_device(params.device), len(sums["gram"])
    to_identity = _is_fast(params) or params.transform == "two_vectors"
    prior = torch.eye(width, dtype=torch.float64, device=device) * float(to_identity)
    structure = parametrisation(STRUCTURES[params.transform], width, device)
    if params.loss == "cosine":
        shards = StoredShards(statistic(_tokens(params))["counts"], statistic)
        # Minibatches are noisier than float32; a line search is not.
        dtype = torch.float32 if params.solver == "adam" else torch.float64
        return Problem(CosineLoss(shards, device, dtype), structure, prior, params.alpha)
    if params.loss == "mse":
        return Problem(SquaredError(sums, device), structure, prior, params.alpha)
    ridge, lasso = params.alpha * (1 - params.l1_ratio) / 2, params.alpha * params.l1_ratio
    return Problem(SquaredError(sums, device), structure, prior, ridge, lasso)


def least_squares_scale(transform: Tensor, sums: Sums) -> float:
    """Return the factor s that makes ``‖Y − s M T‖²`` smallest."""
    return float((transform * sums["cross"]).sum() / (transform * (sums["gram"] @ transform)).sum())


def _start(params: Params, sums: Sums) -> Tensor:
    if params.start == "identity":
        return torch.eye(len(sums["gram"]), dtype=torch.float64)
    # The cosine's α has the units of that loss: as a ridge on MᵀM it would be felt by nothing, or ruin the start.
    alpha = START_RIDGE * float(sums["gram"].diagonal().mean()) if params.loss == "cosine" else params.alpha
    return closed_form(sums["gram"], sums["cross"], alpha, STRUCTURES[params.transform])


def _budget(params: Params) -> Budget:
    return Budget(params.learning_rate, params.epochs, params.tokens_per_step, params.max_iterations)


def _is_fast(params: Params) -> bool:
    return params.loss == "cosine" and not params.accurate


def _tokens(params: Params) -> str:
    return "tokens_accurate" if params.accurate else "tokens"


def _words(params: Params) -> str:
    form = ", accurate" if params.loss == "cosine" and params.accurate else ""
    return f"{LOSSES[params.loss]}{form}{structure_words(params.transform)}, {params.solver}"


def _solver_figures(found: Minimum) -> dict[str, Any]:
    return {
        "loss_start": found.curve[0],
        "loss_end": found.lowest,
        "iterations": max(found.curve),
        "converged": int(found.converged),
    }


def _report(params: Params, host: int, fit: Mapping[str, Any]) -> None:
    logger.info(
        "solve: host %d, %d tokens, loss %.6g to %.6g in %d iterations of %s, relative residual %.4f (%.4f with nothing in the "
        "block's place), mean cosine %.4f",
        host, fit["tokens"], fit["loss_start"], fit["loss_end"], fit["iterations"], params.solver, fit["relative_residual"],
        fit["relative_residual_removed"], fit["mean_cosine"],
    )  # fmt: skip
    if not fit["converged"] and fit["iterations"]:
        key = "epochs" if params.solver == "adam" else "max_iterations"
        advice = " or change learning_rate" if params.solver == "adam" else ""
        logger.warning("%s: %s did not come to rest within %d; raise it%s", key, params.solver, getattr(params, key), advice)


def refusals(values: Values) -> list[str]:
    """Return a sentence for each objective, structure and solver that do not go together."""
    transform, loss, solver = (values[key] for key in ("transform", "loss", "solver"))
    problems = []
    if transform == "orthogonal":
        problems.append("transform: orthogonal is fitted by least squares alone; use method lstsq.")
    if transform in ("refit", "joint", "channels"):
        problems.append(
            f"transform: {transform} solves least squares for the host's own weights and has no other objective; use method "
            "lstsq, or transform dense, diagonal, two_vectors or triangular."
        )
    if loss == "elastic_net" and solver in ("cg", "trust_region"):
        problems.append(f"solver: {solver} needs a smooth objective, and loss elastic_net has a kink at 0; use lbfgs or adam.")
    if loss == "elastic_net" and transform == "two_vectors":
        problems.append(
            "transform: two_vectors has no entries of its own that loss elastic_net could set to 0; use dense, diagonal or "
            "triangular, or loss mse."
        )
    return problems


METHOD = Method(
    stand_in=lambda params: "map",
    statistics=statistics,
    solve=solve,
    words="fits what takes the block's place",
    transforms=TRANSFORMS,
    refusals=refusals,
)
