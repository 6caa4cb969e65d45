from collections.abc import Callable

import pytest
import torch

from replaceme.base.errors import SolveError, renaming
from replaceme.solvers.closed_forms import solve_closed_form, upper_cholesky
from replaceme.solvers.procrustes import fit_orthogonal_map
from replaceme.solvers.ridge import solve_correction, solve_ridge

ZEROS, ONES = torch.zeros(3, 3, dtype=torch.float64), torch.ones(3, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("key", "solve"),
    [
        ("alpha", lambda: solve_ridge(ONES, ONES, 0.0)),
        ("refit_ridge", lambda: solve_correction(ONES, ONES, torch.full((3,), 1e-20))),
        ("alpha", lambda: solve_closed_form(ZEROS, ONES, 0.0, "diagonal")),
        ("alpha", lambda: upper_cholesky(ZEROS)),
        ("alpha", lambda: fit_orthogonal_map(ZEROS, ONES, 0.0)),
        ("transform", lambda: fit_orthogonal_map(ONES, ONES, 0.0, ZEROS[0])),
    ],
)
def test_a_problem_without_a_solution_names_the_parameter_to_change(key: str, solve: Callable[[], object]) -> None:
    with pytest.raises(SolveError, match=f"^{key}: "), renaming({"ridge": "refit_ridge"}):
        solve()
