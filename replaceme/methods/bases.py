"""Bases of a narrower residual stream, for SliceGPT (arXiv 2401.15024): the principal components of each signal.

The signals are taken in order, each computed from the sliced ones before it: the tokens' states, in a file on disk, are
projected and go through one attention or one MLP, so that every layer is computed once. A single basis for all signals takes
one pass through the dense model.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from replaceme.base.compute import require_resident
from replaceme.base.documents import Batch
from replaceme.base.errors import ParameterError, SolveError
from replaceme.base.progress import progress
from replaceme.base.scratch import scratch
from replaceme.edits.edits import Edits
from replaceme.edits.slicing import sliced_parameters
from replaceme.edits.unfused import projected
from replaceme.methods.method import Bench
from replaceme.models.families import Family
from replaceme.models.layers import EntryState
from replaceme.observers.sums import squares, token_weights
from replaceme.observers.walk import Signal, Signals, ask, walk

# Tokens in one call of an MLP.
ROWS = 2048
# Widths are multiples of this, for fast matrix products.
STEP = 8


def principal(gram: Tensor, width: int) -> tuple[Tensor, float]:
    """Return the ``width`` leading eigenvectors of ``Σ hᵀh`` (d, d), (d, width) float32, and their share of its trace.

    They are computed on the device of the sums, and stay there.

    Raises:
        SolveError: the sums are not finite.
    """
    if not bool(torch.isfinite(gram).all()):
        raise SolveError("dtype: the sums over the states are not finite; use float32 or bfloat16.")
    eigenvalues, vectors = torch.linalg.eigh(gram)
    share = eigenvalues[-width:].sum() / eigenvalues.sum()
    return vectors[:, -width:].flip(1).float().contiguous(), float(share)


@torch.inference_mode()
def bases_in_order(bench: Bench, width: int) -> Iterator[tuple[Tensor, float]]:
    """Yield Q and its share of the trace for each signal, in order, each computed from the sliced ones before it."""
    model, family = bench.model, bench.family
    layers, d = family.decoder_layers(model), int(model.config.hidden_size)
    require_resident(dict(enumerate(layers)), "whose MLP is computed by itself")
    (states,) = scratch([(bench.documents.token_count, d)], model.dtype, bench.folder, "slicing")
    gram = _watched(bench, 0, ("input",), states, None)
    for index, layer in enumerate(progress(layers, "slicing layers", "layers")):
        Q, share = principal(gram, width)
        yield Q, share
        for rows in _parts(states):
            rows.copy_(projected(rows.to(Q.device), Q))
        gram = _watched(bench, index, ("input", "attention"), states, EntryState(index, states))
        Q, share = principal(gram, width)
        yield Q, share
        gram = _through_mlp(layer, family, states, Q)
    yield principal(gram, width)


def shared_basis(bench: Bench, width: int) -> Iterator[tuple[Tensor, float]]:
    """Yield one Q for all signals of the dense model, and its share of their common trace."""
    pool = Pool(len(bench.family.decoder_layers(bench.model)), int(bench.model.config.hidden_size))
    walk(
        bench.model, bench.family, bench.documents, [pool],
        batch_size=bench.params.batch_size, description="watching all states",
    )  # fmt: skip
    yield principal(pool.gram, width)


def _watched(bench: Bench, layer: int, signals: tuple[Signal, ...], states: Tensor, start: EntryState | None) -> Tensor:
    """Overwrite all tokens' states with the sum of a layer's signals, and return its ``Σ hᵀh`` (d, d) float64."""
    watch = Watch(layer, signals, states)
    walk(
        bench.model, bench.family, bench.documents, [watch],
        batch_size=bench.params.batch_size, description=None, start=start,
    )  # fmt: skip
    return watch.gram


def _through_mlp(layer: Any, family: Family, states: Tensor, Q: Tensor) -> Tensor:
    """Project all tokens' states, update them by a layer's MLP, in place, and return ``Σ hᵀh`` (d, d) float64."""
    norm, mlp = layer.get_submodule(family.rms_norms[1]), layer.get_submodule(family.mlp)
    device = next(mlp.parameters()).device
    gram = torch.zeros(len(Q), len(Q), dtype=torch.float64, device=device)
    for rows in _parts(states):
        state = projected(rows.to(device), Q)
        added = mlp(norm(state.to(rows.dtype)[None]))[0]
        state = state + family.multiplier * added.to(state)
        gram += squares(state)
        rows.copy_(state)
    return gram


def _parts(states: Tensor) -> Iterator[Tensor]:
    """Return views of the states, ``ROWS`` tokens each."""
    return (states[start : start + ROWS] for start in range(0, len(states), ROWS))


class Watch:
    """Observer that stores the sum h of some signals of a layer, (tokens, d), and ``gram`` = Σ hᵀh."""

    def __init__(self, layer: int, signals: tuple[Signal, ...], kept: Tensor):
        self.layer, self.signals, self.kept = layer, signals, kept
        self.gram = torch.zeros(kept.shape[1], kept.shape[1], dtype=torch.float64)

    def wants(self) -> Mapping[int, frozenset[Signal]]:
        return ask([self.layer], *self.signals)

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        state = _added(signals, self.signals, batch)
        self.gram = self.gram.to(state.device).add_(squares(state))
        self.kept[batch.tokens] = state.to(self.kept)


class Pool:
    """Observer of all signals h of a model: ``gram`` = Σ hᵀh / ‖h‖² over tokens and signals."""

    def __init__(self, layers: int, d: int):
        self.layers, self.gram = layers, torch.zeros(d, d, dtype=torch.float64)

    def wants(self) -> Mapping[int, frozenset[Signal]]:
        return {**ask(range(self.layers), "input", "attention"), self.layers - 1: frozenset({"input", "attention", "output"})}

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        states = [_added(signals, names, batch) for names in (("input",), ("input", "attention"))]
        if "output" in signals:
            states.append(_added(signals, ("output",), batch))
        for state in states:
            self.gram = self.gram.to(state.device).add_(squares(state * token_weights(state).sqrt()))


def _added(signals: Signals, names: tuple[Signal, ...], batch: Batch) -> Tensor:
    """Return the sum of signals over real tokens: (tokens, d), float32 or wider."""
    states = [batch.real(signals[name]) for name in names]
    return torch.stack(states).to(torch.promote_types(states[0].dtype, torch.float32)).sum(dim=0)


def fitting_width(model: Any, family: Family, layers: int, one_basis: bool) -> tuple[int, int, int]:
    """Return the width whose model is closest in size to the dense one without ``layers`` average layers; and both sizes.

    All parameters count, also those of an untied head and of the shortcuts.

    Args:
        model: the dense model.
        family: its description.
        layers: the number of layers whose parameters the slicing removes.
        one_basis: whether all signals share one basis; then there are no shortcuts, and the width is also a multiple of the
            number of heads, as the families' own classes require.

    Raises:
        ParameterError: no narrower width exists.
    """
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    d, heads = int(model.config.hidden_size), int(model.config.num_attention_heads)
    step = math.lcm(STEP, heads) if one_basis else STEP
    widths = range(step, d, step)
    if not widths:
        raise ParameterError(
            f"plain: the width would be a multiple of {step}, for {heads} attention heads, and the model's is {d}; use false."
        )
    blocks = family.decoder_layers(skeleton)
    total, of_layers = (sum(parameter.numel() for parameter in part.parameters()) for part in (skeleton, blocks))
    target = total - layers * of_layers / len(blocks)
    count = len(blocks) * 2 + 1

    def size(width: int) -> int:
        edits = Edits("", [], bases=[torch.empty(d, width, device="meta")] * (1 if one_basis else count))
        parts = {name: parameter.numel() for name, parameter in skeleton.named_parameters()}
        return sum((parts | {name: exact.numel() for name, exact in sliced_parameters(skeleton, family, edits)}).values())

    width = nearest(widths, target, size)
    return width, size(width), total


def nearest(widths: Sequence[int], target: float, size: Callable[[int], int]) -> int:
    """Return the width whose size is nearest to the target; sizes grow with the width."""
    above = bisect_left(widths, target, key=size)
    return min(widths[max(above - 1, 0) : above + 1], key=lambda width: abs(size(width) - target))
