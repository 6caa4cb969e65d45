"""The folded model equals the unfused computation, for each family, each start and two block lengths."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from replaceme.base.errors import ModelError, SolveError
from replaceme.edits.edits import Change, Edits
from replaceme.edits.fold import apply_edits, folds
from replaceme.edits.unfused import unfused
from replaceme.export.save import save_pruned
from replaceme.export.verification import measure_cache_error
from replaceme.models.depth import broken_patterns, cut_config
from replaceme.models.families import FAMILIES, Family, family_of, parameter_of
from replaceme.models.model import Model
from tests.conftest import FAMILY_CONFIGS, KINDS, LAYERS, REPRESENTATIVES, WIDTH, made_model
from tests.helpers import TEXT, edits_of, hooked_and_folded, made_transform, norm_in_float64, shortened_logits


@pytest.mark.parametrize(("kind", "length"), [*((kind, 1) for kind in KINDS), *((kind, 3) for kind in REPRESENTATIVES)])
def test_folded_model_equals_unfused_computation_for_every_start(kind: str, length: int) -> None:
    for start in range(1, LAYERS - length + 1):
        model = made_model(kind, torch.float64)
        family, edits = family_of(model.config), edits_of(start, length, model)
        if family.norm_after_mlp:
            norm_in_float64(model, family)
        expected = shortened_logits(model, edits, TEXT)
        assert (model(TEXT, use_cache=False).logits - expected).norm() > 1e-2 * expected.norm()
        for logits in hooked_and_folded(model, family, edits):
            assert (logits - expected).norm() / expected.norm() < 1e-9, f"start {start}"


@pytest.mark.parametrize("kind", KINDS)
def test_saved_model_is_plain_and_gives_the_same_logits_and_uses_its_cache(
    kind: str, save_tiny: Callable[..., Model], tmp_path: Path
) -> None:
    source = save_tiny(kind)
    dense = source.load()
    for start, length in ((1, 1), (LAYERS - 2, 2)):
        edits, folder = edits_of(start, length, dense), tmp_path / f"{start}-{length}"
        expected = shortened_logits(dense, edits, TEXT)
        save_pruned(source, edits, folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert type(loaded) is type(dense)
        layers = family_of(loaded.config).decoder_layers(loaded)
        assert loaded.config.num_hidden_layers == len(layers) == LAYERS - length
        with torch.no_grad():
            assert torch.allclose(loaded(TEXT).logits, expected, rtol=1e-4, atol=1e-4)
        assert measure_cache_error(loaded, TEXT[0]) < 1e-4
        embeddings = [each.weight.data_ptr() for each in (loaded.get_input_embeddings(), loaded.get_output_embeddings())]
        assert (embeddings[0] == embeddings[1]) == loaded.config.tie_word_embeddings


@pytest.mark.parametrize("kind", REPRESENTATIVES)
def test_a_pruned_model_can_be_pruned_again(kind: str, save_tiny: Callable[..., Model], tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    source = save_tiny(kind)
    save_pruned(source, edits_of(1, 2, source.load()), first)
    once = Model(first, "first").load()
    edits = edits_of(2, 1, once)
    expected = shortened_logits(once, edits, TEXT)
    save_pruned(Model(first, "first"), edits, second)
    loaded = Model(second, "second").load()
    assert loaded.config.num_hidden_layers == LAYERS - 3
    with torch.no_grad():
        assert torch.allclose(loaded(TEXT).logits, expected, rtol=1e-4, atol=1e-4)
    assert measure_cache_error(loaded, TEXT[0]) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_every_list_with_one_entry_per_layer_is_cut(kind: str) -> None:
    model = made_model(kind)
    family, removed = family_of(model.config), [1, 2, 4]
    before = {name: value for name, value in model.config.to_dict().items() if isinstance(value, list) and len(value) == LAYERS}
    # A list of layer indices can have that length by chance.
    assert before.keys() - family.layer_indices == set(family.per_layer) & model.config.to_dict().keys()
    cut_config(model.config, family, removed)
    after = model.config.to_dict()
    for name, entries in before.items():
        assert after[name] == [entry for layer, entry in enumerate(entries) if layer not in removed]
    assert model.config.num_hidden_layers == LAYERS - len(removed)


def test_identity_transform_changes_no_bit() -> None:
    layer = made_model(dtype=torch.bfloat16).model.layers[0]
    identity = Change(torch.eye(WIDTH, dtype=torch.float64))
    exact = dict(folds(Family(), layer, "mlp_output", identity, partial(parameter_of, layer)))
    assert torch.equal(exact["mlp.down_proj.weight"].bfloat16(), layer.mlp.down_proj.weight)


def test_layer_types_and_window_bound_stay_with_their_layers() -> None:
    config = made_model("qwen2").config  # layers 3 to 5 have a sliding window
    cut_config(config, family_of(config), [1, 2])
    assert config.layer_types == ["full_attention"] + ["sliding_attention"] * 3
    assert config.max_window_layers == 1


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "a cut would change the scale of its attention"),
        ("opt", {"do_layer_norm_before": False}, "it normalises the residual stream itself"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "it is an encoder"),
    ],
)
def test_a_model_that_no_cut_leaves_exact_is_refused(kind: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=f"this model of the family '{kind}' is refused: {said}"):
        family_of(AutoConfig.for_model(kind, **options))


def test_a_map_that_does_not_fold_into_a_norm_is_an_error() -> None:
    model = made_model("gemma2")
    for transform in (made_transform(), torch.zeros(WIDTH, WIDTH, dtype=torch.float64)):
        with pytest.raises(SolveError, match="does not fold into the norm after the MLP; use transform: orthogonal"):
            apply_edits(model, family_of(model.config), Edits("test", [2], {1: transform}))


def test_a_pattern_of_sparse_layers_stays_with_its_layers() -> None:
    model = made_model("qwen2_moe")  # experts in layers 1 and 5: every second one but 3
    apply_edits(model, family_of(model.config), Edits("test", [0, 2]))
    assert model.config.mlp_only_layers == [1, 2]
    again = AutoModelForCausalLM.from_config(model.config)
    assert [hasattr(layer.mlp, "experts") for layer in again.model.layers] == [True, False, False, True]


@pytest.mark.parametrize(
    ("kind", "removed", "broken"),
    [
        ("gemma2", [1, 2], []),  # a whole period
        ("gemma2", [2], ["layer_types"]),
        ("gemma3_text", [0, 1, 2], []),
        ("gemma3_text", [2, 3], ["layer_types"]),
        ("smollm3", [2], ["layer_types", "no_rope_layers"]),
        ("qwen2", [1, 4], []),
        ("llama", [1], []),
    ],
)
def test_a_cut_that_breaks_a_pattern_over_layers_is_recognised(kind: str, removed: list[int], broken: list[str]) -> None:
    model = made_model(kind)
    apply_edits(model, family_of(model.config), Edits("test", removed))
    assert broken_patterns(model.config, family_of(model.config)) == broken


def test_every_described_family_is_tested() -> None:
    assert set(FAMILIES) == set(FAMILY_CONFIGS)


def test_a_large_correction_of_a_quiet_feature_does_not_overflow() -> None:
    model, large = made_model(dtype=torch.float16, mlp_bias=False), Edits("", [])
    weight = torch.zeros_like(Family().linear_of(model.model.layers[2], "mlp_output").weight, dtype=torch.float32)
    weight[:, 0] = 1e5
    large.correct(2, "mlp_output", weight)
    model.model.layers[2].mlp.up_proj.weight.data[0] = 0
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        with unfused(model, Family(), large):
            assert torch.equal(model(ids).logits, expected)
