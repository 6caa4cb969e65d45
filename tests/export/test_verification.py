"""What the verification notices: weights in the files, entries of the config, and errors of single layers."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from replaceme.base.documents import Documents
from replaceme.base.errors import VerificationError
from replaceme.edits.edits import Edits
from replaceme.export import verification
from replaceme.export.save import save_pruned
from replaceme.export.verification import verify_export
from replaceme.methods.slicegpt import Slicing, sliced_config
from replaceme.models.model import Model
from tests.conftest import LAYERS, WIDTH, made_model, made_tokenizer
from tests.helpers import TEXT, edits_for, edits_of, many_documents

WEIGHTS = "model.safetensors"
EDITED = "model.layers.1.mlp.down_proj"


@pytest.fixture
def export(save_tiny: Callable[..., Model], tmp_path: Path) -> Callable[..., tuple[Model, Model, Edits]]:
    """Return a function that saves a pruned model: the copy of a tiny dense one, the pruned one, and the edits."""

    def run(change: Callable[[Path], Any] | None = None, edits: Edits | None = None, **options: Any) -> tuple[Model, ...]:
        source = Model(Path(shutil.copytree(save_tiny(**options).folder, tmp_path / "dense")), "dense")
        if change:
            change(source.folder)
        edits = edits or edits_of(2, 2, source.load())
        save_pruned(source, edits, tmp_path / "pruned")
        return source, Model(tmp_path / "pruned", "pruned"), edits

    return run


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors in a folder's file."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def configure(folder: Path, name: str = "config.json", **entries: Any) -> None:
    """Change entries of a config."""
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps({**content, **entries}), encoding="utf-8")


def test_an_export_keeps_the_bits_of_weights_that_are_stored_wider_than_the_config_says(
    export: Callable[..., Any], documents: Documents
) -> None:
    source, pruned, edits = export(lambda folder: configure(folder, dtype="bfloat16"))
    dense, saved = load_file(source.folder / WEIGHTS), load_file(pruned.folder / WEIGHTS)
    assert torch.equal(saved["model.layers.3.mlp.up_proj.weight"], dense["model.layers.5.mlp.up_proj.weight"])
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    assert pruned.config().dtype == torch.float32
    verify_export(source, pruned, edits, documents)


def test_an_export_that_rounds_what_no_edit_changes_fails(export: Callable[..., Any], documents: Documents) -> None:
    source, pruned, edits = export(lambda folder: configure(folder, dtype="bfloat16"))

    def cast(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    rewrite(pruned.folder, cast)
    with pytest.raises(VerificationError, match="differs from the original with the edits applied"):
        verify_export(source, pruned, edits, documents)


def spoiled(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Return a function that changes the last bit of one weight."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(torch.int16).view(-1)[0] ^= 1

    return change


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.3.input_layernorm.weight"),
        ("gpt2", "transformer.h.3.mlp.c_fc.weight"),
        ("mixtral", "model.layers.3.block_sparse_moe.experts.2.w1.weight"),
    ],
)
def test_one_changed_bit_in_the_file_is_found(
    family: str, name: str, export: Callable[..., Any], documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, pruned, edits = export(family=family, dtype=torch.bfloat16)
    compared = verification.wrong_weights(source.load_stored(), pruned.load_stored(), source.family(), edits)
    # As if both sides had been loaded by the same wrong rule.
    monkeypatch.setattr(verification, "wrong_weights", lambda *_: compared)
    verify_export(source, pruned, edits, documents)
    rewrite(pruned.folder, spoiled(name))
    with pytest.raises(VerificationError, match=f"{name} in {WEIGHTS} differs from the original with the edits applied"):
        verify_export(source, pruned, edits, documents)


def test_a_base_models_names_are_compared(
    export: Callable[..., Any], documents: Documents, caplog: pytest.LogCaptureFixture
) -> None:
    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in [*tensors]:
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    with caplog.at_level(logging.INFO, "replaceme"):
        verify_export(*export(lambda folder: rewrite(folder, strip), family="gpt2"), documents)
    assert "as loaded" not in caplog.text


def test_mixed_dtypes_are_exported_as_they_are_stored(export: Callable[..., Any], documents: Documents) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name in [each for each in tensors if "norm" in each or "embed" in each]:
            tensors[name] = tensors[name].float() * (1 + 2**-20)

    source, pruned, edits = export(lambda folder: rewrite(folder, widen), dtype=torch.bfloat16)
    dense, saved = load_file(source.folder / WEIGHTS), load_file(pruned.folder / WEIGHTS)
    assert {name: weight.dtype for name, weight in saved.items()} == {name: dense[name].dtype for name in saved}
    assert torch.equal(saved["model.norm.weight"], dense["model.norm.weight"])
    assert pruned.config().dtype == torch.bfloat16
    verify_export(source, pruned, edits, documents)
    rewrite(pruned.folder, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].bfloat16()}))
    with pytest.raises(VerificationError, match=r"model\.norm\.weight differs"):
        verify_export(source, pruned, edits, documents)


def test_weights_that_transformers_converts_are_counted_in_one_line(
    export: Callable[..., Any], documents: Documents, caplog: pytest.LogCaptureFixture
) -> None:
    source, pruned, edits = export(family="mixtral")
    with caplog.at_level(logging.INFO, "replaceme"):
        verify_export(source, pruned, edits, documents)
    (line,) = [line for line in caplog.messages if "as loaded" in line]
    assert line.startswith("export: 4 of ")  # the last linears of the host's experts


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
    ],
)
def test_an_edited_entry_of_a_config_is_found(
    name: str, entry: str, value: Any, export: Callable[..., Any], documents: Documents
) -> None:
    def generation(folder: Path) -> None:
        (folder / "generation_config.json").write_text('{"eos_token_id": [1], "top_k": 5}', encoding="utf-8")

    source, pruned, edits = export(generation, family="qwen2")
    verify_export(source, pruned, edits, documents)
    configure(pruned.folder, name, **{entry: value})
    said = f"{entry} in {name}" if name == "config.json" else name
    with pytest.raises(VerificationError, match=f"export: {said} differs from the original with the edits applied"):
        verify_export(source, pruned, edits, documents)


def test_a_missing_generation_config_is_found(export: Callable[..., Any], documents: Documents) -> None:
    source, pruned, edits = export()
    (pruned.folder / "generation_config.json").unlink()
    with pytest.raises(VerificationError, match=r"generation_config.json differs"):
        verify_export(source, pruned, edits, documents)


def test_the_proof_reaches_beyond_a_window_that_is_longer_than_its_text(
    export: Callable[..., Any], documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = {"sliding_window": 400}
    source, pruned, edits = export(lambda folder: configure(folder, **window), family="qwen2")
    verify_export(source, pruned, edits, documents)
    assert pruned.config().sliding_window == window["sliding_window"]
    configure(pruned.folder, layer_types=["full_attention"] * (LAYERS - 2))
    monkeypatch.setattr(verification, "wrong_entries", lambda *_: [])
    with pytest.raises(VerificationError, match=r"the state after layer \d differs from the unfused computation"):
        verify_export(source, pruned, edits, documents)


def narrower(source: Model, layers: int) -> Edits:
    """Return edits that make the stream narrower, with a basis at each signal, as slicegpt does."""
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(WIDTH, WIDTH - 2, generator=generator) for _ in range(2 * layers + 1)]
    slicing = Slicing([torch.linalg.qr(matrix)[0].contiguous() for matrix in made])
    return Edits("test", [], config=sliced_config(source.config(), slicing), model_edit=slicing)


@pytest.fixture
def deep(tmp_path: Path) -> Model:
    """A bfloat16 model of 30 layers."""
    made_model("llama", torch.bfloat16, layers=30).save_pretrained(tmp_path / "deep")
    made_tokenizer().save_pretrained(tmp_path / "deep")
    return Model(tmp_path / "deep", "deep")


def test_an_honest_export_of_many_layers_passes_however_large_it_is(
    deep: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pruned(deep, narrower(deep, 30), tmp_path / "pruned")
    large = []
    for limit in (8 << 30, 0):
        monkeypatch.setattr("replaceme.models.model.FLOAT32_BYTES", limit)
        large.append(verify_export(deep, Model(tmp_path / "pruned", "pruned"), narrower(deep, 30), many_documents(4)))
    # The errors of thirty layers together exceed what the rounding of one explains.
    assert large[0]["hidden_error_mean"] > large[0]["tolerance"]
    assert large[0] == large[1]


@pytest.mark.parametrize("limit", [8 << 30, 0])
@pytest.mark.parametrize("place", ["model.layers.20.mlp.down_proj.weight", "model.norm.weight"])
def test_a_small_error_in_one_weight_of_many_layers_fails(
    place: str, limit: int, deep: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replaceme.models.model.FLOAT32_BYTES", limit)
    edits = edits_for(2, 2)
    save_pruned(deep, edits, tmp_path / "pruned")
    rewrite(tmp_path / "pruned", lambda tensors: tensors.update({place: tensors[place] * 1.01}))
    # As if the comparison of weights had not noticed.
    monkeypatch.setattr(verification, "wrong_weights", lambda *_: ([], {f"{EDITED}.weight", f"{EDITED}.bias"}))
    monkeypatch.setattr(verification, "wrong_tensors", lambda *_: [])
    said = "the state after layer 22 differs" if "layers" in place else "the logits differ"
    with pytest.raises(VerificationError, match=f"export: {said} from the unfused computation by"):
        verify_export(deep, Model(tmp_path / "pruned", "pruned"), edits, many_documents(4))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon", "mixtral", "olmo2", "opt", "phi"])
def test_a_cast_on_the_fly_computes_what_the_model_in_float32_does(
    kind: str, dtype: str, save_tiny: Callable[..., Model]
) -> None:
    source = save_tiny(kind, dtype=getattr(torch, dtype))
    family, model = source.family(), source.load()
    with torch.inference_mode(), verification._in_float32(model, family):
        found = model(TEXT, use_cache=False).logits
    assert found.dtype == torch.float32
    assert torch.equal(found, source.load("float32")(TEXT, use_cache=False).logits)
    # The weights are as before.
    assert {weight.dtype for weight in model.parameters()} == {getattr(torch, dtype)}


def test_a_mixture_of_layers_is_verified_however_large_the_model(
    save_tiny: Callable[..., Model], tmp_path: Path, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replaceme.models.model.FLOAT32_BYTES", 0)
    source, edits = save_tiny(dtype=torch.bfloat16), Edits("test", [2, 3], mixtures={1: {1: 0.6, 2: 0.3, 3: 0.1}})
    save_pruned(source, edits, tmp_path)
    figures = verify_export(source, Model(tmp_path, "pruned"), edits, documents)
    assert 0 < figures["hidden_error_mean"] < figures["tolerance"]
