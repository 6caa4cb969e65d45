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

from replaceme.objectives import Problem
from replaceme.progress import logger, progress

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
    scale = max(value, 1e-9)
    split = problem.lasso > 0
    ticks = progress(range(max_iterations), f"solving ({solver})", "iterations")

    def tensor(numbers: np.ndarray) -> Tensor:
        x = torch.from_numpy(np.array(numbers, dtype=np.float64)).to(start.device)
        return x[: len(start)] - x[len(start) :] if split else x

    def objective(numbers: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = problem.smooth(tensor(numbers))
        if split:
            lasso = problem.lasso / problem.loss.tokens
            value, slope = value + lasso * float(numbers.sum()), torch.cat([slope + lasso, lasso - slope])
        return value / scale, slope.cpu().numpy() / scale

    def product(numbers: np.ndarray, step: np.ndarray) -> np.ndarray:
        return problem.hessian_product(tensor(numbers), tensor(step)).cpu().numpy() / scale

    def look(intermediate_result: Any) -> None:
        next(ticks, None)
        iteration = len(found.curve)
        found.see(iteration, float(intermediate_result.fun) * scale, tensor(intermediate_result.x))
        before = found.curve.get(iteration - WINDOW)
        if before is not None and before - found.curve[iteration] <= WINDOW_GAIN * abs(before):
            found.converged = True
            raise StopIteration

    first = start.cpu().numpy()
    if split:
        first = np.concatenate([first.clip(min=0), (-first).clip(min=0)])
    options = {**SCIPY[solver], "options": {**SCIPY[solver]["options"], "maxiter": max_iterations}}
    result = minimize(
        objective, first, jac=True, callback=look, **options,
        **({"hessp": product} if solver == "trust_region" else {}),
        **({"bounds": Bounds(0, np.inf)} if split else {}),
    )  # fmt: skip
    *_, before, last = [value, value, *found.curve.values()]
    stuck = not result.success and len(found.curve) <= max_iterations and before - last <= ROUNDING_GAIN * abs(before)
    found.converged = found.converged or bool(result.success) or stuck
    return found
