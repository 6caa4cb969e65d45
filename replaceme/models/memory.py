"""How much memory a model's weights may take (``memory``): whether it is loaded whole or streamed, and what a run will need."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from replaceme.base.errors import ModelError, ParameterError
from replaceme.base.parameters import Params, size_of
from replaceme.base.progress import logger
from replaceme.models.devices import free_memory, release_memory, resolve_device
from replaceme.models.dtypes import dtype_name, is_finite, proof_dtypes
from replaceme.models.families import FAMILIES, Family, Linear, parameter_of
from replaceme.models.model import Model
from replaceme.models.model_files import StoredTensor
from replaceme.models.own_form import KIND
from replaceme.models.streaming import LayerLoader, LayerStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Why the model can't be streamed to be healed.
HEALING_OBSTACLE = "heal_tokens trains many layers together"
# Of the free memory, what ``memory: auto`` gives to weights; the rest is for states and sums.
AUTO_FRACTION = 0.7


def load_within_budget(
    source: Model,
    params: Params,
    dtype: str,
    *,
    packed: bool = False,
    obstacle: str | None = None,
) -> PreTrainedModel:
    """Load a model as ``memory`` allows: whole, or streamed layer by layer from its files. The results are the same bits.

    Args:
        source: the model's files.
        params: ``memory``, ``device`` and ``device_map`` say how it is loaded.
        dtype: a torch dtype's name.
        packed: quantize its linears to NF4.
        obstacle: why it can't be streamed for this use; None if it can.

    Raises:
        ModelError, ParameterError, ResourceError: as ``Model.load`` and ``weight_budget``.
    """
    device = resolve_device(params.device)
    if budget := weight_budget(source, params, dtype, packed=packed, obstacle=obstacle):
        logger.info(
            "memory: %s is streamed: of its weights, %s, at most %s are in memory",
            source.name, format_size(weight_bytes(source, dtype)), format_size(budget),
        )  # fmt: skip
        return load_streamed(source, dtype, budget, device=device)
    return source.load(dtype, device, packed, params.device_map)


def weight_budget(
    source: Model, params: Params, dtype: str, *, packed: bool = False, obstacle: str | None = None
) -> int | None:
    """Return the bytes that the weights of a streamed model may take; None if it is loaded whole.

    Args:
        source, params, dtype, packed, obstacle: as of ``load_within_budget``.

    Raises:
        ParameterError: the model has to be streamed by ``memory``, and can't be, or not within so little.
    """
    outside, layers = _measure_layers(source, dtype, dtype)
    # NF4 of 16 bits: 4, and a scale for each 64 entries. What is outside the layers stays as it is.
    whole = outside + (sum(layers) * 9 // 32 if packed else sum(layers))
    obstacle = obstacle or _find_obstacle(source, params, packed)
    return _choose_budget(source, params, whole, outside, max(layers, default=0), obstacle)


def proof_budget(source: Model, params: Params, obstacle: str | None, operator_width: int = 0) -> int | None:
    """Return what ``weight_budget`` does for the export's proof, which computes in the formats of ``proof_dtypes``.

    Args:
        source, params, obstacle: as of ``load_within_budget``.
        operator_width: d, if the pruned model, which is streamed too, has a layer with a (d, d) matrix more; else 0.
    """
    outside_dtype, inside = proof_dtypes(source)
    obstacle = obstacle or _find_obstacle(source, params, packed=False)
    # Loaded whole, all of it has the dtype of the layers.
    outside, layers = _measure_layers(source, inside if obstacle else outside_dtype, inside)
    largest = max(layers, default=0) + operator_width**2 * getattr(torch, inside).itemsize
    return _choose_budget(source, params, outside + sum(layers), outside, largest, obstacle)


def _choose_budget(source: Model, params: Params, needed: int, outside: int, largest: int, obstacle: str | None) -> int | None:
    """Return the bytes for a streamed model's weights, given those of the whole, outside its layers, and of the largest one."""
    if params.memory is None:
        return None
    auto = params.memory == "auto"
    budget = _free_budget(params) if auto else size_of(str(params.memory))
    if auto and needed > budget:
        # The streamed model of an earlier stage may still be there.
        release_memory()
        budget = _free_budget(params)
    if needed <= budget:
        return None
    if obstacle and auto:
        logger.warning(
            "memory: the weights of %s take %s, and are loaded whole: %s", source.name, format_size(needed), obstacle
        )
        return None
    if obstacle:
        size = format_size(needed)
        raise ParameterError(
            f"memory: {params.memory} is less than the {size} of {source.name}, and {obstacle}; use auto or null."
        )
    if budget < outside + largest:
        raise ParameterError(
            f"memory: {format_size(budget)} is too little for {source.name}, of which {format_size(outside + largest)} have to "
            f"be there at once; allow more, such as {format_size(outside + 2 * largest)}."
        )
    return budget


def _free_budget(params: Params) -> int:
    """Return the bytes that ``memory: auto`` gives to weights at present."""
    return int(AUTO_FRACTION * free_memory(resolve_device(params.device)))


def choose_processor(params: Params) -> Params:
    """Return the parameters for what is computed on the processor, whatever the device."""
    return params.model_copy(update={"device": "cpu", "device_map": None})


def _find_obstacle(source: Model, params: Params, packed: bool) -> str | None:
    """Return why a model can't be streamed; None if it can."""
    if packed:
        return "use_4bit packs them while they are loaded"
    if params.device_map is not None:
        return "device_map spreads them by itself"
    if source.trust_remote_code and source.code_references("config.json"):
        return "the model's own code can read them at any time"
    try:
        _find_family(source)
    except ModelError:
        return "it is not known which of its modules are the layers"
    return None


def load_streamed(source: Model, dtype: str | None, budget: int, *, device: str = "cpu") -> PreTrainedModel:
    """Load a model whose layers stay in their files until their turn comes.

    Args:
        source: the model's files.
        dtype: as of ``load_without_layers``.
        budget, device: as of ``stream_layers``.

    Raises:
        ModelError: as ``Model.load``; a weight of a layer that is not finite is noticed when it is first read.
    """
    return stream_layers(source, load_without_layers(source, dtype), budget, device)


def load_without_layers(
    source: Model, dtype: str | None, *, layer_dtype: str | None = None, config: dict[str, Any] | None = None
) -> PreTrainedModel:
    """Load a model whose layers have no weights: their parameters are on the meta device.

    Args:
        source: the model's files.
        dtype: a torch dtype's name, or auto, as for ``Model.load``; None gives each weight the dtype that it is stored in.
        layer_dtype: another dtype of the layers' parameters; None is the same.
        config: entries of the config to change.
    """
    # Another streamed model may have been needed before.
    release_memory()
    left_out = {name for tensors in _split_tensors(source)[1].values() for name in tensors}
    if dtype is None:
        return source.load_stored(left_out)
    model = source.load(dtype, config=config, left_out=left_out)
    if layer_dtype is not None:
        for parameter in _find_family(source).decoder_layers(model).parameters():
            parameter.data = parameter.to(getattr(torch, layer_dtype))
    return model


def stream_layers(source: Model, model: PreTrainedModel, budget: int, device: str = "cpu") -> PreTrainedModel:
    """Let the layers of a model get their weights from its files when their turn comes.

    Args:
        source: the model's files.
        model: the result of ``load_without_layers``, which is changed.
        budget: the bytes that weights in memory may take.
        device: where it computes.
    """
    family, target = _find_family(source), torch.device(device)
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(target))
    outside = sum(each.numel() * each.itemsize for each in model.parameters() if not each.is_meta)

    def check(values: Iterable[Tensor]) -> None:
        if not is_finite(*values):
            source.check_finite(dtype_name(model.dtype))

    loader = LayerLoader(model, family.layers, _split_tensors(source)[1], target)
    layers = family.decoder_layers(model)
    model.__dict__["stream"] = LayerStream(layers, loader, budget - outside, check)
    return model


def weight_bytes(source: Model, dtype: str) -> int:
    """Return the bytes of a model's weights in a dtype."""
    outside, layers = _measure_layers(source, dtype, dtype)
    return outside + sum(layers)


def measure_parts(source: Model, dtype: str) -> tuple[int, int]:
    """Return the bytes of the weights outside a model's layers, and of its largest layer, in a dtype."""
    outside, layers = _measure_layers(source, dtype, dtype)
    return outside, max(layers, default=0)


def healing_bytes(source: Model, params: Params) -> float:
    """Return about how much memory a training by ``heal_tokens`` takes (docs/scale.md), without the sums of a method.

    Args:
        source: the dense model's files.
        params: ``layers_to_skip`` is the number of layers that go. Half of those that stay are taken to be after the cut.
    """
    family, config = source.family(), source.config()
    first, *_ = family.decoder_layers(source.skeleton(config))
    outside, layers = _measure_layers(source, params.dtype, params.dtype)
    itemsize = getattr(torch, params.dtype).itemsize
    kept = max(len(layers) - params.layers_to_skip, 1)
    weights = sum(layers) / itemsize * kept / max(len(layers), 1)
    # Weight, gradient and moments are float32; a copy has the format of the products. Muon has one moment less, but is not for
    # stacks of experts, which are nearly all of such a model.
    muon = params.heal_optimizer == "muon" and not family.experts
    each = (12 if muon else 16) + (itemsize if itemsize < 4 else 0)
    linears: tuple[Linear, ...] = ("attention_output", "mlp_output")
    last = {linear: [parameter_of(first, name).shape for name in family.output_parameters(first, linear)] for linear in linears}
    outputs = kept / 2 * sum(shape.numel() for shapes in last.values() for shape in shapes)
    # Of a stack of experts, (experts, d, channels), a token takes a few.
    experts = int(getattr(config, "num_experts_per_tok", None) or 1)
    channels = sum(shape[-1] * (experts if len(shape) > 2 else 1) for shape in last["mlp_output"] if len(shape) > 1)
    trained = {"all": weights, "after_cut": weights / 2, "outputs": outputs, "lora": 0}
    states = itemsize * params.batch_size * params.max_length * kept * (10 * int(config.hidden_size) + 5 * channels)
    return outside + sum(layers) + each * trained[params.heal_weights] + states


def _find_family(source: Model) -> Family:
    """Return the description of a model that is to be streamed, which may be of our own form. Raises ModelError for others."""
    config = source.config()
    kind = str(config.model_type).removeprefix(KIND)
    return FAMILIES[kind](config) if kind in FAMILIES else source.family()


def _measure_layers(source: Model, outside: str, inside: str) -> tuple[int, list[int]]:
    """Return the bytes of the weights outside a model's layers in one dtype, and of each layer in another."""
    rest, layers = _split_tensors(source)
    sizes = [sum(tensor.entries for tensor in tensors.values()) for tensors in (rest, *layers.values())]
    return sizes[0] * getattr(torch, outside).itemsize, [size * getattr(torch, inside).itemsize for size in sizes[1:]]


def _split_tensors(source: Model) -> tuple[dict[str, StoredTensor], dict[int, dict[str, StoredTensor]]]:
    """Return the tensors in a model's files by name: those outside of its layers, and those of each layer."""
    try:
        leaf = re.escape(_find_family(source).layers.rpartition(".")[2])
    except ModelError:
        leaf = "layers"
    outside: dict[str, StoredTensor] = {}
    layers: dict[int, dict[str, StoredTensor]] = {}
    for name, tensor in source.stored.items():
        match = re.search(rf"(?:^|\.){leaf}\.(\d+)\.", name)
        (layers.setdefault(int(match[1]), {}) if match else outside)[name] = tensor
    return outside, layers


def format_size(count: float) -> str:
    """Return a number of bytes in words."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
