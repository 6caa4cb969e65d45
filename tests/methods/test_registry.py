"""The registry of the methods: the parameters of all of them together."""

from collections import Counter

from replaceme.base.parameters import Params
from replaceme.methods.registry import FIELDS, METHODS


def test_no_two_methods_have_a_parameter_of_the_same_name() -> None:
    own = Counter(name for method in METHODS.values() for name in method.settings.model_fields)
    assert [name for name, count in own.items() if count > 1 or name in Params.model_fields] == []
    assert len(FIELDS) == len(Params.model_fields) + len(own)


def test_every_own_parameter_is_read_by_a_stage() -> None:
    for method in METHODS.values():
        assert all(name in method.uses and method.uses[name].stages for name in method.settings.model_fields)
