"""How much memory a model's weights may take (``memory``): whether it is loaded whole or streamed, and what a run will need."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from replaceme.base.compute import free_memory, give_back, resolve_device
from replaceme.base.errors import ModelError, ParameterError
from replaceme.base.params import Params, size_of
from replaceme.base.progress import logger
from replaceme.models.dtypes import FORMATS, is_finite
from replaceme.models.families import FAMILIES, Family
from replaceme.models.model import Model
from replaceme.models.own_form import KIND
from replaceme.models.streaming import Stream, Unread, layers_left_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Why the model is loaded whole to be healed.
HEALED_WHOLE = "heal_epochs trains many layers together"
# Of the free memory, what ``memory: auto`` gives to weights; the rest is for states and sums.
SHARE = 0.7


def load_within(
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
        ModelError, ParameterError, ResourceError: as ``Model.load`` and ``room_of``.
    """
    device = resolve_device(params.device)
    # Of an earlier stage, too.
    give_back()
    if room := room_of(source, params, dtype, packed=packed, whole=whole):
        logger.info(
            "memory: %s is streamed: of its weights, %s, at most %s are in memory",
            source.name, shown_size(weight_bytes(source, dtype)), shown_size(room),
        )  # fmt: skip
        return stream(source, dtype, device, room, folder=folder)
    return source.load(dtype, device, packed, params.device_map)


def room_of(
    source: Model, params: Params, dtype: str, *, packed: bool = False, whole: str | None = None, layers: str | None = None
) -> int | None:
    """Return the bytes that the weights of a streamed model may take; None if it is loaded whole.

    Args:
        source, params, dtype, packed, whole: as of ``load_within``.
        layers: another dtype of its layers if it is streamed; None is the same.

    Raises:
        ParameterError: the model has to be streamed by ``memory``, and can't be, or not within so little.
    """
    if params.memory is None:
        return None
    of_layers, obstacle = _bytes_by_layer(source, layers or dtype), whole or _obstacle(source, params, packed)
    outside = of_layers.pop("", 0)
    if layers and not obstacle:
        outside, _ = parts_of(source, dtype)
    needed, largest = outside + sum(of_layers.values()), max(of_layers.values(), default=0)
    if packed:
        # NF4 of 16 bits: 4, and a scale for each 64 entries. What is outside the layers stays as it is.
        needed = outside + (needed - outside) * 9 // 32
    room = int(SHARE * free_memory(resolve_device(params.device))) if params.memory == "auto" else size_of(params.memory)
    if needed <= room:
        return None
    if obstacle and params.memory == "auto":
        logger.warning("memory: the weights of %s take %s, and are loaded whole: %s", source.name, shown_size(needed), obstacle)
        return None
    if obstacle:
        raise ParameterError(
            f"memory: {params.memory} is less than the {shown_size(needed)} of {source.name}, and {obstacle}; use auto or null."
        )
    if room < outside + largest:
        raise ParameterError(
            f"memory: {shown_size(room)} is too little for {source.name}, of which {shown_size(outside + largest)} have to be "
            f"there at once; use at least {shown_size(outside + 2 * largest)}, so that a layer is read while another computes."
        )
    return room


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
        streamed_family(source)
    except ModelError:
        return "the place of its layers is not known"
    return None


def streamed_family(source: Model) -> Family:
    """Return the description of a model that is to be streamed, which may be of our own form. Raises ModelError for others."""
    config = source.config()
    kind = str(config.model_type).removeprefix(KIND)
    return FAMILIES[kind](config) if kind in FAMILIES else source.family()


def stream(
    source: Model,
    dtype: str = "auto",
    device: str = "cpu",
    room: int = 0,
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
        room: the bytes that weights in memory may take.
        config: entries of the config to change.
        folder: where walks may put scratch files; None is the system's temporary folder.
        as_stored: give each weight the dtype that it is stored in, as ``Model.load_stored``.
        layers: another dtype of the layers' weights; None is the same.

    Raises:
        ModelError: as ``Model.load``; a weight of a layer that is not finite is noticed when it is first read.
    """
    family, stored = streamed_family(source), source.stored()
    prefix = f"{family.layers}."
    with layers_left_out(prefix) as groups:
        model = source.load_stored() if as_stored else source.load(dtype, config=config)
    for group in groups if as_stored else ():
        if group.converter is None:
            group.dtype = FORMATS.get(stored[group.names[0]].format, group.dtype)
    if layers is not None:
        for group in groups:
            group.dtype = getattr(torch, layers)
    place = torch.device(device)
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(place))
    outside = sum(each.numel() * each.itemsize for each in model.parameters() if not each.is_meta)

    def check(values: Mapping[str, Tensor]) -> None:
        if not all(map(is_finite, values.values())):
            source.check_finite(str(model.dtype).removeprefix("torch."))

    streamed = Stream(
        model,
        family.decoder_layers(model),
        groups,
        stored,
        prefix=prefix,
        room=room - outside,
        device=place,
        check=check,
        folder=folder,
    )
    model.__dict__["stream"] = streamed
    tensors = (*model.named_parameters(), *model.named_buffers())
    if left := [name for name, each in tensors if each.is_meta and not isinstance(each, Unread)]:
        raise ModelError(f"memory: {left[0]} of {source.name} is in no file, so that the model can't be streamed; use null.")
    return model


def weight_bytes(source: Model, dtype: str) -> int:
    """Return the bytes of a model's weights in a dtype."""
    return sum(_bytes_by_layer(source, dtype).values())


def parts_of(source: Model, dtype: str) -> tuple[int, int]:
    """Return the bytes of the weights outside a model's layers, and of its largest layer, in a dtype."""
    parts = _bytes_by_layer(source, dtype)
    return parts.pop("", 0), max(parts.values(), default=0)


def _bytes_by_layer(source: Model, dtype: str) -> dict[str, int]:
    """Return the bytes of each layer's weights by its number, and under the empty name those of all others."""
    try:
        leaf = re.escape(streamed_family(source).layers.rpartition(".")[2])
    except ModelError:
        leaf = "layers"
    parts: dict[str, int] = {}
    for name, place in source.stored().items():
        found = re.search(rf"(?:^|\.){leaf}\.(\d+)\.", name)
        layer = found[1] if found else ""
        parts[layer] = parts.get(layer, 0) + place.entries * getattr(torch, dtype).itemsize
    return parts


def shown_size(count: float) -> str:
    """Return a number of bytes in words."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
