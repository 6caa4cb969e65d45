"""SliceGPT (arXiv 2401.15024): keep of the residual stream what its principal components hold (``replaceme.edits.slicing``).

The basis of a signal is made of the eigenvectors of ``Σ hᵀh`` over real tokens with the largest eigenvalues. One after the
other, each signal is computed from those in front of it as they are when sliced: the tokens' states lie in a file on disk, are
projected, and are sent through one attention or one MLP, so that every layer is computed once. The published damping adds the
same to every eigenvalue; it changes no eigenvector, and is left out.

With ``plain`` one basis serves all signals of the dense model together, and the result is the family's own class. There each
token's state counts as the norm sees it, with length 1: of the states as they are, the last layers' would decide alone.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from replaceme.base.combinations import Values
from replaceme.base.compute import require_resident
from replaceme.base.documents import Batch
from replaceme.base.errors import ParameterError, SolveError
from replaceme.base.params import Params
from replaceme.base.progress import logger, progress
from replaceme.base.scratch import scratch
from replaceme.edits.edits import Edits
from replaceme.edits.slicing import sliced_parameters
from replaceme.edits.unfused import projected
from replaceme.methods.method import Bench, Method, drop
from replaceme.models.families import Family
from replaceme.observers.sums import squares, token_weights
from replaceme.observers.walk import Signal, Signals, Start, ask, walk
from replaceme.selection.criteria import WIDTH

# Tokens that an MLP computes at once.
ROWS = 2048


def work(bench: Bench) -> dict[str, Any]:
    """Set the bases in the edits, and return what is kept."""
    params, d = bench.params, int(bench.model.config.hidden_size)
    width, parameters, dense = fitting_width(bench.model, bench.family, params.layers_to_skip, params.plain)
    found = [*(shared_basis if params.plain else bases_in_order)(bench, width)]
    bench.edits.bases = [Q for Q, _ in found]
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


def check(params: Params, model: Any, family: Family) -> None:
    """Raise ParameterError when there is no width for these parameters."""
    fitting_width(model, family, params.layers_to_skip, params.plain)


def principal(gram: Tensor, width: int) -> tuple[Tensor, float]:
    """Return the ``width`` leading eigenvectors of ``Σ hᵀh`` (d, d), as (d, width) float32, and their share of its trace.

    Raises:
        SolveError: the sums are not finite.
    """
    if not bool(torch.isfinite(gram).all()):
        raise SolveError("dtype: the sums over the states are not finite; use float32 or bfloat16.")
    eigenvalues, vectors = torch.linalg.eigh(gram.cpu())
    share = eigenvalues[-width:].sum() / eigenvalues.sum()
    return vectors[:, -width:].flip(1).float().contiguous(), float(share)


@torch.inference_mode()
def bases_in_order(bench: Bench, width: int) -> Iterator[tuple[Tensor, float]]:
    """Yield Q and its share of each signal, in order, each signal being made of the sliced ones in front of it."""
    model, family = bench.model, bench.family
    layers, d = family.decoder_layers(model), int(model.config.hidden_size)
    require_resident(dict(enumerate(layers)), "whose MLP is computed by itself")
    (states,) = scratch([(bench.documents.token_count, d)], model.dtype, bench.folder, "slicing")
    gram = _watched(bench, 0, ("input",), states, None)
    for index, layer in enumerate(progress(layers, "slicing layers", "layers")):
        Q, share = principal(gram, width)
        yield Q, share
        for rows in _parts(states):
            rows.copy_(projected(rows, Q))
        gram = _watched(bench, index, ("input", "attention"), states, Start(index, states))
        Q, share = principal(gram, width)
        yield Q, share
        gram = _through_mlp(layer, family, states, Q)
    yield principal(gram, width)


def shared_basis(bench: Bench, width: int) -> Iterator[tuple[Tensor, float]]:
    """Yield one Q for all signals of the dense model, and its share of them together."""
    pool = Pool(len(bench.family.decoder_layers(bench.model)), int(bench.model.config.hidden_size))
    walk(
        bench.model, bench.family, bench.documents, [pool],
        batch_size=bench.params.batch_size, description="watching all states",
    )  # fmt: skip
    yield principal(pool.gram, width)


def _watched(bench: Bench, layer: int, signals: tuple[Signal, ...], states: Tensor, start: Start | None) -> Tensor:
    """Put a layer's signals, added up, in the place of all tokens' states, and return ``Σ hᵀh`` (d, d) float64."""
    watch = Watch(layer, signals, states)
    walk(
        bench.model, bench.family, bench.documents, [watch],
        batch_size=bench.params.batch_size, description=None, start=start,
    )  # fmt: skip
    return watch.gram


def _through_mlp(layer: Any, family: Family, states: Tensor, Q: Tensor) -> Tensor:
    """Send all tokens' states, projected, through a layer's MLP, in place, and return ``Σ hᵀh`` (d, d) float64."""
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
    """Yield views of the states, some tokens each."""
    return (states[start : start + ROWS] for start in range(0, len(states), ROWS))


class Watch:
    """Observer of the sum of some signals of a layer: keeps it for all tokens, (tokens, d), and ``gram``, Σ hᵀh."""

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
    """Observer of all signals of a model: ``gram`` is Σ hᵀh / ‖h‖² of all of them together."""

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
    """Return the sum of signals, of real tokens: (tokens, d), float32 at least."""
    states = [batch.real(signals[name]) for name in names]
    return torch.stack(states).to(torch.promote_types(states[0].dtype, torch.float32)).sum(dim=0)


def refusals(values: Values) -> list[str]:
    """Return a sentence for each limit that would be ignored."""
    return [
        f"{key}: method slicegpt takes from all layers alike; use null."
        for key in ("min_distance_layer", "max_distance_layer")
        if values[key] is not None
    ]


METHOD = Method(
    solve=drop("SliceGPT"),
    criterion=WIDTH,
    work=work,
    plain=lambda params: params.plain,
    words="removes parts of layers and no layer",
    selections=(),
    several=False,
    repairs=False,
    refusals=refusals,
    check=check,
)


# Widths are multiples of it, as processors like them.
STEP = 8


def fitting_width(model: Any, family: Family, layers: int, one_basis: bool) -> tuple[int, int, int]:
    """Return the width at which the model is nearest to the dense one without ``layers`` average layers, and both's parameters.

    Everything counts: the head that is tied no more, and the shortcuts.

    Args:
        model: the dense model.
        family: its description.
        layers: how many layers' parameters are to go.
        one_basis: whether one basis serves all signals: then there are no shortcuts, and the width is a multiple of the heads'
            number, too, which families' own classes ask for.

    Raises:
        ParameterError: there is no narrower width.
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
    """Return the width whose size, which grows with it, is nearest to the target."""
    above = bisect_left(widths, target, key=size)
    return min(widths[max(above - 1, 0) : above + 1], key=lambda width: abs(size(width) - target))
