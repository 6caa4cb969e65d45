"""ReplaceMe with a selectable objective (arXiv 2505.02819, section 3): one transform per block, by an iterative solver.

    Σ_tokens loss + α‖T − P‖²_F,   P = 0; P = I for the fast cosine and for two vectors

The fast cosine, ``1 − cos(M T, Y)``, does not depend on T's scale. A ridge toward 0 would have no minimum, hence P = I; and T
is scaled at the end by the least-squares factor ``tr(TᵀMᵀY) / tr(TᵀMᵀM T)``. The elastic net is the squared error with
``α(ρ‖T‖₁ + (1 − ρ)/2 ‖T‖²)``. Only the cosine reads tokens; the squared errors need the sums alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from replaceme.base.combinations import NEW_WEIGHTS, TRANSFORMS, MethodStage, Settings, Use, Values
from replaceme.base.errors import ParameterError, SolveError
from replaceme.base.parameters import Params
from replaceme.base.plan import Block
from replaceme.base.progress import logger
from replaceme.methods.method import Method, Solved, Statistics, require_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from replaceme.models.families import Family
    from replaceme.models.model import Model
    from replaceme.solvers.objectives import Problem

LOSSES = {"cosine": "cosine", "mse": "squared error", "elastic_net": "elastic net"}

# In units of the mean diagonal of MᵀM.
START_RIDGE = 1e-6

Sums = Mapping[str, "Tensor"]


_STAGES: tuple[MethodStage, ...] = ("solve", "repair")
_PLANNED = Use(("plan", *_STAGES))
_SOLVED = Use(_STAGES)
_COSINE = Use(("plan", *_STAGES), "loss", ("cosine",))
_ELASTIC_NET = Use(_STAGES, "loss", ("elastic_net",))
_ADAM = Use(_STAGES, "solver", ("adam",))
_OTHERS = Use(_STAGES, "solver", ("lbfgs", "cg", "trust_region"))


class Objective(Settings):
    """Parameters of the objective and of its solver."""

    loss: Annotated[Literal["cosine", "mse", "elastic_net"], _PLANNED] = "cosine"
    """The objective: 1 − cosine, the squared error, or the squared error with an L1 penalty on the map."""
    accurate: Annotated[bool, _COSINE] = False
    """Loss cosine compares M T + Z with H; false compares M T with H − Z, which takes two thirds of the disk."""
    l1_ratio: Annotated[float, _ELASTIC_NET] = Field(0.5, ge=0, le=1)
    """Loss elastic_net: the L1 penalty's share of alpha; the rest is half a ridge."""
    solver: Annotated[Literal["adam", "lbfgs", "cg", "trust_region"], _SOLVED] = "adam"
    """The iterative solver: Adam on minibatches, or one of scipy's on all tokens."""
    start: Annotated[Literal["closed_form", "identity"], _SOLVED] = "closed_form"
    """Starting point: the least-squares map, or the identity (as published; reproduce/cosine.yaml names it)."""
    learning_rate: Annotated[float, _ADAM] = Field(1e-4, gt=0)
    """Solver adam: step size."""
    epochs: Annotated[int, _ADAM] = Field(10, ge=1)
    """Solver adam: maximum number of passes over the tokens."""
    tokens_per_step: Annotated[int, _ADAM] = Field(1024, ge=1)
    """Solver adam: tokens per minibatch."""
    max_iterations: Annotated[int, _OTHERS] = Field(500, ge=1)
    """Solvers lbfgs, cg and trust_region: maximum number of iterations."""


def statistics(params: Params) -> tuple[str, ...]:
    """Return the statistics of the objective: only the cosine needs single tokens."""
    own = Objective.of(params)
    if own.loss != "cosine":
        return ("gram", "sample")
    return ("gram", "sample", _tokens(own))


def solve(params: Params, block: Block, statistics: Statistics) -> Solved:
    """Return the transform, its fit, and the solver's loss curve."""
    import torch

    from replaceme.edits.edits import Edits
    from replaceme.solvers.minimisers import minimise_by_adam, minimise_by_scipy
    from replaceme.solvers.quality import describe_ridge, measure_fit

    own = Objective.of(params)
    sums, sample = statistics("gram"), statistics("sample")
    if own.loss == "cosine" and not bool(sums["gram"].any()):
        raise SolveError(
            f"method: the MLP of layer {block.layer_before_cut} adds nothing to any token of this text, and no map of its "
            "output has a cosine with the target; use another method, or min_distance_layer or max_distance_layer for another "
            "block."
        )
    problem = build_problem(params, sums, statistics)
    start = _start(params, sums).to(problem.prior)
    if own.solver == "adam":
        minimum = minimise_by_adam(problem, start, own.learning_rate, own.epochs, own.tokens_per_step)
    else:
        minimum = minimise_by_scipy(problem, start, own.solver, own.max_iterations)
    transform = minimum.transform.cpu()
    fit = {"loss_start": minimum.curve[0], "loss_end": minimum.lowest, "iterations": max(minimum.curve)}
    fit["converged"] = int(minimum.converged)
    if _is_fast(own):
        fit["rescaled_by"] = least_squares_scale(transform, sums)
        transform = transform * fit["rescaled_by"]
    fit |= measure_fit(transform, sums, sample)
    if own.loss == "mse":
        fit |= describe_ridge(torch.linalg.eigvalsh(sums["gram"]), params.alpha)
    _report(own, block.layer_before_cut, fit)
    edits = Edits(f"ReplaceMe ({_words(params)})", [], {block.layer_before_cut: transform})
    return Solved(edits, fit, loss_curve=list(minimum.curve.items()))


def build_problem(params: Params, sums: Sums, statistic: Statistics) -> Problem:
    """Return the objective of one block, on the device of the setting.

    Args:
        params: loss, its form, the transform's structure and the penalty.
        sums: the statistic ``gram``.
        statistic: the block's statistics by name; only those of tokens are read.
    """
    import torch

    from replaceme.base.accelerators import float64_device
    from replaceme.models.devices import resolve_device
    from replaceme.solvers.objectives import CosineLoss, Problem, SquaredError
    from replaceme.solvers.structures import parametrise
    from replaceme.statistics.shards import StoredShards

    own = Objective.of(params)
    device, width = float64_device(resolve_device(params.device)), len(sums["gram"])
    ridge, lasso = params.alpha, 0.0
    if own.loss == "elastic_net":
        ridge, lasso = params.alpha * (1 - own.l1_ratio) / 2, params.alpha * own.l1_ratio
    to_identity = _is_fast(own) or params.transform == "two_vectors"
    prior = torch.eye(width, dtype=torch.float64, device=device) * float(to_identity)
    structure = parametrise(params.transform, width, device, split=lasso > 0)
    if own.loss != "cosine":
        loss = SquaredError({name: total.to(device) for name, total in sums.items()})
        return Problem(loss, structure, prior, ridge, lasso)
    shards = StoredShards(statistic(_tokens(own))["counts"], statistic)
    # Minibatches are noisier than float32; a line search is not.
    dtype = torch.float32 if own.solver == "adam" else torch.float64
    return Problem(CosineLoss(shards, device, dtype), structure, prior, ridge)


def least_squares_scale(transform: Tensor, sums: Sums) -> float:
    """Return the factor s that minimises ``‖Y − s M T‖²``."""
    return float((transform * sums["cross"]).sum() / (transform * (sums["gram"] @ transform)).sum())


def _start(params: Params, sums: Sums) -> Tensor:
    import torch

    from replaceme.solvers.closed_forms import solve_closed_form

    own = Objective.of(params)
    if own.start == "identity":
        return torch.eye(len(sums["gram"]), dtype=torch.float64)
    # The cosine's α has the units of that loss: as a ridge on MᵀM it would be negligible, or ruin the start.
    alpha = START_RIDGE * float(sums["gram"].diagonal().mean()) if own.loss == "cosine" else params.alpha
    return solve_closed_form(sums["gram"], sums["cross"], alpha, params.transform)


def _is_fast(own: Objective) -> bool:
    return own.loss == "cosine" and not own.accurate


def _tokens(own: Objective) -> str:
    return "tokens_accurate" if own.accurate else "tokens"


def _words(params: Params) -> str:
    from replaceme.solvers.closed_forms import title_suffix

    own = Objective.of(params)
    form = ", accurate" if own.loss == "cosine" and own.accurate else ""
    return f"{LOSSES[own.loss]}{form}{title_suffix(params.transform)}, {own.solver}"


def _report(own: Objective, layer: int, fit: Mapping[str, Any]) -> None:
    logger.info(
        "solve: cut after layer %d, %d tokens, loss %.6g to %.6g in %d iterations of %s, relative residual %.4f (%.4f with "
        "nothing in the block's place), mean cosine %.4f",
        layer, fit["tokens"], fit["loss_start"], fit["loss_end"], fit["iterations"], own.solver, fit["relative_residual"],
        fit["relative_residual_removed"], fit["mean_cosine"],
    )  # fmt: skip
    if not fit["converged"] and fit["iterations"]:
        key = "epochs" if own.solver == "adam" else "max_iterations"
        advice = " or change learning_rate" if own.solver == "adam" else ""
        logger.warning("%s: %s did not converge within %d; raise it%s", key, own.solver, getattr(own, key), advice)


def refuses(values: Values) -> list[str]:
    """Refuse objectives, structures and solvers that can't be combined."""
    transform, loss, solver = (values[key] for key in ("transform", "loss", "solver"))
    problems = []
    if transform == "orthogonal":
        problems.append("transform: orthogonal is fitted by least squares alone; use method lstsq.")
    if transform in NEW_WEIGHTS:
        problems.append(
            f"transform: {transform} solves least squares for the last weights before the cut and has no other objective; use "
            "method lstsq, or transform dense, diagonal, two_vectors or triangular."
        )
    if loss == "elastic_net" and solver in ("cg", "trust_region"):
        problems.append(f"solver: {solver} needs a smooth objective, and loss elastic_net has a kink at 0; use lbfgs or adam.")
    if loss == "elastic_net" and transform == "two_vectors":
        problems.append(
            "transform: two_vectors has no entries of its own that loss elastic_net could set to 0; use dense, diagonal or "
            "triangular, or loss mse."
        )
    return problems


def check(params: Params, model: Model, family: Family) -> None:
    """Refuse a norm after the MLP, and text too short for a unique least-squares map, which the solver starts from."""
    if family.norm_after_mlp:
        raise ParameterError(
            f"method: cosine makes maps that do not fold into the norm after the MLP of the family "
            f"'{model.config().model_type}'; use lstsq with transform: orthogonal."
        )
    own = Objective.of(params)
    # The cosine's start has a ridge of its own.
    if own.start == "closed_form" and own.loss != "cosine" and params.transform != "diagonal":
        require_tokens(params, model)


METHOD = Method(
    settings=Objective,
    common={"alpha": Use(("solve", "repair"))},
    surrogate=lambda params: "map",
    statistics=statistics,
    solve=solve,
    check=check,
    words="fits a replacement for the block",
    transforms=TRANSFORMS,
    refuses=refuses,
)
