"""Trials of edits on a few texts: each starts from stored states and runs only the first edited layer and those after it."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from replaceme.base.documents import Batch, Documents
from replaceme.base.group import add_numbers, share
from replaceme.edits.edits import Edits
from replaceme.edits.unfused import unfused
from replaceme.models.families import Family, decoder_of
from replaceme.models.layers import Start
from replaceme.observers.walk import Keep, passes, walk

# Tokens whose scores are in float32 at once: few enough for the processor's cache.
PART = 16


@dataclass(frozen=True)
class Trials:
    """A model, the texts of its trials, and the states at which these begin.

    Attributes:
        model: the dense model.
        family: its description.
        documents: the texts.
        entering: layer → (tokens, d) states that enter it; or the same in one tensor (layers, tokens, d).
        batch_size: documents in a batch.
    """

    model: Any
    family: Family
    documents: Documents
    entering: Mapping[int, Tensor] | Tensor
    batch_size: int

    def keep(self, layers: Iterable[int]) -> None:
        """Store the states that enter these layers, as the model computes at present."""
        kept = [Keep(layer, ("input",), self.entering[layer]) for layer in layers]
        walk(self.model, self.family, self.documents, kept, batch_size=self.batch_size, description=None)

    @contextmanager
    def trial(self, edits: Edits, layer: int) -> Iterator[Iterator[Batch]]:
        """Compute with the edits inside the block, from ``layer`` on, and yield the batches, once.

        The stored states that enter the layer have to include any edits before it.
        """
        batches, start = batches_of(self.model, self.documents, self.batch_size), Start(layer, self.entering[layer])
        with (
            unfused(self.model, self.family, edits),
            passes(self.model, self.family, batches, start) as in_turn,
        ):
            yield in_turn


def batches_of(model: Any, documents: Documents, batch_size: int) -> Iterator[Batch]:
    """Return this process's part of the batches of texts, on the model's device."""
    return documents.batches(batch_size, str(model.device), share())


@torch.inference_mode()
def next_token_loss(model: Any, batches: Iterable[Batch]) -> float:
    """Return the mean next-token loss (nats per token) of a model as it computes at present; one text needs two tokens.

    Processes that share the batches get the same mean.
    """
    total, count = 0.0, 0
    for batch in batches:
        logits = model(batch.input_ids, use_cache=False).logits
        for row, ids, length in zip(logits, batch.input_ids, batch.lengths.tolist(), strict=True):
            for scores, targets in zip(row[: length - 1].split(PART), ids[1:length].split(PART), strict=True):
                total += float(cross_entropy(scores.float(), targets, reduction="sum"))
            count += length - 1
    total, tokens = add_numbers(total, count)
    return total / tokens


@torch.inference_mode()
def last_states(model: Any, batches: Iterable[Batch]) -> list[Tensor]:
    """Return the input of the head for each text, in the order of the batches: (tokens · d,)."""
    states: list[Tensor] = []
    for batch in batches:
        last = decoder_of(model)(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        states += [row[:length].flatten() for row, length in zip(last, batch.lengths.tolist(), strict=True)]
    return states
