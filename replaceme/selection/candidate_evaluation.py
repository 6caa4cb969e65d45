"""Evaluate candidate edits on a few texts.

Each evaluation starts from stored states and computes only the layers from the first edited one on.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from replaceme.base.documents import Batch
from replaceme.base.group import all_gather, shard
from replaceme.base.plan import Block
from replaceme.edits.edits import Edits
from replaceme.edits.unfused import unfused
from replaceme.models.context import ModelContext
from replaceme.models.families import decoder_of
from replaceme.models.layers import EntryState
from replaceme.statistics.walk import RecordStates, forward_passes, walk

# Tokens whose scores are in float32 at once: few enough for the processor's cache.
PART = 16


@dataclass(frozen=True)
class CandidateEvaluation:
    """A model, the texts that candidates are evaluated on, and the states at which the evaluations begin.

    Attributes:
        context: the dense model and the texts.
        entering: layer → (tokens, d) states that enter it; or the same in one tensor (layers, tokens, d).
    """

    context: ModelContext
    entering: Mapping[int, Tensor] | Tensor

    @classmethod
    def before_cuts(cls, context: ModelContext, blocks: Iterable[Block]) -> Self:
        """Return the evaluation of candidates that remove these blocks, with the states before each cut, computed once."""
        shape = context.documents.token_count, context.width
        evaluation = cls(context, {block.layer_before_cut: torch.empty(shape, dtype=context.model.dtype) for block in blocks})
        evaluation.record_states(evaluation.entering)
        return evaluation

    def record_states(self, layers: Iterable[int]) -> None:
        """Store the states that enter these layers in the model, hooks included."""
        walk(
            self.context,
            [RecordStates(layer, ("input",), self.entering[layer]) for layer in layers],
            description="walking to the candidates",
        )

    @contextmanager
    def candidate(self, edits: Edits, layer: int) -> Iterator[Iterator[Batch]]:
        """Compute with the edits inside the block, from ``layer`` on, and yield the batches, once.

        The stored states that enter the layer have to include any edits before it.
        """
        context, start = self.context, EntryState(layer, self.entering[layer])
        with unfused(context.model, context.family, edits), forward_passes(context, batches_of(context), start) as in_turn:
            yield in_turn


def batches_of(context: ModelContext) -> Iterator[Batch]:
    """Return this process's part of the batches of texts, on the model's device."""
    return context.documents.batches(context.batch_size, str(context.model.device), shard())


@dataclass(frozen=True)
class Losses:
    """Next-token losses of a model, by the domain of the text.

    Attributes:
        domains: the domains.
        sums: (domains,) float64, the sums of their losses in nats.
        counts: (domains,) float64, the numbers of tokens predicted.
    """

    domains: Sequence[int]
    sums: Tensor
    counts: Tensor

    @property
    def mean(self) -> float:
        """The mean loss over all tokens."""
        return float(self.sums.sum() / self.counts.sum())

    def rise_over(self, other: "Losses", weights: Mapping[int, float]) -> float:
        """Return the typical rise of a domain's mean loss over another model's: the interquartile mean over the domains.

        It is the mean of the rises' weighted quantiles between ¼ and ¾: of two equal domains their mean, of four that of the
        middle two. In the mean over all tokens one domain can decide; here none does with a quarter of the weight or less.

        Args:
            other: of the same text.
            weights: of the domains, positive, relative to each other.

        Returns:
            Infinity if a loss is not finite.
        """
        rises, order = ((self.sums - other.sums) / self.counts).sort()
        if not bool(rises.isfinite().all()):
            return math.inf
        ordered = torch.tensor([weights[domain] for domain in self.domains], dtype=torch.float64)[order]
        ends = (ordered / ordered.sum()).cumsum(0).clamp(0.25, 0.75)
        return float(2 * (ends.diff(prepend=ends.new_tensor([0.25])) * rises).sum())


def next_token_losses(context: ModelContext, batches: Iterable[Batch]) -> Losses:
    """Return the next-token losses of a model, hooks included, by domain; the same in all processes that share the batches.

    Args:
        context: the model, and the texts, each of two tokens or more.
        batches: of them.
    """
    ordered = context.documents.in_walk_order()
    known = sorted({*ordered.domains})
    # The position of each text's first token in the walk.
    domain_at: dict[int, int] = {}
    position = 0
    for domain, document in zip(ordered.domains, ordered.documents, strict=True):
        domain_at[position] = known.index(domain)
        position += len(document)
    sums, counts = [0.0] * len(known), [0.0] * len(known)
    for position, loss, predicted in _losses(context.model, batches):
        sums[domain_at[position]] += loss
        counts[domain_at[position]] += predicted
    return Losses(known, *torch.tensor(all_gather([sums, counts]), dtype=torch.float64).sum(0))


@torch.inference_mode()
def _losses(model: Any, batches: Iterable[Batch]) -> Iterator[tuple[int, float, int]]:
    """Yield each text's position in the walk, the sum of its next-token losses and the number of tokens predicted."""
    for batch in batches:
        position, logits = batch.position, model(batch.input_ids, use_cache=False).logits
        for row, ids, length in zip(logits, batch.input_ids, batch.lengths.tolist(), strict=True):
            parts = [
                cross_entropy(scores.float(), targets, reduction="sum")
                for scores, targets in zip(row[: length - 1].split(PART), ids[1:length].split(PART), strict=True)
            ]
            # Read at once: each reading of a device waits for it.
            total = 0.0
            for part in torch.stack(parts).tolist():
                total += part
            yield position, total, length - 1
            position += length


@torch.inference_mode()
def last_states(model: Any, batches: Iterable[Batch]) -> list[Tensor]:
    """Return the input of the head for each text, in the order of the batches: (tokens · d,)."""
    states: list[Tensor] = []
    for batch in batches:
        last = decoder_of(model)(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        states += [row[:length].flatten() for row, length in zip(last, batch.lengths.tolist(), strict=True)]
    return states
