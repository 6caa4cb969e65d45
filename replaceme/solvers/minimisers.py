"""Iterative solvers by name: each minimises a ``Problem`` from a start until it converges, and records the objective.

``adam`` takes one step per minibatch (ReplaceMe's own solver: learning rate 1e-4, 1024 tokens, 10 epochs) and evaluates the
whole objective after each epoch. ``lbfgs``, ``cg`` (nonlinear conjugate gradients) and ``trust_region`` (trust-ncg) are
scipy's, with the objective and its derivatives over all tokens. Each is deterministic, returns the best x seen, and stops when
the objective no longer falls.

``ρ‖T‖₁`` has a kink at 0. Adam handles it by a proximal step in its own metric, L-BFGS by ``T = T⁺ − T⁻`` with bounds at 0,
where the sum is smooth; both find exact zeros. ``cg`` and ``trust_region`` do not support it.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, minimize
from torch import Tensor

from replaceme.base.errors import SolveError
from replaceme.base.progress import logger, progress
from replaceme.solvers.objectives import Problem
from replaceme.solvers.whitening import Whitening

# Convergence: largest relative gain over a number of epochs of Adam, and over a number of iterations of the others.
EPOCHS, EPOCHS_GAIN = 3, 1e-5
# Adam has not converged while it is further above its best objective than this, relative to it: it oscillates or diverges.
SETTLED = 1e-2
WINDOW, WINDOW_GAIN = 10, 1e-7
# A failed line search counts as convergence to rounding if the iteration before gained no more than this, relative.
ROUNDING_GAIN = 1e-6
# Seed of the order of the tokens.
SEED = 0
# Adam (Kingma and Ba 2015): decay of the first and second moments, and the ε of the division.
DECAY, SQUARE_DECAY, EPSILON = 0.9, 0.999, 1e-8
SCIPY: dict[str, dict[str, Any]] = {
    "lbfgs": {"method": "L-BFGS-B", "options": {"ftol": 1e-11, "gtol": 1e-7, "maxfun": 10**6}},
    "cg": {"method": "CG", "options": {"gtol": 1e-7}},
    "trust_region": {"method": "trust-ncg", "options": {"gtol": 1e-7}},
}


@dataclass(frozen=True)
class Budget:
    """Limits of the iterative solvers, and Adam's step size.

    Attributes:
        learning_rate: of Adam.
        epochs: Adam's passes over the tokens, at most.
        tokens_per_step: tokens in a minibatch of Adam.
        max_iterations: iterations of the other solvers, at most.
    """

    learning_rate: float = 1e-4
    epochs: int = 10
    tokens_per_step: int = 1024
    max_iterations: int = 500


@dataclass
class Minimum:
    """A solver's result.

    Attributes:
        x: (n,) float64, the best x seen.
        curve: iteration → objective, over all tokens, with the start at 0; Adam's iterations are its steps.
        converged: whether the solver stopped because the objective no longer fell.
    """

    x: Tensor
    curve: dict[int, float] = field(default_factory=dict)
    converged: bool = False

    @property
    def lowest(self) -> float:
        """The objective at x."""
        return min(self.curve.values())

    def record(self, iteration: int, value: float, x: Tensor) -> None:
        """Record an iterate's objective, and keep its x if it is the lowest so far."""
        if not self.curve or value < self.lowest:
            self.x = x.clone()
        self.curve[iteration] = value


def minimise(problem: Problem, start: Tensor, solver: str, budget: Budget) -> Minimum:
    """Minimise the problem from ``start`` (n,) with a solver, by name.

    Raises:
        SolveError: the loss overflows in Adam's first epoch.
        ArgumentError: the metric is singular to float64.
    """
    if solver == "adam":
        return _adam(problem, start, budget)
    return _scipy(problem, start, solver, budget.max_iterations)


def _adam(problem: Problem, start: Tensor, budget: Budget) -> Minimum:
    found = Minimum(start)
    found.record(0, problem.value(start), start)
    generator = torch.Generator().manual_seed(SEED)
    x, step = start.clone(), 0
    best: list[float] = []
    mean, square = torch.zeros_like(x), torch.zeros_like(x)
    for _ in progress(range(budget.epochs), "solving (adam)", "epochs"):
        for gradient_at in problem.steps(budget.tokens_per_step, generator):
            step += 1
            gradient = gradient_at(x)
            mean.lerp_(gradient, 1 - DECAY)
            square.lerp_(gradient.square(), 1 - SQUARE_DECAY)
            pace = budget.learning_rate / ((square / (1 - SQUARE_DECAY**step)).sqrt() + EPSILON)
            x -= pace * mean / (1 - DECAY**step)
            if problem.lasso:
                x = x.sign() * (x.abs() - pace * problem.lasso / problem.loss.tokens).clamp_min(0)
        value = problem.value(x)
        if not math.isfinite(value):
            if not best:
                raise SolveError(f"learning_rate: {budget.learning_rate:g} makes the loss overflow; lower it.")
            logger.warning("learning_rate: %g makes the loss overflow; lower it", budget.learning_rate)
            break
        best.append(found.lowest)
        found.record(step, value, x)
        before, now = best[-EPOCHS:][0], found.lowest
        found.converged = (
            len(best) >= EPOCHS and before - now <= EPOCHS_GAIN * abs(before) and value - now <= SETTLED * abs(now)
        )
        if found.converged:
            break
    return found


def _scipy(problem: Problem, start: Tensor, solver: str, max_iterations: int) -> Minimum:
    found = Minimum(start)
    value = problem.value(start)
    found.record(0, value, start)
    # scipy's tolerances are absolute: the objective is scaled to 1 at the start, or to less if the start fits perfectly.
    space = (SplitProblem if problem.lasso else WhitenedProblem)(problem, start, max(value, 1e-9))
    ticks = progress(range(max_iterations), f"solving ({solver})", "iterations")

    def callback(intermediate_result: Any) -> None:
        next(ticks, None)
        iteration = len(found.curve)
        found.record(iteration, float(intermediate_result.fun) * space.scale, space.leave(intermediate_result.x))
        before = found.curve.get(iteration - WINDOW)
        if before is not None and before - found.curve[iteration] <= WINDOW_GAIN * abs(before):
            found.converged = True
            raise StopIteration

    options = {**SCIPY[solver], "options": {**SCIPY[solver]["options"], "maxiter": max_iterations}}
    if solver == "trust_region":
        options["hessp"] = space.hessian_product
    result = minimize(space.objective, space.enter(start), jac=True, bounds=space.bounds, callback=callback, **options)
    *_, before, last = [value, value, *found.curve.values()]
    stuck = not result.success and len(found.curve) <= max_iterations and before - last <= ROUNDING_GAIN * abs(before)
    found.converged = found.converged or bool(result.success) or stuck
    return found


class WhitenedProblem:
    """A smooth problem for scipy: numpy vectors in coordinates whitened at the start."""

    bounds: Bounds | None = None

    def __init__(self, problem: Problem, start: Tensor, scale: float):
        self.problem, self.device, self.scale = problem, start.device, scale
        self.whitening = Whitening(problem.structure, problem.metric(start))

    def enter(self, x: Tensor) -> np.ndarray:
        """Return scipy's vector from x."""
        return _numbers(self.whitening.enter(x))

    def leave(self, numbers: np.ndarray) -> Tensor:
        """Return x from scipy's vector."""
        return self.whitening.leave(self._tensor(numbers))

    def objective(self, numbers: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the scaled objective and its gradient."""
        value, gradient = self.problem.smooth(self.leave(numbers))
        return value / self.scale, _numbers(self.whitening.pull_back(gradient)) / self.scale

    def hessian_product(self, numbers: np.ndarray, step: np.ndarray) -> np.ndarray:
        """Return the scaled Hessian's product with a step."""
        product = self.problem.hessian_product(self.leave(numbers), self.leave(step))
        return _numbers(self.whitening.pull_back(product)) / self.scale

    def _tensor(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(numbers, dtype=np.float64)).to(self.device)


class SplitProblem(WhitenedProblem):
    """A problem with ``ρ‖T‖₁`` for scipy: (y⁺, y⁻), both at least 0, with y = y⁺ − y⁻ a rescaled x.

    The penalty is linear in them. Each row of T is rescaled by itself: mixing rows would lose exact zeros.
    """

    def __init__(self, problem: Problem, start: Tensor, scale: float):
        self.problem, self.device, self.scale = problem, start.device, scale
        self.bounds = Bounds(0, np.inf)
        roots = problem.metric(start).diagonal().sqrt()[:, None]
        # A dimension that is always 0 is not rescaled.
        roots = torch.where(roots > 0, roots / roots.max(), 1.0)
        self.units = problem.structure.rows(torch.ones_like(start), lambda part: roots * part)
        self.lasso = problem.lasso / problem.loss.tokens / self.units

    def enter(self, x: Tensor) -> np.ndarray:
        y = x * self.units
        return _numbers(torch.cat([y.clamp_min(0), (-y).clamp_min(0)]))

    def leave(self, numbers: np.ndarray) -> Tensor:
        plus, minus = self._tensor(numbers).chunk(2)
        return (plus - minus) / self.units

    def objective(self, numbers: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = self.problem.smooth(self.leave(numbers))
        slope = gradient / self.units
        penalty = float((self._tensor(numbers) * self.lasso.repeat(2)).sum())
        return (value + penalty) / self.scale, _numbers(torch.cat([slope + self.lasso, self.lasso - slope])) / self.scale


def _numbers(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
