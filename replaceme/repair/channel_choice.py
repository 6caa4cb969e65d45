"""The choice of channels for the MLP before a cut, of its own and those of removed layers (``replaceme.edits.channels``).

The criterion is the least squares that solves for its last linear (``replaceme.solvers.refit``): a ridge regression of what the
state at the cut lacks, with the channels' original columns as prior. With ``A = S + λ diag S`` and the solution's rows ``w_i``,
its objective rises by

    ‖w_i‖² / (A⁻¹)_ii

without channel i (Hassibi and Stork, Optimal Brain Surgeon, 1993). Each round drops the fifth with the smallest rises, then
solves again, until the channels fit. (Smaller steps chose no better on the demo.)

Layers are added one at a time, from the last removed layer to the one before the cut, and each is compared with the best
channels so far, so the sums stay at (2 f)² numbers. (All layers at once were no better on the demo.) Where these would exceed
``CANDIDATE_BYTES``, the channels with the smallest rises are left out before, by the same rule without the products of
different channels: ``w_i = (c_i + λ S_ii prior_i) / ((1 + λ) S_ii)`` and ``1 / (A⁻¹)_ii = (1 + λ) S_ii``. (On the demo, 1.5 f
channels chosen so hold 84 % of the exact choices, and 1.75 f hold 94 %. A sketch of f / 2 tokens, with the products, came to
88 % and 94 %.)
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from replaceme.base.accelerators import to_device
from replaceme.base.documents import Batch
from replaceme.base.errors import SolveError
from replaceme.base.group import all_reduce_sum
from replaceme.models.dtypes import is_finite
from replaceme.models.families import Family, parameter_of
from replaceme.solvers.cholesky import factorize, inverse_diagonal, solve_factorized
from replaceme.statistics.sums import add_squares, mirror, token_weights
from replaceme.statistics.walk import Signal, Signals

# Tokens per compared channel, and the share of channels that a round keeps.
TOKENS_PER_CHANNEL, SHARE = 8, 0.8
# Largest products of candidates, in bytes of float32; on the processor, two and a third such matrices exist at once. And how
# many channels are compared in any case, as a multiple of those that are kept.
CANDIDATE_BYTES, MARGIN = 2 << 30, 1.125


class Candidates:
    """Observer of the least squares from candidate channels, in a layer's MLP, to a target: sums over tokens, kept in float32.

    ``gram`` = Σ w gᵀg (k, k; half of it: ``replaceme.statistics.sums``) and ``cross`` = Σ w gᵀ(target − state without the
    MLP) (k, d), ``w = 1/‖target‖²``. ``dtype`` is the format of the products of channels (``gram_format``).
    """

    def __init__(self, layer: int, family: Family, module: nn.Module, target: Tensor, dtype: torch.dtype = torch.float32):
        self.layer, self.target, self.dtype, self.multiplier = layer, target, dtype, family.multiplier
        last = family.linear_of(module, "mlp_output")
        self.bias = None if getattr(last, "bias", None) is None else parameter_of(last, "bias")
        self.gram = self.cross = torch.empty(0)

    def signals(self) -> Mapping[int, frozenset[Signal]]:
        return {self.layer: frozenset(("input", "attention", "mlp_features"))}

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        state = batch.real(signals["input"]).float() + batch.real(signals["attention"]).float()
        if self.bias is not None:
            state += self.multiplier * self.bias.to(state)
        target = to_device(self.target[batch.tokens], state.device).float()
        root = token_weights(target).sqrt()
        g = batch.real(signals["mlp_features"]).float() * (self.multiplier * root)
        if not len(self.cross):
            self.cross = g.new_zeros(g.shape[1], target.shape[1])
        self.add_squares(g)
        self.cross.addmm_(g.T, (target - state) * root)

    def add_squares(self, g: Tensor) -> None:
        """Add the products of the channels of some tokens, (tokens, k) float32."""
        if not len(self.gram):
            self.gram = g.new_zeros(g.shape[1], g.shape[1])
        add_squares(self.gram, g.to(self.dtype))

    def all_reduce(self) -> None:
        sums = {"gram": self.gram, "cross": self.cross} if len(self.gram) else {}
        all_reduce_sum(sums)
        self.gram, self.cross = sums["gram"], sums["cross"]


class ScreenedCandidates(Candidates):
    """``Candidates`` without the products of different channels: ``gram`` = Σ w g² (k,)."""

    def add_squares(self, g: Tensor) -> None:
        squares = g.square().sum(dim=0)
        self.gram = self.gram.add_(squares) if len(self.gram) else squares


def max_candidates(count: int) -> int:
    """Return how many candidates are compared at once, at most, where ``count`` are kept."""
    return max(math.isqrt(CANDIDATE_BYTES // torch.float32.itemsize), math.ceil(MARGIN * count))


@torch.inference_mode()
def likely_channels(squares: Tensor, cross: Tensor, prior: Tensor, ridge: float, count: int) -> Tensor:
    """Return the channels that would be kept if all were uncorrelated, (count,) int64 ascending.

    Args:
        squares: ``Σ w g²`` (k,).
        cross, prior, ridge, count: as of ``best_channels``.
    """
    goal = cross + ridge * squares[:, None] * prior.to(cross)
    rise = torch.where(squares > 0, goal.square().sum(dim=1) / squares, 0)
    return rise.topk(count).indices.sort().values.cpu()


@torch.inference_mode()
def best_channels(gram: Tensor, cross: Tensor, prior: Tensor, ridge: float, count: int) -> Tensor:
    """Return the channels to keep, (count,) int64 ascending.

    Args:
        gram: ``S = Σ w gᵀg`` (k, k), read above the diagonal only; it is overwritten.
        cross: ``Σ w gᵀe`` (k, d), with ``e`` the gap to the target.
        prior: (k, d), the transposed weights that the ridge pulls toward.
        ridge: λ, in the features' own units, above 0.
        count: the number of channels to keep.

    Raises:
        SolveError: the sums are not finite, or the ridge is too small for them.
    """
    diagonal = mirror(gram).diagonal()
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0)
    # In units where every channel has a mean square of 1; a channel that is always zero gets zeros.
    scaled, goal = gram.mul_(scale).mul_(scale[:, None]), cross * scale[:, None]
    prior = torch.where(scale[:, None] > 0, prior.to(gram) / scale[:, None], 0)
    kept = torch.arange(len(gram), device=gram.device)
    while len(kept) > count:
        matrix = scaled.clone()
        matrix.diagonal().add_(ridge)
        factor, failed = factorize(matrix)
        if not is_finite(matrix, goal):
            raise SolveError("dtype: the sums over the MLP's channels are not finite; use float32 or bfloat16.")
        if failed:
            raise SolveError(f"ridge: {ridge:g} leaves the choice of channels singular; raise it, or dataset_size.")
        weights = solve_factorized(factor, goal + ridge * prior)
        rise = weights.square().sum(dim=1) / inverse_diagonal(factor)
        del matrix, factor
        left = rise.topk(max(count, int(SHARE * len(kept)))).indices.sort().values
        kept, goal, prior = kept[left], goal[left], prior[left]
        if len(kept) > count:
            scaled = scaled.index_select(0, left)
            scaled = scaled.index_select(1, left)
    return kept.cpu()
