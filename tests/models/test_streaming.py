"""Streamed models: the same bits as resident ones, within the memory that they were given, and nothing read without need."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from replaceme.base.errors import ModelError, ParameterError
from replaceme.edits.edits import Edits
from replaceme.edits.unfused import unfused
from replaceme.models.families import family_of, parameter_of
from replaceme.models.memory import stream
from replaceme.models.model import Model
from replaceme.models.streaming import Stream, Unread, free, loaded, replaced, stream_of
from tests.conftest import KINDS, LAYERS, made_model
from tests.helpers import TEXT, edits_of

TWO_ROWS = torch.arange(2, 66).view(2, 32)


def streamed(source: Model, layers: float = 2, dtype: str = "float32", **options: Any) -> tuple[Any, Stream]:
    """Return a streamed model, with room for so many of its largest layers, and its stream."""
    model = stream(source, dtype, room=1 << 40, **options)
    own = stream_of(model)
    assert own is not None
    own.room = int(layers * max(own.sizes))
    return model, own


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_streamed_model_computes_the_same_bits(save_tiny: Callable[..., Model], kind: str, dtype: str) -> None:
    source = save_tiny(kind)
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
def test_no_more_weights_are_in_memory_than_were_allowed_and_the_next_layer_is_read_ahead(tiny: Model) -> None:
    model, own = streamed(tiny, 3)
    ahead = []

    def note(*_: Any) -> None:
        here = sum(own.sizes[index] for index in own.here) + (own.sizes[own.ahead[0]] if own.ahead else 0)
        assert here <= own.room
        real = sum(not each.is_meta for layer in own.layers for each in layer.parameters())
        assert real == len(own.here) * len(own.unread[0])
        ahead.append(own.ahead and own.ahead[0])

    for layer in own.layers:
        layer.get_submodule("mlp").register_forward_hook(note)
    model(TEXT, use_cache=False)
    assert ahead == [1, 2, 3, 4, 5, None]
    assert own.bytes_read == sum(own.sizes)
    # What a pass leaves there serves the next one, in which it is not let go before its turn.
    model(TEXT, use_cache=False)
    assert own.bytes_read == 2 * sum(own.sizes) - 2 * own.sizes[0]


@torch.inference_mode()
def test_with_room_for_a_single_layer_none_is_read_ahead_and_the_result_is_the_same(tiny: Model) -> None:
    model, own = streamed(tiny, 1)
    assert torch.equal(model(TEXT).logits, tiny.load("float32")(TEXT).logits)
    assert len(own.here) == 1


@torch.inference_mode()
def test_layers_are_let_go_but_for_those_that_stay_or_are_in_use(tiny: Model) -> None:
    model, own = streamed(tiny, 6)
    expected = model(TEXT).logits
    assert own.here == {*range(LAYERS)}
    with loaded([own.layers[4]]):
        free(model, [own.layers[1]])
        assert own.here == {1, 4}
        assert torch.equal(model(TEXT).logits, expected)
    free(model)
    assert own.here == set()
    assert all(each.is_meta for layer in own.layers for each in layer.parameters())
    # A resident model has all it needs.
    resident = tiny.load("float32")
    free(resident)
    assert torch.equal(resident(TEXT).logits, expected)


@torch.inference_mode()
def test_what_is_passed_by_is_not_read(tiny: Model) -> None:
    model, own = streamed(tiny)
    with unfused(model, family_of(model.config), Edits("", [1, 2, 5])):
        model(TEXT, use_cache=False)
    assert own.bytes_read == sum(own.sizes[index] for index in (0, 3, 4))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mixtral"])
@torch.inference_mode()
def test_edits_compute_the_same_bits_unfused(save_tiny: Callable[..., Model], kind: str) -> None:
    source = save_tiny(kind)
    resident, (model, own) = source.load("float32"), streamed(source)
    edits = edits_of(2, 2, made_model(kind))
    if kind == "llama":
        channels = torch.stack([torch.arange(48) % 3 + 1, torch.arange(48)], dim=1)
        edits.transforms.pop(1)
        edits.corrections.pop((1, "mlp_output"))
        edits.channels[1] = channels
    logits = []
    for each in (resident, model):
        with unfused(each, family_of(each.config), edits):
            logits.append(each(TEXT, use_cache=False).logits)
    assert torch.equal(*logits)
    # Afterwards it is as before.
    assert torch.equal(resident(TEXT).logits, model(TEXT).logits)
    assert all(isinstance(each, Unread) for index, layer in enumerate(own.layers) if index not in own.here
               for each in layer.parameters())  # fmt: skip


@torch.inference_mode()
def test_a_mixture_of_layers_needs_room_for_all_of_them(tiny: Model) -> None:
    resident, (model, _) = tiny.load("float32"), streamed(tiny, 4)
    edits = Edits("", [2, 3], mixtures={1: {1: -1.0, 2: 1.0, 3: 1.0}})
    logits = []
    for each in (resident, model):
        with unfused(each, family_of(each.config), edits):
            logits.append(each(TEXT, use_cache=False).logits)
    assert torch.equal(*logits)
    small, _ = streamed(tiny, 2)
    with pytest.raises(ParameterError, match=r"^memory: 3 layers and more are needed at once here, and \S+ GB are left"):
        unfused(small, family_of(small.config), edits).__enter__()


def test_a_parameter_is_read_by_itself_unless_its_layer_is_there(tiny: Model) -> None:
    resident, (_, own) = tiny.load("float32"), streamed(tiny)
    layer, expected = own.layers[3], resident.model.layers[3].mlp.up_proj.weight
    assert torch.equal(parameter_of(layer, "mlp.up_proj.weight"), expected)
    assert own.bytes_read == expected.numel() * 4
    assert own.here == set()
    with loaded([layer]):
        assert torch.equal(layer.get_parameter("mlp.up_proj.weight"), expected)
        read = own.bytes_read
        parameter_of(layer, "mlp.up_proj.weight")
        assert own.bytes_read == read
    with replaced(layer, "mlp.up_proj.weight", torch.ones(3, 32, dtype=torch.float64)), loaded([layer]):
        assert torch.equal(layer.get_parameter("mlp.up_proj.weight"), torch.ones(3, 32))
    assert torch.equal(parameter_of(layer, "mlp.up_proj.weight"), expected)


def test_weights_keep_the_dtype_that_each_is_stored_in(save_tiny: Callable[..., Model], tmp_path: Path) -> None:
    source = Model(Path(shutil.copytree(save_tiny(dtype=torch.bfloat16).folder, tmp_path / "mixed")), "mixed")
    tensors = load_file(source.folder / "model.safetensors")
    tensors = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, source.folder / "model.safetensors", metadata={"format": "pt"})
    expected = dict(source.load_stored().named_parameters())
    model, own = streamed(source, as_stored=True)
    with loaded(own.layers[:1]):
        found = dict(model.named_parameters())
        assert {name: each.dtype for name, each in found.items()} == {name: each.dtype for name, each in expected.items()}
        assert all(torch.equal(found[name], expected[name]) for name in expected if "layers.0." in name)


def test_a_weight_that_is_not_finite_is_refused_when_it_is_read(tiny: Model, tmp_path: Path) -> None:
    source = Model(Path(shutil.copytree(tiny.folder, tmp_path / "broken")), "broken")
    tensors = load_file(source.folder / "model.safetensors")
    tensors["model.layers.4.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, source.folder / "model.safetensors", metadata={"format": "pt"})
    model, _ = streamed(source)
    with pytest.raises(ModelError, match=r"^model_path: the weight model\.layers\.4\.mlp\.up_proj\.weight .* holds NaN"):
        model(TEXT)


def test_a_missing_weight_is_refused_at_once(tiny: Model, tmp_path: Path) -> None:
    source = Model(Path(shutil.copytree(tiny.folder, tmp_path / "lacking")), "lacking")
    tensors = load_file(source.folder / "model.safetensors")
    del tensors["model.layers.4.mlp.up_proj.weight"]
    save_file(tensors, source.folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"^model_path: model\.layers\.4\.mlp\.up_proj\.weight \(1 in all\) is missing"):
        streamed(source)


def test_the_layers_are_all_that_stays_in_the_files(tiny: Model) -> None:
    model, own = streamed(tiny)
    assert len(own.layers) == LAYERS
    assert {name for name, each in model.named_parameters() if not each.is_meta} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
    }
    assert model.lm_head.weight is model.model.embed_tokens.weight
