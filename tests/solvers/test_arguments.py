import ast
import re
from collections.abc import Callable

import pytest
import torch

from replaceme.base.errors import SolveError
from replaceme.solvers.arguments import ArgumentError, naming
from replaceme.solvers.closed_forms import closed_form, upper_cholesky
from replaceme.solvers.procrustes import orthogonal_map
from replaceme.solvers.ridge import solve_correction, solve_ridge
from tests.pipeline.closure import ROOT

ZEROS, ONES = torch.zeros(3, 3, dtype=torch.float64), torch.ones(3, 3, dtype=torch.float64)
SINGULAR: list[Callable[[], object]] = [
    lambda: solve_ridge(ONES, ONES, 0.0),
    lambda: solve_correction(ONES, ONES, torch.full((3,), 1e-20)),
    lambda: closed_form(ZEROS, ONES, 0.0, "diagonal"),
    lambda: upper_cholesky(ZEROS),
    lambda: orthogonal_map(ZEROS, ONES, 0.0),
    lambda: orthogonal_map(ONES, ONES, 0.0, ZEROS[0]),
]


def test_an_argument_has_its_own_name_until_a_caller_gives_a_parameters() -> None:
    assert str(ArgumentError("ridge", "0 is too small; raise it.")) == "ridge: 0 is too small; raise it."
    with pytest.raises(SolveError) as caught, naming(ridge="outer"), naming(ridge="refit_ridge", sums="dtype"):
        raise ArgumentError("ridge", "0 is too small; raise it.")
    assert str(caught.value) == "refit_ridge: 0 is too small; raise it."


@pytest.mark.parametrize("solve", SINGULAR)
def test_every_part_of_a_printed_sentence_is_found_in_the_code(solve: Callable[[], object]) -> None:
    with pytest.raises(SolveError) as caught, naming(ridge="refit_ridge"):
        solve()
    written = [
        node.value
        for path in (ROOT / "replaceme" / "solvers").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    key, _, sentence = str(caught.value).partition(": ")
    assert key in ("alpha", "refit_ridge", "transform")
    for part in re.split(r"[\d.]+(?:e-?\d+)?\b", sentence):
        assert any(part in text for text in written), part
