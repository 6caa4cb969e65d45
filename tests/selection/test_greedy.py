"""ShortGPT and SLEB: the removed layers, against plain computations."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from replaceme.base.documents import Documents, excerpts_of
from replaceme.base.files import read_json, write_json
from replaceme.base.parameters import read_params
from replaceme.base.plan import Block, load_blocks
from replaceme.methods.registry import METHODS, criterion_of
from replaceme.pipeline.select import select
from replaceme.running.workspace import Workspace
from replaceme.selection.greedy import greedy_layers
from replaceme.statistics.profile import profile_model
from tests.conftest import LAYERS, made_model
from tests.helpers import context_of, loss_without


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon", "gemma2", "opt"])
def test_greedy_choice_is_the_exhaustive_best_of_each_round(kind: str, documents: Documents) -> None:
    model = made_model(kind)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    removed, losses = greedy_layers(context_of(model, documents), range(1, LAYERS), 3)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    for number, loss in enumerate(losses):
        gone = removed[:number]
        found = {layer: loss_without(kind, [*gone, layer], documents) for layer in range(1, LAYERS) if layer not in gone}
        assert removed[number] == min(found, key=found.__getitem__)
        assert loss == pytest.approx(min(found.values()), rel=1e-4)


def test_greedy_removes_only_allowed_layers(documents: Documents) -> None:
    removed, _ = greedy_layers(context_of(made_model(), documents), [2, 5], 2)
    assert sorted(removed) == [2, 5]


def test_the_loss_of_greedy_is_of_a_few_thousand_tokens(documents: Documents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replaceme.base.documents.EXCERPT_TOKENS", 50)
    _, losses = greedy_layers(context_of(made_model(), documents), [3], 1)
    assert losses == [pytest.approx(loss_without("llama", [3], excerpts_of(documents)), rel=1e-4)]


def test_influence_of_a_layer_that_does_nothing_is_zero_and_it_goes_first(documents: Documents, tmp_path: Path) -> None:
    model = made_model()
    with torch.no_grad():
        for layer in (2, 4):
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            model.model.layers[layer].self_attn.o_proj.bias.zero_()
            model.model.layers[layer].mlp.down_proj.weight.zero_()
            model.model.layers[layer].mlp.down_proj.bias.zero_()
    found = profile_model(context_of(model, documents))
    assert [found["layers"]["block_influence"][layer] for layer in (2, 4)] == pytest.approx([0, 0], abs=1e-6)
    work = Workspace(tmp_path)
    write_json(work.profile / "profile.json", found)
    select(read_params(None, {"method": "shortgpt", "layers_to_skip": 2}), work)
    assert load_blocks(work.blocks) == (Block(2, 3), Block(4, 5))
    assert read_json(work.metric("select"))["influence"] == pytest.approx(0, abs=1e-6)
    select(read_params(None, {"method": "shortgpt", "layers_to_skip": 1, "min_distance_layer": 3}), work)
    assert load_blocks(work.blocks) == (Block(4, 5),)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_influence_removes_the_layers_with_the_lowest_sum(count: int, tmp_path: Path) -> None:
    influence = [0.0, 0.5, 0.1, 0.3, 0.2, 0.4]
    work, nothing = Workspace(tmp_path), [[0.1] * 6] * 6
    content = {"angular_distance": nothing, "residual": nothing, "layers": {"block_influence": influence}}
    write_json(work.profile / "profile.json", content)
    select(read_params(None, {"method": "shortgpt", "layers_to_skip": count}), work)
    # The first layer has no host before it, and stays.
    best = min(combinations(range(1, 6), count), key=lambda layers: sum(influence[layer] for layer in layers))
    assert [layer for block in load_blocks(work.blocks) for layer in block.layers] == sorted(best)


@pytest.mark.parametrize(
    ("options", "criterion"),
    [
        ({}, "angular"),
        ({"method": "uidl"}, "angular"),
        ({"method": "shortgpt"}, "influence"),
        ({"method": "sleb"}, "greedy"),
        ({"method": "sleb", "selection": "residual"}, "residual"),
        ({"selection": "influence"}, "influence"),
    ],
)
def test_each_method_has_its_own_criterion_unless_selection_says_otherwise(options: dict[str, Any], criterion: str) -> None:
    assert criterion_of(read_params(None, options, METHODS)).name == criterion
