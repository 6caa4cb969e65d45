"""SliceGPT: the narrower model against the projected dense one, and its bases against explicit matrices, signal by signal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from replaceme.base.documents import Documents
from replaceme.base.errors import ModelError, ParameterError, SolveError, VerificationError
from replaceme.base.files import read_json
from replaceme.base.parameters import Params
from replaceme.base.plan import save_blocks
from replaceme.edits.edits import Edits
from replaceme.edits.fold import apply_edits
from replaceme.edits.unfused import unfused
from replaceme.export.save import save_pruned
from replaceme.export.verification import find_wrong_weights, measure_cache_error, verify_export
from replaceme.methods.slicegpt import (
    Slicing,
    find_bases,
    find_shared_basis,
    fitting_width,
    principal,
    sliced_config,
)
from replaceme.models.families import family_of
from replaceme.models.model import Model, parameter_count
from replaceme.models.own_form import is_own_form
from replaceme.running.workspace import Workspace
from tests.conftest import DESCRIBED, KINDS, LAYERS, WIDTH, made_model
from tests.helpers import TEXT, elsewhere, hooked_and_folded, passing
from tests.methods.helpers import method_context, model_refusals, run_stages

SLICED = [kind for kind, family in DESCRIBED.items() if not family.slicing_obstacle]
SIGNALS = 2 * LAYERS + 1


def random_edits(config: Any, width: int, one_basis: bool = False) -> Edits:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(WIDTH, width, dtype=torch.float64, generator=generator) for _ in range(1 if one_basis else SIGNALS)]
    slicing = Slicing([torch.linalg.qr(matrix)[0] for matrix in made])
    return Edits("test", [], config=sliced_config(config, slicing), model_edit=slicing)


def in_float64(model: Any) -> Any:
    """Let all RMS norms compute in float64; the library's go through float32 whatever the model's dtype."""
    for norm in (module for name, module in model.named_modules() if name.rpartition(".")[2].endswith("norm")):
        norm.forward = lambda x, norm=norm: (
            x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt() * norm.weight
        )
    return model


@torch.no_grad()
def projected_logits(model: Any, bases: list[Tensor]) -> Tensor:
    """Run each layer's own parts in order, with the stream projected by d × d matrices before every norm."""
    P = [Q.double() @ Q.double().T for Q in bases] * (SIGNALS if len(bases) == 1 else 1)
    calls: list[Any] = []
    layers = model.model.layers
    hooks = [
        layer.register_forward_pre_hook(lambda _m, args, kwargs: calls.append((args[0], kwargs)), with_kwargs=True)
        for layer in layers
    ]
    model(TEXT, use_cache=False)
    for hook in hooks:
        hook.remove()
    state, factor = calls[0][0], getattr(model.config, "residual_multiplier", 1)
    for index, layer in enumerate(layers):
        state = state @ P[2 * index].to(state)
        state = state + factor * layer.self_attn(hidden_states=layer.input_layernorm(state), **calls[index][1])[0]
        state = state @ P[2 * index + 1].to(state)
        state = state + factor * layer.mlp(layer.post_attention_layernorm(state))
    logits: Tensor = model.lm_head(model.model.norm(state @ P[-1].to(state)))
    return logits / getattr(model.config, "logits_scaling", 1)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("one_basis", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", SLICED)
def test_a_sliced_model_computes_what_the_projected_one_does(kind: str, tied: bool, one_basis: bool) -> None:
    model = in_float64(made_model(kind, torch.float64, tie_word_embeddings=tied, rms_norm_eps=0.1))
    family, edits = family_of(model.config), random_edits(model.config, 24, one_basis)
    dense, expected = model(TEXT, use_cache=False).logits, projected_logits(model, edits.model_edit.bases)  # type: ignore[union-attr]
    assert relative(dense, expected) > 0.1
    for logits in hooked_and_folded(model, family, edits):
        assert relative(logits, expected) < 1e-9
    # A basis of the whole width changes nothing.
    whole = in_float64(made_model(kind, torch.float64, tie_word_embeddings=tied, rms_norm_eps=0.1))
    apply_edits(whole, family, random_edits(whole.config, WIDTH, one_basis))
    assert relative(whole(TEXT, use_cache=False).logits, dense) < 1e-9


@pytest.mark.parametrize("one_basis", [False, True])
@pytest.mark.parametrize("kind", ["llama", "granite", "phi3"])
def test_a_saved_sliced_model_passes_its_verification_and_loads_alone(
    kind: str, one_basis: bool, save_tiny: Callable[..., Model], tmp_path: Path, documents: Documents
) -> None:
    source = save_tiny(kind)
    edits = random_edits(source.config(), 24 if one_basis else 22, one_basis)
    counts = save_pruned(source, edits, tmp_path)
    figures = verify_export(source, Model(tmp_path, "pruned"), edits, documents)
    assert figures["hidden_error_mean"] < 1e-4
    assert is_own_form(tmp_path) != one_basis
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=not one_basis).eval()
    assert loaded.config.hidden_size == (24 if one_basis else 22)
    assert relative(loaded(TEXT).logits, projected_logits(source.load(), edits.model_edit.bases)) < 1e-4  # type: ignore[union-attr]
    assert measure_cache_error(loaded, TEXT[0]) < 1e-4
    assert counts["parameters"] == parameter_count(loaded)


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "model.layers.2.attention_shortcut.weight",
        "model.layers.3.self_attn.v_proj.weight", "model.layers.1.mlp.down_proj.bias",
        "model.layers.5.post_attention_layernorm.weight",
    ],
)  # fmt: skip
def test_verification_sees_a_change_of_any_weight(name: str, tiny: Model, tmp_path: Path, documents: Documents) -> None:
    edits = random_edits(tiny.config(), 22)
    save_pruned(tiny, edits, tmp_path)
    pruned = Model(tmp_path, "pruned").load()
    assert find_wrong_weights(tiny.load(), pruned, tiny.family(), edits)[0] == []
    with torch.no_grad():
        pruned.get_parameter(name).view(-1)[3] += 1e-3
    assert find_wrong_weights(tiny.load(), pruned, tiny.family(), edits)[0] == [name]
    edits.model_edit.bases[4] = edits.model_edit.bases[0]  # type: ignore[union-attr]
    with pytest.raises(VerificationError, match=r"export: model.layers.\d.\S+ differs"):
        verify_export(tiny, Model(tmp_path, "pruned"), edits, documents)


SLICE: dict[str, Any] = {"method": "slicegpt", "layers_to_skip": 1}


def leading(gram: np.ndarray, width: int) -> tuple[np.ndarray, float]:
    """Return the projector onto the leading eigenvectors of the damped sums, and their share of the sums' own trace."""
    damped = gram + 0.01 * np.diag(gram).mean() * np.eye(len(gram))
    left, values, _ = np.linalg.svd(damped)
    return left[:, :width] @ left[:, :width].T, values[:width].sum() / values.sum()


@pytest.mark.parametrize("kind", ["llama", "granite"])
def test_each_basis_is_computed_from_the_sliced_signals_before_it(kind: str, documents: Documents, tmp_path: Path) -> None:
    model, width = made_model(kind), 20
    found = [Q.double().numpy() for Q, _ in find_bases(method_context(model, documents, tmp_path, **SLICE), width)]
    assert len(found) == SIGNALS
    known: list[np.ndarray] = []
    for signal in range(SIGNALS):
        # The whole model runs with the bases so far, and none after them.
        bases = [torch.from_numpy(Q) for Q in known] + [torch.eye(WIDTH, dtype=torch.float64)] * (SIGNALS - signal)
        with unfused(model, family_of(model.config), Edits("", [], model_edit=Slicing(bases))):
            seen = passing(model, min(signal // 2, LAYERS - 1), documents)
        h = seen["output"] if signal == SIGNALS - 1 else projected_middle(seen, known) if signal % 2 else seen["input"]
        projector, _ = leading(h.T @ h, width)
        assert np.abs(found[signal] @ found[signal].T - projector).max() < 1e-3, signal
        assert np.abs(found[signal].T @ found[signal] - np.eye(width)).max() < 1e-5
        known.append(found[signal])


def projected_middle(seen: dict[str, np.ndarray], known: list[np.ndarray]) -> np.ndarray:
    return seen["input"] @ known[-1] @ known[-1].T + seen["attention"]


def test_the_shared_basis_is_of_all_signals_together_as_the_norms_see_them(documents: Documents, tmp_path: Path) -> None:
    model = made_model()
    ((Q, share),) = find_shared_basis(method_context(model, documents, tmp_path, plain=True, **SLICE), 16)
    seen = [passing(model, layer, documents) for layer in range(LAYERS)]
    signals = [state for each in seen for state in (each["input"], each["middle"])] + [seen[-1]["output"]]
    units = [h / np.linalg.norm(h, axis=1, keepdims=True) for h in signals]
    gram = sum(h.T @ h for h in units)
    projector, _ = leading(gram, 16)
    assert np.abs(Q.numpy() @ Q.numpy().T - projector).max() < 1e-3
    values = np.linalg.eigvalsh(gram)
    assert share == pytest.approx(values[-16:].sum() / values.sum(), rel=1e-5)


def test_a_basis_is_computed_on_the_device_of_the_sums() -> None:
    with elsewhere():
        assert principal(torch.eye(WIDTH, dtype=torch.float64, device="meta"), 16)[0].device.type == "meta"


def test_an_offloaded_layer_and_sums_that_are_not_finite_are_refused(documents: Documents, tmp_path: Path) -> None:
    model = made_model()
    model.model.layers[3].to("meta")
    with pytest.raises(ModelError, match=r"device_map: layer 3, whose MLP is computed by itself, does not fit the GPUs"):
        find_bases(method_context(model, documents, tmp_path, **SLICE), 16)
    with pytest.raises(SolveError, match=r"dtype: the sums over the states are not finite"):
        principal(torch.full((3, 3), torch.nan, dtype=torch.float64), 2)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("one_basis", [False, True])
def test_the_model_of_the_chosen_width_is_nearest_to_the_budget(one_basis: bool, tied: bool) -> None:
    def built(width: int) -> int:
        model = made_model("qwen3", tie_word_embeddings=tied)
        apply_edits(model, family_of(model.config), random_edits(model.config, width, one_basis))
        return parameter_count(model)

    model = made_model("qwen3", tie_word_embeddings=tied)
    sizes = {width: built(width) for width in (8, 16, 24)}
    dense, layer = parameter_count(model), parameter_count(model.model.layers[0])
    for layers in range(1, LAYERS):
        width, parameters, total = fitting_width(model, family_of(model.config), layers, one_basis)
        assert width == min(sizes, key=lambda width: abs(sizes[width] - dense + layers * layer))
        assert (parameters, total) == (sizes[width], dense)


def test_a_model_without_a_narrower_plain_form_is_refused() -> None:
    model = made_model(num_attention_heads=32, num_key_value_heads=2, head_dim=8)
    with pytest.raises(ParameterError, match=r"plain: the width would be a multiple of 32, for 32 attention heads"):
        fitting_width(model, family_of(model.config), 1, True)
    assert fitting_width(model, family_of(model.config), 1, False)[0] < WIDTH


def test_families_are_sliced_or_refused_with_the_reason() -> None:
    said = {kind: model_refusals(kind, method="slicegpt", layers_to_skip=1) for kind in KINDS}
    assert [kind for kind in KINDS if not said[kind]] == SLICED
    for kind, reason in {
        "gpt2": "its norms subtract a mean", "falcon": "its attention and MLP are parallel", "olmo2": "the norm after its MLP",
        "mixtral": "the router of its mixture of experts",
    }.items():  # fmt: skip
        assert said[kind][0].startswith(f"method: slicegpt is refused for the family '{kind}': {reason}")


@pytest.mark.parametrize("plain", [False, True])
def test_the_stages_slice_save_and_score(plain: bool, params: Params, tmp_path: Path) -> None:
    params, work = params.model_copy(update={"method": "slicegpt", "plain": plain}), Workspace(tmp_path)
    run_stages(params, work, "inputs", "calibrate")
    save_blocks([], work.blocks)
    run_stages(params, work, "plan", "activations", "solve", "repair", "heal", "check", "export", "baseline", "evaluate")
    figures, pruned = read_json(work.metric("repair")), Model(work.model, "pruned").load()
    slicing = Edits.load(work.edits).model_edit
    assert isinstance(slicing, Slicing)
    assert len(slicing.bases) == (1 if plain else SIGNALS)
    assert {Q.dtype for Q in slicing.bases} == {torch.float32}
    assert figures["width"] == pruned.config.hidden_size == slicing.width
    assert figures["slicing"] == pytest.approx(1 - figures["width"] / WIDTH)
    assert figures["parameters"] == read_json(work.metric("export"))["parameters"] == parameter_count(pruned)
    assert figures["parameters_removed"] == read_json(work.metric("export"))["parameters_dense"] - figures["parameters"]
    assert 0 < figures["kept_squares_lowest"] <= figures["kept_squares_mean"] <= 1
    assert is_own_form(work.model) != plain
    scores = read_json(work.metric("evaluation"))
    assert all(np.isfinite(value["pruned"]) for value in scores["perplexity"].values())
    config = json.loads((work.model / "config.json").read_text())
    assert (config["tie_word_embeddings"], config["head_dim"]) == (False, 8)
