"""What the verification notices: weights in the files, entries of the config, and errors of single layers."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from replaceme.base.documents import Documents
from replaceme.base.errors import VerificationError
from replaceme.base.plan import Block
from replaceme.edits.edits import Edits
from replaceme.edits.fold import apply_edits
from replaceme.export import verification
from replaceme.export.save import save_pruned
from replaceme.export.verification import find_wrong_weights, measure_cache_error, verify_export
from replaceme.methods.slicegpt import Slicing, sliced_config
from replaceme.models.families import Family
from replaceme.models.model import Model
from tests.conftest import LAYERS, WIDTH, made_model, made_tokenizer
from tests.helpers import TEXT, edits_for, edits_of, made_transform, many_documents, mixing, rewrite_tensors

WEIGHTS = "model.safetensors"
EDITED = {f"model.layers.1.mlp.down_proj.{name}" for name in ("weight", "bias")}
Export = Callable[..., tuple[Model, Model, Edits]]


@pytest.fixture
def export(save_tiny: Callable[..., Model], tmp_path: Path) -> Export:
    """Return a function that saves a pruned model: the copy of a tiny dense one, the pruned one, and the edits."""

    def run(
        change: Callable[[Path], Any] | None = None, edits: Edits | None = None, **options: Any
    ) -> tuple[Model, Model, Edits]:
        source = Model(Path(shutil.copytree(save_tiny(**options).folder, tmp_path / "dense")), "dense")
        if change:
            change(source.folder)
        edits = edits or edits_of(2, 2, source.load())
        save_pruned(source, edits, tmp_path / "pruned")
        return source, Model(tmp_path / "pruned", "pruned"), edits

    return run


def configure(folder: Path, name: str = "config.json", **entries: Any) -> None:
    """Change entries of a config."""
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps({**content, **entries}), encoding="utf-8")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_correct_export_passes(export: Export, documents: Documents, dtype: torch.dtype) -> None:
    figures = verify_export(*export(dtype=dtype), documents)
    assert 0 < figures["hidden_error_mean"] < figures["tolerance"]


TRANSFORM = {1: made_transform()}
MIXTURE = mixing(Block(1, 5, (-1, -1, 1, 1, 1)))


@pytest.mark.parametrize(
    ("saved", "meant", "said"),
    [
        (Edits("", [2, 3], {1: made_transform(1)}), edits_for(2, 2), "layers.1.mlp.down_proj.weight differs"),
        (Edits("", [2, 3], {}), edits_for(2, 2), "layers.1.mlp.down_proj.weight differs"),
        (Edits("", [2, 4], TRANSFORM), edits_for(2, 2), "differs from the original with the edits"),
        (
            Edits("", [2, 3], TRANSFORM, {(4, "attention_output"): (torch.ones(WIDTH, WIDTH), None)}),
            edits_for(2, 2),
            "layers.2.self_attn.o_proj.weight differs",
        ),
        (mixing(Block(1, 5, (0, -1, 0, 1, 1))), MIXTURE, "layers.0.self_attn.q_proj.weight differs"),
        (Edits("", [1, 2, 3, 4]), MIXTURE, "layers.0.self_attn.q_proj.weight differs"),
        (mixing(Block(2, 6, (-3, 1, 1, 1, 1))), MIXTURE, "differs from the original with the edits applied"),
        (
            Edits("", [4], operators={3: 1.01 * made_transform()}),
            Edits("", [4], operators={3: made_transform()}),
            "layers.3.operator.weight differs",
        ),
    ],
    ids=[
        "another transform", "none", "another layer", "one correction more", "another mixture", "no mixture", "another block",
        "another operator",
    ],
)  # fmt: skip
def test_an_export_of_other_edits_fails(export: Export, documents: Documents, saved: Edits, meant: Edits, said: str) -> None:
    source, pruned, _ = export(edits=saved)
    with pytest.raises(VerificationError, match=said):
        verify_export(source, pruned, meant, documents)


def test_the_bits_of_weights_that_are_stored_wider_than_the_config_says_are_kept_or_the_export_fails(
    export: Export, documents: Documents
) -> None:
    source, pruned, edits = export(lambda folder: configure(folder, dtype="bfloat16"))
    dense, saved = load_file(source.folder / WEIGHTS), load_file(pruned.folder / WEIGHTS)
    assert torch.equal(saved["model.layers.3.mlp.up_proj.weight"], dense["model.layers.5.mlp.up_proj.weight"])
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    assert pruned.config().dtype == torch.float32
    verify_export(source, pruned, edits, documents)
    rewrite_tensors(
        pruned.folder, lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})
    )
    with pytest.raises(VerificationError, match="differs from the original with the edits applied"):
        verify_export(source, pruned, edits, documents)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.3.input_layernorm.weight"),
        ("gpt2", "transformer.h.3.mlp.c_fc.weight"),
        ("mixtral", "model.layers.3.block_sparse_moe.experts.2.w1.weight"),
    ],
)
def test_one_changed_bit_in_the_file_is_found(
    family: str, name: str, export: Export, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, pruned, edits = export(family=family, dtype=torch.bfloat16)
    compared = verification.find_wrong_weights(source.load_stored(), pruned.load_stored(), source.family(), edits)
    # As if both sides had been loaded by the same wrong rule.
    monkeypatch.setattr(verification, "find_wrong_weights", lambda *_: compared)
    verify_export(source, pruned, edits, documents)

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(torch.int16).view(-1)[0] ^= 1

    rewrite_tensors(pruned.folder, flip)
    with pytest.raises(VerificationError, match=f"{name} in {WEIGHTS} differs from the original with the edits applied"):
        verify_export(source, pruned, edits, documents)


def test_a_base_models_names_are_compared_and_what_transformers_converts_is_counted_in_one_line(
    save_tiny: Callable[..., Model], tmp_path: Path, documents: Documents, caplog: pytest.LogCaptureFixture
) -> None:
    for family in ("gpt2", "mixtral"):
        source = Model(Path(shutil.copytree(save_tiny(family).folder, tmp_path / family / "dense")), "dense")
        rewrite_tensors(
            source.folder,
            lambda tensors: [tensors.update({name.removeprefix("transformer."): tensors.pop(name)}) for name in [*tensors]],
        )
        save_pruned(source, edits := edits_of(2, 2, source.load()), tmp_path / family / "pruned")
        with caplog.at_level(logging.INFO, "replaceme"):
            verify_export(source, Model(tmp_path / family / "pruned", "pruned"), edits, documents)
    (line,) = [line for line in caplog.messages if "as loaded" in line]
    assert line.startswith("export: 4 of ")  # the last linears of the experts before the cut


def test_mixed_dtypes_are_exported_as_they_are_stored(export: Export, documents: Documents) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name in [each for each in tensors if "norm" in each or "embed" in each]:
            tensors[name] = tensors[name].float() * (1 + 2**-20)

    source, pruned, edits = export(lambda folder: rewrite_tensors(folder, widen), dtype=torch.bfloat16)
    dense, saved = load_file(source.folder / WEIGHTS), load_file(pruned.folder / WEIGHTS)
    assert {name: weight.dtype for name, weight in saved.items()} == {name: dense[name].dtype for name in saved}
    assert torch.equal(saved["model.norm.weight"], dense["model.norm.weight"])
    assert pruned.config().dtype == torch.bfloat16
    verify_export(source, pruned, edits, documents)
    rewrite_tensors(
        pruned.folder, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].bfloat16()})
    )
    with pytest.raises(VerificationError, match=r"model\.norm\.weight differs"):
        verify_export(source, pruned, edits, documents)


def test_subnormal_weights_round_in_absolute_steps(export: Export) -> None:
    source, pruned, edits = export(dtype=torch.float16, initializer_range=1e-4)
    assert find_wrong_weights(source.load(), pruned.load(), Family(), edits)[0] == []


@pytest.mark.parametrize(
    ("name", "entry", "value"),
    [
        ("config.json", "sliding_window", 7),
        ("config.json", "layer_types", ["full_attention"] * (LAYERS - 2)),
        ("config.json", "eos_token_id", 5),
        ("config.json", "rms_norm_eps", 1e-5),
        ("config.json", "dtype", "bfloat16"),
        ("config.json", "pad_token_id", 3),
        ("generation_config.json", "eos_token_id", [1, 5]),
        ("generation_config.json", "", None),
    ],
)
def test_an_edited_entry_of_a_config_is_found(name: str, entry: str, value: Any, export: Export, documents: Documents) -> None:
    def generation(folder: Path) -> None:
        # The model's own config asks for beams and sampling: the proof's generation is greedy.
        text = '{"num_beams": 3, "do_sample": true, "top_k": 5, "eos_token_id": [1]}'
        (folder / "generation_config.json").write_text(text, encoding="utf-8")

    source, pruned, edits = export(generation, family="qwen2")
    assert verify_export(source, pruned, edits, documents)["cache_error"] < 1e-4
    if entry:
        configure(pruned.folder, name, **{entry: value})
    else:
        (pruned.folder / name).unlink()
    said = f"{entry} in {name}" if name == "config.json" else name
    with pytest.raises(VerificationError, match=f"export: {said} differs from the original with the edits applied"):
        verify_export(source, pruned, edits, documents)


@pytest.mark.parametrize("window", [8, 400])
def test_the_proof_sees_layers_with_another_window_however_long_it_is(
    window: int, export: Export, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Layers 3 to 5 have a sliding window.
    source, pruned, edits = export(lambda folder: configure(folder, sliding_window=window), edits_for(1, 2), family="qwen2")
    verify_export(source, pruned, edits, documents)
    assert pruned.config().sliding_window == window
    configure(pruned.folder, layer_types=["full_attention"] * (LAYERS - 2))
    monkeypatch.setattr(verification, "find_wrong_entries", lambda *_: [])
    with pytest.raises(VerificationError, match="the state after layer 3 differs from the unfused computation"):
        verify_export(source, pruned, edits, documents)


def test_the_computation_is_compared_with_the_unfused_one(
    export: Export, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "find_wrong_weights", lambda *_: ([], EDITED))
    source, pruned, _ = export(edits=Edits("test", [2, 3], {1: made_transform().T.contiguous()}))
    with pytest.raises(VerificationError, match="the state after layer 1 differs from the unfused computation by"):
        verify_export(source, pruned, edits_for(2, 2), documents)


def test_a_wrong_index_of_the_cache_is_an_error(tiny: Model) -> None:
    model = tiny.load()
    apply_edits(model, Family(), edits_for(2, 2))
    model.model.layers[2].self_attn.layer_idx = 1
    assert measure_cache_error(model, TEXT[0]) > 1e-2


@pytest.fixture
def deep(tmp_path: Path) -> Model:
    """A bfloat16 model of 30 layers."""
    made_model("llama", torch.bfloat16, layers=30).save_pretrained(tmp_path / "deep")
    made_tokenizer().save_pretrained(tmp_path / "deep")
    return Model(tmp_path / "deep", "deep")


def test_an_honest_export_of_many_layers_passes_however_large_it_is(
    deep: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(WIDTH, WIDTH - 2, generator=generator) for _ in range(2 * 30 + 1)]
    slicing = Slicing([torch.linalg.qr(matrix)[0].contiguous() for matrix in made])
    narrower = Edits("test", [], config=sliced_config(deep.config(), slicing), model_edit=slicing)
    save_pruned(deep, narrower, tmp_path / "pruned")
    large = []
    for limit in (8 << 30, 0):
        monkeypatch.setattr("replaceme.models.dtypes.FLOAT32_BYTES", limit)
        large.append(verify_export(deep, Model(tmp_path / "pruned", "pruned"), narrower, many_documents(4)))
    # The errors of thirty layers together exceed what the rounding of one explains.
    assert large[0]["hidden_error_mean"] > large[0]["tolerance"]
    assert large[0] == large[1]


@pytest.mark.parametrize("limit", [8 << 30, 0])
@pytest.mark.parametrize("place", ["model.layers.20.mlp.down_proj.weight", "model.norm.weight"])
def test_a_small_error_in_one_weight_of_many_layers_fails(
    place: str, limit: int, deep: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replaceme.models.dtypes.FLOAT32_BYTES", limit)
    edits = edits_for(2, 2)
    save_pruned(deep, edits, tmp_path / "pruned")
    rewrite_tensors(tmp_path / "pruned", lambda tensors: tensors.update({place: tensors[place] * 1.01}))
    # As if the comparison of weights had not noticed.
    monkeypatch.setattr(verification, "find_wrong_weights", lambda *_: ([], EDITED))
    monkeypatch.setattr(verification, "find_wrong_tensors", lambda *_: [])
    said = "the state after layer 22 differs" if "layers" in place else "the logits differ"
    with pytest.raises(VerificationError, match=f"export: {said} from the unfused computation by"):
        verify_export(deep, Model(tmp_path / "pruned", "pruned"), edits, many_documents(4))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon", "mixtral", "olmo2"])
def test_a_cast_on_the_fly_computes_what_the_model_in_float32_does(
    kind: str, dtype: str, save_tiny: Callable[..., Model]
) -> None:
    source = save_tiny(kind, dtype=getattr(torch, dtype))
    family, model = source.family(), source.load()
    with torch.inference_mode(), verification._float32_computation(model, family):
        found = model(TEXT, use_cache=False).logits
    assert found.dtype == torch.float32
    assert torch.equal(found, source.load("float32")(TEXT, use_cache=False).logits)
    # The weights are as before.
    assert {weight.dtype for weight in model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0), (torch.bfloat16, 8 << 30), (torch.float16, 8 << 30)])
def test_a_mixture_of_layers_is_verified_however_large_the_model(
    dtype: torch.dtype, limit: int, export: Export, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replaceme.models.dtypes.FLOAT32_BYTES", limit)
    figures = verify_export(*export(edits=MIXTURE, dtype=dtype), documents)
    assert 0 < figures["hidden_error_mean"] < figures["tolerance"]
