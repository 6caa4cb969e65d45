"""Iterative solvers by name: from a start they lower a ``Problem`` until it stands still, and remember how.

``adam`` takes a step for each minibatch (ReplaceMe's own solver: learning rate 1e-4, 1024 tokens, 10 epochs) and looks at
the whole objective after each epoch; ``lbfgs``, ``cg`` (nonlinear conjugate gradients) and ``trust_region`` (trust-ncg) are
scipy's, with the objective and its derivatives of all tokens. Each returns the best x that it has seen, gives the same
result twice, and stops where the objective stands still.

``ρ‖T‖₁`` has a kink at 0. Adam meets it with a proximal step in its own metric, L-BFGS with ``T = T⁺ − T⁻`` and bounds at 0,
where the sum is smooth: both find exact zeros. The other two have no such form.
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

# Standstill: the relative gain over so many of Adam's epochs, and over so many iterations of the others.
EPOCHS, EPOCHS_GAIN = 3, 1e-5
# Adam that is this far above its best is no standstill: it swings, or goes up.
SETTLED = 1e-2
WINDOW, WINDOW_GAIN = 10, 1e-7
# A line search that finds no lower point is at the limit of rounding, if the iteration before gained no more than this.
ROUNDING_GAIN = 1e-6
# Of the shuffle of the tokens.
SEED = 0
# Adam (Kingma and Ba 2015): decay of the gradient's mean and of its square's, and what keeps the division sane.
DECAY, SQUARE_DECAY, EPSILON = 0.9, 0.999, 1e-8
SCIPY: dict[str, dict[str, Any]] = {
    "lbfgs": {"method": "L-BFGS-B", "options": {"ftol": 1e-11, "gtol": 1e-7, "maxfun": 10**6}},
    "cg": {"method": "CG", "options": {"gtol": 1e-7}},
    "trust_region": {"method": "trust-ncg", "options": {"gtol": 1e-7}},
}


@dataclass(frozen=True)
class Budget:
    """How far an iterative solver may go, and Adam's pace.

    Attributes:
        learning_rate: Adam's step.
        epochs: Adam's passes over the tokens at most.
        tokens_per_step: tokens of Adam's minibatch.
        max_iterations: of the other solvers.
    """

    learning_rate: float = 1e-4
    epochs: int = 10
    tokens_per_step: int = 1024
    max_iterations: int = 500


@dataclass
class Minimum:
    """What a solver found.

    Attributes:
        x: (n,) float64, the best that was seen.
        curve: iteration → objective of all tokens, the start at 0; Adam's iterations are its steps.
        converged: whether it stopped because the objective stood still.
    """

    x: Tensor
    curve: dict[int, float] = field(default_factory=dict)
    converged: bool = False

    @property
    def lowest(self) -> float:
        """The objective at x."""
        return min(self.curve.values())

    def see(self, iteration: int, value: float, x: Tensor) -> None:
        """Remember an iterate, and keep it if there was none better."""
        if not self.curve or value < self.lowest:
            self.x = x.clone()
        self.curve[iteration] = value


def minimise(problem: Problem, start: Tensor, solver: str, budget: Budget) -> Minimum:
    """Lower the problem from ``start`` (n,), with a solver by its name."""
    if solver == "adam":
        return _adam(problem, start, budget)
    return _scipy(problem, start, solver, budget.max_iterations)


def _adam(problem: Problem, start: Tensor, budget: Budget) -> Minimum:
    found = Minimum(start)
    found.see(0, problem.value(start), start)
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
        found.see(step, value, x)
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
    found.see(0, value, start)
    # scipy's tolerances are absolute: they hold for an objective of about 1. A perfect fit stays small.
    space = (Split if problem.lasso else White)(problem, start, max(value, 1e-9))
    ticks = progress(range(max_iterations), f"solving ({solver})", "iterations")

    def look(intermediate_result: Any) -> None:
        next(ticks, None)
        iteration = len(found.curve)
        found.see(iteration, float(intermediate_result.fun) * space.scale, space.leave(intermediate_result.x))
        before = found.curve.get(iteration - WINDOW)
        if before is not None and before - found.curve[iteration] <= WINDOW_GAIN * abs(before):
            found.converged = True
            raise StopIteration

    options = {**SCIPY[solver], "options": {**SCIPY[solver]["options"], "maxiter": max_iterations}}
    if solver == "trust_region":
        options["hessp"] = space.hessian_product
    result = minimize(space.objective, space.enter(start), jac=True, bounds=space.bounds, callback=look, **options)
    *_, before, last = [value, value, *found.curve.values()]
    stuck = not result.success and len(found.curve) <= max_iterations and before - last <= ROUNDING_GAIN * abs(before)
    found.converged = found.converged or bool(result.success) or stuck
    return found


class White:
    """A smooth problem as scipy sees it: numpy vectors in the whitened coordinates of the start."""

    bounds: Bounds | None = None

    def __init__(self, problem: Problem, start: Tensor, scale: float):
        self.problem, self.device, self.scale = problem, start.device, scale
        self.whitening = Whitening(problem.structure, problem.metric(start))

    def enter(self, x: Tensor) -> np.ndarray:
        """Return scipy's vector of x."""
        return _numbers(self.whitening.enter(x))

    def leave(self, numbers: np.ndarray) -> Tensor:
        """Return x of scipy's vector."""
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


class Split(White):
    """A problem with ``ρ‖T‖₁`` as scipy sees it: (y⁺, y⁻), both at least 0, of y = y⁺ − y⁻, which is x in units of its own.

    The penalty of these two is linear. Rows of T must not be mixed, or their zeros were lost, so that each has a unit alone.
    """

    def __init__(self, problem: Problem, start: Tensor, scale: float):
        self.problem, self.device, self.scale = problem, start.device, scale
        self.bounds = Bounds(0, np.inf)
        roots = problem.metric(start).diagonal().sqrt()[:, None]
        # A dimension that is always 0 has no unit.
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
