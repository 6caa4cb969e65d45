"""Activation statistics of the first planned block, in one pass that stops at the last layer needed.

For a block with host ``i`` and end ``e`` (ReplaceMe, section 3; rows are real tokens):

    M = what the host's MLP adds,  Z = h_i − M = everything else that leaves the host,
    H = h_{e−1} = what the shortened model should have at the cut,  Y = H − Z.

``gram`` keeps ``MᵀM``, ``MᵀY`` and three sums of squares: all that least squares needs, d × d whatever the number of
tokens, and additive over disjoint documents. ``mlp_features`` and ``features`` keep the same of the inputs of the host's last
linears, with weights, ``stream`` of the whole state h_i, and ``magnitudes`` how large its channels are. ``sample`` keeps a few
evenly spaced tokens, for figures that are not sums of squares, ``tokens`` every token on disk, for losses that no sum can stand
for. A statistic is an observer with a ``tensors`` method and one line in ``STATISTICS``.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from replaceme.base.documents import Batch, Documents
from replaceme.base.plan import Block
from replaceme.models.families import Family
from replaceme.observers.features import LINEARS, Features
from replaceme.observers.hadamard import hadamard
from replaceme.observers.shards import ShardWriter
from replaceme.observers.sums import Sums, token_weights
from replaceme.observers.walk import Observer, Signal, Signals, walk

SAMPLED_TOKENS = 2048


class Statistic(Observer, Protocol):
    """An observer whose result is a few tensors."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the result, at the processor."""
        ...


class AtCut:
    """Brings together what passes at a block's host and at its end.

    Attributes:
        at_host: the signals of the host.
        take: receives them, H and the batch; real tokens alone, each (tokens, width).
    """

    at_host: tuple[Signal, ...] = ("mlp", "output")
    take: Callable[..., None]

    def __init__(self, block: Block):
        self.block = block

    def wants(self) -> Mapping[int, frozenset[Signal]]:
        return {self.block.host: frozenset(self.at_host), self.block.end - 1: frozenset({"output"})}

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        if layer == self.block.host:
            for signal in self.at_host:
                batch.scratch[self, signal] = batch.real(signals[signal])
        else:
            self.meet(batch.real(signals["output"]), batch)

    def meet(self, target: Tensor, batch: Batch) -> None:
        """Receive H of the batch's real tokens, behind the host's signals."""
        self.take(*(batch.scratch.pop((self, signal)) for signal in self.at_host), target, batch)


class Gram(AtCut):
    """``MᵀM`` and ``MᵀY`` (d, d), and the scalars ``ΣY²``, ``ΣH²``, ``Σ(H − h_host)²`` and the number of tokens; float64.

    With them goes the weight (d,) of the norm behind the host's MLP, where there is one.
    """

    def __init__(self, block: Block, norm: Tensor | None = None):
        super().__init__(block)
        self.sums = Sums()
        self.norm = {} if norm is None else {"norm": norm.cpu()}

    def take(self, added: Tensor, left: Tensor, target: Tensor, batch: Batch) -> None:
        M, H = added.double(), target.double()
        gap = H - left.double()
        Y = gap + M
        self.sums.add_squares("gram", M)
        self.sums.add(
            {
                "cross": M.T @ Y,
                "target_squares": Y.square().sum(),
                "output_squares": H.square().sum(),
                "gap_squares": gap.square().sum(),
                "tokens": torch.tensor(float(len(M)), dtype=torch.float64),
            }
        )

    def tensors(self) -> dict[str, Tensor]:
        return {name: total.cpu() for name, total in self.sums.finished().items()} | self.norm


class Sample(AtCut):
    """M, Z and H of at most ``SAMPLED_TOKENS`` tokens, evenly spaced over the walk; each (n, d) float32."""

    def __init__(self, block: Block, token_count: int):
        super().__init__(block)
        self.step = -(-token_count // SAMPLED_TOKENS)
        self.kept: dict[str, list[Tensor]] = {"added": [], "rest": [], "target": []}

    def take(self, added: Tensor, left: Tensor, target: Tensor, batch: Batch) -> None:
        start = -batch.first_token % self.step
        M = added[start :: self.step].float()
        self.kept["added"].append(M.cpu())
        self.kept["rest"].append((left[start :: self.step].float() - M).cpu())
        self.kept["target"].append(target[start :: self.step].float().cpu())

    def tensors(self) -> dict[str, Tensor]:
        return {name: torch.cat(parts) for name, parts in self.kept.items()}


class FeatureGram(AtCut):
    """Weighted sums over the features ``g`` of the host's linears, ``w = 1/‖H‖²`` scaled to a mean of 1; float64.

    ``gram`` = Σ w gᵀg (k, k) · ``cross`` = Σ w gᵀ(H − h_host) (k, d) · ``feature_added`` = Σ w gᵀM (k, d) · ``added_gram`` =
    Σ w MᵀM and ``added_cross`` = Σ w Mᵀ(H − h_host) (d, d) · the scalars ``gap_squares`` = Σ w ‖H − h_host‖²,
    ``output_squares`` = Σ w ‖H‖² and ``tokens`` · ``layout`` (``replaceme.observers.features``). Those of M are float64
    throughout, since no ridge need stand behind them; the products of features are float32.
    """

    def __init__(self, block: Block, features: Features):
        super().__init__(block)
        self.features = features
        self.at_host = ("mlp", "output", *features.signals)
        self.sums = Sums()

    def take(self, *signals: Any) -> None:
        added, left, *inputs, target, _batch = signals
        g, gap, w = self.take_features(left, inputs, target)
        M = added.float() * w.sqrt()
        exact = M.double()
        self.sums.add_squares("added_gram", exact)
        self.sums.add({"feature_added": g.T @ M, "added_cross": exact.T @ gap.double()})

    def take_features(self, left: Tensor, inputs: Sequence[Tensor], target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add to the sums without M, and return the features and the gap, both times √w, and w."""
        H = target.float()
        w = token_weights(H)
        g, gap = self.features.columns(*inputs).mul_(w.sqrt()), (H - left.float()).mul_(w.sqrt())
        add_correction(self.sums, g, gap, H, w)
        self.sums.add({"weights": w.sum(), "tokens": torch.tensor(float(len(H)))})
        return g, gap, w

    def tensors(self) -> dict[str, Tensor]:
        return {**of_mean_weight(self.sums.finished()), "layout": self.features.as_tensor()}


class StreamGram(AtCut):
    """Sums over the whole state ``h`` behind the host, with ``w = 1`` or ``1/‖H‖²`` scaled to a mean of 1; float64.

    ``gram`` = Σ w hᵀh and ``cross`` = Σ w hᵀ(H − h) (d, d) · the scalars ``gap_squares`` = Σ w ‖H − h‖², ``output_squares`` =
    Σ w ‖H‖² and ``tokens``.
    """

    at_host = ("output",)

    def __init__(self, block: Block, weighted: bool):
        super().__init__(block)
        self.weighted = weighted
        self.sums = Sums()

    def take(self, left: Tensor, target: Tensor, batch: Batch) -> None:
        h, H = left.double(), target.double()
        w = token_weights(H) if self.weighted else torch.ones_like(H[:, :1])
        h, gap = h * w.sqrt(), (H - h) * w.sqrt()
        add_correction(self.sums, h, gap, H, w)
        self.sums.add({"weights": w.sum(), "tokens": torch.tensor(float(len(h)))})

    def tensors(self) -> dict[str, Tensor]:
        return of_mean_weight(self.sums.finished())


class MagnitudeRatios(AtCut):
    """How much larger each channel of the state gets across the block: the mean over documents of

        mean over the document's tokens of |H_k| / mean over the document's tokens of |h_k|

    in ``ratios`` (d,) float64, a sum, with the number of ``documents``; where ``rotated``, of the states times a Hadamard
    matrix. A channel that is zero throughout a document stays as it is there.
    """

    at_host = ("output",)

    def __init__(self, block: Block, rotated: bool):
        super().__init__(block)
        self.rotated, self.rotation = rotated, torch.empty(0)
        self.sums = Sums()

    def take(self, left: Tensor, target: Tensor, batch: Batch) -> None:
        lengths = batch.lengths.tolist()
        before, after = (
            torch.stack([document.abs().double().mean(dim=0) for document in self._turned(rows.float()).split(lengths)])
            for rows in (left, target)
        )
        ratios = torch.where(before > 0, after / before, 1)
        self.sums.add({"ratios": ratios.sum(dim=0), "documents": torch.tensor(float(len(lengths)))})

    def _turned(self, rows: Tensor) -> Tensor:
        if not self.rotated:
            return rows
        if not len(self.rotation):
            matrix = hadamard(rows.shape[1])
            assert matrix is not None, "a width without a Hadamard matrix would have been refused"
            self.rotation = matrix.to(rows)
        return rows @ self.rotation

    def tensors(self) -> dict[str, Tensor]:
        return {name: total.cpu() for name, total in self.sums.finished().items()}


def of_mean_weight(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weighted sums as with weights of mean 1, at the processor.

    Args:
        sums: Σ w of something, by name; ``weights`` = Σ w, which is left out, and ``tokens``, their number.
    """
    tokens, weights = sums["tokens"].cpu(), sums["weights"].cpu()
    scaled = {name: total.cpu() * (tokens / weights) for name, total in sums.items() if name not in ("tokens", "weights")}
    return {**scaled, "tokens": tokens}


def add_correction(sums: Sums, g: Tensor, gap: Tensor, target: Tensor, w: Tensor) -> None:
    """Add what ``replaceme.solvers.ridge.solve_correction`` needs of some tokens, and how far they are from their target.

    Args:
        sums: get ``gram`` (k, k), ``cross`` (k, d), ``gap_squares`` and ``output_squares``.
        g: (tokens, k) features, times √w.
        gap: (tokens, d) what the state lacks toward the target, times √w.
        target: (tokens, d).
        w: (tokens, 1) the weights.
    """
    sums.add_squares("gram", g)
    sums.add({"cross": g.T @ gap, "gap_squares": gap.square().sum(), "output_squares": (w * target.square()).sum()})


class TokenDump(AtCut):
    """Every token's M and Y, or in the accurate form its M, h_host and H, in shards; the result says how many each holds."""

    def __init__(self, place: "Place", accurate: bool):
        super().__init__(place.block)
        self.accurate = accurate
        names = ("added", "left", "target") if accurate else ("added", "goal")
        self.shards = ShardWriter(place.folder, names, place.documents.token_count)

    def take(self, added: Tensor, left: Tensor, target: Tensor, batch: Batch) -> None:
        if self.accurate:
            self.shards.add(added, left, target)
        else:
            self.shards.add(added, target.float() - left.float() + added.float())

    def tensors(self) -> dict[str, Tensor]:
        return {"counts": self.shards.finish()}


@dataclass(frozen=True)
class Place:
    """Where and of what a statistic is taken.

    Attributes:
        block: the layers that go.
        host: the module of the kept layer in front of them.
        family: where its parts are.
        documents: what is walked.
        folder: where results too large for memory may be written; they stay with the other statistics.
    """

    block: Block
    host: nn.Module
    family: Family
    documents: Documents
    folder: Path


STATISTICS: dict[str, Callable[[Place], Statistic]] = {
    "gram": lambda place: Gram(place.block, place.family.norm_weight(place.host) if place.family.norm_after_mlp else None),
    "sample": lambda place: Sample(place.block, place.documents.token_count),
    "mlp_features": lambda place: FeatureGram(place.block, Features.of(place.host, place.family, ["mlp_output"])),
    "features": lambda place: FeatureGram(place.block, Features.of(place.host, place.family, LINEARS)),
    "stream": lambda place: StreamGram(place.block, weighted=False),
    "stream_weighted": lambda place: StreamGram(place.block, weighted=True),
    "magnitudes": lambda place: MagnitudeRatios(place.block, rotated=False),
    "magnitudes_rotated": lambda place: MagnitudeRatios(place.block, rotated=True),
    "tokens": lambda place: TokenDump(place, accurate=False),
    "tokens_accurate": lambda place: TokenDump(place, accurate=True),
}


def take_statistics(
    model: Any,
    family: Family,
    documents: Documents,
    block: Block,
    names: Sequence[str],
    batch_size: int,
    folder: Path | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each statistic of a block, by name, from one pass.

    What is too large for memory is written into ``folder``; None is the system's temporary folder.
    """
    layers = family.decoder_layers(model)
    folder = folder or Path(tempfile.gettempdir())
    place = Place(block, layers[block.host], family, documents, folder)
    observers = {name: STATISTICS[name](place) for name in names}
    walk(model, family, documents, list(observers.values()), batch_size=batch_size, description="observing activations")
    return {name: observer.tensors() for name, observer in observers.items()}
