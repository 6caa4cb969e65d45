"""Streamed models: the same bits as resident ones, within the memory that they were given, and nothing read without need."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from replaceme.base.errors import ModelError, ParameterError
from replaceme.edits.edits import Edits
from replaceme.edits.unfused import unfused
from replaceme.models.families import family_of, parameter_of
from replaceme.models.layers import replacing_parameter
from replaceme.models.memory import load_streamed
from replaceme.models.model import Model
from replaceme.models.streaming import (
    LayerStream,
    layers_in_memory,
    stream_of,
)
from tests.conftest import REPRESENTATIVES, made_model
from tests.helpers import TEXT, edits_of, rewrite_tensors

TWO_ROWS = torch.arange(2, 66).view(2, 32)


def streamed(source: Model, layers: float = 2, dtype: str | None = "float32") -> tuple[Any, LayerStream]:
    """Return a streamed model, with room for so many of its largest layers, and its stream."""
    model = load_streamed(source, dtype, budget=1 << 40)
    own = stream_of(model)
    assert own is not None
    own.budget = int(layers * max(own.sizes))
    return model, own


def logits_with(edits: Edits, *models: Any) -> list[torch.Tensor]:
    """Return the logits of each model with the edits."""
    logits = []
    for model in models:
        with unfused(model, family_of(model.config), edits):
            logits.append(model(TEXT, use_cache=False).logits)
    return logits


# Apertus keeps buffers of its layers in its files.
@pytest.mark.parametrize("kind", [*REPRESENTATIVES, "smollm3", "apertus"])
@torch.inference_mode()
def test_a_streamed_model_computes_the_same_bits(
    save_tiny: Callable[..., Model], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With the threads that users have.
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD")
    source, dtype = save_tiny(kind), "bfloat16"
    resident, (model, _) = source.load(dtype), streamed(source, dtype=dtype)
    for text in (TWO_ROWS, TEXT):
        assert torch.equal(model(text, use_cache=False).logits, resident(text, use_cache=False).logits)
    wanted, found = (each.generate(TEXT, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
                     for each in (resident, model))  # fmt: skip
    assert torch.equal(torch.cat(found.logits), torch.cat(wanted.logits))
    for (name, buffer), (other, expected) in zip(model.named_buffers(), resident.named_buffers(), strict=True):
        assert name == other
        assert torch.equal(buffer, expected)
        assert buffer.dtype == expected.dtype
    described = [[(name, each.shape, each.dtype) for name, each in by.named_parameters()] for by in (model, resident)]
    assert described[0] == described[1]


@torch.inference_mode()
def test_no_more_weights_are_in_memory_than_were_allowed(tiny: Model) -> None:
    model, own = streamed(tiny, 3)
    in_memory = []

    def note(*_: Any) -> None:
        in_memory.append(
            [index for index, layer in enumerate(own.layers) if not any(each.is_meta for each in layer.parameters())]
        )

    for layer in own.layers:
        layer.get_submodule("mlp").register_forward_hook(note)
    for _ in range(2):
        model(TEXT, use_cache=False)
    # Those stay whose turn comes again first.
    assert in_memory[:6] == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 4], [0, 1, 5]]
    assert own.bytes_read == (6 + 3) * own.sizes[0]
    small, own = streamed(tiny, 1)
    assert torch.equal(small(TEXT).logits, tiny.load("float32")(TEXT).logits)
    assert len(own.loaded) == 1


@torch.inference_mode()
def test_what_is_skipped_is_not_read(tiny: Model) -> None:
    model, own = streamed(tiny)
    logits_with(Edits("", [1, 2, 5]), model)
    assert own.bytes_read == sum(own.sizes[index] for index in (0, 3, 4))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mixtral"])
@torch.inference_mode()
def test_edits_compute_the_same_bits_unfused(save_tiny: Callable[..., Model], kind: str) -> None:
    source = save_tiny(kind)
    resident, (model, _) = source.load("float32"), streamed(source)
    edits = edits_of(2, 2, made_model(kind))
    if kind == "llama":
        edits.transforms.pop(1)
        edits.corrections.pop((1, "mlp_output"))
        edits.channels[1] = torch.stack([torch.arange(48) % 3 + 1, torch.arange(48)], dim=1)
    assert torch.equal(*logits_with(edits, resident, model))
    # Afterwards it is as before.
    assert torch.equal(resident(TEXT).logits, model(TEXT).logits)


@torch.inference_mode()
def test_a_mixture_of_layers_needs_room_for_all_of_them(tiny: Model) -> None:
    edits = Edits("", [2, 3], mixtures={1: {1: -1.0, 2: 1.0, 3: 1.0}})
    assert torch.equal(*logits_with(edits, tiny.load("float32"), streamed(tiny, 4)[0]))
    with pytest.raises(ParameterError, match=r"^memory: 3 layers and more are needed at once here, and \S+ GB are left"):
        logits_with(edits, streamed(tiny, 2)[0])


@pytest.mark.parametrize("loaded", [False, True])
def test_a_parameter_can_be_read_and_replaced(tiny: Model, loaded: bool) -> None:
    resident, (_, own) = tiny.load("float32"), streamed(tiny)
    layer, name, expected = own.layers[3], "mlp.up_proj.weight", resident.model.layers[3].mlp.up_proj.weight
    with layers_in_memory([layer] if loaded else []):
        assert torch.equal(parameter_of(layer, name), expected)
        with replacing_parameter(layer, name, torch.ones(3, 32, dtype=torch.float64)), layers_in_memory([layer]):
            assert torch.equal(layer.get_parameter(name), torch.ones(3, 32))
        assert torch.equal(parameter_of(layer, name), expected)


def altered(source: Model, change: Callable[[dict[str, torch.Tensor]], Any], folder: Path) -> Model:
    """Return a copy of a model whose weights a function has changed."""
    copy = Model(Path(shutil.copytree(source.folder, folder / "altered")), "altered")
    rewrite_tensors(copy.folder, change)
    return copy


def test_weights_keep_the_dtype_that_each_is_stored_in(save_tiny: Callable[..., Model], tmp_path: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.float() for name, tensor in tensors.items() if "norm" in name})

    source = altered(save_tiny(dtype=torch.bfloat16), widen, tmp_path)
    expected = dict(source.load_stored().named_parameters())
    model, own = streamed(source, dtype=None)
    with layers_in_memory(own.layers[:1]):
        found = dict(model.named_parameters())
        assert {name: each.dtype for name, each in found.items()} == {name: each.dtype for name, each in expected.items()}
        assert all(torch.equal(found[name], expected[name]) for name in expected if "layers.0." in name)


def test_a_weight_that_is_not_finite_is_refused_when_it_is_read(tiny: Model, tmp_path: Path) -> None:
    name = "model.layers.4.mlp.up_proj.weight"
    model, _ = streamed(altered(tiny, lambda tensors: tensors[name].view(-1).__setitem__(0, torch.nan), tmp_path))
    with pytest.raises(ModelError, match=rf"^model_path: the weight {name} .* holds NaN"):
        model(TEXT)


def test_a_missing_weight_is_refused_at_once(tiny: Model, tmp_path: Path) -> None:
    name = "model.layers.4.mlp.up_proj.weight"
    with pytest.raises(ModelError, match=rf"^model_path: {name} \(1 in all\) is missing"):
        streamed(altered(tiny, lambda tensors: tensors.pop(name), tmp_path))
