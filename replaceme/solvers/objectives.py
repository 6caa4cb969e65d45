"""The objective of the iterative solvers, per token (ReplaceMe, arXiv 2505.02819, section 3); autograd differentiates it:

    (Σ_tokens loss + α‖T − P‖²_F + ρ‖T‖₁) / number of tokens

    CosineLoss    1 − cos(M T + Z, H), or 1 − cos(M T, Y) in the fast form; reads the tokens
    SquaredError  ‖Y − M T‖², from the sums MᵀM, MᵀY and ΣY²; reads no tokens

A loss comes in parts of some tokens each: no more than one shard of tokens is in memory, and the solver chooses whether the
parts are minibatches or are added up.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.autograd.functional import vhp

from replaceme.solvers.closed_forms import squared_error
from replaceme.solvers.structures import Parametrisation, SplitEntries
from replaceme.statistics.shards import StoredShards, Tokens

# Tokens of a shard that are computed at once.
ROWS = 4096
# Square of the length below which a row counts as zeros, without a direction.
TINY = 1e-24

# A number of tokens, and the sum of their losses () as a function of T (d, d) float64.
Part = tuple[int, Callable[[Tensor], Tensor]]


class SquaredError:
    """``‖Y − M T‖²`` from the sums of the statistic ``gram``, on their device."""

    def __init__(self, sums: Mapping[str, Tensor]):
        self.sums, self.tokens = sums, int(sums["tokens"])

    def parts(self, size: int | None = None, generator: torch.Generator | None = None) -> Iterator[Part]:
        """Yield one part, or as many as minibatches of ``size`` tokens would give, each with its part of the loss."""
        for start in range(0, self.tokens, size or self.tokens):
            count = min(size or self.tokens, self.tokens - start)
            yield count, partial(self._weigh, count / self.tokens)

    def metric(self, transform: Tensor) -> Tensor:
        """Return the Hessian (d, d) in a column of T."""
        return 2 * self.sums["gram"]

    def _weigh(self, weight: float, transform: Tensor) -> Tensor:
        return weight * squared_error(self.sums, transform)


class CosineLoss:
    """``Σ 1 − cos(M T + Z, H)`` over a stream of tokens."""

    def __init__(self, shards: StoredShards, device: torch.device, dtype: torch.dtype):
        """Take the tokens; they are computed on ``device`` in ``dtype``, and summed in float64."""
        self.shards, self.device, self.dtype = shards, device, dtype
        self.tokens = sum(shards.counts)

    def parts(self, size: int | None = None, generator: torch.Generator | None = None) -> Iterator[Part]:
        """Yield parts of about ``size`` tokens; with a generator, the shards and each one's tokens are in random order."""
        for M, Z, H in self._stream(size, generator):
            yield len(M), partial(self._sum, M, Z, H)

    def metric(self, transform: Tensor) -> Tensor:
        """Return ``Σ mᵀm/‖P‖²`` (d, d) of the predictions P: the longer one is, the less a step turns it."""
        total = torch.zeros_like(transform)
        for M, Z, _ in self._stream():
            weighted = M / _lengths(_predict(M, Z, transform))
            total += weighted.T @ weighted
        return total

    def _stream(self, size: int | None = None, generator: torch.Generator | None = None) -> Iterator[Tokens]:
        for shard in _order(len(self.shards.counts), generator).tolist():
            tokens = self.shards.read(shard)
            rows = _order(self.shards.counts[shard], generator)
            for part in rows.chunk(-(-len(rows) // (size or ROWS))):
                M, Z, H = (None if each is None else each[part].to(self.device, self.dtype) for each in tokens)
                assert M is not None
                assert H is not None
                yield M, Z, H

    @staticmethod
    def _sum(M: Tensor, Z: Tensor | None, H: Tensor, transform: Tensor) -> Tensor:
        P = _predict(M, Z, transform)
        return (1 - ((P / _lengths(P)) * (H / _lengths(H))).sum(dim=1).double()).sum()


def _predict(M: Tensor, Z: Tensor | None, transform: Tensor) -> Tensor:
    P = M @ transform.to(M.dtype)
    return P if Z is None else P + Z


def _lengths(rows: Tensor) -> Tensor:
    """Return the lengths (n, 1); unlike torch's norm, with a second derivative for a row of zeros."""
    return (rows.square().sum(dim=1, keepdim=True) + TINY).sqrt()


def _order(count: int, generator: torch.Generator | None) -> Tensor:
    return torch.arange(count) if generator is None else torch.randperm(count, generator=generator)


@dataclass(frozen=True)
class Problem:
    """The whole objective per token, as a function of a vector x (n,) float64.

    Attributes:
        loss: the sum over tokens.
        structure: the map from x to T.
        prior: P, (d, d) float64.
        ridge: α, factor of ``‖T − P‖²``.
        lasso: ρ, factor of ``‖T‖₁``; only for split entries.
    """

    loss: SquaredError | CosineLoss
    structure: Parametrisation
    prior: Tensor
    ridge: float
    lasso: float = 0.0

    def parts(
        self, size: int | None = None, generator: torch.Generator | None = None
    ) -> Iterator[tuple[float, Callable[[Tensor], Tensor]]]:
        """Yield the weight of each part of the loss, and its objective per token as a function of x.

        The weight is the part's fraction of the tokens; the whole objective is the weighted mean.
        """
        for count, loss in self.loss.parts(size, generator):
            yield count / self.loss.tokens, partial(self._part, count, loss)

    def value(self, x: Tensor) -> float:
        """Return the objective."""
        with torch.no_grad():
            return sum(weight * float(part(x)) for weight, part in self.parts())

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """Return the objective and its gradient (n,)."""
        x = x.detach().requires_grad_()
        transform = self.structure.transform(x)
        # The loss is differentiated by T in parts, and T by x once.
        leaf, value = transform.detach().requires_grad_(), 0.0
        for _, loss in self.loss.parts():
            term = loss(leaf) / self.loss.tokens
            term.backward()
            value += term.item()
        penalty = self._penalty(x, transform)
        torch.autograd.backward([transform, penalty], [leaf.grad, None])
        assert x.grad is not None
        return value + penalty.item(), x.grad

    def hessian_product(self, x: Tensor, direction: Tensor) -> Tensor:
        """Return the product (n,) of the Hessian with a direction (n,)."""
        product = torch.zeros_like(x)
        for weight, part in self.parts():
            # The Hessian is symmetric, and its product from the left is the faster one.
            product += weight * vhp(part, x, direction)[1]
        return product

    def whitened(self, transform: Tensor) -> "Problem":
        """Return the problem in coordinates in which it is about equally steep in all directions, at T (d, d)."""
        metric = self.loss.metric(transform)
        metric.diagonal().add_(2 * self.ridge)
        return replace(self, structure=self.structure.whitened(metric))

    def _part(self, count: int, loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        transform = self.structure.transform(x)
        return loss(transform) / count + self._penalty(x, transform)

    def _penalty(self, x: Tensor, transform: Tensor) -> Tensor:
        penalty = self.ridge * (transform - self.prior).square().sum()
        if isinstance(self.structure, SplitEntries):
            penalty = penalty + self.lasso * self.structure.l1_norm(x)
        return penalty / self.loss.tokens
