"""The objective of the iterative solvers, with its derivatives (ReplaceMe, arXiv 2505.02819, section 3):

    (Σ_tokens loss + α‖T − P‖²_F + ρ‖T‖₁) / number of tokens

A loss is a sum over tokens, as a function of T (d, d), with its gradient and Hessian products in closed form:

- ``SquaredError``: ``‖Y − M T‖²``, from the sums ``MᵀM``, ``MᵀY`` and ``ΣY²``; it reads no tokens.
- ``CosineLoss``: ``1 − cos(M T + Z, H)``, or ``1 − cos(M T, Y)`` in the fast form; it streams the tokens.

A minibatch's gradient includes its share of the penalties, so all minibatches add up to the whole gradient.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from replaceme.observers.shards import Shards, Tokens
from replaceme.observers.sums import squares
from replaceme.solvers.closed_forms import squared_error
from replaceme.solvers.structures import Parametrisation

# Number of tokens, and the gradient of their loss as a function of T.
Minibatch = tuple[int, Callable[[Tensor], Tensor]]
# Tokens of a shard computed at once.
ROWS = 4096
# Norms are raised to this before a division.
SHORTEST = 1e-12


class Loss(Protocol):
    """A sum over tokens; T, gradients and directions are (d, d) float64."""

    tokens: int

    def value_and_gradient(self, transform: Tensor) -> tuple[float, Tensor]:
        """Return the loss of all tokens, and its gradient."""
        ...

    def curvature(self, transform: Tensor, direction: Tensor) -> Tensor:
        """Return the Hessian's product with a direction."""
        ...

    def metric(self, transform: Tensor) -> Tensor:
        """Return (d, d) ``Σ mᵀm`` over M's rows, weighted as in the loss's Hessian at this T."""
        ...

    def minibatches(self, size: int, generator: torch.Generator) -> Iterator[Minibatch]:
        """Yield all tokens once, in random order, in minibatches of about ``size`` tokens."""
        ...


class SquaredError:
    """``‖Y − M T‖²`` from the sums of the statistic ``gram``."""

    def __init__(self, sums: Mapping[str, Tensor], device: str = "cpu"):
        self.sums = {name: total.to(device) for name, total in sums.items()}
        self.tokens = int(sums["tokens"])

    def value_and_gradient(self, transform: Tensor) -> tuple[float, Tensor]:
        return squared_error(self.sums, transform), self._gradient(transform)

    def curvature(self, transform: Tensor, direction: Tensor) -> Tensor:
        return 2 * self.sums["gram"] @ direction

    def metric(self, transform: Tensor) -> Tensor:
        return 2 * self.sums["gram"]

    def minibatches(self, size: int, generator: torch.Generator) -> Iterator[Minibatch]:
        """Yield as many minibatches as tokens would give, each with its share of the gradient of all tokens."""
        for start in range(0, self.tokens, size):
            count = min(size, self.tokens - start)
            yield count, partial(self._gradient, share=count / self.tokens)

    def _gradient(self, transform: Tensor, share: float = 1.0) -> Tensor:
        return 2 * share * (self.sums["gram"] @ transform - self.sums["cross"])


class CosineLoss:
    """``Σ 1 − cos(M T + Z, H)`` over a stream of tokens."""

    def __init__(self, shards: Shards, device: str = "cpu", dtype: torch.dtype = torch.float64):
        """Take the tokens; they are computed in ``dtype`` and summed in float64."""
        self.shards, self.device, self.dtype = shards, device, dtype
        self.tokens = sum(shards.counts)

    def value_and_gradient(self, transform: Tensor) -> tuple[float, Tensor]:
        value, gradient = 0.0, torch.zeros_like(transform)
        for tokens in self._stream():
            loss, part = self._of(tokens, transform)
            value, gradient = value + loss, gradient.add_(part)
        return value, gradient

    def curvature(self, transform: Tensor, direction: Tensor) -> Tensor:
        product = torch.zeros_like(transform)
        for M, Z, H in self._stream():
            size, p, h, cosine = _directions(M, Z, H, transform.to(self.dtype))
            step = M @ direction.to(self.dtype)
            along = _dot(p, step)
            turn = (step - along * p) / size
            change = _dot(turn, h)
            # Derivative along the step of the gradient in P, −(h − cos p)/‖P‖.
            bent = (change * p + cosine * turn) / size + (h - cosine * p) * along / size.square()
            product += (M.T @ bent).double()
        return product

    def metric(self, transform: Tensor) -> Tensor:
        """Return ``Σ mᵀm/‖P‖²`` (d, d): the longer a prediction P, the less a step turns it."""
        total = torch.zeros_like(transform)
        for M, Z, H in self._stream():
            size, *_ = _directions(M, Z, H, transform.to(self.dtype))
            weighted = torch.where(size > SHORTEST, M / size, 0)
            total += squares(weighted).double()
        return total

    def minibatches(self, size: int, generator: torch.Generator) -> Iterator[Minibatch]:
        """Yield the shards in random order, and the tokens of each in random order: one shard is in memory at a time."""
        for shard in torch.randperm(len(self.shards.counts), generator=generator).tolist():
            order = torch.randperm(self.shards.counts[shard], generator=generator)
            tokens = self.shards.read(shard)
            for rows in order.chunk(-(-len(order) // size)):
                yield len(rows), partial(self._gradient, tokens, rows)

    def _gradient(self, tokens: Tokens, rows: Tensor, transform: Tensor) -> Tensor:
        return self._of(self._take(tokens, rows), transform)[1]

    def _stream(self) -> Iterator[Tokens]:
        for shard, count in enumerate(self.shards.counts):
            tokens = self.shards.read(shard)
            for start in range(0, count, ROWS):
                yield self._take(tokens, slice(start, start + ROWS))

    def _take(self, tokens: Tokens, rows: Tensor | slice) -> Tokens:
        M, Z, H = (part if part is None else part[rows].to(self.device, self.dtype) for part in tokens)
        assert M is not None
        assert H is not None
        return M, Z, H

    def _of(self, tokens: Tokens, transform: Tensor) -> tuple[float, Tensor]:
        """Return the loss of some tokens, and its gradient (d, d) float64."""
        M, Z, H = tokens
        size, p, h, cosine = _directions(M, Z, H, transform.to(self.dtype))
        return float((1 - cosine.double()).sum()), -(M.T @ ((h - cosine * p) / size)).double()


def _directions(M: Tensor, Z: Tensor | None, H: Tensor, transform: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ‖P‖ (n, 1), P and H of length 1 (n, d), and their cosines (n, 1), with ``P = M T + Z``; zeros stay zeros."""
    P = M @ transform if Z is None else torch.addmm(Z, M, transform)
    size = P.norm(dim=1, keepdim=True).clamp_min(SHORTEST)
    p, h = P / size, H / H.norm(dim=1, keepdim=True).clamp_min(SHORTEST)
    return size, p, h, _dot(p, h)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=1, keepdim=True)


@dataclass
class Problem:
    """The whole objective per token, as a function of a vector x.

    Attributes:
        loss: the sum over tokens.
        structure: the map from x to T.
        prior: P, (d, d) float64.
        ridge: α, factor of ``‖T − P‖²``.
        lasso: ρ, factor of ``‖T‖₁``; only for structures whose x are entries of T.
    """

    loss: Loss
    structure: Parametrisation
    prior: Tensor
    ridge: float
    lasso: float = 0.0

    def value(self, x: Tensor) -> float:
        """Return the objective, with all penalties."""
        return self.smooth(x)[0] + self.lasso / self.loss.tokens * float(x.abs().sum())

    def smooth(self, x: Tensor) -> tuple[float, Tensor]:
        """Return value and gradient (n,) of the smooth part: everything but ``ρ‖T‖₁``."""
        value, gradient = self._in_transform(self.structure.build(x))
        return value / self.loss.tokens, self.structure.pull_back(x, gradient) / self.loss.tokens

    def hessian_product(self, x: Tensor, step: Tensor) -> Tensor:
        """Return the product (n,) of the Hessian of ``smooth`` with a step (n,)."""
        transform, push = self.structure.build(x), self.structure.push(x, step)
        product = self.structure.pull_back(x, self.loss.curvature(transform, push) + 2 * self.ridge * push)
        if self.structure.bends:
            product = product + self.structure.bend(step, self._in_transform(transform)[1])
        return product / self.loss.tokens

    def metric(self, x: Tensor) -> Tensor:
        """Return the loss's metric (d, d), with the ridge added to its diagonal."""
        metric = self.loss.metric(self.structure.build(x))
        return metric + 2 * self.ridge * torch.eye(len(metric), dtype=metric.dtype, device=metric.device)

    def steps(self, size: int, generator: torch.Generator) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield, for each minibatch, the gradient (n,) of its share of ``smooth`` per token, as a function of x."""
        for count, loss in self.loss.minibatches(size, generator):
            yield partial(self._step, count, loss)

    def _step(self, count: int, loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        transform = self.structure.build(x)
        penalty = 2 * self.ridge * (transform - self.prior) * (count / self.loss.tokens)
        return self.structure.pull_back(x, loss(transform) + penalty) / count

    def _in_transform(self, transform: Tensor) -> tuple[float, Tensor]:
        value, gradient = self.loss.value_and_gradient(transform)
        apart = transform - self.prior
        return value + self.ridge * float(apart.square().sum()), gradient + 2 * self.ridge * apart
