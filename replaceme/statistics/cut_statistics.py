"""Activation statistics of a block, in one walk that stops at the last layer needed.

For a block with the layer ``i`` before it and end ``e`` (ReplaceMe, section 3; rows are real tokens):

    M = output of the MLP of layer i,  Z = h_i − M = the rest of the layer's output,
    H = h_{e−1} = target for the state at the cut,  Y = H − Z.

- ``gram``: ``MᵀM``, ``MᵀY`` and three sums of squares, which determine the least squares for T. Their size is d × d whatever
  the number of tokens, and they are additive over disjoint documents.
- ``mlp_features``, ``features``: the same for the inputs of the layer's last linears, with token weights.
- ``stream``, ``stream_weighted``: the same for the whole state h_i.
- ``magnitudes``, ``magnitudes_rotated``: growth of each channel's magnitude across the block.
- ``sample``: a few evenly spaced tokens, for figures that are not sums of squares.
- ``tokens``, ``tokens_accurate``: every token, on disk, for losses that need more than sums.

A statistic is an observer with a ``tensors`` method and one line in ``STATISTICS``. Processes can share its walk if it also has
an ``all_reduce`` method; the last two have none.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from replaceme.base.accelerators import to_float64
from replaceme.base.documents import Batch
from replaceme.base.group import all_reduce_sum
from replaceme.base.plan import Block
from replaceme.models.context import ModelContext
from replaceme.models.families import Linear
from replaceme.statistics.features import LINEARS, Features
from replaceme.statistics.hadamard import hadamard
from replaceme.statistics.shards import ShardWriter
from replaceme.statistics.sums import Sums, product, token_weights, widen
from replaceme.statistics.walk import Observer, Signal, Signals, walk

SAMPLED_TOKENS = 2048


class Statistic(Observer, Protocol):
    """An observer whose result is a few tensors."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the result, on the CPU."""
        ...


class CutStatistic:
    """Base of the statistics: pairs the signals of the layer before the cut with the target state, batch by batch.

    Attributes:
        signals_before_cut: the observed signals of the layer before the cut.
        take: receives these signals, the target H and the batch; of real tokens only, (tokens, width) each.
    """

    signals_before_cut: tuple[Signal, ...] = ("mlp", "output")
    take: Callable[..., None]

    def __init__(self, block: Block):
        self.block = block

    def signals(self) -> Mapping[int, frozenset[Signal]]:
        return {self.block.layer_before_cut: frozenset(self.signals_before_cut), self.block.end - 1: frozenset({"output"})}

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        if layer == self.block.layer_before_cut:
            for signal in self.signals_before_cut:
                batch.scratch[self, signal] = batch.real(signals[signal])
        else:
            self.add_targets(batch.real(signals["output"]), batch)

    def add_targets(self, target: Tensor, batch: Batch) -> None:
        """Pass the stored signals of the layer before the cut, and the target H (tokens, d), to ``take``."""
        self.take(*(batch.scratch.pop((self, signal)) for signal in self.signals_before_cut), target, batch)


class SummedStatistic(CutStatistic):
    """Base of the statistics that are sums over tokens."""

    def __init__(self, block: Block):
        super().__init__(block)
        self.sums = Sums()

    def all_reduce(self) -> None:
        self.sums.all_reduce()

    def tensors(self) -> dict[str, Tensor]:
        return {name: total.cpu() for name, total in self.sums.take_totals().items()}


class Gram(SummedStatistic):
    """``MᵀM`` and ``MᵀY`` (d, d), and the scalars ``ΣY²``, ``ΣH²``, ``Σ(H − h_i)²`` and the number of tokens; float64.

    ``norm`` is the weight (d,) of the norm after the MLP before the cut, if there is one.
    """

    def __init__(self, block: Block, norm: Tensor | None = None):
        super().__init__(block)
        self.norm = {} if norm is None else {"norm": norm.cpu()}

    def take(self, mlp_output: Tensor, output_before_cut: Tensor, target: Tensor, batch: Batch) -> None:
        M, H = widen(mlp_output), widen(target)
        gap = H - widen(output_before_cut)
        Y = gap + M
        self.sums.add_squares("gram", M)
        self.sums.add(
            {
                "cross": product(M, Y),
                "target_squares": Y.square().sum(),
                "output_squares": H.square().sum(),
                "gap_squares": gap.square().sum(),
                "tokens": torch.tensor(float(len(M)), dtype=torch.float64),
            }
        )

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | self.norm


class Sample(CutStatistic):
    """M, Z and H of at most ``SAMPLED_TOKENS`` tokens, evenly spaced over the walk; each (n, d) float32."""

    def __init__(self, block: Block, token_count: int):
        super().__init__(block)
        self.stride = -(-token_count // SAMPLED_TOKENS)
        self.count = -(-token_count // self.stride)
        self.kept: dict[str, list[Tensor]] = {"added": [], "rest": [], "target": []}
        # The positions of this process's tokens in the sample.
        self.positions: list[Tensor] = []

    def take(self, mlp_output: Tensor, output_before_cut: Tensor, target: Tensor, batch: Batch) -> None:
        start = -batch.position % self.stride
        M, h, H = (rows[start :: self.stride].float() for rows in (mlp_output, output_before_cut, target))
        for kept, rows in zip(self.kept.values(), torch.stack([M, h - M, H]).cpu(), strict=True):
            kept.append(rows)
        first = (batch.position + start) // self.stride
        self.positions.append(torch.arange(first, first + len(self.kept["target"][-1])))

    def all_reduce(self) -> None:
        whole: dict[str, Tensor] = {}
        for name, parts in self.kept.items() if self.positions else ():
            own = torch.cat(parts)
            whole[name] = own.new_zeros(self.count, own.shape[1])
            whole[name][torch.cat(self.positions)] = own
        all_reduce_sum(whole)
        self.kept = {name: [rows] for name, rows in whole.items()}

    def tensors(self) -> dict[str, Tensor]:
        return {name: torch.cat(parts) for name, parts in self.kept.items()}


class FeatureGram(SummedStatistic):
    """Weighted sums over the features ``g`` of the last linears before the cut, ``w = 1/‖H‖²`` scaled to a mean of 1; float64.

    ``gram`` = Σ w gᵀg (k, k) · ``cross`` = Σ w gᵀ(H − h_i) (k, d) · ``feature_added`` = Σ w gᵀM (k, d) · ``added_gram`` =
    Σ w MᵀM and ``added_cross`` = Σ w Mᵀ(H − h_i) (d, d) · the scalars ``gap_squares`` = Σ w ‖H − h_i‖²,
    ``output_squares`` = Σ w ‖H‖² and ``tokens`` · ``layout`` (``replaceme.statistics.features``). Products of M
    only are float64, since alpha, the ridge of their least squares, can be 0; products of features are float32.
    """

    def __init__(self, block: Block, features: Features):
        super().__init__(block)
        self.features = features
        self.signals_before_cut = ("mlp", "output", *features.signals)

    def take(self, *signals: Any) -> None:
        mlp_output, output_before_cut, *inputs, target, _batch = signals
        g, gap, w = self.take_features(output_before_cut, inputs, target)
        M = mlp_output.float() * w.sqrt()
        exact = widen(M)
        self.sums.add_squares("added_gram", exact)
        self.sums.add({"feature_added": product(g, M), "added_cross": product(exact, widen(gap))})

    def take_features(
        self, output_before_cut: Tensor, inputs: Sequence[Tensor], target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add to the sums without M; return √w g (tokens, k), √w (H − h_i) (tokens, d) and w (tokens, 1), float32."""
        H = target.float()
        w = token_weights(H)
        g, gap = self.features.columns(*inputs).mul_(w.sqrt()), (H - output_before_cut.float()).mul_(w.sqrt())
        add_correction(self.sums, g, gap, H, w)
        self.sums.add({"weights": w.sum(), "tokens": torch.tensor(float(len(H)))})
        return g, gap, w

    def tensors(self) -> dict[str, Tensor]:
        return {name: total.cpu() for name, total in self.solvable_sums().items()}

    def solvable_sums(self) -> dict[str, Tensor]:
        """Return what ``tensors`` does, on the device of the sums, which solves sooner than the processor."""
        return {**normalize_weights(self.sums.take_totals()), "layout": self.features.as_tensor()}


class StreamGram(SummedStatistic):
    """Sums over the state ``h`` before the cut, with ``w = 1`` or ``1/‖H‖²`` scaled to a mean of 1; float64.

    ``gram`` = Σ w hᵀh and ``cross`` = Σ w hᵀ(H − h) (d, d) · the scalars ``gap_squares`` = Σ w ‖H − h‖², ``output_squares`` =
    Σ w ‖H‖² and ``tokens``.
    """

    signals_before_cut = ("output",)

    def __init__(self, block: Block, weighted: bool):
        super().__init__(block)
        self.weighted = weighted

    def take(self, output_before_cut: Tensor, target: Tensor, batch: Batch) -> None:
        h, H = widen(output_before_cut), widen(target)
        w = token_weights(H) if self.weighted else torch.ones_like(H[:, :1])
        h, gap = h * w.sqrt(), (H - h) * w.sqrt()
        add_correction(self.sums, h, gap, H, w)
        self.sums.add({"weights": w.sum(), "tokens": torch.tensor(float(len(h)))})

    def tensors(self) -> dict[str, Tensor]:
        return {name: total.cpu() for name, total in normalize_weights(self.sums.take_totals()).items()}


class MagnitudeRatios(SummedStatistic):
    """Growth of each channel k of the state across the block, summed over documents:

        mean over the document's tokens of |H_k| / mean over the document's tokens of |h_k|

    ``ratios`` (d,) is the sum and ``documents`` their number, float64. If ``rotated``, both states are first multiplied by a
    Hadamard matrix. The ratio is 1 for a channel that is zero throughout a document.
    """

    signals_before_cut = ("output",)

    def __init__(self, block: Block, rotated: bool):
        super().__init__(block)
        self.rotated, self.rotation = rotated, torch.empty(0)

    def take(self, output_before_cut: Tensor, target: Tensor, batch: Batch) -> None:
        lengths = batch.lengths.tolist()
        before, after = (
            torch.stack([to_float64(document.abs()).mean(dim=0) for document in self._turned(rows.float()).split(lengths)])
            for rows in (output_before_cut, target)
        )
        ratios = torch.where(before == 0, 1, after / before)
        self.sums.add({"ratios": ratios.sum(dim=0), "documents": torch.tensor(float(len(lengths)))})

    def _turned(self, rows: Tensor) -> Tensor:
        if not self.rotated:
            return rows
        if not len(self.rotation):
            matrix = hadamard(rows.shape[1])
            assert matrix is not None, "such a width is refused before any work"
            self.rotation = matrix.to(rows)
        return rows @ self.rotation


def normalize_weights(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weighted sums, rescaled to weights of mean 1, without ``weights``. The sums are overwritten.

    Args:
        sums: weighted sums by name; among them ``weights`` = Σ w, and ``tokens``, the number of tokens.
    """
    tokens, weights = sums["tokens"].cpu(), sums["weights"].cpu()
    with torch.inference_mode():
        scaled = {name: total.mul_(tokens / weights) for name, total in sums.items() if name not in ("tokens", "weights")}
    return {**scaled, "tokens": tokens}


def add_correction(sums: Sums, g: Tensor, gap: Tensor, target: Tensor, w: Tensor, dtype: torch.dtype | None = None) -> None:
    """Add the sums of some tokens that ``replaceme.solvers.ridge.solve_correction`` needs, and their squared errors.

    Args:
        sums: added to: ``gram`` (k, k), ``cross`` (k, d), ``gap_squares`` and ``output_squares``.
        g: (tokens, k) features, times √w.
        gap: (tokens, d) target minus state, times √w.
        target: (tokens, d).
        w: (tokens, 1) token weights.
        dtype: of the products of features (``gram_format``); None: that of g.
    """
    sums.add_squares("gram", g if dtype is None else g.to(dtype))
    sums.add({"cross": product(g, gap), "gap_squares": gap.square().sum(), "output_squares": (w * target.square()).sum()})


class TokenDump(CutStatistic):
    """M and Y of every token, or M, h_i and H in the accurate form, in shards; ``counts``: number of tokens of each."""

    def __init__(self, block: Block, context: ModelContext, accurate: bool):
        super().__init__(block)
        self.accurate = accurate
        names = ("added", "left", "target") if accurate else ("added", "goal")
        folder = context.folder or Path(tempfile.gettempdir())
        self.shards = ShardWriter(folder, names, context.documents.token_count)

    def take(self, mlp_output: Tensor, output_before_cut: Tensor, target: Tensor, batch: Batch) -> None:
        if self.accurate:
            self.shards.add(mlp_output, output_before_cut, target)
        else:
            self.shards.add(mlp_output, target.float() - output_before_cut.float() + mlp_output.float())

    def tensors(self) -> dict[str, Tensor]:
        return {"counts": self.shards.finish()}


def _norm_weight(block: Block, context: ModelContext) -> Tensor | None:
    """Return the weight (d,) of the norm after the MLP before the cut; None if the family has no such norm."""
    layer = context.layers[block.layer_before_cut]
    return context.family.norm_weight(layer) if context.family.norm_after_mlp else None


def _layer_features(block: Block, context: ModelContext, linears: Sequence[Linear]) -> Features:
    return Features.of(context.layers[block.layer_before_cut], context.family, linears)


STATISTICS: dict[str, Callable[[Block, ModelContext], Statistic]] = {
    "gram": lambda block, context: Gram(block, _norm_weight(block, context)),
    "sample": lambda block, context: Sample(block, context.documents.token_count),
    "mlp_features": lambda block, context: FeatureGram(block, _layer_features(block, context, ["mlp_output"])),
    "features": lambda block, context: FeatureGram(block, _layer_features(block, context, LINEARS)),
    "stream": lambda block, context: StreamGram(block, weighted=False),
    "stream_weighted": lambda block, context: StreamGram(block, weighted=True),
    "magnitudes": lambda block, context: MagnitudeRatios(block, rotated=False),
    "magnitudes_rotated": lambda block, context: MagnitudeRatios(block, rotated=True),
    "tokens": lambda block, context: TokenDump(block, context, accurate=False),
    "tokens_accurate": lambda block, context: TokenDump(block, context, accurate=True),
}
# All but those of single tokens (``replaceme.statistics.walk.Reducible``).
REDUCIBLE = STATISTICS.keys() - {"tokens", "tokens_accurate"}


def are_reducible(names: Sequence[str]) -> bool:
    """Return whether there are statistics to take, and processes can share the walk of all of them."""
    return bool(names) and REDUCIBLE.issuperset(names)


def take_statistics(context: ModelContext, block: Block, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each statistic of a block, by name, from one walk.

    Args:
        context: the model and its calibration text; results too large for memory go to its folder.
        block: the removed layers.
        names: of the statistics.

    Raises:
        ResourceError: the disk is too small for these results.
    """
    observers = {name: STATISTICS[name](block, context) for name in names}
    walk(context, [*observers.values()], description="observing activations")
    return {name: observer.tensors() for name, observer in observers.items()}
