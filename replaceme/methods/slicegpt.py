"""SliceGPT (arXiv 2401.15024): project the residual stream onto its principal components (``replaceme.edits.slicing``).

The basis of a signal is the eigenvectors of ``Σ hᵀh`` over real tokens with the largest eigenvalues. The signals are taken in
order, each computed from the sliced ones before it (``replaceme.methods.bases``). The published damping adds the same to every
eigenvalue; it changes no eigenvector, and is left out.

With ``plain``, all signals of the dense model share one basis, and the result has the family's own class. There each token's
state is normalised to length 1, as a norm sees it: otherwise the large states of the last layers would dominate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from replaceme.base.combinations import Use, Values
from replaceme.base.parameters import Params
from replaceme.base.progress import logger
from replaceme.methods.method import Bench, Method, drop
from replaceme.selection.criteria import WIDTH

if TYPE_CHECKING:
    from replaceme.models.families import Family
    from replaceme.models.model import Model


def work(bench: Bench) -> dict[str, Any]:
    """Set the bases in the edits, and return figures of the slicing."""
    from replaceme.methods.bases import bases_in_order, fitting_width, shared_basis

    params, d = bench.params, int(bench.model.config.hidden_size)
    width, parameters, dense = fitting_width(bench.model, bench.family, params.layers_to_skip, params.plain)
    found = [*(shared_basis if params.plain else bases_in_order)(bench, width)]
    bench.edits.bases = [Q.cpu() for Q, _ in found]
    bench.edits.parts = f"{d - width} of the {d} dimensions of its residual stream"
    kept = [share for _, share in found]
    figures = {
        "width": width,
        "slicing": 1 - width / d,
        "parameters": parameters,
        "parameters_removed": dense - parameters,
        "kept_squares_lowest": min(kept),
        "kept_squares_mean": sum(kept) / len(kept),
    }
    logger.info(
        "repair: width %d of %d (%.1f %% sliced), %.1f M of %.1f M parameters; of the states' squares, %.4f are kept at least",
        width, d, 100 * figures["slicing"], parameters / 1e6, dense / 1e6, figures["kept_squares_lowest"],
    )  # fmt: skip
    return figures


def check(params: Params, model: Model, family: Family) -> None:
    """Raise ParameterError if no width suits these parameters."""
    from replaceme.methods.bases import fitting_width

    fitting_width(model.skeleton(model.config()), family, params.layers_to_skip, params.plain)


def refuses(values: Values, kind: str, family: Family | None) -> list[str]:
    """Refuse layer limits, which would be ignored, and families whose residual stream can't be narrowed exactly."""
    if family:
        problem = f"method: slicegpt is refused for the family '{kind}': {family.unsliced}; use another method."
        return [problem] if family.unsliced else []
    return [
        f"{key}: method slicegpt slices all layers alike; use null."
        for key in ("min_distance_layer", "max_distance_layer")
        if values[key] is not None
    ]


METHOD = Method(
    shared={"plain": Use(("repair",))},
    solve=drop("SliceGPT"),
    criterion=WIDTH,
    work=work,
    plain=lambda params: params.plain,
    words="removes parts of layers, not whole layers",
    selections=(),
    several=False,
    repairs=False,
    refuses=refuses,
    check=check,
)
