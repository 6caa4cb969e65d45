"""The fold against the unfused computation, for each family, each start and two block lengths."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from replaceme.documents import Documents
from replaceme.edits import Change, Edits
from replaceme.errors import ModelError, VerificationError
from replaceme.export import save_pruned
from replaceme.families import FAMILIES, REFUSED, Linear, family_of
from replaceme.models import Model
from replaceme.surgery import apply_edits, cut_config, fold
from replaceme.unfused import unfused
from replaceme.verification import cache_error, verify_export, wrong_weights
from tests.conftest import FAMILY_CONFIGS, LAYERS, WIDTH, made_model

TEXT = torch.arange(2, 42)[None]


def made_transform(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.eye(WIDTH, dtype=torch.float64) + 0.3 * torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)


def edits_for(start: int, length: int) -> Edits:
    return Edits("test", list(range(start, start + length)), {start - 1: made_transform()})


def corrected_for(start: int, length: int, model: Any) -> Edits:
    """Return edits that also correct both linears of the host, and of the first layer behind the cut."""
    edits, generator = edits_for(start, length), torch.Generator().manual_seed(1)
    for layer in {start - 1, min(start + length, LAYERS - 1)} - {*edits.removed_layers}:
        linears: dict[Linear, Any] = {
            "attention_output": model.model.layers[layer].self_attn.o_proj,
            "mlp_output": model.model.layers[layer].mlp.down_proj,
        }
        for linear, module in linears.items():
            weight = 0.1 * torch.randn(module.weight.shape, generator=generator)
            bias = None if module.bias is None else 0.1 * torch.randn(module.bias.shape, generator=generator)
            edits.correct(layer, linear, weight, bias)
    return edits


def corrected(added: torch.Tensor, features: torch.Tensor, edits: Edits, layer: int, linear: Linear) -> torch.Tensor:
    weight, bias = edits.corrections.get((layer, linear), (None, None))
    if weight is not None:
        added = added + features @ weight.T.to(added.dtype)
    return added if bias is None else added + bias.to(added.dtype)


@torch.no_grad()
def unfused_logits(model: Any, edits: Edits) -> torch.Tensor:
    """Write the shortened model's forward pass out by hand: M T in the host, the block left out."""
    base = model.model
    states = base.embed_tokens(TEXT)
    positions = torch.arange(TEXT.shape[1])[None]
    rotary = base.rotary_emb(states, positions)
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * LAYERS
    for index, layer in enumerate(base.layers):
        if index in edits.removed_layers:
            continue
        window = (
            model.config.sliding_window if kinds[index] == "sliding_attention" or model.config.model_type == "mistral" else None
        )
        distance = positions[0][:, None] - positions[0]
        visible = (distance >= 0) & (distance < (window or TEXT.shape[1]))
        features: list[torch.Tensor] = []
        modules = layer.self_attn.o_proj, layer.mlp.down_proj
        hooks = [module.register_forward_pre_hook(lambda _, args, kept=features: kept.append(args[0])) for module in modules]
        inner = layer.input_layernorm(states)
        added = layer.self_attn(inner, position_embeddings=rotary, attention_mask=visible[None, None])[0]
        states = states + corrected(added, features[0], edits, index, "attention_output")
        added = layer.mlp(layer.post_attention_layernorm(states))
        if index in edits.transforms:
            added = (added.double() @ edits.transforms[index]).to(added.dtype)
        states = states + corrected(added, features[1], edits, index, "mlp_output")
        for hook in hooks:
            hook.remove()
    return model.lm_head(base.norm(states))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_folded_model_equals_unfused_computation_for_every_start(
    family: str, length: int, dtype: torch.dtype, tolerance: float
) -> None:
    for start in range(1, LAYERS - length + 1):
        model = made_model(family, dtype)
        edits = corrected_for(start, length, model)
        expected = unfused_logits(model, edits)
        with torch.no_grad(), unfused(model, FAMILIES[family], edits):
            hooked = model(TEXT, use_cache=False).logits
        apply_edits(model, FAMILIES[family], edits)
        with torch.no_grad():
            found = model(TEXT, use_cache=False).logits
        for logits in (hooked, found):
            assert (logits - expected).norm() / expected.norm() < tolerance, f"start {start}"


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_model_is_plain_and_gives_the_same_logits_and_uses_its_cache(
    family: str, save_tiny: Callable[..., Model], tmp_path: Path
) -> None:
    source, edits = save_tiny(family), edits_for(2, 2)
    expected = unfused_logits(source.load(), edits)
    save_pruned(source, edits, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(source.load())
    assert loaded.config.num_hidden_layers == len(loaded.model.layers) == LAYERS - 2
    with torch.no_grad():
        assert torch.allclose(loaded(TEXT).logits, expected, rtol=1e-4, atol=1e-4)
    assert cache_error(loaded, TEXT[0]) < 1e-4
    assert loaded.model.embed_tokens.weight.data_ptr() == loaded.lm_head.weight.data_ptr()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_can_be_pruned_again(family: str, save_tiny: Callable[..., Model], tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    save_pruned(save_tiny(family), edits_for(1, 2), first)
    save_pruned(Model(first, "first"), edits_for(2, 1), second)
    loaded = Model(second, "second").load()
    assert len(loaded.model.layers) == LAYERS - 3
    assert cache_error(loaded, TEXT[0]) < 1e-4


def test_fold_transforms_the_output_of_a_biased_linear() -> None:
    linear, transform = nn.Linear(7, WIDTH, dtype=torch.float64), made_transform()
    inputs = torch.randn(5, 7, dtype=torch.float64)
    expected = linear(inputs) @ transform
    fold(linear, Change(transform))
    assert torch.allclose(linear(inputs), expected, rtol=1e-12)


def test_a_model_computes_with_edits_for_a_while_and_is_whole_again_afterwards() -> None:
    model = made_model()
    before = model(TEXT).logits
    with unfused(model, FAMILIES["llama"], corrected_for(2, 2, model)):
        assert not torch.allclose(model(TEXT).logits, before)
    assert torch.equal(model(TEXT).logits, before)


def test_edits_are_read_as_they_were_saved_and_corrections_add_up(tmp_path: Path) -> None:
    edits = corrected_for(2, 2, made_model())
    edits.correct(1, "mlp_output", torch.ones(WIDTH, 48))
    edits.correct(0, "attention_output", torch.ones(WIDTH, WIDTH), torch.ones(WIDTH))
    edits.save(tmp_path)
    found, whole = Edits.load(tmp_path), corrected_for(2, 2, made_model()).corrections[1, "mlp_output"]
    assert (found.title, found.removed_layers, found.changes().keys()) == ("test", [2, 3], edits.changes().keys())
    assert torch.equal(found.transforms[1], made_transform())
    assert torch.equal(found.corrections[1, "mlp_output"][0], whole[0] + 1)
    assert whole[1] is not None
    assert torch.equal(found.changes()[1, "mlp_output"].bias, whole[1])  # type: ignore[arg-type]
    assert torch.equal(found.corrections[0, "attention_output"][0], torch.ones(WIDTH, WIDTH))


def test_identity_transform_changes_no_bit() -> None:
    linear = nn.Linear(7, WIDTH, dtype=torch.bfloat16)
    before = linear.weight.clone()
    fold(linear, Change(torch.eye(WIDTH, dtype=torch.float64)))
    assert torch.equal(linear.weight, before)


def test_every_module_knows_its_new_position() -> None:
    model = made_model()
    apply_edits(model, FAMILIES["llama"], edits_for(2, 2))
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(LAYERS - 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_config_list_keeps_an_entry_of_a_removed_layer(family: str) -> None:
    config = made_model(family, layers=7).config
    config.layer_types = getattr(config, "layer_types", None) or ["full_attention"] * 7
    lists = {key for key, value in config.to_dict().items() if isinstance(value, list) and len(value) == 7}
    assert "layer_types" in lists
    cut_config(config, FAMILIES[family], [2, 3])
    assert all(len(getattr(config, key)) == 5 for key in lists)
    assert config.num_hidden_layers == 5


def test_layer_types_and_window_bound_stay_with_their_layers() -> None:
    config = made_model("qwen2").config  # layers 3 to 5 have a sliding window
    cut_config(config, FAMILIES["qwen2"], [1, 2])
    assert config.layer_types == ["full_attention"] + ["sliding_attention"] * 3
    assert config.max_window_layers == 1


@pytest.mark.parametrize("family", REFUSED)
def test_families_without_an_exact_fold_are_refused_with_the_reason(family: str) -> None:
    class Config:
        model_type = family

    with pytest.raises(ModelError, match=f"the family '{family}' is refused: "):
        family_of(Config())


def test_a_family_that_nobody_described_is_refused() -> None:
    class Config:
        model_type = "mamba"

    with pytest.raises(ModelError, match="the family 'mamba' is not described yet; supported are llama, mistral, qwen2, qwen3"):
        family_of(Config())


def test_every_described_family_is_tested() -> None:
    assert set(FAMILIES) == set(FAMILY_CONFIGS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_verification_passes_an_honest_export(
    save_tiny: Callable[..., Model], tmp_path: Path, documents: Documents, dtype: torch.dtype
) -> None:
    source = save_tiny(dtype=dtype)
    edits = corrected_for(2, 2, source.load())
    save_pruned(source, edits, tmp_path)
    figures = verify_export(source, Model(tmp_path, "pruned"), edits, documents)
    assert 0 < figures["hidden_error_mean"] < figures["tolerance"]


@pytest.mark.parametrize(
    ("tampered", "said"),
    [
        (Edits("test", [2, 3], {1: made_transform(1)}), "layers.1.mlp.down_proj.weight is not what"),  # another transform
        (Edits("test", [2, 3], {}), "layers.1.mlp.down_proj.weight is not what"),  # the transform left out
        (Edits("test", [2, 4], {1: made_transform()}), "is not what the original and the edits make"),  # another layer
        (
            Edits("test", [2, 3], {1: made_transform()}, {(4, "attention_output"): (torch.ones(WIDTH, WIDTH), None)}),
            "layers.2.self_attn.o_proj.weight is not what",
        ),  # a correction that nobody wanted
    ],
)
def test_verification_fails_a_wrong_export(
    tiny: Model, tmp_path: Path, documents: Documents, tampered: Edits, said: str
) -> None:
    save_pruned(tiny, tampered, tmp_path)
    with pytest.raises(VerificationError, match=said):
        verify_export(tiny, Model(tmp_path, "pruned"), edits_for(2, 2), documents)


def test_verification_knows_subnormal_weights(save_tiny: Callable[..., Model], tmp_path: Path, documents: Documents) -> None:
    # Folds with so small a weight round in absolute steps.
    source = save_tiny(dtype=torch.float16, initializer_range=1e-4)
    edits = edits_for(2, 2)
    save_pruned(source, edits, tmp_path)
    dense, pruned = source.load(), Model(tmp_path, "pruned").load()
    assert wrong_weights(dense, pruned, FAMILIES["llama"], edits) == []


def test_verification_does_not_follow_the_models_generation_config(
    save_tiny: Callable[..., Model], tmp_path: Path, documents: Documents
) -> None:
    source, edits = save_tiny(), edits_for(2, 2)
    save_pruned(source, edits, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"num_beams": 3, "do_sample": true, "top_k": 5, "eos_token_id": [1, 5]}')
    assert verify_export(source, Model(tmp_path, "pruned"), edits, documents)["cache_error"] < 1e-4


def test_verification_compares_with_the_unfused_computation_itself(
    tiny: Model, tmp_path: Path, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replaceme.verification.wrong_weights", lambda *_: [])
    save_pruned(tiny, Edits("test", [2, 3], {1: made_transform().T.contiguous()}), tmp_path)
    with pytest.raises(VerificationError, match="the state at the cut differs from the unfused computation by"):
        verify_export(tiny, Model(tmp_path, "pruned"), edits_for(2, 2), documents)


def test_verification_fails_a_config_that_changes_the_layers_behind_the_cut(
    save_tiny: Callable[..., Model], tmp_path: Path, documents: Documents
) -> None:
    source, edits = save_tiny("qwen2"), edits_for(1, 2)  # layers 3 to 5 have a sliding window
    save_pruned(source, edits, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["layer_types"] = ["full_attention"] * (LAYERS - 2)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError, match="the logits differ"):
        verify_export(source, Model(tmp_path, "pruned"), edits, documents)


def test_verification_fails_where_the_cache_is_addressed_wrongly(tiny: Model, tmp_path: Path) -> None:
    model = tiny.load()
    apply_edits(model, FAMILIES["llama"], edits_for(2, 2))
    model.model.layers[2].self_attn.layer_idx = 1
    assert cache_error(model, TEXT[0]) > 1e-2
