"""LLM-Pruner: groups of heads and channels, their importance, and models without some of them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from replaceme.base.documents import Documents
from replaceme.base.errors import ModelError, ParameterError, VerificationError
from replaceme.base.parameters import Params, read_params
from replaceme.edits.edits import Edits
from replaceme.edits.fold import apply_edits
from replaceme.export.save import save_pruned
from replaceme.export.verification import measure_cache_error, verify_export
from replaceme.methods.llm_pruner import (
    RemovableGroups,
    RemovedGroups,
    choose_layers,
    cut,
    cut_shapes,
    draw_crops,
    measure_importance,
    remove_groups,
)
from replaceme.methods.registry import METHODS
from replaceme.models.families import Family, Linear, family_of, parameter_of
from replaceme.models.kv_cache import cache_bytes_per_token, fill_cache
from replaceme.models.model import Model
from replaceme.models.own_form import is_own_form
from replaceme.pipeline.inputs import inspect_inputs
from replaceme.running.workspace import Workspace
from tests.conftest import DESCRIBED, FAMILY_CONFIGS, KINDS, LAYERS, made_model
from tests.helpers import TEXT, hooked_and_folded, logits_of
from tests.methods.helpers import method_context, model_refusals

CUT = [kind for kind, family in DESCRIBED.items() if not family.head_pruning_obstacle]
# Families whose config can express the number of heads and channels.
# One of each form of heads: with a norm after the MLP, interleaved rotary positions, a factor, a parallel MLP, wider heads.
FORMS = ["gemma2", "gptj", "granite", "llama", "phi", "qwen3"]
IN_CONFIG = [kind for kind in FORMS if kind != "gptj"]
LINEARS: tuple[Linear, ...] = ("attention_output", "mlp_output")
COUNTS: dict[Linear, int] = {"attention_output": 2, "mlp_output": 48}


def cutting(model: Any) -> tuple[Edits, RemovedGroups]:
    """Return edits that remove different numbers of groups from each of three layers."""
    family, generator = family_of(model.config), torch.Generator().manual_seed(0)
    kept: dict[tuple[int, Linear], torch.Tensor] = {}
    for layer in (1, 3, 5):
        kept[layer, "mlp_output"] = torch.rand(48, generator=generator) < 0.2 + 0.1 * layer
        if layer != 3:
            kept[layer, "attention_output"] = torch.tensor([layer == 1, layer == 5])
    removed = RemovedGroups(kept, cut_shapes(family, family.decoder_layers(model), kept))
    return Edits("test", [], model_edit=removed), removed


@torch.no_grad()
def zeroed_logits(model: Any, removed: RemovedGroups) -> torch.Tensor:
    """Return the logits of a model whose last linears have zeros in the columns of removed groups; the model is changed."""
    family = family_of(model.config)
    for (layer, linear), groups in removed.kept.items():
        weight = parameter_of(family.linear_of(family.decoder_layers(model)[layer], linear), "weight")
        weight *= groups.repeat_interleave(weight.shape[1] // len(groups)).to(weight)
    return logits_of(model)


def pieces(count: int = 12, length: int = 64) -> Documents:
    generator = torch.Generator().manual_seed(2)
    return Documents([torch.randint(2, 400, (length,), generator=generator) for _ in range(count)])


@pytest.mark.parametrize("kind", FORMS)
def test_groups_hold_each_weight_of_their_linears_once_and_nothing_else(kind: str) -> None:
    model = made_model(kind)
    family = family_of(model.config)
    removable = RemovableGroups.of(model, family, range(1, 3))
    layer = family.decoder_layers(model)[1]
    entries = 0
    for linear, count in removable.counts.items():
        named = family.cut_parameters(layer, linear)
        for name, dimension in named.items():
            shape = parameter_of(layer, name).shape
            numbers = torch.arange(shape.numel()).reshape(shape)
            parts = [cut(numbers, torch.arange(count) == group, dimension) for group in range(count)]
            assert sorted(torch.cat([part.flatten() for part in parts]).tolist()) == [*range(shape.numel())]
            entries += shape.numel()
        assert removable.sizes[linear] * count == sum(parameter_of(layer, name).numel() for name in named)
    # In no group: norms, and biases that are added to the residual stream in any case.
    biases = [f"{path}.bias" for path in (family.attention_output, family.mlp_output)]
    rest = [name for name, _ in layer.named_parameters() if "norm" in name or "ln_" in name or name in biases]
    assert removable.layer_size == entries + sum(layer.get_parameter(name).numel() for name in rest)


def test_a_group_of_the_attention_is_a_key_value_head_with_its_queries() -> None:
    layer = made_model("qwen3").model.layers[0]
    kept = torch.tensor([False, True])
    q, k, o = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight, layer.self_attn.o_proj.weight
    # Two queries of 16 features for each of two key/value heads.
    assert torch.equal(cut(q, kept, 0), q[32:])
    assert torch.equal(cut(k, kept, 0), k[16:])
    assert torch.equal(cut(o, kept, 1), o[:, 32:])


@pytest.mark.parametrize("kind", CUT)
def test_a_cut_model_equals_the_unfused_computation_and_one_with_zeros(kind: str) -> None:
    model = made_model(kind, torch.float64)
    family, (edits, removed) = family_of(model.config), cutting(model)
    before, expected = logits_of(model), zeroed_logits(made_model(kind, torch.float64), removed)
    assert (expected - before).norm() > 1e-2 * before.norm()
    for logits in hooked_and_folded(model, family, edits):
        assert (logits - expected).norm() < 1e-9 * expected.norm()
    for (layer, path), shape in removed.shapes.items():
        linear = family.decoder_layers(model)[layer].get_submodule(path)
        assert (linear.out_features, linear.in_features) == linear.weight.shape == shape
    # With every group kept, nothing changes.
    same, counts = made_model(kind, torch.float64), RemovableGroups.of(made_model(kind), family, range(LAYERS)).counts
    every = {(layer, linear): torch.ones(counts[linear]) > 0 for layer in range(LAYERS) for linear in LINEARS}
    apply_edits(same, family, Edits("test", [], model_edit=RemovedGroups(every)))
    assert torch.equal(logits_of(same), before)


@pytest.mark.parametrize("kind", FORMS)
def test_importance_is_the_plain_sum_over_a_groups_weights_and_the_model_is_unchanged(kind: str) -> None:
    model = made_model(kind, torch.float64)
    crops, family = draw_crops(pieces()), family_of(model.config)
    counts = RemovableGroups.of(model, family, range(2, 5)).counts
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, loss = measure_importance(model, family, range(2, 5), counts, crops)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert not any(weight._post_accumulate_grad_hooks for weight in model.parameters())
    logits = model(crops, use_cache=False).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), crops[:, 1:].flatten())
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    assert found.keys() == {(layer, linear) for layer in (2, 3, 4) for linear in LINEARS}
    for (layer, linear), values in found.items():
        part = family.decoder_layers(model)[layer]
        count = counts[linear]
        by_hand = torch.zeros(count, dtype=torch.float64)
        last = family.linear_of(part, linear)
        for group in range(count):
            for path in family.feeding_linears[linear]:
                for weight in part.get_submodule(path).parameters():
                    rows = len(weight) // count
                    mine = slice(group * rows, (group + 1) * rows)
                    by_hand[group] += (weight[mine] * weight.grad[mine]).abs().sum().detach()
            columns = last.weight.shape[1] // count
            mine = slice(group * columns, (group + 1) * columns)
            by_hand[group] += (last.weight[:, mine] * last.weight.grad[:, mine]).abs().sum().detach()
        # Products are taken in float32.
        assert torch.allclose(values, by_hand, rtol=1e-5)
    assert {name for name, weight in model.named_parameters() if weight.grad is None} == set()


def test_offloaded_weights_are_refused(tmp_path: Path) -> None:
    # As device_map offloads a layer: its gradients would go to copies, and its importance would be 0.
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{layer}": "disk" if layer == 3 else "cpu" for layer in range(LAYERS)}
    model = dispatch_model(made_model(), places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    with pytest.raises(ModelError, match=r"device_map: layer 3, whose gradients are needed, does not fit the GPUs"):
        measure_importance(model, Family(), range(2, 5), COUNTS, draw_crops(pieces()))


def test_an_overflow_is_named(tiny: Model) -> None:
    model = tiny.load()
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0] = float("inf")
    with pytest.raises(ParameterError, match="dtype: the model's gradients overflow; use float32"):
        measure_importance(model, Family(), [2], COUNTS, draw_crops(pieces()))


def test_crops_are_ten_pieces_of_the_documents_and_too_few_are_named() -> None:
    documents = pieces(6, 150)
    crops = draw_crops(documents)
    assert crops.shape == (10, 64)
    whole = [piece.tolist() for document in documents.documents for piece in (document[:64], document[64:128])]
    assert all(whole.count(crop) == 1 for crop in crops.tolist())
    assert len({tuple(crop) for crop in crops.tolist()}) == 10
    with pytest.raises(ParameterError, match="dataset_size: the calibration text has 9 pieces of 64 tokens, and"):
        draw_crops(pieces(9))


# Llama-2-7B, and the embedded model.
LLAMA2 = RemovableGroups(
    range(4, 30),
    {"attention_output": 32, "mlp_output": 11008},
    {"attention_output": 4 * 128 * 4096, "mlp_output": 3 * 4096},
    202383360,
)
SMOLLM2 = RemovableGroups(
    range(4, 28), {"attention_output": 3, "mlp_output": 1536}, {"attention_output": 294912, "mlp_output": 1728}, 3540096
)


@pytest.mark.parametrize("groups", [LLAMA2, SMOLLM2, replace(SMOLLM2, layers=range(30))])
@pytest.mark.parametrize("skip", [1, 2, 4, 8, 12, 20])
def test_as_many_parameters_go_as_the_whole_layers_have(groups: RemovableGroups, skip: int) -> None:
    removed = groups.choose_counts(skip)
    each, sizes, counts = len(groups.layers), groups.sizes, groups.counts
    wanted = skip * groups.layer_size
    assert abs(groups.parameters(removed) - wanted) <= each * sizes["mlp_output"] / 2
    assert all(0 <= removed[linear] < counts[linear] for linear in LINEARS)
    # At least one head, if a head from each layer does not exceed the target.
    enough = wanted + each * sizes["mlp_output"] / 2 >= each * sizes["attention_output"]
    assert bool(removed["attention_output"]) == enough
    share = wanted / (each * sum(sizes[linear] * counts[linear] for linear in LINEARS))
    if enough and counts["attention_output"] * share < counts["attention_output"] - 1:
        assert abs(removed["attention_output"] - share * counts["attention_output"]) <= max(0.5, 1 - share * 3)


def test_too_many_layers_are_refused_with_the_possible_number() -> None:
    assert SMOLLM2.max_layers == 21
    assert SMOLLM2.choose_counts(21)["attention_output"] == 2
    said = "layers_to_skip: 24 layers have more parameters than the heads and channels of layers 4–27 can lose; use 21 at most"
    with pytest.raises(ParameterError, match=said):
        SMOLLM2.choose_counts(24)


def test_only_numbers_that_fit_are_taken_the_nearest_first() -> None:
    groups = RemovableGroups(
        range(4), {"attention_output": 5, "mlp_output": 400}, {"attention_output": 100, "mlp_output": 2}, 1400
    )
    assert groups.choose_counts(2)["attention_output"] == 3
    removed = groups.choose_counts(2, lambda kept: kept["attention_output"] != 2)
    assert removed["attention_output"] == 2
    assert groups.parameters(removed) == 2800
    assert groups.choose_counts(2, lambda kept: kept["attention_output"] == 5) == {"attention_output": 0, "mlp_output": 350}
    with pytest.raises(ParameterError, match="plain: the family's own config can't say"):
        groups.choose_counts(2, lambda kept: False)


def pruned_by(source: Model, folder: Path, **settings: Any) -> tuple[Edits, RemovedGroups, dict[str, Any]]:
    """Return the edits of the method, as they are saved and read again, and its figures."""
    context = method_context(source.load(), pieces(), folder, **{"method": "llm_pruner", "layers_to_skip": 2, **settings})
    figures = remove_groups(context)
    context.edits.save(folder)
    read = Edits.load(folder)
    assert isinstance(read.model_edit, RemovedGroups)
    return read, read.model_edit, figures


@pytest.mark.parametrize("kind", FORMS)
def test_a_model_that_lost_parts_of_some_layers_is_verified_and_loads(
    kind: str, save_tiny: Callable[..., Model], tmp_path: Path
) -> None:
    source = save_tiny(kind)
    edits, removed, figures = pruned_by(source, tmp_path, min_distance_layer=1, max_distance_layer=5)
    assert {layer for layer, _ in removed.kept} == {1, 2, 3, 4}
    assert not edits.config
    counts = save_pruned(source, edits, tmp_path / "pruned")
    assert counts["parameters_dense"] - counts["parameters"] == figures["parameters_removed"]
    assert is_own_form(tmp_path / "pruned")
    assert verify_export(source, Model(tmp_path / "pruned", "pruned"), edits, pieces())["logits_error"] < 1e-3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", trust_remote_code=True).eval()
    assert torch.allclose(logits_of(loaded), zeroed_logits(source.load(), removed), rtol=1e-3, atol=1e-3)
    assert measure_cache_error(loaded, TEXT[0]) < 1e-4
    # One of two key/value heads is gone in four of six layers; the cache shrinks accordingly.
    heads = [layer.keys.shape[1] for layer in fill_cache(loaded, TEXT).layers]
    assert heads == ([4, 2, 2, 2, 2, 4] if kind == "gptj" else [2, 1, 1, 1, 1, 2])
    before, after = cache_bytes_per_token(source.load()), cache_bytes_per_token(loaded)
    assert before is not None
    assert after == pytest.approx(before * sum(heads) / max(heads) / 6, rel=0.02)  # whole bytes


@pytest.mark.parametrize("kind", IN_CONFIG)
def test_a_plain_model_has_the_familys_own_form(kind: str, save_tiny: Callable[..., Model], tmp_path: Path) -> None:
    source = save_tiny(kind)
    edits, removed, figures = pruned_by(source, tmp_path, plain=True)
    assert {layer for layer, _ in removed.kept} == {*range(LAYERS)}
    counts = save_pruned(source, edits, tmp_path / "pruned")
    assert counts["parameters_dense"] - counts["parameters"] == figures["parameters_removed"]
    assert not is_own_form(tmp_path / "pruned")
    verify_export(source, Model(tmp_path / "pruned", "pruned"), edits, pieces())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert type(loaded) is type(source.load())
    config = loaded.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1)
    assert config.intermediate_size == 48 - figures["removed_channels"] // LAYERS
    assert config.head_dim == FAMILY_CONFIGS[kind].get("head_dim", 8)
    assert torch.allclose(logits_of(loaded), zeroed_logits(source.load(), removed), rtol=1e-3, atol=1e-3)
    assert measure_cache_error(loaded, TEXT[0]) < 1e-4
    # It is an ordinary model, and can be pruned again.
    assert Model(tmp_path / "pruned", "pruned").family() == replace(source.family())


def test_a_plain_model_keeps_a_number_of_heads_that_its_config_accepts(save_tiny: Callable[..., Model], tmp_path: Path) -> None:
    # Three of five heads do not divide 40.
    source = save_tiny("llama", hidden_size=40, num_attention_heads=5, num_key_value_heads=5)
    _, free, _ = pruned_by(source, tmp_path, min_distance_layer=1, max_distance_layer=6)
    assert int(free.kept[1, "attention_output"].sum()) == 3
    for skip, heads in ((2, 4), (3, 2)):
        edits, _, _ = pruned_by(source, tmp_path, plain=True, layers_to_skip=skip)
        assert edits.config["num_attention_heads"] == edits.config["num_key_value_heads"] == heads
        save_pruned(source, edits, tmp_path / f"{skip}")
        verify_export(source, Model(tmp_path / f"{skip}", "pruned"), edits, pieces())


@pytest.mark.parametrize("change", ["other groups", "other numbers"])
def test_the_verification_fails_another_cut(change: str, tiny: Model, documents: Documents, tmp_path: Path) -> None:
    edits, removed = cutting(tiny.load())
    save_pruned(tiny, edits, tmp_path)
    verify_export(tiny, Model(tmp_path, "pruned"), edits, documents)
    kept = removed.kept[3, "mlp_output"]
    one_more = torch.arange(48) == int((~kept).nonzero()[0])
    removed.kept[3, "mlp_output"] = kept.roll(1) if change == "other groups" else kept | one_more
    with pytest.raises(VerificationError, match=r"model\.layers\.3\.mlp\.\w+\.(weight|bias) differs"):
        verify_export(tiny, Model(tmp_path, "pruned"), edits, documents)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in CUT])
def test_families_whose_heads_cannot_be_cut_out_are_refused_with_the_reason(kind: str) -> None:
    config = made_model(kind).config
    (said,) = model_refusals(kind, method="llm_pruner")
    obstacle = family_of(config).head_pruning_obstacle
    assert said == f"method: llm_pruner is refused for the family '{config.model_type}': {obstacle}; use another method."


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("gpt2", {}, "method: llm_pruner is refused for the family 'gpt2': one linear makes its queries, keys and values"),
        ("llama", {}, "min_distance_layer: of the model's 6 layers, none is between layer 4 and layer 4; set it"),
        ("llama", {"min_distance_layer": 2, "max_distance_layer": 3}, "layers_to_skip: 2 layers have more parameters than"),
        ("gptj", {"plain": True}, "plain: the family's own config can't say what would be left"),
        ("llama", {"plain": True}, "max_length: method llm_pruner takes pieces of 64 tokens; use at least 64, not 48"),
        (
            "llama",
            {"plain": True, "max_length": 130, "dataset_size": 4},
            "dataset_size: method llm_pruner takes 10 pieces of 64 tokens, and documents of at most 130 tokens have 2 each; "
            "use at least 5, not 4",
        ),
    ],
)
def test_impossible_requests_are_refused_before_any_work(
    kind: str, options: Mapping[str, Any], said: str, save_tiny: Callable[..., Model], params: Params, tmp_path: Path
) -> None:
    setting = params.model_copy(update={"method": "llm_pruner", "model_path": str(save_tiny(kind).folder), **options})
    with pytest.raises(ParameterError, match=said):
        inspect_inputs(setting, Workspace(tmp_path))


def test_the_published_layers_are_all_but_the_first_four_and_the_last_two() -> None:
    params = read_params(None, {"method": "llm_pruner"}, methods=METHODS)
    assert choose_layers(params, 32) == range(4, 30)
    assert choose_layers(params.model_copy(update={"min_distance_layer": 1, "max_distance_layer": 32}), 32) == range(1, 32)
    assert choose_layers(params.model_copy(update={"plain": True}), 32) == range(32)
