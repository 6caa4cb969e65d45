"""Iterative solvers: each minimises a ``Problem`` from a start until the objective no longer falls, and records it.

Adam takes one step per minibatch (ReplaceMe's own solver: learning rate 1e-4, 1024 tokens, 10 epochs) and evaluates the whole
objective after each epoch. L-BFGS, nonlinear conjugate gradients and trust-ncg are scipy's, on all tokens, in whitened
coordinates: on the demo, 3 iterations reach what 500 don't in T's own. All give the same result twice, and the best iterate.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, minimize
from torch import Tensor

from replaceme.base.errors import SolveError
from replaceme.base.progress import progress
from replaceme.solvers.objectives import Problem
from replaceme.solvers.structures import SplitEntries

# Convergence: largest relative gain over a number of epochs of Adam, and over a number of iterations of the others.
EPOCHS, EPOCHS_GAIN = 3, 1e-5
WINDOW, WINDOW_GAIN = 10, 1e-7
# Adam has not converged while it is further above its best objective than this, relative to it: it oscillates or diverges.
SETTLED = 1e-2
# A failed line search counts as convergence to rounding if the iteration before gained no more than this, relative.
ROUNDING_GAIN = 1e-6
# Seed of the order of the tokens.
SEED = 0
SCIPY: dict[str, dict[str, Any]] = {
    "lbfgs": {"method": "L-BFGS-B", "options": {"ftol": 1e-11, "gtol": 1e-7, "maxfun": 10**6}},
    "cg": {"method": "CG", "options": {"gtol": 1e-7}},
    "trust_region": {"method": "trust-ncg", "options": {"gtol": 1e-7}},
}


@dataclass
class Minimum:
    """A solver's result.

    Attributes:
        transform: (d, d) float64, the best T so far.
        curve: iteration → objective, over all tokens, with the start at 0; Adam's iterations are its steps.
        converged: whether the solver stopped because the objective no longer fell.
    """

    transform: Tensor
    curve: dict[int, float] = field(default_factory=dict)
    converged: bool = False

    @property
    def lowest(self) -> float:
        """The objective of the best T."""
        return min(self.curve.values())

    def record(self, iteration: int, value: float, transform: Tensor) -> None:
        """Record an iterate's objective, and keep its T if it is the lowest so far."""
        if not self.curve or value < self.lowest:
            self.transform = transform.detach()
        self.curve[iteration] = value

    def has_stalled(self, window: int, gain: float) -> bool:
        """Return whether the lowest objective fell by no more than ``gain``, relative, in the last ``window`` records."""
        before = list(self.curve.values())[:-window]
        return bool(before) and min(before) - self.lowest <= gain * abs(min(before))


def minimise_by_adam(problem: Problem, start: Tensor, learning_rate: float, epochs: int, tokens_per_step: int) -> Minimum:
    """Minimise the problem from a transform (d, d) float64, in so many passes over the tokens at most.

    Raises:
        SolveError: the loss overflows.
    """
    structure = problem.structure
    x = structure.vector(start).requires_grad_()
    minimum, step = Minimum(start), 0
    minimum.record(step, problem.value(x), start)
    optimizer, generator = torch.optim.Adam([x], lr=learning_rate), torch.Generator().manual_seed(SEED)
    for _ in progress(range(epochs), "solving (adam)", "epochs"):
        for _, part in problem.parts(tokens_per_step, generator):
            step += 1
            optimizer.zero_grad()
            part(x).backward()
            optimizer.step()
            if isinstance(structure, SplitEntries):
                x.data.clamp_min_(0)
        value = problem.value(x)
        if not math.isfinite(value):
            raise SolveError(f"learning_rate: {learning_rate:g} makes the loss overflow; lower it.")
        minimum.record(step, value, structure.transform(x))
        minimum.converged = minimum.has_stalled(EPOCHS, EPOCHS_GAIN) and value - minimum.lowest <= SETTLED * abs(minimum.lowest)
        if minimum.converged:
            break
    return minimum


def minimise_by_scipy(problem: Problem, start: Tensor, solver: str, max_iterations: int) -> Minimum:
    """Minimise the problem from a transform (d, d) float64 by ``lbfgs``, ``cg`` or ``trust_region``, on all tokens.

    Raises:
        SolveError: the metric is singular to float64.
    """
    problem = problem.whitened(start)
    structure, x = problem.structure, problem.structure.vector(start)
    minimum = Minimum(start)
    minimum.record(0, problem.value(x), start)
    # scipy's tolerances are absolute: the objective is scaled to 1 at the start, or to less if the start fits perfectly.
    scale = max(minimum.lowest, 1e-9)
    ticks = progress(range(max_iterations), f"solving ({solver})", "iterations")

    def tensor(numbers: np.ndarray) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=x.device)

    def objective(numbers: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = problem.value_and_gradient(tensor(numbers))
        return value / scale, gradient.cpu().numpy() / scale

    def hessian_product(numbers: np.ndarray, direction: np.ndarray) -> np.ndarray:
        return problem.hessian_product(tensor(numbers), tensor(direction)).cpu().numpy() / scale

    def callback(intermediate_result: Any) -> None:
        next(ticks, None)
        value, iterate = float(intermediate_result.fun) * scale, tensor(intermediate_result.x)
        minimum.record(len(minimum.curve), value, structure.transform(iterate))
        if minimum.has_stalled(WINDOW, WINDOW_GAIN):
            raise StopIteration

    result = minimize(
        objective, x.cpu().numpy(), jac=True, method=SCIPY[solver]["method"], callback=callback,
        hessp=hessian_product if solver == "trust_region" else None,
        bounds=Bounds(0, np.inf) if isinstance(structure, SplitEntries) else None,
        options={**SCIPY[solver]["options"], "maxiter": max_iterations},
    )  # fmt: skip
    iterations = len(minimum.curve) - 1
    stuck = iterations < max_iterations and (not iterations or minimum.has_stalled(1, ROUNDING_GAIN))
    minimum.converged = bool(result.success) or stuck
    return minimum
