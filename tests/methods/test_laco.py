"""LaCo: mixtures of layers, and the choice of merges, against models built by the formula."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from replaceme.base.documents import Documents
from replaceme.base.errors import ModelError, ParameterError
from replaceme.base.parameters import read_params
from replaceme.base.plan import Block, Plan, load_blocks, save_blocks
from replaceme.edits.edits import Edits
from replaceme.edits.fold import apply_edits
from replaceme.export.save import save_pruned
from replaceme.export.verification import verify_export
from replaceme.methods.registry import criterion_of
from replaceme.models.families import family_of
from replaceme.models.model import Model
from replaceme.selection import collapse as module
from replaceme.selection.collapse import (
    MergeSchedule,
    blocks_of,
    check_same_shapes,
    collapse,
    collapse_all,
    collapsed_blocks,
    draw_texts,
    merge_layers,
)
from replaceme.selection.criteria import allowed_starts
from tests.conftest import EXPERTS, LAYERS, OBSTACLES, PLAIN_REPRESENTATIVES, REPRESENTATIVES, made_model
from tests.helpers import context_of, hooked_and_folded, logits_of, mixing
from tests.methods.helpers import assert_repaired_and_exported, model_refusals

DENSE = [kind for kind in REPRESENTATIVES if kind not in EXPERTS]
# Layers 1 to 3 were merged, then 0 to 2 of the remaining ones: layer 0 absorbed the mixture and layer 4.
TWICE = (Block(1, 5, (-1, -1, 1, 1, 1)),)


@torch.no_grad()
def merge(model: Any, place: int, size: int, last: int) -> Any:
    """Return the model by the formula: θ_l + Σ (θ_{l+k} − θ_l) for every linear, without the absorbed layers after l."""
    model = deepcopy(model)
    layers = family_of(model.config).decoder_layers(model)
    m = min(size - 1, last - place)
    for name, linear in layers[place].named_modules():
        if isinstance(linear, nn.Linear | Conv1D):
            for parameter, value in linear.named_parameters():
                others = [layers[place + k].get_submodule(name).get_parameter(parameter) for k in range(1, m + 1)]
                value += sum(other - value for other in others)
    apply_edits(model, family_of(model.config), Edits("", list(range(place + 1, place + 1 + m))))
    return model


@torch.no_grad()
def likeness(model: Any, original: Any, texts: Documents) -> float:
    """Return the mean cosine of the last hidden states, as published."""
    cosines = []
    for text in texts.documents:
        one, other = (each(text[None], output_hidden_states=True).hidden_states[-1][0].flatten() for each in (model, original))
        cosines.append(float(torch.cosine_similarity(one, other, dim=0)))
    return sum(cosines) / len(cosines)


def slowly(model: Any, texts: Documents, schedule: MergeSchedule, threshold: float) -> tuple[Any, list[int], dict[int, float]]:
    """Collapse a model by building every candidate. Return it, its original layers, and the scores of the merges."""
    merged_model, kept, scores = model, list(range(model.config.num_hidden_layers)), {}
    last, left = schedule.end - 1, schedule.count
    place = schedule.end - min(schedule.size, schedule.count + 1)
    while place >= schedule.first and left:
        size = min(schedule.size, left + 1)
        candidate = merge(merged_model, place, size, last)
        score = likeness(candidate, model, texts)
        if score > threshold:
            gone = min(size - 1, last - place)
            merged_model, scores[place] = candidate, score
            del kept[place + 1 : place + 1 + gone]
            last, left = last - gone, left - gone
            place -= schedule.interval
        else:
            place -= 1
    return merged_model, kept, scores


def test_a_layer_that_absorbs_others_is_the_papers_sum() -> None:
    layers = ((1,),) * 6
    once = merge_layers(layers, 1, 2)
    assert once == ((1,), (-1, 1, 1), (1,), (1,))
    assert blocks_of(once) == [Block(2, 4, (-1, 1, 1))]
    # θ_0 + (θ_1 − θ_0) + (θ_4 − θ_0), with layer 1 as merged before.
    assert blocks_of(merge_layers(once, 0, 2)) == [*TWICE]
    assert blocks_of(merge_layers(layers, 2, 1)) == [Block(3, 4, (0, 1))]
    assert all(sum(parts) == 1 for parts in merge_layers(merge_layers(once, 2, 1), 0, 2))


@pytest.mark.parametrize("kind", DENSE)
def test_a_folded_mixture_equals_the_formula_and_the_unfused_computation(kind: str) -> None:
    original = made_model(kind, torch.float64)
    # Two merges, one of which absorbs the other.
    expected = logits_of(merge(merge(original, 1, 3, LAYERS - 1), 0, 3, LAYERS - 3))
    assert (logits_of(original) - expected).norm() > 1e-2 * expected.norm()
    for logits in hooked_and_folded(original, family_of(original.config), mixing(*TWICE)):
        assert (logits - expected).norm() / expected.norm() < 1e-9
    assert not any(part._forward_hooks for part in original.modules())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "falcon", "opt", "gemma2"])
def test_an_exported_mixture_gives_the_same_logits_and_is_verified(
    kind: str, save_tiny: Callable[..., Model], documents: Documents, tmp_path: Path
) -> None:
    source, edits = save_tiny(kind), mixing(Block(1, 3, (-1, 1, 1)), Block(4, 5, (0, 1)))
    expected = logits_of(merge(merge(source.load(), 0, 3, LAYERS - 1), 1, 2, LAYERS - 3))
    assert (edits.removed_layers, edits.mixtures) == ([1, 2, 4], {0: {0: -1, 1: 1, 2: 1}, 3: {3: 0, 4: 1}})
    save_pruned(source, edits, tmp_path / "pruned")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert torch.allclose(logits_of(loaded), expected, rtol=1e-4, atol=1e-4)
    figures = verify_export(source, Model(tmp_path / "pruned", "pruned"), edits, documents)
    assert 0 <= figures["hidden_error_mean"] < figures["tolerance"]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon", "opt", "gemma2", "smollm3"])
@pytest.mark.parametrize(
    ("schedule", "threshold"),
    [
        (MergeSchedule(0, LAYERS, 3, 1, 3), 0.3),
        (MergeSchedule(0, LAYERS, 3, 2, 4), -1.0),  # all merges are accepted
        (MergeSchedule(1, LAYERS - 1, 2, 1, 3), 0.0),
        (MergeSchedule(0, LAYERS, 7, 1, 2), 0.5),  # a merge larger than the number of layers to remove
    ],
)
def test_the_choice_equals_that_of_models_built_by_the_formula(
    kind: str, schedule: MergeSchedule, threshold: float, documents: Documents, tmp_path: Path
) -> None:
    model = made_model(kind, torch.float64, initializer_range=0.08)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    blocks, scores, reached = collapsed_blocks(context_of(model, documents, 4, tmp_path), schedule, threshold)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert not list(tmp_path.iterdir())
    expected, kept, found = slowly(model, draw_texts(documents), schedule, reached)
    gone = [layer for block in blocks for layer in block.layers]
    assert kept == [layer for layer in range(LAYERS) if layer not in gone]
    assert len(gone) == schedule.count
    assert [*scores] == [*found]
    assert [*scores.values()] == pytest.approx([*found.values()], rel=1e-5)
    apply_edits(model, family_of(model.config), mixing(*blocks))
    logits = logits_of(expected)
    assert (logits_of(model) - logits).norm() < 1e-6 * logits.norm()
    # A threshold one step higher leaves too many layers.
    if reached < threshold:
        assert (
            len(slowly(model_again(kind), draw_texts(documents), schedule, reached + module.STEP)[1]) > LAYERS - schedule.count
        )


def model_again(kind: str) -> Any:
    return made_model(kind, torch.float64, initializer_range=0.08)


def test_the_threshold_is_lowered_until_the_budget_is_reached_and_no_candidate_is_measured_twice() -> None:
    asked = []

    def similarity(layers: Any, place: int) -> float:
        asked.append(layers)
        return {4: 0.2, 3: 0.35, 2: 0.1, 1: 0.3, 0: 0.9}[place]

    layers, found, reached = collapse_all(6, MergeSchedule(1, 6, 2, 1, 2), 0.45, similarity)
    # 0.35 exceeds 0.34 and 0.3 exceeds 0.29: layer 3 absorbs layer 4, and layer 1 layer 2.
    assert (reached, found) == (0.29, {3: 0.35, 1: 0.3})
    assert blocks_of(layers) == [Block(2, 3, (0, 1)), Block(4, 5, (0, 1))]
    assert len(asked) == len(set(asked))
    assert collapse(6, MergeSchedule(1, 6, 2, 1, 2), reached, similarity)[0] == layers


@pytest.mark.parametrize("size", [2, 3, 5, 9])
@pytest.mark.parametrize(("interval", "count"), [(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 3), (2, 4)])
def test_exactly_count_layers_go_within_the_range(size: int, interval: int, count: int) -> None:
    generator = torch.Generator().manual_seed(size + 10 * interval)
    schedule = MergeSchedule(2, 11, size, interval, count)
    layers, _, _ = collapse_all(12, schedule, 0.9, lambda *_: float(torch.rand(1, generator=generator)))
    gone = [layer for block in blocks_of(layers) for layer in block.layers]
    assert len(gone) == count
    assert set(gone) <= set(range(3, 11))


def test_states_that_overflow_are_named() -> None:
    with pytest.raises(ParameterError, match="dtype: the merged models overflow; use bfloat16 or float32"):
        collapse_all(6, MergeSchedule(0, 6, 3, 1, 2), 0.45, lambda *_: float("nan"))


def test_layers_of_other_shapes_are_not_merged() -> None:
    layers = made_model().model.layers
    check_same_shapes(layers, range(LAYERS))
    layers[3].mlp.up_proj = nn.Linear(32, 40)
    check_same_shapes(layers, range(3))
    with pytest.raises(ModelError, match="model_path: the linears of layers 0 and 3 differ in their shapes"):
        check_same_shapes(layers, range(LAYERS))


def test_blocks_and_plan_store_coefficients_and_scales_and_name_no_method(tmp_path: Path) -> None:
    blocks = (Block(1, 3, (-1, 1, 1)), Block(4, 5), Block(6, 8, scale=1 / 3))
    save_blocks(blocks, tmp_path / "blocks.json")
    assert load_blocks(tmp_path / "blocks.json") == blocks
    Plan(blocks, ("gram",)).save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert (plan.blocks, plan.mixtures, plan.scales) == (blocks, {0: {0: -1, 1: 1, 2: 1}}, {5: 1 / 3})
    assert "laco" not in (tmp_path / "plan.json").read_text()
    assert json.loads((tmp_path / "plan.json").read_text())["blocks"][1] == {"start": 4, "end": 5}


@pytest.mark.parametrize("kind", PLAIN_REPRESENTATIVES)
def test_repair_follows_a_mixture(kind: str, save_tiny: Callable[..., Model], tmp_path: Path) -> None:
    source, plan = save_tiny(kind), Plan((Block(1, 2, (0, 1)), Block(3, 5, (-1, 1, 1))), ())
    repaired = assert_repaired_and_exported(source, mixing(*plan.blocks), plan, tmp_path, "laco")
    # Layer 2 is kept and mixed; its correction is for the mixture.
    assert repaired == ({5} if source.family().parallel else {2, 5})


def test_merges_too_far_apart_are_named() -> None:
    params = read_params(None, {"method": "laco", "laco_interval": 5, "laco_layers": 2, "layers_to_skip": 4})
    said = "laco_interval: merges 5 layers apart remove 3 of the 4 layers between layer 1 and layer 12 at most; lower it"
    with pytest.raises(ParameterError, match=said):
        allowed_starts(params, 12, criterion_of(params))
    assert allowed_starts(params.model_copy(update={"layers_to_skip": 3}), 12, criterion_of(params))


def test_experts_are_not_merged_and_norms_are_no_obstacle() -> None:
    (said,) = model_refusals("mixtral", method="laco")
    assert said.startswith("method: laco is not derived for the mixture of experts of the family 'mixtral'")
    assert model_refusals(OBSTACLES["norm"], method="laco") == []
    assert model_refusals(OBSTACLES["undescribed"], method="laco") == []
