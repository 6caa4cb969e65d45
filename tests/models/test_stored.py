"""Weights as they are stored: in which dtype they are loaded, and models that are refused before any work."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from replaceme.base.errors import ModelError, ParameterError
from replaceme.models.checks import check_folder, check_weights
from replaceme.models.dtypes import stored_dtype
from replaceme.models.model import Model

WEIGHTS = "model.safetensors"


@pytest.fixture
def altered(save_tiny: Callable[..., Model], tmp_path: Path) -> Callable[..., Model]:
    """Return a function that copies a tiny model with other config entries and with weights changed by a function."""

    def make(
        config: dict[str, Any] | None = None, change: Callable[[dict[str, torch.Tensor]], Any] | None = None, **options: Any
    ) -> Model:
        folder = Path(shutil.copytree(save_tiny(**options).folder, tmp_path / "altered"))
        entries = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**entries, **(config or {})}), encoding="utf-8")
        tensors = load_file(folder / WEIGHTS)
        if change:
            change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        return Model(folder, "altered")

    return make


def test_weights_are_loaded_in_the_dtype_that_they_are_stored_in(altered: Callable[..., Model]) -> None:
    source = altered({"dtype": "bfloat16"})
    stored, loaded = load_file(source.folder / WEIGHTS), source.load()
    assert stored_dtype(source) == torch.float32
    for name, weight in loaded.named_parameters():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, stored[name]), name


def widened(*parts: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Return a function that widens the tensors whose names hold one of ``parts`` to float32, and changes their last bits."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [each for each in tensors if any(part in each for part in parts)]:
            tensors[name] = tensors[name].float() * (1 + 2**-20)

    return change


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_weight_keeps_the_dtype_that_it_is_stored_in(
    family: str, dtype: torch.dtype, altered: Callable[..., Model], caplog: pytest.LogCaptureFixture
) -> None:
    source = altered(change=widened("norm", "ln_"), family=family, dtype=dtype)
    stored = load_file(source.folder / WEIGHTS)
    assert {weight.dtype for weight in stored.values()} == {dtype, torch.float32}
    loaded = source.load_stored()
    for name, weight in loaded.named_parameters():
        assert weight.dtype == stored[name].dtype, name
        assert torch.equal(weight, stored[name]), name
    # Passes need one dtype.
    assert {weight.dtype for weight in source.load().parameters()} == {dtype}
    with caplog.at_level(logging.INFO, "replaceme"):
        check_weights(source)
    assert "are stored in another format than most" in caplog.text


def test_a_base_models_names_are_found(altered: Callable[..., Model]) -> None:
    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in [*tensors]:
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        widened("ln_f")(tensors)

    source = altered(change=strip, family="gpt2", dtype=torch.bfloat16)
    assert source.load_stored().transformer.ln_f.weight.dtype == torch.float32


def test_a_converted_weight_of_another_dtype_is_refused(altered: Callable[..., Model]) -> None:
    source = altered(change=widened("experts.0"), family="mixtral", dtype=torch.bfloat16)
    said = r"experts\.0\.\w+\.weight of altered is stored in float32, most weights in bfloat16, and transformers converts it"
    with pytest.raises(ModelError, match=said):
        check_weights(source)
    with pytest.raises(ModelError, match=said):
        source.load_stored()


def test_an_old_files_unused_tensors_are_left_out(altered: Callable[..., Model]) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    check_weights(altered(change=add, family="mixtral", dtype=torch.bfloat16))


def test_weights_in_a_dtype_without_arithmetic_are_refused(altered: Callable[..., Model]) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()})

    with pytest.raises(ModelError, match="most weights of altered are stored in F8_E4M3; give one in bfloat16"):
        check_weights(altered(change=narrow))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_weight_that_is_not_finite_is_named_with_its_file(name: str, value: float, altered: Callable[..., Model]) -> None:
    source = altered(
        change=lambda tensors: tensors[name].view(-1).__setitem__(-1, value), dtype=torch.bfloat16, tie_word_embeddings=False
    )
    with pytest.raises(ModelError, match=f"the weight {name} in {WEIGHTS} of altered holds NaN or infinity; give a model"):
        source.load("float32")


def test_an_expert_that_is_not_finite_is_named_as_it_is_stored(altered: Callable[..., Model]) -> None:
    names = []

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        names.append(next(name for name in tensors if "experts.3" in name))
        tensors[names[0]][0] = float("nan")

    source = altered(change=spoil, family="mixtral")
    with pytest.raises(ModelError, match=f"the weight {names[0]} in {WEIGHTS}"):
        source.load()


def test_a_weight_that_overflows_in_the_asked_dtype_is_named(altered: Callable[..., Model]) -> None:
    source = altered(change=lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    source.load()
    with pytest.raises(ParameterError, match=r"dtype: the weight model.norm.weight of altered overflows in float16; use bf"):
        source.load("float16")


def test_an_adapter_beside_the_model_is_refused(altered: Callable[..., Model]) -> None:
    source = altered()
    (source.folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match=r"altered holds an adapter \(adapter_config.json\) beside its model, and it would be"):
        check_folder(source)
