"""Scalars that give the residual stream the magnitude that removed layers would have given it (Prune&Comp, arXiv 2507.18212).

Layers make the stream larger. Where a block ``[start, end)`` goes, what is behind gets a state that is too small beside what it
adds, and one scalar makes up for it, the gain of the mean channel:

    s = mean over channels k of  Σ_tokens |h_{end−1}|_k / Σ_tokens |h_{start−1}|_k

(the authors' program takes the ratio of each text of 2048 tokens and their mean; texts differ in length here, so that the sums
run over all of them). Layers go one by one, each the one with the lowest block influence (``replaceme.observers.profile``) in
the model as it is by then: shortened, and scaled where layers have gone. One pass over a few thousand tokens tells all
influences and gains.

The published program folds s into all weights in front that add to the stream, the embedding among them. Here what the layers
behind add is divided by s, which is the same function (``replaceme.edits.fold``), and a tied embedding stays the head's.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from replaceme.base.documents import Batch, Documents, excerpts_of
from replaceme.base.errors import ModelError, ParameterError
from replaceme.base.plan import Block, runs
from replaceme.base.progress import progress
from replaceme.edits.edits import Edits
from replaceme.edits.unfused import operating, unfused
from replaceme.models.families import Family
from replaceme.observers.walk import Signal, Signals, ask, walk

# The proof that no scale matters: documents and their tokens, a factor that no rounding sees, and how far logits may move.
DOCUMENTS, LENGTH, FACTOR, TOLERANCE = 2, 128, 4.0, 0.05


class MagnitudeSums:
    """Observer of ``Σ |h|`` over tokens, of each channel of what enters and leaves layers: (d,) float64."""

    def __init__(self, wanted: Mapping[int, frozenset[Signal]]):
        self.wanted = wanted
        self.sums: dict[tuple[int, Signal], Tensor] = {}

    def wants(self) -> Mapping[int, frozenset[Signal]]:
        return self.wanted

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        for signal in self.wanted[layer]:
            sums = batch.real(signals[signal]).abs().sum(dim=0, dtype=torch.float64).cpu()
            self.sums[layer, signal] = self.sums.get((layer, signal), 0.0) + sums

    def gain(self, start: int, end: int) -> float:
        """Return s of layers ``[start, end)``: that of channels in which anything enters."""
        before, after = self.sums[start, "input"], self.sums[end - 1, "output"]
        there = before > 0
        return float((after[there] / before[there]).mean())


# The profile computes the same figure for the dense model in another way: it needs the cosines of all pairs of states and takes
# them from one product of unit vectors that sums over tokens too, so a single token's cosine never exists there. The two forms
# round differently: sharing one would change the last bits of the profile or of this method's choice.
class Influence:
    """Observer of ``Σ 1 − cos(h_{l−1}, h_l)`` over tokens, of every layer: (layers,) float64 (ShortGPT, arXiv 2403.03853)."""

    def __init__(self, layers: int):
        self.sums = torch.zeros(layers, dtype=torch.float64)

    def wants(self) -> Mapping[int, frozenset[Signal]]:
        return ask(range(len(self.sums)), "input", "output")

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        before, after = batch.real(signals["input"]).float(), batch.real(signals["output"]).float()
        self.sums[layer] += (1 - torch.cosine_similarity(before, after, dim=-1).double()).sum().cpu()


def compensated_layers(
    model: Any, family: Family, documents: Documents, allowed: Sequence[int], count: int, *, batch_size: int
) -> tuple[dict[int, float], dict[int, float]]:
    """Return each layer that goes with its scalar, in the order in which they go, and with its influence when it went.

    Args:
        model: the dense model.
        family: its description.
        documents: calibration text.
        allowed: the layers that may go.
        count: how many go.
        batch_size: documents in a batch.

    Raises:
        ParameterError: states overflow.
    """
    excerpts, total = excerpts_of(documents), len(family.decoder_layers(model))
    scales: dict[int, float] = {}
    influences: dict[int, float] = {}
    for _ in progress(range(count), "choosing layers", "layers"):
        edits = scaled(blocks_of(scales))
        changes, magnitudes = Influence(total), MagnitudeSums(ask(range(total), "input", "output"))
        with unfused(model, family, edits):
            walk(model, family, excerpts, [changes, magnitudes], batch_size=batch_size, description=None)
        influence = (changes.sums / excerpts.token_count).tolist()
        _finite(sum(influence))
        best = min((layer for layer in allowed if layer not in scales), key=influence.__getitem__)
        # What leaves a layer that hosts a block has been through that block's scalar.
        behind = float(edits.operators.get(best, 1.0))
        scales[best], influences[best] = _finite(magnitudes.gain(best, best + 1) / behind), influence[best]
    return scales, influences


def blocks_of(scales: Mapping[int, float]) -> list[Block]:
    """Return the blocks that single layers make; the scalars of layers that meet at one place multiply."""
    return [replace(block, scale=math.prod(scales[layer] for layer in block.layers)) for block in runs([*scales])]


def compensated(model: Any, family: Family, documents: Documents, blocks: Sequence[Block], *, batch_size: int) -> list[Block]:
    """Return chosen blocks with their scalars, each measured on the model without those in front of it, and scaled there.

    Args:
        model: the dense model.
        family: its description.
        documents: calibration text.
        blocks: what goes, first to last.
        batch_size: documents in a batch.

    Raises:
        ParameterError: states overflow.
    """
    done: list[Block] = []
    for block in blocks:
        with unfused(model, family, scaled(done)):
            (gain,) = gains(model, family, documents, [block], batch_size=batch_size)
        done.append(replace(block, scale=gain))
    return done


def gains(model: Any, family: Family, documents: Documents, blocks: Sequence[Block], *, batch_size: int) -> list[float]:
    """Return s of each of several blocks, in the model as it computes at present, from one pass over a few thousand tokens."""
    wanted: dict[int, frozenset[Signal]] = {}
    for layer, signal in _ends(blocks):
        wanted[layer] = wanted.get(layer, frozenset()) | {signal}
    magnitudes = MagnitudeSums(wanted)
    walk(model, family, excerpts_of(documents), [magnitudes], batch_size=batch_size, description=None)
    return [_finite(magnitudes.gain(block.start, block.end)) for block in blocks]


def scaled(blocks: Iterable[Block]) -> Edits:
    """Return the edits that blocks with scalars make."""
    edits = Edits("", [])
    for block in blocks:
        edits.removed_layers += block.layers
        if block.scale is not None:
            edits.operators[block.host] = torch.tensor(block.scale, dtype=torch.float64)
    return edits


def scalable(model: Any, family: Family, documents: Documents) -> tuple[Any, Family]:
    """Return a dense model and its description when a scalar is known to fold: described families', or proved on text."""
    if family.detected:
        check_scale(model, family, documents)
    return model, family


@torch.inference_mode()
def check_scale(model: Any, family: Family, documents: Documents) -> None:
    """Prove on text that what layers and head make of the residual stream doesn't depend on its scale, so that a scalar folds.

    Behind the first layer, all that is added to the stream is made four times as large: the logits must stay.

    Raises:
        ModelError: they don't.
    """
    layers, enlarged = family.decoder_layers(model), operating(torch.tensor(FACTOR))
    parts = [layer.get_submodule(path) for layer in layers[1:] for path in (family.attention, family.mlp)]
    for document in documents.head(DOCUMENTS, LENGTH).documents:
        text = document[None].to(model.device)
        expected = model(text, use_cache=False).logits.double()
        with ExitStack() as stack:
            for part in [layers[0], *parts]:
                stack.callback(part.register_forward_hook(enlarged).remove)
            found = model(text, use_cache=False).logits.double()
        # Written so that NaN fails too.
        if not float((found - expected).norm() / expected.norm()) <= TOLERANCE:
            raise ModelError(
                f"model_path: what the layers of the family '{model.config.model_type}' make of the residual stream depends on "
                "its scale, so that no scalar folds; use method shortgpt."
            )


def _ends(blocks: Iterable[Block]) -> Iterable[tuple[int, Signal]]:
    for block in blocks:
        yield block.start, "input"
        yield block.end - 1, "output"


def _finite(figure: float) -> float:
    if not math.isfinite(figure):
        raise ParameterError("dtype: the states of the shortened model overflow; use bfloat16 or float32.")
    return figure
