"""Greedy choice of single layers by the loss of the model without each (SLEB, arXiv 2402.09025, section 3).

In each round, every remaining layer is skipped in turn, and the one without which the calibration loss is lowest is removed.
The states that enter each layer are computed once per round: a candidate costs only the layers after it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from replaceme.base.documents import Documents, excerpts_of
from replaceme.base.progress import progress
from replaceme.base.scratch import scratch
from replaceme.edits.edits import Edits
from replaceme.edits.unfused import unfused
from replaceme.models.families import Family
from replaceme.selection.candidate_evaluation import CandidateEvaluation, next_token_losses


def greedy_layers(
    model: Any,
    family: Family,
    documents: Documents,
    allowed: Sequence[int],
    count: int,
    *,
    batch_size: int,
    folder: Path | None = None,
) -> tuple[list[int], list[float]]:
    """Return the removed layers in order of removal, and the loss (nats per token) after each.

    Args:
        model: the dense model.
        family: its description.
        documents: calibration text.
        allowed: the layers that may go.
        count: the number of layers to remove.
        batch_size: documents in a batch.
        folder: where scratch files may lie; None is the system's temporary folder.
    """
    layers, excerpts = family.decoder_layers(model), excerpts_of(documents)
    removed: list[int] = []
    losses: list[float] = []
    shape = len(layers), excerpts.token_count, int(model.config.hidden_size)
    (entering,) = scratch([shape], model.dtype, folder, "the choice of layers")
    trials = CandidateEvaluation(model, family, excerpts, entering, batch_size)
    for _ in progress(range(count), "choosing layers", "layers"):
        left = [layer for layer in allowed if layer not in removed]
        with unfused(model, family, Edits("", removed)):
            trials.keep(left)
        found = {}
        for layer in left:
            with trials.trial(Edits("", [*removed, layer]), layer) as batches:
                found[layer] = next_token_losses(model, excerpts, batches).mean
        best = min(found, key=found.__getitem__)
        removed.append(best)
        losses.append(found[best])
    return removed, losses
