"""How much memory a model's weights may take (``memory``): whether it is loaded whole or streamed, and what a run will need."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from replaceme.base.compute import free_memory, release_memory, resolve_device
from replaceme.base.errors import ModelError, ParameterError
from replaceme.base.params import Params, size_of
from replaceme.base.progress import logger
from replaceme.models.families import FAMILIES, Family
from replaceme.models.model import Model, Stored, is_finite
from replaceme.models.own_form import KIND
from replaceme.models.streaming import LayerLoader, LayerStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Why the model is loaded whole to be healed.
HEALED_WHOLE = "heal_epochs trains many layers together"
# Of the free memory, what ``memory: auto`` gives to weights; the rest is for states and sums.
AUTO_FRACTION = 0.7


def load_within_budget(
    source: Model,
    params: Params,
    dtype: str,
    *,
    packed: bool = False,
    whole: str | None = None,
    folder: Path | None = None,
) -> PreTrainedModel:
    """Load a model as ``memory`` allows: whole, or streamed layer by layer from its files. The results are the same bits.

    Args:
        source: the model's files.
        params: ``memory``, ``device`` and ``device_map`` say how it is loaded.
        dtype: a torch dtype's name.
        packed: quantize its linears to NF4.
        whole: why it can't be streamed for this use; None if it can.
        folder: where walks of a streamed model may put scratch files; None is the system's temporary folder.

    Raises:
        ModelError, ParameterError, ResourceError: as ``Model.load`` and ``weight_budget``.
    """
    device = resolve_device(params.device)
    if budget := weight_budget(source, params, dtype, packed=packed, whole=whole):
        logger.info(
            "memory: %s is streamed: of its weights, %s, at most %s are in memory",
            source.name, shown_size(weight_bytes(source, dtype)), shown_size(budget),
        )  # fmt: skip
        return load_streamed(source, dtype, device, budget, folder=folder)
    return source.load(dtype, device, packed, params.device_map)


def weight_budget(
    source: Model, params: Params, dtype: str, *, packed: bool = False, whole: str | None = None, layers: str | None = None
) -> int | None:
    """Return the bytes that the weights of a streamed model may take; None if it is loaded whole.

    Args:
        source, params, dtype, packed, whole: as of ``load_within_budget``.
        layers: another dtype of its layers if it is streamed; None is the same.

    Raises:
        ParameterError: the model has to be streamed by ``memory``, and can't be, or not within so little.
    """
    if params.memory is None:
        return None
    obstacle = whole or _obstacle(source, params, packed)
    outside, of_layers = _bytes_by_part(source, dtype if layers and not obstacle else layers or dtype, layers or dtype)
    largest, needed = max(of_layers, default=0), outside + sum(of_layers)
    if packed:
        # NF4 of 16 bits: 4, and a scale for each 64 entries. What is outside the layers stays as it is.
        needed = outside + sum(of_layers) * 9 // 32
    auto = params.memory == "auto"
    budget = int(AUTO_FRACTION * free_memory(resolve_device(params.device))) if auto else size_of(str(params.memory))
    if needed <= budget:
        return None
    if obstacle and auto:
        logger.warning("memory: the weights of %s take %s, and are loaded whole: %s", source.name, shown_size(needed), obstacle)
        return None
    if obstacle:
        raise ParameterError(
            f"memory: {params.memory} is less than the {shown_size(needed)} of {source.name}, and {obstacle}; use auto or null."
        )
    if budget < outside + largest:
        raise ParameterError(
            f"memory: {shown_size(budget)} is too little for {source.name}, of which {shown_size(outside + largest)} have to "
            f"be there at once; allow more, such as {shown_size(outside + 2 * largest)}."
        )
    return budget


def on_processor(params: Params) -> Params:
    """Return the parameters for what is computed on the processor, whatever the device."""
    return params.model_copy(update={"device": "cpu", "device_map": None})


def _obstacle(source: Model, params: Params, packed: bool) -> str | None:
    """Return why a model can't be streamed; None if it can."""
    if packed:
        return "use_4bit packs them while they are loaded"
    if params.device_map is not None:
        return "device_map spreads them by itself"
    if source.trust_remote_code and source.code_references("config.json"):
        return "the model's own code can read them at any time"
    try:
        _streamed_family(source)
    except ModelError:
        return "the place of its layers is not known"
    return None


def load_streamed(
    source: Model,
    dtype: str = "auto",
    device: str = "cpu",
    budget: int = 0,
    *,
    config: dict[str, Any] | None = None,
    folder: Path | None = None,
    as_stored: bool = False,
    layers: str | None = None,
) -> PreTrainedModel:
    """Load a model whose layers stay in their files until their turn comes.

    Args:
        source: the model's files.
        dtype: a torch dtype's name, or auto, as for ``Model.load``.
        device: where it computes.
        budget: the bytes that weights in memory may take.
        config: entries of the config to change.
        folder: where walks may put scratch files; None is the system's temporary folder.
        as_stored: give each weight the dtype that it is stored in, as ``Model.load_stored``.
        layers: another dtype of the layers' weights; None is the same.

    Raises:
        ModelError: as ``Model.load``; a weight of a layer that is not finite is noticed when it is first read.
    """
    # Another streamed model may have been needed before.
    release_memory()
    family, (_, stored) = _streamed_family(source), _tensors_by_part(source)
    left_out = {name for tensors in stored.values() for name in tensors}
    model = source.load_stored(left_out) if as_stored else source.load(dtype, config=config, left_out=left_out)
    if layers is not None:
        for parameter in family.decoder_layers(model).parameters():
            parameter.data = parameter.to(getattr(torch, layers))
    place = torch.device(device)
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(place))
    outside = sum(each.numel() * each.itemsize for each in model.parameters() if not each.is_meta)

    def check(values: Iterable[Tensor]) -> None:
        if not all(map(is_finite, values)):
            source.check_finite(str(model.dtype).removeprefix("torch."))

    loader = LayerLoader(model, family.layers, stored, place)
    stream = LayerStream(family.decoder_layers(model), loader, budget - outside, check=check, folder=folder)
    model.__dict__["stream"] = stream
    return model


def weight_bytes(source: Model, dtype: str) -> int:
    """Return the bytes of a model's weights in a dtype."""
    outside, layers = _bytes_by_part(source, dtype, dtype)
    return outside + sum(layers)


def parts_of(source: Model, dtype: str) -> tuple[int, int]:
    """Return the bytes of the weights outside a model's layers, and of its largest layer, in a dtype."""
    outside, layers = _bytes_by_part(source, dtype, dtype)
    return outside, max(layers, default=0)


def _streamed_family(source: Model) -> Family:
    """Return the description of a model that is to be streamed, which may be of our own form. Raises ModelError for others."""
    config = source.config()
    kind = str(config.model_type).removeprefix(KIND)
    return FAMILIES[kind](config) if kind in FAMILIES else source.family()


def _bytes_by_part(source: Model, outside: str, inside: str) -> tuple[int, list[int]]:
    """Return the bytes of the weights outside a model's layers in one dtype, and of each layer in another."""
    rest, layers = _tensors_by_part(source)
    sizes = [sum(tensor.entries for tensor in tensors.values()) for tensors in (rest, *layers.values())]
    return sizes[0] * getattr(torch, outside).itemsize, [size * getattr(torch, inside).itemsize for size in sizes[1:]]


def _tensors_by_part(source: Model) -> tuple[dict[str, Stored], dict[int, dict[str, Stored]]]:
    """Return the tensors in a model's files by name: those outside of its layers, and those of each layer."""
    try:
        leaf = re.escape(_streamed_family(source).layers.rpartition(".")[2])
    except ModelError:
        leaf = "layers"
    outside: dict[str, Stored] = {}
    layers: dict[int, dict[str, Stored]] = {}
    for name, tensor in source.stored().items():
        found = re.search(rf"(?:^|\.){leaf}\.(\d+)\.", name)
        (layers.setdefault(int(found[1]), {}) if found else outside)[name] = tensor
    return outside, layers


def shown_size(count: float) -> str:
    """Return a number of bytes in words."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
