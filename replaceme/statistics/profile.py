"""The profile of a model: distances between all pairs of layers, and each layer's influence on its input.

The profile depends on no pruning setting, so a sweep computes it once.

- ``D(i, j)`` = mean over documents of ``arccos(cos(h_i, h_j)) / π`` at the last real token, for all pairs of layer
  outputs (UIDL, arXiv 2403.17887, section 3.2; ReplaceMe, section 3).
- Block influence ``BI_l`` = mean over tokens of ``1 − cos(h_{l−1}, h_l)`` (ShortGPT, arXiv 2403.03853, section 3.2).
- Mean over tokens of ``cos(h_{i−1}, h_j)``, of layer i's input and layer j's output (LLM-Streamline, arXiv 2403.19135,
  section 2).
- For all pairs, the relative residual of a linear map in the block's place (``replaceme.statistics.residuals``).
- Mean and largest token norm of each layer's output, which show massive activations.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from replaceme.base.accelerators import to_float64
from replaceme.base.documents import Batch, part_of
from replaceme.base.errors import ParameterError
from replaceme.base.group import all_gather, all_reduce_sum
from replaceme.base.progress import logger
from replaceme.models.context import ModelContext
from replaceme.models.streaming import evict_layers
from replaceme.statistics.residuals import FIT_TOKENS, TokenSample, residual_map
from replaceme.statistics.sums import Sums
from replaceme.statistics.walk import Observer, Signal, Signals, signals_for, walk

# Tokens of the text that are profiled: so many, or so many for each dimension of the state, of which the residuals take five.
# More tokens rank the cuts alike (docs/lab-notes.md).
PROFILED_TOKENS, TOKENS_PER_DIMENSION = 16_384, 8
# Tokens compared at once, in all layers: few enough for the processor's cache.
TOKENS = 64
# Smallest norm to divide by, for states of zeros.
TINY = torch.finfo(torch.float32).tiny


class AngularDistances:
    """Observer of the angular distances between all pairs of layer outputs, at each document's last real token."""

    def __init__(self, layers: int):
        self.layers = layers
        self.documents = 0
        self.sums = torch.zeros(layers, layers, dtype=torch.float64)

    def signals(self) -> Mapping[int, frozenset[Signal]]:
        return signals_for(range(self.layers), "output")

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        batch.scratch[self, layer] = batch.last(signals["output"])
        if layer == self.layers - 1:
            states = torch.stack([batch.scratch.pop((self, index)) for index in range(self.layers)], dim=1)
            self.sums += angular_distance(states.cpu().double()).sum(dim=0)
            self.documents += len(states)

    def all_reduce(self) -> None:
        all_reduce_sum({"distances": self.sums})
        self.documents = sum(all_gather(self.documents))

    def result(self) -> Tensor:
        """Return the (layers, layers) float64 matrix of mean distances, in half turns (0 to 1)."""
        return self.sums / self.documents


class StateCosines:
    """Observer of the mean cosines of all pairs of states, and of the states' norms, over real tokens."""

    def __init__(self, layers: int):
        self.layers = layers
        self.tokens = 0
        # ``cosines`` and ``norms`` of the input of the first layer and the output of every layer.
        self.sums = Sums()
        self.norm_max = torch.zeros(layers + 1)

    def signals(self) -> Mapping[int, frozenset[Signal]]:
        return {0: frozenset({"input", "output"}), **signals_for(range(1, self.layers), "output")}

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        if layer == 0:
            batch.scratch[self, 0] = batch.real(signals["input"])
        batch.scratch[self, layer + 1] = batch.real(signals["output"])
        if layer == self.layers - 1:
            states = [batch.scratch.pop((self, index)) for index in range(self.layers + 1)]
            self.norm_max = self.norm_max.to(states[0].device)
            for start in range(0, batch.token_count, TOKENS):
                # The states can be on several devices.
                parts = torch.stack([state[start : start + TOKENS].to(states[0].device) for state in states]).float()
                norms = torch.linalg.vector_norm(parts, dim=-1)
                unit = parts.div_(norms.clamp_min(TINY)[..., None]).flatten(1)
                self.sums.add({"cosines": unit @ unit.T, "norms": to_float64(norms).sum(dim=1)})
                self.norm_max = torch.maximum(self.norm_max, norms.amax(dim=1))
            self.tokens += batch.token_count

    def all_reduce(self) -> None:
        self.sums.all_reduce()
        self.norm_max = torch.stack(all_gather(self.norm_max.cpu())).amax(0)
        self.tokens = sum(all_gather(self.tokens))

    def mean_cosine(self) -> Tensor:
        """Return (layers, layers) float64: mean cosine of the input of layer i and the output of layer j; 0 for j < i."""
        return (self.sums.totals["cosines"] / self.tokens)[:-1, 1:].triu()

    def figures(self) -> dict[str, list[float]]:
        """Return block influence, and mean and largest norm of the output: figure → one number per layer."""
        return {
            "block_influence": (1 - self.mean_cosine().diagonal()).tolist(),
            "mean_norm": (self.sums.totals["norms"] / self.tokens)[1:].tolist(),
            "max_norm": self.norm_max[1:].tolist(),
        }


def angular_distance(states: Tensor) -> Tensor:
    """Return (n, k, k) distances in half turns between all pairs of k states, for states (n, k, d)."""
    unit = normalize(states, dim=-1)
    cosine = (unit @ unit.transpose(1, 2)).clamp(-1, 1)
    distance = torch.arccos(cosine) / torch.pi
    # A state has distance 0 from itself; arccos would turn rounding near 1 into 1e-8.
    distance.diagonal(dim1=1, dim2=2).zero_()
    return distance


def profile_model(context: ModelContext) -> dict[str, Any]:
    """Return the profile of a loaded model on a part of its calibration text.

    Returns:
        ``angular_distance`` and ``residual`` (layers × layers: layer before the cut, last removed layer), ``mean_cosine``
        (layers × layers: input of the first, output of the second) and ``layers`` (figure → list).

    Raises:
        ParameterError: the text has a single token, or states overflow.
        ResourceError: the disk is too small for the scratch files.
    """
    model, layers, width = context.model, len(context.layers), context.width
    context = context.with_documents(part_of(context.documents, max(PROFILED_TOKENS, TOKENS_PER_DIMENSION * width)))
    documents = context.documents
    distances, cosines = AngularDistances(layers), StateCosines(layers)
    if documents.token_count < 2:
        raise ParameterError("dataset_size: the dataset gave a single token, which leaves none to hold out; take more text.")
    with TokenSample(documents, layers, width, model.dtype, context.folder) as sample:
        if len(sample.fit) < FIT_TOKENS * width:
            logger.warning(
                "profile: %d tokens are few for residuals of %d dimensions; raise dataset_size", len(sample.fit), width
            )
        observers: list[Observer] = [distances, cosines, sample]
        walk(context, observers, description="profiling layers")
        evict_layers(model)
        residuals = residual_map(sample, model.device)
    figures = cosines.figures()
    for layer, norm in enumerate(figures["max_norm"]):
        if not math.isfinite(norm):
            raise ParameterError(f"dtype: {model.dtype} overflows at layer {layer}; use bfloat16 or float32.")
    return {
        "angular_distance": distances.result().tolist(),
        "mean_cosine": cosines.mean_cosine().tolist(),
        "residual": residuals,
        "layers": figures,
    }
