"""Scalars that compensate the residual stream for removed layers (Prune&Comp, arXiv 2507.18212).

Layers increase the stream's magnitude. After a removed block ``[start, end)``, the state is too small relative to the outputs
of the layers that follow. One scalar compensates for this, the mean gain of the channels:

    s = mean over channels k of  Σ_tokens |h_{end−1}|_k / Σ_tokens |h_{start−1}|_k

The authors' program averages the ratios of single texts of 2048 tokens; here texts differ in length, so the sums run over all
of them. Layers are removed one by one, each time the one of lowest block influence (``replaceme.statistics.profile``) in the
model as shortened and scaled so far. One pass over a few thousand tokens gives all influences and gains.

The published program folds s into the embedding and all weights before the cut that add to the stream. Here the outputs of the
layers after the cut are divided by s, which is the same function (``replaceme.edits.fold``); a tied embedding stays tied.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from replaceme.base.accelerators import to_float64
from replaceme.base.documents import Batch, excerpts_of
from replaceme.base.errors import ModelError, ParameterError
from replaceme.base.group import all_reduce_sum
from replaceme.base.plan import Block, group_adjacent
from replaceme.base.progress import progress
from replaceme.edits.edits import Edits
from replaceme.edits.unfused import operator_hook, unfused
from replaceme.models.context import ModelContext
from replaceme.statistics.walk import Signal, Signals, signals_for, walk

# Of the check that scalars fold: documents, tokens of each, a factor that rounds nothing, and the logits' largest change.
DOCUMENTS, LENGTH, FACTOR, TOLERANCE = 2, 128, 4.0, 0.05


class MagnitudeSums:
    """Observer of ``Σ |h|`` over tokens for each channel of layers' inputs and outputs: (d,) float64."""

    def __init__(self, by_layer: Mapping[int, frozenset[Signal]]):
        self.by_layer = by_layer
        self.sums: dict[str, Tensor] = {}

    def signals(self) -> Mapping[int, frozenset[Signal]]:
        return self.by_layer

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        for signal in self.by_layer[layer]:
            sums = to_float64(batch.real(signals[signal]).abs()).sum(dim=0)
            name = f"{signal} {layer}"
            self.sums[name] = self.sums.get(name, 0.0) + sums

    def all_reduce(self) -> None:
        all_reduce_sum(self.sums)

    def gain(self, start: int, end: int) -> float:
        """Return s of layers ``[start, end)``, the mean over channels whose input is not 0 throughout."""
        before, after = self.sums[f"input {start}"], self.sums[f"output {end - 1}"]
        there = before > 0
        return float((after[there] / before[there]).mean())


# The profile computes the same figure for the dense model in another way: it needs the cosines of all pairs of states and takes
# them from one product of unit vectors that sums over tokens too, so a single token's cosine never exists there. The two forms
# round differently: sharing one would change the last bits of the profile or of this method's choice.
class Influence:
    """Observer of ``Σ 1 − cos(h_{l−1}, h_l)`` over tokens for every layer: (layers,) float64 (ShortGPT, arXiv 2403.03853)."""

    def __init__(self, layers: int):
        self.sums = torch.zeros(layers, dtype=torch.float64)

    def signals(self) -> Mapping[int, frozenset[Signal]]:
        return signals_for(range(len(self.sums)), "input", "output")

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        before, after = batch.real(signals["input"]).float(), batch.real(signals["output"]).float()
        change = (1 - to_float64(torch.cosine_similarity(before, after, dim=-1))).sum()
        self.sums = self.sums.to(change.device)
        self.sums[layer] += change

    def all_reduce(self) -> None:
        # A process without a batch has its zeros on the processor.
        self.sums = self.sums.cpu()
        all_reduce_sum({"influence": self.sums})


def compensated_layers(context: ModelContext, allowed: Sequence[int], count: int) -> tuple[dict[int, float], dict[int, float]]:
    """Choose the layers to remove; return their scalars, in order of removal, and their influences at removal.

    Args:
        context: the dense model and its calibration text.
        allowed: the layers that may be removed.
        count: number of layers to remove.

    Raises:
        ParameterError: states overflow.
    """
    context, total = context.with_documents(excerpts_of(context.documents)), len(context.layers)
    scales: dict[int, float] = {}
    influences: dict[int, float] = {}
    for _ in progress(range(count), "choosing layers", "layers"):
        edits = scaling_edits(blocks_of(scales))
        changes, magnitudes = Influence(total), MagnitudeSums(signals_for(range(total), "input", "output"))
        with unfused(context.model, context.family, edits):
            walk(context, [changes, magnitudes], description=None)
        influence = (changes.sums / context.documents.token_count).tolist()
        _finite(sum(influence))
        best = min((layer for layer in allowed if layer not in scales), key=influence.__getitem__)
        # The output of a layer before a block is already multiplied by that block's scalar.
        applied = float(edits.operators.get(best, 1.0))
        scales[best], influences[best] = _finite(magnitudes.gain(best, best + 1) / applied), influence[best]
    return scales, influences


def blocks_of(scales: Mapping[int, float]) -> list[Block]:
    """Return the blocks of contiguous layers, each with the product of its layers' scalars."""
    return [replace(block, scale=math.prod(scales[layer] for layer in block.layers)) for block in group_adjacent([*scales])]


def scale_blocks(context: ModelContext, blocks: Sequence[Block]) -> list[Block]:
    """Return chosen blocks with their scalars, each measured on the model without the blocks before it, scaled there.

    Args:
        context: the dense model and its calibration text.
        blocks: the removed blocks, first to last.

    Raises:
        ParameterError: states overflow.
    """
    done: list[Block] = []
    for block in blocks:
        with unfused(context.model, context.family, scaling_edits(done)):
            (gain,) = measure_gains(context, [block])
        done.append(replace(block, scale=gain))
    return done


def measure_gains(context: ModelContext, blocks: Sequence[Block]) -> list[float]:
    """Return s of each block in the model as given, hooks included, from one pass over a few thousand tokens.

    Raises:
        ParameterError: states overflow.
    """
    signals: dict[int, frozenset[Signal]] = {}
    for block in blocks:
        signals[block.start] = signals.get(block.start, frozenset()) | {"input"}
        signals[block.end - 1] = signals.get(block.end - 1, frozenset()) | {"output"}
    magnitudes = MagnitudeSums(signals)
    walk(context.with_documents(excerpts_of(context.documents)), [magnitudes], description=None)
    return [_finite(magnitudes.gain(block.start, block.end)) for block in blocks]


def scaling_edits(blocks: Iterable[Block]) -> Edits:
    """Return the edits that remove blocks and multiply the states before them by their scalars."""
    edits = Edits("", [])
    for block in blocks:
        edits.removed_layers += block.layers
        if block.scale is not None:
            edits.operators[block.layer_before_cut] = torch.tensor(block.scale, dtype=torch.float64)
    return edits


@torch.inference_mode()
def require_scalable(context: ModelContext) -> None:
    """Check on text that layers and head do not depend on the scale of the residual stream, so that a scalar folds.

    The first layer's output and all later additions to the stream are multiplied by four; the logits must not change. Of a
    described family it is known.

    Raises:
        ModelError: the logits change.
    """
    model, family = context.model, context.family
    if not family.detected:
        return
    layers, enlarged = family.decoder_layers(model), operator_hook(torch.tensor(FACTOR))
    parts = [layer.get_submodule(path) for layer in layers[1:] for path in (family.attention, family.mlp)]
    for document in context.documents.head(DOCUMENTS, LENGTH).documents:
        text = document[None].to(model.device)
        expected = to_float64(model(text, use_cache=False).logits)
        with ExitStack() as stack:
            for part in [layers[0], *parts]:
                stack.callback(part.register_forward_hook(enlarged).remove)
            logits = to_float64(model(text, use_cache=False).logits)
        # The comparison is false for NaN.
        if not float((logits - expected).norm() / expected.norm()) <= TOLERANCE:
            raise ModelError(
                f"model_path: the layers of the family '{model.config.model_type}' depend on the scale of the residual stream, "
                "so no scalar folds; use method shortgpt."
            )


def _finite(figure: float) -> float:
    if not math.isfinite(figure):
        raise ParameterError("dtype: the states of the shortened model overflow; use bfloat16 or float32.")
    return figure
