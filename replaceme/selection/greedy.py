"""Greedy choice of single layers by the loss of the model without each (SLEB, arXiv 2402.09025, section 3).

In each round, every remaining layer is skipped in turn, and the one without which the calibration loss is lowest is removed.
The states that enter each layer are computed once per round: a candidate costs only the layers after it.
"""

from collections.abc import Sequence

from replaceme.base.documents import excerpts_of
from replaceme.base.progress import progress
from replaceme.base.scratch import scratch
from replaceme.edits.edits import Edits
from replaceme.edits.unfused import unfused
from replaceme.models.context import ModelContext
from replaceme.selection.candidate_evaluation import CandidateEvaluation, next_token_losses


def greedy_layers(context: ModelContext, allowed: Sequence[int], count: int) -> tuple[list[int], list[float]]:
    """Return the removed layers in order of removal, and the loss (nats per token) after each.

    Args:
        context: the dense model and its calibration text.
        allowed: the layers that may go.
        count: the number of layers to remove.
    """
    context = context.with_documents(excerpts_of(context.documents))
    removed: list[int] = []
    losses: list[float] = []
    shape = len(context.layers), context.documents.token_count, context.width
    (entering,) = scratch([shape], context.model.dtype, context.folder, "the choice of layers")
    evaluation = CandidateEvaluation(context, entering)
    for _ in progress(range(count), "choosing layers", "layers"):
        candidates = [layer for layer in allowed if layer not in removed]
        with unfused(context.model, context.family, Edits("", removed)):
            evaluation.record_states(candidates)
        loss_without = {}
        for layer in candidates:
            with evaluation.candidate(Edits("", [*removed, layer]), layer) as batches:
                loss_without[layer] = next_token_losses(context, batches).mean
        best = min(loss_without, key=loss_without.__getitem__)
        removed.append(best)
        losses.append(loss_without[best])
    return removed, losses
