"""ReplaceMe with least squares (arXiv 2505.02819, section 3), in closed form: one ridge regression per block, for a map or for
all weights of the last linears before the cut (``replaceme.solvers.refit``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from replaceme.base.combinations import NEW_WEIGHTS, STEPWISE, TRANSFORMS, Use, Values
from replaceme.base.errors import ParameterError, renaming
from replaceme.base.parameters import Params
from replaceme.base.plan import Block, Surrogate
from replaceme.base.progress import logger
from replaceme.methods.method import Method, Solved, Statistics, require_tokens

if TYPE_CHECKING:
    from replaceme.models.families import Family
    from replaceme.models.model import Model


def solve(params: Params, block: Block, statistics: Statistics) -> Solved:
    """Return the edits of the layer before the cut, and their fit."""
    from replaceme.base.accelerators import float64_device
    from replaceme.edits.edits import Edits
    from replaceme.models.devices import resolve_device
    from replaceme.solvers.closed_forms import solve_closed_form, title_suffix
    from replaceme.solvers.quality import describe_dense_ridge, describe_structured_ridge, measure_fit, ridge_path
    from replaceme.solvers.ridge import solve_ridge

    if params.transform in NEW_WEIGHTS:
        return _refit(params, block, statistics)
    structure = params.transform
    sums, sample = statistics("gram"), statistics("sample")
    path: list[tuple[float, float]] = []
    if structure == "dense":
        solution = solve_ridge(sums["gram"], sums["cross"], params.alpha)
        transform, of_ridge = solution.transform, describe_dense_ridge(solution, params.alpha)
        path = ridge_path(solution, float(sums["target_squares"]), float(sums["output_squares"]))
    else:
        # Of these structures only the orthogonal one takes long: it iterates, with a singular value decomposition each time.
        device = float64_device(resolve_device(params.device)) if structure == "orthogonal" else "cpu"
        gram, cross = sums["gram"].to(device), sums["cross"].to(device)
        transform = solve_closed_form(gram, cross, params.alpha, structure, sums.get("norm")).cpu()
        of_ridge = describe_structured_ridge(transform, sums, params.alpha, structure)
    fit = measure_fit(transform, sums, sample) | of_ridge
    logger.info(
        "solve: cut after layer %d, %d tokens, relative residual %.4f (%.4f with nothing in the block's place), cosine %.4f",
        block.layer_before_cut, fit["tokens"], fit["relative_residual"], fit["relative_residual_removed"], fit["mean_cosine"],
    )  # fmt: skip
    title = f"ReplaceMe (least squares{title_suffix(structure)})"
    if "norm" in sums:  # edits hold the map of the norm's output before its weight
        transform = sums["norm"][:, None] * transform
    return Solved(Edits(title, [], {block.layer_before_cut: transform}), fit, path)


def _refit(params: Params, block: Block, statistics: Statistics) -> Solved:
    from replaceme.edits.edits import Edits
    from replaceme.solvers.refit import refit

    edits = Edits(f"least squares over the last weights before the cut ({params.transform})", [])
    (features,) = _statistics(params)
    with renaming({"ridge": "refit_ridge"}):
        fit = refit(edits, block.layer_before_cut, statistics(features), params.alpha, params.refit_ridge)
    logger.info(
        "solve: cut after layer %d, %d tokens, weighted residual %.4f (%.4f with a transform alone, %.4f with nothing)",
        block.layer_before_cut, fit["tokens"], fit.get("weighted_residual", fit.get("weighted_residual_joint")),
        fit["weighted_residual_transform"], fit["weighted_residual_removed"],
    )  # fmt: skip
    return Solved(edits, fit)


def _statistics(params: Params) -> tuple[str, ...]:
    if params.transform not in NEW_WEIGHTS:
        return ("gram", "sample")
    return ("features" if params.transform in STEPWISE else "mlp_features",)


def _surrogate(params: Params) -> Surrogate:
    # The first solution of channels is a joint one.
    return "joint" if params.transform in STEPWISE else "refit" if params.transform == "refit" else "map"


def _refuses(values: Values) -> list[str]:
    if values["transform"] == "channels" and values["use_4bit"]:
        return [
            "use_4bit: transform channels puts rows of several layers' weights together, and 4-bit ones are packed; use false."
        ]
    return []


def _check(params: Params, model: Model, family: Family) -> None:
    if family.norm_after_mlp and params.transform != "orthogonal":
        raise ParameterError(
            f"transform: {params.transform} does not fold into the norm after the MLP of the family "
            f"'{model.config().model_type}'; use orthogonal."
        )
    # A diagonal map has one equation an entry. An orthogonal one is found with few tokens too, if not the only one.
    if params.transform not in ("diagonal", "orthogonal"):
        require_tokens(params, model)


METHOD = Method(
    common={"alpha": Use(("solve", "repair"))},
    surrogate=_surrogate,
    statistics=_statistics,
    solve=solve,
    check=_check,
    words="fits a replacement for the block",
    transforms=TRANSFORMS,
    refuses=_refuses,
)
