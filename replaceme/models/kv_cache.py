"""A model's key-value cache: fill it, reserve it, continue from it, and measure its size.

Newer versions of transformers name the argument and the output ``cache``, older ones ``past_key_values``.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from replaceme.models.families import Family, decoder_of


def fill_cache(model: Any, ids: Tensor) -> Any:
    """Return the cache after token ids (rows, tokens), without computing logits."""
    output = decoder_of(model)(input_ids=ids, use_cache=True)
    cache = getattr(output, "cache", None)
    return cache if cache is not None else getattr(output, "past_key_values", None)


def reserved_cache(config: Any, length: int) -> Any:
    """Return an empty cache whose memory for ``length`` tokens is allocated at the first one.

    transformers' own cache copies all keys and values at each step, so that 512 tokens of 30 texts take over a third longer
    (SmolLM2-135M in float32, on two cores). Layers with a sliding window below ``length`` keep few of them, and stay.
    """
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        keeps_all = getattr(layer, "sliding_window", length) >= length
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and keeps_all:
            cache.layers[index] = _ReservedLayer(length)
    return cache


class _ReservedLayer(DynamicLayer):
    """Keys and values (rows, heads, tokens, d) of a layer: views of tensors for ``length`` tokens."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_options: Any) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        new = key_states, value_states
        if not start:
            self.lazy_initialization(*new)
            self.reserved = [part.new_empty(*part.shape[:-2], self.length, part.shape[-1]) for part in new]
        end = start + key_states.shape[-2]
        for whole, part in zip(self.reserved, new, strict=True):
            whole[..., start:end, :] = part
        self.keys, self.values = (whole[..., :end, :] for whole in self.reserved)
        return self.keys, self.values


@contextmanager
def eager_attention_where_faster(model: Any, family: Family) -> Iterator[None]:
    """Attend by plain products inside the block where that is faster from one token at a time: on a processor, grouped heads.

    Over some hundred tokens torch's kernel takes four times as long there. A family without a description is left alone.
    """
    config = model.config
    heads = [getattr(config, name, None) for name in ("num_key_value_heads", "num_attention_heads")]
    if model.device.type != "cpu" or family.detected or None in heads or heads[0] == heads[1]:
        yield
        return
    before = config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def cache_arguments(model: Any, cache: Any) -> dict[str, Any]:
    """Return the arguments of a forward pass that continues from ``cache``; None is a pass without a cache."""
    if cache is None:
        return {"use_cache": False}
    return {
        "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values": cache,
        "use_cache": True,
    }


def shares_contexts(model: Any) -> bool:
    """Return whether rows of a model's cache can be repeated, so that the choices of an item share their context."""
    return hasattr(_example_cache(model, 1), "batch_select_indices")


def cache_bytes_per_token(model: Any) -> int | None:
    """Return the bytes of keys and values that a loaded model caches per token of a short text, over all layers.

    None for a model with another kind of cache (a state-space model, say).
    """
    tokens = 8
    cache = _example_cache(model, tokens)
    if not all(hasattr(layer, "keys") for layer in getattr(cache, "layers", [None])):
        return None
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) // tokens


@torch.inference_mode()
def _example_cache(model: Any, tokens: int) -> Any:
    return fill_cache(model, torch.zeros(1, tokens, dtype=torch.long, device=model.device))
