"""The next-token loss of calibration text, by which cuts are compared: a few thousand tokens, the same for all of them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from replaceme.base.documents import Batch, Documents

# Tokens whose scores are in float32 at once: few enough for the processor's cache.
PART = 16


@torch.inference_mode()
def next_token_loss(
    model: Any,
    documents: Documents,
    batch_size: int,
    context: Callable[[Callable[[], Batch]], AbstractContextManager[None]] = lambda current: nullcontext(),
) -> float:
    """Return the mean loss (nats a token) of a loaded model.

    Args:
        model: the model, as it computes at present.
        documents: the text; at least one has two tokens.
        batch_size: documents in a batch.
        context: what holds while it computes, of a function that tells the batch at hand.
    """
    total, count = 0.0, 0
    batches: list[Batch] = []
    with context(lambda: batches[-1]):
        for batch in documents.batches(batch_size, str(model.device)):
            batches[:] = [batch]
            logits = model(batch.input_ids, use_cache=False).logits
            for row, ids, length in zip(logits, batch.input_ids, batch.lengths.tolist(), strict=True):
                for scores, targets in zip(row[: length - 1].split(PART), ids[1:length].split(PART), strict=True):
                    total += float(cross_entropy(scores.float(), targets, reduction="sum"))
                count += length - 1
    return total / count
