import pytest

from replaceme.base.errors import SolveError
from replaceme.solvers.arguments import ArgumentError, naming


def test_an_argument_has_its_own_name_until_a_caller_gives_a_parameters() -> None:
    sentence = "{ridge}: 0 is too small; raise {ridge} or {tokens}."
    assert str(ArgumentError(sentence)) == "ridge: 0 is too small; raise ridge or tokens."
    with pytest.raises(SolveError) as caught, naming(ridge="outer", tokens="dataset_size"), naming(ridge="alpha", sums="dtype"):
        raise ArgumentError(sentence)
    assert str(caught.value) == "alpha: 0 is too small; raise alpha or dataset_size."
