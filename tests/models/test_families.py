"""docs/families.md names the families that the descriptions allow."""

import re

import pytest

from tests.conftest import DESCRIBED, FAMILY_CONFIGS
from tests.pipeline.closure import ROOT

PAGE = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
FAMILIES = {kind: DESCRIBED[kind] for kind in FAMILY_CONFIGS}
SAID = {
    r"\| nothing \(.*\| (.*) \|": [kind for kind, each in FAMILIES.items() if each.obstacle is None and each.multiplier == 1],
    r"\| a factor ρ .*\| (.*) \|": [kind for kind, each in FAMILIES.items() if each.multiplier != 1],
    r"\| experts, .*\| (.*) \|": [kind for kind, each in FAMILIES.items() if each.experts],
    r"\| a norm with .*\| (.*) \|": [kind for kind, each in FAMILIES.items() if each.norm_after_mlp],
    r"with a parallel MLP ([^|]*) \|": [kind for kind, each in FAMILIES.items() if each.parallel],
    r"spans several heads: ([^.]*)\.": [kind for kind, each in FAMILIES.items() if not each.head_pruning_obstacle],
    r"is an RMS norm: ([^.]*)\.": [kind for kind, each in FAMILIES.items() if not each.slicing_obstacle],
}


def letters(name: str) -> str:
    return re.sub(r"\W|_", "", name).lower()


@pytest.mark.parametrize("pattern", SAID)
def test_the_page_lists_the_families_of_each_kind(pattern: str) -> None:
    (listed,) = re.findall(pattern, PAGE)
    names = [letters(name) for name in re.split(r",(?: and with a parallel MLP)?\s", listed)]
    assert sorted(names) == sorted(map(letters, SAID[pattern]))
