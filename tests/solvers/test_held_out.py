"""The shrinkage of a correction, against plain least squares on tokens of the other folds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replaceme.solvers.held_out import MULTIPLES, Shrinkage, choose_shrinkage
from tests.helpers import ridge

Fold = tuple[np.ndarray, np.ndarray]


def folds(seed: int, noise: float, count: int = 3, tokens: int = 30, width: int = 5) -> list[Fold]:
    """Return features and errors of some folds: of one linear map, and as much noise."""
    chance = np.random.default_rng(seed)
    weight = chance.normal(size=(width, 4))
    made = []
    for _ in range(count):
        g = chance.normal(size=(tokens, width)) * chance.uniform(0.1, 3, size=width)
        made.append((g, g @ weight + noise * chance.normal(size=(tokens, 4))))
    return made


def sums(parts: list[Fold]) -> list[dict[str, torch.Tensor]]:
    return [{"gram": torch.from_numpy(g.T @ g), "cross": torch.from_numpy(g.T @ e)} for g, e in parts]


def held_out_error(parts: list[Fold], size: np.ndarray, scale: float) -> float:
    """Return the squared error over all folds, each with the correction that was solved from the others."""
    error = 0.0
    for number, (g, e) in enumerate(parts):
        rest = [part for place, part in enumerate(parts) if place != number]
        g_rest, e_rest = (np.vstack(each) for each in zip(*rest, strict=True))
        change = ridge(g_rest, e_rest, np.ones(len(g_rest)), np.zeros((g.shape[1], e.shape[1])), size, False)
        error += np.square(e - scale * (g @ change)).sum()
    return float(error)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 1.0, 10.0, 100.0]), st.sampled_from([1e-6, 0.3]))
def test_the_held_out_error_is_least_and_never_rises(seed: int, noise: float, size: float) -> None:
    parts, sizes = folds(seed, noise), np.full(5, size)
    chosen = choose_shrinkage(sums(parts), torch.from_numpy(sizes))
    least = held_out_error(parts, chosen.ridge_multiple * sizes, chosen.scale)
    place = MULTIPLES.index(chosen.ridge_multiple)
    # Scale 0 is among them: no correction at all.
    others = [
        held_out_error(parts, multiple * sizes, scale) for multiple in MULTIPLES[: place + 2] for scale in np.linspace(0, 1, 11)
    ]
    assert least <= min(others) * (1 + 1e-5)


def test_a_correction_that_only_fits_noise_is_left_out() -> None:
    chance = np.random.default_rng(0)
    # What one fold teaches is wrong in the other.
    g = chance.normal(size=(20, 5))
    error = chance.normal(size=(20, 4))
    assert choose_shrinkage(sums([(g, error), (g, -error)]), torch.full((5,), 0.3, dtype=torch.float64)).scale == 0


def test_a_map_that_all_folds_share_is_kept_whole() -> None:
    assert choose_shrinkage(sums(folds(1, 0.0)), torch.full((5,), 0.3, dtype=torch.float64)) == Shrinkage(1.0, 1.0)


def test_a_feature_that_is_always_zero_changes_nothing() -> None:
    parts = folds(2, 1.0)
    padded = [(np.hstack([g, np.zeros((len(g), 1))]), e) for g, e in parts]
    plain, wider = (choose_shrinkage(sums(each), torch.full((width,), 0.3)) for each, width in ((parts, 5), (padded, 6)))
    assert (plain.ridge_multiple, plain.scale) == (wider.ridge_multiple, pytest.approx(wider.scale, rel=1e-5))
